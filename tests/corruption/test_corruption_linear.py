"""Blur, pooling, any matrix, and corruptions one after another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.ndimage

from mae_align.corruption import (
    AveragePool,
    Compose,
    Corruption,
    CorruptionMoments,
    GaussianBlur,
    LinearCorruption,
    PatchMasking,
)
from mae_align.runtime.errors import InputError
from tests.corruption.corruption_cases import CLEAN, IMAGES, MEAN, SXX
from tests.oracles import SHAPE


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_blur_is_a_gaussian_filter_normalised_inside_the_image(sigma):
    def filtered(a: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(a, (0, sigma, sigma, 0), mode="constant", truncate=60)

    # The kernel of scipy is normalised over all offsets, which the division undoes.
    np.testing.assert_allclose(GaussianBlur(sigma).apply(IMAGES), filtered(IMAGES) / filtered(np.ones_like(IMAGES)))


def test_pooling_averages_cells_that_the_border_cuts_off():
    out = AveragePool((4, 2)).apply(IMAGES)
    for top, left in itertools.product((0, 4), (0, 2, 4)):
        cell = np.s_[:, top : top + 4, left : left + 2]
        np.testing.assert_allclose(
            out[cell], np.broadcast_to(IMAGES[cell].mean((1, 2), keepdims=True), out[cell].shape)
        )


@pytest.mark.parametrize("corruption", [GaussianBlur(0.7), AveragePool(2), AveragePool((1, 5))])
def test_a_separable_map_has_the_moments_of_its_matrix(corruption):
    matrix = corruption.apply(np.eye(60).reshape(60, *SHAPE)).reshape(60, 60).T
    dense, found = LinearCorruption(matrix).moments(CLEAN), corruption.moments(CLEAN)
    for a, b in zip(dense, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_allclose(found.gram, matrix @ SXX @ matrix.T, atol=1e-12)
    np.testing.assert_allclose(found.cross, matrix @ SXX, atol=1e-12)
    np.testing.assert_allclose(found.offset, matrix @ MEAN - MEAN, atol=1e-12)


def test_named_constructors_and_functions_make_the_same_maps():
    assert LinearCorruption.gaussian_blur(2.0) == GaussianBlur(2.0)
    assert LinearCorruption.average_pool((2, 3)) == AveragePool((2, 3))
    made = LinearCorruption.from_function(GaussianBlur(1.0).apply, SHAPE)
    np.testing.assert_allclose(made.apply(IMAGES), GaussianBlur(1.0).apply(IMAGES), atol=1e-12)
    with pytest.raises(InputError, match="not linear: give it to SampledCorruption"):
        LinearCorruption.from_function(np.abs, SHAPE)
    with pytest.raises(InputError, match="not linear"):
        LinearCorruption.from_function(lambda x: x + 1.0, SHAPE)
    with pytest.raises(InputError, match="must keep the shape"):
        LinearCorruption.from_function(lambda x: x[:, 1:], SHAPE)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GaussianBlur(0.0), "positive"),
        (lambda: GaussianBlur(np.inf), "positive"),
        (lambda: AveragePool(0), "positive integer"),
        (lambda: AveragePool(7).check(SHAPE), "larger than the image"),
        (lambda: LinearCorruption(np.ones((2, 3))), "give finite numbers"),
        (lambda: LinearCorruption(np.full((2, 2), np.nan)), "give finite numbers"),
        (lambda: LinearCorruption(np.eye(4)).check(SHAPE), "matrix for 4 pixel values"),
        (lambda: LinearCorruption(np.eye(4)).moments(CLEAN), "matrix for 4 pixel values"),
        (lambda: Compose(), "give one corruption"),
        (lambda: Compose(GaussianBlur(1.0), AveragePool(7)).check(SHAPE), "larger than the image"),
    ],
)
def test_bad_maps_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


class Stated(Corruption):
    """Moments of its own, neither pushed nor sampled."""

    def moments(self, clean):
        return CorruptionMoments(clean.sxx, clean.sxx, 1.0)

    def sample(self, key, images, fill):
        return images


def test_only_exact_and_sampled_corruptions_are_composed():
    with pytest.raises(InputError, match="cannot be composed"):
        Compose(PatchMasking(2, 0.5), Stated()).moments(CLEAN)
