from __future__ import annotations

import math

import numpy as np
import pytest

from mae_align.closed_form.basis import mask_weights, patch_basis, pca_basis
from mae_align.closed_form.factorize import Factorized, factorize
from mae_align.moments.moments import Moments
from mae_align.runtime.errors import InputError
from tests import oracles
from tests.oracles import SHAPE

PATCHES = [1, 2, 4, (3, 4), (2, 5)]


@pytest.fixture(scope="module")
def moments() -> Moments:
    return Moments.from_arrays(oracles.train().images, oracles.train().labels)


@pytest.fixture(scope="module")
def problem(moments) -> Factorized:
    return factorize(moments, pixel_noise=0.0)


@pytest.fixture(scope="module")
def defective() -> Moments:
    """Images with a constant pixel, a duplicated one and one that is a mixture of others: rank 57 of 60."""
    x = oracles.train().x.copy()
    x[:, 7] = 3.0
    x[:, 20] = x[:, 21]
    x[:, 40] = x[:, 2] - 0.5 * x[:, 50]
    return Moments.from_arrays(x.reshape(-1, *SHAPE), oracles.train().labels)


def within_patches(s: np.ndarray, patch) -> np.ndarray:
    return s * oracles.pair_matrix(SHAPE, patch, 1.0, 0.0)


def test_factors_rebuild_the_covariance_and_the_targets(problem):
    direct = oracles.stats(oracles.train().x, oracles.train().y)
    np.testing.assert_allclose(problem.root @ problem.root.T, direct.sxx, atol=1e-12)
    np.testing.assert_allclose(problem.u.T @ problem.u, np.eye(60), atol=1e-12)
    np.testing.assert_allclose(problem.t0, np.linalg.pinv(problem.root) @ direct.sxy, atol=1e-11)
    np.testing.assert_allclose(problem.yty, direct.yty, rtol=1e-12)
    np.testing.assert_allclose(problem.syy, direct.syy, atol=1e-14)
    np.testing.assert_allclose(problem.mean_x, oracles.train().x.mean(0), rtol=1e-12, atol=1e-14)
    assert (np.diff(problem.s) < 0).all() and problem.rank == 60 and problem.pixel_noise == 0.0


def test_floor_of_8_bit_images_is_the_quantisation_variance():
    sample = oracles.unbalanced_digits()
    covariance = np.cov(sample.x.T, bias=True)
    assert (np.diag(covariance) == 0).sum() >= 5  # digits have pixels that are never on
    problem = factorize(Moments.from_arrays(sample.images, sample.labels))
    assert problem.pixel_noise == 1 / 12 and problem.rank == 64
    np.testing.assert_allclose(problem.sxx, covariance + np.eye(64) / 12, atol=1e-10)
    np.testing.assert_allclose(problem.s[::-1], np.linalg.eigvalsh(covariance) + 1 / 12, rtol=1e-10)
    np.testing.assert_allclose(problem.root @ problem.root.T, problem.sxx, atol=1e-10)


def test_floor_of_float_images_is_a_billionth_of_the_largest_eigenvalue(moments, defective):
    assert factorize(moments).pixel_noise == pytest.approx(1e-9 * np.linalg.eigvalsh(moments.sxx)[-1], rel=1e-12)
    assert factorize(defective).rank == 60 and factorize(defective, pixel_noise=0.0).rank == 57
    assert factorize(moments, pixel_noise=0.25).sxx[3, 3] == pytest.approx(moments.sxx[3, 3] + 0.25, rel=1e-14)


def test_floor_of_float32_images_is_above_the_rounding_of_their_moments():
    """30 images of 60 pixels: the missing directions have variance of rounding size, of either sign."""
    few = oracles.draw(3, 30)
    images = (3.0 + few.images).astype(np.float32)
    moments = Moments.from_arrays(images, few.labels)
    assert np.linalg.eigvalsh(moments.sxx)[0] < 0
    problem = factorize(moments)
    assert problem.rank == 60 and problem.s[-1] > 0.5 * problem.pixel_noise


