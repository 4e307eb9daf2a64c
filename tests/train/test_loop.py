"""The training loop in one process: exact resume, signals, divergence, order of work, best checkpoint, log lines."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from mae_align.data.source import ArraySource
from mae_align.runtime.devices import compile_counter
from mae_align.runtime.errors import InputError
from mae_align.train import loop as fit_module
from mae_align.train.batches import StreamedBatches
from mae_align.train.checkpoint import BestBy, Better, Checkpoints
from mae_align.train.log import MetricLog
from mae_align.train.loop import Diverged, Preempted, Schedule, fit
from tests.train.toy_training import ToyState, ToyTraining, images_and_labels

STEPS = 40


def source(training: Any, streamed: bool) -> Any:
    images, labels = images_and_labels()
    if not streamed:
        return training.put(images, labels)
    return StreamedBatches(training, ArraySource(images, labels, ("a", "b", "c"), "toy"), seed=1)


def run(folder: Path | None = None, *, training: ToyTraining | None = None, streamed: bool = False, **options: Any):
    """A run of the toy; with a folder it saves every 10 steps and logs every 8."""
    training = training or ToyTraining()
    settings: dict[str, Any] = {"num_steps": STEPS, "steps_per_call": 4} | options
    state, feed = training.init(range(3, 3 + training.num_members)), source(training, streamed)
    if folder is None:
        return fit(training, state, feed, **settings)  # pyright: ignore[reportArgumentType]
    keep = {"keep_best": settings.pop("keep_best", None), "keep_latest": settings.pop("keep_latest", 2)}
    every = settings.pop("every", 10)
    with (
        Checkpoints.open(folder / "checkpoints", identity="toy", every=every, **keep) as checkpoints,
        MetricLog(folder / "log") as log,
    ):
        settings = {"checkpoints": checkpoints, "log": log, "log_every": 8} | settings
        return fit(training, state, feed, **settings)  # pyright: ignore[reportArgumentType]


def numbers(state: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(dataclasses.replace(state, keys=jax.random.key_data(state.keys)))
    return [np.asarray(leaf) for leaf in leaves]


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(numbers(a), numbers(b), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def at(step: int, number: signal.Signals) -> Any:
    """An evaluation during which a signal arrives."""

    def evaluate(state: Any, now: int) -> dict[str, float]:
        if now == step:
            signal.raise_signal(number)
        return {"seen": float(now)}

    return evaluate


@pytest.fixture(scope="module", params=[False, True], ids=["resident", "streamed"])
def whole(request, tmp_path_factory) -> tuple[bool, Path, Any, list[int]]:
    """A run that is never interrupted."""
    folder, training = tmp_path_factory.mktemp("whole"), ToyTraining()
    state = run(folder, training=training, streamed=request.param, evaluate=at(0, signal.SIGTERM), evaluate_every=4)
    return request.param, folder, state, training.dispatches


@pytest.mark.parametrize("step", [4, 20])
def test_stopped_by_sigterm_and_gone_on_the_end_is_the_same_bit_for_bit(tmp_path, whole, step):
    streamed, folder, expected, dispatches = whole
    first, second, before = ToyTraining(), ToyTraining(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=rf"SIGTERM: step {step} is saved in .*the same command goes on") as stopped:
        run(tmp_path, training=first, streamed=streamed, evaluate=at(step, signal.SIGTERM), evaluate_every=4)
    assert (stopped.value.step, stopped.value.status) == (step, 143)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    state = run(tmp_path, training=second, streamed=streamed, evaluate=at(0, signal.SIGTERM), evaluate_every=4)
    assert_same(state, expected)
    assert first.dispatches + second.dispatches == dispatches
    # Even where the stop was within the steps of one line of metrics.
    assert lines(tmp_path) == lines(folder)


def test_a_run_that_fails_goes_on_from_the_last_regular_checkpoint(tmp_path, whole):
    streamed, folder, expected, _ = whole

    def broken(state: Any, step: int) -> dict[str, float]:
        if step == 32:
            raise OSError("no power")
        return {"seen": float(step)}

    with pytest.raises(OSError, match="no power"):
        run(tmp_path, streamed=streamed, evaluate=broken, evaluate_every=4)
    assert lines(tmp_path)[-1] == lines(folder)[len(lines(tmp_path)) - 1]
    resumed = ToyTraining()
    state = run(tmp_path, training=resumed, streamed=streamed, evaluate=at(0, signal.SIGTERM), evaluate_every=4)
    assert sum(resumed.dispatches) == STEPS - 30
    assert_same(state, expected)
    assert lines(tmp_path) == lines(folder)
    # A finished run has nothing to do.
    done = ToyTraining()
    assert_same(run(tmp_path, training=done, streamed=streamed), expected)
    assert done.dispatches == []


def test_a_run_of_eight_devices_goes_on_with_two(tmp_path, whole):
    streamed, folder, expected, _ = whole
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "40")
    two = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    training = ToyTraining(mesh=two)
    state = run(tmp_path, training=training, streamed=streamed, evaluate=at(0, signal.SIGTERM), evaluate_every=4)
    assert sum(training.dispatches) == 10 and len(state.params["w"].sharding.device_set) == 2
    for x, y in zip(numbers(state), numbers(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    theirs = {line["step"]: line["loss"] for line in lines(folder) if "loss" in line}
    ours = {line["step"]: line["loss"] for line in lines(tmp_path) if "loss" in line}
    for step, loss in ours.items():
        np.testing.assert_allclose(loss, theirs[step], rtol=1e-5)


def test_ctrl_c_saves_and_interrupts_and_a_second_one_ends_at_once(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "once", evaluate=at(12, signal.SIGINT), evaluate_every=4)
    assert (tmp_path / "once" / "checkpoints" / "12").is_dir()

    def twice(state: Any, step: int) -> dict[str, float]:
        if step == 12:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "twice", evaluate=twice, evaluate_every=4)
    assert not (tmp_path / "twice" / "checkpoints" / "12").exists()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_during_the_last_save_is_not_lost(tmp_path, monkeypatch, number, error):
    save = Checkpoints.save

    def interrupted(self: Checkpoints, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        if step == STEPS:
            signal.raise_signal(number)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(error):
        run(tmp_path)
    assert (tmp_path / "checkpoints" / str(STEPS)).is_dir()


def test_outside_the_main_thread_and_without_checkpoints_signals_are_left_alone(tmp_path):
    seen = []

    def look(state: Any, step: int) -> dict[str, float]:
        seen.append(signal.getsignal(signal.SIGTERM))
        return {}

    worker = threading.Thread(target=run, args=(tmp_path,), kwargs={"evaluate": look})
    worker.start()
    worker.join()
    run(evaluate=look)
    assert seen == [signal.getsignal(signal.SIGTERM)] * 2
    assert (tmp_path / "checkpoints" / "40").is_dir()


class Poisoned(ToyTraining):
    """At the end of the dispatch that reaches a step a parameter of the last member is infinite."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def advance(self, state: ToyState, data: Any, num_steps: int) -> Any:
        state, metrics = super().advance(state, data, num_steps)
        if int(state.step) == self.step:
            state.params["w"] = state.params["w"].at[-1, 3].set(jnp.inf)
        return state, metrics


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    with pytest.raises(
        Diverged,
        match=r"the loss of member 1 is (inf|nan) at step 17: .* last good checkpoint is step 10 in .*",
    ) as error:
        run(tmp_path, training=Poisoned(16))
    assert (error.value.step, error.value.member, error.value.checkpoint) == (17, 1, 10)
    with Checkpoints.open(tmp_path / "checkpoints", identity="toy", every=10) as checkpoints:
        assert checkpoints.steps() == [10]
    assert [line["step"] for line in lines(tmp_path)] == [8, 16]


