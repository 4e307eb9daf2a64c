"""What is measured of networks: every task probed on their features, and its closed form evaluated."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.alignment_vs_probe.networks import FEATURE_BATCH
from experiments.alignment_vs_probe.tasks import Task, standard_tasks
from experiments.harness.data import Split
from mae_align.closed_form.predictions import Row, closed_form_rows, denoising_encoder
from mae_align.corruption import FixedCountPatchMasking
from mae_align.data import ImageDataset
from mae_align.metrics import probe_row
from mae_align.models import MaskedAutoencoder
from mae_align.moments.moments import Moments
from mae_align.probes import ProbeResult, Rows, ridge_probe, ridge_probe_many
from mae_align.train.ensemble import Training, TrainState

# Features of training, validation and test images, [E, n, k] each.
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]
# Groups of held-out images: their spread is not used here, and the curves want at least two.
_GROUPS = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Images beside the training images, and what every task asks of them.

    Attributes:
        images: [m, h, w, c].
        tasks: with these as their test images.
    """

    images: np.ndarray
    tasks: tuple[Task, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """The images and tasks of a run.

    The test images are split: the held-out curves of the closed form and the test of the probes share none, so that
    prediction and observation have no sampling noise in common.

    Attributes:
        data: the split.
        moments: of the training images, without targets.
        chosen: the validation images, on which the strengths of probes are chosen.
        probed: half of the test images, on which probes are tested.
        predicted: the other half, on which the closed form is.
    """

    data: Split
    moments: Moments
    chosen: Part
    probed: Part
    predicted: Part

    @classmethod
    def of(cls, data: Split, seed: int) -> Study:
        """Make the tasks; one that some part has no images for (a class without test images) is left out of all.

        Args:
            data: the split.
            seed: of the halves, and of the tasks that are drawn.
        """
        moments, held = Moments.from_arrays(data.train_images), len(data.validation_labels)
        images = np.concatenate([data.validation_images, data.test_images])
        labels = np.concatenate([data.validation_labels, data.test_labels])
        everything = ImageDataset(data.train_images, data.train_labels, images, labels, data.class_names, data.name)
        with warnings.catch_warnings():
            warnings.simplefilter("once")
            tasks = standard_tasks(everything, moments, seed)
        test = held + np.random.default_rng(seed).permutation(len(data.test_labels))
        rows = [np.arange(held), np.sort(test[::2]), np.sort(test[1::2])]
        kept = [task for task in tasks if all(np.isin(part, task.test_rows).any() for part in rows)]
        return cls(data, moments, *(Part(images[part], tuple(task.tested_on(part) for task in kept)) for part in rows))

    def encoded(self, encode: Callable[[np.ndarray], np.ndarray]) -> Encoded:
        """Features of the training images, of the validation images and of the half of the test images.

        Args:
            encode: features [E, n, k] of images [n, h, w, c].

        Returns:
            Three arrays [E, n, k].
        """
        return encode(self.data.train_images), encode(self.chosen.images), encode(self.probed.images)

    def probe(self, features: Encoded, name: str) -> list[dict[str, dict[str, Any]]]:
        """Scores of ridge probes of all tasks on features.

        Args:
            features: of :meth:`encoded`.
            name: of the features, for the protocol.

        Returns:
            For each of the E networks, columns of a table by task; what there is not is a blank cell, not "nan".
        """
        return [
            {task: blank(probe_row(result)) for task, result in probe_tasks(*of, self, name).items()}
            for of in zip(*features, strict=True)
        ]


def blank(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in which NaN is None: a blank cell, and JSON has none.

    Example:
        >>> blank({"a": math.nan, "b": 1.0})
        {'a': None, 'b': 1.0}
    """
    return {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in row.items()}


def probe_tasks(
    train_features: np.ndarray, chosen_features: np.ndarray, probed_features: np.ndarray, study: Study, name: str
) -> dict[str, ProbeResult]:
    """Ridge probes of all tasks on the features of one network.

    Tasks on all images share one eigendecomposition; a task on some of the classes has one of its own.

    Args:
        train_features: [n, k] that probes are fitted on.
        chosen_features: [v, k] that their strengths are chosen on.
        probed_features: [m, k] that they are tested on.
        study: whose tasks.
        name: of the features, for the protocol.

    Returns:
        Results by task.
    """
    pairs = list(zip(study.probed.tasks, study.chosen.tasks, strict=True))
    whole = [(task, chosen) for task, chosen in pairs if not task.restricted]
    results = ridge_probe_many(
        train_features,
        {task.name: task.train_targets for task, _ in whole},
        probed_features,
        {task.name: task.test_targets for task, _ in whole},
        num_classes={task.name: task.num_classes for task, _ in whole if task.num_classes is not None},
        val=(chosen_features, {chosen.name: chosen.test_targets for _, chosen in whole}),
        features=name,
    )
    for task, chosen in pairs:
        if task.restricted:
            results[task.name] = ridge_probe(
                train_features[task.train_rows],
                task.train_targets,
                probed_features[task.test_rows],
                task.test_targets,
                num_classes=task.num_classes,
                val=Rows(chosen_features[chosen.test_rows], chosen.test_targets),
                features=name,
            )
    return results


def closed_form(study: Study, masking: FixedCountPatchMasking, ks: Sequence[int]) -> dict[str, Row]:
    """Columns of the closed form of every task: r2 and alignment on the features of a linear masked autoencoder.

    Args:
        study: whose images and tasks; the autoencoder is that of all training images.
        masking: the mask.
        ks: numbers of features.

    Returns:
        Rows by task.
    """
    encoder = denoising_encoder(study.moments, masking)
    tasks = study.predicted.tasks
    # Tasks on all images share moments; one on some of the images has its own.
    groups = [[task for task in tasks if not task.restricted], *([task] for task in tasks if task.restricted)]
    found = {}
    for group in filter(None, groups):
        first, ends = group[0], np.cumsum([_matrix(task, task.train_targets).shape[1] for task in group]).tolist()
        columns = {task.name: slice(a, b) for task, a, b in zip(group, [0, *ends], ends, strict=False)}
        parts = (
            (study.data.train_images, first.train_rows, [_matrix(task, task.train_targets) for task in group]),
            (study.predicted.images, first.test_rows, [_matrix(task, task.test_targets) for task in group]),
        )
        fitted, held_out = (
            Moments.from_arrays(images[rows], np.concatenate(targets, axis=1), groups=_GROUPS)
            for images, rows, targets in parts
        )
        found |= closed_form_rows(fitted, masking, columns, held_out, ks, encoder=encoder)
    return found


def _matrix(task: Task, targets: np.ndarray) -> np.ndarray:
    """Targets as numbers [n', q]: one-hot rows for classes."""
    return targets if task.num_classes is None else np.eye(task.num_classes)[targets]


def masked_loss(training: Training, state: TrainState, images: np.ndarray) -> np.ndarray:
    """Training loss of each network on other images, with masks that are the same for all networks, [E]."""
    # Whole batches alone, so that one program serves.
    parts = [images[i : i + FEATURE_BATCH] for i in range(0, len(images) - FEATURE_BATCH + 1, FEATURE_BATCH)]
    parts = parts or [images]
    models = [training.model(state, member) for member in range(training.num_members)]
    each = [[float(_loss(m, jnp.asarray(x), jax.random.key(i))) for i, x in enumerate(parts)] for m in models]
    return np.mean(each, axis=1)


@jax.jit
def _loss(model: MaskedAutoencoder, images: jax.Array, key: jax.Array) -> jax.Array:
    return model.loss(images, key)[0]
