"""Moments against int64 arithmetic (8-bit images, bit for bit) and two-pass long double arithmetic (floats)."""

from __future__ import annotations

import dataclasses
import itertools
import warnings

import chex
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from mae_align.moments.accumulate import group_of
from mae_align.moments.moments import Moments, SecondMoments
from mae_align.runtime.errors import InputError

SHAPE = (2, 3, 2)
D, Q = 12, 4
# Equal products round the same way each time they are added: float32 sums of a pixel with two values drift this far.
TWO_VALUED = 1e-5


def random_bytes(rng: np.random.Generator, n: int) -> np.ndarray:
    """8-bit images: noise, plus a constant channel, a pixel of extremes only and a copy of another pixel."""
    images = rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8)
    images[:, 0, 0, 0] = rng.integers(0, 256)
    images[:, 0, 1, 0] = 255 * rng.integers(0, 2, n)
    images[:, 1, 2, 1] = images[:, 0, 2, 0]
    return images


def int64_moments(images: np.ndarray, labels: np.ndarray, num_classes: int) -> SecondMoments:
    """Covariances whose numerators n sum(ab) - sum(a) sum(b) are computed in int64, rounded once by the division."""
    n = len(images)
    x = images.reshape(n, -1).astype(np.int64)
    y = (labels[:, None] == np.arange(num_classes)).astype(np.int64)

    def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        numerator = n * (a.T @ b) - np.outer(a.sum(0), b.sum(0))
        assert np.abs(numerator).max() < 2**53
        return numerator / n**2

    return SecondMoments(n, covariance(x, x), covariance(x, y), covariance(y, y))


def longdouble_moments(x: np.ndarray, y: np.ndarray) -> SecondMoments:
    """Two-pass covariances in extended precision: the means first, then products of the differences."""
    n = len(x)
    x, y = (np.asarray(a, np.longdouble).reshape(n, -1) for a in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return SecondMoments(n, *((a.T @ b / n).astype(np.float64) for a, b in ((x, x), (x, y), (y, y))))


def assert_same(ours: SecondMoments, expected: SecondMoments) -> None:
    """Equal bit for bit."""
    for name in SecondMoments._fields:
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)


def assert_near(ours: SecondMoments, expected: SecondMoments, tolerance: float) -> None:
    """Equal counts, and relative errors in the Frobenius norm of at most ``tolerance``.

    The scale of the cross moments is that of x times that of y: they themselves may be next to nothing.
    """
    assert ours.count == expected.count
    size_x, size_y = np.sqrt(np.linalg.norm(expected.sxx)), np.sqrt(np.linalg.norm(expected.syy))
    for name, scale in (("sxx", size_x * size_x), ("sxy", size_x * size_y), ("syy", size_y * size_y)):
        a, b = getattr(ours, name), getattr(expected, name)
        chex.assert_equal_shape([a, b])
        assert np.linalg.norm(a - b) <= tolerance * scale, name


def assert_same_state(ours: Moments, expected: Moments) -> None:
    for field in dataclasses.fields(Moments):
        a, b = getattr(ours, field.name), getattr(expected, field.name)
        np.testing.assert_array_equal(a, b, err_msg=field.name)


# 8-bit images


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 2500])),
    cuts=st.integers(0, 7),
    groups=st.sampled_from([1, 3, 20]),
)
def test_8bit_moments_equal_int64_for_any_order_split_and_merge_tree(seed, n, cuts, groups):
    rng = np.random.default_rng(seed)
    images, labels = random_bytes(rng, n), rng.integers(0, Q, n)
    expected = int64_moments(images, labels, Q)
    whole = Moments.from_arrays(images, labels, num_classes=Q, groups=groups)
    assert_same(whole.second_moments(), expected)
    np.testing.assert_allclose(whole.mean_x, images.reshape(n, D).mean(0), rtol=1e-14)
    np.testing.assert_array_equal(whole.mean_y, np.bincount(labels, minlength=Q) / n)

    order = rng.permutation(n)
    edges = np.unique(np.concatenate([[0, n], rng.integers(0, n + 1, cuts)]))
    pieces = [order[a:b] for a, b in itertools.pairwise(edges)]
    updated = Moments.from_arrays(images[pieces[0]], labels[pieces[0]], num_classes=Q, groups=groups)
    for piece in pieces[1:]:
        updated = updated.update(images[piece], labels[piece])
    assert_same(updated.second_moments(), expected)

    forest = [Moments.from_arrays(images[p], labels[p], num_classes=Q, groups=groups) for p in pieces]
    while len(forest) > 1:
        i, j = rng.choice(len(forest), 2, replace=False)
        merged = forest[i].merge(forest[j])
        forest = [tree for k, tree in enumerate(forest) if k not in (i, j)] + [merged]
    assert_same(forest[0].second_moments(), expected)


