"""Sums on devices: exactness at the limits of the number formats, and where the collectives are."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_align.moments import sums
from mae_align.moments.sums import add_upper, gram, mirror_upper, upper_blocks
from mae_align.runtime.processes import data_mesh

COLLECTIVE = re.compile(r"\b(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def carried(state: sums.Sums) -> sums.ByteSums:
    assert isinstance(state, sums.ByteSums)
    return sums.carried(state)


def one_device() -> jax.sharding.Mesh:
    return data_mesh(jax.devices()[:1])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_step_holds_no_collective_and_the_end_holds_one(dtype):
    mesh, dtype = data_mesh(), np.dtype(dtype)
    assert mesh.devices.size == 8
    state = sums.empty(mesh, 6, 3, dtype)
    rows = jax.device_put((np.zeros((512, 6), dtype), np.zeros(512, np.int32)), sums.sharding(mesh))
    pivot = () if dtype == np.uint8 else (np.zeros(6, dtype),)
    step = sums.add_rows(mesh, dtype).lower(state, *rows, *pivot).compile().as_text() or ""
    assert "fusion" in step and not COLLECTIVE.findall(step)
    if isinstance(state, sums.ByteSums):
        carry = jax.jit(sums.carried).lower(state).compile().as_text() or ""
        assert not COLLECTIVE.findall(carry)
    leaves = [limb for pair in (*state.xx, state.xe) for limb in pair]
    end = sums.reduce_program(mesh).lower(leaves).compile().as_text() or ""
    assert COLLECTIVE.findall(end) == ["all-reduce("]


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("number", [1, 8])
def test_integers_far_over_one_limb_stay_exact(value, number):
    """Equal extreme pixels, odd ones strewn in: sums of up to 2^33 in odd multiples, both signs."""
    mesh, dtype = data_mesh(jax.devices()[:number]), np.dtype(np.uint8)
    state, step = sums.empty(mesh, 2, 1, dtype), sums.add_rows(mesh, dtype)
    rows = np.full((number * sums.MAX_ROWS, 2), value, np.uint8)
    rows[5] = [1, 255]
    rows[-3] = [3, 0]
    labels = np.zeros(len(rows), np.int32)
    z = rows.astype(np.int64) - 128
    steps = 3 * sums.CARRY_EVERY + 7
    for i in range(1, steps + 1):
        state, _ = step(state, rows, labels)
        if i % sums.CARRY_EVERY == 0:
            state = carried(state)
    [(xx, xe)] = sums.total([carried(state)], mesh)
    np.testing.assert_array_equal(xx, steps * (z.T @ z))
    np.testing.assert_array_equal(xe[:, 0], steps * z.sum(0))
    assert xx.max() > 2**31


def test_the_limbs_hold_until_the_carry():
    """The largest sum of a step, as often as it may be added without a carry, on top of a full limb."""
    most = sums.CARRY_EVERY * sums.MAX_ROWS * 128**2 + 2**16 - 1
    assert most < 2**31


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_floats_do_not_round_at_every_step(dtype):
    """One large step, then 1,000 small ones, each below the rounding error of the sum: products are exact integers."""
    dtype = np.dtype(dtype)
    with jax.enable_x64(dtype == np.float64):
        mesh = one_device()
        state, step = sums.empty(mesh, 1, 1, dtype), sums.add_rows(mesh, dtype)
        labels, pivot = np.zeros(2, np.int32), np.zeros(1, dtype)
        large = 2.0 ** (13 if dtype == np.float32 else 27)
        state, _ = step(state, np.array([[large], [-large]], dtype), labels, pivot)
        for _ in range(1000):
            state, _ = step(state, np.array([[1.0], [-1.0]], dtype), labels, pivot)
        assert np.asarray(state.count).item() == 2002
        high, low = (np.asarray(limb).item() for limb in state.xx[0])
        assert int(high) + int(low) == 2 * int(large) ** 2 + 2000
        assert np.asarray(state.xx[0][0]).dtype == dtype


def test_padding_counts_nothing_whatever_it_holds():
    for dtype, filling in ((np.dtype(np.uint8), 7), (np.dtype(np.float32), np.nan)):
        mesh = data_mesh(jax.devices()[:2])
        state = sums.empty(mesh, 2, 3, dtype)
        rows = np.full((8, 2), filling, dtype)
        rows[:3] = [[1, 2], [3, 5], [0, 1]]
        labels = np.array([0, 2, 0, -1, -1, -1, -1, -1], np.int32)
        pivot = () if dtype == np.uint8 else (np.zeros(2, dtype),)
        state, _ = sums.add_rows(mesh, dtype)(state, rows, labels, *pivot)
        if isinstance(state, sums.FloatSums):
            assert np.asarray(state.count).tolist() == [3, 0]
            z = rows[:3] - rows[:3].mean(0)
        else:
            state = sums.carried(state)
            z = rows[:3].astype(np.float64) - 128
        [(xx, xe)] = sums.total([state], mesh)
        np.testing.assert_allclose(xx, z.T @ z, rtol=1e-6)
        e = np.array([[1, 0, 0], [0, 0, 1], [1, 0, 0]], float)
        e = e - e.mean(0) if dtype == np.float32 else e
        np.testing.assert_allclose(xe, z.T @ e, rtol=1e-6, atol=1e-6)


# Symmetric products


@pytest.mark.parametrize("d", [1, 7, 192, 193, 400, 769, 1000])
def test_products_of_integers_are_exact(d):
    z = np.random.default_rng(d).integers(-128, 128, (50, d))
    expected = (z.T @ z).astype(np.float64)
    np.testing.assert_array_equal(np.asarray(gram(jnp.asarray(z, jnp.float32))), expected)
    total = np.zeros((d, d))
    for half in (z[:20], z[20:]):
        add_upper(total, upper_blocks(jnp.asarray(half, jnp.float32)))
    mirror_upper(total)
    np.testing.assert_array_equal(total, expected)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 9), d=st.sampled_from([3, 200, 577]), seed=st.integers(0, 99))
def test_gram_is_symmetric_and_close_to_numpy(n, d, seed):
    z = np.random.default_rng(seed).normal(size=(n, d))
    with jax.enable_x64(True):
        found = np.asarray(gram(jnp.asarray(z, jnp.float64)))
    np.testing.assert_allclose(found, z.T @ z, atol=1e-12)
    np.testing.assert_allclose(found, found.T, atol=1e-12)


def test_less_is_multiplied_than_by_a_full_product():
    z = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    costs = [jax.jit(f).lower(z).compile().cost_analysis() or {} for f in (upper_blocks, lambda z: z.T @ z)]
    assert 0 < costs[0]["flops"] < 0.65 * costs[1]["flops"]


def test_gram_maps_over_a_batch():
    z = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (3, 5, 400)), jnp.float32)
    np.testing.assert_array_equal(jax.vmap(gram)(z), jnp.stack([gram(a) for a in z]))