def test_parameters_that_are_not_finite_are_not_saved_though_every_loss_is(tmp_path):
    with pytest.raises(Diverged, match=r"a parameter of member 1 is not finite at step 20: .* step 10 in "):
        run(tmp_path, training=Poisoned(20))
    with Checkpoints.open(tmp_path / "checkpoints", identity="toy", every=10) as checkpoints:
        assert checkpoints.steps() == [10]
    with pytest.raises(Diverged, match=r"at step 40: .*there is no checkpoint"):
        run(training=Poisoned(40))


def test_losses_are_read_while_the_next_dispatch_runs_and_always_before_a_save(monkeypatch, tmp_path):
    events: list[str] = []

    class Told(ToyTraining):
        def advance(self, state: ToyState, data: Any, num_steps: int) -> Any:
            events.append("send")
            return super().advance(state, data, num_steps)

    read, save = fit_module._on_host, Checkpoints.save
    monkeypatch.setattr(fit_module, "_on_host", lambda x: (events.append("read"), read(x))[1])
    monkeypatch.setattr(Checkpoints, "save", lambda *a: (events.append("save"), save(*a))[1])
    run(tmp_path, training=Told(), num_steps=24, steps_per_call=4, every=12, log_every=4)
    text = " ".join(events).replace("read read", "loss").replace("read save", "parameters save")
    assert text.startswith(
        "send send loss send loss loss parameters save send send loss send loss loss parameters save"
    )


