from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
import xarray as xr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import mae_align as ma
from mae_align.closed_form import factorize, point
from mae_align.moments.moments import Moments
from mae_align.runtime import files as store
from mae_align.runtime import pool as runner
from mae_align.runtime.devices import compile_counter
from tests import oracles
from tests.oracles import SHAPE

PATCHES = [1, 2, 4, (3, 4), (2, 5)]
RATIOS = [0.0, 0.3, 0.75, 0.99, 1.0]
CELLS = [(i, j) for i in range(len(PATCHES)) for j in range(len(RATIOS))]
ALONE = ma.RunOptions(workers=1)
sweep_module = importlib.import_module("mae_align.closed_form.sweep")


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


@pytest.fixture(scope="module")
def masks(fit) -> xr.Dataset:
    return ma.masking_sweep(fit, PATCHES, RATIOS, pixel_noise=0.0)


@pytest.fixture(scope="module")
def joint(fit, unseen) -> xr.Dataset:
    return ma.sweep(
        fit,
        patch_sizes=[2, (3, 4)],
        mask_ratios=[0.0, 0.5, 1.0],
        noise_levels=[0.0, 0.7],
        lambdas=[0.0, 0.002, 0.1, math.inf],
        eval_moments=unseen,
        pixel_noise=0.0,
    )


# --- against direct solutions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("i, j", CELLS)
def test_masking_is_the_direct_eigenproblem_at_every_k(masks, direct, i, j):
    found = masks.isel(patch_size=i, mask_ratio=j)
    expected = oracles.solve(direct, SHAPE, PATCHES[i], oracles.bernoulli(RATIOS[j]))
    np.testing.assert_allclose(found.r2, expected.r2, atol=1e-9)
    np.testing.assert_allclose(found.alignment, expected.alignment, atol=1e-9)
    np.testing.assert_allclose(found.probe_mse, np.trace(direct.syy) * (1 - expected.r2), atol=1e-9)
    keep = 1 - RATIOS[j] if RATIOS[j] < 1 else 0.0
    mu = expected.mu if RATIOS[j] < 1 else 0 * expected.mu  # everything masked: nothing is reconstructed
    np.testing.assert_allclose(found.loss, np.trace(direct.sxx) - np.cumsum(mu), rtol=1e-9, atol=1e-10)
    gap = 1 - np.append(expected.mu[1:], 0) / expected.mu
    np.testing.assert_allclose(found.eigengap, gap, atol=1e-8)
    assert float(found.realized_ratio) == pytest.approx(1 - keep)


@pytest.mark.parametrize("i, j", [(i, j) for i, j in CELLS if 0 < RATIOS[j] < 1])
def test_joint_embedding_is_the_direct_problem_of_two_views(masks, direct, i, j):
    """E[x1 x2^T] v = omega E[x1 x1^T] v, where omega does not tie (an oversized patch ties directions exactly)."""
    expected = oracles.solve(direct, SHAPE, PATCHES[i], oracles.bernoulli(RATIOS[j]), contrast=True)
    apart = np.append(-np.diff(expected.mu), 1.0) > 1e-7 * expected.mu[0]
    assert apart.sum() > 40
    np.testing.assert_allclose(masks.je_r2.values[i][apart], expected.r2[apart], atol=1e-9)


def test_everything_masked_is_the_limit(fit, masks):
    near = ma.masking_sweep(fit, PATCHES, [1 - 1e-9], pixel_noise=0.0)
    for name in ("r2", "alignment", "probe_mse", "eigengap"):
        np.testing.assert_allclose(near[name].isel(mask_ratio=0), masks[name].sel(mask_ratio=1.0), atol=1e-6)


def test_a_patch_as_large_as_the_image_is_pca_exactly(fit, unseen):
    found = ma.masking_sweep(fit, [2, (6, 5)], [0.0, 0.4, 1.0], eval_moments=unseen)
    pca = found.isel(patch_size=0).sel(mask_ratio=0.0)
    for name in ("r2", "alignment", "probe_mse", "eigengap", "eval_r2", "eval_r2_se", "eval_influence"):
        for ratio in (0.0, 0.4, 1.0):
            np.testing.assert_array_equal(found[name].isel(patch_size=1).sel(mask_ratio=ratio), pca[name])
    assert (found.p_eff.isel(patch_size=1) == 0).all() and (found.condition.isel(patch_size=1) == 1).all()
    # The encoder is PCA's, but a lost image is not reconstructed: loss = tr S - keep * sum of eigenvalues.
    explained = np.trace(fit.sxx) + 60 * found.attrs["pixel_noise"] - pca.loss
    whole = found.loss.isel(patch_size=1)
    np.testing.assert_allclose(whole.sel(mask_ratio=0.4), pca.loss + 0.4 * explained, rtol=1e-9)
    assert found.je_r2.isel(patch_size=1).isnull().all() and found.je_r2.isel(patch_size=0).notnull().all()


