"""Features, targets and splits of probes: checked, normalised, and in one layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from mae_align.data.split import stratified_split
from mae_align.runtime.checks import are_class_labels, as_array, as_targets, check_images, check_labels, check_targets
from mae_align.runtime.errors import InputError

# Multipliers [k] of the centred features, from their means [k], variances [k] and the precision they are stored in.
Normalization = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def per_feature(mean: np.ndarray, variance: np.ndarray, eps: float) -> np.ndarray:
    """Every feature to unit variance; a constant one to 0.

    Args:
        mean: [k].
        variance: [k].
        eps: relative precision in which features are stored: below it lies no variance.

    Returns:
        [k] multipliers.

    Example:
        >>> per_feature(np.array([0.0, 5.0]), np.array([4.0, 0.0]), 0.0).tolist()
        [0.5, 0.0]
    """
    varies = variance > (8 * eps * np.abs(mean)) ** 2
    return np.where(varies, 1.0 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)


def one_scale(mean: np.ndarray, variance: np.ndarray, eps: float) -> np.ndarray:
    """All features by one number, to unit variance on average: directions and relative sizes stay as the encoder gave.

    Args:
        mean: [k].
        variance: [k].
        eps: as in :func:`per_feature`.

    Returns:
        [k] multipliers, 0 for constant features.

    Example:
        >>> one_scale(np.zeros(2), np.array([6.0, 2.0]), 0.0).tolist()
        [0.5, 0.5]
    """
    varies = variance > (8 * eps * np.abs(mean)) ** 2
    return np.where(varies, 1.0 / np.sqrt(variance.mean() if varies.any() else 1.0), 0.0)


def name_of(normalization: Normalization) -> str:
    """Name of a normalisation for a protocol: that of the function."""
    return getattr(normalization, "__name__", repr(normalization))


def precision(dtype: str) -> float:
    """Relative precision of stored features: 0 for integers, whose moments are exact."""
    return 0.0 if np.dtype(dtype).kind in "iub" else float(np.finfo(dtype).eps)


def check_features(features: np.ndarray, width: int | None = None) -> np.ndarray:
    """Features [n, k] as uint8, float32 or float64, finite.

    Args:
        features: [n, k].
        width: k, where it is known.

    Raises:
        InputError: another rank, type or width, an empty axis, NaN or infinite values.

    Example:
        >>> check_features(np.zeros((2, 3), np.float16)).dtype.name
        'float32'
    """
    features = as_array(features, "features")
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"features have shape {list(features.shape)}: give [n, k], neither of them 0")
    if width is not None and features.shape[1] != width:
        raise InputError(f"{features.shape[1]} features where the training ones have {width}: use one encoder for all")
    if features.dtype.kind == "f" and not np.isfinite(features).all():
        bad = int(np.argmax(~np.isfinite(features).all(axis=1)))
        raise InputError(f"features of sample {bad} are NaN or infinite: the encoder has diverged, or its input is bad")
    if features.dtype.kind != "f" and features.dtype != np.uint8:
        raise InputError(f"features have dtype {features.dtype}: give uint8 or a floating type")
    return as_images(features).reshape(features.shape)


def as_images(features: np.ndarray) -> np.ndarray:
    """Features as images of one pixel, [n, 1, 1, k]: what :class:`mae_align.Moments` and streams of it take.

    Args:
        features: [n, k].

    Example:
        >>> as_images(np.eye(4)).shape
        (4, 1, 1, 4)
    """
    features = np.asarray(features)
    return check_images(features.reshape(len(features), 1, 1, -1))


class Task(NamedTuple):
    """Columns start:stop of the target matrix.

    Attributes:
        name: of the task.
        start, stop: columns.
        labelled: whether they are one-hot rows of classes.
    """

    name: str
    start: int
    stop: int
    labelled: bool

    @property
    def columns(self) -> slice:
        """The columns as a slice."""
        return slice(self.start, self.stop)


class Rows(NamedTuple):
    """Samples in memory.

    Attributes:
        features: [n, k].
        targets: [n] class labels, or numbers [n] or [n, q].
    """

    features: np.ndarray
    targets: np.ndarray


def layout(targets: Mapping[str, np.ndarray], num_classes: Mapping[str, int]) -> tuple[Task, ...]:
    """One block of columns for each task, in their order.

    Args:
        targets: training targets by task: [n] class labels, or numbers [n] or [n, q].
        num_classes: of tasks whose largest label is missing among the training targets.

    Raises:
        InputError: no task, bad labels or targets, or targets that are all equal.

    Example:
        >>> layout({"class": np.array([0, 2, 1]), "size": np.array([0.1, 0.2, 0.3])}, {})[1]
        Task(name='size', start=3, stop=4, labelled=False)
    """
    if not targets:
        raise InputError("no tasks: give at least one name with targets")
    unknown = sorted(set(num_classes) - set(targets))
    if unknown:
        raise InputError(f"num_classes names {unknown}, which are no tasks: tasks are {sorted(targets)}")
    tasks: list[Task] = []
    for name, given in targets.items():
        values = as_targets(given)
        if values.ndim == 0 or len(values) < 2:
            raise InputError(f"task {name!r}: give the targets of at least two training samples")
        if (values == values[:1]).all():
            raise InputError(f"task {name!r}: all training targets are equal, there is nothing to tell apart")
        labelled = are_class_labels(values)
        if labelled:
            width = check_labels(values, num_classes.get(name))[1]
        else:
            width = check_targets(values, len(values), num_classes.get(name)).shape[1]
        start = tasks[-1].stop if tasks else 0
        tasks.append(Task(name, start, start + width, labelled))
    return tuple(tasks)


def target_matrix(targets: Mapping[str, np.ndarray], tasks: tuple[Task, ...], n: int) -> np.ndarray:
    """Targets of all tasks side by side.

    Args:
        targets: by task, as in :func:`layout`.
        tasks: its layout.
        n: number of samples.

    Returns:
        [n, Q] float64.

    Raises:
        InputError: a task is missing, or its targets are of another kind, length or width than the training ones.

    Example:
        >>> tasks = layout({"class": np.array([0, 2, 1])}, {})
        >>> target_matrix({"class": np.array([1])}, tasks, 1).tolist()
        [[0.0, 1.0, 0.0]]
    """
    names = [task.name for task in tasks]
    if set(targets) != set(names):
        raise InputError(f"tasks are {sorted(targets)} here and {sorted(names)} in training: give the same ones")
    blocks = []
    for task in tasks:
        values = as_targets(targets[task.name])
        if are_class_labels(values) != task.labelled:
            raise InputError(f"task {task.name!r}: class labels in one part and numbers in another")
        block = check_targets(values, n, task.stop - task.start if task.labelled else None)
        if block.shape[1] != task.stop - task.start:
            raise InputError(
                f"task {task.name!r}: {block.shape[1]} target columns, {task.stop - task.start} in training"
            )
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Positions of the samples that a probe is fitted on and of those on which it is chosen.

    Attributes:
        train: [m] int64, ascending.
        val: [v] int64, ascending.
        seed: it was drawn with.
    """

    train: np.ndarray
    val: np.ndarray
    seed: int


