"""Ensembles of guided autoencoders: their images, their training, and what fresh probes find in their codes."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mae_align as ma
from mae_align.data.split import stratified_split
from mae_align.metrics import probe_row, rankme
from mae_align.models import GuidedAutoencoder, MLPAutoencoder, Pixels, ResNetAutoencoder
from mae_align.models.base import BottleneckAutoencoder
from mae_align.probes import ProbeResult, Rows, knn_probe, logistic_probe, mlp_probe, ridge_probe
from mae_align.runtime.files import fingerprint
from mae_align.runtime.processes import train_mesh
from mae_align.train.augment import Augmentation
from mae_align.train.checkpoint import Checkpoints
from mae_align.train.ensemble import Member, Metrics, Training, TrainState, guide
from mae_align.train.log import MetricLog
from mae_align.train.loop import fit
from mae_align.train.optimizer import OptimizerConfig, adamw

Row = dict[str, Any]
# Images of one forward pass.
_BATCH = 500


class Network(enum.Enum):
    """Kinds of autoencoders."""

    mlp = "mlp"
    resnet = "resnet"


class Labels(enum.Enum):
    """What guides."""

    true = "true"
    shuffled = "shuffled"


class Probe(enum.Enum):
    """Fresh probes on the code."""

    ridge = "ridge"
    logistic = "logistic"
    knn = "knn"
    mlp = "mlp"


_PROBES: dict[Probe, Callable[..., ProbeResult]] = {
    Probe.ridge: ridge_probe,
    # Accuracies settle long before the gradient vanishes, and weaker regularisation than this changes none.
    Probe.logistic: partial(logistic_probe, strengths=(1e-4, 1e-3, 1e-2), tolerance=1e-4, dtype="float32"),
    Probe.knn: knn_probe,
    Probe.mlp: mlp_probe,
}


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The autoencoders, all of one kind, and their training by AdamW."""

    kind: Network = Network.mlp
    """Dense layers, or residual blocks."""
    widths: tuple[int, ...] = (64, 32)
    """Widths of the encoder's dense layers, or numbers of residual blocks per stage; the decoder mirrors them."""
    resnet_width: int = 64
    """Channels of the first residual stage; each further one has twice as many."""
    stem_stride: int = 1
    """Stride of the first convolution of a residual network: 4 for images of 224 pixels."""
    epochs: int = 60
    """Passes over the images."""
    batch_size: int = 64
    """Images in a step."""
    learning_rate: float = 1e-3
    """Largest learning rate."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up; after it the learning rate falls to 0 along a cosine."""
    weight_decay: float = 0.0
    """Weight decay."""
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    """Random crops, flips and grey images in training; none by default."""
    bfloat16: bool = False
    """Compute in bfloat16, parameters and losses in float32: for accelerators."""

    @classmethod
    def resnet34(cls) -> NetworkConfig:
        """The published set-up at 224 pixels: ResNet-34, Adam, 1,000 epochs of batches of 128, augmented.

        Its one-cycle schedule is a warm-up and a cosine here.
        """
        return cls(
            Network.resnet,
            widths=(3, 4, 6, 3),
            stem_stride=4,
            epochs=1000,
            batch_size=128,
            learning_rate=2e-4,
            warmup_epochs=300.0,
            augmentation=Augmentation(smallest_crop=0.5, flip=0.5, grey=0.2),
            bfloat16=True,
        )

    def check(self) -> None:
        """Refuse settings that no data could fit.

        Raises:
            InputError: naming the option and what to give instead.
        """
        at_least = {"epochs": self.epochs, "batch_size": self.batch_size, "stem_stride": self.stem_stride}
        for name, value in at_least.items():
            if value < 1:
                raise ma.InputError(f"--network.{name.replace('_', '-')} {value}: give at least 1")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ma.InputError(
                f"--network.warmup-epochs {self.warmup_epochs:g}: give at least 0 and less than the {self.epochs} of "
                "--network.epochs"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class GuidedSplit:
    """Images by their use; no image has two.

    Attributes:
        fit_images, fit_labels: train the autoencoders and guide. shuffled_labels: of the control, a permutation.
        probe_images, probe_labels: probes are fitted on them. val_images, val_labels: choices are made on them.
        test_images, test_labels: only measured.
        num_classes: q. name: of the data set. pixel_range: largest minus smallest pixel value of training.
    """

    fit_images: np.ndarray
    fit_labels: np.ndarray
    shuffled_labels: np.ndarray
    probe_images: np.ndarray
    probe_labels: np.ndarray
    val_images: np.ndarray
    val_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    name: str
    pixel_range: float

    @classmethod
    def of(
        cls,
        data: ma.ImageDataset,
        *,
        probe_fraction: float,
        validation_fraction: float,
        max_train: int | None = None,
        max_test: int | None = None,
        seed: int = 0,
    ) -> GuidedSplit:
        """The split of a data set; the proportions of the classes are kept.

        Raises:
            InputError: a class with too few images.
        """
        rng = np.random.default_rng(seed)
        train = _some(len(data.train_labels), max_train, rng)
        test = _some(len(data.test_labels), max_test, rng)
        labels = data.train_labels[train]
        fit_rows, others = stratified_split(labels, probe_fraction + validation_fraction, seed)
        share = validation_fraction / (probe_fraction + validation_fraction)
        probe, val = (others[part] for part in stratified_split(labels[others], share, seed))
        parts = []
        for rows in (train[fit_rows], train[probe], train[val]):
            parts.append((data.train_images[rows], data.train_labels[rows]))
        (fit_images, fit_labels), (probe_images, probe_labels), (val_images, val_labels) = parts
        return cls(
            fit_images,
            fit_labels,
            rng.permutation(fit_labels),
            probe_images,
            probe_labels,
            val_images,
            val_labels,
            data.test_images[test],
            data.test_labels[test],
            data.num_classes,
            data.name,
            float(fit_images.max()) - float(fit_images.min()),
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        h, w, c = self.fit_images.shape[1:]
        return h, w, c

    @cached_property
    def pixels(self) -> Pixels:
        """The normalisation of the networks, from the images they are trained on."""
        return Pixels.from_images(self.fit_images)

    @property
    def published_unit(self) -> float:
        """Error of the mean image per pixel where pixels are scaled to [0, 1]: normalised weight = published / this."""
        return float(self.pixels.scale) ** 2 / self.pixel_range**2

    def arrays(self) -> tuple[np.ndarray, ...]:
        """All arrays, for a fingerprint."""
        return tuple(value for value in vars(self).values() if isinstance(value, np.ndarray))


def _some(n: int, most: int | None, rng: np.random.Generator) -> np.ndarray:
    return np.arange(n) if most is None or most >= n else np.sort(rng.choice(n, most, replace=False))


@dataclasses.dataclass(frozen=True)
class Runs:
    """One ensemble.

    Attributes:
        latent: size of the code. labels: what guides. members: (published weight, seed) of each.
    """

    latent: int
    labels: Labels
    members: tuple[tuple[float, int], ...]

    @property
    def key(self) -> str:
        """A file name."""
        seeds = "-".join(str(seed) for seed in dict.fromkeys(seed for _, seed in self.members))
        return f"latent{self.latent}-{self.labels.value}-seeds{seeds}"


def make_training(split: GuidedSplit, config: NetworkConfig, runs: Runs) -> Training:
    """The networks of an ensemble.

    Gradients are not clipped: the head's would shrink the autoencoder's, and weight 0 would not be detached.

    Raises:
        InputError: sizes that do not fit the images or each other.
    """
    if config.batch_size > len(split.fit_images):
        raise ma.InputError(
            f"--network.batch-size {config.batch_size}: {len(split.fit_images)} images train, give at most these"
        )
    per_epoch = len(split.fit_images) // config.batch_size
    steps = config.epochs * per_epoch
    optimizer = OptimizerConfig(
        total_steps=steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(round(config.warmup_epochs * per_epoch), steps - 1),
        weight_decay=config.weight_decay,
        b2=0.999,
        clip_norm=None,
    )
    pixels, dtype = split.pixels, jnp.bfloat16 if config.bfloat16 else jnp.float32

    def make(rngs: nnx.Rngs) -> GuidedAutoencoder:
        autoencoder: BottleneckAutoencoder
        if config.kind is Network.mlp:
            autoencoder = MLPAutoencoder(pixels, hidden=config.widths, latent=runs.latent, dtype=dtype, rngs=rngs)
        else:
            autoencoder = ResNetAutoencoder(
                pixels,
                blocks=config.widths,
                width=config.resnet_width,
                latent=runs.latent,
                stem_stride=config.stem_stride,
                dtype=dtype,
                rngs=rngs,
            )
        return GuidedAutoencoder(autoencoder, split.num_classes, rngs=rngs)

    def objective(
        model: Any, images: jax.Array, labels: Any, key: jax.Array, member: Member
    ) -> tuple[jax.Array, Metrics]:
        crops, rest = jax.random.split(key)
        return guide(model, config.augmentation(crops, images), labels, rest, member)

    return Training(
        make,
        objective,
        adamw(optimizer),
        batch_size=config.batch_size,
        num_members=len(runs.members),
        mesh=train_mesh(),
    )


def train(training: Training, split: GuidedSplit, config: NetworkConfig, runs: Runs, folder: Path) -> TrainState:
    """Trains an ensemble, from its latest checkpoint if there is one."""
    per_epoch = len(split.fit_images) // config.batch_size
    labels = split.fit_labels if runs.labels is Labels.true else split.shuffled_labels
    identity = fingerprint([split.fit_images, labels], {"network": dataclasses.asdict(config), "runs": repr(runs)})
    weights, seeds = zip(*runs.members, strict=True)
    with (
        Checkpoints.open(folder, identity=identity, every=max(10 * per_epoch, 100), keep_latest=1) as checkpoints,
        MetricLog(folder) as log,
    ):
        return fit(
            training,
            training.init(seeds, guidance=[weight / split.published_unit for weight in weights]),
            training.put(split.fit_images, labels),
            num_steps=config.epochs * per_epoch,
            checkpoints=checkpoints,
            log=log,
            steps_per_call=min(per_epoch, 50),
            log_every=per_epoch,
        )


def measure(
    training: Training, state: TrainState, split: GuidedSplit, runs: Runs, probes: Sequence[Probe]
) -> Iterator[Row]:
    """One row for each network: errors of reconstruction, probes, the head of training.

    Args:
        training, state: of the ensemble. split: its images. runs: what it is. probes: to be fitted.

    Yields:
        latent, labels, weight (published units), normalized_weight, seed; val_error and test_error, shares of the
        error of the mean image; head_accuracy_test; rankme of the test codes; the cells of every probe.
    """
    images = (split.probe_images, split.val_images, split.test_images)
    features = [training.features(state, part, _BATCH) for part in images]
    for member, (weight, seed) in enumerate(runs.members):
        model = training.model(state, member)
        codes = [part[member] for part in features]
        errors = [reconstruction_error(model, part, split.pixels) for part in images[1:]]
        head = np.asarray(_head(model, jnp.asarray(codes[2]))).argmax(1)
        yield {
            "dataset": split.name,
            "latent": runs.latent,
            "labels": runs.labels.value,
            "weight": weight,
            "normalized_weight": weight / split.published_unit,
            "seed": seed,
            "val_error": errors[0],
            "test_error": errors[1],
            "head_accuracy_test": float((head == split.test_labels).mean()),
            "rankme": rankme(codes[2]),
            **probe_cells(codes, split, probes),
        }


def probe_cells(codes: Sequence[np.ndarray], split: GuidedSplit, probes: Sequence[Probe], name: str = "code") -> Row:
    """Scores and protocol of every probe.

    Args:
        codes: [n, k] of the probe, validation and test images. split: their labels. probes: to be fitted.
        name: of the features.
    """
    fitted, val, test = codes
    cells: Row = {}
    for probe in probes:
        result = _PROBES[probe](
            fitted,
            split.probe_labels,
            test,
            split.test_labels,
            num_classes=split.num_classes,
            val=Rows(val, split.val_labels),
            features=name,
        )
        cells |= probe_row(result, probe.value)
    return cells


def reconstruction_error(model: Any, images: np.ndarray, pixels: Pixels) -> float:
    """E|x_hat - x|^2 / E|x - mean|^2 over images, the mean being that of training.

    Args:
        model: with `reconstruct`, in eval mode. images: [n, h, w, c] stored pixels. pixels: normalisation.
    """
    sums = np.zeros(2)
    for start in range(0, len(images), _BATCH):
        part = images[start : start + _BATCH]
        # Filled up to a whole batch, so that one program serves; what was filled in is cut off again.
        full = np.concatenate([part, np.repeat(part[:1], _BATCH - len(part), axis=0)])
        sums += np.asarray(_squares(model, jnp.asarray(full), pixels), np.float64)[:, : len(part)].sum(1)
    return float(sums[0] / sums[1]) if sums[1] > 0 else math.nan


@jax.jit
def _squares(model: Any, images: jax.Array, pixels: Pixels) -> jax.Array:
    """[2, b] squared norms of the error and of the image about the mean, normalised units."""
    clean = pixels.normalize(images)
    error = pixels.normalize(model.reconstruct(images)) - clean
    return jnp.stack([jnp.square(a).sum(axis=(1, 2, 3)) for a in (error, clean)])


@jax.jit
def _head(model: GuidedAutoencoder, codes: jax.Array) -> jax.Array:
    return model.head(codes)
