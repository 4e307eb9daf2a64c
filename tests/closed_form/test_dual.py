from __future__ import annotations

import dataclasses
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import xarray as xr

import mae_align as ma
from mae_align.closed_form.basis import patch_basis
from mae_align.closed_form.dual import (
    DualProblem,
    check_patches,
    factorize_samples,
)
from mae_align.closed_form.factorize import factorize
from mae_align.moments.moments import Moments
from mae_align.moments.samples import Samples, dual_is_cheaper, merged, summarize
from mae_align.runtime import memory
from mae_align.runtime.errors import InputError
from tests import oracles
from tests.oracles import SHAPE

FEW = oracles.draw(3, 40)  # of 60 pixel values
NEW = oracles.draw(4, 90)
CENTRED = FEW.x - FEW.x.mean(0)
# Thin, border and wide blocks: 2, 8 (and 4), 24 (and 12, 8, 4), 50 and 10 pixel values against 40 samples.
PATCHES = [1, 2, (3, 4), (5, 5)]
ALONE = ma.RunOptions(workers=1)


def samples_of(sample: oracles.Sample, groups: int = 1) -> Samples:
    return Samples.from_arrays(sample.images, sample.labels, num_classes=oracles.CLASSES, groups=groups)


@pytest.fixture(scope="module")
def few() -> Samples:
    return samples_of(FEW)


