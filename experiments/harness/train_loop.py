"""Training in a run folder: an ensemble that is probed as it learns and saved as it goes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import mae_align as ma
from experiments.harness.train_common import IGNORED, LabelledSplit, Run, TrainConfig
from mae_align.data import ArraySource
from mae_align.metrics import rankme
from mae_align.models import Autoencoder
from mae_align.probes import Rows, ridge_probe
from mae_align.runtime.files import fingerprint
from mae_align.runtime.processes import train_mesh
from mae_align.train.batch_norm import has_batch_statistics, recalibrated
from mae_align.train.batches import Feed, StreamedBatches
from mae_align.train.checkpoint import BestBy, Checkpoints
from mae_align.train.ensemble import DeviceData, Objective, Training, TrainState
from mae_align.train.log import MetricLog
from mae_align.train.loop import Evaluate, fit
from mae_align.train.optimizer import OptimizerConfig, adamw

# Images whose features are taken at a time.
FEATURE_BATCH = 512
# Lines of metrics of a long run.
_LOG_LINES = 500


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is trained.

    Attributes:
        runs: the members. make_autoencoder: the network without heads. make_model: what is trained, which may hold that
            network. objective: its loss. inside: name under which it does, empty where it is the model itself.
        restore: (model, images [b, h, w, c] float32, key) -> what it makes of corrupted images. restores: in words.
        apart: which parameters' gradients are clipped apart from the others'; None for one norm of all.
    """

    runs: Sequence[Run]
    make_autoencoder: Callable[[nnx.Rngs], Autoencoder]
    make_model: Callable[[nnx.Rngs], nnx.Module]
    objective: Objective
    restore: Callable[[Any, jax.Array, jax.Array], jax.Array]
    restores: str
    inside: str = ""
    apart: Callable[[jax.tree_util.KeyPath], bool] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Ensemble:
    """Networks and the programs that run them.

    Attributes:
        training, state: of the networks. clean: the state with batch statistics of clean images, which features are
            taken with; None where ``state`` serves.
    """

    training: Training
    state: TrainState
    clean: TrainState | None = None

    @classmethod
    def of(cls, training: Training, state: TrainState, split: LabelledSplit, corrupted: bool) -> Ensemble:
        """Trained networks; their features are taken with batch statistics of clean images if training saw others."""
        if not (corrupted and has_batch_statistics(state)):
            return cls(training, state)
        return cls(training, state, recalibrated(training, state, split.train_images))

    @property
    def note(self) -> str:
        """What is to be said of its features."""
        return "" if self.clean is None else "batch statistics of clean training images"

    def features(self, images: np.ndarray) -> np.ndarray:
        """[E, n, k] of images [n, h, w, c], in eval mode."""
        return self.training.features(self.clean or self.state, images, FEATURE_BATCH)