def test_cutoff_is_relative_to_the_largest_eigenvalue(moments):
    values = np.linalg.eigvalsh(moments.sxx)[::-1]
    middle = math.sqrt(values[19] * values[20]) / values[0]
    cut = factorize(moments, pixel_noise=0.0, rtol=middle)
    assert cut.rank == 20 and cut.rtol == middle
    np.testing.assert_allclose(cut.s, values[:20], rtol=1e-12)
    assert cut.u.shape == (60, 20) and cut.t0.shape == (20, 4)


def test_float32_loses_rank_where_the_spectrum_is_wider_than_its_precision(moments):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 60)) * np.logspace(0, -5, 60)
    wide = Moments.from_arrays(x.reshape(-1, *SHAPE), np.arange(300) % 3)
    low, high = factorize(wide, pixel_noise=0.0, dtype="float32"), factorize(wide, pixel_noise=0.0)
    kept = (np.linalg.eigvalsh(wide.sxx) > 1e-7 * np.linalg.eigvalsh(wide.sxx)[-1]).sum()
    assert high.rank == 60 and abs(low.rank - kept) <= 1 and kept < 50
    assert {a.dtype.name for a in (low.s, low.u, low.t0)} == {"float32"}
    easy = factorize(moments, dtype="float32")
    np.testing.assert_allclose(easy.s, factorize(moments).s, rtol=2e-4)


def test_uncentred_moments_are_factorised_about_zero():
    sample = oracles.train()
    problem = factorize(Moments.from_arrays(sample.images, sample.labels, center=False), pixel_noise=0.0)
    np.testing.assert_allclose(problem.root @ problem.root.T, sample.x.T @ sample.x / len(sample.x), atol=1e-11)
    assert not problem.mean_x.any() and not problem.mean_y.any()


def test_rounding_in_the_targets_does_not_become_a_target():
    """40 images of 60 pixels: whitening divides the zeros of the missing directions by the root of a tiny floor."""
    few = oracles.draw(3, 40)
    problem = factorize(Moments.from_arrays(few.images, few.labels))
    assert problem.rank == 60
    assert np.linalg.matrix_rank(problem.t0) == np.linalg.matrix_rank(np.cov(few.y.T)) == 3


@pytest.mark.parametrize("rho", [0.0, 0.7])
@pytest.mark.parametrize("patch", PATCHES)
def test_patch_basis_diagonalises_the_whitened_patch_precision(problem, patch, rho):
    basis = patch_basis(problem, patch, rho)
    e, pi = np.asarray(basis.e), np.asarray(basis.pi)
    precision = np.linalg.inv(within_patches(problem.sxx, patch) + rho * np.eye(60))
    np.testing.assert_allclose(e * pi @ e.T, problem.root.T @ precision @ problem.root, atol=1e-10)
    np.testing.assert_allclose(e.T @ e, np.eye(60), atol=1e-12)
    assert (np.diff(pi) <= 0).all() and (pi > 0).all()
    np.testing.assert_allclose(basis.gram, e.T @ np.diag(problem.s) @ e, atol=1e-11)
    np.testing.assert_allclose(basis.target, e.T @ problem.t0, atol=1e-12)
    if rho == 0.0:
        assert pi.sum() == pytest.approx(60, rel=1e-10)  # tr(D^-1 S): as many as pixels


def test_one_patch_has_the_identity_as_precision(problem):
    np.testing.assert_allclose(patch_basis(problem, (6, 5)).pi, 1.0, rtol=1e-10)


@pytest.mark.parametrize("patch", [1, 2, (3, 4)])
def test_singular_patches_are_inverted_on_their_range(defective, patch):
    problem = factorize(defective, pixel_noise=0.0)
    basis = patch_basis(problem, patch)
    inverse = np.linalg.pinv(within_patches(problem.sxx, patch), rcond=1e-12, hermitian=True)
    e = np.asarray(basis.e)
    np.testing.assert_allclose(e * np.asarray(basis.pi) @ e.T, problem.root.T @ inverse @ problem.root, atol=1e-9)


