"""What the training experiments share: settings, the split of the data, the members of an ensemble."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence

import jax
import numpy as np

import mae_align as ma
from experiments.harness.data import load_together
from mae_align.data import stratified_split
from mae_align.runtime.files import fingerprint


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


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of every training experiment."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or prepared:DIR."""
    image_size: int | None = None
    """Resize images to squares of this side, in pixels; none keeps them."""
    validation_fraction: float = 0.2
    """Share of the training images that is kept out for validation: everything that is chosen is chosen on it."""
    max_train: int | None = None
    """Use at most so many of the remaining training images, drawn at random; none for all."""
    max_test: int | None = None
    """Use at most so many test images, drawn at random; none for all."""
    seed: int = 0
    """Of the splits and subsets."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the networks. One network for each seed, and each further setting that takes several values."""
    learning_rates: tuple[float, ...] = (1e-3,)
    """Peak learning rates. Of several the one with the best ridge probe on validation images is reported on."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 128
    """Images in a step."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    beta2: float = 0.95
    """Second decay rate of AdamW."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up; after it the learning rate falls to 0 along a cosine."""
    clip_norm: float = 1.0
    """Largest norm of a gradient."""
    bfloat16: bool = False
    """Compute in bfloat16, parameters and losses in float32: for accelerators."""
    evaluate_every: int | None = None
    """Steps between online probes; none for ten times in a run."""
    online_images: int = 2000
    """Most training images, and most validation images, that an online probe looks at."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; none for once an epoch, but at least 100 steps."""
    probes: tuple[Probe, ...] = (Probe.ridge, Probe.knn)
    """Probes to run at the end on frozen features: ridge, logistic, knn, mlp."""
    ends: tuple[End, ...] | None = (End.supervised,)
    """Whole networks to train with labels: fine_tuning, from_scratch, supervised (the probes on it); None for none."""
    end_epochs: int = 30
    """Passes over the training images with labels."""
    end_learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    """Peak learning rates with labels; the best on validation images is reported."""
    pictures: int = 6
    """Test images in the picture of reconstructions."""
    devices: int | None = None
    """Devices to train on; none for all of them."""
    ensemble_axis: int = 1
    """Devices over which the networks are spread; the others split each batch."""
    stream: bool = False
    """Read each batch from the host's memory, for images that do not fit on the devices; all networks see the same."""
    steps_per_call: int | None = None
    """Steps that are handed to the device at once; none for as many as serve."""
    out: str | None = None
    """Run folder; none for runs/EXPERIMENT-DATA-HASH."""


IGNORED = ("out", "devices", "ensemble_axis", "steps_per_call", "checkpoint_every", "probes", "ends")
"""Settings that do not change what is computed, only where, how fast, and what more."""


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledSplit:
    """Images [n, h, w, c] in stored units and labels [n] for training, choosing and reporting."""

    name: str
    num_classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    description: str

    @classmethod
    def load(cls, config: TrainConfig) -> LabelledSplit:
        """Read and split a data set.

        Raises:
            InputError: data that cannot be read or split, constant images, a batch over the training images.
        """
        data = load_together(config.data, image_size=config.image_size, seed=config.seed)
        train, validation = stratified_split(data.train_labels, config.validation_fraction, config.seed)
        rng = np.random.default_rng(config.seed)
        train = _some(train, config.max_train, rng)
        test = _some(np.arange(len(data.test_labels)), config.max_test, rng)
        images = data.train_images[train]
        if (images == images[:1]).all():
            raise ma.InputError("the training images are constant: there is nothing to reconstruct")
        if config.batch_size > len(train):
            raise ma.InputError(
                f"--batch-size {config.batch_size}: there are {len(train)} training images, give a smaller batch"
            )
        return cls(
            data.name,
            data.num_classes,
            images,
            data.train_labels[train],
            data.train_images[validation],
            data.train_labels[validation],
            data.test_images[test],
            data.test_labels[test],
            f"{len(train)} training, {len(validation)} validation, {len(test)} test images, seed {config.seed}",
        )

    @property
    def chance(self) -> float:
        """Test accuracy of always naming the most frequent training class."""
        most = np.bincount(self.train_labels, minlength=self.num_classes).argmax()
        return float((self.test_labels == most).mean())

    @property
    def identity(self) -> str:
        """What parts of a run belong to."""
        return fingerprint(self.arrays(), {"name": self.name, "split": self.description})

    def arrays(self) -> tuple[np.ndarray, ...]:
        """All arrays, for a fingerprint."""
        parts = (self.train_images, self.validation_images, self.test_images)
        return (*parts, self.train_labels, self.validation_labels, self.test_labels)


