"""Resizing with Pillow's antialiased bicubic filter: the largest part of the middle that has the new shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mae_align.data.dataset import ImageDataset
from mae_align.runtime.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

ImageSize = int | tuple[int, int]
"""Side of a square, or height and width, in pixels."""


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """A size as height and width in pixels.

    Raises:
        InputError: a side below one pixel.

    Example:
        >>> height_and_width(4), height_and_width((2, 3))
        ((4, 4), (2, 3))
    """
    sides = np.ravel(np.array([image_size, image_size] if np.ndim(image_size) == 0 else image_size))
    if len(sides) != 2 or sides.dtype.kind not in "iu" or sides.min() < 1:
        raise InputError(f"image_size {image_size}: give one side or (height, width), in whole pixels, at least 1")
    return int(sides[0]), int(sides[1])


def resize_picture(picture: Image.Image, image_size: ImageSize) -> Image.Image:
    """The middle of a picture, resized.

    Proportions are kept: of the side that is too long, the ends are cut. The bicubic filter widens with the
    reduction, so that shrinking does not alias.

    Args:
        picture: Pillow image of mode L, RGB or F.
        image_size: side of a square, or (height, width), in pixels.

    Returns:
        Pillow image of the same mode.

    Example:
        >>> from PIL import Image
        >>> resize_picture(Image.new("L", (6, 4)), 2).size, resize_picture(Image.new("L", (6, 4)), (2, 4)).size
        ((2, 2), (4, 2))
    """
    from PIL import Image

    height, width = height_and_width(image_size)
    # The largest box of the new proportions; of a square, its side is a whole number.
    box_width = min(picture.width, picture.height * width / height)
    box_height = min(picture.height, picture.width * height / width)
    left, top = (picture.width - box_width) / 2, (picture.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return picture.resize((width, height), Image.Resampling.BICUBIC, box=box)


def resize_images(images: np.ndarray, image_size: ImageSize) -> np.ndarray:
    """Images resized with :func:`resize_picture`, channel by channel.

    Args:
        images: [n, h, w, c] uint8 or floats. Floats are resized in float32; the filter may
            overshoot their range by a little, uint8 is clipped and rounded.
        image_size: side of a square, or (height, width), in pixels.

    Returns:
        [n, height, width, c] of the same dtype.

    Raises:
        InputError: size below 1.

    Example:
        >>> resize_images(np.full((1, 6, 4, 3), 9, np.uint8), 2)[0, :, :, 0].tolist()
        [[9, 9], [9, 9]]
    """
    from PIL import Image

    size = height_and_width(image_size)
    pixels = np.uint8 if images.dtype == np.uint8 else np.float32
    n, _, _, c = images.shape
    out = np.empty((n, *size, c), images.dtype)
    for i in range(n):
        for channel in range(c):
            plane = np.ascontiguousarray(images[i, :, :, channel], dtype=pixels)
            out[i, :, :, channel] = resize_picture(Image.fromarray(plane), size)
    return out


def resize_dataset(dataset: ImageDataset, image_size: ImageSize) -> ImageDataset:
    """The data set with all parts resized by :func:`resize_images`, if they have another size.

    Args:
        dataset: images [n, h, w, c].
        image_size: side of a square, or (height, width), in pixels.

    Returns:
        The data set with images [n, height, width, c].

    Raises:
        InputError: size below 1.

    Example:
        >>> x, y = np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1])
        >>> resize_dataset(ImageDataset(x, y, x, y, ("a", "b"), "toy"), 4).image_shape
        (4, 4, 1)
    """
    if dataset.image_shape[:2] == height_and_width(image_size):
        return dataset
    return dataset.map_parts(lambda images, labels: (resize_images(images, image_size), labels))
