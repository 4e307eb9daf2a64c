"""Blur, pooling, any matrix; masks of components; sampled corruptions."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import mae_align as ma
from mae_align.corruption import (
    AveragePool,
    CleanImages,
    ComponentMasking,
    Compose,
    Corruption,
    CorruptionMoments,
    GaussianBlur,
    GaussianNoise,
    LinearCorruption,
    PatchMasking,
    SampledCorruption,
    VarianceShareMasking,
    principal_components,
)
from mae_align.moments.moments import Moments
from mae_align.runtime.errors import InputError
from tests import oracles
from tests.oracles import SHAPE

X = oracles.draw(9, 80).x
MEAN = X.mean(0)
SXX = (X - MEAN).T @ (X - MEAN) / len(X)
IMAGES = X.reshape(-1, *SHAPE)
CLEAN = CleanImages(SXX, MEAN, SHAPE, images=IMAGES)
FILL = MEAN.reshape(SHAPE)


# --- linear maps ----------------------------------------------------------------------------------------------------


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


# --- components -----------------------------------------------------------------------------------------------------


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


# --- sampled --------------------------------------------------------------------------------------------------------


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


class Stated(Corruption):
    """Moments of its own, neither pushed nor sampled."""

    def moments(self, clean):
        return CorruptionMoments(clean.sxx, clean.sxx, 1.0)

    def sample(self, key, images, fill):
        return images


def test_only_exact_and_sampled_corruptions_are_composed():
    with pytest.raises(InputError, match="cannot be composed"):
        Compose(PatchMasking(2, 0.5), Stated()).moments(CLEAN)
