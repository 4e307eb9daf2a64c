from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.linear_model import LinearRegression

import mae_align as ma
from mae_align.closed_form.autoencoder import denoising_loss, supervised_loss
from mae_align.corruption import Corruption, CorruptionMoments
from mae_align.moments.moments import Moments
from mae_align.runtime.devices import compile_counter, solve_context
from tests import oracles
from tests.oracles import SHAPE

TASKS = 3  # rank of the centred one-hot targets


@pytest.fixture(scope="module")
def fit() -> Moments:
    return Moments.from_arrays(oracles.train().images, oracles.train().labels)


@pytest.fixture(scope="module")
def direct() -> oracles.Stats:
    return oracles.stats(oracles.train().x, oracles.train().y)


def sampled_loss(model: ma.LinearAutoencoder, lam: float) -> float:
    """Theorem 1's objective on the images themselves, through the methods a user calls."""
    sample = oracles.train()
    task = ((model.predict(sample.images) - sample.y) ** 2).sum(1).mean()
    pixels = ((model.reconstruct(sample.images) - sample.images) ** 2).sum((1, 2, 3)).mean()
    return task + lam * pixels


def minimise(value_and_grad, size: int, starts: int = 3) -> float:
    """The best of a few runs of L-BFGS from random points."""
    found = [
        scipy.optimize.minimize(
            value_and_grad,
            0.3 * np.random.default_rng(seed).normal(size=size),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 4000, "maxfun": 6000, "ftol": 1e-15, "gtol": 1e-9},
        ).fun
        for seed in range(starts)
    ]
    return min(found)


@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("lam", [0.003, 0.1, 5.0])
def test_supervised_loss_is_attained_on_the_images(fit, direct, lam, k):
    model = ma.supervised_autoencoder(fit, lam, k, pixel_noise=0.0)
    mu = oracles.solve(direct, SHAPE, lam=lam).mu
    assert model.loss == pytest.approx(np.trace(direct.syy) + lam * np.trace(direct.sxx) - mu[:k].sum(), rel=1e-10)
    assert sampled_loss(model, lam) == pytest.approx(model.loss, rel=1e-9)
    assert oracles.angles(model.encoder, oracles.solve(direct, SHAPE, lam=lam).v[:, :k], direct.sxx).max() < 1e-7
    with solve_context("float64"):
        parts = (model.encoder, model.head, model.decoder, lam, direct.sxx, direct.sxy, direct.syy)
        value, slopes = jax.value_and_grad(supervised_loss, argnums=(0, 1, 2))(*parts)
        assert float(value) == pytest.approx(model.loss, rel=1e-10)
        assert max(float(abs(np.asarray(slope)).max()) for slope in slopes) < 1e-9
    assert (model.rank, model.pixel_noise, model.image_shape, model.note) == (60, 0.0, SHAPE, "")


def test_gradient_descent_finds_the_supervised_minimum_and_nothing_lower(fit, direct):
    lam, k, (sxx, sxy) = 0.02, 4, (direct.sxx, direct.sxy)

    def objective(flat):
        v, w, z = np.split(flat, [60 * k, 60 * k + k * 4])
        v, w, z = v.reshape(60, k), w.reshape(k, 4), z.reshape(k, 60)
        gram, read = v.T @ sxx @ v, w @ w.T + lam * z @ z.T
        value = np.trace(direct.syy) + lam * np.trace(sxx) + np.trace(gram @ read)
        value -= 2 * np.trace(v.T @ sxy @ w.T) + 2 * lam * np.trace(v.T @ sxx @ z.T)
        slopes = (
            2 * (sxx @ v @ read - sxy @ w.T - lam * sxx @ z.T),
            2 * (gram @ w - v.T @ sxy),
            2 * lam * (gram @ z - v.T @ sxx),
        )
        return value, np.concatenate([slope.ravel() for slope in slopes])

    best = ma.supervised_autoencoder(fit, lam, k, pixel_noise=0.0).loss
    found = minimise(objective, 60 * k + k * 4 + k * 60)
    assert best - 1e-10 <= found <= best * (1 + 1e-6)


