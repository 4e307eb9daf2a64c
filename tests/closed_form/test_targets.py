"""Reconstructing W x: every sweep against the generalised eigenproblem from the definition, for every operator."""

from __future__ import annotations

import math

import numpy as np
import pytest

import mae_align as ma
from mae_align.closed_form.targets import Components, HighPass, MatrixTarget, PatchMeanRemoved, TargetOperator
from mae_align.moments.moments import Moments
from tests import oracles
from tests.oracles import SHAPE

D = 60


@pytest.fixture(scope="module")
def fit() -> Moments:
    return Moments.from_arrays(oracles.train().images, oracles.train().labels)


@pytest.fixture(scope="module")
def direct() -> oracles.Stats:
    return oracles.stats(oracles.train().x, oracles.train().y)


def patch_means(patch: oracles.Patch) -> np.ndarray:
    means = np.zeros((D, D))
    for members in oracles.patch_members(SHAPE, patch):
        means[np.ix_(members, members)] = 1 / len(members)
    return means


def blur(sigma: float) -> np.ndarray:
    """Gaussian weights of every pixel pair of one channel, rows normalised."""
    h, w, c = np.indices(SHAPE).reshape(3, -1)
    weight = np.exp(-((h[:, None] - h) ** 2 + (w[:, None] - w) ** 2) / (2 * sigma**2)) * (c[:, None] == c)
    return weight / weight.sum(1, keepdims=True)


def operators() -> dict[str, tuple[TargetOperator, np.ndarray]]:
    """Every operator and its matrix, made without the package."""
    sample = Moments.from_arrays(oracles.train().images, oracles.train().labels)
    vectors = np.linalg.eigh(np.cov(oracles.train().x.T, bias=True))[1][:, ::-1]
    matrix = np.random.default_rng(0).normal(size=(7, D))
    return {
        "high-pass": (HighPass(1.2), np.eye(D) - blur(1.2)),
        "top": (Components.top(sample, 4), vectors[:, :4].T),
        "bottom": (Components.bottom(sample, 9), vectors[:, -9:].T),
        "patch means": (PatchMeanRemoved((4, 3)), np.eye(D) - patch_means((4, 3))),
        "matrix": (MatrixTarget(matrix), matrix),
    }


OPERATORS = operators()
ALL = pytest.mark.parametrize("name", OPERATORS)


