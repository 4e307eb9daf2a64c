from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

import mae_align as ma
from experiments.theorem2_check.spans import explained_shares, sample_basis, span_angles
from mae_align.closed_form.compare import principal_angles
from mae_align.closed_form.factorize import factorize
from mae_align.closed_form.features import feature_basis
from mae_align.moments.moments import Moments
from tests import oracles
from tests.oracles import SHAPE


def orthonormal(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


@pytest.fixture(scope="module")
def problem():
    return factorize(Moments.from_arrays(oracles.train().images, oracles.train().labels), pixel_noise=0.0)


@pytest.mark.parametrize("k", [1, 4, 7, 11])
def test_angles_are_those_of_scipy_in_ascending_order(k):
    a, b = orthonormal(0, 24, k), orthonormal(1, 24, k)
    found = principal_angles(a, b)
    np.testing.assert_allclose(found, scipy.linalg.subspace_angles(a, b)[::-1], atol=1e-14)
    assert (np.diff(found) >= 0).all()
    np.testing.assert_allclose(principal_angles(b, a), found, atol=1e-14)
    np.testing.assert_allclose(principal_angles(a @ orthonormal(2, k, k), b @ orthonormal(3, k, k)), found, atol=1e-13)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-5, 0.3, np.pi / 4, 1.2, np.pi / 2 - 1e-9, np.pi / 2])
def test_small_and_large_angles_are_accurate(angle):
    """A cosine alone would lose every angle below 1e-8, a sine alone those near a right angle."""
    q = orthonormal(4, 9, 9)
    turned = np.cos(angle) * q[:, 0] + np.sin(angle) * q[:, 5]
    found = principal_angles(q[:, :3], np.stack([q[:, 2], turned, q[:, 1]], 1))
    np.testing.assert_allclose(found, [0.0, 0.0, angle], atol=3e-15, rtol=0)


def test_directions_in_common_have_no_angle():
    """Two subspaces of 7 in 12 dimensions share at least 2."""
    found = principal_angles(orthonormal(0, 12, 7), orthonormal(1, 12, 7))
    assert found[1] < 1e-14 and found[2] > 0.1


def test_subspaces_of_different_size_are_refused():
    with pytest.raises(ma.InputError, match=r"\(5, 2\) and \(5, 3\): compare the same k"):
        principal_angles(orthonormal(0, 5, 2), orthonormal(0, 5, 3))


def test_feature_basis_spans_the_features_of_the_images(problem):
    """Its angles to another encoder are those of the feature columns over all images."""
    x = oracles.train().x - oracles.train().x.mean(0)
    a, b = (np.random.default_rng(seed).normal(size=(60, 6)) for seed in (5, 6))
    basis = feature_basis(problem, a)
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-13)
    found = principal_angles(basis, feature_basis(problem, b))
    np.testing.assert_allclose(found, scipy.linalg.subspace_angles(x @ a, x @ b)[::-1], atol=1e-10)
    same = feature_basis(problem, a @ np.random.default_rng(7).normal(size=(6, 6)))
    np.testing.assert_allclose(principal_angles(basis, same), 0.0, atol=1e-12)
    # Leading columns span the features of leading encoder columns: every k at once.
    np.testing.assert_allclose(np.abs(basis[:, :3].T @ feature_basis(problem, a[:, :3])), np.eye(3), atol=1e-12)


def test_features_that_repeat_each_other_are_refused(problem):
    a = np.random.default_rng(8).normal(size=(60, 4))
    a[:, 3] = a[:, 0] - 2 * a[:, 1]
    with pytest.raises(ma.InputError, match="linearly dependent on these images"):
        feature_basis(problem, a)
    # Different on paper, equal on images with a duplicated pixel, but for the rounding of the eigenvectors.
    for first in range(0, 60, 6):
        x = oracles.train().x.copy()
        x[:, first] = x[:, first + 1]
        twin = factorize(Moments.from_arrays(x.reshape(-1, *SHAPE), oracles.train().labels), pixel_noise=0.0)
        for scales in ([1.0, 1.0], [1e-9, 1e9]):
            with pytest.raises(ma.InputError, match="linearly dependent on these images"):
                feature_basis(twin, np.eye(60)[:, [first, first + 1]] * scales)
        with pytest.raises(ma.InputError, match="k=60 is not a number of features up to the rank 59"):
            feature_basis(twin, np.eye(60))
        assert feature_basis(twin, np.delete(np.eye(60), first, axis=1)).shape == (59, 59)
    assert feature_basis(problem, np.eye(60)[:, [20, 21]]).shape == (60, 2)


