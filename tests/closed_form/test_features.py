"""Features of any corruption against the generalised eigenproblem of the definition, singular moments included."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import mae_align as ma
from mae_align.closed_form.compare import principal_angles
from mae_align.closed_form.factorize import PrimalProblem, factorize
from mae_align.closed_form.features import (
    clean_images,
    corruption_features,
    feature_basis,
    moments_features,
    nested_basis,
)
from mae_align.corruption import Corruption, CorruptionMoments
from mae_align.moments.moments import Moments
from tests import oracles
from tests.oracles import SHAPE


@pytest.fixture(scope="module")
def problem() -> PrimalProblem:
    return factorize(Moments.from_arrays(oracles.train().images, oracles.train().labels), pixel_noise=0.0)


@pytest.fixture(scope="module")
def direct() -> oracles.Stats:
    return oracles.stats(oracles.train().x, oracles.train().y)


def stated(problem: PrimalProblem, linear: np.ndarray, noise: np.ndarray, keep: float = 1.0) -> CorruptionMoments:
    """x' = linear x + noise, up to ``keep``."""
    return CorruptionMoments(linear @ problem.sxx @ linear.T + noise, linear @ problem.sxx, keep)


def test_features_solve_the_generalised_eigenproblem_at_every_k(problem, direct):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(60, 60)) / 4
    moments = stated(problem, rng.normal(size=(60, 60)) / 8 + np.eye(60), root @ root.T, 0.4)
    found = moments_features(problem, moments)
    mu, v = oracles.top_directions(moments.cross @ moments.cross.T, moments.gram)
    np.testing.assert_allclose(found.mu, mu, rtol=1e-8, atol=1e-10 * mu[0])
    np.testing.assert_allclose(found.gap, 1 - np.append(mu[1:], 0) / mu, atol=1e-6)
    np.testing.assert_allclose(found.encoder.T @ moments.gram @ found.encoder, np.eye(60), atol=1e-9)
    np.testing.assert_allclose(found.decoder, found.encoder.T @ moments.cross, atol=1e-9)
    np.testing.assert_allclose(
        np.cumsum(((found.q.T @ problem.t0) ** 2).sum(1)) / np.trace(direct.syy), oracles.r2_of(v, direct), atol=1e-9
    )
    for k in (1, 7, 60):
        assert found.loss(k) == pytest.approx(np.trace(direct.sxx) - 0.4 * mu[:k].sum(), rel=1e-9)
        # The nested basis spans the first k features of clean images.
        inside = found.q[:, :k] @ (found.q[:, :k].T @ problem.root.T @ found.encoder[:, :k])
        np.testing.assert_allclose(inside, problem.root.T @ found.encoder[:, :k], atol=1e-10)


def test_a_mask_is_solved_as_by_the_factorised_sweep(problem):
    fit = Moments.from_arrays(oracles.train().images, oracles.train().labels)
    swept = ma.masking_sweep(fit, [(3, 4)], [0.6], pixel_noise=0.0).isel(patch_size=0, mask_ratio=0)
    found = corruption_features(problem, ma.PatchMasking((3, 4), 0.6))
    r2 = np.cumsum(((found.q.T @ problem.t0) ** 2).sum(1)) / np.trace(problem.syy)
    np.testing.assert_allclose(r2, swept.r2, atol=1e-10)
    np.testing.assert_allclose([found.loss(k) for k in swept.k.values], swept.loss, rtol=1e-11)
    assert found.keep == pytest.approx(0.4)


