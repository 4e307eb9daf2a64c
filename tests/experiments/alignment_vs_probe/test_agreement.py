from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.alignment_vs_probe.agreement import (
    Panel,
    gains,
    mean_unit_correlation,
    patch_correlation,
    pooled_correlation,
    pooled_slope,
    unit_correlations,
)
from experiments.alignment_vs_probe.predictors import (
    OURS,
    OURS_WITHOUT_TASK,
    Agreement,
    compare_predictors,
    reliability,
)
from mae_align import InputError

RATIOS = (0.2, 0.4, 0.6, 0.8)


def simulated(seed, effect, *, tasks=9, seeds=2, network=0.3, noise=0.3, kinds=3) -> Panel:
    """Scores that follow the predictions of their own task with weight ``effect``, a trend and networks in common."""
    rng = np.random.default_rng(seed)
    shape = (tasks, 2, 4)
    trend = np.linspace(0, 1, 4)
    p = rng.normal(size=shape) + trend
    common = network * rng.normal(size=(*shape[1:], seeds))
    own = effect * p + (1 - effect) * (rng.normal(size=shape) + trend)
    load = 1 + 0.5 * rng.normal(size=(tasks, 1, 1, 1))
    y = own[..., None] + load * common + noise * rng.normal(size=(*shape, seeds))
    names = tuple(f"task {i}" for i in range(tasks))
    rivals = {"mask ratio": np.broadcast_to(RATIOS, (2, 4)), "networks": common}
    return Panel(names, tuple(f"kind {i % kinds}" for i in range(tasks)), (2, 4), RATIOS, y, p, rivals)


def ours(panel, **options) -> Agreement:
    settings: dict[str, Any] = {"permutations": 200, "resamples": 2} | options
    return compare_predictors(panel, **settings)[0]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_statistics_are_what_they_say(seed):
    rng = np.random.default_rng(seed)
    p, g = rng.normal(size=(2, 3, 2, 4))
    each = np.array([[stats.pearsonr(p[a, s], g[a, s])[0] for s in range(2)] for a in range(3)])
    np.testing.assert_allclose(unit_correlations(p, g), each, atol=1e-12)
    assert float(mean_unit_correlation(p, g)) == pytest.approx(each.mean())
    dp, dg = (x - x.mean(-1, keepdims=True) for x in (p, g))
    pooled = stats.pearsonr(dp.ravel(), dg.ravel())[0]
    assert float(pooled_correlation(p, g)) == pytest.approx(pooled)
    assert float(pooled_slope(p, g)) == pytest.approx(np.polyfit(dp.ravel(), dg.ravel(), 1)[0])
    up, ug = ((x - x[..., :1])[..., 1:] for x in (p, g))
    within = [np.corrcoef(up[:, s].ravel(), ug[:, s].ravel())[0, 1] for s in range(2)]
    assert float(patch_correlation(p, g)) == pytest.approx(np.mean(within))
    # With its gain of 0 the lowest ratio takes part: gains correlate as scores do.
    zero = [np.where(np.isnan(gains(x)), 0.0, gains(x)) for x in (p, g)]
    np.testing.assert_allclose(unit_correlations(*zero), each, atol=1e-9)


@pytest.mark.parametrize("statistic", [mean_unit_correlation, pooled_correlation, pooled_slope, patch_correlation])
def test_statistics_take_batches_and_missing_networks(statistic):
    rng = np.random.default_rng(0)
    p, g = rng.normal(size=(2, 5, 3, 2, 4))
    together = statistic(p, g)
    np.testing.assert_allclose(together, [statistic(a, b) for a, b in zip(p, g, strict=True)], atol=1e-12)
    # A ratio without networks is as if it were not there.
    g[:, :, :, 2] = np.nan
    rest = [0, 1, 3]
    np.testing.assert_allclose(statistic(p, g), statistic(p[..., rest], g[..., rest]), atol=1e-12)
    # Missing at one patch size, also the lowest one.
    g[:, :, 1, 0] = np.nan
    if statistic is mean_unit_correlation:  # two ratios are left there: no unit
        assert np.isnan(unit_correlations(p, g)[:, :, 1]).all() and np.isfinite(statistic(p, g)).all()
    assert np.isfinite(statistic(p, g)).all()


def test_gains_are_over_the_lowest_ratio_that_has_a_network():
    y = np.array([[[np.nan, 2.0, 5.0], [1.0, 4.0, np.nan]]])
    np.testing.assert_array_equal(gains(y), [[[np.nan, np.nan, 3.0], [np.nan, 3.0, np.nan]]])


