"""Resizing to squares with Pillow's antialiased bicubic filter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mae_align.data.dataset import ImageDataset
from mae_align.runtime.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


def resize_picture(picture: Image.Image, image_size: int) -> Image.Image:
    """The centre square of a picture, resized to ``image_size`` x ``image_size``.

    Proportions are kept: of the longer side, the ends are cut. The bicubic filter widens with the
    reduction, so that shrinking does not alias.

    Args:
        picture: Pillow image of mode L, RGB or F.
        image_size: side in pixels.

    Returns:
        Pillow image of the same mode.

    Example:
        >>> from PIL import Image
        >>> resize_picture(Image.new("L", (6, 4)), 2).size
        (2, 2)
    """
    from PIL import Image

    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return picture.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)


def resize_images(images: np.ndarray, image_size: int) -> np.ndarray:
    """Images resized with :func:`resize_picture`, channel by channel.

    Args:
        images: [n, h, w, c] uint8 or floats. Floats are resized in float32; the filter may
            overshoot their range by a little, uint8 is clipped and rounded.
        image_size: side in pixels.

    Returns:
        [n, image_size, image_size, c] of the same dtype.

    Raises:
        InputError: size below 1.

    Example:
        >>> resize_images(np.full((1, 6, 4, 3), 9, np.uint8), 2)[0, :, :, 0].tolist()
        [[9, 9], [9, 9]]
    """
    from PIL import Image

    check_image_size(image_size)
    pixels = np.uint8 if images.dtype == np.uint8 else np.float32
    n, _, _, c = images.shape
    out = np.empty((n, image_size, image_size, c), images.dtype)
    for i in range(n):
        for channel in range(c):
            plane = np.ascontiguousarray(images[i, :, :, channel], dtype=pixels)
            out[i, :, :, channel] = resize_picture(Image.fromarray(plane), image_size)
    return out


def resize_dataset(dataset: ImageDataset, image_size: int) -> ImageDataset:
    """The data set with all parts resized by :func:`resize_images`, if they have another size.

    Args:
        dataset: images [n, h, w, c].
        image_size: side in pixels.

    Returns:
        The data set with images [n, image_size, image_size, c].

    Raises:
        InputError: size below 1.

    Example:
        >>> x, y = np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1])
        >>> resize_dataset(ImageDataset(x, y, x, y, ("a", "b"), "toy"), 4).image_shape
        (4, 4, 1)
    """
    check_image_size(image_size)
    if dataset.image_shape[:2] == (image_size, image_size):
        return dataset
    return dataset.map_parts(lambda images, labels: (resize_images(images, image_size), labels))


def check_image_size(image_size: int) -> None:
    """Refuse a side below one pixel.

    Raises:
        InputError: size below 1.
    """
    if image_size < 1:
        raise InputError(f"image_size {image_size}: give a side of at least 1 pixel")
