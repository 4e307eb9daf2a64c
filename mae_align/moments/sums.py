"""Sums of products over rows on the devices of a mesh: exact for 8-bit images, centred for floats.

Of rows x (pixels) and e (indicators of classes, or ones) every device keeps the sums of z z^T and z e^T, z = x - pivot:

* 8-bit rows (:class:`ByteSums`): z are integers of at most 2^7 in size, and their products are summed as integers in
  two limbs. No order, batch size or number of devices changes a bit.
* float rows (:class:`FloatSums`): sums about the mean so far, merged with those of each step by the update of Chan,
  Golub & LeVeque (1983), each as an unevaluated sum of two floats.

XLA has no rank-k update: a product of z with itself computes every entry twice. Split in blocks of columns
(:func:`upper_blocks`) only those on and over the diagonal are needed; four blocks save 3/8 of the work and are still
wide enough for a fast product.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

# Narrower blocks save more multiplications and run slower; measured best on a CPU at d = 784 to 3,072.
_BLOCKS = 4
_NARROWEST = 192
BYTE_PIVOT = 128
# |x - 128| <= 2^7, so 1,024 products of at most 2^14 stay within the 2^24 integers that float32 holds exactly.
MAX_ROWS = 1024
# Steps after which the low limb must be carried: 64 x 2^24 + 2^16 is inside int32.
CARRY_EVERY = 64
_LIMB_BITS = 16
_AXIS = "data"
# Refuses to reassociate or to use bfloat16 where floats are multiplied.
_HIGHEST = jax.lax.Precision.HIGHEST
Pair = tuple[jax.Array, jax.Array]
# A pair for each row of blocks of a symmetric matrix, from the diagonal to the right edge, as upper_blocks gives them.
Blocks = tuple[Pair, ...]


class ByteSums(NamedTuple):
    """Integer sums of each device, D devices; each is low + 2^16 high.

    Attributes:
        xx: for each row of blocks two int32 [D, b, d - i b].
        xe: two int32 [D, d, e].
    """

    xx: Blocks
    xe: Pair


class FloatSums(NamedTuple):
    """Centred sums of each device, D devices; each pair is high + low.

    Attributes:
        count: [D] int32 rows so far.
        row: two [D, d + e], sum of z = x - pivot and of the indicators.
        xx: for each row of blocks two [D, b, d - i b], about the mean of these rows.
        xe: two [D, d, e] likewise.
    """

    # Hides tuple.count, which nobody misses here.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    row: Pair
    xx: Blocks
    xe: Pair


Sums = ByteSums | FloatSums


def sharding(mesh: Mesh) -> NamedSharding:
    """How rows and sums lie on a mesh: split along their first axis.

    Example:
        >>> from mae_align.runtime.processes import data_mesh
        >>> sharding(data_mesh(jax.devices()[:1])).spec
        P('data',)
    """
    return NamedSharding(mesh, jax.P(_AXIS))


def empty(mesh: Mesh, d: int, e: int, dtype: np.dtype) -> Sums:
    """Sums of no rows.

    Args:
        mesh: one axis, "data", of D devices of this process.
        d: pixel values.
        e: indicator columns.
        dtype: of the rows: uint8, float32 or float64 (float64 inside ``jax.enable_x64``).

    Returns:
        Zeros on every device. Memory: 5 d^2 bytes each (10 d^2 for float64).

    Example:
        >>> from mae_align.runtime.processes import data_mesh
        >>> empty(data_mesh(jax.devices()[:1]), 4, 2, np.dtype(np.uint8)).xe[0].shape
        (1, 4, 2)
    """
    devices = mesh.devices.size
    put = functools.partial(jax.device_put, device=sharding(mesh))

    def pair(*shape: int) -> Pair:
        zeros = np.zeros((devices, *shape), np.int32 if dtype == np.uint8 else dtype)
        # Two arrays of their own: both are donated.
        return put(zeros), put(zeros.copy())

    blocks = jax.eval_shape(upper_blocks, jax.ShapeDtypeStruct((1, d), np.float32))
    xx = tuple(pair(*block.shape) for block in blocks)
    if dtype == np.uint8:
        return ByteSums(xx, pair(d, e))
    return FloatSums(put(np.zeros(devices, np.int32)), pair(d + e), xx, pair(d, e))


def add_rows(mesh: Mesh, dtype: np.dtype) -> jax.stages.Wrapped:
    """The compiled step ``(sums, rows, labels[, pivot]) -> (sums, ticket)``; the sums given are donated.

    rows [D b, d] and labels [D b] int32 are split over the devices, b <= 1,024 for 8-bit rows; a label of -1 marks a
    row that does not count, whatever its pixels. pivot [d] is given for floats. The ticket [D] is ready when the step
    is. No collective.

    Args:
        mesh: as in :func:`empty`.
        dtype: of the rows.

    Example:
        >>> from mae_align.runtime.processes import data_mesh
        >>> mesh = data_mesh(jax.devices()[:1])
        >>> sums = empty(mesh, 1, 1, np.dtype(np.uint8))
        >>> rows, labels = np.array([[130], [0]], np.uint8), np.array([0, -1], np.int32)
        >>> sums, _ = add_rows(mesh, np.dtype(np.uint8))(sums, rows, labels)
        >>> sums.xx[0][0].tolist()
        [[[4]]]
    """
    return _add_rows(mesh, dtype == np.uint8)


@functools.lru_cache(maxsize=32)
def _add_rows(mesh: Mesh, integer: bool) -> jax.stages.Wrapped:
    data, all_of_it = jax.P(_AXIS), jax.P()
    step, specs = (_add_bytes, (data,) * 3) if integer else (_add_floats, (data, data, data, all_of_it))
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=data), donate_argnums=0)


def _add_bytes(sums: ByteSums, rows: jax.Array, labels: jax.Array) -> tuple[ByteSums, jax.Array]:
    valid = (labels >= 0)[:, None]
    z = jnp.where(valid, rows.astype(jnp.float32) - BYTE_PIVOT, 0.0)

    def more(pair: Pair, new: jax.Array) -> Pair:
        return pair[0] + new.astype(jnp.int32)[None], pair[1]

    xx = tuple(more(pair, block) for pair, block in zip(sums.xx, upper_blocks(z), strict=True))
    xe = more(sums.xe, _product(z, _indicators(labels, sums.xe[0].shape[-1], z.dtype)))
    return ByteSums(xx, xe), labels[:1]


def _add_floats(sums: FloatSums, rows: jax.Array, labels: jax.Array, pivot: jax.Array) -> tuple[FloatSums, jax.Array]:
    """Chan's update with a step of m rows: M2 += M2_step + n m / (n + m) delta delta^T."""
    d, dtype = rows.shape[1], rows.dtype
    valid = (labels >= 0)[:, None]
    old = jax.tree.map(lambda part: part[0], sums)
    before, new = old.count, jnp.sum(valid, dtype=jnp.int32)
    n, m = (jnp.maximum(count, 1).astype(dtype) for count in (before, new))
    a = jnp.concatenate([rows - pivot[None], _indicators(labels, sums.xe[0].shape[-1], dtype)], axis=1)
    a = jnp.where(valid, a, 0.0)
    mean = jnp.sum(a, axis=0) / m
    a = jnp.where(valid, a - mean[None], 0.0)
    rest = jnp.sum(a, axis=0)  # what rounding left out of the mean
    z, e = a[:, :d], a[:, d:]
    delta = (mean - (old.row[0] + old.row[1]) / n) + rest / m
    # Nothing to merge with before the first rows, and nothing to merge where a step has none.
    weight = before.astype(dtype) * new.astype(dtype) / (before + new + (before + new == 0)).astype(dtype)
    weighted = weight * delta[:d]
    xx, start = [], 0
    for pair, block in zip(old.xx, upper_blocks(z), strict=True):
        end = start + len(block)
        xx.append(_plus(pair, block + weighted[start:end, None] * delta[None, start:d]))
        start = end
    added = FloatSums(
        before + new,
        # m is a power of two in every full step: m * mean is exact.
        _plus(_plus(old.row, m * mean), rest),
        tuple(xx),
        _plus(old.xe, _product(z, e) + weighted[:, None] * delta[None, d:]),
    )
    return jax.tree.map(lambda part: part[None], added), labels[:1]


