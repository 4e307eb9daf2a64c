"""Corruptions that are known by sampling alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_align.corruption import (
    GaussianNoise,
    LinearCorruption,
    SampledCorruption,
)
from mae_align.runtime.errors import InputError
from tests.corruption.corruption_cases import CLEAN, IMAGES, SXX
from tests.oracles import SHAPE


def noisy(image: jax.Array, key: jax.Array) -> jax.Array:
    return image + 2.0 * jax.random.normal(key, image.shape, jnp.float32)


def test_a_function_without_randomness_has_its_exact_moments_and_no_error():
    found = SampledCorruption(lambda image, key: image[::-1], 3).moments(CLEAN)
    flip = LinearCorruption.from_function(lambda x: x[:, ::-1], SHAPE).moments(CLEAN)
    for name in ("gram", "cross", "offset"):
        np.testing.assert_allclose(getattr(found, name), getattr(flip, name), atol=2e-5)
    assert found.gram_se < 1e-12 and found.cross_se < 1e-12 and found.keep == 1.0


def test_the_standard_error_is_the_error():
    exact = GaussianNoise(2.0).moments(CLEAN)
    ratios = []
    for seed in range(8):
        found = SampledCorruption(noisy, 6, seed).moments(CLEAN)
        for name in ("gram", "cross"):
            error = np.linalg.norm(getattr(found, name) - getattr(exact, name)) / np.linalg.norm(getattr(exact, name))
            ratios.append(error / getattr(found, f"{name}_se"))
    assert 0.8 < np.sqrt(np.mean(np.square(ratios))) < 1.25
    few, many = (SampledCorruption(noisy, views).moments(CLEAN).gram_se for views in (10, 90))
    assert many == pytest.approx(few / 3, rel=0.15)
    assert np.isnan(SampledCorruption(noisy, 1).moments(CLEAN).gram_se)


def test_batches_and_streams_do_not_change_the_draws():
    whole = SampledCorruption(noisy, 2).moments(CLEAN)
    parts = CLEAN._replace(images=lambda: iter((IMAGES[:50], IMAGES[50:])))
    for clean, size in ((CLEAN, 50), (parts, 256)):
        again = SampledCorruption(noisy, 2, batch_size=size).moments(clean)
        for a, b in zip(whole, again, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)
    other = SampledCorruption(noisy, 2, seed=1).moments(CLEAN)
    assert np.abs(other.gram - whole.gram).max() > 0.01


def test_the_pixel_noise_floor_is_part_of_what_is_corrupted():
    floor = CLEAN._replace(sxx=SXX + 4.0 * np.eye(60), pixel_noise=4.0)
    found = SampledCorruption(lambda image, key: 2.0 * image, 60).moments(floor)
    exact = LinearCorruption(2.0 * np.eye(60)).moments(floor)
    assert np.linalg.norm(found.gram - exact.gram) < 3 * found.gram_se * np.linalg.norm(exact.gram)
    assert np.linalg.norm(found.cross - exact.cross) < 3 * found.cross_se * np.linalg.norm(exact.cross)
    assert 0 < found.gram_se < 0.1


def test_the_spread_of_the_views_means_is_part_of_the_covariance():
    """One shift for all images of a view would be missed by covariances about each view's own mean."""
    one = CLEAN._replace(images=IMAGES[:1])
    found = SampledCorruption(noisy, 400).moments(one)
    np.testing.assert_allclose(np.diag(found.gram), 4.0, rtol=0.4)
    assert np.diag(found.gram).mean() == pytest.approx(4.0, rel=0.05)
    assert np.abs(found.cross).max() < 1e-4  # one image does not vary


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda: SampledCorruption(noisy, 0), "views=0"),
        (lambda: SampledCorruption(noisy, 2, batch_size=0), "batch_size=0"),
        (lambda: SampledCorruption(noisy, 2).moments(CLEAN._replace(images=None)), "pass the training images"),
        (lambda: SampledCorruption(noisy, 2).moments(CLEAN._replace(images=IMAGES[:, 1:])), "give the same images"),
        (lambda: SampledCorruption(noisy, 2).moments(CLEAN._replace(images=IMAGES[:0])), "no images to corrupt"),
        (lambda: SampledCorruption(noisy, 2).moments(CLEAN._replace(centered=False)), "center=True"),
        (
            lambda: SampledCorruption(lambda i, k: i[1:], 2).moments(CLEAN),
            r"turns an image \[6, 5, 2\] into \[5, 5, 2\]",
        ),
        (lambda: SampledCorruption(lambda i, k: i[1:], 2).check(SHAPE), r"turns an image \[6, 5, 2\] into \[5, 5, 2\]"),
        (lambda: SampledCorruption(lambda i, k: i / 0.0, 2).moments(CLEAN), "NaN or infinite"),
    ],
)
def test_bad_sampled_corruptions_are_refused(use, message):
    with pytest.raises(InputError, match=message):
        use()