def _some(rows: np.ndarray, most: int | None, rng: np.random.Generator) -> np.ndarray:
    return rows if most is None or most >= len(rows) else np.sort(rng.choice(rows, most, replace=False))


@dataclasses.dataclass(frozen=True)
class Run:
    """A member of the ensemble: what it differs in from the others."""

    seed: int
    learning_rate: float
    guidance: float = 0.0

    def name(self, among: Sequence[Run]) -> str:
        """What tells it from the others."""
        words = {"seed": f"seed {self.seed}", "learning_rate": f"lr {self.learning_rate:g}"}
        words["guidance"] = f"guidance {self.guidance:g}"
        differ = [key for key in words if len({getattr(run, key) for run in among}) > 1]
        return ", ".join(words[key] for key in differ or ["seed"])


def members(config: TrainConfig, guidances: Sequence[float] = (0.0,)) -> list[Run]:
    """Every seed at every learning rate and guidance weight."""
    return [Run(s, rate, weight) for weight in guidances for rate in config.learning_rates for s in config.seeds]


def check_numbers(config: TrainConfig) -> None:
    """Refuse settings that no data could fit.

    Raises:
        InputError: naming the option and what to give instead.
    """
    at_least = {"batch_size": 2, "epochs": 1, "end_epochs": 1, "online_images": 2, "pictures": 1, "ensemble_axis": 1}
    at_least |= dict.fromkeys(("max_train", "max_test"), 2)
    at_least |= dict.fromkeys(("evaluate_every", "checkpoint_every", "steps_per_call", "devices"), 1)
    for name, low in at_least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ma.InputError(f"{_option(name)} {value}: give a whole number of at least {low}")
    for name in ("learning_rates", "end_learning_rates"):
        for value in getattr(config, name):
            if not (math.isfinite(value) and value > 0):
                raise ma.InputError(f"{_option(name)} {value:g}: give finite numbers over 0")
    for name in ("weight_decay", "warmup_epochs"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise ma.InputError(f"{_option(name)} {value:g}: give a finite number of at least 0")
    if not config.clip_norm > 0:
        raise ma.InputError(f"--clip-norm {config.clip_norm:g}: give a number over 0 (inf for no clipping)")
    if not 0 <= config.beta2 < 1:
        raise ma.InputError(f"--beta2 {config.beta2:g}: give a number from 0 to below 1")
    if config.warmup_epochs >= config.epochs:
        raise ma.InputError(f"--warmup-epochs {config.warmup_epochs:g}: give fewer than the {config.epochs} --epochs")
    if min(config.seed, *config.seeds) < 0:
        raise ma.InputError("--seed and --seeds: give whole numbers of at least 0")
    for name in ("seeds", "learning_rates", "end_learning_rates", "probes", "ends"):
        values = getattr(config, name) or ()
        if len(set(values)) < len(values):
            words = " ".join(str(value.value if isinstance(value, enum.Enum) else value) for value in values)
            raise ma.InputError(f"{_option(name)} {words} repeats a value: give each once")
    if config.devices is not None and config.devices > len(jax.devices()):
        raise ma.InputError(f"--devices {config.devices}: there are {len(jax.devices())}, give at most as many")
    if Probe.ridge not in config.probes:
        raise ma.InputError("--probes: ridge is the probe that choices are made by, leave it in")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
