"""Checks of user input, before any long work: each raises one clear :class:`InputError`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mae_align.runtime.errors import InputError

# Numbers of channels that pictures have; an axis of so many before two longer ones is one of channels.
_CHANNELS, _MOST_CHANNELS = (1, 3, 4), 4
# Labels up to the first are taken as they are; above, no more than so many may be left out for each that is there.
_MOST_CLASSES, _GAPS = 10_000, 10


def as_array(values: object, what: str) -> np.ndarray:
    """An array of any library as NumPy's; bfloat16 and 8-bit floats, which NumPy has not, as float32.

    Args:
        values: anything that NumPy can read as an array of numbers or text.
        what: it is, for messages.

    Raises:
        InputError: objects, masked entries, complex numbers, or what cannot be read.

    Example:
        >>> import jax.numpy as jnp
        >>> as_array(jnp.ones(2, jnp.bfloat16), "features").dtype.name
        'float32'
    """
    try:
        array = np.asarray(values)
    except Exception as error:  # of any library: a tensor on another device, or one with gradients
        raise InputError(
            f"{what} cannot be read as an array ({str(error).splitlines()[0]}): give a NumPy array"
        ) from None
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise InputError(f"{what} have masked entries: fill them or leave these samples out")
    if array.dtype.kind == "V" and jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(np.float32)
    if array.dtype.kind in "OVcmM":
        raise InputError(f"{what} have dtype {array.dtype}: give plain numbers, np.stack of arrays of one shape")
    return array


def as_targets(targets: object) -> np.ndarray:
    """Targets in one layout: class labels [n], or numbers [n] or [n, q].

    A column of whole numbers [n, 1], as Keras and MedMNIST give labels, is class labels.

    Args:
        targets: [n] or [n, 1] integer class labels, or numbers [n] or [n, q]; 0/1 and -1/1 attributes are numbers.

    Raises:
        InputError: text, or several columns of whole numbers that are no attributes: they may be classes or numbers.

    Example:
        >>> as_targets(np.array([[2], [0]], np.uint8)).tolist()
        [2, 0]
    """
    array = as_array(targets, "targets")
    if array.dtype.kind in "US":
        raise InputError(
            "targets are text: numbers, names = ma.encode_labels(train, test, ...) makes class labels of it"
        )
    if array.dtype.kind not in "iub" or array.ndim != 2:
        return array
    if array.shape[1] == 1:
        return array[:, 0]
    if array.size and not (np.isin(array, (0, 1)).all() or np.isin(array, (-1, 1)).all()):
        raise InputError(
            f"targets are whole numbers {list(array.shape)}: if they are class labels, give one column [n] at a time; "
            "if they are numbers, give floats"
        )
    return array


def are_class_labels(targets: np.ndarray) -> bool:
    """Whether targets, as :func:`as_targets` gives them, are class labels: a 1-d array of integers.

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
    images = as_array(images, "images")
    if images.ndim != 4:
        raise InputError(
            f"images have shape {list(images.shape)}: give [n, h, w, c] (add a channel axis to grey images)"
        )
    if 0 in images.shape:
        raise InputError(f"images have shape {list(images.shape)}: no axis may be empty")
    if images.shape[1] in _CHANNELS and images.shape[2] > _MOST_CHANNELS and images.shape[3] > _MOST_CHANNELS:
        raise InputError(
            f"images have shape {list(images.shape)}, which looks like [n, c, h, w]: move the channels last, "
            "np.moveaxis(images, 1, -1); if they are low and wide pictures of many channels, np.swapaxes(images, 1, 2)"
        )
    if images.dtype == np.uint8 or images.dtype in (np.float32, np.float64):
        pass
    elif images.dtype.kind == "f":
        images = images.astype(np.float32)
    else:
        raise InputError(f"images have dtype {images.dtype}: give uint8 or a floating type")
    # A sum is finite only if every pixel is; it needs no array of flags. An overflow falls through to the full test.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = images.dtype.kind != "f" or bool(np.isfinite(images.sum()))
    if not finite and not np.isfinite(images).all():
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
    if num_classes is None and q > _MOST_CLASSES and q > _GAPS * (distinct := len(np.unique(labels))):
        raise InputError(
            f"labels run up to {q - 1}, but only {distinct} are different: numbers, names = ma.encode_labels(train, "
            "test, ...) numbers them without gaps"
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
    targets = as_targets(targets)
    if not targets.ndim or len(targets) != n:
        raise InputError(f"{n} images but {len(targets) if targets.ndim else 0} targets: give one target per image")
    if are_class_labels(targets):
        labels, q = check_labels(targets, num_classes)
        rows = np.zeros((n, q))
        rows[np.arange(n), labels] = 1.0
        return rows
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
