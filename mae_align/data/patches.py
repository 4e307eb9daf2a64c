"""Patch geometry: which pixel belongs to which patch.

Where the patch does not divide the side, the border patches are smaller patches of their own.
"""

from __future__ import annotations

import math

import numpy as np

from mae_align.runtime.errors import InputError

PatchSize = int | tuple[int, int]
ImageShape = tuple[int, int, int]


def patch_hw(patch_size: PatchSize) -> tuple[int, int]:
    """Patch height and width in pixels.

    Raises:
        InputError: not a positive integer or a pair of them.

    Example:
        >>> patch_hw(4), patch_hw((2, 3))
        ((4, 4), (2, 3))
    """
    if isinstance(patch_size, int | np.integer):
        patch_size = (int(patch_size), int(patch_size))
    pair = tuple(patch_size) if isinstance(patch_size, tuple | list) else ()
    if len(pair) != 2 or any(not isinstance(v, int | np.integer) or v < 1 for v in pair):
        raise InputError(f"patch size {patch_size!r}: give a positive integer or a pair (height, width)")
    return int(pair[0]), int(pair[1])


def patch_grid(image_shape: ImageShape, patch_size: PatchSize) -> tuple[int, int]:
    """Number of patches down and across; border patches count where the patch does not divide the side.

    Raises:
        InputError: the patch is larger than the image.

    Example:
        >>> patch_grid((8, 10, 1), 4)
        (2, 3)
    """
    (height, width), (ph, pw) = image_shape[:2], patch_hw(patch_size)
    if ph > height or pw > width:
        raise InputError(f"patch {ph}x{pw} is larger than the image {height}x{width}: choose a smaller patch")
    return -(-height // ph), -(-width // pw)


def patch_labels(image_shape: ImageShape, patch_size: PatchSize) -> np.ndarray:
    """Index of the patch that each pixel value belongs to, in (h, w, c) order.

    Args:
        image_shape: (h, w, c).
        patch_size: int or (h, w) in pixels.

    Returns:
        [h w c] int64 in [0, number of patches).

    Example:
        >>> patch_labels((2, 3, 1), 2).tolist()
        [0, 0, 1, 0, 0, 1]
    """
    (height, width, channels), (ph, pw) = image_shape, patch_hw(patch_size)
    _, across = patch_grid(image_shape, patch_size)
    label = (np.arange(height)[:, None] // ph) * across + np.arange(width)[None, :] // pw
    return np.repeat(label.reshape(-1), channels)


def check_ratio(ratio: float) -> None:
    """Refuse a mask ratio outside [0, 1].

    Raises:
        InputError: NaN or outside [0, 1].
    """
    if not (math.isfinite(ratio) and 0.0 <= ratio <= 1.0):
        raise InputError(f"mask ratio {ratio}: give a number from 0 to 1")
