"""Every product is the derivative that it is called, and is counted as what it is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layer_products
from benchmarks.flops import count_flops
from benchmarks.layer_products import Config
from mae_align.runtime.errors import InputError

TINY = Config(rows=(6, 5), width=2, heads=3, tokens=4, head=5, repeats=1)


def test_products_are_a_layer_and_its_gradients():
    every = list(layer_products.products(TINY))
    assert len(every) == 15
    rng = np.random.default_rng(0)
    for forward, by_first, by_second in (every[i : i + 3] for i in range(0, 15, 3)):
        a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in forward.shapes)
        out, pull = jax.vjp(forward.function, a, b)
        g = jnp.asarray(rng.normal(size=out.shape), jnp.float32)
        assert (by_first.shapes, by_second.shapes) == ((g.shape, b.shape), (a.shape, g.shape))
        np.testing.assert_allclose(by_first.function(g, b), pull(g)[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(by_second.function(a, g), pull(g)[1], rtol=1e-5, atol=1e-6)
        for product, operands in ((forward, (a, b)), (by_first, (g, b)), (by_second, (a, g))):
            assert product.flops == count_flops(product.function, *operands), product.name


def test_it_runs(capsys):
    rates = layer_products.main(TINY)
    assert len(rates) == 30 and min(rates.values()) > 0
    printed = capsys.readouterr().out
    assert "dense 6 x 2 x 8, forward" in printed and "attention, weights x values, gradient by the second" in printed
    with pytest.raises(InputError, match="--rows has no value"):
        layer_products.main(dataclasses.replace(TINY, rows=()))
