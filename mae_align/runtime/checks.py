"""Checks of user input, before any long work: each raises one clear :class:`InputError`."""

from __future__ import annotations

import numpy as np

from mae_align.runtime.errors import InputError


def are_class_labels(targets: np.ndarray) -> bool:
    """Whether targets are class labels: a 1-d array of integers.

    Example:
        >>> are_class_labels(np.array([0, 2])), are_class_labels(np.array([0.5, 2.0]))
        (True, False)
    """
    targets = np.asarray(targets)
    return targets.ndim == 1 and targets.dtype.kind in "iub"


def check_images(images: np.ndarray) -> np.ndarray:
    """Images as uint8, float32 or float64 [n, h, w, c] with finite pixels.

    Args:
        images: [n, h, w, c].

    Returns:
        The same array; other floating types as float32.

    Raises:
        InputError: wrong rank, empty axis, other dtype, NaN or infinite pixels.

    Example:
        >>> check_images(np.zeros((1, 2, 2, 1), np.float16)).dtype.name
        'float32'
    """
    images = np.asarray(images)
    if images.ndim != 4:
        raise InputError(
            f"images have shape {list(images.shape)}: give [n, h, w, c] (add a channel axis to grey images)"
        )
    if 0 in images.shape:
        raise InputError(f"images have shape {list(images.shape)}: no axis may be empty")
    if images.dtype == np.uint8 or images.dtype in (np.float32, np.float64):
        pass
    elif images.dtype.kind == "f":
        images = images.astype(np.float32)
    else:
        raise InputError(f"images have dtype {images.dtype}: give uint8 or a floating type")
    # A sum is finite only if every pixel is; it needs no array of flags. An overflow falls through to the full test.
    if images.dtype.kind == "f" and not np.isfinite(images.sum()) and not np.isfinite(images).all():
        bad = int(np.argmax(~np.isfinite(images).all(axis=(1, 2, 3))))
        raise InputError(f"image {bad} holds NaN or infinite pixels: clean the data first")
    return images


def check_labels(labels: np.ndarray, num_classes: int | None) -> tuple[np.ndarray, int]:
    """Class labels as int64 and the number of classes q.

    Args:
        labels: [n] integers.
        num_classes: q; default: largest label + 1.

    Raises:
        InputError: labels outside 0..q - 1, or a single class.

    Example:
        >>> check_labels(np.array([2, 0], np.uint8), None)
        (array([2, 0]), 3)
    """
    labels = labels.astype(np.int64)
    q = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= q:
        raise InputError(
            f"labels run from {labels.min()} to {labels.max()}, outside 0..{q - 1}: relabel them or set num_classes"
        )
    if q < 2:
        raise InputError("all labels are one class: a task needs at least two")
    return labels, q


def check_task(num_targets: int) -> None:
    """Refuse moments without targets where a task is asked about.

    Raises:
        InputError: no target columns.

    Example:
        >>> check_task(0)
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: these moments were made without targets: there is no task to explain,
        give targets
    """
    if num_targets == 0:
        raise InputError("these moments were made without targets: there is no task to explain, give targets")


def check_targets(targets: np.ndarray, n: int, num_classes: int | None) -> np.ndarray:
    """Target rows [n, q] in float64; class labels become one-hot rows.

    Args:
        targets: [n] integer class labels, or numbers [n] or [n, q].
        n: number of images.
        num_classes: q for class labels; default: largest label + 1.

    Raises:
        InputError: wrong length or shape, labels out of range, a single class, NaN or infinite values.

    Example:
        >>> check_targets(np.array([0, 1]), 2, None).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    targets = np.asarray(targets)
    if len(targets) != n:
        raise InputError(f"{n} images but {len(targets)} targets: give one target per image")
    if are_class_labels(targets):
        labels, q = check_labels(targets, num_classes)
        return np.eye(q)[labels]
    if num_classes is not None:
        raise InputError("num_classes goes with a 1-d integer label array; leave it out for float targets")
    if targets.ndim == 1:
        targets = targets[:, None]
    if targets.ndim != 2 or targets.dtype.kind not in "fiub":
        raise InputError(
            f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: "
            "give integer labels [n] or numbers [n, q]"
        )
    y = targets.astype(np.float64)
    if not np.isfinite(y).all():
        raise InputError("targets hold NaN or infinite values: clean the data first")
    return y
