"""Ensembles of guided autoencoders: their images, their training, and what fresh probes find in their codes."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.harness.autoencoders import Autoencoder
from experiments.harness.config import Training as TrainingSettings
from experiments.harness.data import Split
from experiments.harness.ensembles import Probe
from experiments.harness.probes import PROBES
from experiments.harness.run import Run
from experiments.harness.train import optimizer, training_programs
from mae_align.data import stratified_split
from mae_align.metrics import probe_row, rankme
from mae_align.models import GuidedAutoencoder, Pixels, in_head
from mae_align.probes import ProbeResult, Rows, logistic_probe
from mae_align.train.augment import Augmentation, augmented
from mae_align.train.ensemble import Training, TrainState, guide
from mae_align.train.optimizer import adamw

Row = dict[str, Any]
# Images of one forward pass.
_BATCH = 500


class Labels(enum.Enum):
    """What guides."""

    true = "true"
    shuffled = "shuffled"


# Accuracies settle long before the gradient vanishes, and weaker regularisation than this changes none.
_LOGISTIC = partial(logistic_probe, strengths=(1e-4, 1e-3, 1e-2), tolerance=1e-4, dtype="float32")
_PROBES: Mapping[Probe, Callable[..., ProbeResult]] = {**PROBES, Probe.logistic: _LOGISTIC}


@dataclasses.dataclass(frozen=True)
class GuidedTraining(TrainingSettings):
    """Training of guided autoencoders by AdamW; gradients of the head are clipped by a norm of their own."""

    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    """What is done to each training image; nothing by default."""


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Networks that train side by side.

    Attributes:
        latent: size of the code.
        labels: what guides.
        members: (published weight, seed) of each.
    """

    latent: int
    labels: Labels
    members: tuple[tuple[float, int], ...]

    @property
    def key(self) -> str:
        """A file name."""
        seeds = "-".join(str(seed) for seed in dict.fromkeys(seed for _, seed in self.members))
        return f"latent{self.latent}-{self.labels.value}-seeds{seeds}"