def test_8bit_updates_in_order_equal_one_call_in_every_group():
    rng = np.random.default_rng(1)
    images, labels = random_bytes(rng, 3000), rng.integers(0, Q, 3000)
    whole = Moments.from_arrays(images, labels, groups=7)
    parts = Moments.from_arrays(images[:11], labels[:11], num_classes=Q, groups=7)
    for a, b in ((11, 12), (12, 1700), (1700, 3000)):
        parts = parts.update(images[a:b], labels[a:b])
    assert_same_state(parts, whole)
    split = [
        Moments.from_arrays(images[a:b], labels[a:b], num_classes=Q, groups=7, first_index=a)
        for a, b in ((0, 1100), (1100, 3000))
    ]
    assert_same_state(split[1].merge(split[0]), whole)


@pytest.mark.parametrize("value", [0, 255])
def test_8bit_sums_stay_exact_where_a_batch_is_at_the_edge_of_float32(value):
    """All but one pixel value have the largest product, the odd one makes every sum odd: 2^24 + 1 is no float32."""
    images = np.full((4096, 1, 2, 1), value, np.uint8)
    images[1500, 0, 0, 0] = images[3, 0, 1, 0] = 1
    labels = np.arange(4096) % 2
    assert_same(Moments.from_arrays(images, labels).second_moments(), int64_moments(images, labels, 2))


def test_8bit_moments_about_zero_are_exact_too():
    rng = np.random.default_rng(2)
    images, labels = random_bytes(rng, 1500), rng.integers(0, Q, 1500)
    x, y = images.reshape(1500, D).astype(np.int64), np.eye(Q, dtype=np.int64)[labels]
    raw = SecondMoments(1500, x.T @ x / 1500, x.T @ y / 1500, y.T @ y / 1500)
    centred = Moments.from_arrays(images, labels)
    assert_same(centred.about(np.zeros(D), np.zeros(Q)), raw)
    assert_same(Moments.from_arrays(images, labels, center=False).second_moments(), raw)


def test_8bit_images_may_be_views_in_any_memory_layout():
    rng = np.random.default_rng(3)
    images, labels = random_bytes(rng, 50), rng.integers(0, Q, 50)
    layout = np.asfortranarray(np.repeat(images, 2, axis=0))[::2]
    assert not layout.flags.c_contiguous
    assert_same_state(Moments.from_arrays(layout, labels), Moments.from_arrays(images, labels))


def test_moments_do_not_depend_on_the_float64_switch():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, Q, 60)
    for images in (random_bytes(rng, 60), rng.normal(size=(60, *SHAPE)).astype(np.float32)):
        outside = Moments.from_arrays(images, labels)
        with jax.enable_x64(True):
            inside = Moments.from_arrays(images, labels)
        assert_same_state(inside, outside)


# Constant pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("center", [True, False])
def test_a_constant_pixel_has_no_variance_at_all(dtype, center):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (5000, *SHAPE)).astype(dtype)
    images[:, 1, 1, 0] = 77 if dtype == np.uint8 else 0.1
    labels = rng.integers(0, Q, 5000)
    m = Moments.from_arrays(images, labels, groups=3, center=center)
    m = m.update(images[:7], labels[:7]).merge(m)
    at = np.ravel_multi_index((1, 1, 0), SHAPE)
    if center:
        assert not m.sxx[at].any() and not m.sxx[:, at].any() and not m.sxy[at].any()
    else:
        assert m.sxx[at, at] == pytest.approx(float(images[0, 1, 1, 0]) ** 2, rel=1e-6)
    assert (np.delete(np.diag(m.sxx), at) > 0).all()


def test_a_constant_float64_pixel_has_the_variance_of_rounding():
    rng = np.random.default_rng(6)
    images = rng.normal(size=(5000, *SHAPE))
    images[:, 0, 0, 0] = 0.1
    assert abs(Moments.from_arrays(images, images[:, 1, 0, 0]).sxx[0, 0]) < 1e-32


