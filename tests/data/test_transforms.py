from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_align.data import (
    ImageDataset,
    average_pool,
    blend_over_backgrounds,
    jitter,
    select_classes,
    transforms,
)
from mae_align.runtime.errors import InputError


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Several steps even for small arrays, the last one partial."""
    monkeypatch.setattr(transforms, "_ROWS", 3)


def uint8(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("factor", [1, 2, 3, 6])
def test_average_pool_of_bytes_is_the_exact_mean(factor):
    images = uint8((7, 12, 6, 2))
    out = average_pool(images, factor)
    assert out.dtype == np.float32 and out.shape == (7, 12 // factor, 6 // factor, 2)
    for n, i, j, c in np.ndindex(*out.shape):
        rows, columns = (slice(k * factor, (k + 1) * factor) for k in (i, j))
        total = sum(int(value) for value in images[n, rows, columns, c].ravel())
        assert out[n, i, j, c] == np.float32(float(Fraction(total, factor**2)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_average_pool_of_floats_keeps_the_dtype(dtype):
    images = np.random.default_rng(0).normal(size=(4, 6, 4, 3)).astype(dtype)
    out = average_pool(images, 2)
    expected = images.astype(np.float64).reshape(4, 3, 2, 2, 2, 3).mean((2, 4))
    assert out.dtype == dtype
    np.testing.assert_allclose(out, expected, rtol=2 * np.finfo(dtype).eps, atol=1e-15)


def labelled() -> ImageDataset:
    """Every pixel is 10 times the label, so that images and labels can be followed."""
    train, test = np.array([0, 1, 2, 3, 2, 1, 0]), np.array([3, 2, 1, 0])
    images = [np.full((1, 2, 2, 1), 10, np.uint8) * y[:, None, None, None] for y in (train, test)]
    return ImageDataset(images[0].astype(np.uint8), train, images[1].astype(np.uint8), test, tuple("abcd"), "toy")


def test_select_classes_follows_the_given_order():
    part = select_classes(labelled(), [3, 1])
    assert part.class_names == ("d", "b") and part.num_classes == 2 and part.name == "toy"
    assert part.train_labels.tolist() == [1, 0, 1] and part.test_labels.tolist() == [0, 1]
    values = np.array([30, 10])
    np.testing.assert_array_equal(part.train_images[:, 0, 0, 0], values[part.train_labels])
    np.testing.assert_array_equal(part.test_images[:, 1, 1, 0], values[part.test_labels])


def blend_one(glyph: np.ndarray, crop: np.ndarray, contrast: float, top: float) -> np.ndarray:
    alpha = glyph.astype(np.float64) / top
    return alpha * 255 + (1 - alpha) * contrast * crop


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("contrast", [0.0, 0.35, 1.0])
def test_blend_is_the_formula_over_some_crop(channels, contrast):
    glyphs = np.random.default_rng(1).integers(0, 17, (8, 4, 3, channels)).astype(np.uint8)
    glyphs[0, 0, 0] = 16
    photos = uint8((5, 6, 7, 3), seed=2)
    out = blend_over_backgrounds(glyphs, photos, contrast, seed=3)
    assert out.dtype == np.float32 and out.shape == (8, 4, 3, 3)
    for glyph, image in zip(glyphs, out, strict=True):
        crops = [photo[i : i + 4, j : j + 3] for photo in photos for i in range(3) for j in range(5)]
        distances = [np.abs(blend_one(glyph, crop, contrast, 16) - image).max() for crop in crops]
        assert min(distances) < 1e-4
        # With a visible background the crop is identified: no other one fits.
        assert contrast == 0 or np.sort(distances)[1] > 1


def test_blend_uses_all_backgrounds_and_places():
    # A background tells which one it is and where: value = 16 photo + 4 row + column.
    photos = (16 * np.arange(8)[:, None, None] + 4 * np.arange(4)[:, None] + np.arange(4)).astype(np.uint8)[..., None]
    glyphs = np.zeros((3000, 2, 2, 1))
    glyphs[:, 1, 1] = 1.0
    out = blend_over_backgrounds(glyphs, photos, 1.0, seed=0)
    corner, counts = np.unique(out[:, 0, 0, 0], return_counts=True)
    places = {16 * k + 4 * i + j for k in range(8) for i in range(3) for j in range(3)}
    assert set(corner.tolist()) == places
    assert counts.min() > 15 and counts.max() < 80  # 41.7 expected
    np.testing.assert_allclose(out[:, 0, 1, 0] - out[:, 0, 0, 0], 1)
    np.testing.assert_allclose(out[:, 1, 0, 0] - out[:, 0, 0, 0], 4)
    assert (out[:, 1, 1] == 255).all()


@settings(deadline=None)
@given(st.integers(0, 2**40), st.floats(0, 1))
def test_blend_is_linear_in_the_contrast(seed, contrast):
    glyphs, photos = uint8((4, 3, 3, 1)), uint8((6, 5, 5, 3), seed=1)
    dark, part, full = (blend_over_backgrounds(glyphs, photos, value, seed) for value in (0.0, contrast, 1.0))
    np.testing.assert_allclose(part, (1 - contrast) * dark + contrast * full, atol=1e-3)
    white = np.repeat(glyphs / glyphs.max() * 255, 3, axis=3)
    np.testing.assert_allclose(dark, white, rtol=1e-6)
    again = blend_over_backgrounds(glyphs, photos, contrast, seed)
    np.testing.assert_array_equal(part, again)


def test_blend_in_other_steps_is_the_same(monkeypatch):
    glyphs, photos = uint8((7, 3, 3, 1)), uint8((6, 5, 5, 3), seed=1)
    steps = blend_over_backgrounds(glyphs, photos, 0.5, seed=2)
    monkeypatch.setattr(transforms, "_ROWS", 100)
    np.testing.assert_array_equal(steps, blend_over_backgrounds(glyphs, photos, 0.5, seed=2))
    assert not np.array_equal(steps, blend_over_backgrounds(glyphs, photos, 0.5, seed=4))


def test_jitter_is_relative_gaussian_noise():
    images = uint8((50, 16, 16, 3))
    out = jitter(images, 0.01, seed=5)
    assert out.dtype == np.float64
    noise = out - images
    scale = 0.01 * images.astype(np.float64).std()
    expected = np.random.default_rng(5).standard_normal(images.shape) * scale
    np.testing.assert_allclose(noise, expected, atol=1e-12)
    np.testing.assert_array_equal(out, jitter(images, 0.01, seed=5))
    assert not np.array_equal(out, jitter(images, 0.01, seed=6))
    np.testing.assert_array_equal(jitter(images, 0.0, seed=5), images)


def test_jitter_leaves_its_input_alone():
    images = np.random.default_rng(0).normal(size=(4, 3, 3, 1))
    before = images.copy()
    jitter(images, 0.1, seed=0)
    np.testing.assert_array_equal(images, before)


def blended(**changes: Any) -> np.ndarray:
    given: dict[str, Any] = {"foreground": uint8((2, 4, 4, 1)), "backgrounds": uint8((2, 4, 4, 3))}
    return blend_over_backgrounds(**({"contrast": 0.5, "seed": 0} | given | changes))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: average_pool(np.zeros((2, 6, 4, 1), np.uint8), 3), "factor 3 does not divide 6 x 4"),
        (lambda: average_pool(np.zeros((2, 6, 4, 1), np.uint8), 0), "factor 0 does not divide"),
        (lambda: average_pool(np.zeros((2, 6, 4, 1), np.int32), 2), "dtype int32: give uint8"),
        (lambda: average_pool(np.zeros((6, 4), np.uint8), 2), r"shape \[6, 4\]: give \[n, h, w, c\]"),
        (lambda: select_classes(labelled(), [2]), r"classes \[2\]: a task needs at least two"),
        (lambda: select_classes(labelled(), [1, 1]), r"classes \[1, 1\] repeat"),
        (lambda: select_classes(labelled(), [0, 4, -1]), r"\[4, -1\] do not exist in 'toy': choose from 0\.\.3"),
        (lambda: blended(contrast=1.2), "contrast 1.2: give a number from 0 to 1"),
        (lambda: blended(contrast=float("nan")), "contrast nan"),
        (lambda: blended(seed=-2), "seed -2 is negative"),
        (lambda: blended(backgrounds=uint8((2, 3, 8, 3))), "backgrounds are 3 x 8 pixels, smaller than the 4"),
        (lambda: blended(backgrounds=uint8((4, 4, 3))), r"backgrounds have shape \[4, 4, 3\]"),
        (lambda: blended(foreground=uint8((2, 4, 4, 2))), "foreground has 2 channels and backgrounds 3"),
        (lambda: blended(foreground=np.zeros((2, 4, 4, 1))), "from 0.0 to 0.0: give glyphs"),
        (lambda: blended(foreground=np.full((2, 4, 4, 1), -1.0)), "from -1.0 to -1.0: give glyphs"),
        (lambda: blended(foreground=np.full((2, 4, 4, 1), np.nan)), "from nan to nan: give glyphs"),
        (lambda: blended(foreground=np.zeros((0, 4, 4, 1))), r"foreground images have shape \[0, 4, 4, 1\]"),
        (lambda: blended(backgrounds=np.full((2, 4, 4, 3), 256.0)), "from 256.0 to 256.0: give values 0..255"),
        (lambda: blended(backgrounds=np.full((2, 4, 4, 3), 0.5)), r"lie in 0\.\.1: multiply them by 255"),
        (lambda: jitter(uint8((2, 3, 3, 1)), -0.1, 0), "relative_std -0.1: give a number >= 0"),
        (lambda: jitter(uint8((2, 3, 3, 1)), float("inf"), 0), "relative_std inf"),
        (lambda: jitter(uint8((2, 3, 3, 1)), 0.1, -1), "seed -1 is negative"),
    ],
)
def test_what_cannot_be_done_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
