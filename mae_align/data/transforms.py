"""Pure functions on image arrays: coarser pixels, fewer classes, added backgrounds, jitter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from mae_align.data.dataset import ImageDataset
from mae_align.data.split import check_seed
from mae_align.runtime.errors import InputError

_WHITE = 255.0
_ROWS = 2048  # images per step, to keep temporaries small


def average_pool(images: np.ndarray, factor: int) -> np.ndarray:
    """Images at 1 / factor of the resolution: means over factor x factor blocks of pixels.

    ``out[n, i, j, c] = mean of images[n, i f : (i + 1) f, j f : (j + 1) f, c]``

    Args:
        images: [n, h, w, c] uint8 or floats.
        factor: f, must divide h and w.

    Returns:
        [n, h / f, w / f, c]: float32 from uint8 (the exact mean, rounded once), else the dtype of
        the images (summed in float64).

    Raises:
        InputError: factor below 1 or not a divisor of both sides, pixels neither uint8 nor floats.

    Example:
        >>> average_pool(np.array([[0, 4], [2, 3]], np.uint8).reshape(1, 2, 2, 1), 2).item()
        2.25
    """
    _check_rank(images, "images")
    n, h, w, c = images.shape
    if factor < 1 or h % factor or w % factor:
        raise InputError(f"factor {factor} does not divide {h} x {w} images: give a common divisor")
    integer = images.dtype == np.uint8
    if not integer and images.dtype.kind != "f":
        raise InputError(f"images have dtype {images.dtype}: give uint8 or a floating type")
    out = np.empty((n, h // factor, w // factor, c), np.float32 if integer else images.dtype)
    for part, result in zip(_parts(images), _parts(out), strict=True):
        sums = np.zeros(result.shape, np.uint64 if integer else np.float64)
        # One strided addition per place in the block is faster than a sum over two axes.
        for row, column in itertools.product(range(factor), repeat=2):
            sums += part[:, row::factor, column::factor]
        result[...] = sums / factor**2
    return out


def select_classes(dataset: ImageDataset, classes: Sequence[int]) -> ImageDataset:
    """The images of some classes, relabelled 0, 1, ... in the order given.

    Args:
        dataset: any data set.
        classes: at least two different class numbers.

    Returns:
        The data set of those classes, with their names.

    Raises:
        InputError: fewer than two, repeated or unknown classes, or none of their images in train or
            in test.

    Example:
        >>> x, y = np.zeros((6, 2, 2, 1), np.uint8), np.array([0, 1, 2, 0, 1, 2])
        >>> part = select_classes(ImageDataset(x, y, x, y, ("a", "b", "c"), "toy"), [2, 0])
        >>> part.class_names, part.train_labels
        (('c', 'a'), array([1, 0, 1, 0]))
    """
    classes = [int(value) for value in classes]
    if len(classes) < 2:
        raise InputError(f"classes {classes}: a task needs at least two")
    if len(set(classes)) < len(classes):
        raise InputError(f"classes {classes} repeat a class: name each one once")
    count = dataset.classes
    unknown = [value for value in classes if not 0 <= value < count]
    if unknown:
        raise InputError(f"classes {unknown} do not exist in {dataset.name!r}: choose from 0..{count - 1}")
    relabel = np.full(count, -1, np.int64)
    relabel[classes] = np.arange(len(classes))

    def chosen(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = relabel[labels]
        return images[labels >= 0], labels[labels >= 0]

    return dataset.map_parts(chosen, class_names=tuple(dataset.class_names[value] for value in classes))


def blend_over_backgrounds(foreground: np.ndarray, backgrounds: np.ndarray, contrast: float, seed: int) -> np.ndarray:
    """White glyphs over random crops of natural images.

    ``out = alpha 255 + (1 - alpha) contrast background``, ``alpha = foreground / max(foreground)``

    Which background and which crop an image gets depends on the seed and the shapes alone, so that
    data sets of different contrast differ in nothing else.

    Args:
        foreground: [n, h, w, 1] or [n, h, w, c] glyphs, bright on dark, values 0..max.
        backgrounds: [m, h', w', c] with h' >= h and w' >= w, values 0..255. Drawn with
            replacement; take them from training images for train and from test images for test.
        contrast: in [0, 1]; 0 is the glyph on black.
        seed: integer >= 0.

    Returns:
        [n, h, w, c] float32, values 0..255.

    Raises:
        InputError: shapes that do not fit, contrast outside [0, 1], negative, non-finite or
            all-black foreground, backgrounds outside 0..255 or, as floats, within 0..1, negative
            seed.

    Example:
        >>> glyph = np.array([0, 16], np.uint8).reshape(1, 1, 2, 1)
        >>> photo = np.full((1, 4, 4, 3), 100, np.uint8)
        >>> blend_over_backgrounds(glyph, photo, 0.5, seed=0)[0, 0].tolist()
        [[50.0, 50.0, 50.0], [255.0, 255.0, 255.0]]
    """
    _check_blend(foreground, backgrounds, contrast, seed)
    n, h, w, _ = foreground.shape
    m, height, width, c = backgrounds.shape
    rng = np.random.default_rng(seed)
    which = rng.integers(m, size=n)
    top, left = rng.integers(height - h + 1, size=n), rng.integers(width - w + 1, size=n)
    brightest = np.float32(foreground.max())
    out = np.empty((n, h, w, c), np.float32)
    for start in range(0, n, _ROWS):
        part = slice(start, start + _ROWS)
        rows = top[part, None] + np.arange(h)
        columns = left[part, None] + np.arange(w)
        crops = backgrounds[which[part, None, None], rows[:, :, None], columns[:, None, :]]
        alpha = foreground[part].astype(np.float32) / brightest
        faded = np.float32(contrast) * crops.astype(np.float32)
        out[part] = alpha * np.float32(_WHITE) + (np.float32(1.0) - alpha) * faded
    return out


def jitter(images: np.ndarray, relative_std: float, seed: int) -> np.ndarray:
    """Images plus Gaussian noise in proportion to their spread, which makes every pixel vary.

    ``out = x + N(0, (relative_std std(x))^2)``, std over all pixels of all images. The published
    curves of Balestriero & LeCun (2024), arXiv 2402.11337, use relative_std = 0.001, unseeded.

    Args:
        images: [n, h, w, c].
        relative_std: >= 0, in units of the global standard deviation.
        seed: integer >= 0.

    Returns:
        [n, h, w, c] float64.

    Raises:
        InputError: negative or non-finite relative_std, negative seed.

    Example:
        >>> x = np.arange(12.0).reshape(3, 2, 2, 1)
        >>> bool(np.abs(jitter(x, 0.001, seed=0) - x).max() < 0.02)
        True
    """
    _check_rank(images, "images")
    check_seed(seed)
    if not (math.isfinite(relative_std) and relative_std >= 0):
        raise InputError(f"relative_std {relative_std}: give a number >= 0")
    out = images.astype(np.float64)
    mean = out.mean()
    squares = sum(float(np.sum((part - mean) ** 2)) for part in _parts(out))
    std = relative_std * math.sqrt(squares / out.size)
    rng = np.random.default_rng(seed)
    for part in _parts(out):
        part += std * rng.standard_normal(part.shape)
    return out


def _parts(images: np.ndarray) -> list[np.ndarray]:
    """Views of consecutive images."""
    return [images[start : start + _ROWS] for start in range(0, len(images), _ROWS)]


def _check_rank(images: np.ndarray, what: str) -> None:
    """Refuse what is no [n, h, w, c] or holds nothing."""
    if images.ndim != 4 or images.size == 0:
        raise InputError(f"{what} have shape {list(images.shape)}: give [n, h, w, c], none empty")


def _check_blend(foreground: np.ndarray, backgrounds: np.ndarray, contrast: float, seed: int) -> None:
    """Refuse what cannot be blended."""
    _check_rank(foreground, "foreground images")
    _check_rank(backgrounds, "backgrounds")
    check_seed(seed)
    if not 0.0 <= contrast <= 1.0:
        raise InputError(f"contrast {contrast}: give a number from 0 to 1")
    _, h, w, channels = foreground.shape
    _, height, width, c = backgrounds.shape
    if height < h or width < w:
        raise InputError(
            f"backgrounds are {height} x {width} pixels, smaller than the {h} x {w} foreground: give larger backgrounds"
        )
    if channels not in (1, c):
        raise InputError(
            f"foreground has {channels} channels and backgrounds {c}: give a grey foreground or as many channels"
        )
    low, high = float(foreground.min()), float(foreground.max())
    if not (low >= 0.0 and 0.0 < high < math.inf):
        raise InputError(f"foreground values run from {low} to {high}: give glyphs from 0 (dark) to a positive maximum")
    low, high = float(backgrounds.min()), float(backgrounds.max())
    if not (low >= 0.0 and high <= _WHITE):
        raise InputError(f"background values run from {low} to {high}: give values 0..255")
    if backgrounds.dtype.kind == "f" and 0.0 < high <= 1.0:
        raise InputError("backgrounds lie in 0..1: multiply them by 255")
