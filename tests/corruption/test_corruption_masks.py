"""Masks by probabilities, by list and by rectangles: validation, and brute force over every mask there is."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_align.corruption import BlockMasking, CleanImages, MaskMixture, PatchMasking, PixelMasking
from mae_align.runtime.errors import InputError
from tests import oracles

SHAPE = (4, 3, 2)


def clean(d: int, shape=SHAPE) -> CleanImages:
    root = np.random.default_rng(d).normal(size=(d, d))
    return CleanImages(root @ root.T, np.random.default_rng(1).normal(size=d), shape)


def test_a_list_of_every_patch_mask_is_patch_masking():
    """Both give the same covariances, and probabilities per pixel with a fill of their own too."""
    masks, kept = oracles.enumerate_masks(SHAPE, 2)
    weights = 0.3**kept * 0.7 ** (kept.max() - kept)
    for fill in (None, 2.5):
        listed = MaskMixture(masks.reshape(-1, *SHAPE).astype(bool), weights, fill=fill)
        keep, pair = listed.probabilities(SHAPE)
        exact = PatchMasking(2, 0.7, fill=fill).moments(clean(24))
        for found in (listed, PixelMasking(keep.reshape(SHAPE), pair, fill=fill)):
            out = found.moments(clean(24))
            np.testing.assert_allclose(out.gram, exact.keep * exact.gram, atol=1e-12)
            np.testing.assert_allclose(out.cross, exact.keep * exact.cross, atol=1e-12)
            np.testing.assert_allclose(np.broadcast_to(out.offset, 24), np.broadcast_to(exact.offset, 24), atol=1e-12)


def test_probabilities_of_pixels_hold_for_all_their_channels():
    masks, weights = np.random.default_rng(0).random((5, 4, 3)) < 0.6, np.array([1.0, 2.0, 3.0, 4.0, 0.0])
    flat = MaskMixture(masks, weights)
    spread = MaskMixture(np.repeat(masks[..., None], 2, 3), weights)
    on = masks.reshape(5, 12).astype(float)
    per_pixel = PixelMasking(masks.T.astype(float).T.transpose(1, 2, 0) @ (weights / 10), on.T * (weights / 10) @ on)
    expected = [(weights[j] / 10) * np.outer(*[np.repeat(on[j], 2)] * 2) for j in range(5)]
    for found in (flat, spread, per_pixel):
        keep, pair = found.probabilities(SHAPE)
        np.testing.assert_allclose(pair, sum(expected), atol=1e-15)
        np.testing.assert_allclose(keep, np.diag(pair), atol=1e-15)


def test_independent_pixels_need_no_pair_matrix():
    keep = np.random.default_rng(2).random(SHAPE)
    m, pair = PixelMasking(keep).probabilities(SHAPE)
    np.testing.assert_array_equal(m, keep.reshape(-1))
    np.testing.assert_allclose(pair, np.where(np.eye(24) > 0, m, np.outer(m, m)))


def test_probabilities_that_no_mask_has_are_refused():
    half = np.full((2, 2), 0.5)
    good = np.full((4, 4), 0.25) + 0.25 * np.eye(4)
    PixelMasking(half, good)
    bent = good.copy()
    bent[0, 1] += 0.1
    loud = good.copy()
    loud[0, 1] = loud[1, 0] = 0.6
    rare = np.full((4, 4), 0.7) + 0.2 * np.eye(4)  # kept with 0.9 each: both at least with 0.8
    odd = good.copy()  # three pixels of which any two are never kept together, each half of the time
    odd[:3, :3] = 0.5 * np.eye(3)
    cases = [
        (half, good[:3, :3], r"pair has shape \[3, 3\]: 4 keep probabilities"),
        (half, bent, "not a symmetric matrix"),
        (half, good * np.nan, "not a symmetric matrix"),
        (half, good + 0.1 * np.eye(4), "the diagonal of pair is not keep"),
        (half, loud, r"pair\[0, 1\] = 0.6 is impossible: with keep 0.5 and 0.5 it lies between 0 and 0.5"),
        (np.full((2, 2), 0.9), rare, r"impossible: .* between 0.8 and 0.9"),
        (half, odd, "not positive semidefinite"),
        (half + 1, None, r"outside \[0, 1\]"),
        (half * np.nan, None, r"outside \[0, 1\]"),
        (half * 0, None, "0 everywhere"),
        (np.ones(4), None, r"keep has shape \[4\]"),
    ]
    for keep, pair, message in cases:
        with pytest.raises(InputError, match=message):
            PixelMasking(keep, pair)
    with pytest.raises(InputError, match="give the masks themselves to MaskMixture"):
        PixelMasking(half).sample(jax.random.key(0), jnp.ones((1, 2, 2, 1)), jnp.ones((2, 2, 1)))
    with pytest.raises(InputError, match="give one shape"):
        PixelMasking(half).check((2, 3, 1))


@pytest.mark.parametrize(
    "masks, weights, message",
    [
        (np.ones((2, 3, 3)), None, "give bool"),
        (np.ones((3, 3), bool), None, "give bool"),
        (np.ones((2, 3, 3), bool), np.ones(3), "give 2 probabilities"),
        (np.ones((2, 3, 3), bool), np.array([1.0, -1.0]), "give 2 probabilities"),
        (np.ones((2, 3, 3), bool), np.zeros(2), "give 2 probabilities"),
        (np.zeros((2, 3, 3), bool), None, "no mask keeps a pixel"),
    ],
)
def test_bad_lists_of_masks_are_refused(masks, weights, message):
    with pytest.raises(InputError, match=message):
        MaskMixture(masks, weights)


@pytest.mark.parametrize("fill", [np.nan, np.ones(3), np.ones((2, 2)), "white", np.full((1, 1, 1), np.inf)])
def test_bad_fills_are_refused(fill):
    for make in (lambda: PatchMasking(2, 0.5, fill=fill), lambda: MaskMixture(np.ones((1, 2, 2), bool), fill=fill)):
        with pytest.raises(InputError, match="fill"):
            make()


def test_a_fill_of_another_shape_or_about_zero_is_refused_where_the_image_is_known():
    mask = PatchMasking(2, 0.5, fill=np.ones((3, 4, 2)))
    with pytest.raises(InputError, match=r"fill has shape \[3, 4, 2\]"):
        mask.moments(clean(24))
    with pytest.raises(InputError, match=r"fill has shape \[3, 4, 2\]"):
        mask.check(SHAPE)
    with pytest.raises(InputError, match="center=True"):
        PatchMasking(2, 0.5, fill=0.0).moments(clean(24)._replace(centered=False))
    PatchMasking(2, 0.5).moments(clean(24)._replace(centered=False))


def test_masks_with_a_fill_are_values_and_not_of_the_exchangeable_family():
    fill = np.arange(24.0).reshape(SHAPE)
    assert PatchMasking(2, 0.5, fill=fill) == PatchMasking(2, 0.5, fill=fill.copy()) != PatchMasking(2, 0.5)
    assert len({PatchMasking(2, 0.5, fill=fill), PatchMasking(2, 0.5, fill=fill.copy()), PatchMasking(2, 0.5)}) == 2
    assert PatchMasking(2, 0.5, fill=fill).name == "PatchMasking(patch_size=2, fill=array[4, 3, 2], ratio=0.5)"
    with pytest.raises(InputError, match="not in the family of masking_sweep: give it to corruption_sweep"):
        PatchMasking(2, 0.5, fill=0.0).p_eff(SHAPE)


# --- blocks ---------------------------------------------------------------------------------------------------------


def every_placing(down: int, across: int, size: tuple[int, int], blocks: int) -> np.ndarray:
    """[m, down * across] kept cells for every placing of some blocks of one size."""
    h, w = size
    covers = []
    for top, left in itertools.product(range(down - h + 1), range(across - w + 1)):
        cover = np.zeros((down, across), bool)
        cover[top : top + h, left : left + w] = True
        covers.append(cover.reshape(-1))
    return np.array([~np.any(chosen, 0) for chosen in itertools.product(covers, repeat=blocks)])


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("scale, aspect, size", [(0.3, 1.5, (3, 2)), (0.1, 1.0, (1, 1)), (0.5, 20.0, (5, 1))])
def test_blocks_of_one_size_are_the_average_over_every_placing(blocks, scale, aspect, size):
    mask = BlockMasking(blocks, (scale, scale), (aspect, aspect))
    assert mask.sizes((5, 4, 1))[0].tolist() == [list(size)]
    kept = every_placing(5, 4, size, blocks).astype(float)
    keep, pair = mask.probabilities((5, 4, 1))
    np.testing.assert_allclose(keep, kept.mean(0), atol=1e-13)
    np.testing.assert_allclose(pair, kept.T @ kept / len(kept), atol=1e-13)


def test_blocks_on_patches_cover_whole_patches_and_all_channels():
    fine = BlockMasking(2, (0.2, 0.4), (0.5, 2.0)).probabilities((3, 2, 1))
    coarse = BlockMasking(2, (0.2, 0.4), (0.5, 2.0), patch_size=(2, 3)).probabilities((5, 6, 2))
    cell = np.repeat((np.arange(5)[:, None] // 2 * 2 + np.arange(6) // 3).reshape(-1), 2)
    np.testing.assert_array_equal(coarse[0], fine[0][cell])
    np.testing.assert_array_equal(coarse[1], fine[1][np.ix_(cell, cell)])


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.floats(0.02, 50),
    st.floats(0.02, 50),
)
def test_probabilities_of_block_sizes_are_the_areas_of_the_definition(down, across, s0, s1, a0, a1):
    """Against a fine midpoint rule over scale and aspect, applied to the rounding itself."""
    (s0, s1), (a0, a1) = sorted((s0, s1)), sorted((a0, a1))
    sizes, chance = BlockMasking(1, (s0, s1), (a0, a1)).sizes((down, across, 1))
    assert chance.sum() == pytest.approx(1.0)
    s, a = np.meshgrid(*(low + (high - low) * (np.arange(400) + 0.5) / 400 for low, high in ((s0, s1), (a0, a1))))
    h = np.clip(np.floor(np.sqrt(s * a * down * across) + 0.5), 1, down).astype(int)
    w = np.clip(np.floor(np.sqrt(s / a * down * across) + 0.5), 1, across).astype(int)
    counted = np.zeros((down + 1, across + 1))
    np.add.at(counted, (h, w), 1 / s.size)
    found = np.zeros_like(counted)
    found[sizes[:, 0], sizes[:, 1]] = chance
    np.testing.assert_allclose(found, counted, atol=0.02)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: BlockMasking(0), "num_blocks=0"),
        (lambda: BlockMasking(1, (0.0, 0.5)), "scale"),
        (lambda: BlockMasking(1, (0.5, 0.2)), "scale"),
        (lambda: BlockMasking(1, (0.5, 1.2)), "scale"),
        (lambda: BlockMasking(1, (0.1, 0.2), (0.0, 1.0)), "aspect"),
        (lambda: BlockMasking(1, (0.1, 0.2), (np.nan, 1.0)), "aspect"),
        (lambda: BlockMasking(1, (1.0, 1.0), (1.0, 1.0)).check((4, 4, 1)), "always cover the whole image"),
        (lambda: BlockMasking(patch_size=9).check((4, 4, 1)), "9x9 is larger than the image"),
    ],
)
def test_bad_blocks_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
