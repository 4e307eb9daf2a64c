"""The training loop: batches in, losses checked, evaluated, logged and saved; goes on exactly where it was stopped.

The device never waits for the host: a dispatch of several steps is sent before the losses of the one before are read.
Before a state is saved its losses and parameters have been read and are finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mae_align.runtime.errors import InputError
from mae_align.runtime.stop import StopSignals
from mae_align.train.batches import Feed, Metrics, ResidentImages
from mae_align.train.checkpoint import Checkpoints
from mae_align.train.log import MetricLog

if TYPE_CHECKING:
    from mae_align.train.ensemble import DeviceData, Training, TrainState
Evaluate = Callable[["TrainState", int], Mapping[str, np.ndarray | float]]
_LOSS = "loss"


class Diverged(InputError):
    """A loss or a parameter became NaN or infinite.

    Attributes:
        step: the first such step, counted from 1.
        member: which model.
        checkpoint: the last good one, if any.
    """

    def __init__(self, what: str, step: int, member: int, checkpoints: Checkpoints | None) -> None:
        self.step, self.member = step, member
        self.checkpoint = None if checkpoints is None else checkpoints.latest_step()
        good = "there is no checkpoint"
        if checkpoints is not None and self.checkpoint is not None:
            good = f"the last good checkpoint is step {self.checkpoint} in {checkpoints.folder}"
        super().__init__(f"{what} at step {step}: lower the learning rate or clip gradients; {good}")


class Preempted(Exception):
    """SIGTERM came, everything is saved, and the same call goes on where it stopped.

    Attributes:
        step: the checkpoint.
        status: what a command that ends by it exits with, 128 + SIGTERM.
    """

    status = 143

    def __init__(self, step: int, folder: object) -> None:
        self.step = step
        super().__init__(f"stopped by SIGTERM: step {step} is saved in {folder}, and the same command goes on there")


@dataclass(frozen=True)
class Schedule:
    """When a loop stops to do something else, in steps.

    The ends of dispatches are on a grid that does not depend on where a run was interrupted, so that a resumed run
    sends the same programs.

    Attributes:
        num_steps: of the run.
        per_call: steps per dispatch.
        log: steps per line of metrics.
        evaluate: steps from one evaluation to the next, or None.
        save: steps from one checkpoint to the next, or None.
        evaluate_at: single steps that are evaluated as well, ascending.
    """

    num_steps: int
    per_call: int
    log: int
    evaluate: int | None
    save: int | None
    evaluate_at: Sequence[int] = ()

    def next_end(self, step: int) -> int:
        """Where the dispatch that begins after a step ends.

        Example:
            >>> Schedule(20, 8, 10, None, None).next_end(8)
            10
        """
        periods = (p for p in (self.per_call, self.log, self.evaluate, self.save) if p is not None)
        chosen = (at for at in self.evaluate_at if at > step)
        return min(self.num_steps, *(step // period * period + period for period in periods), *chosen)

    def due(self, period: int | None, step: int) -> bool:
        """Whether something of a period, or at the end, is due after a step."""
        return period is not None and (step % period == 0 or step == self.num_steps)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after a step."""
        return step in self.evaluate_at or self.due(self.evaluate, step)