@pytest.mark.parametrize("k", [3, 7])
def test_lambda_zero_predicts_as_ordinary_least_squares(fit, direct, k):
    model, sample = ma.supervised_autoencoder(fit, 0.0, k, pixel_noise=0.0), oracles.train()
    ols = LinearRegression().fit(sample.x, sample.y)
    np.testing.assert_allclose(model.predict(sample.images), ols.predict(sample.x), atol=1e-9)
    np.testing.assert_allclose(model.predict(oracles.held_out().images), ols.predict(oracles.held_out().x), atol=1e-9)
    assert model.loss == pytest.approx(((sample.y - ols.predict(sample.x)) ** 2).sum(1).mean(), rel=1e-10)
    assert model.note.startswith("lam = 0 fixes only 3 features; the other 4" if k > TASKS else "")
    assert bool(model.note) == (k > TASKS)
    near = ma.supervised_autoencoder(fit, 1e-8, k, pixel_noise=0.0)
    assert oracles.angles(model.encoder, near.encoder, direct.sxx).max() < 1e-3


@pytest.mark.parametrize("k", [1, 2])
def test_lambda_zero_below_the_rank_is_reduced_rank_regression(fit, direct, k):
    model, sample = ma.supervised_autoencoder(fit, 0.0, k, pixel_noise=0.0), oracles.train()
    fitted = LinearRegression().fit(sample.x, sample.y).predict(sample.x) - sample.y.mean(0)
    left, size, right = np.linalg.svd(fitted, full_matrices=False)
    np.testing.assert_allclose(
        model.predict(sample.images), left[:, :k] * size[:k] @ right[:k] + sample.y.mean(0), atol=1e-9
    )
    assert model.note == ""


@pytest.mark.parametrize("k", [1, 9])
def test_lambda_infinity_is_pca(fit, direct, k):
    model = ma.supervised_autoencoder(fit, math.inf, k, pixel_noise=0.0)
    values, vectors = np.linalg.eigh(direct.sxx)
    assert oracles.angles(model.encoder, vectors[:, ::-1][:, :k], direct.sxx).max() < 1e-7
    assert model.loss == pytest.approx(values[: 60 - k].sum(), rel=1e-9)
    large = ma.supervised_autoencoder(fit, 1e9, k, pixel_noise=0.0)
    assert oracles.angles(model.encoder, large.encoder, direct.sxx).max() < 1e-4


def test_few_images_leave_the_tasks_what_they_are():
    """40 images of 60 pixels over a tiny floor: features beyond the three tasks follow the pixels, not rounding."""
    sample = oracles.draw(3, 40)
    moments = Moments.from_arrays(sample.images, sample.labels)
    model, near = (ma.supervised_autoencoder(moments, lam, 5) for lam in (0.0, 1e-7))
    assert "fixes only 3 features" in model.note
    centred = sample.x - sample.x.mean(0)
    cosines = np.linalg.svd(np.linalg.qr(centred @ model.encoder)[0].T @ np.linalg.qr(centred @ near.encoder)[0])[1]
    assert cosines.min() > 0.999


def test_uncentred_moments_fit_without_means(direct):
    sample = oracles.train()
    raw = Moments.from_arrays(sample.images, sample.labels, center=False)
    model = ma.supervised_autoencoder(raw, 0.0, 4, pixel_noise=0.0)
    ols = LinearRegression(fit_intercept=False).fit(sample.x, sample.y)
    np.testing.assert_allclose(model.predict(sample.images), ols.predict(sample.x), atol=1e-9)
    assert not model.mean_x.any() and not model.mean_y.any()


