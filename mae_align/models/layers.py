"""Layers that stay matrix products: dense layer, layer normalisation, attention.

XLA's CPU backend runs matrix products near the machine's rate and sums over rows far below it. So tokens are flattened
to rows before every product, sums over rows are products with ones, and attention is batched over batch and heads.
Under ``vmap`` over weights these stay (batched) products.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mae_align.runtime.errors import InputError

Activation = Callable[[jax.Array], jax.Array]
Initializer = Callable[..., jax.Array]

xavier_uniform = nnx.initializers.xavier_uniform()


def gelu_exact(x: jax.Array) -> jax.Array:
    """x Phi(x) by the error function, as the published masked autoencoder has it.

    ``jax.nn.gelu`` is the tanh form: within 5e-4 of this, at about the same cost.

    Args:
        x: any shape.

    Returns:
        The same shape and dtype.

    Example:
        >>> round(float(gelu_exact(jnp.array(1.0))), 4), round(float(jax.nn.gelu(jnp.array(1.0))), 4)
        (0.8413, 0.8412)
    """
    return jax.nn.gelu(x, approximate=False)


def column_sums(x: jax.Array) -> jax.Array:
    """Sums over rows, as a product with ones.

    Args:
        x: [n, w].

    Returns:
        [w] float32.

    Example:
        >>> column_sums(jnp.ones((3, 2), jnp.bfloat16))
        Array([3., 3.], dtype=float32)
    """
    return jnp.matmul(jnp.ones((1, x.shape[0]), x.dtype), x, preferred_element_type=jnp.float32)[0]


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias on every row; the gradient of the bias is a product (:func:`column_sums`).

    Args:
        x: [n, w].
        bias: [w] float32.

    Returns:
        [n, w] in the dtype of x.

    Example:
        >>> add_bias(jnp.zeros((1, 2)), jnp.array([1.0, 2.0])).tolist()
        [[1.0, 2.0]]
    """
    return x + bias.astype(x.dtype)[None, :]


def _add_bias_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    return add_bias(x, bias), None


def _add_bias_backward(_: None, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    return grad, column_sums(grad)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class Dense(nnx.Module):
    """y = x W + b, on the last axis.

    Attributes:
        kernel: [inputs, outputs] float32.
        bias: [outputs] float32, zero at first.
        dtype: of the product.

    Example:
        >>> Dense(3, 2, rngs=nnx.Rngs(0))(jnp.ones((4, 5, 3))).shape
        (4, 5, 2)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = xavier_uniform,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] to [..., outputs], in the compute dtype."""
        kernel = self.kernel[...]
        rows = x.astype(self.dtype).reshape(-1, kernel.shape[0])
        return add_bias(rows @ kernel.astype(self.dtype), self.bias[...]).reshape(*x.shape[:-1], kernel.shape[1])


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32 whatever the compute dtype.

    Attributes:
        scale, bias: [width] float32.
        epsilon: 1e-6, as in the published vision transformers.
        dtype: of the result.

    Example:
        >>> LayerNorm(2)(jnp.array([[1.0, 3.0]])).round(3).tolist()
        [[-1.0, 1.0]]
    """

    def __init__(self, width: int, *, epsilon: float = 1e-6, dtype: DTypeLike = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.epsilon = epsilon
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] to [..., width]."""
        rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        centred = rows - rows.mean(axis=1, keepdims=True)
        normal = centred * jax.lax.rsqrt((centred * centred).mean(axis=1, keepdims=True) + self.epsilon)
        out = normal * self.scale[...][None, :] + self.bias[...][None, :]
        return out.astype(self.dtype).reshape(x.shape)


def check_heads(width: int, heads: int) -> None:
    """Refuse heads that do not divide the width.

    Raises:
        InputError: see above.

    Example:
        >>> check_heads(8, 2)
    """
    if heads < 1 or width % heads:
        raise InputError(f"{heads} heads do not divide the width {width}: choose a divisor of the width")


class Attention(nnx.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(head)) v, over [batch * heads, tokens, head].

    Attributes:
        qkv: Dense to queries, keys and values.
        out: Dense of the joined heads.
        heads: their number.

    Raises:
        InputError: heads that do not divide the width.

    Example:
        >>> Attention(4, 2, rngs=nnx.Rngs(0))(jnp.ones((3, 5, 4))).shape
        (3, 5, 4)
    """

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        check_heads(width, heads)
        self.qkv = Dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = Dense(width, width, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, tokens, width] to [b, tokens, width]."""
        batch, tokens, width = x.shape
        size = width // self.heads
        split = self.qkv(x).reshape(batch, tokens, 3, self.heads, size).transpose(2, 0, 3, 1, 4)
        query, key, value = split.reshape(3, batch * self.heads, tokens, size)
        scores = (query @ key.swapaxes(1, 2)).astype(jnp.float32) / math.sqrt(size)
        mixed = jax.nn.softmax(scores, axis=-1).astype(value.dtype) @ value
        joined = mixed.reshape(batch, self.heads, tokens, size).swapaxes(1, 2).reshape(batch, tokens, width)
        return self.out(joined)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Example:
        >>> Block(4, 2, 4, rngs=nnx.Rngs(0))(jnp.ones((3, 5, 4))).shape
        (3, 5, 4)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: int,
        *,
        activation: Activation = jax.nn.gelu,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = LayerNorm(width, dtype=dtype)
        self.attention = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, dtype=dtype)
        self.up = Dense(width, mlp_ratio * width, dtype=dtype, rngs=rngs)
        self.down = Dense(mlp_ratio * width, width, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, tokens, width] to [b, tokens, width]."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.activation(self.up(self.norm2(x))))
