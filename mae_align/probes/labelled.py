"""Parts of a classification task: checked, split, and normalised by the training features."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from mae_align.probes.inputs import Normalization, Rows, check_features, layout, precision, validation_split
from mae_align.probes.result import ProbeResult, Protocol
from mae_align.runtime.checks import are_class_labels, as_targets, check_labels
from mae_align.runtime.errors import InputError

# Rows that are held in float64 at a time.
_ROWS = 4096


class Labelled(NamedTuple):
    """Normalised features [n, k] and class labels [n] int32."""

    x: np.ndarray
    y: np.ndarray


class Parts(NamedTuple):
    """The parts of one classification task, normalised by the training features.

    Attributes:
        train, val, test: their samples.
        num_classes: q.
    """

    train: Labelled
    val: Labelled
    test: Labelled
    num_classes: int

    def result(self, accuracies: tuple[float, float, float], predicted: np.ndarray, **protocol: Any) -> ProbeResult:
        """Accuracies of the three parts as a result, r2 NaN: no estimate of the one-hot rows was made.

        Args:
            accuracies: on the training, validation and test samples.
            predicted: [n] class that is found for each test sample.
            protocol: fields of :class:`Protocol` but the numbers of samples.
        """
        numbers = {"n_train": len(self.train.y), "n_val": len(self.val.y), "n_test": len(self.test.y)}
        about = Protocol(**numbers, **protocol)
        return ProbeResult(*accuracies, math.nan, math.nan, math.nan, about, np.asarray(predicted, np.int64))


def class_parts(
    train: Rows,
    test: Rows,
    num_classes: int | None,
    val: Rows | None,
    val_fraction: float,
    normalization: Normalization,
    seed: int,
    dtype: np.dtype,
) -> Parts:
    """Checked and normalised parts of a task whose targets are classes.

    Args:
        train, test: features [n, k] and labels [n].
        num_classes: q; default: largest training label + 1.
        val: None: carved out of ``train`` by :func:`validation_split` with ``val_fraction`` and ``seed``.
        normalization: made from the features that are fitted on.
        dtype: of the normalised features.

    Returns:
        The parts.

    Raises:
        InputError: bad or ill-fitting features, targets that are no class labels, labels out of range, one class.

    Example:
        >>> x, y = np.arange(8.0).reshape(4, 2), np.array([0, 1, 0, 1])
        >>> from mae_align.probes.inputs import per_feature
        >>> class_parts(Rows(x, y), Rows(x, y), None, None, 0.5, per_feature, 0, np.dtype("float32")).train.x.shape
        (2, 2)
    """
    x = check_features(train.features)
    q = class_count(train.targets, num_classes)
    y = class_labels(train.targets, len(x), q)
    if val is None:
        split = validation_split(len(x), val_fraction, y, seed)
        x, y, x_val, y_val = x[split.train], y[split.train], x[split.val], y[split.val]
    else:
        x_val = check_features(val.features, x.shape[1])
        y_val = class_labels(val.targets, len(x_val), q)
    x_test = check_features(test.features, x.shape[1])
    y_test = class_labels(test.targets, len(x_test), q)
    mean, variance = _mean_and_variance(x)
    scale = normalization(mean, variance, precision(x.dtype.name))
    train_part, val_part, test_part = (
        Labelled(_normalized(a, mean, scale, dtype), b) for a, b in ((x, y), (x_val, y_val), (x_test, y_test))
    )
    return Parts(train_part, val_part, test_part, q)


def class_count(targets: np.ndarray, num_classes: int | None) -> int:
    """Number of classes q of training labels [n]; refuses targets that are no class labels, and labels of one class."""
    given = as_targets(targets)
    if not are_class_labels(given):
        raise InputError(f"targets of dtype {given.dtype} and {given.ndim} axes are no class labels: use ridge_probe")
    return layout({"task": given}, {} if num_classes is None else {"task": num_classes})[0].stop


def class_labels(targets: np.ndarray, n: int, q: int) -> np.ndarray:
    """Labels [n] as int32; refuses another number of them, no integers, and labels outside 0..q - 1."""
    targets = as_targets(targets)
    if not are_class_labels(targets) or len(targets) != n:
        raise InputError(f"targets of shape {list(targets.shape)} and dtype {targets.dtype}: give {n} class labels")
    return check_labels(targets, q)[0].astype(np.int32)


def _mean_and_variance(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[k] each, float64, about the first row: a constant feature has a variance of exactly 0."""
    total, squares = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for start in range(0, len(x), _ROWS):
        z = x[start : start + _ROWS] - x[0].astype(np.float64)
        total += z.sum(0)
        squares += (z**2).sum(0)
    mean = total / len(x)
    return x[0] + mean, np.maximum(squares / len(x) - mean**2, 0.0)


def _normalized(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """(x - mean) scale, centred in float64 some rows at a time."""
    found = np.empty(x.shape, dtype)
    for start in range(0, len(x), _ROWS):
        found[start : start + _ROWS] = (x[start : start + _ROWS] - mean) * scale
    return found