def steps_of(config: TrainConfig, split: LabelledSplit, epochs: float) -> int:
    """Steps of a number of passes; what does not fill a batch is left out of each."""
    return round(epochs * (len(split.train_labels) // config.batch_size))


def make_training(
    config: TrainConfig,
    split: LabelledSplit,
    make_model: Callable[[nnx.Rngs], nnx.Module],
    objective: Objective,
    rates: Sequence[float],
    epochs: int,
    warmup_epochs: float,
    apart: Callable[[jax.tree_util.KeyPath], bool] | None = None,
) -> Training:
    """The programs that train one network for each learning rate; ``apart`` as in :func:`adamw`.

    Raises:
        InputError: a mesh, batch or model that do not fit together.
    """
    steps = steps_of(config, split, epochs)
    optimizer = OptimizerConfig(
        total_steps=steps,
        learning_rate=max(rates),
        warmup_steps=min(steps_of(config, split, warmup_epochs), steps - 1),
        weight_decay=config.weight_decay,
        b2=config.beta2,
        clip_norm=None if math.isinf(config.clip_norm) else config.clip_norm,
    )
    return Training(
        make_model,
        objective,
        adamw(optimizer, apart),
        batch_size=config.batch_size,
        num_members=len(rates),
        mesh=train_mesh(config.ensemble_axis, jax.devices()[: config.devices]),
        steps_per_call=_steps_per_call(config),
    )


def _steps_per_call(config: TrainConfig) -> int:
    return config.steps_per_call or 10


def initial(training: Training, runs: Sequence[Run], rates: Sequence[float]) -> TrainState:
    """The members before the first step."""
    return training.init(
        [run.seed for run in runs],
        learning_rates=[rate / max(rates) for rate in rates],
        guidance=[run.guidance for run in runs],
    )


def train(
    config: TrainConfig,
    split: LabelledSplit,
    training: Training,
    state: TrainState,
    epochs: int,
    folder: Path,
    identity: str,
    evaluate: Evaluate | None = None,
) -> TrainState:
    """Train, going on from the checkpoints in the folder if there are any.

    Raises:
        InputError: images that do not fit on the devices; Diverged where a loss is not finite.
        Preempted: after SIGTERM, when everything is saved.
    """
    steps = steps_of(config, split, epochs)
    every = config.checkpoint_every or max(100, steps // epochs)
    where = fingerprint([], {"data": identity, "part": folder.name, "steps": steps, "config": _settings(config)})
    with (
        Checkpoints.open(folder / "checkpoints", identity=where, every=every, keep_best=BestBy("loss")) as checkpoints,
        MetricLog(folder, shown=("probe_accuracy", "accuracy"), progress=True) as log,
    ):
        return fit(
            training,
            state,
            _source(config, split, training),
            num_steps=steps,
            checkpoints=checkpoints,
            log=log,
            evaluate=evaluate,
            evaluate_every=config.evaluate_every or math.ceil(steps / 10),
            steps_per_call=_steps_per_call(config),
            log_every=max(10, steps // _LOG_LINES),
        )


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What the parameters depend on."""
    return {key: repr(value) for key, value in dataclasses.asdict(config).items() if key not in IGNORED}


def _source(config: TrainConfig, split: LabelledSplit, training: Training) -> DeviceData | Feed:
    images, labels = split.train_images, split.train_labels
    if config.stream:
        source = ArraySource(images, labels, tuple(map(str, range(split.num_classes))), split.name)
        return StreamedBatches(training, source, seed=config.seed)
    try:
        return training.put(images, labels)
    except ma.InputError as error:
        raise ma.InputError(str(error).replace("stream them with advance_batches", "give --stream")) from None


@dataclasses.dataclass(frozen=True, eq=False)
class OnlineProbe:
    """A ridge probe of every member while it trains, on some training and validation images.

    The strength is chosen on the validation images that the accuracy is measured on, and batch statistics are those of
    training, of corrupted images where there is a corruption: good for watching, not for reporting.
    """

    training: Training
    split: LabelledSplit
    train_rows: np.ndarray
    validation_rows: np.ndarray

    @classmethod
    def of(cls, training: Training, split: LabelledSplit, most: int, seed: int) -> OnlineProbe:
        """A probe that looks at no more than so many training and validation images."""
        rng = np.random.default_rng(seed)
        rows = [np.sort(rng.permutation(len(y))[:most]) for y in (split.train_labels, split.validation_labels)]
        return cls(training, split, *rows)

    def __call__(self, state: TrainState, step: int) -> dict[str, np.ndarray]:
        """Validation accuracy and effective rank of the validation features, [E] each."""
        del step
        split, ensemble = self.split, Ensemble(self.training, state)
        train = ensemble.features(split.train_images[self.train_rows])
        validation = ensemble.features(split.validation_images[self.validation_rows])
        labels = split.train_labels[self.train_rows]
        found = []
        for x, x_val in zip(train, validation, strict=True):
            held_out = Rows(x_val, split.validation_labels[self.validation_rows])
            result = ridge_probe(x, labels, *held_out, num_classes=split.num_classes, val=held_out)
            found.append(result.accuracy_val)
        return {"probe_accuracy": np.array(found), "rankme": np.array([rankme(x) for x in validation])}


def with_encoder(
    state: TrainState, pretrained: TrainState, inside: str, members: Sequence[int], into: str = "autoencoder"
) -> TrainState:
    """A state whose networks inside are those of given members of another state.

    Args:
        state: of M models with an autoencoder named ``into``. pretrained: the other state. inside: name of the
            autoencoder in its models, empty where it is the model. members: M positions in it.
    """
    index = np.asarray(members)
    lent = {part: _inside(getattr(pretrained, part), inside) for part in ("params", "rest")}
    names = {part: list(leaves) for part, leaves in lent.items()}

    def join(state: TrainState, leaves: dict[str, list[jax.Array]]) -> TrainState:
        parts = {}
        for part, arrays in leaves.items():
            found = dict(zip(names[part], arrays, strict=True))
            parts[part] = jax.tree_util.tree_map_with_path(
                lambda path, leaf, found=found: found[path[1:]][index] if _name(path) == into else leaf,
                getattr(state, part),
            )
        return dataclasses.replace(state, **parts)

    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(join, out_shardings=layout)(state, {part: list(leaves.values()) for part, leaves in lent.items()})


def _inside(tree: Any, name: str) -> dict[Any, jax.Array]:
    """Arrays of the module of that name by their path in it; all of them for an empty name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path[1:] if name else path: leaf for path, leaf in leaves if not name or _name(path) == name}


def _name(path: Sequence[Any]) -> str:
    return str(path[0].key)