def test_inert_tasks_are_excluded_and_counted():
    panel = simulated(0, 0.8)
    predicted = panel.predicted.copy()
    predicted[0] = 0.1 + 1e-13 * predicted[0]  # rounding is no prediction
    predicted[1, 0] = 0.2
    observed = panel.observed.copy()
    observed[2, 1] = 1.0
    found = ours(dataclasses.replace(panel, predicted=predicted, observed=observed))
    assert (found.constant_predicted, found.constant_observed, found.num_units) == (3, 1, 14)
    each = unit_correlations(predicted, observed.mean(-1))
    assert found.value == pytest.approx(np.mean(each[np.isfinite(each)])) and np.isnan(each).sum() == 4
    nothing = ours(dataclasses.replace(panel, predicted=0 * predicted), resamples=5)
    assert math.isnan(nothing.value) and math.isnan(nothing.p_tasks) and math.isnan(nothing.low)
    assert nothing.num_units == 0 and nothing.constant_predicted == 18 and nothing.resamples == 0


@pytest.mark.parametrize("statistic", [mean_unit_correlation, pooled_correlation, patch_correlation])
def test_tasks_are_permuted_in_every_way_where_there_are_few(statistic):
    panel = simulated(3, 0.3, tasks=5, kinds=2)
    found = ours(panel, statistic=statistic, permutations=200)
    value = float(statistic(panel.predicted, panel.scores))
    every = [float(statistic(panel.predicted[list(o)], panel.scores)) for o in itertools.permutations(range(5))]
    assert found.permutations == 119 and found.p_tasks == pytest.approx(np.mean(np.array(every) >= value - 1e-12))
    # Within kinds: tasks 0, 2, 4 among each other and 1, 3 among each other.
    orders = [(a, p, b, q, c) for a, b, c in itertools.permutations((0, 2, 4)) for p, q in ((1, 3), (3, 1))]
    every = [float(statistic(panel.predicted[list(o)], panel.scores)) for o in orders]
    assert found.p_within_kinds == pytest.approx(np.mean(np.array(every) >= value - 1e-12))
    alone = dataclasses.replace(panel, kinds=tuple("abcde"))
    assert math.isnan(ours(alone).p_within_kinds)


def test_ratios_are_permuted_within_patch_sizes():
    panel = simulated(1, 0.4, tasks=4)
    every = []
    for one, two in itertools.product(itertools.permutations(range(4)), repeat=2):
        moved = np.stack([panel.predicted[:, 0, list(one)], panel.predicted[:, 1, list(two)]], 1)
        every.append(float(mean_unit_correlation(moved, panel.scores)))
    value = float(mean_unit_correlation(panel.predicted, panel.scores))
    found = compare_predictors(panel, permutations=576, resamples=2)
    assert found[0].p_ratios == pytest.approx(np.mean(np.array(every) >= value - 1e-12))
    assert 0 < found[2].p_ratios <= 1 and found[2].predictor == "mask ratio"
    few = compare_predictors(panel, permutations=500, resamples=2)
    assert few[0].p_ratios == pytest.approx(found[0].p_ratios, abs=0.06)


@pytest.mark.parametrize("statistic", [mean_unit_correlation, pooled_correlation, patch_correlation])
def test_p_is_uniform_without_an_effect_in_spite_of_a_common_trend(statistic):
    found = [ours(simulated(i, 0.0), statistic=statistic, permutations=79) for i in range(150)]
    p = np.array([one.p_tasks for one in found])
    assert stats.kstest(p, "uniform").pvalue > 0.01 and 0.01 < np.mean(p <= 0.05) < 0.1
    if statistic is not patch_correlation:
        # The trend is there, and permuted ratios see it; permuted tasks hold it for nothing.
        assert np.mean([one.value for one in found]) > 0.1
        assert np.mean([one.p_ratios <= 0.05 for one in found]) > 0.1


def test_an_effect_is_found():
    p = np.array([ours(simulated(i, 0.4, tasks=15), permutations=99).p_tasks for i in range(25)])
    assert np.mean(p <= 0.05) > 0.85


def test_rivals_have_no_test_of_tasks_but_a_difference():
    panel = simulated(0, 0.7, tasks=15)
    first, average, ratio, networks = found = compare_predictors(panel, permutations=500, resamples=500)
    assert [one.predictor for one in found] == [OURS, OURS_WITHOUT_TASK, "mask ratio", "networks"]
    assert first.p_tasks < 0.01 and first.difference == first.difference_low == 0
    for one in (average, ratio, networks):
        assert math.isnan(one.p_tasks) and math.isnan(one.p_within_kinds) and one.permutations == 0
        assert one.difference == pytest.approx(first.value - one.value)
        assert one.difference_low < one.difference < one.difference_high
    tiled = np.broadcast_to(panel.predicted.mean(0), panel.predicted.shape)
    assert average.value == pytest.approx(float(mean_unit_correlation(tiled, panel.scores)))
    # A rival that is the same for all tasks never moves when tasks are permuted: that is why it has no test.
    assert ours(dataclasses.replace(panel, predicted=tiled)).p_tasks == 1.0
    with pytest.raises(InputError, match="ours"):
        compare_predictors(dataclasses.replace(panel, rivals={OURS: panel.predicted[0]}))


