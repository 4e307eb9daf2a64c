"""Paired differences, permutations, p-values and intervals, against SciPy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.harness.statistics import (
    accuracy_difference,
    batches,
    check_draws,
    interval,
    p_value,
    paired_difference,
    pearson,
    shuffled_within,
    simultaneous_limit,
)
from mae_align import InputError


def test_correlations_are_scipys_and_constants_have_none():
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    y = np.round(x + rng.normal(size=30), 1)  # with ties
    assert float(pearson(x, y)) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
    ranks = stats.rankdata(x), stats.rankdata(y)
    assert float(pearson(*ranks)) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    # The sum of 0.1 is rounded: rounding is no variation.
    assert math.isnan(float(pearson(np.full(7, 0.1), np.arange(7.0))))
    assert float(pearson(1e6 + np.arange(3.0), np.arange(3.0))) == pytest.approx(1.0)


def test_permutations_move_within_parts_in_every_way_where_there_are_few():
    parts = [np.array([0, 2, 5]), np.array([1, 3]), np.array([4])]

    def drawn(most: int, seed: int = 0) -> np.ndarray:
        return np.concatenate(list(shuffled_within(parts, 7, most, 7, np.random.default_rng(seed))))

    every = drawn(12)
    assert len(every) == 11 == len({tuple(p) for p in every}) and list(range(7)) not in every.tolist()
    some = drawn(11)
    assert len(some) == 11 and (some == drawn(11)).all() and (some != drawn(11, seed=1)).any()
    for orders in (every, some):
        assert (orders[:, [4, 6]] == [4, 6]).all()
        for part in parts:
            assert (np.sort(orders[:, part], axis=1) == part).all()


def test_p_values_of_permutations_are_uniform_without_and_small_with_an_effect():
    rng = np.random.default_rng(0)

    def p(x: np.ndarray, y: np.ndarray) -> float:
        orders = np.concatenate(list(shuffled_within([np.arange(len(x))], len(x), 200, len(x), rng)))
        return p_value(np.abs(pearson(x, y[orders])), abs(float(pearson(x, y))))

    null = [p(*rng.normal(size=(2, 12))) for _ in range(300)]
    assert stats.kstest(null, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(null) <= 0.05) < 0.09
    x = rng.normal(size=40)
    assert p(x, x + rng.normal(size=40)) < 0.01


def test_p_values_and_intervals_by_hand():
    assert sum(batches(7, 2_000_000)) == 7 and max(batches(7, 2_000_000)) == 2 and list(batches(3, 10**9)) == [1] * 3
    assert p_value(np.array([0.3, 0.1 + 0.2, np.nan]), 0.1 + 0.2) == 3 / 4
    assert math.isnan(p_value(np.empty(0), 0.5)) and math.isnan(p_value(np.ones(3), np.nan))
    assert interval(np.append(np.arange(101.0), np.nan), 0.9) == pytest.approx((5.0, 95.0))
    assert math.isnan(interval(np.array([np.nan]), 0.9)[0])


@pytest.mark.parametrize("bad", [(0, 9, 0.9, 0), (9, 0, 0.9, 0), (9, 9, 1.0, 0), (9, 9, 0.9, -1)])
def test_draws_that_make_no_sense_are_refused(bad):
    check_draws(9, 9, 0.9, 0)
    with pytest.raises(InputError, match="level"):
        check_draws(*bad)


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


def test_interval_of_an_accuracy_is_that_of_the_paired_t_test_over_seeds():
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 50)) < 0.7, rng.random((4, 50)) < 0.5
    found = accuracy_difference(a, b, level=0.9)
    expected = stats.ttest_rel(a.mean(1), b.mean(1)).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(a.mean() - b.mean())
    each = (a.astype(float) - b).mean(0)
    assert found.image_se == pytest.approx(each.std(ddof=1) / np.sqrt(50))


def test_a_difference_is_detected_only_if_seeds_and_images_both_say_so():
    n = 400
    better = np.zeros((3, n), bool)
    better[:, :200], worse = True, np.zeros((3, n), bool)
    for seed in range(3):
        worse[seed, : 100 + seed] = True
    assert accuracy_difference(better, worse).detected
    # The seeds agree, but on two images only.
    one = worse.copy()
    one[:, 300:302] = True
    found = accuracy_difference(one, worse)
    assert found.low > 0 and not found.detected
    # Many images, but the seeds disagree.
    split = worse.copy()
    split[0, 150:390] = True
    found = accuracy_difference(split, worse)
    assert abs(found.mean) > 2 * found.image_se and not found.detected
    single = accuracy_difference(better[:1], worse[:1])
    assert np.isnan(single.low) and not single.detected


def test_results_that_do_not_pair_are_refused():
    with pytest.raises(InputError, match="the same"):
        accuracy_difference(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(InputError, match="level"):
        accuracy_difference(np.ones((2, 3)), np.ones((2, 3)), level=1.0)


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_no_difference_is_found_in_one_of_twenty_grids(shared):
    """Normal contributions of 20 groups to 40 differences that are 0, independent or alike."""
    rng, found, limits = np.random.default_rng(1), 0, []
    for _ in range(100):
        parts = np.sqrt(shared) * rng.normal(size=(20, 1)) + np.sqrt(1 - shared) * rng.normal(size=(20, 40))
        influence = parts - parts.mean(0)
        se = np.sqrt(20 / 19 * (influence**2).sum(0))
        limits.append(simultaneous_limit(influence))
        found += bool((np.abs(parts.sum(0)) > limits[-1] * se).any())
    # Binomial with 0.05: 11 or more of 100 has a probability of 1%.
    assert found <= 10
    # Bonferroni's limit of a t distribution with 19 degrees of freedom is 3.8.
    assert np.median(limits) < (3.9 if shared == 0 else 3.5)


def test_one_group_detects_nothing():
    assert simultaneous_limit(np.zeros((1, 3))) == np.inf