# Groups


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_groups_are_the_moments_of_their_own_samples_and_add_up(dtype):
    rng = np.random.default_rng(7)
    images, labels = random_bytes(rng, 2600).astype(dtype), rng.integers(0, Q, 2600)
    m = Moments.from_arrays(images, labels, groups=5)
    member = group_of(np.arange(2600), 5)
    np.testing.assert_array_equal(m.counts, np.bincount(member, minlength=5))
    centre_x, centre_y = rng.normal(size=D), rng.normal(size=Q)
    x, y = images.reshape(2600, D) - centre_x, np.eye(Q)[labels] - centre_y
    parts = list(m.groups_about(centre_x, centre_y))
    assert len(parts) == 5
    for g, part in enumerate(parts):
        a, b = x[member == g], y[member == g]
        n = len(a)
        expected = SecondMoments(n, a.T @ a / n, a.T @ b / n, b.T @ b / n)
        assert_near(part, expected, TWO_VALUED if dtype == np.float32 else 1e-13)
    whole = m.about(centre_x, centre_y)
    total = {f: sum((p.count * getattr(p, f) for p in parts), np.zeros(())) / 2600 for f in ("sxx", "sxy", "syy")}
    assert_near(SecondMoments(sum(p.count for p in parts), **total), whole, 1e-14)
    ungrouped = Moments.from_arrays(images, labels).second_moments()
    assert_near(m.second_moments(), ungrouped, TWO_VALUED if dtype == np.float32 else 1e-13)


def test_8bit_group_sums_add_up_bit_for_bit():
    rng = np.random.default_rng(8)
    images, labels = random_bytes(rng, 2600), rng.integers(0, Q, 2600)
    whole, grouped = (Moments.from_arrays(images, labels, groups=g) for g in (1, 20))
    for name in ("counts", "sum_x", "sum_y", "sum_xx", "sum_xy", "sum_yy"):
        np.testing.assert_array_equal(getattr(grouped, name).sum(0), getattr(whole, name)[0], err_msg=name)


def test_an_empty_group_counts_nothing():
    images, labels = random_bytes(np.random.default_rng(9), 5), np.array([0, 1, 2, 3, 0])
    m = Moments.from_arrays(images, labels, groups=40)
    parts = list(m.groups_about(m.mean_x, m.mean_y))
    assert [p.count for p in parts] == m.counts.tolist()
    assert sum(p.count == 0 for p in parts) >= 35
    for part in parts:
        if part.count == 0:
            assert not part.sxx.any() and not part.sxy.any() and not part.syy.any()
    assert_same(m.second_moments(), int64_moments(images, labels, 4))


# Float images


