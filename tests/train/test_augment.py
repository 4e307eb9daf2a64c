from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_align.runtime.errors import InputError
from mae_align.train.augment import Augmentation, random_crops

KEY = jax.random.key(0)


def test_nothing_is_done_by_default():
    images = jnp.ones((2, 3, 4, 1))
    assert Augmentation()(KEY, images) is images


def test_crops_are_windows_of_the_stated_area_and_aspect():
    """On an image of coordinates a crop is affine: its slopes are the sides of the window, its values the place."""
    size, count, smallest = 32, 200, 0.25
    ramp = jnp.arange(size, dtype=jnp.float32)
    one = jnp.stack(jnp.meshgrid(ramp, ramp, indexing="ij"), axis=-1)
    found = np.asarray(jax.jit(lambda key: random_crops(key, jnp.stack([one] * count), smallest))(KEY))
    rows, columns = found[:, :, size // 2, 0], found[:, size // 2, :, 1]
    # Away from the border, where there is nothing to interpolate with.
    inside = slice(4, -4)
    slopes = []
    for values in (rows, columns):
        steps = np.diff(values[:, inside], axis=1)
        np.testing.assert_allclose(steps, np.broadcast_to(steps[:, :1], steps.shape), atol=1e-3)
        slopes.append(steps.mean(1))
        assert values.min() > -1e-3 and values.max() < size - 1 + 1e-3
    area, aspect = slopes[0] * slopes[1], slopes[0] / slopes[1]
    # A side that would leave the image is cut off, which only makes the window smaller.
    assert area.min() > smallest * 0.86 and area.max() < 1 + 1e-3
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert area.std() > 0.1 and aspect.std() > 0.1
    first = rows[:, size // 2] - slopes[0] * (size // 2 + 0.5) + 0.5
    assert first.std() > 1.0 and first.min() > -1e-2  # crops lie at different places, inside the image
    # Other images in the batch change nothing.
    assert not np.allclose(found[0], found[1])


def test_images_are_mirrored_and_greyed_with_the_stated_probabilities():
    images = jax.random.uniform(KEY, (400, 2, 3, 3))
    found = np.asarray(jax.jit(Augmentation(flip=0.5, grey=0.2))(jax.random.key(1), images))
    plain = np.asarray(images)
    luma = plain @ np.array([0.299, 0.587, 0.114])
    grey = np.repeat(luma[..., None], 3, axis=-1)
    kinds = [plain, plain[:, :, ::-1], grey, grey[:, :, ::-1]]
    which = np.array([np.abs(found - kind).max(axis=(1, 2, 3)) < 1e-5 for kind in kinds])
    assert (which.sum(0) == 1).all()
    shares = which.mean(1)
    np.testing.assert_allclose(shares, [0.4, 0.4, 0.1, 0.1], atol=0.1)


def test_settings_out_of_range_are_refused():
    for bad in ({"smallest_crop": 0.0}, {"smallest_crop": 1.5}, {"flip": -0.1}, {"grey": 2.0}):
        with pytest.raises(InputError, match="give a"):
            Augmentation(**bad)
    with pytest.raises(InputError, match="channels"):
        Augmentation(grey=0.5)(KEY, jnp.ones((1, 2, 2, 1)))
