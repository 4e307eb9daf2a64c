from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mae_align.data.pictures import MODES, is_deep, with_channels


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_of_the_wanted_channels_keep_their_pixels(channels):
    shape = (4, 5) if channels == 1 else (4, 5, channels)
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    picture = with_channels(Image.fromarray(array), channels)
    assert picture.mode == MODES[channels]
    np.testing.assert_array_equal(np.asarray(picture), array)


def test_palettes_with_transparency_become_their_colours():
    picture = Image.new("P", (3, 2), 1)
    picture.putpalette([9, 9, 9, 10, 20, 30])
    picture.info["transparency"] = b"\x00\xff"
    assert (np.asarray(with_channels(picture, 3)) == [10, 20, 30]).all()
    assert np.asarray(with_channels(Image.new("CMYK", (3, 2)), 3)).shape == (2, 3, 3)


@pytest.mark.parametrize("mode, deep", [("L", False), ("RGB", False), ("I;16", True), ("I", True), ("F", True)])
def test_deep(mode, deep):
    assert is_deep(Image.new(mode, (2, 2))) is deep
