"""What an implementation of the paper has to satisfy, one test each, through the public interface.

Balestriero & LeCun (2024), arXiv 2402.11337: Theorems 1 and 3, the alignment measure and the corollaries; Bisulco et
al. (2025), arXiv 2508.15404, and Van Assel et al. (2025), arXiv 2505.12477, for other forms of the same solution.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
import scipy.linalg
from sklearn.linear_model import LinearRegression

import mae_align as ma
from mae_align.closed_form.compare import principal_angles
from mae_align.closed_form.factorize import factorize
from mae_align.closed_form.features import feature_basis
from mae_align.corruption import CleanImages, ComponentMasking
from mae_align.moments.moments import Moments
from tests import oracles
from tests.oracles import SHAPE


@pytest.fixture(scope="module")
def fit() -> Moments:
    return Moments.from_arrays(oracles.train().images, oracles.train().labels)


@pytest.fixture(scope="module")
def direct() -> oracles.Stats:
    return oracles.stats(oracles.train().x, oracles.train().y)


def pca(s: np.ndarray, k: int) -> np.ndarray:
    return np.linalg.eigh(s)[1][:, ::-1][:, :k]


def root(s: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(s)
    return vectors * values**power @ vectors.T


@pytest.mark.parametrize("d", [16, 512])
def test_1_theorem_1_attains_its_closed_form_loss(d):
    """The authors' own grid: 256 images of random bits, two linear targets, d below and above the number of images."""
    rng = np.random.default_rng(d)
    bits = (rng.normal(size=(256, d)) > 0).astype(float)
    y = bits @ rng.normal(size=(d, 2)) / math.sqrt(d)
    moments = Moments.from_arrays(bits.reshape(256, 4, d // 4, 1), y)
    xc, yc = bits - bits.mean(0), y - y.mean(0)
    # Whitened, the problem is an ordinary one: mu of S^-1/2 (Sxy Sxy^T + lam S^2) S^-1/2 on the range of S.
    left, size, _ = np.linalg.svd(xc / 16, full_matrices=False)
    rank = int((size > 1e-10 * size[0]).sum())
    assert rank == min(d, 255)
    target = left[:, :rank].T @ yc / 16
    for lam in (0.0, 0.1, 1.0, 10.0):
        mu = np.linalg.eigvalsh(target @ target.T + lam * np.diag(size[:rank] ** 2))[::-1]
        for k in (3, 16):
            model = ma.supervised_autoencoder(moments, lam, k, pixel_noise=0.0)
            expected = (yc**2).sum() / 256 + lam * (xc**2).sum() / 256 - mu[:k].sum()
            assert model.loss == pytest.approx(expected, rel=1e-9, abs=1e-10)
            features = xc @ model.encoder
            task = ((features @ model.head - yc) ** 2).sum() / 256
            pixels = ((features @ model.decoder - xc) ** 2).sum() / 256
            assert task + lam * pixels == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_2_limits_of_lambda_are_pca_least_squares_and_reduced_rank_regression(fit, direct):
    sample = oracles.train()
    fitted = LinearRegression().fit(sample.x, sample.y).predict(sample.x)
    for k in (1, 3, 10):
        large = ma.supervised_autoencoder(fit, math.inf, k, pixel_noise=0.0)
        assert oracles.angles(large.encoder, pca(direct.sxx, k), direct.sxx).max() < 1e-7
        small = ma.supervised_autoencoder(fit, 0.0, k, pixel_noise=0.0)
        left, size, right = np.linalg.svd(fitted - fitted.mean(0), full_matrices=False)
        below = left[:, :k] * size[:k] @ right[:k] + fitted.mean(0)  # all of it from k = 3 on
        np.testing.assert_allclose(small.predict(sample.images), below, atol=1e-9)
    np.testing.assert_allclose(small.predict(sample.images), fitted, atol=1e-9)


def test_3_alignment_grows_to_one_and_belongs_to_the_span(fit, direct):
    found = ma.masking_sweep(fit, [2], [0.5], pixel_noise=0.0).isel(patch_size=0, mask_ratio=0)
    alignment = found.alignment.values
    assert (np.diff(alignment) >= -1e-12).all() and alignment[-1] == pytest.approx(1.0, abs=1e-12)
    v = oracles.solve(direct, SHAPE, 2, oracles.bernoulli(0.5)).v
    rng = np.random.default_rng(0)
    for k in (1, 7, 60):
        mixed, _ = ma.encoder_curves(fit, v[:, :k] @ rng.normal(size=(k, k)), pixel_noise=0.0)
        assert mixed.alignment[-1] == pytest.approx(alignment[k - 1], abs=1e-8)
    # On balanced labels the published score, a square root in percent, is that of r2's share.
    labels = np.arange(400) % 4
    balanced = ma.masking_sweep(Moments.from_arrays(oracles.train().images, labels), [2], [0.5], pixel_noise=0.0)
    share = balanced.r2 / balanced.r2.isel(k=-1)
    np.testing.assert_allclose(balanced.alignment_percent, 100 * np.sqrt(share), rtol=1e-9)
    assert abs(found.alignment - found.r2 / found.r2[-1]).max() > 1e-3  # but not on these


def test_4_r2_is_the_least_squares_fit_on_the_features(fit, direct):
    sample, found = oracles.train(), ma.masking_sweep(fit, [(3, 4)], [0.7], pixel_noise=0.0).r2.values[0, 0]
    v = oracles.solve(direct, SHAPE, (3, 4), oracles.bernoulli(0.7)).v
    xc, yc = sample.x - sample.x.mean(0), sample.y - sample.y.mean(0)
    for k in range(1, 61):
        head = np.linalg.lstsq(xc @ v[:, :k], yc)[0]
        error = ((xc @ v[:, :k] @ head - yc) ** 2).sum()
        assert found[k - 1] == pytest.approx(1 - error / (yc**2).sum(), abs=1e-9)


def test_5_inert_corruptions_have_no_angle_to_pca_and_others_do(fit, direct):
    problem = factorize(fit, pixel_noise=0.0)
    k, rng = 5, np.random.default_rng(1)
    base = feature_basis(problem, pca(direct.sxx, k))

    def largest_angle(corruption) -> float:
        model = ma.denoising_autoencoder(fit, corruption, k, pixel_noise=0.0)
        return principal_angles(base, feature_basis(problem, model.encoder))[-1]

    components = pca(direct.sxx, 60)
    inert = [ma.GaussianNoise(sigma) for sigma in (0.0, 0.1, 1.0, 100.0)]
    inert += [ComponentMasking(components, np.full(60, m)) for m in (0.9, 0.2)]
    inert.append(ComponentMasking(components, np.where(np.arange(60) < k, 0.9, 0.5)))  # keeps the first five first
    for corruption in inert:
        assert largest_angle(corruption) < 1e-7, corruption
    moving = [
        ma.GaussianNoise(rng.uniform(0.01, 3, SHAPE)),
        ma.PatchMasking(1, 0.5),
        ma.PatchMasking(2, 0.5),
        ComponentMasking(components, np.where(np.arange(60) < 2, 0.05, 0.9)),  # hides the first two
    ]
    for corruption in moving:
        assert largest_angle(corruption) > 0.1, corruption


@pytest.mark.parametrize(
    "mask",
    [ma.PatchMasking(4, 0.6), ma.FixedCountPatchMasking((4, 2), 2), ma.RandomRatioMasking(4, 0.3, 0.9)],
    ids=lambda mask: type(mask).__name__,
)
def test_6_moments_of_a_mask_are_those_of_its_sampler(mask):
    """7 x 6 pixels are a multiple of no patch here. 40,000 masks: six standard errors of a probability are 0.015."""
    shape, n = (7, 6, 2), 40_000
    x = np.random.default_rng(0).normal(size=(200, *shape)).astype(np.float32)
    fill = x.mean(0)
    batch = np.resize(x, (n, *shape))
    out = np.asarray(jax.jit(mask.sample)(jax.random.key(3), batch, fill))
    kept = (out == batch).reshape(n, -1)
    dropped = (out == fill).reshape(n, -1)
    assert (kept != dropped).all()
    kept = kept.astype(np.float64)
    stated = mask.moments(CleanImages(np.ones((84, 84)), np.zeros(84), shape))
    np.testing.assert_allclose(kept.T @ kept / n, stated.keep * stated.gram, atol=0.015)
    np.testing.assert_allclose(kept.mean(0), stated.keep, atol=0.015)
    # The same through second moments of the masked images themselves.
    z = (out.astype(np.float64) - fill).reshape(n, -1)
    clean = (batch.astype(np.float64) - fill).reshape(n, -1)
    stated = mask.moments(CleanImages(clean.T @ clean / n, np.zeros(84), shape))
    np.testing.assert_allclose(z.T @ z / n, stated.keep * stated.gram, atol=0.06)
    np.testing.assert_allclose(z.T @ clean / n, stated.keep * stated.cross, atol=0.06)


def test_7_ends_of_the_mask_ratio(fit, direct):
    """p = 0 is no corruption at all, bit for bit; p -> 1 ranks by S D^-1 S with D the part of S within patches."""
    for patch in (1, 2, (6, 5)):
        without, none = (
            ma.denoising_autoencoder(fit, corruption, 6, pixel_noise=0.0)
            for corruption in (ma.GaussianNoise(0.0), ma.PatchMasking(patch, 0.0))
        )
        np.testing.assert_array_equal(none.encoder, without.encoder)
        swept = ma.masking_sweep(fit, [patch], [0.0], pixel_noise=0.0).isel(patch_size=0, mask_ratio=0)
        plain = ma.gaussian_sweep(fit, [0.0], pixel_noise=0.0).isel(noise_level=0)
        np.testing.assert_allclose(swept.r2, plain.r2, rtol=0, atol=1e-13)
    within = direct.sxx * oracles.pair_matrix(SHAPE, 2, 1.0, 0.0)
    ranked = np.linalg.eigh(direct.sxx @ np.linalg.inv(within) @ direct.sxx)
    decoder_rows = ranked[1][:, ::-1][:, :6]  # reconstructions lie in the leading eigenvectors of S D^-1 S
    previous = 1.0
    for p in (0.9, 0.99, 0.999, 1.0):
        model = ma.denoising_autoencoder(fit, ma.PatchMasking(2, p), 6, pixel_noise=0.0)
        angle = scipy.linalg.subspace_angles(model.decoder.T, decoder_rows).max()
        assert angle < 0.3 * previous
        previous = angle
    assert previous < 1e-7


@pytest.mark.parametrize("p", [0.25, 0.75])
def test_8_three_published_forms_of_the_solution_agree(fit, direct, p):
    """Theorem 3, the linear masked autoencoder, and augmentations with E[x'] = x: angles below 1e-9 degrees."""
    s, k = direct.sxx, 4
    within = s * oracles.pair_matrix(SHAPE, 2, 1.0, 0.0)
    model = ma.denoising_autoencoder(fit, ma.PatchMasking(2, p), k, pixel_noise=0.0)
    # Bisulco et al.: U = top eigenvectors of S V^-1 S with V = (1 - m) S + m blkdiag(S); encoder V^-1 S U.
    v = (1 - p) * s + p * within
    u = np.linalg.eigh(s @ np.linalg.solve(v, s))[1][:, ::-1][:, :k]
    masked_autoencoder = np.linalg.solve(v, s @ u)
    # Van Assel et al.: kept pixels divided by 1 - p; its covariance beyond S is Sigma = p / (1 - p) blkdiag(S).
    inverse = root(s + p / (1 - p) * within, -0.5)
    augmented = inverse @ np.linalg.svd(s @ inverse)[2][:k].T
    degrees = [
        np.degrees(scipy.linalg.subspace_angles(model.encoder, other).max())
        for other in (masked_autoencoder, augmented)
    ]
    assert max(degrees) < 1e-9
    assert np.degrees(scipy.linalg.subspace_angles(model.decoder.T, u).max()) < 1e-9


@pytest.mark.parametrize("mask", [ma.PatchMasking(1, 0.2), ma.PatchMasking(2, 0.9), ma.GaussianNoise(np.ones(SHAPE))])
def test_9_no_task_changes_by_more_than_the_largest_angle(fit, direct, mask):
    problem, rng = factorize(fit, pixel_noise=0.0), np.random.default_rng(2)
    nearly_inert = (
        dataclasses.replace(mask, sigma=np.linspace(0.05, 0.15, 60).reshape(SHAPE))
        if isinstance(mask, ma.GaussianNoise)
        else mask
    )
    for k in (2, 9, 30):
        bases = [
            feature_basis(problem, encoder)
            for encoder in (
                pca(direct.sxx, k),
                ma.denoising_autoencoder(fit, nearly_inert, k, pixel_noise=0.0).encoder,
            )
        ]
        bound = np.sin(principal_angles(*bases)[-1])
        # Random tasks, and the two that the bound is made of: the extreme directions of the change of projector.
        change = bases[1] @ bases[1].T - bases[0] @ bases[0].T
        values, extreme = np.linalg.eigh(change)
        tasks = np.hstack([rng.normal(size=(60, 200)), extreme[:, [0, -1]]])
        tasks /= np.linalg.norm(tasks, axis=0)
        r2_change = ((bases[1].T @ tasks) ** 2).sum(0) - ((bases[0].T @ tasks) ** 2).sum(0)
        assert abs(r2_change).max() <= bound + 1e-9
        np.testing.assert_allclose(abs(r2_change[-2:]), bound, atol=1e-9)  # attained
        assert values[-1] == pytest.approx(bound, abs=1e-9)
        # The same change through the curves of a task made of pixels.
        y = (oracles.train().x - oracles.train().x.mean(0)) @ problem.u / np.sqrt(problem.s) @ tasks[:, :1]
        moments = Moments.from_arrays(oracles.train().images, y)
        before, after = (
            ma.encoder_curves(moments, problem.u / np.sqrt(problem.s) @ basis, pixel_noise=0.0)[0].r2[-1]
            for basis in bases
        )
        assert after - before == pytest.approx(r2_change[0], abs=1e-9)


def test_10_hard_data_gives_no_nan_and_the_same_answer_in_other_types():
    """Constant and duplicated pixels, fewer images than pixels, float32 and 8-bit input."""
    x = np.round(40 * oracles.train().x + 128).clip(0, 255)
    x[:, 7], x[:, 20] = 3.0, x[:, 21]
    for n, rank, floor in ((400, 58, 0.0), (30, 60, 1 / 12)):
        y = oracles.train().y[:n]
        found = {}
        for dtype in (np.float64, np.float32, np.uint8):
            images = x[:n].reshape(-1, *SHAPE).astype(dtype)
            moments = Moments.from_arrays(images, y)
            found[dtype] = ma.sweep(moments, patch_sizes=[2], mask_ratios=[0.5, 1.0], pixel_noise=floor)
            assert found[dtype].attrs["rank"] == rank
            assert all(np.isfinite(array).all() for array in found[dtype].data_vars.values())
            assert np.isfinite(ma.denoising_autoencoder(moments, ma.PatchMasking(2, 0.5), 9, pixel_noise=floor).loss)
        exact = found[np.float64]
        np.testing.assert_allclose(found[np.uint8].r2, exact.r2, atol=1e-7)
        # float32 sums: what is known of a direction is rounding over its distance to the next one.
        error, gap = abs(found[np.float32].r2 - exact.r2), exact.eigengap
        assert float(error.where(gap > 1e-2).max()) < 1e-3
