"""Image files: opened, turned upright and brought to a wanted number of channels, in full or not at all."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from mae_align.runtime.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by number of channels
# Modes of one channel; transparency counts for nothing.
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F"})
# Where cameras and viewers agree on how a picture is to be turned.
_ORIENTATION = 0x0112
_LAST_EXACT = 2**24
_opening = threading.Lock()


class Header(NamedTuple):
    """What is known of a picture before its pixels are decoded.

    Attributes:
        size: (width, height) as it is shown.
        grey: whether it has one channel, transparency aside.
        deep: whether it has more than 8 bits per pixel; only grey pictures may.
    """

    size: tuple[int, int]
    grey: bool
    deep: bool


def open_picture(file: Path | IO[bytes]) -> Image.Image:
    """Open a picture of any size, reading its header only.

    Pillow takes pictures of more than 179 megapixels for an attack; files that the user names are none.
    """
    from PIL import Image

    with _opening:
        most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = most


def is_deep(picture: Image.Image) -> bool:
    """Whether a picture's file has more than 8 bits per channel, also where Pillow would drop the lower ones.

    Example:
        >>> from PIL import Image
        >>> is_deep(Image.new("L", (2, 2))), is_deep(Image.new("F", (2, 2)))
        (False, True)
    """
    if picture.mode.startswith(("I", "F")):
        return True
    # What the decoder is told: a raw mode such as "RGB;16B", or the largest value of a PPM.
    told = [tile[3] for tile in getattr(picture, "tile", [])]
    told = [argument for one in told for argument in (one if isinstance(one, tuple) else (one,))]
    raw = any(isinstance(argument, str) and (";16" in argument or ";32" in argument) for argument in told)
    return raw or (picture.format == "PPM" and any(isinstance(a, int) and a > 255 for a in told))


def is_grey(picture: Image.Image) -> bool:
    """Whether a picture has one channel, transparency aside.

    Example:
        >>> from PIL import Image
        >>> is_grey(Image.new("LA", (2, 2))), is_grey(Image.new("P", (2, 2)))
        (True, False)
    """
    return picture.mode in _GREY_MODES or picture.mode.startswith("I;")


def upright(picture: Image.Image) -> Image.Image:
    """A picture turned as its EXIF orientation says, and so as every viewer shows it."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture) if picture.getexif().get(_ORIENTATION, 1) != 1 else picture


def with_channels(picture: Image.Image, channels: int) -> Image.Image:
    """A picture of 8 bits per channel, upright, as 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA) channels.

    Args:
        picture: Pillow image, of any mode of 8 bits per channel.
        channels: 1 to 4; transparency is dropped for 1 and 3.

    Returns:
        Pillow image; the pixels are unchanged where it has these channels already.

    Example:
        >>> from PIL import Image
        >>> with_channels(Image.new("L", (2, 2), 7), 3).getpixel((0, 0))
        (7, 7, 7)
    """
    picture = upright(picture)
    # By way of RGBA, for a palette with transparency warns when it goes to RGB directly.
    picture = picture.convert("RGBA") if picture.mode == "P" else picture
    return picture.convert(MODES[channels])


def read_header(path: Path | IO[bytes], where: str = "") -> Header:
    """Size, channels and depth of an image file.

    Args:
        path: the file, or its content.
        where: it is, for messages; the path where there is one.

    Raises:
        InputError: a file that cannot be read, or colours (or grey and alpha) of more than 8 bits per channel.
    """
    where = where or str(path)
    try:
        picture = open_picture(path)
    except Exception as error:  # a damaged file raises whatever its decoder stumbles on
        raise _unreadable(where, error) from None
    with picture:
        grey, deep = is_grey(picture), is_deep(picture)
        if deep and (not grey or picture.mode.startswith("L")):
            raise InputError(
                f"{where} has more than 8 bits in each of several channels (mode {picture.mode}): convert it to 8 bits "
                "or to grey, or load the arrays as npz:FILE"
            )
        width, height = picture.size
        # Of a PNG whose EXIF data come after the pixels, Pillow would decode all of it.
        known = picture.format != "PNG" or "exif" in picture.info
        turned = known and picture.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        if turned and picture.format == "TIFF":  # Pillow 11 to 13 mixes up their rows
            raise InputError(f"{where} is a TIFF on its side (orientation tag 5 to 8): save it upright")
        return Header((height, width) if turned else (width, height), grey, deep)


def read_picture(path: Path | IO[bytes], channels: int, where: str = "") -> Image.Image:
    """The pixels of an image file, upright.

    Args:
        path: the file, whose header was read before, or its content.
        channels: 1 or 3.
        where: it is, for messages; the path where there is one.

    Returns:
        Pillow image of mode L or RGB; of mode F, in the units of the file, where it has more than 8 bits.

    Raises:
        InputError: a file that cannot be decoded, or whole numbers over 2^24, which float32 does not hold.
    """
    from PIL import Image

    try:
        with open_picture(path) as picture:
            if not is_deep(picture):
                return with_channels(picture, channels)
            pixels = np.asarray(upright(picture))
    except Exception as error:
        raise _unreadable(where or str(path), error) from None
    if pixels.dtype.kind in "iu" and pixels.size and int(pixels.max()) > _LAST_EXACT:
        raise InputError(f"{where or path} has values up to {pixels.max()}: load the arrays as npz:FILE, in float64")
    return Image.fromarray(pixels.astype(np.float32))


def _unreadable(path: str, error: Exception) -> InputError:
    """The error for an image that cannot be decoded."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"cannot read the image {path} ({reason}): replace or remove the file")