@pytest.mark.parametrize("rank", [3, 20])
def test_a_singular_corruption_gives_as_many_features_as_survive(problem, direct, rank):
    """G = B S B^T of low rank: the pseudo-inverse takes the place of the Cholesky factor."""
    rng = np.random.default_rng(rank)
    linear = rng.normal(size=(60, rank)) @ rng.normal(size=(rank, 60)) / 8
    moments = stated(problem, linear, np.zeros((60, 60)))
    found = moments_features(problem, moments)
    assert found.encoder.shape == (60, rank) and np.isfinite(found.decoder).all()
    # On the range of B, x' = B x loses nothing of B x: the error is that of regressing x on k directions of it.
    inside = scipy.linalg.orth(linear)
    mu, v = oracles.top_directions(
        inside.T @ moments.cross @ moments.cross.T @ inside, inside.T @ moments.gram @ inside
    )
    np.testing.assert_allclose(found.mu, mu, rtol=1e-7)
    assert oracles.angles(found.encoder[:, :2], inside @ v[:, :2], direct.sxx).max() < 1e-6


def test_cholesky_and_eigendecomposition_agree_on_either_side_of_the_cutoff(problem):
    """A direction of G just above and just below the relative cutoff."""
    values, vectors = np.linalg.eigh(problem.sxx)
    found = []
    for size in (0.5, 20.0):
        noise = np.outer(vectors[:, 0], vectors[:, 0]) * (size * problem.rtol * values[-1] - values[0])
        found.append(
            moments_features(
                problem,
                CorruptionMoments(
                    problem.sxx + noise, problem.sxx - values[0] * np.outer(vectors[:, 0], vectors[:, 0]), 1.0
                ),
            )
        )
    a, b = found
    assert len(a.mu) == len(b.mu) == 59
    np.testing.assert_allclose(a.mu[:50], b.mu[:50], rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(a.q[:, :5] * b.q[:, :5], axis=0)), 1.0, atol=1e-9)


def test_features_that_clean_images_never_show_add_nothing():
    """Pixels 2 and 3 are constant; the corruption copies pixel 0 into pixel 2."""
    x = np.random.default_rng(0).normal(size=(80, 4))
    x[:, 2:] = 0.0
    y = np.stack([x[:, 0], x[:, 1]], 1)
    problem = factorize(Moments.from_arrays(x.reshape(80, 2, 2, 1), y), pixel_noise=0.0)
    linear = np.zeros((4, 4))
    linear[2, 0], linear[1, 1] = 3.0, 0.1
    found = moments_features(problem, stated(problem, linear, np.zeros((4, 4))))
    assert found.q.shape == (2, 2)
    r2 = np.cumsum(((found.q.T @ problem.t0) ** 2).sum(1)) / np.trace(problem.syy)
    share = x[:, 1].var() / (x[:, 0].var() + x[:, 1].var())
    first = int(found.encoder[1, 0] != 0 and abs(found.encoder[1, 0]) > 1e-9)
    expected = [share, share] if first else [0.0, share]
    correlation = np.corrcoef(x[:, 0], x[:, 1])[0, 1]
    np.testing.assert_allclose(r2, expected, atol=correlation**2 + 1e-12)


class Lost(Corruption):
    def moments(self, clean):
        return CorruptionMoments(np.eye(len(clean.sxx)), np.zeros_like(clean.sxx), 1.0)

    def sample(self, key, images, fill):
        raise NotImplementedError


def test_a_corruption_that_leaves_nothing_is_refused(problem):
    with pytest.raises(ma.InputError, match="leaves nothing of these images"):
        corruption_features(problem, Lost())


def test_more_features_than_survive_are_refused():
    fit = Moments.from_arrays(oracles.train().images, oracles.train().labels)

    class Half(Lost):
        def moments(self, clean):
            half = np.diag((np.arange(60) < 20).astype(float))
            return CorruptionMoments(half @ clean.sxx @ half, half @ clean.sxx, 1.0)

    assert ma.denoising_autoencoder(fit, Half(), 20).encoder.shape == (60, 20)
    with pytest.raises(ma.InputError, match="k=21: only 20 features of these images survive"):
        ma.denoising_autoencoder(fit, Half(), 21)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 7))