def fit(
    training: Training,
    state: TrainState,
    source: DeviceData | Feed,
    *,
    num_steps: int,
    checkpoints: Checkpoints | None = None,
    log: MetricLog | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    evaluate_at: Sequence[int] | None = None,
    steps_per_call: int | None = None,
    log_every: int | None = None,
) -> TrainState:
    """Train up to a number of steps, from the latest checkpoint if there is one.

    **Exact.** A run that was killed or stopped and is called again with the same arguments ends with the parameters of
    one that never was, bit for bit on the same number of devices, and to rounding on another.

    **SIGTERM** with ``checkpoints``: every process finishes its dispatch, all save the same step, and
    :class:`Preempted` is raised. Ctrl-C (in one process) likewise, and raises ``KeyboardInterrupt``; a second one ends
    at once.

    Dispatches end where something is due, so the periods are best multiples of each other: a stream compiles anew for
    each number of steps.

    Args:
        training: what makes the steps.
        state: of ``training.init``; donated. Its shardings are those of a restored state.
        source: images on the device, of ``training.put``, or a stream
            (:class:`mae_align.train.batches.StreamedBatches`).
        num_steps: of the whole run, those before an interruption included.
        checkpoints: where to save and to go on from.
        log: where metrics go; started here.
        evaluate: (state, step) -> values, numbers or one per member [E]; called by all processes.
        evaluate_every: steps from one evaluation to the next; None for the end only, or for ``evaluate_at`` alone.
        evaluate_at: single steps to evaluate after, in 1..num_steps.
        steps_per_call: steps per dispatch; None: those of ``training``.
        log_every: steps per line of metrics, which has their mean; None: ``steps_per_call``.

    Returns:
        The state after ``num_steps``, saved and with all losses checked.

    Raises:
        Diverged: the loss or a parameter of a member is NaN or infinite; nothing of it is saved.
        Preempted: as above.
        InputError: numbers below 1, a checkpoint past ``num_steps``, or no metric to choose the best checkpoint by.
    """
    numbers = {"num_steps": num_steps, "steps_per_call": steps_per_call, "log_every": log_every}
    for name, value in (numbers | {"evaluate_every": evaluate_every}).items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: give at least 1")
    schedule = Schedule(
        num_steps,
        steps_per_call or training.steps_per_call,
        log_every or steps_per_call or training.steps_per_call,
        None if evaluate is None else evaluate_every or (None if evaluate_at else num_steps),
        None if checkpoints is None else checkpoints.every,
        () if evaluate is None else sorted(evaluate_at or ()),
    )
    feed = source if isinstance(source, Feed) else ResidentImages(source)
    step, window = 0, _Window()
    if checkpoints is not None and checkpoints.latest_step() is not None:
        step, state, position = checkpoints.restore(state)
        if step > num_steps:
            raise InputError(f"{checkpoints.folder} is at step {step}, past num_steps={num_steps}: ask for more steps")
        feed.seek(position["source"])
        window = _Window(position["log"]["count"], {k: np.array(v) for k, v in position["log"]["sums"].items()})
    loop = _Loop(training, feed, schedule, checkpoints, log, evaluate, window)
    if log is not None:
        log.start(step, num_steps)
    with StopSignals(checkpoints is not None and not jax.distributed.is_initialized()) as signals:
        return loop.run(state, step, signals)


@dataclass
class _Window:
    """Sums of the metrics since the last line of the log."""

    count: int = 0
    sums: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        for name, values in metrics.items():
            # Step by step, so that the sum does not depend on where dispatches end.
            for row in values.astype(np.float64):
                self.sums[name] = self.sums.get(name, 0.0) + row
        self.count += len(next(iter(metrics.values())))

    def mean(self) -> dict[str, np.ndarray]:
        return {name: total / self.count for name, total in self.sums.items()}

    def position(self) -> dict[str, Any]:
        return {"count": self.count, "sums": {name: total.tolist() for name, total in self.sums.items()}}