def test_sample_basis_is_what_least_squares_with_an_intercept_can_reach():
    rng = np.random.default_rng(0)
    # Dependent, constant and badly scaled columns about a large mean.
    raw = rng.normal(size=(60, 3)) * [1.0, 1e-3, 50.0]
    z = np.column_stack([raw + 100.0, raw[:, 0] - 2 * raw[:, 2], np.full(60, 7.0)])
    basis = sample_basis(z)
    assert basis.shape == (60, 3) and sample_basis(z.astype(np.float32)).shape == (60, 3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(basis.sum(0), 0.0, atol=1e-8)
    y = np.column_stack([rng.normal(size=60) + raw[:, 0], raw @ [1.0, 2.0, 3.0], np.full(60, 0.1)])
    design = np.column_stack([np.ones(60), raw])
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    expected = 1 - ((y - fitted) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0).clip(1e-20)
    shares = explained_shares(basis, y)
    np.testing.assert_allclose(shares[:2], expected[:2], rtol=1e-9)
    assert np.isnan(shares[2]) and 0.1 < shares[0] < 0.9
    assert sample_basis(np.ones((5, 2))).shape == (5, 0)
    np.testing.assert_array_equal(explained_shares(np.empty((60, 0)), y[:, :1]), [0.0])


def test_span_angles_of_unequal_dimensions():
    rng = np.random.default_rng(1)
    a, b = (np.linalg.qr(rng.normal(size=(30, k)))[0] for k in (3, 5))
    np.testing.assert_allclose(span_angles(a, b)[:3], scipy.linalg.subspace_angles(a, b)[::-1], atol=1e-10)
    np.testing.assert_allclose(span_angles(a, b)[3:], np.pi / 2)
    np.testing.assert_array_equal(span_angles(a, b), span_angles(b, a))
    np.testing.assert_array_equal(span_angles(a, b[:, :3]), principal_angles(a, b[:, :3]))
    np.testing.assert_allclose(span_angles(b[:, :2], b), [0, 0, *[np.pi / 2] * 3], atol=1e-12)
    np.testing.assert_allclose(span_angles(np.empty((30, 0)), a), np.pi / 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sample_basis(np.ones(3)),
        lambda: sample_basis(np.array([[np.nan], [1.0]])),
        lambda: explained_shares(np.eye(3)[:, :1], np.ones((4, 1))),
        lambda: span_angles(np.eye(3)[:, :1], np.eye(4)[:, :1]),
    ],
)
def test_sample_spaces_that_do_not_fit_are_refused(call):
    with pytest.raises(ma.InputError, match="give"):
        call()


@pytest.mark.parametrize("decay", [1e-3, 1e-6, 1e-11])
def test_every_direction_above_the_cutoff_is_a_feature_of_its_own(decay):
    """However steep the spectrum; and a pixel that is there twice is still found."""
    rng = np.random.default_rng(9)
    x = rng.normal(size=(400, 20)) * np.sqrt(np.geomspace(1.0, decay, 20)) @ np.linalg.qr(rng.normal(size=(20, 20)))[0]
    steep = factorize(Moments.from_arrays(x.reshape(-1, 4, 5, 1), np.arange(400) % 3), pixel_noise=0.0)
    assert steep.rank == 20
    for encoder in (steep.u, np.eye(20), steep.u / np.sqrt(steep.s)):
        assert feature_basis(steep, encoder).shape == (20, 20)
    twice = np.hstack([x, x[:, :1]]).reshape(-1, 7, 3, 1)
    twin = factorize(Moments.from_arrays(twice, np.arange(400) % 3), pixel_noise=0.0)
    assert twin.rank == 20
    with pytest.raises(ma.InputError, match="linearly dependent on these images"):
        feature_basis(twin, np.eye(21)[:, [0, 5, 20]])


@pytest.mark.parametrize("encoder", [np.eye(59), np.ones(60), np.full((60, 2), np.nan), np.eye(60)[:, :0]])
def test_what_is_no_encoder_of_these_images_is_refused(problem, encoder):
    with pytest.raises(ma.InputError, match=r"give finite numbers \[60, k\]|k=0 is not a number of features"):
        feature_basis(problem, encoder)
