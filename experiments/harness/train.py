"""The one way in which experiments train: an ensemble on the training loop, looked at after chosen steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from experiments.harness.config import Training as Settings
from mae_align.runtime.files import PointStore
from mae_align.runtime.processes import train_mesh
from mae_align.train.batches import Feed
from mae_align.train.checkpoint import Checkpoints
from mae_align.train.ensemble import DeviceData, Objective, Training, TrainState
from mae_align.train.log import MetricLog
from mae_align.train.loop import fit
from mae_align.train.optimizer import OptimizerConfig

Look = Callable[[TrainState, int], Mapping[str, np.ndarray]]
# Lines of metrics, and checkpoints, of a training.
_LOG_LINES = 500
_CHECKPOINTS = 10
# Steps of small networks are so short that saving would take longer than training again.
_LEAST_STEPS = 100
# Of one dispatch: between two of them a stop is answered.
_STEPS_PER_CALL = 10


@dataclasses.dataclass(frozen=True)
class TrainedLooks:
    """Where the looks at an ensemble, its checkpoints and its metrics are kept.

    Attributes:
        store: of finished looks.
        key: of the ensemble, a part of file names.
        folder: of checkpoints, metrics.jsonl and TensorBoard event files, the same for all processes.
        identity: of images, labels and settings; networks of others are refused.
    """

    store: PointStore
    key: str
    folder: Path
    identity: str

    def load(self, step: int) -> dict[str, np.ndarray] | None:
        """The look after a step, or None."""
        return self.store.load(f"{self.key}-step{step}")

    def save(self, step: int, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Keep the look after a step."""
        arrays = {name: np.asarray(value) for name, value in found.items()}
        self.store.save(f"{self.key}-step{step}", arrays)
        return arrays


def train_at(
    looks: TrainedLooks,
    training: Training,
    start: Callable[[], TrainState],
    source: Callable[[], DeviceData | Feed],
    steps: Sequence[int],
    look: Look,
) -> dict[str, np.ndarray]:
    """Train an ensemble and look at it after chosen steps.

    Looks are kept as they are made, and the networks at a tenth of the steps and after the last: a run that was
    stopped, also by SIGTERM or a kill, goes on from there, and one whose looks are all there trains nothing. Metrics
    of all steps, and of looks the values with one number for each member, go to metrics.jsonl and TensorBoard.

    Args:
        looks: where everything is kept.
        training: the programs of the ensemble.
        start: makes the state before the first step.
        source: makes the images on the device or the stream.
        steps: ascending; 0 is the untrained ensemble, the last ends the training.
        look: arrays of a state and step, of the same shapes at every step.

    Returns:
        By name, the arrays of all steps stacked, [T, ...].

    Raises:
        Diverged: a loss or a parameter is not finite.
        Preempted: SIGTERM came, and everything is saved.
    """
    found = {step: looks.load(step) for step in steps}
    if any(arrays is None for arrays in found.values()):
        _train(looks, training, start, source, found, look, None)
    done = [arrays for arrays in found.values() if arrays is not None]
    return {name: np.stack([arrays[name] for arrays in done]) for name in done[0]}


def train_to(
    looks: TrainedLooks,
    training: Training,
    start: Callable[[], TrainState],
    source: Callable[[], DeviceData | Feed],
    steps: Sequence[int],
    look: Look,
    *,
    save_every: int | None = None,
) -> TrainState:
    """Train as :func:`train_at`, and return the ensemble after the last step: from its checkpoint where it is there.

    Args:
        looks, training, start, source, steps, look: as for :func:`train_at`.
        save_every: steps between checkpoints; None for a tenth of the training.

    Returns:
        The state after the last step.

    Raises:
        Diverged, Preempted: as :func:`train_at`.
    """
    return _train(looks, training, start, source, {step: looks.load(step) for step in steps}, look, save_every)


def _train(
    looks: TrainedLooks,
    training: Training,
    start: Callable[[], TrainState],
    source: Callable[[], DeviceData | Feed],
    found: dict[int, dict[str, np.ndarray] | None],
    look: Look,
    save_every: int | None,
) -> TrainState:
    """Train to the last step, and fill in the looks that are None."""
    missing = [step for step, arrays in found.items() if arrays is None]
    state, total = start(), max(found)

    def observe(state: TrainState, step: int) -> dict[str, np.ndarray]:
        arrays = found[step]
        if arrays is None:
            arrays = found[step] = looks.save(step, look(state, step))
        shapes = (), (training.num_members,)
        return {name: a for name, a in arrays.items() if a.shape in shapes and a.dtype.kind in "biuf"}

    if 0 in missing:
        observe(state, 0)
    if total == 0:
        return state
    every = save_every or max(_LEAST_STEPS, total // _CHECKPOINTS)
    with Checkpoints.open(
        looks.folder / "checkpoints", identity=looks.identity, every=every, keep_latest=1
    ) as checkpoints:
        newest = checkpoints.latest_step() or 0
        early = [step for step in missing if 0 < step <= newest]
        if early:
            # Looks that were lost although later networks are there: trained up to again, beside the checkpoints.
            fit(training, state, source(), num_steps=early[-1], evaluate=observe, evaluate_at=early)
            state = start()
        with MetricLog(looks.folder, progress=True) as log:
            return fit(
                training,
                state,
                source(),
                num_steps=total,
                checkpoints=checkpoints,
                log=log,
                evaluate=observe,
                evaluate_at=[step for step in found if step > 0],
                log_every=max(1, total // _LOG_LINES),
            )


def optimizer(settings: Settings, num_images: int) -> OptimizerConfig:
    """AdamW with the settings of an experiment, for so many training images.

    Raises:
        InputError: a batch over the images.

    Example:
        >>> optimizer(Settings(epochs=2, batch_size=10, warmup_epochs=1), 40).warmup_steps
        4
    """
    return OptimizerConfig(
        total_steps=settings.steps(num_images),
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps(num_images),
        weight_decay=settings.weight_decay,
        b2=settings.beta2,
        clip_norm=None if math.isinf(settings.clip_norm) else settings.clip_norm,
    )


def training_programs(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    objective: Objective,
    rule: optax.GradientTransformation,
    *,
    batch_size: int,
    num_members: int,
    mesh: Mesh | None = None,
) -> Training:
    """The programs of networks that train side by side, in dispatches so short that SIGTERM is answered in seconds.

    Args:
        make_model: makes a network of random numbers.
        objective: what is minimised.
        rule: of descent.
        batch_size: images of a step.
        num_members: networks.
        mesh: of devices; None for one CPU device, which is all of its cores, or all devices elsewhere.

    Raises:
        InputError: sizes that do not fit each other or the devices.
    """
    return Training(
        make_model,
        objective,
        rule,
        batch_size=batch_size,
        num_members=num_members,
        mesh=_one_device_of_a_cpu() if mesh is None else mesh,
        steps_per_call=_STEPS_PER_CALL,
    )


def _one_device_of_a_cpu() -> Mesh:
    """Where small ensembles train: one CPU device, which is all of its cores; all devices elsewhere."""
    alone = jax.default_backend() == "cpu" and jax.process_count() == 1
    return train_mesh(devices=jax.devices()[:1] if alone else None)


def milestones(total: int, count: int) -> tuple[int, ...]:
    """Steps at which networks are looked at: 0, then evenly spaced in the logarithm; equal ones once.

    Args:
        total: the last.
        count: how many after 0, before equal ones are dropped.

    Example:
        >>> milestones(100, 3)
        (0, 1, 10, 100)
    """
    return (0, *np.unique(np.geomspace(1, total, count).round().astype(int)).tolist())
