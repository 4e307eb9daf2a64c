from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from model_zoo import build

from mae_align.models import gelu_exact
from mae_align.models.layers import Attention, Block, Dense, LayerNorm, column_sums
from mae_align.runtime.errors import InputError

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def gradients(layer: nnx.Module, x: jax.Array, cotangent: jax.Array) -> tuple[dict, jax.Array]:
    """Gradients of <cotangent, layer(x)> for the parameters (by name) and for x."""
    graph, params = nnx.split(layer)
    of = jax.jit(jax.grad(lambda params, x: jnp.sum(cotangent * nnx.merge(graph, params)(x)), argnums=(0, 1)))
    params, x_grad = of(params, x)
    return nnx.to_pure_dict(params), x_grad


def test_dense_and_its_gradients_follow_the_definition():
    layer = build(lambda: Dense(3, 4, rngs=nnx.Rngs(0)))
    x, g = normal(2, 5, 3), normal(2, 5, 4)
    x64, g64 = (np.asarray(a, np.float64) for a in (x, g))
    kernel, bias = np.asarray(layer.kernel[...], np.float64), np.asarray(layer.bias[...], np.float64)
    np.testing.assert_allclose(layer(x), x64 @ kernel + bias, atol=1e-5)
    params, x_grad = gradients(layer, x, g)
    np.testing.assert_allclose(params["kernel"], np.einsum("bti,bto->io", x64, g64), atol=1e-5)
    np.testing.assert_allclose(params["bias"], g64.sum((0, 1)), atol=1e-5)
    np.testing.assert_allclose(x_grad, g64 @ kernel.T, atol=1e-5)


def test_dense_starts_xavier_uniform_with_zero_bias():
    layer = Dense(300, 100, rngs=nnx.Rngs(0))
    kernel, limit = np.asarray(layer.kernel[...]), np.sqrt(6 / 400)
    assert np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.02)
    assert not np.asarray(layer.bias[...]).any()


def test_column_sums_of_bfloat16_are_summed_in_float32():
    """In bfloat16 1,000 ones would stop at 256."""
    total = column_sums(jnp.ones((1000, 3), jnp.bfloat16))
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, 1000.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_and_its_gradients_follow_the_definition(dtype):
    """Far from mean 0, where a variance from squares would lose its digits."""
    layer = build(lambda: LayerNorm(6, dtype=dtype))
    x, g = normal(2, 5, 6) + 100.0, normal(2, 5, 6)
    x64, g64 = (np.asarray(a, np.float64) for a in (x, g))
    scale, bias = (np.asarray(p[...], np.float64) for p in (layer.scale, layer.bias))
    centred = x64 - x64.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    z = centred / deviation
    out = layer(x)
    assert out.dtype == dtype
    tolerance = 1e-4 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(out.astype(jnp.float32), z * scale + bias, atol=tolerance)
    params, x_grad = gradients(layer, x, g)
    assert params["scale"].dtype == params["bias"].dtype == jnp.float32
    tolerance = 1e-4 if dtype == jnp.float32 else 0.15
    np.testing.assert_allclose(params["scale"], (g64 * z).sum((0, 1)), atol=tolerance)
    np.testing.assert_allclose(params["bias"], g64.sum((0, 1)), atol=tolerance)
    inner = g64 * scale
    expected = (inner - inner.mean(-1, keepdims=True) - z * (inner * z).mean(-1, keepdims=True)) / deviation
    np.testing.assert_allclose(x_grad, expected, atol=tolerance)


def test_layer_norm_of_constant_rows_is_the_bias():
    layer = build(lambda: LayerNorm(4))
    np.testing.assert_allclose(layer(jnp.full((3, 4), 7.0)), np.tile(layer.bias[...], (3, 1)), atol=1e-5)


def test_attention_follows_the_definition_and_does_not_mix_images():
    layer, heads = build(lambda: Attention(6, 2, rngs=nnx.Rngs(0))), 2
    x = normal(3, 5, 6)
    out = jax.jit(layer)(x)
    parameters = (p[...] for p in (layer.qkv.kernel, layer.qkv.bias, layer.out.kernel, layer.out.bias))
    w, b, w_out, b_out = (np.asarray(p, np.float64) for p in parameters)
    for image, found in zip(np.asarray(x, np.float64), out, strict=True):
        joined = []
        for head in range(heads):
            q, k, v = (image @ w[:, c] + b[c] for c in (np.arange(3) + 3 * head + 6 * part for part in range(3)))
            joined.append(scipy.special.softmax(q @ k.T / np.sqrt(3), axis=1) @ v)
        np.testing.assert_allclose(found, np.concatenate(joined, axis=1) @ w_out + b_out, atol=1e-4)


def test_attention_of_large_scores_is_finite():
    """Softmax before its shift would overflow."""
    layer = build(lambda: Attention(4, 1, rngs=nnx.Rngs(0)))
    x = 1e3 * normal(2, 3, 4)
    params, x_grad = gradients(layer, x, jnp.ones((2, 3, 4)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((jax.jit(layer)(x), params, x_grad)))


def test_block_gradients_agree_with_finite_differences():
    block = build(lambda: Block(8, 2, 2, rngs=nnx.Rngs(0)))
    x, g, step = normal(2, 3, 8), normal(2, 3, 8), 1e-2
    graph, params = nnx.split(block)
    value = jax.jit(lambda params, x: jnp.sum(g * nnx.merge(graph, params)(x)))
    grads = jax.jit(jax.grad(value))(params, x)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda p, rng=rng: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        ends = [value(jax.tree.map(lambda p, v, s=s: p + s * v, params, direction), x) for s in (step, -step)]
        slope = sum(float(jnp.vdot(a, b)) for a, b in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
        np.testing.assert_allclose(slope, (float(ends[0]) - float(ends[1])) / (2 * step), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    with pytest.raises(InputError, match="heads do not divide the width 8"):
        Attention(8, heads, rngs=nnx.Rngs(0))


def test_exact_gelu_is_the_error_function_form():
    x = jnp.linspace(-4, 4, 41)
    np.testing.assert_allclose(gelu_exact(x), x * scipy.special.ndtr(x), atol=1e-6)
    gap = np.abs(np.asarray(gelu_exact(x)) - np.asarray(jax.nn.gelu(x)))
    assert 1e-4 < gap.max() < 5e-4