@dataclasses.dataclass(frozen=True, eq=False)
class GuidedSplit:
    """The images of a run, their training images cut in two: no image has two uses.

    Attributes:
        data: validation images, on which choices are made, and test images, which are only measured.
        fit_images: [n, h, w, c], the autoencoders are trained on them.
        fit_labels: [n], they guide.
        shuffled_labels: [n], of the control, a permutation of fit_labels.
        probe_images: [m, h, w, c], probes are fitted on them.
        probe_labels: [m].
    """

    data: Split
    fit_images: np.ndarray
    fit_labels: np.ndarray
    shuffled_labels: np.ndarray
    probe_images: np.ndarray
    probe_labels: np.ndarray

    @classmethod
    def of(cls, data: Split, probe_fraction: float, seed: int) -> GuidedSplit:
        """Cut the training images; the proportions of the classes are kept.

        Raises:
            InputError: a class with too few images.
        """
        images, labels = data.train_images, data.train_labels
        fit, probe = stratified_split(labels, probe_fraction, seed)
        shuffled = np.random.default_rng(seed).permutation(labels[fit])
        return cls(data, images[fit], labels[fit], shuffled, images[probe], labels[probe])

    @cached_property
    def pixels(self) -> Pixels:
        """The normalisation of the networks, from the images they are trained on."""
        return Pixels.from_images(self.fit_images)

    @property
    def published_unit(self) -> float:
        """Error of the mean image per pixel where pixels are scaled to [0, 1]: normalised weight = published / this."""
        reach = float(self.fit_images.max()) - float(self.fit_images.min())
        return float(self.pixels.scale) ** 2 / reach**2

    @property
    def measured(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probe, validation and test images."""
        return self.probe_images, self.data.validation_images, self.data.test_images


def make_training(split: GuidedSplit, network: Autoencoder, settings: GuidedTraining, ensemble: Ensemble) -> Training:
    """The programs of an ensemble.

    Raises:
        InputError: sizes that do not fit the images or each other.
    """
    settings.augmentation.check(split.data.image_shape)
    pixels = split.pixels

    def make(rngs: nnx.Rngs) -> GuidedAutoencoder:
        autoencoder = network.make(pixels, latent=ensemble.latent, bfloat16=settings.bfloat16, rngs=rngs)
        return GuidedAutoencoder(autoencoder, split.data.classes, rngs=rngs)

    return training_programs(
        make,
        augmented(guide, settings.augmentation),
        adamw(optimizer(settings, len(split.fit_images)), in_head),
        batch_size=settings.batch_size,
        num_members=len(ensemble.members),
    )


def trained_rows(
    run: Run[Split],
    split: GuidedSplit,
    training: Training,
    steps: int,
    ensemble: Ensemble,
    probes: Sequence[Probe],
) -> list[Row]:
    """Train an ensemble and measure it; a row for each network.

    Args:
        run: keeps networks and measurements.
        split: the images.
        training: of :func:`make_training`.
        steps: of the training.
        ensemble: what it is.
        probes: to be fitted.

    Returns:
        Rows of latent, labels, weight (published units), normalized_weight and seed; val_error and test_error, shares
        of the error of the mean image; head_accuracy_test; rankme of the test codes; the cells of every probe.
    """
    labels = split.fit_labels if ensemble.labels is Labels.true else split.shuffled_labels
    weights, seeds = zip(*ensemble.members, strict=True)

    def look(state: TrainState, step: int) -> dict[str, np.ndarray]:
        del step
        rows = list(measure(training, state, split, probes))
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    found = run.train_at(
        ensemble.key,
        training,
        lambda: training.init(seeds, guidance=[weight / split.published_unit for weight in weights]),
        lambda: training.put(split.fit_images, labels),
        [steps],
        look,
    )
    rows = []
    for member, (weight, seed) in enumerate(ensemble.members):
        about: Row = {"dataset": split.data.name, "latent": ensemble.latent, "labels": ensemble.labels.value}
        about |= {"weight": weight, "normalized_weight": weight / split.published_unit, "seed": seed}
        rows.append(about | {name: values[-1, member].item() for name, values in found.items()})
    return rows


def measure(training: Training, state: TrainState, split: GuidedSplit, probes: Sequence[Probe]) -> Iterator[Row]:
    """The cells of each network of an ensemble, one dictionary after the other; see :func:`trained_rows`."""
    features = [training.features(state, images, _BATCH) for images in split.measured]
    for member in range(training.num_members):
        model = training.model(state, member)
        codes = [part[member] for part in features]
        val_error, test_error = (reconstruction_error(model, part, split.pixels) for part in split.measured[1:])
        head = np.asarray(_head(model, jnp.asarray(codes[2]))).argmax(1)
        yield {
            "val_error": val_error,
            "test_error": test_error,
            "head_accuracy_test": float((head == split.data.test_labels).mean()),
            "rankme": rankme(codes[2]),
            **probe_cells(codes, split, probes),
        }


def probe_cells(codes: Sequence[np.ndarray], split: GuidedSplit, probes: Sequence[Probe], name: str = "code") -> Row:
    """Scores and protocol of every probe.

    Args:
        codes: [n, k] of the probe, validation and test images.
        split: their labels.
        probes: to be fitted.
        name: of the features.
    """
    fitted, val, test = codes
    cells: Row = {}
    for probe in probes:
        result = _PROBES[probe](
            fitted,
            split.probe_labels,
            test,
            split.data.test_labels,
            num_classes=split.data.classes,
            val=Rows(val, split.data.validation_labels),
            features=name,
        )
        cells |= probe_row(result, probe.value)
    return cells


def reconstruction_error(model: Any, images: np.ndarray, pixels: Pixels) -> float:
    """E|x_hat - x|^2 / E|x - mean|^2 over images, the mean being that of training.

    Args:
        model: with `reconstruct`, in eval mode.
        images: [n, h, w, c] stored pixels.
        pixels: normalisation.
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
