"""Symmetric products z^T z at little more than half of the multiplications.

XLA has no rank-k update: a product of z with itself computes every entry twice. Split in blocks of columns, only the
blocks on and over the diagonal are needed; four blocks save 3/8 of the work and are still wide enough for a fast
product.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Narrower blocks save more multiplications and run slower; measured best on a CPU at d = 784 to 3,072.
_BLOCKS = 4
_NARROWEST = 192


def _starts(d: int) -> range:
    return range(0, d, max(-(-d // _BLOCKS), _NARROWEST))


@jax.jit
def upper_blocks(z: jax.Array) -> tuple[jax.Array, ...]:
    """Rows of blocks of z^T z, each from the diagonal to the right edge.

    Args:
        z: [n, d]. Integers up to 2^7 are exact in float32 at any matmul precision; floats use the highest.

    Returns:
        Blocks [b, d - i b] for i = 0, 1, ...; :func:`add_upper` knows where they belong. Cost: 5/8 of n d^2
        multiply-adds. Traceable.

    Example:
        >>> [block.shape for block in upper_blocks(jnp.ones((5, 400)))]
        [(192, 400), (192, 208), (16, 16)]
    """
    d = z.shape[1]
    starts = _starts(d)
    high = jax.lax.Precision.HIGHEST
    return tuple(jnp.dot(z[:, i : min(i + starts.step, d)].T, z[:, i:], precision=high) for i in starts)


def add_upper(total: np.ndarray, blocks: Sequence[jax.Array | np.ndarray]) -> None:
    """Add the blocks of :func:`upper_blocks` to the upper block triangle of a matrix, in place.

    Args:
        total: [d, d]. blocks: as returned.

    Example:
        >>> total = np.zeros((2, 2))
        >>> add_upper(total, upper_blocks(jnp.eye(2)))
        >>> total.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    for i, block in zip(_starts(len(total)), blocks, strict=True):
        total[i : i + len(block), i:] += np.asarray(block)


def mirror_upper(total: np.ndarray) -> None:
    """Make a matrix symmetric, in place, from its upper block triangle.

    Args:
        total: [d, d] with whatever below the diagonal blocks.

    Example:
        >>> total = np.triu(np.ones((400, 400)))
        >>> mirror_upper(total)
        >>> bool((total == total.T).all())
        False
        >>> float(total[300, 10])  # below the diagonal blocks
        1.0
    """
    d = len(total)
    for i in _starts(d):
        end = min(i + _starts(d).step, d)
        total[end:, i:end] = total[i:end, end:].T


@jax.jit
def gram(z: jax.Array) -> jax.Array:
    """z^T z, symmetric to the last bit off the diagonal blocks.

    Args:
        z: [n, d].

    Returns:
        [d, d]. Cost: 5/8 of n d^2 multiply-adds and two passes over the result. Traceable.

    Example:
        >>> gram(jnp.ones((3, 2))).tolist()
        [[3.0, 3.0], [3.0, 3.0]]
    """
    blocks = upper_blocks(z)
    d = z.shape[1]
    starts = _starts(d)
    rows = []
    for row, i in enumerate(starts):
        # Left of the diagonal: the columns of the rows above, transposed.
        left = [
            blocks[above][:, i - above_start : i - above_start + starts.step].T
            for above, above_start in enumerate(starts[:row])
        ]
        rows.append(jnp.concatenate([*left, blocks[row]], axis=1))
    return jnp.concatenate(rows, axis=0)
