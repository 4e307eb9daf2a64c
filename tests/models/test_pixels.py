from __future__ import annotations

import jax
import numpy as np
import pytest
from model_zoo import draw

from mae_align.models import Pixels
from mae_align.moments.moments import Moments
from mae_align.runtime.errors import InputError


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_mean_and_scale_are_those_of_the_definition(dtype):
    """More images than one chunk of the sums; offset far from 0 for floats."""
    images = draw(2500, shape=(2, 3, 1)).astype(dtype)
    if dtype != np.uint8:
        images = images + dtype(1000)
    x = images.astype(np.float64)
    pixels = Pixels.from_images(images)
    np.testing.assert_allclose(pixels.mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(pixels.scale, np.sqrt(x.var(0).mean()), rtol=1e-6)
    assert (pixels.mean.dtype, pixels.scale.dtype, pixels.image_shape) == (np.float32, np.float32, (2, 3, 1))


def test_moments_and_images_give_the_same_pixels():
    images = draw(50)
    a, b = Pixels.from_images(images), Pixels.of(Moments.from_arrays(images))
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-6)
    np.testing.assert_allclose(a.scale, b.scale, rtol=1e-6)


def test_predicting_the_mean_image_costs_one_per_pixel():
    images = draw(50)
    normal = Pixels.from_images(images).normalize(images)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(np.square(normal).mean(), 1.0, rtol=1e-5)


def test_constant_pixels_are_normal_input():
    images = draw(50)
    images[:, 0] = 7
    normal = Pixels.from_images(images).normalize(images)
    assert np.all(np.asarray(normal)[:, 0] == 0.0)


def test_restore_undoes_normalize_inside_a_compiled_function():
    """As an argument of jit: pixels are a pytree."""
    images = draw(5)
    back = jax.jit(lambda pixels, images: pixels.restore(pixels.normalize(images)))(Pixels.from_images(images), images)
    np.testing.assert_allclose(back, images, rtol=1e-5, atol=1e-3)


def test_images_without_variance_and_moments_about_zero_are_refused():
    images = np.full((3, 2, 2, 1), 5, np.uint8)
    with pytest.raises(InputError, match="all images are the same"):
        Pixels.from_images(images)
    with pytest.raises(InputError, match="all images are the same"):
        Pixels.of(Moments.from_arrays(images))
    with pytest.raises(InputError, match="center=True"):
        Pixels.of(Moments.from_arrays(draw(5), center=False))
    with pytest.raises(InputError, match="NaN"):
        Pixels.from_images(np.full((3, 2, 2, 1), np.nan))
