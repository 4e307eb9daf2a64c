"""From an image file's picture to pixels of a wanted number of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by number of channels
_DEEP_MODES = ("I", "F")  # 16- and 32-bit pixels; Pillow would clip them at 255


def is_deep(picture: Image.Image) -> bool:
    """Whether a picture has more than 8 bits per channel.

    Example:
        >>> from PIL import Image
        >>> is_deep(Image.new("L", (2, 2))), is_deep(Image.new("F", (2, 2)))
        (False, True)
    """
    return picture.mode.startswith(_DEEP_MODES)


def with_channels(picture: Image.Image, channels: int) -> Image.Image:
    """A picture of 8 bits per channel, converted to 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA) channels.

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
    # By way of RGBA, for a palette with transparency warns when it goes to RGB directly.
    picture = picture.convert("RGBA") if picture.mode == "P" else picture
    return picture.convert(MODES[channels])
