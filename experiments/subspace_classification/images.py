"""How images are scaled before they are projected, and projections before networks see them."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from experiments.harness.data import Split

# Images that are held in float64 at a time.
_ROWS = 2000


class Preparation(enum.Enum):
    """What images are divided by before anything else."""

    contrast = "contrast"
    whole_set = "whole_set"


class Scale(enum.Enum):
    """What projected images are divided by."""

    per_image = "per_image"
    whole_set = "whole_set"
    raw = "raw"


def prepared(data: Split, preparation: Preparation) -> Split:
    """The images that are used, float32, of standard deviation near 1.

    Args:
        data: the images as they were read.
        preparation: contrast divides each by its own standard deviation, whole_set all by that of the training images.
    """
    parts = {name: getattr(data, name) for name in ("train_images", "validation_images", "test_images")}
    if preparation is Preparation.contrast:
        made = {name: contrast_normalized(images) for name, images in parts.items()}
    else:
        spread = np.float32(data.train_images.std(dtype=np.float64))
        made = {name: images.astype(np.float32) / spread for name, images in parts.items()}
    return dataclasses.replace(data, **made)


def scaled(train: np.ndarray, test: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Projected images as networks are given them; every statistic over images is one of the training images.

    per_image divides each image by the standard deviation of its values and then subtracts the mean training image,
    as published; whole_set divides all by one number, raw by none.

    Args:
        train: [n, h, w, c] projections of centred images.
        test: [m, h, w, c] likewise.
        scale: what they are divided by.

    Returns:
        The same shapes, float32.
    """
    if scale is Scale.raw:
        return train, test
    if scale is Scale.whole_set:
        root = np.sqrt(np.mean(np.square(train), dtype=np.float64))
        return train / np.float32(root), test / np.float32(root)
    train, test = contrast_normalized(train), contrast_normalized(test)
    mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
    return train - mean, test - mean


def contrast_normalized(images: np.ndarray) -> np.ndarray:
    """Each image divided by the standard deviation of its own values; a constant one stays as it is.

    Args:
        images: [n, h, w, c].

    Returns:
        The same shape, float32.

    Example:
        >>> contrast_normalized(np.array([1.0, 3.0, 1.0, 3.0]).reshape(1, 2, 2, 1)).ravel().tolist()
        [1.0, 3.0, 1.0, 3.0]
    """
    found = np.empty(images.shape, np.float32)
    for start in range(0, len(images), _ROWS):
        part = images[start : start + _ROWS].astype(np.float64)
        spread = part.std(axis=(1, 2, 3), keepdims=True)
        # What rounding leaves of a constant image is no contrast.
        varies = spread > 1e-12 * np.abs(part).max(axis=(1, 2, 3), keepdims=True)
        found[start : start + _ROWS] = part / np.where(varies, spread, 1.0)
    return found
