"""Principal components against scikit-learn and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from mae_align.moments.moments import Moments
from mae_align.moments.principal import count_of_share, principal_components, varying_components

DIGITS = np.asarray(load_digits(return_X_y=True)[0], np.uint8).reshape(-1, 8, 8, 1)
# Three of the 64 pixels of a digit never vary.
ROWS = DIGITS.reshape(-1, 64).astype(np.float64)
RANK = 61


def low_rank(dtype: type, rank: int = 20) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3000, rank)) @ rng.normal(size=(rank, 144)) + 3.0
    return rows.astype(dtype).reshape(-1, 12, 12, 1)


def test_components_are_those_of_scikit_learn():
    vectors, variances = principal_components(Moments.from_arrays(DIGITS))
    model = PCA(svd_solver="full").fit(ROWS)
    np.testing.assert_allclose(variances, model.explained_variance_ * (len(ROWS) - 1) / len(ROWS), atol=1e-10)
    cosines = np.abs((model.components_ * vectors.T).sum(1))
    np.testing.assert_allclose(cosines[:RANK], 1.0, atol=1e-9)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(64), atol=1e-12)  # all of them, for masks of components


@pytest.mark.parametrize("images", [DIGITS, DIGITS.astype(np.float32) / 16, ROWS.reshape(DIGITS.shape) / 16])
def test_as_many_components_vary_as_the_images_have_rank(images):
    vectors, variances = varying_components(Moments.from_arrays(images))
    assert np.linalg.matrix_rank(ROWS - ROWS.mean(0)) == RANK == len(variances) == vectors.shape[1]
    assert (variances > 0).all() and (np.diff(variances) <= 0).all()
    # Together they hold the images: what is left of them is rounding.
    x = images.reshape(-1, 64).astype(np.float64)
    x = x - x.mean(0)
    np.testing.assert_allclose((x @ vectors) @ vectors.T, x, atol=1e-5 * np.abs(x).max())


def test_rounding_of_the_pixels_is_no_variance():
    assert varying_components(Moments.from_arrays(low_rank(np.float64))).vectors.shape == (144, 20)


def test_rounded_products_of_float32_images_are_told_apart_by_a_given_cutoff():
    """They leave up to 3e-8 of the largest variance in an empty direction; nothing is cut off there unasked."""
    moments = Moments.from_arrays(low_rank(np.float32))
    assert varying_components(moments, 1e-7).vectors.shape == (144, 20)
    assert varying_components(moments).vectors.shape[1] > 20


def test_images_that_are_all_the_same_vary_along_nothing():
    assert varying_components(Moments.from_arrays(np.full((5, 2, 2, 1), 7, np.uint8))).vectors.shape == (4, 0)


def test_a_given_cutoff_is_relative_to_the_largest_variance():
    variances = principal_components(Moments.from_arrays(DIGITS)).variances
    found = varying_components(Moments.from_arrays(DIGITS), 0.01)
    assert 1 < len(found.variances) == (variances > 0.01 * variances[0]).sum() < RANK


def test_a_share_of_the_variance_is_that_of_the_fewest_components():
    variances = principal_components(Moments.from_arrays(DIGITS)).variances
    for share in (0.5, 0.9):
        count = count_of_share(variances, share)
        assert count == PCA(share, svd_solver="full").fit(ROWS).n_components_
    assert count_of_share(variances, 1.0) == RANK
