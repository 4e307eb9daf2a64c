"""Sums of float64 images in memory, by the host's BLAS: its symmetric product is faster than XLA's on a CPU."""

from __future__ import annotations

import numpy as np

from mae_align.accumulate import SUMS_REMEDY, Batch, RawSums, TargetKind, pivots
from mae_align.memory import accumulator_bytes, check_memory

_ROWS = 4096


def sums_on_host(batch: Batch, member: np.ndarray, groups: int) -> RawSums:
    """Sums about the mean of the first rows; in float64 that pivot leaves no cancellation worth a second pass.

    Args:
        batch: float64 rows [n, d]. member: [n] group of each. groups: g.

    Returns:
        The sums. Cost: n d^2 multiply-adds; memory 8 g d^2 bytes and 4,096 rows.

    Raises:
        InputError: not enough memory.

    Example:
        >>> from mae_align.accumulate import check_batch
        >>> batch = check_batch(np.array([1.0, 3.0]).reshape(2, 1, 1, 1), None, None)
        >>> sums_on_host(batch, np.zeros(2, int), 1).sum_xx.tolist()
        [[[2.0]]]
    """
    pivot_x, pivot_y = pivots(batch)
    d, q = batch.layout.d, len(pivot_y)
    check_memory(accumulator_bytes(d, groups), f"second moments of {d} pixel values in {groups} group(s)", SUMS_REMEDY)
    out = RawSums(
        pivot_x,
        pivot_y,
        np.bincount(member, minlength=groups).astype(np.int64),
        np.zeros((groups, d)),
        np.zeros((groups, q)),
        np.zeros((groups, d, d)),
        np.zeros((groups, d, q)),
        np.zeros((groups, q, q)),
    )
    for g in range(groups):
        index = np.flatnonzero(member == g) if groups > 1 else None
        count = len(member) if index is None else len(index)
        for start in range(0, count, _ROWS):
            take = slice(start, start + _ROWS) if index is None else index[start : start + _ROWS]
            z = batch.rows[take] - pivot_x
            if batch.layout.kind is TargetKind.classes:
                y = np.eye(q)[batch.labels[take]]
            else:
                y = batch.numbers[take] - pivot_y
            # A column of ones sums the rows in the same product.
            both = z.T @ np.concatenate([y, np.ones((len(y), 1))], axis=1)
            out.sum_xx[g] += z.T @ z
            out.sum_xy[g] += both[:, :-1]
            out.sum_x[g] += both[:, -1]
            out.sum_y[g] += y.sum(0)
            out.sum_yy[g] += y.T @ y
    return out