def test_patches_have_the_cutoff_of_the_images():
    """A pixel whose variance counts as zero in S is not blown up by whitening its own patch."""
    x = oracles.train().x.copy()
    x[:, 7] = 1e-9 * x[:, 8]
    problem = factorize(Moments.from_arrays(x.reshape(-1, *SHAPE), oracles.train().labels), pixel_noise=0.0)
    variance = np.diag(problem.sxx)
    assert 0 < variance[7] < problem.rtol * problem.s[0] and problem.rank == 59
    inverse = np.where(np.arange(60) == 7, 0.0, 1 / variance)
    basis = patch_basis(problem, (1, 1))
    e, channels = np.asarray(basis.e), patch_basis(problem, 1)
    np.testing.assert_array_equal(basis.pi, channels.pi)
    within = np.zeros((60, 60))
    for pair in oracles.patch_members(SHAPE, 1):  # two channels make a patch
        corner = np.ix_(pair, pair)
        within[corner] = np.diag(inverse[pair]) if 7 in pair else np.linalg.inv(problem.sxx[corner])
    np.testing.assert_allclose(e * np.asarray(basis.pi) @ e.T, problem.root.T @ within @ problem.root, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.0, 0.7])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.99, 1.0])
def test_weights_whiten_the_masked_images(problem, p, sigma):
    """R^T G^-1 R = E diag(w^2) E^T for G = (1 - p) S + p D + sigma^2 I."""
    basis = pca_basis(problem, sigma**2) if p == 0 else patch_basis(problem, 2, sigma**2 / p)
    w, e = mask_weights(np.asarray(basis.pi), p, sigma**2), np.asarray(basis.e)
    gram = (1 - p) * problem.sxx + p * within_patches(problem.sxx, 2) + sigma**2 * np.eye(60)
    np.testing.assert_allclose(
        e * w**2 @ e.T, problem.root.T @ np.linalg.inv(gram) @ problem.root, rtol=1e-9, atol=1e-10
    )


def test_pca_basis_is_the_coordinate_basis(problem):
    basis = pca_basis(problem)
    np.testing.assert_array_equal(basis.e, np.eye(60))
    np.testing.assert_array_equal(basis.gram, np.diag(problem.s))
    np.testing.assert_array_equal(basis.target, problem.t0)
    np.testing.assert_array_equal(mask_weights(np.asarray(basis.pi), 0.0), np.ones(60))


def test_features_are_counted_from_one_to_the_rank(problem):
    assert problem.check_k(1) == 1 and problem.check_k(60) == 60
    for k in (0, 61, -1):
        with pytest.raises(InputError, match=r"k=-?\d+.*60"):
            problem.check_k(k)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pixel_noise": -1.0}, "give a variance of at least 0"),
        ({"pixel_noise": math.nan}, "give a variance of at least 0"),
        ({"pixel_noise": math.inf}, "give a variance of at least 0"),
        ({"rtol": -1e-3}, "rtol"),
        ({"rtol": math.nan}, "rtol"),
        ({"rtol": 1.0}, "rtol"),
        ({"dtype": "float16"}, "'float64' or 'float32'"),
    ],
)
def test_bad_options_are_refused(moments, options, message):
    with pytest.raises(InputError, match=message):
        factorize(moments, **options)


@pytest.mark.parametrize(
    "images, targets, message",
    [
        (oracles.train().images[:1], np.ones((1, 1)), "at least 2"),
        (oracles.train().images[:20], np.ones((20, 2)), "targets are constant"),
        (np.full((20, 2, 2, 1), 9, np.uint8), np.arange(20) % 2, "images are constant"),
    ],
)
def test_data_with_nothing_to_learn_is_refused(images, targets, message):
    with pytest.raises(InputError, match=message):
        factorize(Moments.from_arrays(images, targets))


def test_one_class_of_several_is_nothing_to_learn():
    one = Moments.from_arrays(oracles.train().images[:20], np.zeros(20, int), num_classes=3)
    with pytest.raises(InputError, match="targets are constant"):
        factorize(one)


def test_a_patch_larger_than_the_image_is_refused(problem):
    with pytest.raises(InputError, match="7x7 is larger than the image 6x5"):
        patch_basis(problem, 7)