@dataclass
class _Loop:
    """A run; ``unread`` is the dispatch whose metrics are still on the device, and the step at which it began."""

    training: Training
    feed: Feed
    schedule: Schedule
    checkpoints: Checkpoints | None
    log: MetricLog | None
    evaluate: Evaluate | None
    window: _Window
    unread: tuple[int, Metrics] | None = None
    last: dict[str, np.ndarray] = field(default_factory=dict)

    def run(self, state: TrainState, step: int, signals: StopSignals) -> TrainState:
        schedule, checkpoints = self.schedule, self.checkpoints
        while step < schedule.num_steps:
            begin, step = step, schedule.next_end(step)
            state, metrics = self.feed.advance(self.training, state, step - begin)
            # The device has work again: now the results of the dispatch before can be waited for.
            self._read()
            self.unread = begin, metrics
            evaluating, saving = schedule.evaluates(step), schedule.due(schedule.save, step)
            agreed = checkpoints is not None and checkpoints.reached_preemption()
            if not (evaluating or saving or agreed or signals.received):
                continue
            self._read()
            self._check_parameters(state, step)
            values: Mapping[str, np.ndarray | float] = {}
            if evaluating and self.evaluate is not None:
                values = self.evaluate(state, step)
                if self.log is not None:
                    self.log.write(step, values)
            # Asked only now, because an evaluation may take long.
            stopping = agreed or signals.received
            if checkpoints is not None and (saving or stopping):
                position = {"source": self.feed.position(), "log": self.window.position()}
                checkpoints.save(step, state, position, self._scores(values, saving))
            if checkpoints is not None and stopping:
                raise _stopped(step, checkpoints, signals)
        self._read()
        self._check_parameters(state, step)
        if checkpoints is not None:
            checkpoints.wait()
            # During the last save, which takes a while: whoever called goes on to the next long work.
            if signals.received:
                raise _stopped(step, checkpoints, signals)
        return state

    def _read(self) -> None:
        """Wait for the metrics that are still on the device, check them and log them."""
        if self.unread is None:
            return
        begin, on_device = self.unread
        self.unread = None
        metrics = {name: _on_host(values) for name, values in on_device.items()}
        bad = np.argwhere(~np.isfinite(metrics[_LOSS]))
        if len(bad):
            row, member = bad[0]
            what = f"the loss of member {member} is {metrics[_LOSS][row, member]}"
            raise self._diverged(what, begin + int(row) + 1, int(member))
        steps, members = metrics[_LOSS].shape
        self.window.add(metrics)
        self.last = {name: values[-1] for name, values in metrics.items()}
        step = begin + steps
        if self.log is None:
            self.window = self.window if not self.schedule.due(self.schedule.log, step) else _Window()
            return
        if self.schedule.due(self.schedule.log, step):
            self.log.write(step, self.window.mean())
            self.window = _Window()
        self.log.progress(step, float(self.last[_LOSS].mean()), steps * members * self.training.batch_size)

    def _check_parameters(self, state: TrainState, step: int) -> None:
        """A finite loss can come with a gradient that is not: then the parameters are bad, and no loss has told."""
        finite = _on_host(_finite_members(state.params))
        if not finite.all():
            member = int(np.argmin(finite))
            raise self._diverged(f"a parameter of member {member} is not finite", step, member)

    def _diverged(self, what: str, step: int, member: int) -> Diverged:
        if self.checkpoints is not None:
            self.checkpoints.wait()  # so that the one that is named is there
        return Diverged(what, step, member, self.checkpoints)

    def _scores(self, values: Mapping[str, np.ndarray | float], regular: bool) -> dict[str, float]:
        """Mean over members of what is known at this step."""
        scores = {name: float(np.mean(value)) for name, value in {**self.last, **values}.items()}
        best = None if self.checkpoints is None else self.checkpoints.keep_best
        if regular and best is not None and best.metric not in scores:
            raise InputError(
                f"keep_best: there is no metric {best.metric!r} where checkpoints are saved, only "
                f"{', '.join(sorted(scores))}: choose one of these, or save at steps that are evaluated"
            )
        return {name: score for name, score in scores.items() if math.isfinite(score)}


def _stopped(step: int, checkpoints: Checkpoints, signals: StopSignals) -> BaseException:
    """What a run ends with that was asked to stop, when everything is saved."""
    checkpoints.wait()
    return KeyboardInterrupt() if signals.interrupted else Preempted(step, checkpoints.folder)


def _on_host(array: jax.Array) -> np.ndarray:
    """A global array as NumPy, in every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@jax.jit
def _finite_members(params: Any) -> jax.Array:
    """[E] whether all numbers of a member are finite."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    each = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    return functools.reduce(jnp.logical_and, each)
