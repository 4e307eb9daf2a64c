"""Gaussian noise: its moments and its sampler."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mae_align.corruption import (
    GaussianNoise,
)
from mae_align.runtime.errors import InputError
from tests.corruption.corruption_cases import LIMIT, about_zero, assert_within_error, spd


def test_one_sigma_stands_for_every_pixel():
    sxx, images = spd(40), jnp.arange(240, dtype=jnp.uint8).reshape(6, 4, 5, 2)
    one, each = GaussianNoise(2.5), GaussianNoise(np.full((4, 5, 2), 2.5))
    for a, b in zip(*(c.moments(about_zero(sxx, (4, 5, 2)))[:2] for c in (one, each)), strict=True):
        np.testing.assert_array_equal(a, b)
    samples = [c.sample(jax.random.key(16), images, images[0]) for c in (one, each)]
    chex.assert_trees_all_equal(*samples)
    chex.assert_type(samples, jnp.float32)


def test_noise_moments_are_those_of_the_sampler():
    shape, d, n = (3, 4, 2), 24, 20_000
    rng = np.random.default_rng(16)
    sigma = rng.uniform(0.0, 5.0, shape) * (rng.random(shape) > 0.2)
    deviation = np.broadcast_to(sigma, shape).reshape(d)
    noise = GaussianNoise(sigma)
    sxx = spd(d)
    stated = noise.moments(about_zero(sxx, shape))
    np.testing.assert_allclose(stated.gram, sxx + np.diag(deviation**2), rtol=1e-15)
    np.testing.assert_array_equal(stated.cross, sxx)
    assert stated.keep == 1.0

    images = rng.integers(0, 256, (n, *shape))
    sample = jax.jit(noise.sample)
    out = np.asarray(sample(jax.random.key(17), jnp.asarray(images, jnp.uint8), jnp.full(shape, np.nan)))
    added = (out.astype(np.float64) - images).reshape(n, d)
    assert (added.any(0) == (deviation > 0)).all()
    # Gaussian: the error of a variance is sqrt(2/n) of it, of a covariance the product of deviations / sqrt(n).
    error = np.outer(deviation, deviation) * np.sqrt(1 + np.eye(d)) / np.sqrt(n)
    assert_within_error(added.T @ added / n, np.diag(deviation**2), error)
    assert_within_error(added.mean(0), np.zeros(d), deviation / np.sqrt(n))
    x = (images.reshape(n, d) - 127.5) / 74.0
    assert np.abs((x.T @ added)[:, deviation > 0] / deviation[deviation > 0] / np.sqrt(n)).max() < 1.1 * LIMIT
    standard = added[:, deviation > 0] / deviation[deviation > 0]
    assert scipy.stats.kstest(standard[:500].ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(standard[:-1].ravel(), standard[1:].ravel())[0, 1]) < LIMIT / np.sqrt(n)


@pytest.mark.parametrize("sigma", [-1.0, np.nan, np.inf, np.array([1.0, -1e-9]), np.full((2, 2, 1), np.nan)])
def test_bad_noise_is_refused(sigma):
    with pytest.raises(InputError, match="sigma must be finite and not negative"):
        GaussianNoise(sigma)


@pytest.mark.parametrize("shape", [(2, 2), (4,), (2, 2, 3), (1, 1, 1), (1,)])
def test_noise_of_another_shape_than_the_image_is_refused(shape):
    with pytest.raises(InputError, match=r"sigma has shape .*: give a number or the image's \[2, 2, 1\]"):
        GaussianNoise(np.ones(shape)).moments(about_zero(np.eye(4), (2, 2, 1)))