@pytest.mark.parametrize("a, sigma", list(enumerate([0.0, 0.7])))
@pytest.mark.parametrize("j, p", list(enumerate([0.0, 0.5, 1.0])))
@pytest.mark.parametrize("i, patch", list(enumerate([2, (3, 4)])))
def test_joint_grid_is_the_direct_eigenproblem(joint, direct, i, patch, a, sigma, j, p):
    for b, lam in enumerate(joint.lam.values):
        if lam == 0:
            continue
        found = joint.isel(patch_size=i, noise_level=a, mask_ratio=j, lam=b)
        expected = oracles.solve(direct, SHAPE, patch, oracles.bernoulli(p), sigma=sigma, lam=lam)
        np.testing.assert_allclose(found.r2, expected.r2, atol=1e-9)
        np.testing.assert_allclose(found.alignment, expected.alignment, atol=1e-9)
        np.testing.assert_allclose(found.reconstruction_mse, expected.reconstruction, atol=1e-8)
        if p < 1:
            start = np.trace(direct.sxx) * (1 if math.isinf(lam) else lam) + (lam < math.inf) * np.trace(direct.syy)
            np.testing.assert_allclose(found.loss, start - np.cumsum(expected.mu), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("b, lam", list(enumerate([0.0, 0.002, 0.1, math.inf])))
def test_held_out_r2_of_the_joint_grid_is_real_predictions(joint, direct, b, lam):
    for i, a, j, patch, sigma, p in ((0, 0, 1, 2, 0.0, 0.5), (1, 1, 2, (3, 4), 0.7, 1.0), (1, 0, 0, 1, 0.0, 0.0)):
        weight = lam or 1e-7
        v = oracles.solve(direct, SHAPE, patch, oracles.bernoulli(p), sigma=sigma, lam=weight).v
        predicted = oracles.predicted_r2(v, oracles.train(), oracles.held_out())
        found = joint.eval_r2.isel(patch_size=i, noise_level=a, mask_ratio=j, lam=b)
        np.testing.assert_allclose(found, predicted, atol=1e-9 if lam else 1e-4)


@pytest.mark.parametrize("j, p", list(enumerate([0.0, 0.5, 1.0])))
def test_lambda_zero_is_the_limit_of_small_lambda(joint, direct, j, p):
    """Exactly: supervised directions first, then reconstruction within what they leave (in the metric of G)."""
    keep, both = oracles.bernoulli(p)
    gram = (direct.sxx + 0.49 * np.eye(60)) * oracles.pair_matrix(SHAPE, 2, keep, both)
    lower = np.linalg.cholesky(gram)
    task, pixels = np.linalg.solve(lower, keep * direct.sxy), np.linalg.solve(lower, keep * direct.sxx)
    left = np.linalg.svd(task)[0]
    rest = left[:, 3:] @ np.linalg.svd(left[:, 3:].T @ pixels)[0]
    v = np.linalg.solve(lower.T, np.hstack([left[:, :3], rest]))
    found = joint.isel(patch_size=0, noise_level=1, mask_ratio=j, lam=0)
    np.testing.assert_allclose(found.r2, oracles.r2_of(v, direct), atol=1e-9)
    near = oracles.solve(direct, SHAPE, 2, oracles.bernoulli(p), sigma=0.7, lam=1e-8)
    np.testing.assert_allclose(found.r2, near.r2, atol=1e-5)
    np.testing.assert_allclose(found.reconstruction_mse, near.reconstruction, atol=1e-3)


@pytest.mark.parametrize("masking", [ma.FixedCountPatchMasking, ma.RandomRatioMasking])
def test_other_patch_masks_are_direct_problems_of_their_own_moments(fit, direct, masking):
    ratios = [0.3, 0.5, 0.8]
    found = ma.masking_sweep(fit, [2, (3, 4)], ratios, masking=masking, pixel_noise=0.0)
    for i, patch in enumerate([2, (3, 4)]):
        count = len(oracles.patch_members(SHAPE, patch))
        assert int(found.num_patches[i]) == count
        for j, ratio in enumerate(ratios):
            if masking is ma.FixedCountPatchMasking:
                visible = round((1 - ratio) * count)
                chances = oracles.fixed_count(visible, count)
                assert float(found.realized_ratio[i, j]) == pytest.approx(1 - visible / count)
            else:
                chances = oracles.uniform_ratio(max(0.0, 2 * ratio - 1), min(1.0, 2 * ratio))
            expected = oracles.solve(direct, SHAPE, patch, chances)
            np.testing.assert_allclose(found.r2[i, j], expected.r2, atol=1e-9)
            np.testing.assert_allclose(found.loss[i, j], np.trace(direct.sxx) - np.cumsum(expected.mu), rtol=1e-9)
            assert float(found.p_eff[i, j]) == pytest.approx(1 - chances[1] / chances[0])
            assert abs(found.r2[i, j] - oracles.solve(direct, SHAPE, patch, (1.0, 1.0)).r2).max() > 1e-3


@pytest.mark.parametrize("patch, ratio", [(2, 0.5), ((3, 4), 1.0), (1, 0.0), (4, 0.75)])
def test_sweep_has_the_span_and_the_loss_of_the_denoising_autoencoder(fit, patch, ratio):
    swept = ma.masking_sweep(fit, [patch], [ratio], pixel_noise=0.1).isel(patch_size=0, mask_ratio=0)
    model = ma.denoising_autoencoder(fit, ma.PatchMasking(patch, ratio), 60, pixel_noise=0.1)
    curves, _ = ma.encoder_curves(fit, model.encoder, pixel_noise=0.1)
    np.testing.assert_allclose(swept.r2, curves.r2, atol=1e-10)
    np.testing.assert_allclose(swept.alignment, curves.alignment, atol=1e-10)
    for k in (1, 17, 60):
        loss = ma.denoising_autoencoder(fit, ma.PatchMasking(patch, ratio), k, pixel_noise=0.1).loss
        assert float(swept.loss[k - 1]) == pytest.approx(loss, rel=1e-10)


def test_isotropic_noise_moves_nothing_but_the_loss(fit, direct):
    found = ma.gaussian_sweep(fit, [0.0, 0.5, 30.0], pixel_noise=0.0)
    assert found.r2.dims == ("noise_level", "k")
    for name in ("r2", "alignment", "reconstruction_mse"):
        np.testing.assert_allclose(found[name], np.broadcast_to(found[name][0], (3, 60)), atol=1e-9)
    s = np.linalg.eigvalsh(direct.sxx)[::-1]
    for sigma, loss in zip(found.noise_level.values, found.loss.values, strict=True):
        np.testing.assert_allclose(loss, s.sum() - np.cumsum(s**2 / (s + sigma**2)), atol=1e-8)


# --- slices, batches, workers ---------------------------------------------------------------------------------------


def test_single_sweeps_are_slices_of_the_joint_grid(fit, unseen, joint):
    options = {"eval_moments": unseen, "pixel_noise": 0.0}
    slices = {
        "masking": (
            ma.masking_sweep(fit, [2, (3, 4)], [0.0, 0.5, 1.0], **options),
            joint.sel(noise_level=0.0, lam=math.inf),
        ),
        "lambda": (
            ma.lambda_sweep(fit, [0.0, 0.002, 0.1, math.inf], **options),
            joint.isel(patch_size=1).sel(noise_level=0.0, mask_ratio=0.0),
        ),
        "gaussian": (
            ma.gaussian_sweep(fit, [0.0, 0.7], lambdas=[0.1, math.inf], **options),
            joint.isel(patch_size=0).sel(mask_ratio=0.0, lam=[0.1, math.inf]),
        ),
    }
    for name, (one, whole) in slices.items():
        compared = 0
        for variable in one.data_vars:
            if str(variable).startswith("je_"):
                continue
            np.testing.assert_array_equal(one[variable], whole[variable].transpose(*one[variable].dims), err_msg=name)
            compared += 1
        assert compared >= 8, name
    contrast = slices["masking"][0]
    for variable in ("je_r2", "je_eval_r2", "je_eval_r2_se"):
        np.testing.assert_array_equal(contrast[variable], joint[variable].sel(noise_level=0.0, mask_ratio=0.5))


def test_curves_without_held_out_data_are_the_same(fit, unseen, masks):
    with_test = ma.masking_sweep(fit, PATCHES[:2], RATIOS, eval_moments=unseen, pixel_noise=0.0)
    for name in ("r2", "alignment", "loss", "je_r2"):
        np.testing.assert_allclose(with_test[name], masks[name][:2], rtol=1e-11, atol=1e-11)


def test_a_vmapped_batch_is_the_loop(fit, unseen, masks, joint):
    in_batches = ma.RunOptions(batch_size=4)
    batched = ma.masking_sweep(fit, PATCHES, RATIOS, pixel_noise=0.0, run=in_batches)
    held_out = ma.sweep(
        fit,
        patch_sizes=[2, (3, 4)],
        mask_ratios=[0.0, 0.5, 1.0],
        noise_levels=[0.0, 0.7],
        lambdas=[0.0, 0.002, 0.1, math.inf],
        eval_moments=unseen,
        pixel_noise=0.0,
        run=in_batches,
    )
    for found, loop in ((batched, masks), (held_out, joint)):
        assert set(found.data_vars) == set(loop.data_vars)
        for name in loop.data_vars:
            scale = float(abs(loop[name]).max())
            tolerance = 1e-6 if str(name).endswith(("_se", "influence")) else 1e-10
            np.testing.assert_allclose(found[name], loop[name], atol=tolerance * max(scale, 1.0), err_msg=str(name))


def test_the_number_of_workers_changes_no_bit(fit, unseen):
    one, two = (
        ma.masking_sweep(fit, [1, 2, 4], [0.0, 0.4, 0.8], eval_moments=unseen, run=ma.RunOptions(workers=w))
        for w in (1, 2)
    )
    xr.testing.assert_identical(one, two)


def test_fewer_features_are_the_leading_ones(fit, masks):
    few = ma.masking_sweep(fit, PATCHES[:2], RATIOS, pixel_noise=0.0, max_k=7)
    assert few.k.values.tolist() == [1, 2, 3, 4, 5, 6, 7]
    for name in ("r2", "alignment", "loss", "je_r2"):
        np.testing.assert_allclose(few[name], masks[name][:2, ..., :7], atol=1e-11)


# --- compiled once, resumable ---------------------------------------------------------------------------------------


def test_a_second_call_with_other_values_compiles_nothing(fit, unseen, joint):
    other = moments_of(oracles.draw(50, 300))
    ma.masking_sweep(fit, [2, (3, 4)], [0.0, 0.5], pixel_noise=0.0)
    with compile_counter() as seen:
        ma.masking_sweep(other, [(3, 4), 2], [0.1, 0.2, 0.0, 0.77, 1.0], pixel_noise=0.01)
        ma.sweep(
            other,
            patch_sizes=[2, (3, 4)],
            mask_ratios=[0.0, 0.45, 0.9],
            noise_levels=[0.0, 0.6, 3.0],
            lambdas=[0.0, 3.0, math.inf],
            eval_moments=unseen,
        )
    assert seen.names == []


def test_the_function_of_a_grid_point_is_traced_once(fit, monkeypatch):
    once = chex.assert_max_traces(point.solve_point, n=1)
    monkeypatch.setattr(sweep_module, "solve_point", functools.wraps(point.solve_point)(once))
    found = ma.masking_sweep(fit, [1, 2, (3, 4)], [0.0, 0.2, 0.4, 1.0], run=ALONE)
    assert found.r2.notnull().all()


def test_an_interrupted_sweep_goes_on_where_it_stopped(fit, tmp_path, monkeypatch):
    grid_of_masks = ([2, (3, 4)], [0.0, 0.25, 0.5, 0.75])
    whole = ma.masking_sweep(fit, *grid_of_masks)
    options = ma.RunOptions(workers=1, store=tmp_path / "points")

    save, saved = store.PointStore.save, []

    def save_three(self, key, arrays):
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(self, key, arrays)
        saved.append(key)

    with monkeypatch.context() as patched:
        patched.setattr(store.PointStore, "save", save_three)
        with pytest.raises(KeyboardInterrupt):
            ma.masking_sweep(fit, *grid_of_masks, run=options)

    solved = []

    def counted(*args, **kwargs):
        solved.append(1)
        return whole_program(*args, **kwargs)

    whole_program = sweep_module.solve_one
    monkeypatch.setattr(sweep_module, "solve_one", counted)
    resumed = ma.masking_sweep(fit, *grid_of_masks, run=options)
    xr.testing.assert_identical(resumed, whole)
    points = 1 + 2 * 3  # p = 0 is shared by the patch sizes
    assert len(solved) == points - sum(not key.startswith("je-") for key in saved)

    # A finished sweep solves nothing and needs no patch basis; how it is run is not part of its identity.
    monkeypatch.setattr(factorize.Factorized, "coordinates", None)
    again = ma.masking_sweep(fit, *grid_of_masks, run=ma.RunOptions(workers=2, store=tmp_path / "points"))
    xr.testing.assert_identical(again, whole)
    monkeypatch.undo()
    # More ratios are more points of the same computation.
    more = ma.masking_sweep(fit, [2, (3, 4)], [0.0, 0.25, 0.9], run=options)
    np.testing.assert_array_equal(more.r2.sel(mask_ratio=0.25), whole.r2.sel(mask_ratio=0.25))


def test_points_of_shifted_held_out_images_are_not_taken_over(fit, tmp_path):
    """The centred sums of shifted images are the same; what the training data's probe predicts is not."""
    sample = oracles.draw(60, 256)
    options: dict[str, Any] = {"run": ma.RunOptions(workers=1, store=tmp_path)}
    held = Moments.from_arrays(sample.images, sample.labels, num_classes=4, groups=6)
    shifted = Moments.from_arrays(sample.images + 64.0, sample.labels, num_classes=4, groups=6)
    np.testing.assert_allclose(held.sum_xx, shifted.sum_xx, atol=1e-9 * np.abs(held.sum_xx).max())
    moments = [held, dataclasses.replace(held, pivot_x=held.pivot_x + 64.0)]
    ma.masking_sweep(fit, [2], [0.5], eval_moments=moments[0], **options)
    with pytest.raises(ma.InputError, match="another computation"):
        ma.masking_sweep(fit, [2], [0.5], eval_moments=moments[1], **options)


@pytest.mark.parametrize("progress", [False, True])
def test_progress_counts_every_point_and_is_shown_on_request_only(fit, tmp_path, monkeypatch, progress):
    bars = []

    class Bar:
        def __init__(self, *, total: int, initial: int, disable: bool, **options: object) -> None:
            self.total, self.done, self.disable, self.open = total, initial, disable, True
            bars.append(self)

        def update(self, count: int) -> None:
            self.done += count

        def close(self) -> None:
            self.open = False

    monkeypatch.setattr(runner, "tqdm", Bar)
    options = ma.RunOptions(progress=progress, store=tmp_path)
    ma.masking_sweep(fit, [2], [0.0, 0.5], run=options)
    ma.masking_sweep(fit, [2], [0.0, 0.5, 0.7], run=options)
    # A solve for every ratio, and one joint embedding with and one without a mask.
    assert [(bar.done, bar.total) for bar in bars] == [(4, 4), (5, 5)]
    assert all(bar.disable is not progress and not bar.open for bar in bars)


# --- hard data ------------------------------------------------------------------------------------------------------


def nine_decades() -> Moments:
    """16 pixels whose variances span nine decades in directions of no pixel, and targets in all of them."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    z = rng.normal(size=(200, 16))
    z = np.linalg.qr(z - z.mean(0))[0] * math.sqrt(200)
    y = z @ rng.normal(size=(16, 3)) + 0.5 * rng.normal(size=(200, 3))
    return Moments.from_arrays((z * np.logspace(0, -4.5, 16) @ u.T).reshape(200, 4, 4, 1), y)


def test_a_spectrum_of_nine_decades_is_not_squared():
    moments, patches, ratios = nine_decades(), [1, 2, (4, 2)], [0.0, 0.5, 1.0]
    s, sxy = moments.sxx, moments.sxy
    assert 1e8 < np.linalg.cond(s) < 1e10
    found = ma.masking_sweep(moments, patches, ratios, pixel_noise=0.0)
    assert found.attrs["rank"] == 16
    squared = []
    for i, patch in enumerate(patches):
        for j, p in enumerate(ratios):
            gram = s * oracles.pair_matrix((4, 4, 1), patch, 1.0, 1.0 - p)
            _, t = oracles.extended_denoising(s, gram, sxy)
            exact = np.cumsum((t**2).sum(1)) / np.trace(moments.syy)
            np.testing.assert_allclose(found.r2.values[i, j], exact.astype(float), atol=1e-7)
            v = oracles.top_directions(s @ s, gram)[1]
            squared.append(abs(oracles.r2_of(v, oracles.Stats(s, sxy, moments.syy, moments.yty)) - exact).max())
    assert max(squared) > 1e-3  # the published way loses the small directions


def defective_images(n: int) -> np.ndarray:
    x = oracles.draw(70, n).x.copy()
    x[:, 7] = 3.0
    x[:, 20] = x[:, 21]
    return x.reshape(n, *SHAPE)


@pytest.mark.parametrize("n, rank, pixel_noise", [(300, 58, 0.0), (30, 29, 0.0), (30, 60, None)])
def test_singular_moments_give_no_nan_and_the_problem_on_the_range(n, rank, pixel_noise):
    """Constant and duplicated pixels, and fewer images than pixels."""
    images, labels = defective_images(n), oracles.draw(70, n).labels
    moments = Moments.from_arrays(images, labels)
    found = ma.sweep(
        moments,
        patch_sizes=[2, (2, 5)],
        mask_ratios=[0.0, 0.6, 1.0],
        noise_levels=[0.0, 0.5],
        lambdas=[0.0, 0.01, math.inf],
        pixel_noise=pixel_noise,
    )
    for name in ("r2", "alignment", "probe_mse", "loss", "eigengap", "reconstruction_mse", "condition"):
        assert np.isfinite(found[name]).all(), name
    assert found.r2.min() >= 0 and found.r2.max() <= 1 + 1e-9 and found.r2.diff("k").min() > -1e-9
    assert found.attrs["rank"] == rank
    if pixel_noise == 0.0:
        # Coordinates of the range: images without null directions, the mask's moments taken along.
        x = images.reshape(n, -1) - images.reshape(n, -1).mean(0)
        y = np.eye(labels.max() + 1)[labels]
        basis = np.linalg.svd(x, full_matrices=False)[2][:rank].T
        m = oracles.stats(x @ basis, y)
        for i, patch in enumerate([2, (2, 5)]):
            within = oracles.patch_members(SHAPE, patch)
            inverse = np.zeros((60, 60))
            for block in within:  # D^+ patch by patch
                corner = np.ix_(block, block)
                inverse[corner] = np.linalg.pinv(x[:, block].T @ x[:, block] / n, rcond=1e-12, hermitian=True)
            root = basis.T @ x.T @ x / n @ basis
            whitened = np.linalg.inv(basis.T @ (x.T @ x / n) @ inverse @ (x.T @ x / n) @ basis)
            v = oracles.top_directions(root @ root, root @ whitened @ root)[1]
            expected = oracles.r2_of(v, m)
            cell = found.r2.isel(patch_size=i, mask_ratio=2, noise_level=0, lam=2)
            np.testing.assert_allclose(cell, expected, atol=1e-6)


def test_float32_agrees_within_its_precision(fit, masks):
    masks = masks.isel(patch_size=[0, 1])
    low = ma.masking_sweep(fit, PATCHES[:2], RATIOS, pixel_noise=0.0, dtype="float32").assign_coords(masks.coords)
    assert low.attrs["rank"] == 60 and low.attrs["dtype"] == "float32"
    error = abs(low.r2 - masks.r2)
    assert 1e-9 < float(error.max()) < 5e-3 and float(error.median()) < 2e-6
    np.testing.assert_allclose(low.loss, masks.loss, atol=1e-5 * low.attrs["trace_sxx"])
    # Directions are known up to the rounding of the largest eigenvalue over the distance to the next one.
    masked = masks.isel(mask_ratio=slice(4))
    start = xr.full_like(masked.loss.isel(k=[0]), masks.attrs["trace_sxx"]).assign_coords(k=[0])
    mu = -xr.concat([start, masked.loss], "k").diff("k")
    bound = 1e-6 * mu.isel(k=0) / (mu * masked.eigengap)
    assert (error.isel(mask_ratio=slice(4)) < bound + 1e-6).all()


def test_float32_images_are_float64_problems(masks):
    sample = oracles.train()
    moments = Moments.from_arrays(sample.images.astype(np.float32), sample.labels)
    found = ma.masking_sweep(moments, PATCHES, RATIOS, pixel_noise=0.0)
    assert found.attrs["pixel_dtype"] == "float32" and found.attrs["dtype"] == "float64"
    np.testing.assert_allclose(found.r2, masks.r2, atol=1e-4)


def pen_that_rarely_reaches_the_border() -> tuple[Moments, Moments]:
    """Digits inside a border whose pixels are dark but for two faint training images and a few bright test images."""
    rng = np.random.default_rng(0)
    pixels, labels = (np.asarray(a) for a in load_digits(return_X_y=True))
    images = np.zeros((len(pixels), 8, 8, 1), np.uint8)
    images[:, 1:7, 1:7, 0] = 15 * pixels.reshape(-1, 8, 8)[:, 1:7, 1:7]
    border = np.ones((8, 8), bool)
    border[1:7, 1:7] = False
    for row, column in np.argwhere(border):
        images[rng.choice(1000, 2, replace=False), row, column, 0] = 1
        images[rng.choice(np.arange(1000, len(images)), 2), row, column, 0] = rng.integers(8, 40, 2)
    return (
        Moments.from_arrays(images[:1000], labels[:1000]),
        Moments.from_arrays(images[1000:], labels[1000:], groups=10),
    )


def test_data_floor_keeps_rare_pixels_from_ruining_held_out_curves():
    train, held_out = pen_that_rarely_reaches_the_border()
    variance = np.diag(train.sxx)
    assert variance.min() < 1e-7 * np.linalg.eigvalsh(train.sxx)[-1] and variance.min() > 0
    scores = {}
    for floor in (0.0, None):
        found = ma.masking_sweep(train, [4], [0.0, 1.0], eval_moments=held_out, pixel_noise=floor)
        scores[floor] = found.sel(k=48).isel(patch_size=0)
    bare, floored = scores[0.0], scores[None]
    assert float(floored.eval_r2[1]) > 0.45 and float(floored.eval_r2[0]) > 0.45
    assert float(bare.eval_r2[1]) < 0.2
    # In-sample curves never notice.
    assert abs(float(bare.r2[1] - floored.r2[1])) < 0.02


@pytest.mark.skipif("MAE_ALIGN_DATA" not in os.environ, reason="needs MAE_ALIGN_DATA with arabic_digits.npz")
def test_data_floor_on_arabic_digits():
    with np.load(Path(os.environ["MAE_ALIGN_DATA"]) / "arabic_digits.npz", allow_pickle=False) as data:
        train = Moments.from_arrays(data["x_train"], data["y_train"])
        held_out = Moments.from_arrays(data["x_test"], data["y_test"], groups=20)
    floored, bare = (
        ma.masking_sweep(train, [4], [1.0], eval_moments=held_out, pixel_noise=floor, max_k=512)
        .eval_r2.sel(patch_size=4, mask_ratio=1.0, k=512)
        .item()
        for floor in (None, 0.0)
    )
    assert floored == pytest.approx(0.652, abs=0.002)
    assert bare < 0.3


# --- theory ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    patch=st.sampled_from([1, 2, (3, 4), (6, 5)]),
    ratio=st.floats(0.0, 1.0),
    sigma=st.floats(0.0, 5.0),
    lam=st.one_of(st.just(math.inf), st.floats(0.0, 1e3)),
)
@example(seed=0, patch=2, ratio=1e-308, sigma=1.0, lam=math.inf)
@example(seed=0, patch=2, ratio=0.0, sigma=1e-160, lam=math.inf)
@example(seed=0, patch=2, ratio=1e-17, sigma=0.0, lam=1e-300)
def test_curves_are_shares_that_never_fall(seed, patch, ratio, sigma, lam):
    labels = np.random.default_rng(seed).permutation(oracles.train().labels)
    moments = Moments.from_arrays(oracles.train().images, labels)
    found = ma.sweep(moments, patch_sizes=[patch], mask_ratios=[ratio], noise_levels=[sigma], lambdas=[lam])
    for name in ("r2", "alignment"):
        assert found[name].min() >= 0 and found[name].max() <= 1 + 1e-9
        assert found[name].diff("k").min() > -1e-9
    for name in ("loss", "reconstruction_mse"):
        assert found[name].min() > -1e-9 * found[name].max() and found[name].diff("k").max() < 1e-9 * found[name].max()
    full = ma.masking_sweep(moments, [1], [0.0]).r2.isel(k=-1)
    np.testing.assert_allclose(found.r2.isel(k=-1), full.item(), rtol=1e-6)  # all features: every encoder is onto


def test_curves_do_not_change_with_the_units_of_the_pixels(masks):
    sample = oracles.train()
    for unit in (1e-6, 2e4):
        moments = Moments.from_arrays(unit * sample.images, sample.labels)
        for floor in (0.0, 0.2):
            found = ma.masking_sweep(moments, PATCHES[:2], RATIOS, pixel_noise=floor * unit**2)
            if floor == 0.0:
                reference = masks.isel(patch_size=slice(2))
            else:
                own = moments_of(sample)
                reference = ma.masking_sweep(own, PATCHES[:2], RATIOS, pixel_noise=floor)
            np.testing.assert_allclose(found.r2, reference.r2, atol=1e-9)
            np.testing.assert_allclose(found.loss / unit**2, reference.loss, atol=1e-8)


def test_supervision_trades_against_reconstruction(fit):
    lambdas = [0.0, 1e-4, 1e-2, 1.0, 100.0, math.inf]
    found = ma.lambda_sweep(fit, lambdas)
    assert (found.r2.diff("lam").max() < 1e-9) and (found.reconstruction_mse.diff("lam").max() < 1e-9)
    assert float(found.r2.sel(lam=0.0, k=3)) == pytest.approx(float(found.r2.isel(k=-1, lam=0)), rel=1e-9)
    assert float(found.r2.sel(lam=math.inf, k=3)) < 0.9 * float(found.r2.sel(lam=0.0, k=3))


# --- bad input ------------------------------------------------------------------------------------------------------

# One of every argument; what else the axes refuse is in test_grid.py.
BAD_GRIDS = [
    ({"patch_sizes": [7]}, "patch 7x7 is larger than the image 6x5"),
    ({"mask_ratios": [1.2]}, "mask ratio 1.2: give a number from 0 to 1"),
    ({"noise_levels": [-1.0]}, "noise level -1.0: give a standard deviation of at least 0"),
    ({"lambdas": [-0.5]}, "lambda -0.5: give a weight of at least 0"),
    ({"max_k": 61}, "k=61.*60"),
    ({"max_k": 0}, "k=0.*60"),
    ({"max_k": 2.5}, "k=2.5"),
    ({"pixel_noise": -0.1}, "pixel_noise=-0.1: give a variance of at least 0"),
    ({"rtol": 2.0}, "rtol=2.0"),
    ({"dtype": "float16"}, "'float64' or 'float32'"),
    ({"run": ma.RunOptions(workers=0)}, "workers=0"),
    ({"run": ma.RunOptions(batch_size=0)}, "batch_size=0"),
    ({"masking": ma.FixedCountPatchMasking, "mask_ratios": [0.99]}, "leaves none of the 9 patches"),
]


@pytest.mark.parametrize("bad, message", BAD_GRIDS)
def test_a_bad_grid_is_refused_before_any_work(fit, monkeypatch, bad, message):
    waits_for_the_rank = {"pixel_noise", "rtol"} & set(bad)
    if not waits_for_the_rank:
        monkeypatch.setattr(sweep_module, "factorize", None)
    with pytest.raises(ma.InputError, match=message):
        ma.sweep(fit, **({"patch_sizes": [2], "mask_ratios": [0.5]} | bad))
    if not {"noise_levels", "lambdas"} & set(bad):
        options = {"patch_sizes": [2], "mask_ratios": [0.5]} | bad
        with pytest.raises(ma.InputError, match=message):
            ma.masking_sweep(fit, options.pop("patch_sizes"), options.pop("mask_ratios"), **options)


def test_more_features_than_the_rank_are_refused():
    with pytest.raises(ma.InputError, match=r"k=30.*29"):
        ma.masking_sweep(moments_of(oracles.draw(3, 30)), [2], [0.5], pixel_noise=0.0, max_k=30)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: (s.images.reshape(-1, 5, 6, 2), s.labels, {}), r"\(5, 6, 2\).*\(6, 5, 2\)"),
        (lambda s: (s.images, s.labels, {"num_classes": 5}), "5 columns.*4: pass num_classes"),
        (lambda s: (s.images[:9], s.labels[:9], {"groups": 20}), "9 held-out samples .* fewer groups"),
        (lambda s: (s.images.astype(np.float32), s.labels, {"preprocessing": "scaled"}), "scaled|float32"),
        (lambda s: (np.abs(s.images).astype(np.uint8), s.labels, {}), "uint8"),
    ],
)
def test_held_out_data_that_does_not_match_is_refused_before_any_work(fit, monkeypatch, change, message):
    monkeypatch.setattr(sweep_module, "factorize", None)
    images, labels, options = change(oracles.held_out())
    other = Moments.from_arrays(images, labels, **({"num_classes": 4} | options))
    with pytest.raises(ma.InputError, match=message):
        ma.masking_sweep(fit, [2], [0.5], eval_moments=other)
