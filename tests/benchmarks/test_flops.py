"""The count against closed formulas and against XLA's own."""

from __future__ import annotations

import doctest
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import flops, start, timing
from benchmarks.flops import count_flops
from mae_align.corruption import FixedCountPatchMasking
from mae_align.models import MaskedAutoencoder, MLPAutoencoder, Pixels
from mae_align.runtime.errors import InputError

PIXELS = Pixels.from_images(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))


def _gradient(model: Any) -> tuple[Any, Any]:
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, parameters, rest).loss(images, jax.random.key(0))[0]

    return jax.grad(loss), parameters


def _xla(function: Any, *arguments: Any) -> float:
    """What XLA counts in the compiled program, elementwise operations included."""
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 1), ((2, 4), 1), ((3, 2), 2)])
def test_convolutions_and_their_gradients(stride: int, padding: str, kernel: tuple[int, int], dilation: int) -> None:
    """Strides make the gradients dilated convolutions. A linear loss adds one operation per output at most."""
    x, k = jnp.ones((4, 9, 8, 3)), jnp.ones((*kernel, 3, 5))

    def convolve(x: jax.Array, k: jax.Array) -> jax.Array:
        layout, spread = ("NHWC", "HWIO", "NHWC"), (dilation, dilation)
        return jax.lax.conv_general_dilated(
            x, k, (stride, stride), padding, rhs_dilation=spread, dimension_numbers=layout
        )

    def gradients(x: jax.Array, k: jax.Array, upstream: jax.Array) -> Any:
        return jax.vjp(convolve, x, k)[1](upstream)

    upstream = convolve(x, k)
    forward = count_flops(convolve, x, k)
    assert forward == _xla(convolve, x, k)
    # Traced, the gradients come with the forward pass; compiled, XLA leaves it out.
    assert count_flops(gradients, x, k, upstream) == forward + _xla(gradients, x, k, upstream)


def test_mlp_by_formula() -> None:
    """2 m n per sample and layer, three times, less the gradient by the images."""
    batch, widths = 6, (192, 16, 5, 16, 192)
    layers = [a * b for a, b in itertools.pairwise(widths)]
    biases = 2 * batch * sum(widths[1:])  # their gradients are products with ones
    gradient, parameters = _gradient(MLPAutoencoder(PIXELS, hidden=(16,), latent=5, rngs=nnx.Rngs(0)))
    expected = 2 * batch * (3 * sum(layers) - layers[0]) + biases
    assert count_flops(gradient, parameters, jnp.ones((batch, 8, 8, 3))) == expected


def test_masked_autoencoder_by_formula_and_xla() -> None:
    batch, patches, visible, values, width, narrow = 32, 16, 4, 12, 48, 32
    model = MaskedAutoencoder(
        PIXELS,
        corruption=FixedCountPatchMasking(2, visible),
        width=width,
        depth=1,
        heads=4,
        decoder_width=narrow,
        decoder_depth=1,
        decoder_heads=2,
        rngs=nnx.Rngs(0),
    )

    def block(tokens: int, width: int) -> int:
        return tokens * 12 * width**2 + 2 * tokens**2 * width

    embed = visible * values * width
    products = embed + block(1 + visible, width) + (1 + visible) * width * narrow
    products += block(1 + patches, narrow) + patches * narrow * values
    expected = 2 * batch * (3 * products - embed)
    gradient, parameters = _gradient(model)
    images = jnp.ones((batch, 8, 8, 3))
    counted = count_flops(gradient, parameters, images)
    assert expected <= counted <= 1.02 * expected  # biases
    assert counted <= _xla(gradient, parameters, images) <= 1.25 * counted  # elementwise work


def test_loops() -> None:
    a = jnp.ones((3, 3))
    assert count_flops(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=5)[0], a) == 5 * 54
    assert count_flops(lambda a: jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a, a), a) == 2 * 54
    assert count_flops(jax.vmap(lambda a: a @ a), jnp.ones((7, 3, 3))) == 7 * 54
    assert count_flops(jax.checkpoint(jax.jit(lambda a: a @ a)), a) == 54  # pyright: ignore[reportPrivateImportUsage]
    assert count_flops(lambda a: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: -c, a), a) == 0
    with pytest.raises(InputError, match="unknown length"):
        count_flops(lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, a), a)


def test_turns() -> None:
    """Warm rounds do not count; every round begins with another contestant."""
    calls: list[str] = []
    seconds = timing.take_turns({name: (lambda name=name: calls.append(name)) for name in "abc"}, repeats=3, warm=1)
    assert "".join(calls) == "cababcbcacab"
    assert {name: len(found) for name, found in seconds.items()} == dict(a=3, b=3, c=3)
    rate = timing.MatmulRate(jnp.float32, (64, 128), repeats=2)
    rate()
    first = rate.best
    rate()
    assert 0.0 < first <= rate.best


def test_doctests() -> None:
    for module in (flops, start, timing):
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0
        assert outcome.failed == 0