@pytest.mark.parametrize("patch, ratio", [((3, 5), 0.4), ((6, 3), 0.75), ((4, 2), 0.25)])
def test_denoising_loss_is_the_average_over_every_mask(fit, direct, patch, ratio):
    """All 2^N masks of the N patches, with their probabilities, applied to the images themselves."""
    model, sample = ma.denoising_autoencoder(fit, ma.PatchMasking(patch, ratio), 6, pixel_noise=0.0), oracles.train()
    masks, kept = oracles.enumerate_masks(SHAPE, patch)
    mean, expected = sample.x.mean(0), 0.0
    for mask, count in zip(masks, kept, strict=True):
        probability = (1 - ratio) ** count * ratio ** (kept.max() - count)
        masked = np.where(mask, sample.x, mean).reshape(-1, *SHAPE)
        expected += probability * ((model.reconstruct(masked) - sample.images) ** 2).sum((1, 2, 3)).mean()
    assert model.loss == pytest.approx(expected, rel=1e-10)
    # Theorem 3's objective and its gradient, from moments.
    keep, both = oracles.bernoulli(ratio)
    gram = direct.sxx * oracles.pair_matrix(SHAPE, patch, keep, both)
    with solve_context("float64"):
        stated = CorruptionMoments(gram / keep, direct.sxx, keep)
        value, slopes = jax.value_and_grad(denoising_loss, argnums=(0, 1))(
            model.encoder, model.decoder, direct.sxx, stated
        )
        assert float(value) == pytest.approx(model.loss, rel=1e-11)
        assert max(float(abs(np.asarray(slope)).max()) for slope in slopes) < 1e-9
    # The head is the probe on clean images.
    probe = LinearRegression().fit(model.encode(sample.images), sample.y)
    np.testing.assert_allclose(model.predict(sample.images), probe.predict(model.encode(sample.images)), atol=1e-9)
    with solve_context("float64"):
        off = denoising_loss(jnp.asarray(model.encoder), jnp.asarray(1.1 * model.decoder), direct.sxx, stated)
    shifted = [
        (1 - ratio) ** count
        * ratio ** (kept.max() - count)
        * (((np.where(mask, sample.x - mean, 0) @ model.encoder @ model.decoder) * 1.1 - sample.x + mean) ** 2)
        .sum(1)
        .mean()
        for mask, count in zip(masks, kept, strict=True)
    ]
    assert float(off) == pytest.approx(sum(shifted), rel=1e-10)  # away from the minimum too


def test_gradient_descent_finds_the_denoising_minimum_and_nothing_lower(fit, direct):
    k, mask = 4, ma.PatchMasking(2, 0.6)
    keep, both = oracles.bernoulli(0.6)
    gram, cross = direct.sxx * oracles.pair_matrix(SHAPE, 2, keep, both), keep * direct.sxx

    def objective(flat):
        v, z = flat[: 60 * k].reshape(60, k), flat[60 * k :].reshape(k, 60)
        inner = v.T @ gram @ v
        value = np.trace(direct.sxx) - 2 * np.trace(v.T @ cross @ z.T) + np.trace(inner @ z @ z.T)
        slopes = 2 * (gram @ v @ z @ z.T - cross @ z.T), 2 * (inner @ z - v.T @ cross)
        return value, np.concatenate([slope.ravel() for slope in slopes])

    best = ma.denoising_autoencoder(fit, mask, k, pixel_noise=0.0).loss
    assert best - 1e-9 <= minimise(objective, 120 * k) <= best * (1 + 1e-6)