def solve(
    m: oracles.Stats,
    w: np.ndarray,
    patch: oracles.Patch,
    chances: tuple[float, float],
    sigma: float = 0.0,
    lam: float = math.inf,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mu, r2 and reconstruction error of W x over k: (lam A W^T W A^T + B B^T) v = mu G v."""
    keep, both = chances
    gram = (m.sxx + sigma**2 * np.eye(D)) * oracles.pair_matrix(SHAPE, patch, keep, both)
    cross, task = keep * m.sxx @ w.T, keep * m.sxy
    weight = cross @ cross.T if math.isinf(lam) else lam * cross @ cross.T + task @ task.T
    mu, v = oracles.top_directions(weight, gram)
    told = np.cumsum((oracles.targets_of(v, m.sxx, m.sxx @ w.T) ** 2).sum(1))
    return mu, oracles.r2_of(v, m), np.trace(w @ m.sxx @ w.T) - told


def identified(mu: np.ndarray, least: float = 1e-6) -> np.ndarray:
    """Where mu_k > mu_{k+1} by enough for the span to be compared (operators of low rank leave a null space)."""
    return (mu - np.append(mu[1:], 0)) / mu[0] > least


@ALL
def test_operators_are_their_matrices(name):
    operator, w = OPERATORS[name]
    x = oracles.train().x[:20]
    out = operator.apply(x.reshape(20, *SHAPE))
    expected = x @ w.T
    if isinstance(operator, Components):  # known up to a sign
        out, expected = np.abs(out), np.abs(expected)
    np.testing.assert_allclose(out, expected, atol=1e-9)
    assert operator.name.startswith(type(operator).__name__)


@ALL
@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_masking_sweep_is_the_direct_eigenproblem(fit, direct, name, ratio):
    operator, w = OPERATORS[name]
    found = ma.masking_sweep(fit, [(2, 3)], [ratio], pixel_noise=0.0, target=operator).isel(patch_size=0, mask_ratio=0)
    mu, r2, _ = solve(direct, w, (2, 3), oracles.bernoulli(ratio))
    sure = identified(mu)
    assert sure.sum() >= 3
    np.testing.assert_allclose(found.r2.values[sure], r2[sure], atol=1e-7)
    keep = 1 - ratio
    total = np.trace(w @ direct.sxx @ w.T)
    np.testing.assert_allclose(found.loss, total - (keep > 0) * np.cumsum(mu), atol=1e-9 * total)
    assert found.attrs["target"] == operator.name


@ALL
def test_noise_and_lambda_are_the_direct_eigenproblem(fit, direct, name):
    operator, w = OPERATORS[name]
    lambdas = [0.002, 0.5, math.inf]
    total = np.trace(w @ direct.sxx @ w.T)
    found = ma.sweep(
        fit,
        patch_sizes=[2],
        mask_ratios=[0.0, 0.5],
        noise_levels=[0.0, 0.8],
        lambdas=lambdas,
        pixel_noise=0.0,
        target=operator,
    )
    for i, ratio in enumerate((0.0, 0.5)):
        for j, sigma in enumerate((0.0, 0.8)):
            for n, lam in enumerate(lambdas):
                cell = found.isel(patch_size=0, mask_ratio=i, noise_level=j, lam=n)
                mu, r2, error = solve(direct, w, 2, oracles.bernoulli(ratio), sigma, lam)
                sure = identified(mu)
                assert sure.sum() >= 3
                np.testing.assert_allclose(cell.r2.values[sure], r2[sure], atol=1e-7)
                np.testing.assert_allclose(cell.reconstruction_mse.values[sure], error[sure], atol=1e-7 * error.max())
                start = total if math.isinf(lam) else np.trace(direct.syy) + lam * total
                np.testing.assert_allclose(cell.loss, start - np.cumsum(mu), atol=1e-9 * start)
    np.testing.assert_allclose(found.lam_relative[:2], np.array(lambdas[:2]) * total / np.trace(direct.syy))


def test_slices_pass_the_operator_on(fit, direct):
    operator, w = OPERATORS["high-pass"]
    by_lambda = ma.lambda_sweep(fit, [0.1], pixel_noise=0.0, target=operator)
    np.testing.assert_allclose(by_lambda.r2[0], solve(direct, w, 1, (1.0, 1.0), lam=0.1)[1], atol=1e-8)
    by_noise = ma.gaussian_sweep(fit, [0.0, 3.0], pixel_noise=0.0, target=operator)
    for sigma, row in zip((0.0, 3.0), by_noise.r2.values, strict=True):
        mu, r2, _ = solve(direct, w, 1, (1.0, 1.0), sigma=sigma)
        sure = identified(mu)
        np.testing.assert_allclose(row[sure], r2[sure], atol=1e-7)
    # Noise that is isotropic in pixels is not in W x: the corollary holds for the image only.
    assert np.abs(by_noise.r2[0] - by_noise.r2[1]).max() > 1e-3


@ALL
def test_the_general_path_agrees(fit, name):
    operator, _ = OPERATORS[name]
    swept = ma.masking_sweep(fit, [2], [0.5], target=operator).isel(patch_size=0, mask_ratio=0)
    found = ma.corruption_sweep(fit, [ma.PatchMasking(2, 0.5)], target=operator).isel(corruption=0)
    k = int(found.num_features)
    assert k == min(len(operator.apply(np.zeros((1, *SHAPE)))[0]), np.linalg.matrix_rank(OPERATORS[name][1]))
    sure = np.append(swept.eigengap.values[: k - 1] > 1e-6, True)
    np.testing.assert_allclose(found.r2.values[:k][sure], swept.r2.values[:k][sure], atol=1e-8)
    np.testing.assert_allclose(found.loss.values[:k], swept.loss.values[:k], rtol=1e-9)
    assert np.isnan(found.r2.values[k:]).all()


@ALL
def test_autoencoders_attain_their_loss_on_the_images(fit, name):
    operator, _ = OPERATORS[name]
    sample = oracles.train()
    wanted = operator.apply(sample.images.astype(np.float64))
    model = ma.supervised_autoencoder(fit, 0.2, 3, pixel_noise=0.0, target=operator)
    assert model.reconstruct(sample.images).shape == (len(sample.images), *model.output_shape) == wanted.shape
    task = ((model.predict(sample.images) - sample.y) ** 2).sum(1).mean()
    pixels = ((model.reconstruct(sample.images) - wanted) ** 2).sum(1).mean()
    assert model.loss == pytest.approx(task + 0.2 * pixels, rel=1e-9)
    model = ma.denoising_autoencoder(fit, ma.PatchMasking((3, 5), 0.4), 3, pixel_noise=0.0, target=operator)
    masks, kept = oracles.enumerate_masks(SHAPE, (3, 5))
    expected = 0.0
    for mask, count in zip(masks, kept, strict=True):
        masked = np.where(mask, sample.x, sample.x.mean(0)).reshape(-1, *SHAPE)
        chance = 0.6**count * 0.4 ** (kept.max() - count)
        expected += chance * ((model.reconstruct(masked) - wanted) ** 2).sum(1).mean()
    assert model.loss == pytest.approx(expected, rel=1e-9)


def test_bottom_components_vary():
    """Constant pixels are no components."""
    x = oracles.draw(3, 100).x.copy()
    x[:, :5] = 1.0
    bottom = Components.bottom(Moments.from_arrays(x.reshape(-1, *SHAPE), x[:, 9]), 3)
    assert np.abs(bottom.components[:5]).max() < 1e-10


def test_the_identity_changes_nothing(fit):
    plain = ma.sweep(fit, patch_sizes=[2], mask_ratios=[0.3], lambdas=[0.1, math.inf])
    same = ma.sweep(fit, patch_sizes=[2], mask_ratios=[0.3], lambdas=[0.1, math.inf], target=MatrixTarget(np.eye(D)))
    for name in ("r2", "loss", "reconstruction_mse"):
        np.testing.assert_allclose(plain[name], same[name], rtol=1e-9, atol=1e-9)
    assert plain.attrs["target"] == "image" and same.attrs["target_identity"] != ""


def test_a_stored_sweep_of_another_operator_is_refused(fit, tmp_path):
    run = ma.RunOptions(workers=1, store=tmp_path)
    matrix = np.random.default_rng(1).normal(size=(3, D))
    ma.masking_sweep(fit, [2], [0.5], max_k=4, target=MatrixTarget(matrix), run=run)
    for other in (None, HighPass(1.0), MatrixTarget(matrix + 1e-9)):
        with pytest.raises(ma.InputError, match="another computation"):
            ma.masking_sweep(fit, [2], [0.5], max_k=4, target=other, run=run)


class Wrong(TargetOperator):
    def apply(self, images):
        return images


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda fit: HighPass(-1.0), "positive"),
        (lambda fit: PatchMeanRemoved(0), "positive integer"),
        (lambda fit: MatrixTarget(np.ones(3)), "give finite numbers"),
        (lambda fit: Components(np.ones((4, 2))), "orthonormal"),
        (lambda fit: Components.top(fit, 0), "count=0"),
        (lambda fit: Components.bottom(fit, 61), "vary along 60 components"),
        (lambda fit: ma.masking_sweep(fit, [2], [0.5], target=PatchMeanRemoved(9)), "9x9 is larger than the image"),
        (lambda fit: ma.masking_sweep(fit, [2], [0.5], target=MatrixTarget(np.eye(4))), "matrix for 4 pixel values"),
        (lambda fit: ma.masking_sweep(fit, [2], [0.5], target=Components(np.eye(4))), "components of 4 pixel values"),
        (lambda fit: ma.masking_sweep(fit, [2], [0.5], target=PatchMeanRemoved(1)), None),
        (lambda fit: ma.masking_sweep(fit, [2], [0.5], target=MatrixTarget(np.zeros((1, D)))), "leaves nothing"),
        (lambda fit: ma.masking_sweep(fit, [2], [0.5], target=Wrong()), r"must give finite numbers \[m, p\]"),
    ],
)
def test_bad_operators_are_refused(fit, make, message):
    if message is None:  # two channels: removing the mean over both leaves their difference
        assert make(fit).r2.notnull().all()
        return
    with pytest.raises(ma.InputError, match=message):
        make(fit)
