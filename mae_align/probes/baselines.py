"""What every probe is to be read beside: the same probe on features that needed no training."""

from __future__ import annotations

import numpy as np

from mae_align.moments.moments import Moments
from mae_align.moments.principal import varying_components
from mae_align.runtime.checks import check_images
from mae_align.runtime.errors import InputError

# Images encoded at a time.
_ROWS = 4096


def raw_pixels(images: np.ndarray) -> np.ndarray:
    """Images as features: flattened, as stored.

    Args:
        images: [n, h, w, c] uint8 or floating.

    Returns:
        [n, h w c], of the same type (8-bit pixels have exact moments).

    Raises:
        InputError: no images.

    Example:
        >>> raw_pixels(np.zeros((2, 3, 4, 1), np.uint8)).shape
        (2, 12)
    """
    images = check_images(images)
    return images.reshape(len(images), -1)


def principal_components(moments: Moments, images: np.ndarray, count: int) -> np.ndarray:
    """Images by their coordinates along the principal components of largest variance: E_k^T (x - mean).

    Args:
        moments: of the training images: mean and components come from them.
        images: [n, h, w, c].
        count: k, at most the number of pixel values; components without variance are features of 0.

    Returns:
        [n, k] float32, pixel units. Cost: one eigh of size d and n d k multiply-adds.

    Raises:
        InputError: images of another size, or a bad count.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> principal_components(Moments.from_arrays(x), x, 3).shape
        (50, 3)
    """
    images = check_images(images)
    if images.shape[1:] != moments.image_shape:
        raise InputError(
            f"images {list(images.shape[1:])}, moments of {list(moments.image_shape)}: give those of these"
        )
    if not isinstance(count, int | np.integer) or not 1 <= count <= moments.num_pixels:
        raise InputError(
            f"count={count}: give a whole number from 1 to {moments.num_pixels}, the number of pixel values"
        )
    vectors = varying_components(moments).vectors[:, :count]
    found = np.zeros((len(images), count), np.float32)
    for start in range(0, len(images), _ROWS):
        part = images[start : start + _ROWS].reshape(-1, moments.num_pixels)
        found[start : start + _ROWS, : vectors.shape[1]] = (part - moments.mean_x) @ vectors
    return found