def within_span(problem: DualProblem) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors [d, r] of the covariance with variance, and R, by a singular value decomposition of the samples."""
    _, size, axes = np.linalg.svd(CENTRED / math.sqrt(len(CENTRED)), full_matrices=False)
    axes, raw = axes[:39].T, size[:39] ** 2
    return axes, axes * np.sqrt(raw + problem.pixel_noise)


def align_signs(problem: DualProblem, axes: np.ndarray) -> np.ndarray:
    """Signs of the eigenvectors that the dual implies without forming them."""
    implied = CENTRED.T @ problem.z / np.sqrt(len(CENTRED) * problem.raw)
    return np.sign((implied * axes).sum(0))


# --- the factorised problem -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixel_noise", [0.0, 0.3])
def test_spectrum_and_targets_are_those_of_the_covariance(few, pixel_noise):
    problem = factorize_samples(few, pixel_noise=pixel_noise)
    direct = oracles.stats(FEW.x, FEW.y)
    values = np.linalg.eigvalsh(direct.sxx)[::-1]
    assert problem.rank == 39 and problem.rtol == 60 * np.finfo(float).eps and problem.count == 40
    np.testing.assert_allclose(problem.s, values[:39] + pixel_noise, rtol=1e-10)
    axes, root = within_span(problem)
    signs = align_signs(problem, axes)
    np.testing.assert_allclose(problem.t0 * signs[:, None], np.linalg.pinv(root) @ direct.sxy, atol=1e-10)
    np.testing.assert_allclose(problem.syy, direct.syy, atol=1e-15)
    np.testing.assert_allclose(problem.yty, direct.yty, atol=1e-15)
    np.testing.assert_allclose(problem.mean_x, FEW.x.mean(0), rtol=1e-13, atol=1e-14)
    assert problem.trace == pytest.approx(np.trace(direct.sxx) + 60 * pixel_noise, rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.7])
@pytest.mark.parametrize("pixel_noise", [0.0, 1e-3])
@pytest.mark.parametrize("patch", PATCHES)
def test_patch_basis_is_the_restriction_to_the_span_of_the_samples(few, patch, pixel_noise, rho):
    problem = factorize_samples(few, pixel_noise=pixel_noise)
    axes, root = within_span(problem)
    within = oracles.stats(FEW.x, FEW.y).sxx * oracles.pair_matrix(SHAPE, patch, 1.0, 0.0)
    inverse = np.linalg.pinv(within + (pixel_noise + rho) * np.eye(60), rcond=1e-12, hermitian=True)
    signs = align_signs(problem, axes)
    expected = signs[:, None] * (root.T @ inverse @ root) * signs
    basis = patch_basis(problem, patch, rho)
    e, pi = np.asarray(basis.e), np.asarray(basis.pi)
    np.testing.assert_allclose(e * pi @ e.T, expected, atol=1e-8 * pi[0])
    np.testing.assert_allclose(basis.gram, e.T * problem.s @ e, atol=1e-11)
    np.testing.assert_allclose(basis.target, e.T @ problem.t0, atol=1e-12)


def test_many_patches_come_in_batches_of_which_the_last_is_filled_up(few, monkeypatch):
    whole = patch_basis(factorize_samples(few), 1).pi
    wide = patch_basis(factorize_samples(few), (5, 5)).pi
    monkeypatch.setattr("mae_align.closed_form.dual.PIXELS_AT_ONCE", 7)  # 3 patches of 2 pixel values: 30 = 10 x 3
    np.testing.assert_allclose(patch_basis(factorize_samples(few), 1).pi, whole, rtol=1e-9)
    np.testing.assert_allclose(patch_basis(factorize_samples(few), (5, 5)).pi, wide, rtol=1e-9)
    monkeypatch.setattr("mae_align.closed_form.dual.PIXELS_AT_ONCE", 8)  # 4 patches: 30 = 7 x 4 + 2
    np.testing.assert_allclose(patch_basis(factorize_samples(few), 1).pi, whole, rtol=1e-9)


@pytest.mark.parametrize("center", [True, False])
def test_inner_products_of_8_bit_images_are_exact(center):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 30, 40, 2)).astype(np.uint8)  # 2,400 pixel values: three exact batches
    x = images.reshape(7, -1).astype(np.int64)
    z = 7 * x - x.sum(0) if center else 7 * x
    exact = (z @ z.T).astype(float) / 49
    problem = factorize_samples(Samples.from_arrays(images, np.arange(7) % 2, center=center), pixel_noise=0.0)
    rebuilt = 7 * problem.z * problem.raw @ problem.z.T
    np.testing.assert_allclose(rebuilt, exact, atol=1e-14 * exact.max())
    assert problem.rank == (6 if center else 7)
    assert problem.trace == pytest.approx(np.trace(exact) / 7, rel=1e-14)
    np.testing.assert_array_equal(problem.mean_x, x.sum(0) / 7 if center else np.zeros(2400))


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_the_floor_has_the_primal_defaults(dtype):
    images = (40 * FEW.images + 128).clip(0, 255).astype(dtype)
    dual = factorize_samples(Samples.from_arrays(images, FEW.labels))
    primal = factorize(Moments.from_arrays(images, FEW.labels))
    assert dual.pixel_noise == pytest.approx(primal.pixel_noise, rel=1e-5)
    np.testing.assert_allclose(dual.s, primal.s[:39], rtol=1e-3 if dtype == "float32" else 1e-9)


def test_directions_below_the_cutoff_are_dropped():
    x = CENTRED.copy()
    x[20:] = x[:20]  # every sample twice
    problem = factorize_samples(Samples.from_arrays(x.reshape(-1, *SHAPE), FEW.labels))
    assert problem.rank == 19 and problem.raw[-1] > 1e-6 * problem.raw[0]
    cut = factorize_samples(samples_of(FEW), rtol=math.sqrt(problem.raw[4] * problem.raw[5]) / problem.raw[0])
    assert 3 <= cut.rank <= 8


def test_lower_precision_is_close_and_keeps_its_type(few):
    low, high = factorize_samples(few, dtype="float32"), factorize_samples(few)
    assert low.s.dtype == low.t0.dtype == np.float32 and low.rank == high.rank
    assert patch_basis(low, 2).e.dtype == np.float32
    np.testing.assert_allclose(patch_basis(low, 2, 0.5).pi, patch_basis(high, 2, 0.5).pi, rtol=1e-3)


# --- held-out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_held_out_curves_are_real_predictions_of_the_masked_encoder(few, patch, p):
    """The encoder of Theorem 3 is solved d x d from its definition; with a mask it leaves the span of the samples."""
    direct = oracles.stats(FEW.x, FEW.y)
    floor = 1e-7 * np.eye(60) if p == 0 or patch == (5, 5) else 0.0 * np.eye(60)
    found = ma.masking_sweep(
        few, [patch], [p], eval_moments=samples_of(NEW, 5), pixel_noise=float(floor[0, 0]), max_k=20
    )
    m = direct._replace(sxx=direct.sxx + floor)
    expected = oracles.solve(m, SHAPE, patch, oracles.bernoulli(p)) if floor.any() else None
    if expected is None:
        keep, both = oracles.bernoulli(p)
        gram = m.sxx * oracles.pair_matrix(SHAPE, patch, keep, both)
        v = oracles.top_directions(keep**2 * m.sxx @ m.sxx, gram)[1]
    else:
        v = expected.v
    curve = oracles.predicted_r2(v[:, :20], FEW, NEW)
    np.testing.assert_allclose(found.eval_r2.values.ravel(), curve, atol=1e-5 if floor.any() else 1e-8)


def test_rows_without_a_mask_are_the_whitened_samples(few):
    problem = factorize_samples(few, pixel_noise=0.2)
    axes, _ = within_span(problem)
    held = problem.hold_out(samples_of(NEW, 5))
    expected = (NEW.x - FEW.x.mean(0)) @ axes / np.sqrt(problem.s) * align_signs(problem, axes)
    np.testing.assert_allclose(held.rows, expected, atol=1e-9)
    np.testing.assert_allclose(held.targets, NEW.y - FEW.y.mean(0), atol=1e-15)
    np.testing.assert_allclose(held.share.sum(), 1.0)
    assert held.share.shape == (5, 90) and (held.share > 0).sum() == 90
    assert held.group_variance.sum() == pytest.approx(((NEW.y - FEW.y.mean(0)) ** 2).sum() / 90, rel=1e-12)


# --- equal to the primal --------------------------------------------------------------------------------------------


def pictures(count: int, seed: int) -> oracles.Sample:
    """20 x 20 images, correlated over a few pixels, with blocks of full rank."""
    fixed, rng = np.random.default_rng(5), np.random.default_rng(seed)
    z = rng.normal(size=(count, 20, 20))
    x = 120 + 30 * (z + 0.8 * np.roll(z, 1, 1) + 0.8 * np.roll(z, 1, 2) + 0.5 * np.roll(z, (1, 1), (1, 2)))
    score = x.reshape(count, -1) @ fixed.normal(size=(400, 3)) + 300 * rng.normal(size=(count, 3))
    labels = score.argmax(1)
    return oracles.Sample(x[..., None], labels, np.eye(3)[labels])


@pytest.fixture(scope="module")
def both() -> dict[str, dict[str, xr.Dataset]]:
    fit, test = pictures(300, 1), pictures(150, 2)
    out: dict[str, dict[str, xr.Dataset]] = {}
    for kind in (Moments, Samples):
        train = kind.from_arrays(fit.images, fit.labels)
        unseen = kind.from_arrays(test.images, test.labels, groups=6)
        options: dict[str, Any] = {"eval_moments": unseen, "pixel_noise": 1e-7, "max_k": 299}
        out[kind.__name__] = {
            "masks": ma.masking_sweep(train, [1, 2, 4], [0.0, 0.5, 1.0], **options),
            "bare": ma.masking_sweep(train, [4, (3, 7)], [0.0, 0.5], **{**options, "pixel_noise": 0.0}),
            "joint": ma.sweep(
                train, patch_sizes=[2], mask_ratios=[0.6], noise_levels=[0.0, 9.0], lambdas=[1e-4, 1e-2], **options
            ),
        }
    return out


NAMES = ["r2", "alignment", "eval_r2", "eval_r2_se", "je_r2", "je_eval_r2"]


@pytest.mark.parametrize("which", ["masks", "bare", "joint"])
def test_dual_is_primal_within_a_ten_thousandth_of_a_point_at_every_k(both, which):
    primal, dual = both["Moments"][which], both["Samples"][which]
    for name in NAMES:
        difference = 100 * np.abs(primal[name] - dual[name]).max()
        assert difference < 1e-4, (name, float(difference))
    assert np.abs(primal.alignment_percent - dual.alignment_percent).max() < 1e-4
    assert np.abs(primal.eval_influence - dual.eval_influence).max() < 1e-6
    for name in ("loss", "reconstruction_mse", "probe_mse"):
        if name in primal:
            np.testing.assert_allclose(dual[name], primal[name], rtol=1e-6, atol=1e-9 * primal.attrs["trace_sxx"])
    assert primal.attrs["factorisation"] == "primal" and dual.attrs["factorisation"] == "dual"
    if which == "joint":
        np.testing.assert_allclose(dual.lam_relative, primal.lam_relative, rtol=1e-10)
    assert dual.attrs["trace_sxx"] == pytest.approx(primal.attrs["trace_sxx"], rel=1e-10)
    assert primal.attrs["rank"] == (299 if which == "bare" else 400) and dual.attrs["rank"] == 299


# --- what is refused, and what is flagged ---------------------------------------------------------------------------


def test_an_inert_mask_is_refused_with_its_reason_before_any_work(few, monkeypatch):
    monkeypatch.setattr("mae_align.closed_form.dual._gram", lambda samples: pytest.fail("worked first"))
    with pytest.raises(InputError, match=r"patch size \(6, 4\): .* at least 12 .*"):
        ma.masking_sweep(samples_of(oracles.draw(3, 13)), [1, (6, 4)], [0.5], pixel_noise=0.0)


def test_the_refused_mask_is_inert_indeed_and_its_neighbours_are_not():
    sample = oracles.draw(3, 20)  # halves of 30 pixel values
    train = samples_of(sample)
    with pytest.raises(InputError, match=r"identically inert: use smaller patches, more samples, or a positive"):
        patch_basis(factorize_samples(train, pixel_noise=0.0), (3, 5))
    direct = oracles.stats(sample.x, sample.y)
    inverse = np.linalg.pinv(direct.sxx * oracles.pair_matrix(SHAPE, (3, 5), 1.0, 0.0), rcond=1e-10, hermitian=True)
    values, axes = np.linalg.eigh(direct.sxx)
    root = (axes * np.sqrt(values.clip(0)))[:, -19:]
    np.testing.assert_allclose(root.T @ inverse @ root, 2 * np.eye(19), atol=1e-8)  # P = N I
    for made in (
        patch_basis(factorize_samples(train, pixel_noise=1e-3), (3, 5)),
        patch_basis(factorize_samples(train, pixel_noise=0.0), (3, 5), 0.1),
        patch_basis(factorize_samples(samples_of(oracles.draw(3, 32)), pixel_noise=0.0), (3, 5)),
    ):
        pi = np.asarray(made.pi)
        assert pi[0] > 1.001 * pi[-1]
    check_patches(samples_of(oracles.draw(3, 31)), [(3, 4)])  # border patches of 6 pixel values are not that many
    with pytest.raises(InputError, match="inert"):
        check_patches(samples_of(oracles.draw(3, 31)), [(3, 5)])
    check_patches(samples_of(oracles.draw(3, 32)), [(3, 5)])
    check_patches(train, [(6, 5)])  # one patch: PCA by definition, not by chance


def test_patches_that_reach_the_number_of_samples_are_flagged(few):
    found = ma.masking_sweep(few, [2, (4, 5), (5, 5)], [0.5])  # 8, 40 and 50 pixel values
    assert found.saturated.values.tolist() == [False, True, True] and found.attrs["rank"] == 39
    many = Moments.from_arrays(oracles.train().images, oracles.train().labels)
    assert not ma.masking_sweep(many, [2, (5, 5)], [0.5]).saturated.any()


def test_mixed_kinds_are_refused(few):
    moments = Moments.from_arrays(NEW.images, NEW.labels)
    with pytest.raises(InputError, match=r"held-out data are Moments and training data Samples"):
        ma.masking_sweep(few, [2], [0.5], eval_moments=moments)
    with pytest.raises(InputError, match="held-out data are Samples and training data Moments"):
        ma.masking_sweep(moments, [2], [0.5], eval_moments=few)
    with pytest.raises(InputError, match=r"second moments \[d, d\], not Samples"):
        ma.supervised_autoencoder(few, 1.0, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"k=40: 40 images of 60 pixel values, .*at most 39"):
        ma.masking_sweep(few, [2], [0.5], max_k=40)
    other = Samples.from_arrays(NEW.images[:, :5], NEW.labels)
    with pytest.raises(InputError, match="held-out images are"):
        factorize_samples(few).masked(2, 0.0, other)


def test_what_cannot_fit_is_refused_with_the_numbers(few, monkeypatch):
    monkeypatch.setattr("mae_align.runtime.memory.available_bytes", lambda: 40_000)
    with pytest.raises(InputError, match=r"the dual of 40 samples \(40 x 40\) takes about 0.000147 GB .* 4e-05 GB are"):
        factorize_samples(few)
    with pytest.raises(
        InputError, match=r"second moments of 60 pixel values and 4 targets in 1 group\(s\) takes about 8.09e-05 GB"
    ):
        Moments.from_arrays(FEW.images, FEW.labels)
    monkeypatch.setattr("mae_align.runtime.memory.available_bytes", lambda: 100_000)
    moments = Moments.from_arrays(FEW.images, FEW.labels)
    with pytest.raises(InputError, match=r"second moments of 60 pixel values \(60 x 60\) takes about 0.000202 GB"):
        factorize(moments)
    monkeypatch.setattr("mae_align.runtime.memory.available_bytes", lambda: 40_000)
    with pytest.raises(InputError, match=r"a sweep of rank up to 39 takes about .* workers=1"):
        ma.masking_sweep(few, [2], [0.5], run=ALONE)
    with pytest.raises(InputError, match=r"in 2 group\(s\) takes about .*: shrink the images"):
        summarize(oracles.train().images, oracles.train().labels, groups=2)
    monkeypatch.setattr("mae_align.runtime.memory.available_bytes", lambda: None)  # unknown: nothing is refused
    factorize_samples(few)


def test_no_array_of_pixels_by_pixels_is_made(monkeypatch):
    """12 images of 9,216 pixel values: second moments would take 0.68 GB."""
    monkeypatch.setattr("mae_align.runtime.memory.available_bytes", lambda: 100_000_000)
    images = np.random.default_rng(0).integers(0, 256, (24, 96, 96, 1)).astype(np.uint8)
    train, test = (summarize(part, np.arange(12) % 2) for part in (images[:12], images[12:]))
    with pytest.raises(InputError, match=r"\(9216 x 9216\) takes about 4.76 GB"):
        factorize(dataclasses.replace(Moments.from_arrays(images[:, :2], np.arange(24) % 2), pivot_x=np.zeros(9216)))
    tracemalloc.start()
    try:
        found = ma.masking_sweep(train, [2, 48], [0.0, 0.5], eval_moments=test, run=ALONE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6 and found.sizes["k"] == 11 and found.eval_r2.notnull().all()


def test_memory_available_is_that_of_the_machine_or_of_the_container(tmp_path, monkeypatch):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", info)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() == 50 * 1024
    (tmp_path / "memory.max").write_text("30000\n")
    (tmp_path / "memory.current").write_text("10000\n")
    assert memory.available_bytes() == 20_000
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 6000\nactive_file 1000\n")
    assert memory.available_bytes() == 27_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() == 50 * 1024
    info.unlink()
    found = memory.available_bytes()
    assert found is None or found > 50 * 1024


# --- samples and the choice -----------------------------------------------------------------------------------------


def test_the_cheaper_summary_is_chosen_and_kept_for_what_goes_with_it(few):
    assert dual_is_cheaper(30, 60) and not dual_is_cheaper(60, 60) and not dual_is_cheaper(400, 60)
    assert isinstance(summarize(FEW.images, FEW.labels), Samples)
    many = summarize(oracles.train().images, oracles.train().labels)
    assert isinstance(many, Moments)
    assert isinstance(summarize(FEW.images, FEW.labels, like=many), Moments)
    assert isinstance(summarize(oracles.train().images, oracles.train().labels, like=few), Samples)
    one = summarize(FEW.images, FEW.labels, groups=3, preprocessing="cut", center=False, num_classes=5)
    assert (one.num_targets, one.preprocessing, one.center, len(one.counts)) == (5, "cut", False, 3)


def test_samples_group_and_merge_like_moments(few):
    samples = Samples.from_arrays(FEW.images, FEW.labels, groups=4)
    samples = samples.merge(Samples.from_arrays(NEW.images, NEW.labels, groups=4))
    moments = Moments.from_arrays(FEW.images, FEW.labels, groups=4)
    moments = moments.merge(Moments.from_arrays(NEW.images, NEW.labels, groups=4))
    np.testing.assert_array_equal(samples.counts, moments.counts)
    np.testing.assert_allclose(samples.mean_x, moments.mean_x, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(samples.syy, moments.syy, atol=1e-15)
    np.testing.assert_allclose(samples.yty, moments.yty, atol=1e-15)
    assert samples.count == 130 and len(samples.state) == 3
    for name, other in {
        "pixel_dtype": Samples.from_arrays(FEW.images.astype(np.float32), FEW.labels, groups=4),
        "num_groups": samples_of(FEW, 3),
        "num_targets": Samples.from_arrays(FEW.images, FEW.labels, num_classes=7, groups=4),
        "image_shape": Samples.from_arrays(FEW.images[:, 1:], FEW.labels, groups=4),
    }.items():
        with pytest.raises(InputError, match=name):
            samples.merge(other)
    assert merged(samples, samples).count == merged(moments, moments).count == 260
    with pytest.raises(InputError, match="Samples and Moments do not merge"):
        merged(samples, moments)
    with pytest.raises(InputError, match="at least 1 group"):
        samples_of(FEW, 0)


def test_a_finished_dual_sweep_is_read_back_and_other_samples_are_not(few, tmp_path):
    run = ma.RunOptions(workers=1, store=tmp_path)
    first = ma.masking_sweep(few, [2], [0.0, 0.5], max_k=5, run=run)
    again = ma.masking_sweep(few, [2], [0.0, 0.5], max_k=5, run=run)
    xr.testing.assert_identical(first, again)
    with pytest.raises(InputError, match="another computation"):
        ma.masking_sweep(samples_of(oracles.draw(9, 40)), [2], [0.0, 0.5], max_k=5, run=run)


def test_the_slices_take_samples(few):
    assert dict(ma.lambda_sweep(few, [0.0, 1.0], max_k=3).r2.sizes) == {"lam": 2, "k": 3}
    noise = ma.gaussian_sweep(few, [0.0, 2.0], eval_moments=samples_of(NEW, 3), pixel_noise=0.0)
    np.testing.assert_allclose(noise.r2[0], noise.r2[1], atol=1e-9)
    np.testing.assert_allclose(noise.eval_r2[0], noise.eval_r2[1], atol=1e-7)


@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    "target",
    [ma.HighPass(1.0), ma.PatchMeanRemoved(2), ma.MatrixTarget(np.random.default_rng(3).normal(size=(9, 64)))],
    ids=lambda t: type(t).__name__,
)
def test_target_operators_are_those_of_the_primal(target, ratio, monkeypatch):
    monkeypatch.setattr(
        "mae_align.closed_form.dual._TARGET_PIXELS", 7 * 64
    )  # blocks of 7 samples, the last one smaller
    images = np.random.default_rng(0).normal(size=(40, 8, 8, 1))
    labels = np.arange(40) % 4
    options = {"pixel_noise": 1e-9, "max_k": 30, "target": target}
    dual = ma.masking_sweep(Samples.from_arrays(images, labels), [2], [ratio], **options)
    primal = ma.masking_sweep(Moments.from_arrays(images, labels), [2], [ratio], **options)
    # An operator of low rank leaves directions that tie at 0.
    gap = primal.eigengap.values
    sure = (gap > 1e-4) & (np.cumprod(1 - gap, axis=-1) / (1 - gap) > 1e-9)
    assert sure.sum() >= 5
    np.testing.assert_allclose(dual.r2.values[sure], primal.r2.values[sure], atol=1e-6)
    np.testing.assert_allclose(dual.loss, primal.loss, rtol=1e-6, atol=1e-9 * float(primal.loss.max()))
    assert dual.attrs["target_identity"] == primal.attrs["target_identity"] != ""


def test_a_target_operator_that_does_not_fit_the_samples_is_refused(few):
    with pytest.raises(InputError, match="leaves nothing of these images"):
        factorize_samples(few, target=ma.MatrixTarget(np.zeros((2, few.num_pixels))))
    with pytest.raises(InputError):
        factorize_samples(few, target=ma.MatrixTarget(np.ones((2, few.num_pixels + 1))))
