from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mae_align.data.pictures import MODES, Header, is_deep, read_header, read_picture, with_channels
from mae_align.runtime.errors import InputError


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


def png16(array: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, written by hand: Pillow writes none in colour."""
    h, w, c = array.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_read_in_full_or_refused(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 65536, (5, 4, channels))
    path = tmp_path / "deep.png"
    path.write_bytes(png16(values))
    if channels == 1:
        assert read_header(path) == Header((4, 5), grey=True, deep=True)
        np.testing.assert_array_equal(np.asarray(read_picture(path, 1)), values[..., 0])
    else:
        with pytest.raises(InputError, match=r"deep.png has more than 8 bits in each of several channels .*npz:FILE"):
            read_header(path)


@pytest.mark.parametrize("suffix", ["ppm", "pgm"])
def test_deep_portable_pixmaps_are_known_by_their_largest_value(tmp_path, suffix):
    channels = 3 if suffix == "ppm" else 1
    values = np.random.default_rng(0).integers(0, 4096, (5, 4, channels))
    path = tmp_path / f"deep.{suffix}"
    path.write_bytes(f"P{6 if channels == 3 else 5}\n4 5\n4095\n".encode() + values.astype(">u2").tobytes())
    if channels == 3:
        with pytest.raises(InputError, match="more than 8 bits in each of several channels"):
            read_header(path)
    else:
        assert read_header(path).deep
    path.write_bytes(f"P{6 if channels == 3 else 5}\n4 5\n255\n".encode() + (values % 256).astype(np.uint8).tobytes())
    assert read_header(path) == Header((4, 5), grey=channels == 1, deep=False)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_viewers_show_them(tmp_path, suffix, orientation):
    """Against Pillow's own transposition of the stored pixels."""
    stored = Image.fromarray((np.arange(48 * 32) % 251).reshape(48, 32).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    if suffix == "webp":
        stored.save(path, exif=exif, lossless=True)
    else:
        stored.save(path, exif=exif)
    with Image.open(path) as opened:
        shown = np.asarray(ImageOps.exif_transpose(opened).convert("L"))
    assert shown.shape == ((48, 32) if orientation < 5 else (32, 48))
    assert read_header(path).size == shown.shape[::-1]
    np.testing.assert_array_equal(np.asarray(read_picture(path, 1)), shown)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_or_refused(tmp_path, orientation):
    stored = (np.arange(48 * 32) % 251).reshape(48, 32).astype(np.uint8)
    path = tmp_path / "photo.tif"
    Image.fromarray(stored).save(path, tiffinfo={0x0112: orientation})
    if orientation > 4:
        with pytest.raises(InputError, match=r"photo.tif is a TIFF on its side .*: save it upright"):
            read_header(path)
        return
    shown = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}[orientation]
    assert read_header(path).size == (32, 48)
    np.testing.assert_array_equal(np.asarray(read_picture(path, 1)), shown)


def test_grey_with_alpha_is_grey(tmp_path):
    Image.merge("LA", [Image.new("L", (3, 2), 70), Image.new("L", (3, 2), 0)]).save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png").grey
    assert (np.asarray(read_picture(tmp_path / "a.png", 1)) == 70).all()


def test_a_picture_of_any_size_is_opened_and_pillows_limit_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (40, 40), 9).save(tmp_path / "large.png")  # 16 times over the limit, which Pillow refuses at twice
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "large.png")
    assert read_header(tmp_path / "large.png").size == (40, 40)
    assert np.asarray(read_picture(tmp_path / "large.png", 1)).shape == (40, 40)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_numbers_that_float32_does_not_hold_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 2**24 + 1, np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(
        InputError, match=r"deep.tif has values up to 16777217: load the arrays as npz:FILE, in float64"
    ):
        read_picture(tmp_path / "deep.tif", 1)