@pytest.mark.parametrize(
    "corruption, chances",
    [
        (ma.FixedCountPatchMasking(2, 3), oracles.fixed_count(3, 9)),
        (ma.RandomRatioMasking((3, 4), 0.2, 0.9), oracles.uniform_ratio(0.2, 0.9)),
        (ma.PatchMasking(4, 0.99), oracles.bernoulli(0.99)),
    ],
)
def test_denoising_of_every_mask_is_the_direct_eigenproblem(fit, direct, corruption, chances):
    patch = corruption.patch_size
    expected = oracles.solve(direct, SHAPE, patch, chances)
    model = ma.denoising_autoencoder(fit, corruption, 60, pixel_noise=0.0)
    np.testing.assert_allclose(oracles.r2_of(model.encoder, direct), expected.r2, atol=1e-9)
    five = ma.denoising_autoencoder(fit, corruption, 5, pixel_noise=0.0)
    assert five.loss == pytest.approx(np.trace(direct.sxx) - expected.mu[:5].sum(), rel=1e-10)
    v, gram = five.encoder, direct.sxx * oracles.pair_matrix(SHAPE, patch, *chances)
    np.testing.assert_allclose(
        five.decoder, np.linalg.solve(v.T @ gram @ v, chances[0] * v.T @ direct.sxx), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("sigma", [0.5, np.linspace(0.1, 2.0, 60).reshape(SHAPE)])
def test_denoising_of_gaussian_noise(fit, direct, sigma):
    model = ma.denoising_autoencoder(fit, ma.GaussianNoise(sigma), 6, pixel_noise=0.0)
    gram = direct.sxx + np.diag(np.broadcast_to(np.square(sigma), SHAPE).reshape(-1))
    mu, v = oracles.top_directions(direct.sxx @ direct.sxx, gram)
    assert oracles.angles(model.encoder, v[:, :6], direct.sxx).max() < 1e-7
    assert model.loss == pytest.approx(np.trace(direct.sxx) - mu[:6].sum(), rel=1e-10)


def test_everything_masked_is_the_limit(fit, direct):
    model = ma.denoising_autoencoder(fit, ma.PatchMasking(2, 1.0), 5, pixel_noise=0.0)
    near = ma.denoising_autoencoder(fit, ma.PatchMasking(2, 1 - 1e-9), 5, pixel_noise=0.0)
    assert oracles.angles(model.encoder, near.encoder, direct.sxx).max() < 1e-6
    v, within = model.encoder, direct.sxx * oracles.pair_matrix(SHAPE, 2, 1.0, 0.0)
    np.testing.assert_allclose(model.decoder, np.linalg.solve(v.T @ within @ v, v.T @ direct.sxx), atol=1e-9)
    np.testing.assert_allclose(model.encoder @ model.decoder, near.encoder @ near.decoder, atol=1e-6)
    assert model.loss == pytest.approx(np.trace(direct.sxx), rel=1e-12)


class Rotated(Corruption):
    """Any linear map and any noise: the general path."""

    def __init__(self, linear: np.ndarray, noise: np.ndarray) -> None:
        self.linear, self.noise = linear, noise

    def moments(self, clean):
        sxx = clean.sxx
        return CorruptionMoments(self.linear @ sxx @ self.linear.T + self.noise, self.linear @ sxx, 1.0)

    def sample(self, key, images, fill):
        raise NotImplementedError


def test_any_corruption_with_moments_is_solved(fit, direct):
    rng = np.random.default_rng(3)
    linear, root = rng.normal(size=(60, 60)) / 8 + np.eye(60), rng.normal(size=(60, 60)) / 4
    model = ma.denoising_autoencoder(fit, Rotated(linear, root @ root.T), 5, pixel_noise=0.0)
    cross = linear @ direct.sxx
    mu, v = oracles.top_directions(cross @ cross.T, linear @ direct.sxx @ linear.T + root @ root.T)
    assert oracles.angles(model.encoder, v[:, :5], direct.sxx).max() < 1e-7
    assert model.loss == pytest.approx(np.trace(direct.sxx) - mu[:5].sum(), rel=1e-10)
    gram = linear @ direct.sxx @ linear.T + root @ root.T
    np.testing.assert_allclose(
        model.decoder,
        np.linalg.solve(model.encoder.T @ gram @ model.encoder, model.encoder.T @ cross),
        rtol=1e-7,
        atol=1e-9,
    )


def test_denoising_does_not_square_a_spectrum_of_nine_decades():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    x = rng.normal(size=(200, 16)) * np.logspace(0, -4.5, 16) @ u.T
    moments = Moments.from_arrays(x.reshape(200, 4, 4, 1), rng.normal(size=(200, 2)))
    gram = moments.sxx * oracles.pair_matrix((4, 4, 1), 2, 1.0, 0.5)
    exact, _ = oracles.extended_denoising(moments.sxx, gram, moments.sxy)
    naive = oracles.top_directions(moments.sxx @ moments.sxx, gram)[1]
    worst = 0.0
    for k in range(1, 16):
        model = ma.denoising_autoencoder(moments, ma.PatchMasking(2, 0.5), k, pixel_noise=0.0)
        expected = exact[:, :k].astype(float)
        assert oracles.angles(model.encoder, expected, moments.sxx).max() < 1e-4
        worst = max(worst, oracles.angles(naive[:, :k], expected, moments.sxx).max())
    assert worst > 1e-3  # ten times the bound above; how much more depends on the LAPACK


@pytest.mark.parametrize("n, pixel_noise, rank", [(300, None, 60), (30, None, 60), (30, 0.0, 29)])
def test_singular_moments_give_finite_autoencoders(n, pixel_noise, rank):
    x = oracles.draw(70, n).x.copy()
    x[:, 7], x[:, 20] = 3.0, x[:, 21]
    moments = Moments.from_arrays(x.reshape(n, *SHAPE), oracles.draw(70, n).labels)
    centred = x - x.mean(0)
    for model in (
        ma.denoising_autoencoder(moments, ma.PatchMasking(2, 0.5), 10, pixel_noise=pixel_noise),
        ma.denoising_autoencoder(moments, ma.PatchMasking(2, 1.0), 10, pixel_noise=pixel_noise),
        ma.supervised_autoencoder(moments, 0.1, 10, pixel_noise=pixel_noise),
        ma.supervised_autoencoder(moments, 0.0, 10, pixel_noise=pixel_noise),
    ):
        for leaf in jax.tree.leaves(model):
            assert np.isfinite(leaf).all()
        assert np.linalg.matrix_rank(centred @ model.encoder) == 10
        assert model.rank == rank


def test_8_bit_images_pass_through_every_method():
    sample = oracles.unbalanced_digits()
    model = ma.denoising_autoencoder(Moments.from_arrays(sample.images, sample.labels), ma.PatchMasking(2, 0.3), 20)
    assert model.pixel_noise == 1 / 12 and model.encode(sample.images).shape == (315, 20)
    as_float = sample.images.astype(float)
    np.testing.assert_array_equal(model.reconstruct(sample.images), model.reconstruct(as_float))
    np.testing.assert_allclose(model.encode(sample.images), (sample.x - sample.x.mean(0)) @ model.encoder, atol=1e-10)
    assert model.reconstruct(sample.images).shape == sample.images.shape
    assert model.predict(sample.images[:1]).shape == (1, 4)
    with pytest.raises(ma.InputError, match=r"shape \[315, 4, 16, 1\]: this encoder takes"):
        model.encode(sample.images.reshape(315, 4, 16, 1))


def test_an_autoencoder_is_a_pytree(fit):
    model = ma.supervised_autoencoder(fit, 0.1, 3)
    doubled = jax.tree.map(lambda a: 2 * a, model)
    assert isinstance(doubled, ma.LinearAutoencoder)
    np.testing.assert_array_equal(doubled.decoder, 2 * model.decoder)
    assert (doubled.rank, doubled.rtol, doubled.image_shape) == (model.rank, model.rtol, model.image_shape)
    for leaf in (model.encoder, model.head, model.decoder, model.mean_x, model.mean_y):
        assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float64


def test_another_lambda_ratio_or_k_compiles_nothing(fit):
    ma.supervised_autoencoder(fit, 1.0, 5)
    ma.denoising_autoencoder(fit, ma.PatchMasking(2, 0.5), 5)
    with compile_counter() as seen:
        for lam, k in ((0.3, 5), (0.0, 6), (math.inf, 60)):
            ma.supervised_autoencoder(fit, lam, k)
        for mask, k in ((ma.PatchMasking(4, 0.7), 5), (ma.FixedCountPatchMasking(2, 4), 6), (ma.GaussianNoise(1.0), 7)):
            ma.denoising_autoencoder(fit, mask, k)
    assert seen.names == []


def denoise(fit: Moments, corruption: Corruption, k: int = 3) -> ma.LinearAutoencoder:
    return ma.denoising_autoencoder(fit, corruption, k)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda fit: ma.supervised_autoencoder(fit, -1.0, 3), "give a weight of at least 0"),
        (lambda fit: ma.supervised_autoencoder(fit, math.nan, 3), "give a weight of at least 0"),
        (lambda fit: ma.supervised_autoencoder(fit, 1.0, 0), "k=0"),
        (lambda fit: ma.supervised_autoencoder(fit, 1.0, 61), "k=61"),
        (lambda fit: denoise(fit, ma.PatchMasking(2, 0.5), 0), "k=0"),
        (lambda fit: denoise(fit, ma.PatchMasking(2, 0.5), 61), "k=61"),
        (lambda fit: denoise(fit, ma.PatchMasking(2, 0.5), 2.5), "k=2.5"),  # pyright: ignore[reportArgumentType]
        (lambda fit: denoise(fit, ma.PatchMasking(7, 0.5)), "7x7 is larger than the image 6x5"),
        (lambda fit: denoise(fit, ma.FixedCountPatchMasking(2, 10)), "num_visible=10 but the image has 9 patches"),
        (lambda fit: denoise(fit, ma.GaussianNoise(np.ones((2, 2)))), r"sigma has shape \[2, 2\]"),
    ],
)
def test_bad_input_is_refused(fit, make, message):
    with pytest.raises(ma.InputError, match=message):
        make(fit)


