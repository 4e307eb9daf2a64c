from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_align.data import ArraySource
from mae_align.data.pipeline import ImageBatch, batches, batches_per_epoch, process_range
from mae_align.data.source import SubsetSource
from mae_align.runtime.errors import InputError


def numbered(n: int) -> ArraySource:
    """Images and labels that say their position."""
    x = np.arange(n, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 3, 1), np.float32)
    return ArraySource(x, np.arange(n) % 3, ("a", "b", "c"), "numbered")


def indices(found: list[ImageBatch]) -> list[int]:
    return [int(i) for batch in found for i in batch.indices]


@given(n=st.integers(0, 200), count=st.integers(1, 9))
def test_process_ranges_tile_the_records(n, count):
    ranges = [process_range(n, i, count) for i in range(count)]
    assert [i for part in ranges for i in part] == list(range(n))
    sizes = list(map(len, ranges))
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 40),
    count=st.integers(1, 5),
    batch_size=st.integers(1, 9),
    seed=st.none() | st.integers(0, 2**32 - 1),
    epochs=st.integers(1, 3),
)
def test_processes_together_cover_every_record_once_per_epoch(n, count, batch_size, seed, epochs):
    source = numbered(n)
    per_epoch: list[Counter[int]] = [Counter() for _ in range(epochs)]
    for i in range(count):
        shared = {"batch_size": batch_size, "process_index": i, "process_count": count}
        found = list(batches(source, seed=seed, epochs=epochs, **shared))
        each = batches_per_epoch(n, **shared)
        assert len(found) == each * epochs
        for epoch in range(epochs):
            mine = found[epoch * each : (epoch + 1) * each]
            per_epoch[epoch].update(indices(mine))
            assert len(indices(mine)) == len(process_range(n, i, count))
            assert [len(batch.indices) for batch in mine[:-1]] == [batch_size] * (each - 1 if each else 0)
        for batch in found:
            np.testing.assert_array_equal(batch.images[:, 1, 2, 0], batch.indices)
            np.testing.assert_array_equal(batch.labels, batch.indices % 3)
    assert all(counter == Counter(range(n)) for counter in per_epoch)


def test_batches_are_named_arrays_of_documented_types():
    (batch,) = batches(numbered(4), batch_size=9)
    images, labels, index = batch
    assert isinstance(batch, ImageBatch) and batch.images is images
    assert (images.shape, images.dtype) == ((4, 2, 3, 1), np.float32)
    assert labels.dtype == index.dtype == np.int64 and index.tolist() == [0, 1, 2, 3]


def test_in_order_processes_read_their_own_part():
    found = [indices(list(batches(numbered(7), batch_size=2, process_index=i, process_count=2))) for i in range(2)]
    assert found == [[0, 1, 2], [3, 4, 5, 6]]


def test_shuffles_follow_the_seed_and_change_with_the_epoch():
    def order(seed: int, epochs: int = 1) -> list[int]:
        return indices(list(batches(numbered(50), batch_size=7, seed=seed, epochs=epochs)))

    twice = order(3, epochs=2)
    assert twice == order(3, epochs=2) and twice[:50] == order(3)
    assert sorted(twice[:50]) == sorted(twice[50:]) == list(range(50))
    assert twice[:50] != twice[50:] and twice[:50] != list(range(50)) and order(4) != order(3)


def test_shuffled_shares_are_drawn_from_everything():
    found = indices(list(batches(numbered(400), batch_size=50, seed=0, process_index=0, process_count=2)))
    assert 60 < sum(i < 200 for i in found) < 140


def test_drop_remainder_leaves_full_batches_alone():
    found = list(batches(numbered(10), batch_size=4, epochs=2, drop_remainder=True, seed=1))
    assert [len(batch.indices) for batch in found] == [4, 4, 4, 4]
    assert batches_per_epoch(10, batch_size=4, drop_remainder=True) == 2


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("epochs", [3, None])
def test_resume_is_exact_at_every_batch(threads, seed, epochs):
    """Three batches per epoch: every position in it, and both epoch boundaries, are stopped at."""
    options = {"batch_size": 4, "seed": seed, "epochs": epochs, "threads": threads, "process_count": 2}
    source, total = numbered(23), 9
    iterator = iter(batches(source, process_index=1, **options))
    states, expected = [iterator.get_state()], []
    for _ in range(total):
        expected.append(next(iterator))
        states.append(iterator.get_state())
    for stop, state in enumerate(states[:total]):
        fresh = iter(batches(source, process_index=1, **options))
        next(fresh)  # a state replaces whatever was read before
        fresh.set_state(json.loads(json.dumps(state)))
        for want in expected[stop:]:
            for got_part, want_part in zip(next(fresh), want, strict=True):
                np.testing.assert_array_equal(got_part, want_part)
        if epochs is not None:
            assert next(fresh, None) is None


def test_going_back_on_the_same_iterator():
    iterator = iter(batches(numbered(9), batch_size=2, seed=5, epochs=None))
    for _ in range(4):
        next(iterator)
    state = iterator.get_state()
    once = [next(iterator).indices.tolist() for _ in range(3)]
    iterator.set_state(state)
    assert [next(iterator).indices.tolist() for _ in range(3)] == once


def test_threads_change_nothing():
    slow = SubsetSource(numbered(100), np.arange(100), "slow")
    found = [indices(list(batches(slow, batch_size=6, seed=2, epochs=2, threads=t))) for t in (0, 1, 4, None)]
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_image_that_cannot_be_read_is_one_error(threads):
    class Broken(SubsetSource):
        def read(self, i: int) -> tuple[np.ndarray, int | np.ndarray]:
            if i == 7:
                raise InputError("cannot read image 7")
            return super().read(i)

    iterator = iter(batches(Broken(numbered(9), np.arange(9), "broken"), batch_size=2, threads=threads))
    assert [next(iterator).indices.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(InputError, match="cannot read image 7"):
        next(iterator)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size 0: give at least 1"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2: give an index in"),
        ({"process_index": -1}, "process -1 of 1"),
        ({"process_count": 0}, "process 0 of 0"),
        ({"epochs": 0}, "epochs 0: give at least 1"),
        ({"seed": -1}, "seed -1: give an integer from 0"),
        ({"seed": 2**32}, "seed 4294967296: give"),
        ({"threads": -1}, "threads -1: give at least 0"),
        ({"epochs": None, "batch_size": 9, "drop_remainder": True}, "process 0 of 1 gets no batch of 9 from 5 images"),
        ({"epochs": None, "process_count": 9}, "process 0 of 9 gets no batch"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, message):
    with pytest.raises(InputError, match=message):
        batches(numbered(5), **{"batch_size": 2, **options})


def test_a_plain_script_reads_ahead_and_ends_quietly():
    """No absl flags are parsed, the iterator is left half-way, warnings are errors."""
    code = """
import numpy as np
from mae_align.data import open_source
from mae_align.data.pipeline import batches
iterator = iter(batches(open_source("digits", "train"), batch_size=100, seed=0, epochs=None, threads=3))
print(sum(len(next(iterator).labels) for _ in range(20)))
"""
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stdout, out.stderr) == (0, "1938\n", "")
