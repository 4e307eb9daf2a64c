"""Which products of a training step run at the machine's rate, and which do not?

    python -m benchmarks.layer_products           # dense layers and attention of a small masked autoencoder; a minute

Prints the rate of every product of a dense layer (forward; gradients by its inputs and by its weights) and of attention
(forward; gradients), float32 and bf16 apart: medians of interleaved rounds, each product a program of its own. Forward
products have their operands as they lie in memory, gradients have one of them transposed.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.start import check_counts, machine, start
from benchmarks.timing import take_turns


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    rows: tuple[int, ...] = (16640, 4352)
    """Tokens of a batch, in the decoder and in the encoder."""
    width: int = 192
    """Of a token; the dense layers go to four times as much and back."""
    heads: int = 768
    """Heads of a batch: images times heads of an image."""
    tokens: int = 65
    """Tokens of an image."""
    head: int = 64
    """Width of a head."""
    repeats: int = 9
    """Rounds; the median counts."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A product, batched or not: its name, its function, the shapes of its operands, its operations."""

    name: str
    function: Callable[[jax.Array, jax.Array], jax.Array]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    flops: int

    def ready(self, dtype: Any) -> Callable[[], jax.Array]:
        """The compiled product of random numbers."""
        keys = jax.random.split(jax.random.key(0))
        operands = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, self.shapes, strict=True)]
        compiled = jax.jit(self.function).lower(*operands).compile()
        return lambda: compiled(*operands)


def _forward(a: jax.Array, b: jax.Array) -> jax.Array:
    return a @ b


def _by_first(g: jax.Array, b: jax.Array) -> jax.Array:
    return g @ b.swapaxes(-1, -2)


def _by_second(a: jax.Array, g: jax.Array) -> jax.Array:
    return a.swapaxes(-1, -2) @ g


def products(config: Config) -> Iterator[Product]:
    """Those of dense layers up and down, then those of attention."""

    def of(name: str, n: int, k: int, m: int, batch: tuple[int, ...] = ()) -> Iterator[Product]:
        flops = 2 * n * k * m * int(np.prod(batch))
        first, second, out = (*batch, n, k), (*batch, k, m), (*batch, n, m)
        yield Product(f"{name}, forward", _forward, (first, second), flops)
        yield Product(f"{name}, gradient by the first", _by_first, (out, second), flops)
        yield Product(f"{name}, gradient by the second", _by_second, (first, out), flops)

    for rows in config.rows:
        for k, m in ((config.width, 4 * config.width), (4 * config.width, config.width)):
            yield from of(f"dense {rows:,} x {k} x {m}", rows, k, m)
    yield from of("attention, weights x values", config.tokens, config.tokens, config.head, (config.heads,))


def main(config: Config) -> dict[tuple[str, str], float]:
    """Run the benchmark.

    Returns:
        Operations per second by name and type.

    Raises:
        InputError: sizes or rounds below 1.
    """
    check_counts(config)
    print(machine())
    kinds = {"float32": jnp.float32, "bf16": jnp.bfloat16}
    every = list(products(config))
    contestants = {(product.name, kind): product.ready(dtype) for product in every for kind, dtype in kinds.items()}
    seconds = take_turns(contestants, config.repeats)
    rates = {(p.name, kind): p.flops / statistics.median(seconds[p.name, kind]) for p in every for kind in kinds}
    print(f"{'GFLOP/s':55}" + "".join(kind.rjust(10) for kind in kinds))
    for product in every:
        print(f"{product.name:55}" + "".join(f"{rates[product.name, kind] / 1e9:10.0f}" for kind in kinds))
    print(f"load at the end {os.getloadavg()[0]:.1f}")
    return rates


if __name__ == "__main__":
    start(main, Config)
