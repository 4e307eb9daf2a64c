from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_align import InputError
from mae_align.probes import ProbeResult, Protocol, one_scale, per_feature, validation_split
from mae_align.probes.inputs import precision


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_split_is_a_partition_that_leaves_no_class_out_of_training(labels, fraction, seed):
    y = np.array(labels)
    split = validation_split(len(y), fraction, y, seed)
    assert sorted([*split.train, *split.val]) == list(range(len(y)))
    assert len(split.train) and len(split.val)
    counts = np.bincount(y)
    if (counts > 1).any():
        assert set(y[split.train]) == set(y)
        for value in np.flatnonzero(counts > 1):
            share = (y[split.val] == value).sum()
            assert share == min(max(round(fraction * counts[value]), 1), counts[value] - 1)
    again = validation_split(len(y), fraction, y, seed)
    np.testing.assert_array_equal(split.val, again.val)


def test_split_without_labels_and_of_other_seeds():
    split = validation_split(100, 0.1, None, seed=0)
    assert len(split.val) == 10 and len(np.union1d(split.train, split.val)) == 100
    assert split.val.tolist() != validation_split(100, 0.1, None, seed=1).val.tolist()
    assert len(validation_split(2, 0.01, None, seed=0).val) == 1
    assert len(validation_split(2, 0.99, None, seed=0).train) == 1


@pytest.mark.parametrize(
    "arguments", [(1, 0.5, None, 0), (5, 0.5, np.zeros(4, int), 0), (5, 1.0, None, 0), (5, 0.5, None, -1)]
)
def test_bad_splits(arguments):
    with pytest.raises(InputError):
        validation_split(*arguments)


def test_what_rounding_left_of_a_constant_feature_is_no_variance():
    mean = np.array([0.1, 0.1, 1e3, 0.0])
    variance = np.array([1e-17, 1e-10, 1e-9, 1e-30])
    assert (per_feature(mean, variance, precision("float32")) > 0).tolist() == [False, True, False, True]
    assert (per_feature(mean, variance, precision("float64")) > 0).all()
    shared = one_scale(mean, variance, precision("float32"))
    assert shared[0] == shared[2] == 0 and shared[1] == shared[3] == 1 / np.sqrt(variance.mean())
    assert one_scale(np.ones(2), np.zeros(2), 0.0).tolist() == [0.0, 0.0]


def test_results_are_flat_rows():
    protocol = Protocol("knn", "pixels", "per_feature", 8, 1, 1, seed=3, settings=(("k", 5), ("votes", "plain")))
    result = ProbeResult(1.0, 0.5, 0.25, np.nan, np.nan, np.nan, protocol)
    row = result.as_dict()
    assert row["accuracy_test"] == 0.25 and row["votes"] == "plain" and row["seed"] == 3 and row["strength"] is None
    assert "protocol" not in row and "settings" not in row
    assert np.isnan(result.strength)