def test_intervals_cover_and_widen_with_the_noise_of_seeds():
    many = [float(mean_unit_correlation(p.predicted, p.scores)) for p in (simulated(i, 0.4) for i in range(1000, 1300))]
    target, hits = np.mean(many), 0
    for i in range(100):
        found = ours(simulated(i, 0.4), permutations=1, resamples=150)
        hits += found.low <= target <= found.high
    assert 88 <= hits <= 100
    # One seed says nothing of networks: tasks alone are resampled, and the interval is too narrow.
    panel = simulated(0, 0.4, tasks=15, network=1.0)
    one = dataclasses.replace(panel, observed=panel.observed.mean(-1, keepdims=True), rivals={})
    wide, narrow = (ours(p, permutations=1, resamples=500) for p in (panel, one))
    assert wide.value == pytest.approx(narrow.value) and wide.high - wide.low > 1.2 * (narrow.high - narrow.low)


def test_redrawn_seeds_spread_as_means_do():
    # Identical tasks: the slope's spread comes from seeds alone and is known.
    rng = np.random.default_rng(0)
    p = np.broadcast_to(np.arange(4.0), (2, 1, 4))
    widths, values = [], []
    for _ in range(150):
        y = p[..., None] + rng.normal(size=(1, 1, 4, 2))
        panel = Panel(("a", "b"), ("x", "x"), (2,), RATIOS, y, p, {})
        found = ours(panel, statistic=pooled_slope, permutations=1, resamples=300, level=0.6827)
        widths.append((found.high - found.low) ** 2 / 4)
        values.append(found.value)
    # Variance of the slope: sigma^2 / seeds / sum (x - mean)^2 = 1 / 2 / 5.
    assert np.var(values) == pytest.approx(0.1, rel=0.3) and np.mean(widths) == pytest.approx(0.1, rel=0.3)


def test_seeds_that_are_missing_are_left_out():
    panel = simulated(0, 0.6, seeds=3)
    observed = panel.observed.copy()
    observed[:, 0, 1, 0] = np.nan
    observed[:, 1, 3] = np.nan
    rival = {"networks": np.where(np.isnan(observed[0]), np.nan, panel.rivals["networks"])}
    short = dataclasses.replace(panel, observed=observed, rivals=rival)
    np.testing.assert_allclose(short.scores[:, 0, 1], observed[:, 0, 1, 1:].mean(-1))
    assert np.isnan(short.scores[:, 1, 3]).all()
    found = compare_predictors(short, permutations=300, resamples=300)
    assert all(np.isfinite([one.value, one.low, one.high, one.p_ratios]).all() for one in found)
    assert found[0].num_units == 18 and found[0].value > 0.4


def test_reliability_is_that_of_one_seed_for_another():
    panel = simulated(0, 0.5, seeds=3)
    pairs = [(0, 1), (0, 2), (1, 2)]
    values = [mean_unit_correlation(panel.observed[..., a], panel.observed[..., b]) for a, b in pairs]
    assert reliability(panel) == pytest.approx(np.mean(values))
    assert math.isnan(reliability(dataclasses.replace(panel, observed=panel.observed[..., :1], rivals={})))


def test_results_are_seeded():
    panel = simulated(0, 0.3)
    a, b, c = (compare_predictors(panel, permutations=99, resamples=50, seed=s)[0] for s in (0, 0, 1))
    assert a == b and a != c


def test_bad_panels_are_refused():
    panel = simulated(0, 0.5)
    lost, gone = panel.observed.copy(), panel.predicted.copy()
    lost[4, 0, 0, 0], gone[0, 0, 0] = np.nan, np.nan
    for change, match in (
        ({"observed": panel.observed[:, :1]}, "observed"),
        ({"kinds": ("x",)}, "kind"),
        ({"mask_ratios": RATIOS[::-1]}, "ascending"),
        ({"observed": lost}, "task 4"),
        ({"predicted": gone}, "without a prediction"),
        ({"rivals": {"bad": np.ones(3)}}, "'bad'"),
        ({"rivals": {"bad": np.full((2, 4), np.nan)}}, "'bad'"),
    ):
        with pytest.raises(InputError, match=match):
            dataclasses.replace(panel, **change)
