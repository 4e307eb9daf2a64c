"""Batches as rows, the groups of samples, and sums on the host."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

import mae_align as ma
from mae_align.moments.accumulate import check_batch, group_of, sums_on_host
from mae_align.runtime.errors import InputError


def targets_of(kind: str, n: int) -> np.ndarray | None:
    rng = np.random.default_rng(1)
    return {"classes": np.arange(n) % 3, "numbers": rng.normal(size=(n, 2)), "none": None}[kind]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", ["classes", "numbers", "none"])
def test_sums_are_those_of_the_definition_for_every_group(kind, groups, monkeypatch):
    monkeypatch.setattr("mae_align.moments.accumulate._HOST_ROWS", 7)
    x = 1000.0 + np.random.default_rng(0).normal(size=(50, 2, 3, 1))
    batch = check_batch(x, targets_of(kind, 50), None)
    member = group_of(np.arange(50), groups)
    found = sums_on_host(batch, member, groups)
    y = np.eye(3)[batch.labels] if kind == "classes" else batch.numbers
    z, w = x.reshape(50, 6) - found.pivot_x, y - found.pivot_y
    for g in range(groups):
        zg, wg = z[member == g], w[member == g]
        assert found.counts[g] == len(zg)
        expected = (zg.sum(0), wg.sum(0), zg.T @ zg, zg.T @ wg, wg.T @ wg)
        for value, right in zip(found[3:], expected, strict=True):
            np.testing.assert_allclose(value[g], right, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("kind", ["classes", "numbers", "none"])
def test_arrays_and_streams_of_float64_images_have_the_same_moments(kind):
    x = 1000.0 + np.random.default_rng(0).normal(size=(90, 2, 3, 1))
    y = targets_of(kind, 90)
    cut = [(x[i : i + 40], None if y is None else y[i : i + 40]) for i in (0, 40, 80)]
    streamed = ma.stream_moments(cut, num_classes=3 if kind == "classes" else None, groups=2)
    whole = ma.Moments.from_arrays(x, y, groups=2)
    assert whole.counts.tolist() == streamed.counts.tolist()
    for name in ("sxx", "sxy", "syy", "mean_x"):
        np.testing.assert_allclose(getattr(whole, name), getattr(streamed, name), rtol=1e-9, atol=1e-9)


def test_sums_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("mae_align.runtime.memory.available_bytes", lambda: 100)
    with pytest.raises(InputError, match=r"second moments of 6 pixel values and 0 targets in 1 group\(s\) takes about"):
        ma.Moments.from_arrays(np.ones((4, 2, 3, 1)))


# Groups


def test_group_hash_is_splitmix64():
    """The first outputs of splitmix64 seeded with 0, as its authors publish them."""
    stream = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    for groups in (2, 20, 2**31 - 1):
        assert group_of(np.arange(5), groups).tolist() == [value % groups for value in stream]
    # An index past 2^32 neither overflows nor depends on where the array starts.
    late = group_of(np.arange(2**40, 2**40 + 3), 1000)
    np.testing.assert_array_equal(late[2:], group_of(np.array([2**40 + 2]), 1000))
    assert group_of(np.array([2**62]), 7).dtype == np.int64


@pytest.mark.parametrize("groups", [2, 10, 20, 64])
def test_groups_are_balanced_and_blind_to_the_order_of_the_data(groups):
    """Class-sorted, interleaved and periodic labels: class and group are independent (chi-squared)."""
    n = 20000
    member = group_of(np.arange(n), groups)
    assert scipy.stats.chisquare(np.bincount(member, minlength=groups)).pvalue > 1e-3
    for labels in (np.arange(n) // (n // 10), np.arange(n) % 10, np.arange(n) // 64 % 10):
        table = np.zeros((10, groups))
        np.add.at(table, (labels, member), 1)
        expected = np.outer(table.sum(1), table.sum(0)) / n
        assert scipy.stats.chisquare(table.ravel(), expected.ravel(), ddof=10 + groups - 2).pvalue > 1e-3
