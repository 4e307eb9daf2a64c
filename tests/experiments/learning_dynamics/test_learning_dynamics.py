from __future__ import annotations

import dataclasses
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import mae_align as ma
from experiments.harness.config import RunConfig
from experiments.harness.data import Split
from experiments.harness.run import execute
from experiments.learning_dynamics import __main__ as experiment
from experiments.learning_dynamics.__main__ import COLUMNS, PRESETS, Config, cells, main
from experiments.learning_dynamics.learners import Descent, Learner, Schedule, Sizes, make_training, num_steps
from experiments.learning_dynamics.linear_flow import flow_cost, flow_half_times
from experiments.learning_dynamics.scene import Scene, look, make_scene
from experiments.learning_dynamics.spectrum import Images, Spectrum, image_map
from mae_align.train.ensemble import Training
from mae_align.train.loop import Diverged, Preempted
from tests.experiments.cases import reopen

SIZES = Sizes(mlp_widths=(9,))
# Small steps on all images at once: close to the gradient flow.
DESCENT = Descent(batch_size=200, steps=20, descent_steps=750, descent_rate=0.02)
TINY = Config(
    max_train=200,
    learners=(Learner.linear_descent,),
    intervened=(Learner.linear_descent,),
    interventions=(Images.reversed,),
    seeds=(0, 1),
    latent=6,
    network=SIZES,
    training=DESCENT,
    evaluations=7,
    looked_at=60,
    bands=3,
    response_points=30,
    response_widths=(0.5,),
    resamples=20,
)
KEY = "original-linear_descent"


def go(config: Config, out: Path) -> Path:
    execute("learning_dynamics", main, dataclasses.replace(config, out=str(out)), Split.load, COLUMNS)
    return out


@pytest.fixture(scope="module")
def scene() -> Scene:
    data = Split.load(RunConfig(max_train=200))
    spectrum = Spectrum.of(ma.Moments.from_arrays(data.train_images))
    moved = image_map(Images.original, spectrum, 6, 0)
    return make_scene(data, moved, seen=60, response_points=30, widths=(0.5,), seed=0)


@pytest.fixture(scope="module")
def training() -> Training:
    return make_training(Learner.linear_descent, SIZES, 6, DESCENT, (8, 8, 1), 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return go(TINY, tmp_path_factory.mktemp("dynamics") / "run")


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "points" / f"{KEY}.npz") as found:
        return dict(found)


