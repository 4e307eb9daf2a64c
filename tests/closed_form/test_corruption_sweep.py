"""Any list of corruptions: against masking_sweep, against the definition, and across interruptions."""

from __future__ import annotations

import importlib
import math

import jax
import numpy as np
import pytest

import mae_align as ma
from mae_align.closed_form.factorize import factorize
from mae_align.closed_form.features import moments_features
from mae_align.corruption import CleanImages, Corruption, CorruptionMoments
from mae_align.moments.moments import Moments
from tests import oracles
from tests.oracles import SHAPE

sweep_module = importlib.import_module(
    "mae_align.closed_form.corruption_sweep"
)  # the package's attribute is the function
D = 60


def moments_of(sample: oracles.Sample, **options) -> Moments:
    return Moments.from_arrays(sample.images, sample.labels, num_classes=oracles.CLASSES, **options)


@pytest.fixture(scope="module")
def fit() -> Moments:
    return moments_of(oracles.train())


@pytest.fixture(scope="module")
def unseen() -> Moments:
    return moments_of(oracles.held_out(), groups=6)


@pytest.fixture(scope="module")
def direct() -> oracles.Stats:
    return oracles.stats(oracles.train().x, oracles.train().y)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_patch_masks_equal_masking_sweep(fit, unseen, ratio):
    swept = ma.masking_sweep(fit, [2, (3, 4)], [ratio], eval_moments=unseen).isel(mask_ratio=0)
    found = ma.corruption_sweep(fit, [ma.PatchMasking(2, ratio), ma.PatchMasking((3, 4), ratio)], eval_moments=unseen)
    for i in range(2):
        mine, fast = found.isel(corruption=i), swept.isel(patch_size=i)
        for name in ("r2", "alignment", "probe_mse", "eval_r2"):
            np.testing.assert_allclose(mine[name], fast[name], atol=1e-9, err_msg=name)
        np.testing.assert_allclose(mine.loss, fast.loss, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(mine.eigengap, fast.eigengap, atol=1e-8)
        np.testing.assert_allclose(mine.alignment_percent, fast.alignment_percent, atol=1e-7)
        for name in ("eval_r2_se", "eval_influence"):  # float32 inside
            np.testing.assert_allclose(mine[name], fast[name], atol=1e-6, err_msg=name)
        assert float(mine.keep) == pytest.approx(1 - ratio)
    for name in swept.attrs.keys() & found.attrs.keys() - {"masking"}:
        assert swept.attrs[name] == found.attrs[name], name
    assert found.r2.attrs == swept.r2.attrs


def test_a_fill_of_its_own_is_the_direct_eigenproblem(fit, direct):
    """Every mask with its probability: cov(x'), cov(x', x) over images and masks, from the definition."""
    masks, kept = oracles.enumerate_masks(SHAPE, (3, 3))
    x, mean = oracles.train().x, oracles.train().x.mean(0)
    weights = 0.4**kept * 0.6 ** (kept.max() - kept)
    all_filled = np.stack([np.where(mask > 0, x, 0.5) for mask in masks])
    center = weights @ all_filled.mean(1)
    moved = (all_filled - center) * np.sqrt(weights / len(x))[:, None, None]
    gram = np.einsum("mni,mnj->ij", moved, moved, optimize=True)
    cross = np.einsum("m,mni,nj->ij", weights / len(x), all_filled - center, x - mean, optimize=True)
    mu, v = oracles.top_directions(cross @ cross.T, gram)
    black = ma.PatchMasking((3, 3), 0.6, fill=0.5)
    found = ma.corruption_sweep(fit, {"filled": black, "mean": ma.PatchMasking((3, 3), 0.6)}, pixel_noise=0.0)
    np.testing.assert_allclose(found.r2.sel(corruption="filled"), oracles.r2_of(v, direct), atol=1e-8)
    np.testing.assert_allclose(found.loss.sel(corruption="filled"), np.trace(direct.sxx) - np.cumsum(mu), rtol=1e-9)
    assert np.abs(found.r2[0] - found.r2[1]).max() > 1e-3
    # The affine autoencoder attains its loss on the images, which needs the mean of the filled ones.
    model = ma.denoising_autoencoder(fit, black, 4, pixel_noise=0.0)
    np.testing.assert_allclose(model.mean_input, center, atol=1e-12)
    error = [
        ((model.reconstruct(f.reshape(-1, *SHAPE)) - oracles.train().images) ** 2).sum((1, 2, 3)) for f in all_filled
    ]
    assert model.loss == pytest.approx(sum(w * e.mean() for w, e in zip(weights, error, strict=True)), rel=1e-9)


def every_kind() -> dict[str, Corruption]:
    components = np.linalg.eigh(np.cov(oracles.train().x.T))[1]
    return {
        "blocks": ma.BlockMasking(2, (0.1, 0.3)),
        "pixels": ma.PixelMasking(np.full(SHAPE[:2], 0.5)),
        "listed": ma.MaskMixture(np.arange(60).reshape(2, 6, 5) % 3 > 0),
        "components": ma.ComponentMasking(components, 0.5),
        "share": ma.VarianceShareMasking(components, np.linspace(0.01, 1, 60), 0.6),
        "noise": ma.GaussianNoise(np.linspace(0, 2, 60).reshape(SHAPE)),
        "blur": ma.GaussianBlur(0.6),
        "pool": ma.AveragePool(2),
        "matrix": ma.LinearCorruption(np.random.default_rng(0).normal(size=(60, 60))),
        "both": ma.Compose(ma.GaussianBlur(0.6), ma.PatchMasking(2, 0.5, fill=0.0)),
        "sampled": ma.SampledCorruption(scaled, 4),
    }


def scaled(image: jax.Array, key: jax.Array) -> jax.Array:
    return image * jax.random.uniform(key, (), "float32", 0.5, 1.5)


def test_every_kind_of_corruption_is_swept_and_solved(fit, unseen, direct):
    kinds, images = every_kind(), oracles.train().images
    found = ma.corruption_sweep(fit, kinds, eval_moments=unseen, images=images, pixel_noise=0.0)
    assert found.corruption.values.tolist() == list(kinds)
    assert found.kind.values.tolist() == [type(c).__name__ for c in kinds.values()]
    pooled = int(found.num_features.sel(corruption="pool"))
    listed = int(found.num_features.sel(corruption="listed"))  # a third of the pixels is never kept
    assert (pooled, listed) == (18, 40)
    assert (found.num_features.drop_sel(corruption=["pool", "listed"]) == D).all()
    for curve in (found.r2, found.loss, found.eval_r2):
        assert curve.isnull().sum() == 2 * D - pooled - listed
    assert found.eval_influence.dims == ("corruption", "group", "k")
    estimated = found.corruption.isin(["share", "sampled"])
    assert ((found.gram_se > 0) == estimated).all() and ((found.cross_se > 0) == estimated).all()
    for name, corruption in kinds.items():
        clean = CleanImages(direct.sxx, oracles.train().x.mean(0), SHAPE, images=images)
        m = corruption.moments(clean)
        k = int(found.num_features.sel(corruption=name))
        basis = np.linalg.eigh(m.gram)[1][:, -k:]
        cross = basis.T @ m.cross
        mu, v = oracles.top_directions(cross @ cross.T, basis.T @ m.gram @ basis)
        row = found.sel(corruption=name).isel(k=slice(0, k))
        np.testing.assert_allclose(row.loss, np.trace(direct.sxx) - m.keep * np.cumsum(mu), rtol=1e-8, atol=1e-9)
        v = basis @ v
        np.testing.assert_allclose(row.r2[:10], oracles.r2_of(v[:, :10], direct), atol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            row.eval_r2[:10], oracles.predicted_r2(v[:, :10], oracles.train(), oracles.held_out()), atol=1e-6
        )
    pca = ma.gaussian_sweep(fit, [0.0], pixel_noise=0.0).r2[0]
    np.testing.assert_allclose(found.r2.sel(corruption="components"), pca, atol=1e-9)  # inert


def test_points_of_other_numbers_are_refused(fit, tmp_path):
    """As many images of the same shape: only what they hold tells them apart."""
    run, masks = ma.RunOptions(workers=1, store=tmp_path), [ma.PatchMasking(2, 0.5)]
    ma.corruption_sweep(fit, masks, run=run)
    labels = oracles.train().labels
    other = Moments.from_arrays(oracles.train().images, np.roll(labels, 1), num_classes=oracles.CLASSES)
    with pytest.raises(ma.InputError, match="points of another computation"):
        ma.corruption_sweep(other, masks, run=run)


def test_a_killed_sweep_goes_on_where_it_stopped(fit, tmp_path, monkeypatch):
    kinds, images = every_kind(), oracles.train().images
    run = ma.RunOptions(workers=1, store=tmp_path)
    solve, solved = sweep_module._solve, []

    def counted(*args):
        if len(solved) == 4:
            raise KeyboardInterrupt
        solved.append(args[-2])
        return solve(*args)

    monkeypatch.setattr(sweep_module, "_solve", counted)
    with pytest.raises(KeyboardInterrupt):
        ma.corruption_sweep(fit, kinds, images=images, run=run)
    monkeypatch.setattr(sweep_module, "_solve", lambda *args: solved.append(args[-2]) or solve(*args))
    assert len(list(tmp_path.glob("corruption-*.npz"))) >= 3
    again = ma.corruption_sweep(fit, kinds, images=images, run=run)
    assert len({id(c) for c in solved}) == len(kinds)
    assert len(solved) <= len(kinds) + 1  # the one in flight
    fresh = ma.corruption_sweep(fit, kinds, images=images)
    for name in fresh:
        np.testing.assert_array_equal(fresh[name], again[name])
    solved.clear()
    ma.corruption_sweep(fit, kinds, images=images, run=run)
    assert solved == []
    # The same name with other parameters, or other images for what looks at them, is solved anew.
    changed = kinds | {"blur": ma.GaussianBlur(0.61), "matrix": ma.LinearCorruption(np.eye(60))}
    ma.corruption_sweep(fit, changed, images=images[::-1], run=run)
    assert {type(c).__name__ for c in solved} == {"GaussianBlur", "LinearCorruption", "SampledCorruption"}
    with pytest.raises(ma.InputError, match="another computation"):
        ma.corruption_sweep(fit, kinds, images=images, max_k=3, run=run)


def test_workers_streams_and_names_do_not_change_the_numbers(fit):
    kinds, images = every_kind(), oracles.train().images
    one = ma.corruption_sweep(fit, kinds, images=images, max_k=5, run=ma.RunOptions(workers=1))
    many = ma.corruption_sweep(
        fit,
        list(kinds.values()),
        images=lambda: iter((images[:150], images[150:])),
        max_k=5,
        run=ma.RunOptions(workers=3),
    )
    assert many.corruption.values.tolist() == [c.name for c in kinds.values()]
    for name in one:
        np.testing.assert_allclose(one[name], many[name], rtol=1e-7, atol=1e-9)


def test_fewer_features_are_the_leading_ones_of_as_many(fit):
    kinds = {"mask": ma.PatchMasking(2, 0.5), "noise": ma.GaussianNoise(0.7), "pool": ma.AveragePool(2)}
    few, all_of_them = (ma.corruption_sweep(fit, kinds, max_k=k, pixel_noise=0.0) for k in (5, None))
    np.testing.assert_array_equal(few.num_features, [D, D, 18])
    np.testing.assert_array_equal(all_of_them.num_features, [D, D, 18])
    for name in few:
        np.testing.assert_allclose(few[name], all_of_them[name].isel(k=slice(0, 5)), rtol=1e-9, atol=1e-11)


def test_one_corruption_under_two_names_is_solved_once(fit, monkeypatch):
    solve, solved = sweep_module._solve, []
    monkeypatch.setattr(sweep_module, "_solve", lambda *args: solved.append(args[-2]) or solve(*args))
    found = ma.corruption_sweep(fit, {"a": ma.PatchMasking(2, 0.5), "b": ma.PatchMasking(2, 0.5)}, max_k=3)
    assert len(solved) == 1
    np.testing.assert_array_equal(found.r2[0], found.r2[1])


def test_8_bit_images_with_their_floor():
    sample = oracles.unbalanced_digits()
    fit = moments_of(sample)
    found = ma.corruption_sweep(
        fit,
        {"sampled": ma.SampledCorruption(scaled, 20), "fixed": ma.GaussianBlur(1.0)},
        images=sample.images,
        max_k=10,
    )
    assert found.attrs["pixel_noise"] == 1 / 12
    assert found.notnull().all().to_array().all()
    # Scaling all pixels by one random factor u: G = E u^2 S + var(u) mean mean^T, A = S.
    clean = CleanImages(fit.sxx + np.eye(64) / 12, fit.mean_x, (8, 8, 1))
    variance = 1 / 12
    stated = CorruptionMoments((1 + variance) * clean.sxx + variance * np.outer(fit.mean_x, fit.mean_x), clean.sxx, 1.0)
    problem = factorize(fit)
    exact = moments_features(problem, stated)
    np.testing.assert_allclose(found.loss.sel(corruption="sampled"), [exact.loss(k) for k in range(1, 11)], rtol=0.03)


@pytest.mark.parametrize(
    "corruptions, options, message",
    [
        ([], {}, "corruptions is empty"),
        ({}, {}, "corruptions is empty"),
        (ma.PatchMasking(2, 0.5), {}, "give a list of corruptions"),
        ([ma.PatchMasking], {}, "is not a corruption"),
        ({"mask": 0.5}, {}, "mask: 0.5 is not a corruption"),
        ([ma.PatchMasking(2, 0.5)] * 2, {}, r"two corruptions are called PatchMasking\(patch_size=2, ratio=0.5\)"),
        ([ma.PatchMasking(9, 0.5)], {}, "larger than the image"),
        ([ma.GaussianNoise(np.ones(3))], {}, "sigma has shape"),
        ([ma.SampledCorruption(scaled, 2)], {}, r"SampledCorruption.*pass the training images"),
        ([ma.Compose(ma.SampledCorruption(scaled, 2), ma.GaussianBlur(1.0))], {}, "pass the training images"),
        ([ma.PatchMasking(2, 0.5)], {"max_k": 0}, "k=0"),
        ([ma.PatchMasking(2, 0.5)], {"max_k": 61}, "k=61"),
        ([ma.PatchMasking(2, 0.5)], {"run": ma.RunOptions(workers=0)}, "workers=0"),
    ],
)
def test_bad_input_is_refused_before_any_work(fit, monkeypatch, corruptions, options, message):
    def never(*args, **more):
        raise AssertionError("work was done")

    monkeypatch.setattr(sweep_module, "factorize", never)
    with pytest.raises(ma.InputError, match=message):
        ma.corruption_sweep(fit, corruptions, **options)


def test_held_out_data_and_moments_that_do_not_fit_are_refused(fit, unseen):
    other = Moments.from_arrays(np.zeros((5, 2, 2, 1)), np.eye(5)[:, :4])
    with pytest.raises(ma.InputError, match="held-out images are"):
        ma.corruption_sweep(fit, [ma.PatchMasking(2, 0.5)], eval_moments=other)
    raw = moments_of(oracles.train(), center=False)
    with pytest.raises(ma.InputError, match="center=True"):
        ma.corruption_sweep(raw, [ma.PatchMasking(2, 0.5, fill=0.0)])
    plain = ma.corruption_sweep(raw, [ma.PatchMasking(2, 0.5)], pixel_noise=0.0).r2[0]
    swept = ma.masking_sweep(raw, [2], [0.5], pixel_noise=0.0).r2[0, 0]
    np.testing.assert_allclose(plain, swept, atol=1e-9)
    assert not math.isclose(float(plain[0]), 0.0)
