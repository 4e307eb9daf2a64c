"""Batches from any image source through grain: in order or shuffled, shared among processes, resumed exactly."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mae_align.data.source import ImageSource
from mae_align.runtime.errors import InputError

if TYPE_CHECKING:
    import grain


class ImageBatch(NamedTuple):
    """Some images of a source.

    Attributes:
        images: [b, h, w, c], the dtype of the source.
        labels: [b] int64.
        indices: [b] int64 positions in the source, the same whatever process reads them and in whatever order: what
            :func:`mae_align.moments.accumulate.group_of` hashes.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


def process_range(n: int, process_index: int, process_count: int) -> range:
    """The places of an epoch's order that are one process's share.

    ``floor(i n / p) .. floor((i + 1) n / p) - 1``: together 0..n - 1, sizes differ by at most one.

    Args:
        n: records of an epoch.
        process_index: i in 0..p - 1.
        process_count: p >= 1.

    Returns:
        The share, a range; empty for some processes where n < p.

    Raises:
        InputError: no processes, or an index outside them.

    Example:
        >>> [process_range(7, i, 3) for i in range(3)]
        [range(0, 2), range(2, 4), range(4, 7)]
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise InputError(f"process {process_index} of {process_count}: give an index in 0..process_count - 1")
    return range(process_index * n // process_count, (process_index + 1) * n // process_count)


def batches_per_epoch(
    n: int, *, batch_size: int, process_index: int = 0, process_count: int = 1, drop_remainder: bool = False
) -> int:
    """How many batches one process gets per epoch from :func:`batches`; may differ by one between processes.

    Args:
        n: records of an epoch.
        batch_size: images per batch and process.
        process_index: which process.
        process_count: of how many.
        drop_remainder: whether batches that are not full are left out.

    Returns:
        The number of batches.

    Raises:
        InputError: batch_size below 1, or as :func:`process_range`.

    Example:
        >>> [batches_per_epoch(7, batch_size=2, process_index=i, process_count=3) for i in range(3)]
        [1, 1, 2]
    """
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: give at least 1 image per batch")
    share = len(process_range(n, process_index, process_count))
    return share // batch_size if drop_remainder else -(-share // batch_size)


def batches(
    source: ImageSource,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    seed: int | None = None,
    epochs: int | None = 1,
    drop_remainder: bool = False,
    threads: int | None = None,
) -> grain.IterDataset[ImageBatch]:
    """The images of one process's share of a source, batch by batch.

    Per epoch the records are put in one order for all processes (that of the source, or shuffled anew by the seed)
    and each process takes a contiguous part of it, see :func:`process_range`. So over all processes every record comes
    exactly once per epoch. Batches do not run over the end of an epoch: its last batch is smaller where the share is
    no multiple of ``batch_size``, and kept unless ``drop_remainder``. In order, a process reads its own part of the
    files; shuffled, all processes draw from everything, so that data sorted by class do not give skewed batches.

    Everything is a function of the arguments, so the state of the iterator is a count of batches:

        iterator = iter(batches(source, batch_size=256, seed=0, epochs=None))
        images, labels, indices = next(iterator)
        state = iterator.get_state()        # a dict of JSON types
        iterator.set_state(state)           # the next batch is the one after ``state`` was taken, bit for bit

    A state belongs to the arguments it was taken with (source, batch_size, processes, seed, drop_remainder): keep
    them beside it. Reading runs in threads of this process, which need no command-line flags of absl.

    Args:
        source: images by position; for arrays :class:`mae_align.data.ArraySource`.
        batch_size: images per batch and process.
        process_index: this process, as ``jax.process_index()``.
        process_count: of how many, as ``jax.process_count()``.
        seed: of the shuffles, 0 <= seed < 2^32; None keeps the order of the source.
        epochs: passes over the source; None for endless.
        drop_remainder: leave out batches that are not full. The number of batches can still differ between processes
            by one, see :func:`batches_per_epoch`.
        threads: that read ahead, each a batch; None: none for arrays in memory, else one per core. Up to ``threads``
            batches are held in memory. The batches do not depend on it.

    Returns:
        A grain ``IterDataset`` of :class:`ImageBatch`. Cost beside reading: about 5 us per image in order, 10 us
        shuffled.

    Raises:
        InputError: sizes, epochs, seed or processes out of range, or endless epochs without a batch; an image that
            cannot be read, when its turn comes.

    Example:
        >>> from mae_align.data import open_source
        >>> stream = batches(open_source("digits", "train"), batch_size=1000)
        >>> [len(batch.labels) for batch in stream]
        [1000, 438]
    """
    n = len(source)
    count = batches_per_epoch(
        n,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        drop_remainder=drop_remainder,
    )
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs {epochs}: give at least 1, or None for endless")
    _check_seed(seed)
    threads = _threads(threads, source)
    if count == 0 and epochs is None:
        raise InputError(
            f"process {process_index} of {process_count} gets no batch of {batch_size} from {n} images: "
            "give a smaller batch_size, or fewer processes"
        )
    share = process_range(n, process_index, process_count)
    positions = _order(n, seed)[share.start : share.stop].batch(batch_size, drop_remainder=drop_remainder)
    return _read(source, positions, epochs, threads)


def global_batches(
    source: ImageSource,
    *,
    batch_size: int,
    rows: slice = slice(None),
    seed: int | None = None,
    threads: int | None = None,
) -> grain.IterDataset[ImageBatch]:
    """Some rows of every batch of an endless stream, for processes that train in step.

    Batch s is the same set of images whoever reads which rows of it: for every number of processes. The images of an
    epoch that fill no batch are left out. The state of the iterator is a count of batches, as in :func:`batches`, here
    equal in all processes and independent of their number.

    Args:
        source: images by position.
        batch_size: b, of all processes together.
        rows: those of this process, a range of 0..b - 1.
        seed: of the shuffles, 0 <= seed < 2^32; None keeps the order of the source.
        threads: as in :func:`batches`.

    Returns:
        A grain ``IterDataset`` of :class:`ImageBatch`.

    Raises:
        InputError: fewer than b images, no rows, a seed out of range.

    Example:
        >>> from mae_align.data import open_source
        >>> digits = open_source("digits", "train")
        >>> halves = [global_batches(digits, batch_size=6, rows=rows) for rows in (slice(0, 3), slice(3, 6))]
        >>> [next(iter(half)).indices.tolist() for half in halves]
        [[0, 1, 2], [3, 4, 5]]
    """
    n = len(source)
    if not 1 <= batch_size <= n:
        raise InputError(f"batch_size {batch_size} of {n} images: give from 1 to {n}")
    if not range(batch_size)[rows]:
        raise InputError(f"rows {rows.start}:{rows.stop} of batches of {batch_size}: give a range within them")
    _check_seed(seed)
    positions = _order(n, seed).batch(batch_size, drop_remainder=True)
    # Before anything is read: a process reads its own rows alone.
    mine = positions.map(lambda indices: indices[rows])
    return _read(source, mine, None, _threads(threads, source))


def _check_seed(seed: int | None) -> None:
    """Refuse a seed that grain does not take."""
    if seed is not None and not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: give an integer from 0 to 2^32 - 1")


def _threads(threads: int | None, source: ImageSource) -> int:
    """Threads that read ahead."""
    if threads is None:
        return 0 if source.in_memory else os.cpu_count() or 1
    if threads < 0:
        raise InputError(f"threads {threads}: give at least 0")
    return threads


def _order(n: int, seed: int | None) -> grain.MapDataset[int]:
    """The positions of one epoch; repeated, each epoch has an order of its own."""
    import grain

    order = grain.MapDataset.range(n)
    return order if seed is None else order.shuffle(seed=seed)


def _read(
    source: ImageSource, positions: grain.MapDataset[np.ndarray], epochs: int | None, threads: int
) -> grain.IterDataset[ImageBatch]:
    """The images at batches of positions, repeated."""
    import grain

    def read(indices: np.ndarray) -> ImageBatch:
        indices = np.asarray(indices, np.int64)
        return ImageBatch(*source.take(indices), indices)

    # Only batches wait in the buffer, so its size is in batches.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return positions.map(read).repeat(epochs).to_iter_dataset(options)
