"""What the training experiments train: their settings, the members of an ensemble, and the programs that run them."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from experiments.harness.config import ADDS, ELSEWHERE, Bounds, Count, RunConfig, Seeds
from experiments.harness.config import Training as Settings
from experiments.harness.data import Split
from experiments.harness.train import optimizer, training_programs
from mae_align.corruption import Corruption
from mae_align.data import ArraySource
from mae_align.models import Autoencoder
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import train_mesh
from mae_align.train.batch_norm import has_batch_statistics, recalibrated
from mae_align.train.batches import Feed, StreamedBatches
from mae_align.train.ensemble import DeviceData, Objective, Training, TrainState
from mae_align.train.optimizer import adamw

# Images that a network is given at a time, outside of its training.
_BATCH = 512
# Online probes of a training, where nothing else is asked for.
_ONLINE = 10
_TRAINING = Settings(epochs=100, learning_rate=1e-3, warmup_epochs=5.0)


class Probe(enum.Enum):
    """Probes on frozen features."""

    ridge = "ridge"
    logistic = "logistic"
    knn = "knn"
    mlp = "mlp"


class End(enum.Enum):
    """What becomes of the same encoder when it is trained with labels."""

    fine_tuning = "fine_tuning"
    from_scratch = "from_scratch"
    supervised = "supervised"


Rates = Annotated[tuple[float, ...], Bounds(above=0, unique=True)]


@dataclasses.dataclass(frozen=True)
class TrainedConfig(RunConfig):
    """Settings of every training experiment."""

    training: Settings = _TRAINING
    """How networks are trained."""
    learning_rates: Annotated[tuple[float, ...] | None, Bounds(above=0, unique=True)] = None
    """Several peak learning rates in the place of one. The best by a ridge probe on validation images is reported."""
    seeds: Seeds = (0, 1)
    """Seeds of the networks. One network for each seed, and each further setting that takes several values."""
    evaluate_every: Annotated[int | None, Bounds(least=1)] = None
    """Steps between online probes; none for ten times in a run."""
    probe_images: Annotated[int, Bounds(least=2)] = 2000
    """Most training images, and most validation images, that an online probe looks at."""
    checkpoint_every: Annotated[int | None, Bounds(least=1), ELSEWHERE] = None
    """Steps between checkpoints; none for once an epoch, but at least 100 steps."""
    probes: Annotated[tuple[Probe, ...], Bounds(unique=True), ADDS] = (Probe.ridge, Probe.knn)
    """Probes to run at the end on frozen features: ridge, logistic, knn, mlp."""
    ends: Annotated[tuple[End, ...] | None, Bounds(unique=True), ADDS] = (End.supervised,)
    """Whole networks to train with labels: fine_tuning, from_scratch, supervised (the probes on it); None for none."""
    end_epochs: Count = 30
    """Passes over the training images with labels."""
    end_learning_rates: Rates = (3e-4, 1e-3)
    """Peak learning rates with labels; the best on validation images is reported."""
    pictures: Count = 6
    """Test images in the picture of reconstructions."""
    devices: Annotated[int | None, Bounds(least=1), ELSEWHERE] = None
    """Devices to train on; none for all of them."""
    ensemble_axis: Annotated[int, Bounds(least=1), ELSEWHERE] = 1
    """Devices over which the networks are spread; the others split each batch."""
    stream: bool = False
    """Read each batch from the host's memory, for images that do not fit on the devices; all networks see the same."""

    @property
    def rates(self) -> tuple[float, ...]:
        """Peak learning rates of the networks."""
        return self.learning_rates or (self.training.learning_rate,)

    @property
    def end_training(self) -> Settings:
        """How networks are trained with labels; the warm-up is no more than a quarter of the epochs."""
        warmup = min(self.training.warmup_epochs, self.end_epochs / 4)
        return dataclasses.replace(self.training, epochs=self.end_epochs, warmup_epochs=warmup)

    def looks(self, total: int) -> list[int]:
        """Steps of the online probes."""
        every = self.evaluate_every or math.ceil(total / _ONLINE)
        return [*range(every, total, every), total]

    def saves(self, total: int) -> int:
        """Steps between checkpoints."""
        return self.checkpoint_every or max(100, total // self.training.epochs)

    def check(self) -> None:
        """Refuse what bounds do not.

        Raises:
            InputError: more devices than there are, or probes without the one that choices are made by.
        """
        super().check()
        if self.devices is not None and self.devices > len(jax.devices()):
            raise InputError(f"--devices {self.devices}: there are {len(jax.devices())}, give at most as many")
        if Probe.ridge not in self.probes:
            raise InputError("--probes: ridge is the probe that choices are made by, leave it in")


@dataclasses.dataclass(frozen=True)
class Member:
    """A network of an ensemble: what it differs in from the others."""

    seed: int
    learning_rate: float
    guidance: float = 0.0

    def name(self, among: Sequence[Member]) -> str:
        """What tells it from the others.

        Example:
            >>> Member(0, 0.1).name([Member(0, 0.1), Member(0, 0.5)])
            'lr 0.1'
        """
        words = {"seed": f"seed {self.seed}", "learning_rate": f"lr {self.learning_rate:g}"}
        words["guidance"] = f"guidance {self.guidance:g}"
        differ = [key for key in words if len({getattr(member, key) for member in among}) > 1]
        return ", ".join(words[key] for key in differ or ["seed"])


def members_of(config: TrainedConfig, guidances: Sequence[float] = (0.0,)) -> list[Member]:
    """Every seed at every learning rate and guidance weight."""
    return [Member(s, rate, weight) for weight in guidances for rate in config.rates for s in config.seeds]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is trained.

    Attributes:
        subject: in words, for the summary.
        members: of the ensemble.
        make_autoencoder: the network without heads.
        make_model: what is trained, which may hold that network.
        objective: its loss.
        corruption: of its inputs, and of the closed form; None for none.
        restore: (model, images [b, h, w, c] float32, key) -> what it makes of corrupted images.
        restores: in words.
        pictures: draws reconstructions: (model, images, images of the range, seed).
        inside: name under which the network lies in the model, empty where it is the model.
        apart: which parameters' gradients are clipped apart from the others'; None for one norm of all.
    """

    subject: str
    members: Sequence[Member]
    make_autoencoder: Callable[[nnx.Rngs], Autoencoder]
    make_model: Callable[[nnx.Rngs], nnx.Module]
    objective: Objective
    corruption: Corruption | None
    restore: Callable[[Any, jax.Array, jax.Array], jax.Array]
    restores: str
    pictures: Callable[[Any, np.ndarray, np.ndarray, int], Figure]
    inside: str = ""
    apart: Callable[[jax.tree_util.KeyPath], bool] | None = None

    @property
    def firsts(self) -> list[int]:
        """Positions of the first member of each seed: before the first step the others of that seed are the same."""
        seeds = [member.seed for member in self.members]
        return [i for i, seed in enumerate(seeds) if seed not in seeds[:i]]


def make_training(
    config: TrainedConfig,
    split: Split,
    settings: Settings,
    make_model: Callable[[nnx.Rngs], nnx.Module],
    objective: Objective,
    rates: Sequence[float],
    apart: Callable[[jax.tree_util.KeyPath], bool] | None = None,
) -> Training:
    """The programs that train one network for each learning rate; ``apart`` as in :func:`adamw`.

    Raises:
        InputError: a mesh, batch or model that do not fit together.
    """
    highest = dataclasses.replace(settings, learning_rate=max(rates))
    return training_programs(
        make_model,
        objective,
        adamw(optimizer(highest, len(split.train_labels)), apart),
        batch_size=settings.batch_size,
        num_members=len(rates),
        mesh=train_mesh(config.ensemble_axis, jax.devices()[: config.devices]),
    )


def initial(training: Training, members: Sequence[Member]) -> TrainState:
    """The members before the first step."""
    highest = max(member.learning_rate for member in members)
    return training.init(
        [member.seed for member in members],
        learning_rates=[member.learning_rate / highest for member in members],
        guidance=[member.guidance for member in members],
    )


def images_for(config: TrainedConfig, split: Split, training: Training) -> DeviceData | Feed:
    """The training images on the devices, or a stream of them.

    Raises:
        InputError: images that do not fit on the devices.
    """
    if config.stream:
        source = ArraySource(split.train_images, split.train_labels, split.class_names, split.name)
        return StreamedBatches(training, source, seed=config.seed)
    try:
        return training.put(split.train_images, split.train_labels)
    except InputError as error:
        raise InputError(str(error).replace("stream them with advance_batches", "give --stream")) from None


@dataclasses.dataclass(frozen=True, eq=False)
class Ensemble:
    """Networks and the programs that run them.

    Attributes:
        training: the programs.
        state: of the networks.
        clean: the state with batch statistics of clean images, which features are taken with; None where ``state``
            serves.
    """

    training: Training
    state: TrainState
    clean: TrainState | None = None

    @classmethod
    def of(cls, training: Training, state: TrainState, split: Split, corrupted: bool) -> Ensemble:
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
        return self.training.features(self.clean or self.state, images, _BATCH)


def batches(images: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Images in batches of one size, float32, and how many of each count: the last one is filled up.

    Example:
        >>> [(x.shape, count) for x, count in batches(np.zeros((513, 2, 2, 1)))]
        [((512, 2, 2, 1), 512), ((512, 2, 2, 1), 1)]
    """
    for start in range(0, len(images), _BATCH):
        part = images[start : start + _BATCH]
        yield np.concatenate([part, np.repeat(part[:1], _BATCH - len(part), axis=0)]).astype(np.float32), len(part)
