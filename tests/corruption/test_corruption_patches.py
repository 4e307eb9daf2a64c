"""Patch masks: their moments against the sum over every mask there is, and against their own samplers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mae_align.corruption import (
    FixedCountPatchMasking,
    GaussianNoise,
    PatchMask,
    PatchMasking,
    RandomRatioMasking,
)
from mae_align.data.patches import ImageShape, patch_grid, patch_labels
from mae_align.runtime.errors import InputError
from tests.corruption.corruption_cases import LIMIT, about_zero, assert_within_error, spd

MASKS = {
    "independent": lambda size, shape: PatchMasking(size, 0.3),
    "mostly dropped": lambda size, shape: PatchMasking(size, 0.9),
    "fixed count": lambda size, shape: FixedCountPatchMasking.from_ratio(size, 0.45, shape),
    "one visible": lambda size, shape: FixedCountPatchMasking(size, 1),
    "random ratio": lambda size, shape: RandomRatioMasking(size, 0.2, 1.0),
}


def every_mask(mask: PatchMask, patches: int) -> Iterator[tuple[float, np.ndarray]]:
    """(probability, kept [patches]) of every mask there is, from the definition of each family."""
    # Gauss-Legendre on [low, high]: exact for polynomials of the degrees that occur here.
    nodes, weights = np.polynomial.legendre.leggauss(12)
    for kept in itertools.product([0.0, 1.0], repeat=patches):
        on = int(sum(kept))
        if isinstance(mask, PatchMasking):
            probability = (1 - mask.ratio) ** on * mask.ratio ** (patches - on)
        elif isinstance(mask, FixedCountPatchMasking):
            probability = (on == mask.num_visible) / math.comb(patches, mask.num_visible)
        else:
            assert isinstance(mask, RandomRatioMasking)
            p = mask.low + (mask.high - mask.low) * (nodes + 1) / 2
            probability = float(weights @ ((1 - p) ** on * p ** (patches - on))) / 2
        yield probability, np.array(kept)


TINY: list[tuple[ImageShape, int | tuple[int, int]]] = [
    ((3, 4, 2), 2),
    ((4, 5, 1), (2, 2)),
    ((5, 3, 1), (4, 2)),
    ((2, 2, 3), 2),
    ((1, 5, 2), 1),
]
EXACT_MASKS = {
    **MASKS,
    "nothing dropped": lambda size, shape: PatchMasking(size, 0.0),
    "all but one dropped at most": lambda size, shape: RandomRatioMasking(size, 0.0, 0.999),
    "one ratio": lambda size, shape: RandomRatioMasking(size, 0.4, 0.4),
    "all visible": lambda size, shape: FixedCountPatchMasking.from_ratio(size, 0.0, shape),
}


@pytest.mark.parametrize(("shape", "size"), TINY)
@pytest.mark.parametrize("name", EXACT_MASKS)
def test_mask_moments_equal_the_sum_over_every_mask(name, shape, size):
    mask = EXACT_MASKS[name](size, shape)
    labels = patch_labels(shape, size)
    patches, d = math.prod(patch_grid(shape, size)), math.prod(shape)
    total, gram, cross = 0.0, np.zeros((d, d)), np.zeros((d, d))
    one, two = 0.0, 0.0
    sxx = spd(d)
    for probability, kept in every_mask(mask, patches):
        on = kept[labels]
        total += probability
        gram += probability * sxx * np.outer(on, on)
        cross += probability * on[:, None] * sxx
        one += probability * kept[0]
        two += probability * kept[0] * kept[-1]
    assert total == pytest.approx(1.0, abs=1e-12)
    stated = mask.moments(about_zero(sxx, shape))
    np.testing.assert_allclose(stated.keep * stated.gram, gram, atol=1e-12 * sxx.max())
    np.testing.assert_allclose(stated.keep * stated.cross, cross, atol=1e-12 * sxx.max())
    assert stated.keep == mask.keep_probability(shape) == pytest.approx(one, abs=1e-12)
    assert mask.p_eff(shape) == pytest.approx(0.0 if patches == 1 else 1.0 - two / one, abs=1e-12)
    chex.assert_shape([stated.gram, stated.cross], (d, d))
    assert stated.gram.dtype == stated.cross.dtype == np.float64


@pytest.mark.parametrize("mask", [PatchMasking(2, 1.0), RandomRatioMasking(2, 1.0, 1.0), FixedCountPatchMasking(2, 1)])
def test_where_no_two_patches_are_kept_the_gram_is_block_diagonal(mask):
    shape = (3, 5, 2)
    sxx, label = spd(30), patch_labels(shape, 2)
    stated = mask.moments(about_zero(sxx, shape))
    assert mask.p_eff(shape) == 1.0
    np.testing.assert_array_equal(stated.gram, sxx * (label[:, None] == label))
    np.testing.assert_array_equal(stated.cross, sxx)
    assert stated.keep == (1 / 6 if isinstance(mask, FixedCountPatchMasking) else 0.0)


def test_one_patch_and_no_mask_are_the_same_problem_exactly():
    shape, sxx = (4, 4, 1), spd(16)
    whole = [PatchMasking(4, 0.75), PatchMasking(4, 1.0), FixedCountPatchMasking(4, 1), RandomRatioMasking(4, 0.0, 1.0)]
    for mask in [*whole, PatchMasking(2, 0.0), FixedCountPatchMasking(2, 4), RandomRatioMasking((1, 2), 0.0, 0.0)]:
        assert mask.p_eff(shape) == 0.0
        np.testing.assert_array_equal(mask.moments(about_zero(sxx, shape)).gram, sxx)


def test_the_moments_do_not_change_or_share_the_covariance():
    sxx = spd(16)
    before = sxx.copy()
    for corruption in (PatchMasking(2, 0.5), GaussianNoise(1.0)):
        gram = corruption.moments(about_zero(sxx, (4, 4, 1))).gram
        gram[:] = 0.0
    np.testing.assert_array_equal(sxx, before)


# The sampler


# Patches that do not divide the sides, one way and both, one that does; squares and rectangles; several channels.
SAMPLED: list[tuple[str, ImageShape, int | tuple[int, int]]] = [
    ("independent", (5, 7, 2), 2),
    ("mostly dropped", (7, 4, 1), (3, 4)),
    ("fixed count", (5, 6, 1), (2, 4)),
    ("one visible", (4, 6, 1), (2, 3)),
    ("random ratio", (5, 6, 3), (4, 5)),
]


@pytest.mark.parametrize(("name", "shape", "size"), SAMPLED)
def test_mask_moments_are_those_of_the_sampler(name, shape, size):
    """12,800 corrupted images: which pixels and pairs are kept, E[x'], E[x' x'^T] and E[x' x^T]."""
    mask = MASKS[name](size, shape)
    d, batches, batch = math.prod(shape), 256, 50
    rng = np.random.default_rng(2)
    half = rng.integers(1, 90, (batch // 2, *shape)) * rng.choice([-1, 1], (batch // 2, 1, 1, 1))
    x = np.concatenate([half, -half]).reshape(batch, d)  # never 0, and the mean is 0 exactly
    images = np.tile((x + 128).astype(np.uint8).reshape(batch, *shape), (batches, 1, 1, 1))
    out = np.asarray(jax.jit(mask.sample)(jax.random.key(1), images, np.full(shape, 128.0, np.float32)))
    x_prime = out.reshape(batches, batch, d).astype(np.float64) - 128.0

    kept = x_prime != 0.0
    np.testing.assert_array_equal(x_prime, np.where(kept, x, 0.0))
    on = kept.reshape(-1, d).astype(np.float64)
    labels = patch_labels(shape, size)
    by_patch = [on[:, labels == p] for p in range(labels.max() + 1)]
    assert all((pixels == pixels[:, :1]).all() for pixels in by_patch)
    if isinstance(mask, FixedCountPatchMasking):
        assert {sum(row) for row in zip(*(pixels[:, 0] for pixels in by_patch), strict=True)} == {mask.num_visible}
    ones = mask.moments(about_zero(np.ones((d, d)), shape))
    pair = ones.keep * ones.gram
    assert_within_error(on.T @ on / len(on), pair, np.sqrt(pair * (1 - pair) / len(on)))

    stated = mask.moments(about_zero(x.T @ x / batch, shape))
    for per_batch, expected in (
        (x_prime.transpose(0, 2, 1) @ x_prime / batch, stated.keep * stated.gram),
        (x_prime.transpose(0, 2, 1) @ x.astype(np.float64) / batch, stated.keep * stated.cross),
        (x_prime.mean(1), np.zeros(d)),
    ):
        assert_within_error(per_batch.mean(0), expected, per_batch.std(0) / np.sqrt(batches))


# Draws of one shape are compiled once.
DRAWS, PATCHES = 20_000, 8


@pytest.mark.parametrize("visible", range(1, PATCHES + 1))
def test_a_fixed_count_is_kept_exactly_in_every_image(visible):
    kept = np.asarray(FixedCountPatchMasking(2, visible).sample_kept(jax.random.key(4), DRAWS, PATCHES))
    assert kept.dtype == bool
    np.testing.assert_array_equal(kept.sum(1), visible)


def test_every_subset_of_a_fixed_count_is_equally_likely():
    kept = np.asarray(FixedCountPatchMasking(1, 3).sample_kept(jax.random.key(6), DRAWS, PATCHES))
    subsets = np.bincount(kept @ (1 << np.arange(PATCHES)))
    seen = subsets[subsets > 0]
    assert len(seen) == math.comb(PATCHES, 3)
    assert scipy.stats.chisquare(seen).pvalue > 1e-3


@pytest.mark.parametrize(
    ("mask", "share"),
    [
        (PatchMasking(1, 0.7), scipy.stats.binom.pmf(np.arange(9), 8, 0.3)),
        # A uniform keep rate makes every number of kept patches equally likely; on [0, 1/2] it is a beta integral.
        (RandomRatioMasking(1, 0.0, 1.0), np.full(9, 1 / 9)),
        (RandomRatioMasking(1, 0.5, 1.0), 2 * scipy.stats.beta.cdf(0.5, np.arange(1, 10), 9 - np.arange(9)) / 9),
        (RandomRatioMasking(1, 0.7, 0.7), scipy.stats.binom.pmf(np.arange(9), 8, 0.3)),
    ],
)
def test_number_of_kept_patches_has_the_distribution_of_its_family(mask, share):
    count = np.asarray(mask.sample_kept(jax.random.key(7), DRAWS, PATCHES)).sum(1)
    assert share.sum() == pytest.approx(1.0)
    assert scipy.stats.chisquare(np.bincount(count, minlength=9), DRAWS * share).pvalue > 1e-3


def test_independent_patches_are_independent():
    kept = np.asarray(PatchMasking(1, 0.5).sample_kept(jax.random.key(8), DRAWS, PATCHES)) - 0.5
    scores = 4 * kept.T @ kept / np.sqrt(DRAWS)
    assert np.abs(scores[~np.eye(PATCHES, dtype=bool)]).max() < LIMIT


@pytest.mark.parametrize("mask", [PatchMasking(1, 0.5), FixedCountPatchMasking(1, 4), RandomRatioMasking(1, 0.0, 1.0)])
def test_images_of_a_batch_are_masked_independently(mask):
    kept = np.asarray(mask.sample_kept(jax.random.key(9), DRAWS, PATCHES)) - 0.5
    assert np.abs(4 * kept[:-1].T @ kept[1:] / np.sqrt(DRAWS)).max() < LIMIT
    count = kept.sum(1)
    if count.std() > 0:
        assert abs(np.corrcoef(count[:-1], count[1:])[0, 1]) < LIMIT / np.sqrt(DRAWS)
        # Nor do the numbers that mask one image set the ratio of another, as they would with one key for both.
        assert abs(np.corrcoef(count, kept.ravel()[:DRAWS])[0, 1]) < LIMIT / np.sqrt(DRAWS)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_ends_of_the_ratio_drop_nothing_and_everything(ratio):
    for mask in (PatchMasking(1, ratio), RandomRatioMasking(1, ratio, ratio)):
        kept = np.asarray(mask.sample_kept(jax.random.key(10), DRAWS, PATCHES))
        assert kept.all() if ratio == 0.0 else not kept.any()


def test_kept_pixels_are_the_image_and_dropped_pixels_the_fill():
    rng = np.random.default_rng(11)
    images = rng.integers(0, 256, (40, 5, 6, 3)).astype(np.float32)
    fill = rng.normal(size=(5, 6, 3)).astype(np.float32)  # no integers: never equal to a pixel
    out = np.asarray(PatchMasking((2, 4), 0.5).sample(jax.random.key(12), jnp.asarray(images), jnp.asarray(fill)))
    kept = out == images
    np.testing.assert_array_equal(out, np.where(kept, images, fill))
    assert 0.2 < kept.mean() < 0.8


@pytest.mark.parametrize("corruption", [PatchMasking(2, 0.4), GaussianNoise(np.linspace(0, 2, 40).reshape(4, 5, 2))])
def test_samplers_draw_the_same_float32_numbers_mapped_over_keys_and_whatever_the_float64_switch(corruption):
    images, fill = np.random.default_rng(14).normal(size=(6, 4, 5, 2)), np.zeros((4, 5, 2))
    keys = jax.random.split(jax.random.key(13), 3)
    mapped = jax.jit(jax.vmap(corruption.sample, in_axes=(0, None, None)))(keys, images, fill)
    chex.assert_shape(mapped, (3, 6, 4, 5, 2))
    chex.assert_type(mapped, jnp.float32)
    assert not np.array_equal(mapped[0], mapped[1])
    chex.clear_trace_counter()
    one = jax.jit(chex.assert_max_traces(corruption.sample, n=1))
    with jax.enable_x64(True):
        for key, expected in zip(keys, np.asarray(mapped), strict=True):
            inside = one(key, jnp.asarray(images, jnp.float64), jnp.asarray(fill, jnp.float64))
            chex.assert_type(inside, jnp.float32)
            np.testing.assert_allclose(np.asarray(inside), expected, atol=1e-6)


@pytest.mark.parametrize("mask", [PatchMasking(1, 0.4), FixedCountPatchMasking(1, 3), RandomRatioMasking(1, 0.1, 0.9)])
def test_masks_do_not_depend_on_the_float64_switch(mask):
    outside = np.asarray(mask.sample_kept(jax.random.key(15), 200, PATCHES))
    with jax.enable_x64(True):
        inside = np.asarray(mask.sample_kept(jax.random.key(15), 200, PATCHES))
    np.testing.assert_array_equal(inside, outside)
    assert 0 < outside.sum() < outside.size


# Families by ratio


@pytest.mark.parametrize("ratio", [0.0, 0.11, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("family", [PatchMasking, RandomRatioMasking])
def test_from_ratio_drops_this_share(family, ratio):
    mask = family.from_ratio((2, 3), ratio, (5, 7, 1))
    assert mask.patch_size == (2, 3)
    assert 1.0 - mask.keep_probability((5, 7, 1)) == pytest.approx(ratio, abs=1e-15)


def test_random_ratio_from_ratio_is_the_widest_interval():
    for ratio in np.linspace(0, 1, 21):
        mask = RandomRatioMasking.from_ratio(1, ratio, (2, 2, 1))
        assert 0.0 <= mask.low <= mask.high <= 1.0
        assert mask.low == 0.0 or mask.high == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(("shape", "size"), [((4, 4, 1), 1), ((5, 7, 2), 2), ((6, 9, 3), (2, 3)), ((4, 4, 1), 4)])
def test_fixed_count_from_ratio_is_the_nearest_share_of_patches(shape, size):
    patches = math.prod(patch_grid(shape, size))
    realisable = 1.0 - np.arange(1, patches + 1) / patches
    for ratio in np.linspace(0.0, 1.0 - 0.51 / patches, 57):
        mask = FixedCountPatchMasking.from_ratio(size, float(ratio), shape)
        realised = 1.0 - mask.keep_probability(shape)
        assert abs(realised - ratio) <= np.abs(realisable - ratio).min() + 1e-12


def test_masks_are_values():
    assert PatchMasking(2, 0.5) == PatchMasking(2, 0.5) != PatchMasking((2, 2), 0.25)
    assert len({FixedCountPatchMasking(2, 3), FixedCountPatchMasking(2, 3), RandomRatioMasking(2, 0.1, 0.2)}) == 2
    with pytest.raises(AttributeError):
        PatchMasking(2, 0.5).ratio = 0.1  # pyright: ignore[reportAttributeAccessIssue]


SEVEN = FixedCountPatchMasking(2, 7)
WIDE = PatchMasking((2, 5), 0.5)
REFUSED = [
    (lambda: FixedCountPatchMasking(2, 0), "num_visible=0: at least one patch must stay visible"),
    (lambda: FixedCountPatchMasking(2, -3), "num_visible=-3: at least one patch must stay visible"),
    (
        lambda: FixedCountPatchMasking.from_ratio(2, 1.0, (4, 5, 1)),
        r"mask ratio 1 leaves none of the 6 patches .*stay at or below 0\.8333",
    ),
    (lambda: SEVEN.p_eff((4, 5, 1)), "num_visible=7 but the image has 6 patches"),
    (lambda: SEVEN.moments(about_zero(np.eye(20), (4, 5, 1))), "num_visible=7 but the image has 6 patches"),
    (lambda: SEVEN.sample(jax.random.key(0), jnp.ones((2, 4, 5, 1)), jnp.ones((4, 5, 1))), "num_visible=7 but"),
    (lambda: RandomRatioMasking(2, 0.6, 0.5), r"mask ratios from 0\.6 to 0\.5: low must not be over high"),
    (lambda: WIDE.moments(about_zero(np.eye(16), (4, 4, 1))), "patch 2x5 is larger than the image 4x4"),
    (lambda: WIDE.sample(jax.random.key(0), jnp.ones((2, 4, 4, 1)), jnp.ones((4, 4, 1))), "patch 2x5 is larger"),
    *((lambda size=size: PatchMasking(size, 0.5), "give a positive integer or a pair") for size in (0, (2, 0))),
    (lambda: FixedCountPatchMasking((2, 0), 1), "give a positive integer or a pair"),
    (lambda: RandomRatioMasking(0, 0.0, 1.0), "give a positive integer or a pair"),
    *((lambda p=p: PatchMasking(2, p), "give a number from 0 to 1") for p in (-0.1, 1.01, np.nan, np.inf)),
    (lambda: RandomRatioMasking(2, 0.0, 1.01), "give a number from 0 to 1"),
    (lambda: RandomRatioMasking(2, np.nan, 1.0), "give a number from 0 to 1"),
    *(
        (lambda family=family: family.from_ratio(2, 1.01, (4, 4, 1)), "give a number from 0 to 1")
        for family in (PatchMasking, FixedCountPatchMasking, RandomRatioMasking)
    ),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_masks_are_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        call()


def test_the_last_good_counts_pass():
    assert FixedCountPatchMasking(2, 6).keep_probability((4, 5, 1)) == 1.0
    assert FixedCountPatchMasking.from_ratio(2, 0.8333, (4, 5, 1)).num_visible == 1