@given(
    num_steps=st.integers(1, 60),
    per_call=st.integers(1, 20),
    periods=st.tuples(st.integers(1, 20), st.none() | st.integers(1, 20), st.none() | st.integers(1, 20)),
)
def test_dispatches_end_where_something_is_due_and_nowhere_else(num_steps, per_call, periods):
    schedule = Schedule(num_steps, per_call, *periods)
    ends, step = [], 0
    while step < num_steps:
        step = schedule.next_end(step)
        ends.append(step)
    grid = {n for n in range(1, num_steps) for p in (per_call, *periods) if p is not None and n % p == 0}
    assert ends == sorted(grid | {num_steps})


def test_the_best_checkpoint_by_an_evaluated_metric_is_kept(tmp_path):
    accuracy = {10: 0.3, 20: 0.9, 30: 0.5, 40: 0.4}

    def evaluate(state: Any, step: int) -> dict[str, Any]:
        return {"accuracy": np.array([accuracy[step] - 0.1, accuracy[step] + 0.1])}

    best = BestBy("accuracy", Better.HIGHER)
    run(tmp_path, evaluate=evaluate, evaluate_every=10, keep_best=best, keep_latest=1)
    with Checkpoints.open(tmp_path / "checkpoints", identity="toy", every=10, keep_best=best) as checkpoints:
        assert checkpoints.steps() == [20, 40] and checkpoints.best_step() == 20
    # The loss of the last step before a save can choose, too.
    run(tmp_path / "loss", keep_best=BestBy("loss"))
    for wrong in (BestBy("acuracy"), BestBy("accuracy")):
        with pytest.raises(InputError, match=r"keep_best: there is no metric 'ac\w+' where .*saved, only .*loss"):
            run(tmp_path / wrong.metric, evaluate=evaluate, evaluate_every=40, keep_best=wrong)


def test_lines_of_metrics_are_means_of_the_steps_since_the_last(tmp_path):
    training = ToyTraining()
    state, data = training.init(range(3, 5)), training.put(*images_and_labels())
    _, metrics = training.advance(state, data, STEPS)
    losses = np.asarray(metrics["loss"], np.float64).reshape(5, 8, 2).mean(1)
    run(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [8, 16, 24, 32, 40]
    np.testing.assert_allclose([line["loss"] for line in lines(tmp_path)], losses, rtol=1e-6)
    np.testing.assert_allclose([line["twice"] for line in lines(tmp_path)], 2 * losses, rtol=1e-6)
    assert losses[-1].max() < losses[0].min(), "the toy learns"


def test_a_second_run_compiles_nothing(tmp_path):
    training = ToyTraining()
    run(tmp_path / "a", training=training)
    with compile_counter() as seen:
        run(tmp_path / "b", training=training)
    # Making the initial state is no part of the loop.
    assert [name for name in seen.names if "make" not in name] == []


@pytest.mark.parametrize("name", ["num_steps", "steps_per_call", "log_every", "evaluate_every"])
def test_numbers_below_one_are_refused(name):
    options: dict[str, Any] = {name: 0}
    with pytest.raises(InputError, match=rf"{name}=0: give at least 1"):
        run(**options)


def test_a_checkpoint_past_the_end_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match=r"is at step 40, past num_steps=20: ask for more"):
        run(tmp_path, num_steps=20)