def validation_split(n: int, fraction: float, labels: np.ndarray | None, seed: int) -> Split:
    """Carve validation samples out of n training samples.

    Args:
        n: number of samples, at least 2.
        fraction: share that goes to validation, inside (0, 1); at least one sample stays on each side.
        labels: [n] classes, to keep their proportions (:func:`mae_align.data.split.stratified_split`); a class with one
            sample stays in training. None: any samples.
        seed: integer >= 0; equal seeds give equal splits.

    Returns:
        The split.

    Raises:
        InputError: fewer than two samples, labels of another number, a fraction outside (0, 1), a negative seed.

    Example:
        >>> split = validation_split(10, 0.2, np.arange(10) % 2, seed=0)
        >>> len(split.train), len(split.val)
        (8, 2)
    """
    if n < 2:
        raise InputError(f"{n} sample(s): a probe needs at least one to learn from and one to choose on")
    if not 0.0 < fraction < 1.0 or seed < 0:
        raise InputError(f"val_fraction={fraction}, seed={seed}: give a share between 0 and 1 and a seed of at least 0")
    if labels is not None:
        if len(labels) != n:
            raise InputError(f"{n} samples but {len(labels)} labels: give one label per sample")
        _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        several = np.flatnonzero(counts[inverse] > 1)
        if len(several):
            _, second = stratified_split(inverse[several], fraction, seed)
            val = several[second]
            return Split(np.setdiff1d(np.arange(n), val), val, seed)
    take = min(max(round(fraction * n), 1), n - 1)
    order = np.random.default_rng(seed).permutation(n)
    return Split(np.sort(order[take:]), np.sort(order[:take]), seed)


def finest_labels(targets: Mapping[str, np.ndarray], tasks: tuple[Task, ...]) -> np.ndarray | None:
    """Labels of the task with most classes, for the split that all tasks share; None where all targets are numbers.

    Example:
        >>> targets = {"coarse": np.array([0, 1, 0]), "fine": np.array([0, 1, 2])}
        >>> finest_labels(targets, layout(targets, {})).tolist()
        [0, 1, 2]
    """
    labelled = [task for task in tasks if task.labelled]
    if not labelled:
        return None
    return np.asarray(targets[max(labelled, key=lambda task: task.stop - task.start).name])
