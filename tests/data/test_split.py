from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_align.data import ImageDataset, stratified_split, validation_split
from mae_align.runtime.errors import InputError

label_sets = st.lists(st.integers(2, 30), min_size=1, max_size=6).flatmap(
    lambda counts: st.permutations([7 * i - 3 for i, n in enumerate(counts) for _ in range(n)])
)
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**32)


@settings(deadline=None)
@given(label_sets, fractions, seeds)
def test_parts_cover_every_sample_once(labels, fraction, seed):
    first, second = stratified_split(np.array(labels), fraction, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert (np.diff(first) > 0).all() and (np.diff(second) > 0).all()


@settings(deadline=None)
@given(label_sets, fractions, seeds)
def test_every_class_keeps_its_share_on_both_sides(labels, fraction, seed):
    labels = np.array(labels)
    first, second = stratified_split(labels, fraction, seed)
    for value in set(labels.tolist()):
        n, taken = (labels == value).sum(), (labels[second] == value).sum()
        assert 1 <= taken == n - (labels[first] == value).sum() <= n - 1
        assert abs(taken - fraction * n) <= 0.5 or taken in (1, n - 1)


@settings(deadline=None)
@given(label_sets, fractions, seeds)
def test_the_seed_decides(labels, fraction, seed):
    labels = np.array(labels)
    once, again = (stratified_split(labels, fraction, seed) for _ in range(2))
    np.testing.assert_array_equal(once[1], again[1])


def test_other_seeds_give_other_splits_without_bias():
    labels = np.repeat([0, 1], [40, 10])
    times = np.zeros(50)
    for seed in range(400):
        times[stratified_split(labels, 0.3, seed)[1]] += 1
    # Each sample is held out 120 times of 400 on average; 5 standard deviations are 46.
    assert abs(times - 120).max() < 46


def test_names_serve_as_labels():
    first, second = stratified_split(np.array(["cat", "dog", "dog", "cat"]), 0.5, 1)
    assert len(first) == len(second) == 2


@pytest.mark.parametrize(
    "labels, fraction, seed, message",
    [
        ([0, 0, 5], 0.5, 0, r"class\(es\) \[5\] have a single sample"),
        ([0, 0], 0.0, 0, "fraction 0.0 must lie between"),
        ([0, 0], 1.0, 0, "fraction 1.0 must lie between"),
        ([0, 0], float("nan"), 0, "fraction nan must lie between"),
        ([0, 0], 0.5, -1, "seed -1 is negative"),
    ],
)
def test_bad_input_is_refused(labels, fraction, seed, message):
    with pytest.raises(InputError, match=message):
        stratified_split(np.array(labels), fraction, seed)


def test_validation_split_comes_from_train_alone():
    train = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    test = np.full((4, 1, 1, 1), 255, np.uint8)
    labels = np.arange(40) % 4
    data = ImageDataset(train, labels, test, np.arange(4), ("a", "b", "c", "d"), "toy")
    split = validation_split(data, 0.3, seed=3)
    pixels = np.concatenate([split.train_images, split.test_images]).ravel()
    assert sorted(pixels.tolist()) == list(range(40))
    # Every pixel is its own position, so that labels can be followed.
    np.testing.assert_array_equal(split.test_labels, split.test_images.ravel() % 4)
    np.testing.assert_array_equal(split.train_labels, split.train_images.ravel() % 4)
    assert np.bincount(split.test_labels).tolist() == [3, 3, 3, 3]
    assert split.class_names == data.class_names and split.name == "toy"