def drifting(rng: np.random.Generator, n: int, offset: float) -> np.ndarray:
    """[n, h, w, c] float64 with spectrum over three decades, sorted by brightness, mean ``offset`` times the spread."""
    x = (rng.normal(size=(n, D)) * np.logspace(0, -1.5, D)) @ rng.normal(size=(D, D))
    x = x[np.argsort(x.sum(1))]
    return (x + offset * x.std(0) * np.sign(rng.normal(size=D))).reshape(n, *SHAPE)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "tolerance_of_mean"), [(np.float32, 1e-6, 1e-7), (np.float64, 1e-12, 1e-13)]
)
@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("n", [2, 1024, 4097, 9001])
def test_float_moments_equal_two_passes_in_extended_precision(dtype, tolerance, tolerance_of_mean, offset, n):
    rng = np.random.default_rng(n)
    images = drifting(rng, n, offset).astype(dtype)
    y = images.reshape(n, D)[:, :3].astype(np.float64) + 100.0 * rng.normal(size=(n, 3)) - 1e4
    m = Moments.from_arrays(images, y, groups=1 + n % 3)
    assert_near(m.second_moments(), longdouble_moments(images, y), tolerance)
    x = images.reshape(n, D).astype(np.longdouble)
    spread = x.std(0) + np.finfo(np.float64).eps / tolerance_of_mean * np.abs(x).max(0)
    assert (np.abs(m.mean_x - x.mean(0)) <= tolerance_of_mean * spread).all()
    np.testing.assert_allclose(m.mean_y, y.mean(0), rtol=1e-13)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_float32_moments_of_two_valued_images(share):
    rng = np.random.default_rng(10)
    images = (rng.random((4096, 4, 8, 1)) < share).astype(np.float32)
    y = rng.normal(size=4096)
    assert_near(Moments.from_arrays(images, y).second_moments(), longdouble_moments(images, y), TWO_VALUED)
    exact = Moments.from_arrays(images.astype(np.uint8), y).second_moments()
    assert_near(exact, longdouble_moments(images, y), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float_merge_is_associative_and_commutative(dtype, tolerance, offset):
    rng = np.random.default_rng(11)
    images = drifting(rng, 5200, offset).astype(dtype)
    y = rng.normal(size=(5200, 2)) + [0.0, 1e3]
    a, b, c, d = (
        Moments.from_arrays(images[i:j], y[i:j], groups=3, first_index=i)
        for i, j in ((0, 1), (1, 900), (900, 5000), (5000, 5200))
    )
    expected = longdouble_moments(images, y)
    trees = [a.merge(b).merge(c).merge(d), a.merge(b.merge(c.merge(d))), d.merge(b).merge(a.merge(c))]
    for tree in trees:
        assert_near(tree.second_moments(), expected, tolerance)
        assert_near(tree.second_moments(), trees[0].second_moments(), 1e-12)
        np.testing.assert_array_equal(tree.counts, trees[0].counts)
    updated = a.update(images[1:900], y[1:900]).update(images[900:], y[900:])
    assert_near(updated.second_moments(), expected, tolerance)
    for ours, one in zip(
        updated.groups_about(a.mean_x, a.mean_y), trees[1].groups_about(a.mean_x, a.mean_y), strict=True
    ):
        assert_near(ours, one, tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_first_batch_unlike_all_others_costs_no_accuracy(dtype):
    """Sums about the first batch's mean alone would be 40 times the variance, and so would their rounding."""
    rng = np.random.default_rng(27)
    images = rng.normal(size=(41 * 1024, *SHAPE)).astype(dtype)
    images[:1024] += 1000
    y = rng.normal(size=len(images))
    assert_near(Moments.from_arrays(images, y).second_moments(), longdouble_moments(images, y), 1e-6)


def test_sums_are_kept_about_the_means_of_floats_and_about_128_of_bytes():
    """Merging is then the centred update of Chan for the former, and addition of integers for the latter."""
    rng = np.random.default_rng(28)
    images, y = drifting(rng, 3000, 10.0), rng.normal(size=(3000, 2)) + 7.0
    pixels = random_bytes(rng, 3000)
    floats = Moments.from_arrays(images[:2000], y[:2000], groups=2).update(images[2000:], y[2000:])
    for m in (Moments.from_arrays(images, y), floats):
        np.testing.assert_allclose(m.pivot_x, images.reshape(3000, D).mean(0), rtol=1e-10)
        np.testing.assert_allclose(m.pivot_y, y.mean(0), rtol=1e-12)
    for m in (Moments.from_arrays(pixels, y), Moments.from_arrays(pixels[:7], y[:7]).update(pixels[7:], y[7:])):
        np.testing.assert_array_equal(m.pivot_x, np.full(D, 128.0))
        np.testing.assert_allclose(m.pivot_y, y.mean(0), rtol=1e-12)
    assert not Moments.from_arrays(pixels, np.arange(3000) % Q).pivot_y.any()


def test_the_same_sums_about_any_other_point_are_the_same_moments():
    rng = np.random.default_rng(29)
    images, y = rng.normal(size=(90, *SHAPE)), rng.normal(size=(90, 2)) + 3.0
    member = np.arange(90) % 3

    def about(pivot_x: np.ndarray, pivot_y: np.ndarray) -> Moments:
        x, t = images.reshape(90, D) - pivot_x, y - pivot_y
        parts = [(x[member == g], t[member == g]) for g in range(3)]
        return Moments(
            image_shape=SHAPE,
            pixel_dtype="float64",
            center=True,
            preprocessing="none",
            pivot_x=pivot_x,
            pivot_y=pivot_y,
            counts=np.full(3, 30),
            sum_x=np.stack([a.sum(0) for a, _ in parts]),
            sum_y=np.stack([b.sum(0) for _, b in parts]),
            sum_xx=np.stack([a.T @ a for a, _ in parts]),
            sum_xy=np.stack([a.T @ b for a, b in parts]),
            sum_yy=np.stack([b.T @ b for _, b in parts]),
        )

    one = about(rng.normal(size=D), rng.normal(size=2))
    for other in (one, about(rng.normal(size=D), one.pivot_y), about(one.pivot_x, rng.normal(size=2))):
        assert_near(other.second_moments(), longdouble_moments(images, y), 1e-13)
        np.testing.assert_allclose(other.yty, y.T @ y / 90, rtol=1e-13)
        np.testing.assert_allclose(other.mean_x, images.reshape(90, D).mean(0), atol=1e-14)
        np.testing.assert_allclose(other.mean_y, y.mean(0), rtol=1e-14)
        for ours, first in zip(
            other.groups_about(one.mean_x, one.mean_y), one.groups_about(one.mean_x, one.mean_y), strict=True
        ):
            assert_near(ours, first, 1e-13)
        for twice in (one.merge(other), other.merge(one)):
            assert_near(twice.second_moments(), longdouble_moments(images, y)._replace(count=180), 1e-13)


def test_merging_two_clusters_far_apart_keeps_both_spreads():
    """Chan's update: between-cluster variance of (1 - -1)^2 / 4 beside within-cluster variances of 1e-12."""
    rng = np.random.default_rng(12)
    low, high = 1e-6 * rng.normal(size=(2, 500, 1, 1, 1))
    y = np.zeros((500, 1))
    m = Moments.from_arrays(low - 1.0, y).merge(Moments.from_arrays(high + 1.0, y))
    expected = longdouble_moments(np.concatenate([low - 1.0, high + 1.0]), np.zeros(1000)).sxx[0, 0]
    assert m.sxx[0, 0] == pytest.approx(expected, rel=1e-15)
    (within,) = Moments.from_arrays(low - 1.0, y).sxx.ravel()
    assert within == pytest.approx(np.var(low - 1.0), rel=1e-12)


def test_half_precision_images_have_the_moments_of_their_float32_values():
    rng = np.random.default_rng(13)
    images, labels = rng.normal(size=(70, *SHAPE)).astype(np.float16), rng.integers(0, Q, 70)
    m = Moments.from_arrays(images, labels)
    assert m.pixel_dtype == "float32"
    assert_same_state(m, Moments.from_arrays(images.astype(np.float32), labels))


@pytest.mark.parametrize("scale", [1e-12, 1e15])
def test_float32_moments_do_not_depend_on_the_units(scale):
    rng = np.random.default_rng(14)
    images = (scale * rng.normal(size=(300, *SHAPE))).astype(np.float32)
    y = rng.normal(size=300)
    assert_near(Moments.from_arrays(images, y).second_moments(), longdouble_moments(images, y), 1e-6)


# Targets, centring and centres


def test_regression_targets_are_one_column():
    rng = np.random.default_rng(15)
    images, y = random_bytes(rng, 1300), 50.0 + rng.normal(size=1300)
    m = Moments.from_arrays(images, y)
    assert m.num_targets == 1
    assert_near(m.second_moments(), longdouble_moments(images, y), 1e-12)
    assert_same_state(Moments.from_arrays(images, y[:, None]), m)
    assert_near(
        m.update(images, -y).second_moments(),
        longdouble_moments(np.tile(images, (2, 1, 1, 1)), np.append(y, -y)),
        1e-12,
    )


def test_several_binary_labels_per_image_are_numbers():
    rng = np.random.default_rng(16)
    images, y = random_bytes(rng, 90), rng.integers(0, 2, (90, 3))
    assert_near(Moments.from_arrays(images, y).second_moments(), longdouble_moments(images, y), 1e-13)


def test_class_labels_have_multinomial_moments():
    labels = np.repeat([0, 2, 3], [5, 70, 25])
    m = Moments.from_arrays(random_bytes(np.random.default_rng(17), 100), labels, num_classes=5)
    share = np.array([0.05, 0.0, 0.7, 0.25, 0.0])
    np.testing.assert_array_equal(m.mean_y, share)
    np.testing.assert_allclose(m.syy, np.diag(share) - np.outer(share, share), atol=1e-16)
    np.testing.assert_array_equal(m.yty, np.diag(share))


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_without_centring_moments_are_about_zero(dtype):
    rng = np.random.default_rng(18)
    images, y = random_bytes(rng, 1200).astype(dtype), rng.normal(size=(1200, 2)) + 3.0
    m = Moments.from_arrays(images[:500], y[:500], center=False).update(images[500:], y[500:])
    x = images.reshape(1200, D).astype(np.float64)
    assert not m.center
    assert not m.mean_x.any() and not m.mean_y.any()
    chex.assert_shape(m.mean_x, (D,))
    chex.assert_shape(m.mean_y, (2,))
    assert_near(m.second_moments(), SecondMoments(1200, x.T @ x / 1200, x.T @ y / 1200, y.T @ y / 1200), 1e-13)


@pytest.mark.parametrize("center", [True, False])
def test_yty_is_never_centred(center):
    rng = np.random.default_rng(19)
    images, y = random_bytes(rng, 400), rng.normal(size=(400, 3)) + [5.0, 0.0, -2.0]
    parts = [Moments.from_arrays(images[i:j], y[i:j], center=center) for i, j in ((0, 150), (150, 400))]
    for m in (Moments.from_arrays(images, y, center=center), parts[0].merge(parts[1])):
        np.testing.assert_allclose(m.yty, y.T @ y / 400, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_held_out_moments_about_training_means(dtype):
    rng = np.random.default_rng(20)
    images, y = random_bytes(rng, 1700).astype(dtype), rng.normal(size=(1700, 2))
    train, held = Moments.from_arrays(images[:1000], y[:1000]), Moments.from_arrays(images[1000:], y[1000:])
    x = images.reshape(1700, D).astype(np.float64)
    a, b = x[1000:] - x[:1000].mean(0), y[1000:] - y[:1000].mean(0)
    about = held.about(train.mean_x, train.mean_y)
    assert_near(
        about, SecondMoments(700, a.T @ a / 700, a.T @ b / 700, b.T @ b / 700), 1e-6 if dtype == np.float32 else 1e-12
    )
    # Moved by the difference of the means, and by nothing else.
    shift_x, shift_y = held.mean_x - train.mean_x, held.mean_y - train.mean_y
    moved = SecondMoments(
        700,
        held.sxx + np.outer(shift_x, shift_x),
        held.sxy + np.outer(shift_x, shift_y),
        held.syy + np.outer(shift_y, shift_y),
    )
    assert_near(about, moved, 1e-12)
    assert_near(held.about(held.mean_x, held.mean_y), held.second_moments(), 1e-12)


# Shape of the results, and what may not change


def test_results_are_float64_numpy_arrays_of_the_stated_shapes():
    images = random_bytes(np.random.default_rng(21), 10)
    m = Moments.from_arrays(images, np.arange(10) % Q, groups=3, preprocessing="thumbnails")
    arrays = {
        "mean_x": (D,),
        "mean_y": (Q,),
        "sxx": (D, D),
        "sxy": (D, Q),
        "syy": (Q, Q),
        "yty": (Q, Q),
        "sum_x": (3, D),
        "sum_y": (3, Q),
        "sum_xx": (3, D, D),
        "sum_xy": (3, D, Q),
        "sum_yy": (3, Q, Q),
    }
    for name, shape in arrays.items():
        array = getattr(m, name)
        assert type(array) is np.ndarray and array.dtype == np.float64, name
        chex.assert_shape(array, shape)
    assert (m.count, m.num_pixels, m.num_targets, m.image_shape) == (10, D, Q, SHAPE)
    assert (m.pixel_dtype, m.center, m.preprocessing, m.counts.dtype) == ("uint8", True, "thumbnails", np.int64)
    assert type(m.count) is int


def test_the_quantisation_step_is_known_for_8bit_images_alone():
    images, labels = random_bytes(np.random.default_rng(22), 4), np.array([0, 1, 0, 1])
    assert Moments.from_arrays(images, labels).quantization_step == 1.0
    assert Moments.from_arrays(images.astype(np.float32), labels).quantization_step == 0.0


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_operands_do_not_change(dtype):
    rng = np.random.default_rng(23)
    images, labels = random_bytes(rng, 80).astype(dtype), rng.integers(0, Q, 80)
    pixels, classes = images.copy(), labels.copy()

    def make() -> tuple[Moments, Moments]:
        return (
            Moments.from_arrays(images[:50], labels[:50], num_classes=Q),
            Moments.from_arrays(images[50:], labels[50:], num_classes=Q),
        )

    (a, b), (a_before, b_before) = make(), make()
    merged = a.merge(b)
    a.update(images, labels)
    a.about(np.ones(D), np.ones(Q))
    list(merged.groups_about(np.ones(D), np.ones(Q)))
    merged.sum_xx[:] = merged.sum_x[:] = merged.counts[:] = -1
    assert_same_state(a, a_before)
    assert_same_state(b, b_before)
    np.testing.assert_array_equal(images, pixels)
    np.testing.assert_array_equal(labels, classes)


# What is refused


def alternatives() -> dict[str, tuple[Moments, str]]:
    images, labels = random_bytes(np.random.default_rng(24), 12), np.arange(12) % Q
    turned = images.transpose(0, 2, 1, 3)
    return {
        "image_shape": (Moments.from_arrays(turned, labels), r"image_shape is \(2, 3, 2\) and \(3, 2, 2\)"),
        "pixel_dtype": (Moments.from_arrays(images.astype(np.float32), labels), "pixel_dtype is 'uint8' and 'float32'"),
        "center": (Moments.from_arrays(images, labels, center=False), "center is True and False"),
        "preprocessing": (
            Moments.from_arrays(images, labels, preprocessing="halved"),
            "preprocessing is 'stored pixels' and 'halved'",
        ),
        "targets": (Moments.from_arrays(images, labels, num_classes=5), "num_targets is 4 and 5"),
        "groups": (Moments.from_arrays(images, labels, groups=2), "num_groups is 1 and 2"),
    }


@pytest.mark.parametrize("field", alternatives())
def test_moments_made_differently_do_not_merge(field):
    images, labels = random_bytes(np.random.default_rng(25), 12), np.arange(12) % Q
    mine = Moments.from_arrays(images, labels)
    other, message = alternatives()[field]
    with pytest.raises(InputError, match=f"moments made differently do not merge: .*{message}"):
        mine.merge(other)
    with pytest.raises(InputError, match="moments made differently do not merge"):
        other.merge(mine)


def test_updates_that_do_not_fit_are_refused():
    images, labels = random_bytes(np.random.default_rng(26), 12), np.arange(12) % Q
    m = Moments.from_arrays(images, labels, preprocessing="halved", center=False, groups=2)
    assert m.update(images, labels).preprocessing == "halved"
    with pytest.raises(InputError, match="pixel_dtype is 'uint8' and 'float64'"):
        m.update(images.astype(np.float64), labels)
    with pytest.raises(InputError, match="image_shape"):
        m.update(images[:, :1], labels)
    with pytest.raises(InputError, match="labels run from 1 to 4"):
        m.update(images, labels + 1)
    with pytest.raises(InputError, match="targets"):
        m.update(images, np.ones((12, Q + 1)))


@pytest.mark.parametrize(
    ("images", "targets", "options", "message"),
    [
        (np.zeros((3, 4, 4)), np.arange(3), {}, r"images have shape \[3, 4, 4\]"),
        (np.zeros((3, 4, 4, 1), np.int32), np.arange(3), {}, "images have dtype int32"),
        (np.full((3, 4, 4, 1), np.nan), np.arange(3), {}, "image 0 holds NaN"),
        (np.zeros((3, 4, 4, 1)), np.arange(4), {}, "3 images but 4 targets"),
        (np.zeros((3, 4, 4, 1)), np.zeros(3, int), {}, "all labels are one class"),
        (np.zeros((3, 4, 4, 1)), np.arange(3), {"num_classes": 2}, "labels run from 0 to 2"),
        (np.zeros((3, 4, 4, 1)), np.array([0.0, 1.0, np.nan]), {}, "targets hold NaN"),
        (np.zeros((3, 4, 4, 1)), np.arange(3), {"groups": 0}, "groups=0: ask for at least 1 group"),
        (np.zeros((3, 4, 4, 1)), np.arange(3), {"groups": -2}, "groups=-2"),
    ],
)
def test_bad_input_is_refused_before_any_work(images, targets, options, message):
    with pytest.raises(InputError, match=message):
        Moments.from_arrays(images, targets, **options)


def test_nothing_warns_on_one_sample():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = Moments.from_arrays(np.ones((1, *SHAPE), np.float32), np.array([[2.0]]), groups=4)
        assert m.count == 1
        assert not m.sxx.any() and not m.syy.any()
        assert_near(
            m.about(np.zeros(D), np.zeros(1)),
            SecondMoments(1, np.ones((D, D)), 2 * np.ones((D, 1)), np.full((1, 1), 4.0)),
            0.0,
        )