@pytest.mark.slow
def test_run_leaves_everything_in_its_folder(folder):
    names = ("residuals", "spectra", "half_times", "groups", "frequency", "interventions", "set_apart")
    figures = {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    tables = {f"{name}.csv" for name in ("half_times", "cells", "orders")}
    records = {"dynamics.nc", "summary.txt", "columns.md", "config.json", "data.json", "run.json"}
    assert {path.name for path in folder.iterdir()} == figures | tables | records | {"points", "networks"}
    found = xr.load_dataset(folder / "dynamics.nc", engine="scipy")
    assert dict(found.residual.sizes) == {"cell": 2, "seed": 2, "record": 8, "direction": 6}
    assert found.frequency.attrs["units"] == "cycles per pixel"
    for key in (KEY, "reversed-linear_descent"):
        assert {"metrics.jsonl", "checkpoints"} <= {path.name for path in (folder / "networks" / key).iterdir()}
        assert list((folder / "networks" / key).glob("events.out.tfevents.*"))
    summary = (folder / "summary.txt").read_text()
    assert "On the original images half-time ~ eigenvalue^-a with a from " in summary
    assert "On changed images half-times detectably follow the eigenvalue, the frequency held fixed, in " in summary


@pytest.mark.slow
def test_half_times_of_the_linear_network_are_those_of_the_flow_and_of_the_eigenvalue(folder):
    times = pd.read_csv(folder / "half_times.csv")
    assert len(times) == 2 * 2 * 6
    times = times[~times.censored]
    np.testing.assert_allclose(times.half_time, times.flow_half_time, rtol=0.2)
    found = pd.read_csv(folder / "cells.csv").set_index("images")
    np.testing.assert_allclose(found.exponent, found.flow_exponent, rtol=0.1)
    # The same eigenvalues on the directions in reverse order, and still those with the largest come first.
    assert (found.rho_eigenvalue < -0.8).all() and found.index.tolist() == ["original", "reversed"]


@pytest.mark.slow
def test_what_is_there_is_not_trained_again(folder, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    reopen(copy)
    monkeypatch.setattr(experiment, "follow", None)
    monkeypatch.setattr(experiment, "make_scene", None)
    go(TINY, copy)
    for name in ("cells.csv", "half_times.csv", "orders.csv", "dynamics.nc"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_stopped_by_sigterm_and_gone_on_with_it_is_the_same_bit_for_bit(folder, tmp_path, monkeypatch):
    seen = []

    def stopping(training, state, step, *rest):
        seen.append(step)
        if step == 249 and seen.count(249) == 1:
            signal.raise_signal(signal.SIGTERM)
        return look(training, state, step, *rest)

    monkeypatch.setattr(experiment, "look", stopping)
    with pytest.raises(Preempted, match="step 249 is saved"):
        go(TINY, tmp_path / "run")
    found, whole = arrays(go(TINY, tmp_path / "run")), arrays(folder)
    steps = whole["steps"].tolist()
    # No look of the first cell is made again, and then come those of the second.
    assert seen == steps * 2
    assert found.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.slow
def test_looks_are_at_the_network_of_their_step(folder, training, scene):
    """The last look, measured anew from the definitions on a network trained in one go."""
    whole = arrays(folder)
    rate = 0.02 * 64 / scene.spectrum.values[0]
    state = training.init([0, 1], learning_rates=[rate] * 2)
    state, _ = training.advance(state, training.put(scene.images), 750)
    model = training.model(state, 1)
    for images, residual, loss in (
        (scene.images[scene.seen], whole["residual"], whole["train_loss"]),
        (scene.held_out, whole["test_residual"], whole["test_loss"]),
    ):
        reconstructed = np.asarray(model.reconstruct(images))  # pyright: ignore[reportAttributeAccessIssue]
        assert loss[1, -1] == pytest.approx(np.mean((reconstructed - images) ** 2), rel=1e-4)
        direction = scene.spectrum.vectors[:, 2]
        missed, there = ((a.reshape(len(a), -1) @ direction) ** 2 for a in (reconstructed - images, images))
        assert residual[1, -1, 2] == pytest.approx(missed.sum() / there.sum(), rel=1e-3)
    # Of all directions, also those beyond the code.
    assert whole["all_residual"].shape == whole["energy"].shape == (2, len(whole["steps"]), scene.spectrum.rank)
    seen = scene.images[scene.seen]
    rebuilt = np.asarray(model.reconstruct(seen))  # pyright: ignore[reportAttributeAccessIssue]
    for name, values, scale in (
        ("all_residual", rebuilt - seen, whole["data_energy"]),
        ("energy", rebuilt, np.ones(scene.spectrum.rank)),
    ):
        along = np.mean((values.reshape(len(seen), -1) @ scene.spectrum.vectors) ** 2, axis=0) / scale
        np.testing.assert_allclose(whole[name][1, -1], along, rtol=1e-3, atol=1e-6 * along.max())
    # Before training nothing of any direction is there: a small start.
    np.testing.assert_allclose(whole["residual"][:, 0], 1, atol=0.02)
    assert (whole["train_loss"][:, -1] < 0.6).all()


@pytest.mark.slow
def test_cells_that_diverge_are_left_out(tmp_path):
    wild = dataclasses.replace(DESCENT, descent_rate=50.0, descent_steps=60, steps=60)
    both = (Learner.linear_descent, Learner.linear_adamw)
    with pytest.warns(UserWarning, match="Left out: original-linear_descent, .* at step"):
        go(dataclasses.replace(TINY, training=wild, learners=both, intervened=both[1:]), tmp_path / "run")
    assert set(pd.read_csv(tmp_path / "run" / "cells.csv").learner) == {"linear_adamw"}
    assert "Left out: original-linear_descent" in (tmp_path / "run" / "summary.txt").read_text()


def test_a_reconstruction_that_is_not_finite_is_divergence_and_no_refusal_of_a_probe(training, scene):
    state = training.init([0, 1])
    huge = dataclasses.replace(state, params=jax.tree.map(lambda p: p * 1e30, state.params))
    with pytest.raises(Diverged, match="a reconstruction of member 0 is not finite at step 4"):
        look(training, huge, 4, scene, 6, 3)


def test_a_class_that_is_not_looked_at_in_training_is_no_error(training, scene):
    assert scene.num_classes == 10
    few = scene._replace(seen_labels=scene.seen_labels % 3)
    looked = look(training, training.init([0, 1]), 0, few, 6, 3)
    assert ((0 <= looked["test_accuracy"]) & (looked["test_accuracy"] < 1)).all()


def test_the_flow_says_nothing_of_directions_that_it_does_not_reach(training, scene):
    state = training.init([0, 1], learning_rates=[1e-6] * 2)
    found = flow_half_times(training, state, scene.spectrum, np.array([0, 1, 2]), 1e-6)
    assert found.shape == (2, scene.spectrum.rank) and np.isnan(found).all()


def test_the_flow_is_left_out_where_it_would_take_hours():
    costs = {}
    for name, pixels in {"laptop": 64, "fashion_mnist": 784, "cifar10": 768, "paper": 3072}.items():
        of, members = PRESETS[name], len(PRESETS[name].seeds)
        costs[name] = flow_cost(of.training.descent_rate, of.training.descent_steps, of.latent, pixels, members)
    assert {name for name, cost in costs.items() if cost >= experiment._LARGEST_FLOW} == {"paper"}


@pytest.mark.slow
def test_without_the_flow_a_run_has_no_reference(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "_LARGEST_FLOW", 0.0)
    monkeypatch.setattr(experiment, "flow_half_times", None)
    found = arrays(go(dataclasses.replace(TINY, interventions=(Images.original,)), tmp_path / "run"))
    assert arrays(folder).keys() - found.keys() == {"flow_half_time"}
    assert pd.read_csv(tmp_path / "run" / "half_times.csv").flow_half_time.isna().all()


def test_cells_are_all_learners_on_the_original_and_some_on_changed_images():
    found = cells(
        Config(
            learners=(Learner.mlp_adamw,),
            intervened=(Learner.mlp_adamw, Learner.conv_adamw),
            interventions=(Images.rotated, Images.original, Images.top),
        )
    )
    assert found == [
        (Images.original, Learner.mlp_adamw),
        (Images.rotated, Learner.mlp_adamw),
        (Images.top, Learner.mlp_adamw),
        (Images.top, Learner.conv_adamw),
    ]


@pytest.mark.parametrize("learner", list(Learner))
@pytest.mark.parametrize("schedule", list(Schedule))
def test_every_learner_can_be_made(learner, schedule):
    descent = dataclasses.replace(DESCENT, schedule=schedule, conv_steps=30)
    made = make_training(learner, SIZES, 6, descent, (8, 8, 1), 1)
    steps = {"linear_descent": 750, "mlp_momentum": 750, "conv_adamw": 30, "conv_momentum": 30}
    assert num_steps(learner, descent) == steps.get(learner.value, 20)
    moving = 1 if learner in (Learner.mlp_momentum, Learner.conv_momentum) else 0
    moving = 2 if learner.value.endswith("adamw") else moving
    sizes = [
        sum(x.size for x in jax.tree.leaves(tree))
        for tree in (made.abstract_state.params, made.abstract_state.opt_state)
    ]
    # Copies of the parameters that the rule keeps, and a few counters.
    assert 0 <= sizes[1] - moving * sizes[0] <= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": 65}, "--latent 65: these images vary in "),
        ({"training": Descent(batch_size=999)}, "--training.batch-size 999: there are 200 training images"),
        ({"latent": 3}, "--latent 3: give a number at least 4"),
        ({"learners": (Learner.mlp_adamw,) * 2}, "--learners mlp_adamw mlp_adamw repeats a value"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(tmp_path, change, message):
    with pytest.raises(ma.InputError, match=message):
        go(dataclasses.replace(TINY, **change), tmp_path / "run")
    assert not list(tmp_path.iterdir())
