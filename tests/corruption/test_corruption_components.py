"""Masks of principal components."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import mae_align as ma
from mae_align.corruption import (
    ComponentMasking,
    GaussianNoise,
    VarianceShareMasking,
    principal_components,
)
from mae_align.moments.moments import Moments
from mae_align.runtime.errors import InputError
from tests import oracles
from tests.corruption.corruption_cases import CLEAN, IMAGES, SXX, X
from tests.oracles import SHAPE


def test_components_are_those_of_the_covariance():
    components, variances = principal_components(Moments.from_arrays(IMAGES, X[:, :1]))
    np.testing.assert_allclose(components * variances @ components.T, SXX, atol=1e-12)
    assert (np.diff(variances) <= 0).all()


def test_equal_probabilities_are_inert_and_a_share_of_the_variance_is_not():
    """One component holds most of the variance: PMAE's rule at a share above it hides it always."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 12)) * np.r_[10.0, 5.0, np.linspace(3, 1, 10)]
    fit = Moments.from_arrays(x.reshape(300, 4, 3, 1), rng.normal(size=(300, 2)))
    inert = [ComponentMasking.from_moments(fit, p) for p in (0.9, 0.5, 0.05)]
    share = VarianceShareMasking.from_moments(fit, 0.8)
    assert share.probabilities()[0][0] == 0.0
    pca = ma.denoising_autoencoder(fit, GaussianNoise(0.0), 5, pixel_noise=0.0).encoder
    for k in (1, 3, 5):
        for corruption in inert:
            found = ma.denoising_autoencoder(fit, corruption, k, pixel_noise=0.0).encoder
            assert oracles.angles(found, pca[:, :k], fit.sxx).max() < 1e-7
        moved = ma.denoising_autoencoder(fit, share, k, pixel_noise=0.0).encoder
        assert oracles.angles(moved, pca[:, :k], fit.sxx).max() > 1.0


def test_a_share_of_the_variance_is_the_published_rule_over_every_permutation():
    variances, share = np.array([5.0, 2.0, 1.5, 1.0, 0.5]), 0.33
    kept = []
    for order in itertools.permutations(range(5)):
        total = np.cumsum(variances[list(order)]) / variances.sum()
        mask = np.ones(5)
        mask[list(order[: np.argmin(np.abs(total - share)) + 1])] = 0.0
        kept.append(mask)
    kept = np.array(kept)
    rule = VarianceShareMasking(np.eye(5), variances, share, draws=20_000)
    keep, pair = rule.probabilities()
    for found, expected in ((keep, kept.mean(0)), (pair, kept.T @ kept / len(kept))):
        error = np.sqrt(expected * (1 - expected) / 20_000)
        assert (np.abs(found - expected) <= 4.5 * error + 1e-12).all()
    np.testing.assert_array_equal(rule.probabilities()[1], pair)  # seeded
    assert not np.array_equal(
        VarianceShareMasking(np.eye(5), variances, share, 20_000, seed=1).probabilities()[1], pair
    )


def test_the_standard_error_of_a_share_of_the_variance_is_its_spread_over_seeds():
    components, variances = principal_components(Moments.from_arrays(IMAGES, X[:, :1]))
    before = GaussianNoise(np.linspace(0, 3, 60).reshape(SHAPE)).moments(CLEAN)  # pairs count too
    found = [VarianceShareMasking(components, variances, 0.4, 200, seed).push(before, CLEAN) for seed in range(60)]
    for name in ("gram", "cross"):
        each = np.stack([getattr(one, name) for one in found])
        spread = np.sqrt(each.var(0, ddof=1).sum()) / np.linalg.norm(each.mean(0))
        assert np.mean([getattr(one, f"{name}_se") for one in found]) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ComponentMasking(np.ones((3, 3)), 0.5), "orthonormal"),
        (lambda: ComponentMasking(np.eye(4)[:, :3], 0.5), "all d orthonormal"),
        (lambda: ComponentMasking(np.eye(3), 1.5), "probability"),
        (lambda: ComponentMasking(np.eye(3), np.ones(2)), "one for each of 3"),
        (lambda: ComponentMasking(np.eye(3), 0.0), "not all 0"),
        (lambda: ComponentMasking(np.eye(3), 0.5).check(SHAPE), "components of 3 pixel values"),
        (lambda: VarianceShareMasking(np.eye(3), np.ones(3), 1.0), "share=1.0"),
        (lambda: VarianceShareMasking(np.eye(3), np.zeros(3), 0.5), "variances"),
        (lambda: VarianceShareMasking(np.eye(3), np.ones(3), 0.5, draws=1), "draws=1"),
    ],
)
def test_bad_masks_of_components_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