def test_a_nested_basis_spans_every_prefix(seed, r, m):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(r, m)) * 10.0 ** rng.integers(-6, 7, m)
    repeat = rng.integers(0, m)
    features[:, repeat] = 2.0 * features[:, 0] if repeat else 0.0
    q = nested_basis(features, 1e-10)
    real = np.linalg.norm(q, axis=0) > 0
    np.testing.assert_allclose(q[:, real].T @ q[:, real], np.eye(real.sum()), atol=1e-12)
    for k in range(1, m + 1):
        span = features[:, :k] / np.maximum(np.linalg.norm(features[:, :k], axis=0), 1e-300)
        assert real[:k].sum() == np.linalg.matrix_rank(span, tol=1e-9)
        np.testing.assert_allclose(q[:, :k] @ (q[:, :k].T @ span), span, atol=1e-8)


def test_features_that_clean_images_show_by_rounding_alone_are_none():
    # A rotation moves all variance out of the space of the clean images: nothing is left to probe.
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    x = (rng.normal(size=(200, 4)) @ axes[:, :4].T).reshape(200, 2, 4, 1)
    rotation = axes[:, 4:] @ axes[:, :4].T + axes[:, :4] @ axes[:, 4:].T
    moments = ma.Moments.from_arrays(x, x.reshape(200, 8)[:, :2])
    found = ma.corruption_sweep(moments, [ma.LinearCorruption(rotation)], pixel_noise=0.0)
    assert (found.r2.fillna(0.0) < 1e-9).all()


CHEAP = {
    "mask": ma.PatchMasking(2, 0.5),
    "exact count": ma.FixedCountPatchMasking.from_ratio(2, 0.5, SHAPE),
    "random ratio": ma.RandomRatioMasking.from_ratio(2, 0.5, SHAPE),
    "all masked": ma.PatchMasking(2, 1.0),
    "single pixels": ma.PatchMasking(1, 0.8),
    "nothing masked": ma.PatchMasking(2, 0.0),
    "isotropic noise": ma.GaussianNoise(0.7),
    "noise as an array": ma.GaussianNoise(np.full(SHAPE, 0.7)),
}


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("case", ["regular", "singular"])
def test_cheap_corruptions_have_the_features_of_the_general_path(name, case):
    """Masks of patches and isotropic noise take a short way; it ends where the general one does."""
    images = oracles.train().images.astype(np.float64)
    if case == "singular":  # repeated pixels, and fewer images than pixels
        images = np.repeat(images[:40, ::2], 2, axis=1)
    moments = Moments.from_arrays(images, np.arange(len(images)) % 3)
    noise = 0.0 if case == "singular" else None
    problem = factorize(moments, pixel_noise=noise)
    corrupted = CHEAP[name].moments(clean_images(problem))
    cheap, general = corruption_features(problem, CHEAP[name]), moments_features(problem, corrupted)
    most = min(len(cheap.mu), len(general.mu), 15)
    for k in (1, 3, most):
        if general.gap[k - 1] > 1e-6:
            ours, theirs = (f.q[:, :k] @ f.q[:, :k].T for f in (cheap, general))
            np.testing.assert_allclose(ours, theirs, atol=1e-7)
            ours, theirs = (f.encoder[:, :k] @ f.decoder[:k] for f in (cheap, general))
            np.testing.assert_allclose(ours, theirs, atol=1e-7)
        assert cheap.loss(k) == pytest.approx(general.loss(k), rel=1e-9)
    np.testing.assert_allclose(cheap.mu[:most], general.mu[:most], rtol=1e-7)
    size = cheap.encoder.T @ corrupted.gram @ cheap.encoder
    np.testing.assert_allclose(size, np.eye(len(size)), atol=1e-7)
    few = corruption_features(problem, CHEAP[name], max_k=3)
    np.testing.assert_allclose(few.encoder, cheap.encoder[:, :3], atol=1e-12)
    np.testing.assert_allclose(few.gap, cheap.gap[:3], atol=1e-12)


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
