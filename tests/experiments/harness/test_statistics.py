from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.harness.statistics import batches, correlation, interval, p_value, paired_difference, pearson, shuffled
from mae_align import InputError


def test_correlations_are_scipys():
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    y = np.round(x + rng.normal(size=30), 1)  # with ties
    found = correlation(x, y, permutations=4000, resamples=4000)
    assert found.count == 30 and found.resamples == 4000
    assert found.pearson == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    method = stats.BootstrapMethod(n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    low, high = stats.pearsonr(x, y).confidence_interval(method=method)
    np.testing.assert_allclose([found.pearson_low, found.pearson_high], [low, high], atol=0.04)
    ranks = stats.bootstrap(
        (x, y),
        lambda a, b: stats.spearmanr(a, b)[0],
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    np.testing.assert_allclose([found.spearman_low, found.spearman_high], ranks, atol=0.06)


def test_small_samples_are_permuted_in_every_way():
    x, y = np.array([1.0, 2.0, 4.0, 8.0, 9.0]), np.array([2.0, 1.0, 5.0, 6.0, 7.0])
    found = correlation(x, y)
    for name, a, b in (("pearson", x, y), ("spearman", stats.rankdata(x), stats.rankdata(y))):
        value = abs(np.corrcoef(a, b)[0, 1])
        every = [abs(np.corrcoef(a, b[list(p)])[0, 1]) for p in itertools.permutations(range(5))]
        assert getattr(found, f"{name}_p") == pytest.approx(np.mean(np.array(every) >= value - 1e-12))
    # Random ones agree with all of them.
    few = correlation(x, y, permutations=119)
    assert few.pearson_p == pytest.approx(found.pearson_p, abs=0.1)


def test_p_values_are_uniform_without_and_small_with_an_effect():
    rng = np.random.default_rng(0)
    null = [correlation(*rng.normal(size=(2, 12)), permutations=200, resamples=1).pearson_p for _ in range(300)]
    assert stats.kstest(null, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(null) <= 0.05) < 0.09
    x = rng.normal(size=40)
    found = correlation(x, x + rng.normal(size=40), permutations=500, resamples=500)
    assert found.pearson_p < 0.01 and found.spearman_p < 0.01 and found.pearson_low > 0


def test_constants_have_no_correlation():
    found = correlation(np.full(6, 0.1), np.arange(6.0), resamples=10)
    assert math.isnan(found.pearson) and math.isnan(found.spearman_p) and found.resamples == 0
    # The sum of 0.1 is rounded: rounding is no variation.
    assert math.isnan(float(pearson(np.full(7, 0.1), np.arange(7.0))))
    assert float(pearson(1e6 + np.arange(3.0), np.arange(3.0))) == pytest.approx(1.0)
    # Resamples without variation are counted, not hidden.
    few = correlation(np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.5, 1.0]), resamples=2000)
    assert 1000 < few.resamples < 1700


def test_draws_are_seeded_and_checked():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20))
    a, b, c = (correlation(x, y, permutations=300, resamples=300, seed=s) for s in (0, 0, 1))
    assert a == b and (a.pearson_p, a.pearson_low) != (c.pearson_p, c.pearson_low)
    settings: list[dict[str, Any]] = [{"permutations": 0}, {"resamples": 0}, {"level": 1.0}, {"seed": -1}]
    for bad in settings:
        with pytest.raises(InputError, match="level"):
            correlation(x, y, **bad)
    with pytest.raises(InputError, match="three pairs"):
        correlation(x[:2], y[:2])
    with pytest.raises(InputError, match="NaN"):
        correlation(np.append(x, np.nan), np.append(y, 0.0))


def test_permutations_p_values_and_intervals():
    every = np.concatenate(list(shuffled(4, 24, np.random.default_rng(0))))
    assert len(every) == 23 and len({tuple(p) for p in every}) == 23 and [0, 1, 2, 3] not in every.tolist()
    some = np.concatenate(list(shuffled(4, 23, np.random.default_rng(0))))
    assert len(some) == 23 and (np.sort(some, axis=1) == np.arange(4)).all()
    assert sum(batches(7, 2_000_000)) == 7 and max(batches(7, 2_000_000)) == 2 and list(batches(3, 10**9)) == [1] * 3
    assert p_value(np.array([0.3, 0.1 + 0.2, np.nan]), 0.1 + 0.2) == 3 / 4
    assert math.isnan(p_value(np.empty(0), 0.5)) and math.isnan(p_value(np.ones(3), np.nan))
    assert interval(np.append(np.arange(101.0), np.nan), 0.9) == pytest.approx((5.0, 95.0))
    assert math.isnan(interval(np.array([np.nan]), 0.9)[0])


def test_paired_difference_is_scipys_paired_t_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5)) + [[1.0], [0.0]]
    found = paired_difference(a, b, level=0.9)
    expected = stats.ttest_rel(a, b).confidence_interval(0.9)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)
    assert found.mean == pytest.approx((a - b).mean()) and found.spread == pytest.approx(stats.tstd(a - b))
    # What both runs of a pair share drops out.
    shifts = 100 * rng.normal(size=5)
    np.testing.assert_allclose(paired_difference(a + shifts, b + shifts, level=0.9), found, rtol=1e-9)
    one = paired_difference(a[:1], b[:1])
    assert one.pairs == 1 and one.mean == a[0] - b[0] and np.isnan([one.low, one.high, one.spread]).all()
    for bad in ((a, b[:4]), (a[:0], b[:0]), (np.full(5, np.nan), b)):
        with pytest.raises(InputError, match="pairs"):
            paired_difference(*bad)
    with pytest.raises(InputError, match="level"):
        paired_difference(a, b, level=1.0)
