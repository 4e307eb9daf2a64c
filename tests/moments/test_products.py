from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_align.moments.sums import add_upper, gram, mirror_upper, upper_blocks


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