def _indicators(labels: jax.Array, e: int, dtype: np.dtype) -> jax.Array:
    """[b, e] one-hot rows; a row of zeros for the label -1."""
    return (labels[:, None] == jnp.arange(e, dtype=labels.dtype)[None, :]).astype(dtype)


def _product(z: jax.Array, e: jax.Array) -> jax.Array:
    return jnp.dot(z.T, e, precision=_HIGHEST)


def _plus(pair: Pair, term: jax.Array) -> Pair:
    """Knuth's two-sum: what high + term rounds off is kept in low."""
    high, low = pair
    total = high + term
    part = total - high
    return total, low + ((high - (total - part)) + (term - part))


def carried(sums: ByteSums) -> ByteSums:
    """The same integers with every low limb inside 0..2^16 - 1; the sums given are donated.

    Exact for up to 2^33 rows in all.

    Example:
        >>> from mae_align.runtime.processes import data_mesh
        >>> sums = empty(data_mesh(jax.devices()[:1]), 1, 1, np.dtype(np.uint8))
        >>> sums = carried(sums._replace(xe=(sums.xe[0] - 1, sums.xe[1])))
        >>> [limb.item() for limb in sums.xe]
        [65535, -1]
    """
    return _carried(sums)


@functools.partial(jax.jit, donate_argnums=0)
def _carried(sums: ByteSums) -> ByteSums:
    def carry(pair: Pair) -> Pair:
        low, high = pair
        return low & ((1 << _LIMB_BITS) - 1), high + (low >> _LIMB_BITS)

    return ByteSums(tuple(carry(pair) for pair in sums.xx), carry(sums.xe))