@pytest.mark.parametrize("target", [None, ma.HighPass(0.2)])
def test_a_saved_autoencoder_is_the_same(fit, target, tmp_path):
    images = oracles.train().images[:7]
    for i, model in enumerate(
        (
            ma.supervised_autoencoder(fit, 0.5, 4, target=target),
            ma.denoising_autoencoder(fit, ma.PatchMasking(2, 0.5), 5, target=target),
            ma.supervised_autoencoder(fit, 0.0, 8),
        )
    ):
        model.save(tmp_path / f"{i}.npz")
        again = ma.LinearAutoencoder.load(tmp_path / f"{i}.npz")
        for name in ("encode", "reconstruct", "predict"):
            np.testing.assert_array_equal(getattr(again, name)(images), getattr(model, name)(images))
        about = ("loss", "rank", "pixel_noise", "rtol", "image_shape", "output_shape", "note")
        assert [getattr(again, name) for name in about] == [getattr(model, name) for name in about]
        assert jax.tree.structure(again) == jax.tree.structure(model)


def test_files_that_are_no_autoencoders_are_one_line(fit, tmp_path):
    ma.supervised_autoencoder(fit, 0.5, 4).save(tmp_path / "model.npz")
    fit.save(tmp_path / "moments.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "model.npz").read_bytes()[:-100])
    np.savez(tmp_path / "other.npz", encoder=np.zeros((2, 2)))
    for name, message in (
        ("moments", "holds moments, not linear autoencoder"),
        ("cut", "is damaged or cut off: make the linear autoencoder again"),
        ("other", "is not a file of linear autoencoder"),
        ("none", "there is no such file"),
    ):
        with pytest.raises(ma.InputError, match=message):
            ma.LinearAutoencoder.load(tmp_path / f"{name}.npz")
    with pytest.raises(ma.InputError, match="holds linear autoencoder, not moments"):
        Moments.load(tmp_path / "model.npz")
