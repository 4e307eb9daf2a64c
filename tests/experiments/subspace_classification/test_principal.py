from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mae_align as ma
from experiments.subspace_classification.principal import Family, PrincipalAxes, Subspace
from mae_align.moments.moments import Moments

SHAPE = (2, 3, 1)


def images(n: int = 300) -> np.ndarray:
    """Six pixels of which one is constant and two are equal: four directions."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6)) * np.array([3.0, 2.0, 1.0, 0.5, 0.0, 0.0]) + 7.0
    x[:, 5] = x[:, 1]
    return x.reshape(n, *SHAPE)


@pytest.fixture(scope="module")
def axes() -> PrincipalAxes:
    return PrincipalAxes.of(Moments.from_arrays(images()), seed=3)


def eigenvectors(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition: eigenvalues and eigenvectors of the covariance, largest first."""
    values, vectors = np.linalg.eigh(np.cov(x.reshape(len(x), -1), rowvar=False, bias=True))
    return values[::-1], vectors[:, ::-1]


def test_shares_and_projections_are_those_of_the_covariance(axes):
    x, values_vectors = images(), eigenvectors(images())
    values, vectors = values_vectors
    assert axes.rank == 4
    np.testing.assert_allclose(axes.shares(Family.top), np.cumsum(values[:4]) / values[:4].sum(), rtol=1e-12)
    np.testing.assert_allclose(axes.shares(Family.bottom), np.cumsum(values[3::-1]) / values[:4].sum(), rtol=1e-9)
    centred = x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(0)
    for m in range(1, 5):
        top, bottom = vectors[:, :m], vectors[:, 4 - m : 4]
        for family, v in ((Family.top, top), (Family.bottom, bottom)):
            found = axes.project(x, Subspace(family, m)).reshape(len(x), -1)
            np.testing.assert_allclose(found, centred @ v @ v.T, atol=1e-5)


def test_what_is_reported_is_the_share_that_projected_images_hold(axes):
    total = images().var(axis=0).sum()
    for family in Family:
        for m in range(1, 5):
            subspace = Subspace(family, m)
            kept = np.square(axes.project(images(), subspace), dtype=np.float64).mean(axis=0).sum()
            assert axes.share(subspace) == pytest.approx(kept / total, rel=1e-5)


def test_the_random_family_is_an_orthonormal_basis_of_the_range_drawn_from_the_seed(axes):
    basis = axes.basis(Subspace(Family.random, 4))
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(basis @ basis.T, axes.axes @ axes.axes.T, atol=1e-12)
    again, other = (PrincipalAxes.of(Moments.from_arrays(images()), seed=s) for s in (3, 4))
    np.testing.assert_array_equal(axes.rotation, again.rotation)
    assert np.abs(axes.rotation - other.rotation).max() > 0.1
    # Uniform over rotations: signs of the first entry are no constant.
    signs = [np.sign(PrincipalAxes(SHAPE, axes.mean, axes.axes, axes.variance, s).rotation[0, 0]) for s in range(40)]
    assert 5 < sum(s > 0 for s in signs) < 35


@given(share=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=60)
def test_bottom_and_the_rest_of_top_are_complements(share):
    variance = np.array([5.0, 3.0, 1.5, 0.4, 0.1])
    axes = PrincipalAxes((1, 5, 1), np.zeros(5), np.eye(5), variance, 0)
    bottom, top = axes.nearest(Family.bottom, share), axes.nearest(Family.top, 1.0 - share)
    possible = np.append(0.0, np.cumsum(variance[::-1])) / 10.0
    # No member is nearer to what was asked for.
    assert abs(axes.share(bottom) - share) <= np.abs(possible[1:] - share).min() + 1e-12
    if possible[1] / 2 < share < 0.75:
        assert bottom.dimension + top.dimension == 5
        assert axes.share(bottom) + axes.share(top) == pytest.approx(1.0)


def test_projection_by_the_complement_equals_the_direct_one():
    x = np.random.default_rng(1).normal(size=(50, 2, 2, 2)) * np.arange(1.0, 9.0).reshape(2, 2, 2)
    axes = PrincipalAxes.of(Moments.from_arrays(x))
    for family in Family:
        subspace = Subspace(family, 6)
        basis = axes.basis(subspace)
        direct = (x.reshape(50, -1) - axes.mean) @ basis @ basis.T
        np.testing.assert_allclose(axes.project(x, subspace).reshape(50, -1), direct, atol=1e-5)
        np.testing.assert_allclose(axes.coordinates(x, subspace) @ basis.T, direct, atol=1e-5)


def test_held_out_images_use_the_training_mean_and_nothing_outside_its_range(axes):
    held_out = images(5) + 1.0
    held_out[:, 1, 1, 0] += 100.0  # the constant pixel
    for family in Family:
        found = axes.project(held_out, Subspace(family, 4))
        assert np.abs(found[:, 1, 1, 0]).max() < 1e-4
    whole = axes.project(held_out, Subspace(Family.top, 4))
    expected = held_out[:, 0, 0, 0] - images()[:, 0, 0, 0].mean()
    np.testing.assert_allclose(whole[:, 0, 0, 0], expected, atol=1e-5)


def test_what_does_not_exist_is_refused(axes):
    with pytest.raises(ma.InputError, match="5 dimensions"):
        axes.share(Subspace(Family.top, 5))
    with pytest.raises(ma.InputError, match="above 0"):
        axes.nearest(Family.top, 0.0)
    with pytest.raises(ma.InputError, match="the axes are of"):
        axes.project(np.zeros((2, 3, 2, 1)), Subspace(Family.top, 1))
    with pytest.raises(ma.InputError, match="center=True"):
        PrincipalAxes.of(Moments.from_arrays(images(), center=False))