def total(groups: Sequence[Sums], mesh: Mesh) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sums over all devices, in float64 on the host; the sums given are consumed.

    Args:
        groups: the sums of each group of samples, 8-bit ones :func:`carried`; each on the devices of this process.
        mesh: all devices, those of other processes included.

    Returns:
        For each group xx [d, d] and xe [d, e]: exact for 8-bit rows; for floats about each device's own mean.
        Cost: one all-reduce of about 5 g d^2 bytes, none for a single device.

    Example:
        >>> from mae_align.runtime.processes import data_mesh
        >>> mesh = data_mesh(jax.devices()[:1])
        >>> [(xx, xe)] = total([empty(mesh, 2, 3, np.dtype(np.float32))], mesh)
        >>> xx.dtype.name, xe.shape
        ('float64', (2, 3))
    """
    parts = [limb for sums in groups for pair in (*sums.xx, sums.xe) for limb in pair]
    if mesh.devices.size > 1:
        flat = np.asarray(reduce_program(mesh)([_spanning(part, mesh) for part in parts]))
        limbs = np.split(flat, np.cumsum([part[0].size for part in parts])[:-1])
    else:
        limbs = [np.asarray(part)[0] for part in parts]
    unit = 2.0**_LIMB_BITS if isinstance(groups[0], ByteSums) else 1.0
    whole = [
        (limbs[i] + unit * limbs[i + 1].astype(np.float64)).reshape(parts[i].shape[1:]) for i in range(0, len(limbs), 2)
    ]
    each = len(groups[0].xx) + 1
    d = groups[0].xe[0].shape[1]
    totals = []
    for g in range(len(groups)):
        *blocks, xe = whole[g * each : (g + 1) * each]
        xx = np.zeros((d, d))
        add_upper(xx, blocks)
        mirror_upper(xx)
        totals.append((xx, xe))
    return totals


def _spanning(part: jax.Array, mesh: Mesh) -> jax.Array:
    """The local shards of an array as this process's part of one that lies on all devices of ``mesh``."""
    shards = [shard.data for shard in part.addressable_shards]
    shape = (mesh.devices.size, *part.shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding(mesh), shards)


@functools.lru_cache(maxsize=32)
def reduce_program(mesh: Mesh) -> jax.stages.Wrapped:
    """The compiled sum over devices of a list of arrays [D, ...], flat and end to end: one all-reduce."""

    def add_up(parts: list[jax.Array]) -> jax.Array:
        return jax.lax.psum(jnp.concatenate([part.ravel() for part in parts]), _AXIS)

    return jax.jit(jax.shard_map(add_up, mesh=mesh, in_specs=jax.P(_AXIS), out_specs=jax.P()))


def _starts(d: int) -> range:
    """First columns of the blocks."""
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
    return tuple(jnp.dot(z[:, i : min(i + starts.step, d)].T, z[:, i:], precision=_HIGHEST) for i in starts)


def add_upper(total: np.ndarray, blocks: Sequence[jax.Array | np.ndarray]) -> None:
    """Add the blocks of :func:`upper_blocks` to the upper block triangle of a matrix, in place.

    Args:
        total: [d, d].
        blocks: as returned.

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
