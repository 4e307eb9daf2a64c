"""Timings that other work on the machine disturbs little: everything compared takes turns in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Key = TypeVar("Key")


def take_turns(contestants: Mapping[Key, Callable[[], object]], repeats: int, warm: int = 1) -> dict[Key, list[float]]:
    """Seconds of every contestant in every round; each must return something to wait for, or have finished.

    `warm` rounds before are not counted. Each round begins with another contestant.

    >>> seconds = take_turns({"a": lambda: None, "b": lambda: None}, repeats=3)
    >>> [len(found) for found in seconds.values()]
    [3, 3]
    """
    names = list(contestants)
    seconds: dict[Key, list[float]] = {name: [] for name in names}
    for turn in range(-warm, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(contestants[name]())
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round.

    >>> median_ratio([2.0, 9.0, 3.0], [1.0, 1.0, 1.0])
    3.0
    """
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


class MatmulRate:
    """Operations per second of a product of square matrices: the best of everything seen so far.

    Products run at JAX's default precision, like those of the models. Called again in every round of a timing, so that
    the rate and what is compared with it saw the same machine.
    """

    def __init__(self, dtype: DTypeLike, sizes: Sequence[int], repeats: int = 3) -> None:
        self._multiply: Any = jax.jit(jnp.dot)
        self._squares = [jnp.ones((size, size), dtype) for size in sizes]
        self._repeats = repeats
        self.best = 0.0
        for square in self._squares:
            jax.block_until_ready(self._multiply(square, square))  # compiles

    def __call__(self) -> None:
        """Measure once more."""
        for square in self._squares:
            for _ in range(self._repeats):
                start = time.perf_counter()
                jax.block_until_ready(self._multiply(square, square))
                rate = 2 * len(square) ** 3 / (time.perf_counter() - start)
                self.best = max(self.best, rate)
