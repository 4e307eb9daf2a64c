"""Streams for training: the same batches for every number of processes, and a place that can be gone back to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mae_align.data.pipeline import global_batches
from mae_align.data.source import ArraySource
from mae_align.runtime.errors import InputError
from mae_align.train.batches import StreamedBatches
from tests.train.toy_training import ToyTraining


def numbered(n: int) -> ArraySource:
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    return ArraySource(images, np.arange(n), tuple(map(str, range(n))), "numbered")


@pytest.mark.parametrize("seed", [None, 5])
def test_the_batches_of_all_processes_together_are_those_of_one(seed):
    def indices(i: int, count: int) -> np.ndarray:
        rows = slice(i * 6 // count, (i + 1) * 6 // count)
        stream = iter(global_batches(numbered(26), batch_size=6, rows=rows, seed=seed))
        return np.stack([next(stream).indices for _ in range(9)])

    alone = indices(0, 1)
    for count in (2, 3):
        np.testing.assert_array_equal(np.concatenate([indices(i, count) for i in range(count)], axis=1), alone)
    # Four full batches an epoch, each record at most once; what is left out changes with the order.
    for epoch in (alone[:4], alone[4:8]):
        assert len(np.unique(epoch)) == 24
    assert (alone[:4] == alone[4:8]).all() == (seed is None)


@pytest.mark.parametrize("threads", [0, 3])
def test_a_stream_goes_back_to_any_place(threads):
    training: Any = ToyTraining(batch_size=4)
    stream = StreamedBatches(training, numbered(20), seed=0, threads=threads)
    images, labels = stream.take(12)
    assert images.shape == (12, 4, 2, 2, 1) and labels.dtype == np.int32
    np.testing.assert_array_equal(images[..., 0, 0, 0], labels)
    for place in (7, 0, 5):
        other = StreamedBatches(training, numbered(20), seed=0)
        if place:
            other.take(place)
        stream.seek(other.position())
        assert stream.position() == other.position()
        np.testing.assert_array_equal(stream.take(3)[1], labels[place : place + 3])


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(InputError, match="batch_size 7 of 6 images: give from 1 to 6"):
        global_batches(numbered(6), batch_size=7)
    with pytest.raises(InputError, match="rows 6:8 of batches of 6: give a range"):
        global_batches(numbered(6), batch_size=6, rows=slice(6, 8))
    with pytest.raises(InputError, match="seed -1"):
        global_batches(numbered(6), batch_size=5, seed=-1)
