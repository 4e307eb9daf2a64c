from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mae_align as ma
from experiments.alignment_curves.studies import (
    Backgrounds,
    Curve,
    Protocol,
    background_jobs,
    blended,
    class_jobs,
    like_foreground,
    pca_curve,
    photographs,
    resolution_jobs,
    run_jobs,
    set_jobs,
)
from mae_align.runtime.files import PointStore

PROTOCOL = Protocol(center=True, groups=4, pixel_noise=None)


def unbalanced_set(n: int = 400, seed: int = 0, side: int = 4) -> ma.ImageDataset:
    """Images whose brightness and shape tell three classes of 50%, 30% and 20%."""
    rng = np.random.default_rng(seed)
    patterns = rng.normal(size=(3, side, side, 1)) * 40

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.choice(3, size=count, p=[0.5, 0.3, 0.2])
        scales = np.linspace(5, 60, side * side).reshape(1, side, side, 1)
        images = 128 + patterns[labels] + rng.normal(size=(count, side, side, 1)) * scales
        return np.clip(images, 0, 255).astype(np.uint8), labels

    train, test = split(n), split(n // 2)
    return ma.ImageDataset(*train, *test, ("a", "b", "c"), "toy")


def moments(data: ma.ImageDataset, *, center: bool = True, groups: int = 4) -> tuple[ma.Moments, ma.Moments]:
    train = ma.Moments.from_arrays(data.train_images, data.train_labels, num_classes=data.num_classes, center=center)
    test = ma.Moments.from_arrays(
        data.test_images, data.test_labels, num_classes=data.num_classes, center=center, groups=groups
    )
    return train, test


@pytest.fixture(scope="module")
def digits() -> ma.ImageDataset:
    return ma.load_dataset("digits")


# --- the curve ---


@pytest.mark.parametrize("center", [True, False])
def test_curve_equals_least_squares_on_principal_component_scores(center):
    data = unbalanced_set()
    curve = pca_curve(*moments(data, center=center), pixel_noise=0.0)
    x, z = (a.reshape(len(a), -1).astype(np.float64) for a in (data.train_images, data.test_images))
    y, v = np.eye(3)[data.train_labels], np.eye(3)[data.test_labels]
    yty = y.T @ y
    if center:
        x, z, y, v = x - x.mean(0), z - x.mean(0), y - y.mean(0), v - y.mean(0)
    left, _, right = np.linalg.svd(x, full_matrices=False)
    along = left.T @ y  # rows of Q^T Y
    published = np.cumsum(np.einsum("kq,qp,kp->k", along, yty, along))
    np.testing.assert_allclose(curve.percent, 100 * np.sqrt(published / published[-1]), rtol=1e-9)
    for k in (1, 2, 5, 16):
        scores, test_scores = x @ right[:k].T, z @ right[:k].T
        weights, *_ = np.linalg.lstsq(scores, y, rcond=None)
        inside = 1 - ((y - scores @ weights) ** 2).sum() / (y**2).sum()
        outside = 1 - ((v - test_scores @ weights) ** 2).sum() / (v**2).sum()
        np.testing.assert_allclose(curve.r2[k - 1], inside, rtol=1e-9)
        np.testing.assert_allclose(curve.eval_r2[k - 1], outside, rtol=1e-9)


def test_about_zero_the_first_component_takes_the_mean_label():
    # C balanced classes of linear r2 rho: the first component, nearly the mean image, alone reaches
    # 100 / sqrt(1 + (C - 1) rho) of the published score about zero, however little it tells of the classes.
    rng = np.random.default_rng(0)
    images, labels = rng.integers(150, 250, (800, 3, 3, 1)).astype(np.uint8), np.arange(800) % 4
    data = ma.ImageDataset(images, labels, images[:80], labels[:80], tuple("abcd"), "noise")
    centred = pca_curve(*moments(data), pixel_noise=0.0)
    about_zero = pca_curve(*moments(data, center=False), pixel_noise=0.0)
    expected = 100 / np.sqrt(1 + 3 * centred.r2[-1])
    assert centred.r2[-1] < 0.03
    assert centred.percent[0] < 60
    np.testing.assert_allclose(about_zero.percent[0], expected, atol=0.2)


def test_curve_equals_the_sweep_without_noise():
    train, test = moments(unbalanced_set())
    curve = pca_curve(train, test, None)
    sweep = ma.gaussian_sweep(train, [0.0], eval_moments=test).isel(noise_level=0)
    np.testing.assert_allclose(curve.r2, sweep.r2, rtol=1e-10)
    np.testing.assert_allclose(curve.alignment, sweep.alignment, rtol=1e-10)
    np.testing.assert_allclose(curve.eval_r2, sweep.eval_r2, rtol=1e-10)
    # Groups pass through float32.
    np.testing.assert_allclose(curve.eval_r2_se, sweep.eval_r2_se, rtol=1e-4)
    np.testing.assert_allclose(curve.eval_influence, sweep.eval_influence, atol=1e-6)


def test_influence_of_the_share_is_its_derivative_by_the_weight_of_a_group():
    train, test = moments(unbalanced_set())
    share, influence = pca_curve(train, test, None).eval_share()
    assert share.max() == 1.0
    for group in range(4):
        weights = np.full(4, 1000)
        weights[group] += 1
        sums = {
            name: getattr(test, name) * weights.reshape(-1, *[1] * (getattr(test, name).ndim - 1))
            for name in ("counts", "sum_x", "sum_y", "sum_xx", "sum_xy", "sum_yy")
        }
        moved, _ = pca_curve(train, dataclasses.replace(test, **sums), None).eval_share()
        np.testing.assert_allclose(1000 * (moved - share), influence[group], atol=2e-4)
    assert np.abs(influence).max() > 0.01


def test_share_is_undefined_where_nothing_is_explained():
    values = np.array([-0.1, -0.2])
    zeros = np.zeros((2, 2))
    curve = Curve(values, values, values, values, zeros, *(np.asarray(1) for _ in range(3)))
    share, influence = curve.eval_share()
    assert np.isnan(share).all()
    assert np.isnan(influence).all()


def test_features_for_ninety_percent():
    r2, held_out = np.array([0.2, 0.5, 0.89, 0.91, 1.0]), np.array([0.2, 0.54, 0.6, 0.5, 0.1])
    nothing = np.zeros((2, 5))
    curve = Curve(r2, r2, held_out, r2, nothing, *(np.asarray(5) for _ in range(3)))
    assert curve.k90 == 4
    # Of its best, 0.6, and not of its value at full rank.
    assert curve.eval_k90 == 2


# --- classes ---


def test_class_subsets_are_nested_and_of_equal_size(digits):
    jobs = class_jobs(digits, (2, 3, 5, 10), 2, 0, PROTOCOL)
    built = {key: job.build() for key, job in jobs.items()}
    for order in (0, 1):
        names = [set(built[order, count].class_names) for count in (2, 3, 5, 10)]
        assert [len(n) for n in names] == [2, 3, 5, 10]
        assert names[0] < names[1] < names[2] < names[3]
    assert built[0, 2].class_names != built[1, 2].class_names
    fewest = int(np.bincount(digits.train_labels).min())
    for (_, count), data in built.items():
        assert np.bincount(data.train_labels).tolist() == [2 * fewest // count] * count
        # Every test image of the chosen classes, with the label of its own name.
        assert len(data.test_labels) == sum(int((digits.test_labels == int(c)).sum()) for c in data.class_names)
    data = built[0, 3]
    first = data.test_images[data.test_labels == 1][0]
    original = digits.test_images[digits.test_labels == int(data.class_names[1])][0]
    assert np.array_equal(first, original)


def test_class_subsets_follow_the_seed(digits):
    once, again, other = (class_jobs(digits, (3,), 1, seed, PROTOCOL)[0, 3].build() for seed in (0, 0, 1))
    assert np.array_equal(once.train_images, again.train_images)
    assert once.class_names == again.class_names
    assert not np.array_equal(once.train_images, other.train_images)


# --- resolution ---


def test_pooling_keeps_labels_and_divides_the_pixel_noise(digits):
    jobs = resolution_jobs(digits, (1, 2, 4), PROTOCOL)
    noise = [jobs[factor].protocol.pixel_noise or 0.0 for factor in (1, 2, 4)]
    np.testing.assert_allclose(noise, [1 / 12, 1 / 48, 1 / 192])
    for factor in (1, 2, 4):
        data = jobs[factor].build()
        assert data.image_shape == (8 // factor, 8 // factor, 1)
        assert int(np.prod(data.image_shape)) == jobs[factor].num_pixels
        assert np.array_equal(data.test_labels, digits.test_labels)
        blocks = digits.test_images[..., 0].reshape(-1, 8 // factor, factor, 8 // factor, factor)
        np.testing.assert_allclose(data.test_images[..., 0], blocks.mean((2, 4)), atol=1e-5)


def test_pooled_curve_equals_the_curve_of_features_that_are_pooled_pixels(digits, tmp_path):
    # Pooling is linear: at full rank, the probe on pooled images is the probe on f x f block means.
    job = resolution_jobs(digits, (4,), dataclasses.replace(PROTOCOL, pixel_noise=0.0))[4]
    curve = run_jobs([job], PointStore(tmp_path, "a"), 1, 2**33)[job.key]
    blocks = np.kron(np.eye(2), np.ones((4, 1)) / 4)
    encoder = np.kron(blocks, blocks)
    train, test = moments(digits)
    inside, outside = ma.encoder_curves(train, encoder, eval_moments=test, pixel_noise=0.0)
    assert outside is not None
    np.testing.assert_allclose(curve.r2[-1], inside.r2[-1], rtol=1e-9)
    np.testing.assert_allclose(curve.eval_r2[-1], outside.r2[-1], rtol=1e-9)


# --- background ---


def test_photographs_for_training_and_test_are_different_parts():
    found = photographs()
    assert found.train.shape == (2, 106, 112, 3)
    assert found.test.shape == (2, 106, 48, 3)
    from sklearn.datasets import load_sample_images

    photo = np.stack(load_sample_images().images).astype(np.float64)
    np.testing.assert_allclose(found.train[1, 3, 5], photo[1, 12:16, 20:24].mean((0, 1)), atol=1e-4)
    np.testing.assert_allclose(found.test[0, 3, 5], photo[0, 12:16, 468:472].mean((0, 1)), atol=1e-4)


def test_grey_glyphs_get_grey_backgrounds_and_colour_keeps_colour():
    colour = Backgrounds(*(np.random.default_rng(i).integers(0, 256, (2, 9, 9, 3)).astype(np.uint8) for i in (0, 1)))
    grey = like_foreground(colour, 1)
    assert grey.test.shape == (2, 9, 9, 1)
    np.testing.assert_allclose(grey.train[0, 0, 0, 0], colour.train[0, 0, 0].mean(), rtol=1e-6)
    assert like_foreground(colour, 3) is colour


def test_contrast_changes_nothing_but_the_background(digits):
    backgrounds = like_foreground(photographs(), 1)
    jobs = background_jobs(digits, backgrounds, (0.0, 0.5, 1.0), 0, PROTOCOL)
    none, half, full = (jobs[c].build() for c in (0.0, 0.5, 1.0))
    expected = np.rint(digits.test_images.astype(np.float64) * 255 / 16).astype(np.uint8)
    assert np.array_equal(none.test_images, expected)
    for data in (none, half, full):
        assert data.train_images.dtype == np.uint8
        assert np.array_equal(data.train_labels, digits.train_labels)
        assert np.array_equal(data.test_labels, digits.test_labels)
    # What the background adds doubles with the contrast, up to rounding; behind ink it adds nothing.
    base = none.test_images.astype(int)
    added_half, added_full = half.test_images.astype(int) - base, full.test_images.astype(int) - base
    assert np.abs(added_full - 2 * added_half).max() <= 2
    assert (added_full[digits.test_images == 16] == 0).all()
    assert added_full[digits.test_images == 0].std() > 20


def test_train_and_test_glyphs_get_crops_of_their_own_backgrounds(digits):
    dark, light = np.full((1, 8, 8, 1), 10, np.uint8), np.full((1, 8, 8, 1), 200, np.uint8)
    data = blended(digits, Backgrounds(dark, light), 1.0, 0)
    assert set(data.train_images[digits.train_images == 0]) == {10}
    assert set(data.test_images[digits.test_images == 0]) == {200}


# --- running ---


def test_finished_curves_are_not_computed_again(digits, tmp_path, monkeypatch):
    jobs = list(set_jobs({"digits": digits, "again": digits}, PROTOCOL).values())
    first = run_jobs(jobs[:1], PointStore(tmp_path, "a"), 1, 2**33)
    calls = []
    monkeypatch.setattr("experiments.alignment_curves.studies.pca_curve", lambda *a: calls.append(a) or pca_curve(*a))
    both = run_jobs(jobs, PointStore(tmp_path, "a"), None, 2**33)
    assert len(calls) == 1
    for mine, theirs in zip(first["set-0"], both["set-0"], strict=True):
        assert np.array_equal(mine, theirs)
    # A stored curve is worth what a fresh one is.
    np.testing.assert_allclose(both["set-0"].eval_r2, both["set-1"].eval_r2, rtol=1e-12)


def test_memory_bounds_the_workers(digits, tmp_path, monkeypatch):
    wanted = []
    real = __import__("mae_align.runtime.pool", fromlist=["run_groups"]).run_groups

    def spy(groups, *, workers, store, progress):
        wanted.append(workers)
        return real(groups, workers=workers, store=store, progress=progress)

    monkeypatch.setattr("experiments.alignment_curves.studies.run_groups", spy)
    monkeypatch.setattr("experiments.alignment_curves.studies.worker_count", lambda *_: 8)
    jobs = list(set_jobs({"digits": digits}, PROTOCOL).values())
    for i, memory in enumerate((2**40, 6 * jobs[0].memory, 1)):
        run_jobs(jobs, PointStore(tmp_path / str(i), "a"), None, memory)
    assert wanted == [8, 3, 1]
