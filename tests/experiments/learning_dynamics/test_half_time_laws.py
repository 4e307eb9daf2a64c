from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm, spearmanr

from experiments.learning_dynamics.dynamics import HalfTimes
from experiments.learning_dynamics.half_time_laws import Law, compare_laws, fit_censored, law_inputs, partial_ranks
from mae_align import InputError


def drawn(seed: int = 0, n: int = 40, last: float = np.inf) -> tuple[np.ndarray, HalfTimes]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    t = np.exp(3 + 1.5 * x + 0.4 * rng.normal(size=n))
    return x, HalfTimes(np.minimum(t, last), t > last)


def fitted(x: np.ndarray, times: HalfTimes, weights: np.ndarray | None = None) -> SimpleNamespace:
    """The one fit of one set of weights, 1 unless given."""
    found = fit_censored(x, times, (np.ones(len(x)) if weights is None else weights)[None])
    return SimpleNamespace(**{name: float(values[0]) for name, values in found._asdict().items()})


def negative_log_likelihood(theta, x, times, weights):
    """From the definition: density where observed, survival where censored."""
    mean, sigma, y = theta[0] + theta[1] * x, np.exp(theta[2]), np.log(times.time)
    each = np.where(times.censored, norm.logsf(y, mean, sigma), norm.logpdf(y, mean, sigma))
    return -(weights * each).sum()


@pytest.mark.parametrize("last", [np.inf, 40.0, 12.0])
def test_fit_is_the_maximum_of_the_likelihood(last):
    x, times = drawn(last=last)
    weights = np.random.default_rng(1).integers(0, 3, len(x)).astype(float)
    found = fitted(x, times, weights)
    best = minimize(
        negative_log_likelihood,
        [0, 0, 0],
        (x, times, weights),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 9000},
    )
    np.testing.assert_allclose([found.intercept, found.slope, np.log(found.sigma)], best.x, atol=2e-5)
    assert found.aic == pytest.approx(2 * (3 + best.fun))


def test_without_censoring_it_is_least_squares():
    x, times = drawn()
    slope, intercept = np.polyfit(x, np.log(times.time), 1)
    found = fitted(x, times)
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept))
    assert found.r2 == pytest.approx(np.corrcoef(x, np.log(times.time))[0, 1] ** 2)


def test_censored_directions_are_used_and_not_taken_for_observed():
    slopes = {"censored": [], "dropped": [], "as observed": []}
    for seed in range(20):
        x, times = drawn(seed, 100, last=25.0)
        seen = ~times.censored
        slopes["censored"].append(fitted(x, times).slope)
        slopes["dropped"].append(np.polyfit(x[seen], np.log(times.time[seen]), 1)[0])
        slopes["as observed"].append(np.polyfit(x, np.log(times.time), 1)[0])
    means = {name: np.mean(s) for name, s in slopes.items()}
    assert means["censored"] == pytest.approx(1.5, abs=0.04)
    assert means["dropped"] < 1.45
    assert means["as observed"] < 1.2


def test_an_exact_law_is_found_and_nothing_is_said_without_two_observations():
    s = 10.0 / np.arange(1, 20)
    found = fitted(np.log(s), HalfTimes(7 / s, np.zeros(19, bool)))
    assert found.slope == pytest.approx(-1)
    assert found.r2 == pytest.approx(1)
    half = HalfTimes(np.minimum(7 / s, 5.0), 7 / s > 5.0)
    assert fitted(np.log(s), half).slope == pytest.approx(-1, abs=1e-4)
    one = HalfTimes(7 / s, np.arange(19) > 0)
    assert np.isnan(fitted(np.log(s), one).slope)
    assert np.isnan(fitted(np.ones(19), HalfTimes(7 / s, np.zeros(19, bool))).slope)
    assert np.isnan(fitted(np.log(s), HalfTimes(7 / s, np.ones(19, bool))).slope)


@pytest.mark.parametrize("law", list(Law))
def test_the_law_that_made_the_half_times_wins(law):
    s = 100.0 / np.arange(1, 41) ** 1.5
    x = law_inputs(law, s)
    rng = np.random.default_rng(0)
    slope = {Law.power: -0.8, Law.exponential: -4.0, Law.rank: 0.1}[law]
    t = np.exp(2 + slope * x + 0.1 * rng.normal(size=(3, 40)))
    last = np.quantile(t, 0.8)
    found = compare_laws(s, HalfTimes(np.minimum(t, last), t > last), resamples=100)
    assert min(found.fits, key=lambda one: found.fits[one].aic[0]) is law
    assert found.fits[law].slope[0] == pytest.approx(slope, rel=0.05)
    assert found.num_censored == pytest.approx(8)
    if law is Law.power:
        assert found.low < 0.8 < found.high
        assert found.gain_low > 0
    else:
        assert found.gain_high < 0


def test_seeds_that_agree_are_no_further_evidence():
    s = 100.0 / np.arange(1, 31)
    t = 5 / s * np.exp(0.2 * np.random.default_rng(0).normal(size=30))
    once, thrice = (
        compare_laws(s, HalfTimes(np.tile(t, (e, 1)), np.zeros((e, 30), bool)), resamples=50) for e in (1, 3)
    )
    assert thrice.aic_gain == pytest.approx(once.aic_gain)
    assert thrice.exponent == pytest.approx(once.exponent)
    assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.5)


def test_intervals_cover_the_exponent():
    s, hits = 100.0 / np.arange(1, 31), 0
    for seed in range(30):
        t = 5 / s * np.exp(0.3 * np.random.default_rng(seed).normal(size=(1, 30)))
        found = compare_laws(s, HalfTimes(np.minimum(t, 1.0), t > 1.0), resamples=100, seed=seed)
        hits += found.low < 1 < found.high
    assert hits >= 24


def test_a_diverged_half_time_is_left_out():
    s = 100.0 / np.arange(1, 21)
    t = np.stack([5 / s, 5 / s])
    t[1, 3] = np.nan
    assert compare_laws(s, HalfTimes(t, np.zeros((2, 20), bool)), resamples=20).exponent == pytest.approx(1)


def test_partial_ranks_tell_the_cause_from_its_companion():
    rng = np.random.default_rng(0)
    s = np.geomspace(100, 1, 60)
    f = np.argsort(np.argsort(-s + 25 * rng.normal(size=60))) / 120
    by_value = HalfTimes((1 / s)[None] * np.exp(0.1 * rng.normal(size=(3, 60))), np.zeros((3, 60), bool))
    found = partial_ranks(s, f, by_value, resamples=200)
    assert found.between == pytest.approx(spearmanr(s, f).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    assert found.eigenvalue[0] < -0.95
    assert found.frequency[1] > 0.3  # the companion
    assert found.eigenvalue_given[2] < -0.9
    assert found.frequency_given[1] < 0 < found.frequency_given[2]
    by_frequency = HalfTimes(np.exp(5 * f + 0.1 * rng.normal(size=60))[None], np.zeros((1, 60), bool))
    found = partial_ranks(s, f, by_frequency, resamples=200)
    assert found.frequency_given[1] > 0.9
    assert abs(found.eigenvalue_given[0]) < 0.4


def test_partial_rank_is_the_correlation_of_rank_residuals():
    rng = np.random.default_rng(3)
    s, f, t = rng.exponential(size=(3, 25))
    t = t + s
    found = partial_ranks(s, f, HalfTimes(t[None], np.zeros((1, 25), bool)), resamples=1)
    ranks = [np.argsort(np.argsort(a)).astype(float) for a in (t, s, f)]
    residual = [a - np.polyval(np.polyfit(ranks[2], a, 1), ranks[2]) for a in ranks[:2]]
    assert found.eigenvalue_given[0] == pytest.approx(np.corrcoef(*residual)[0, 1])  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_equal_eigenvalues_and_censored_ties():
    f = np.linspace(0.1, 0.5, 12)
    t = np.minimum(np.exp(8 * f), 20.0)
    censored = np.exp(8 * f) > 20
    equal = 3.0 * (1 + 1e-13 * np.arange(12))
    found = partial_ranks(equal, f, HalfTimes(t[None], censored[None]), resamples=50)
    assert np.isnan(found.eigenvalue[0])
    assert np.isnan(found.eigenvalue_given[0])
    late = np.where(censored, 1e9, t)
    assert found.frequency[0] == pytest.approx(spearmanr(late, f).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    assert found.frequency_given[0] == pytest.approx(found.frequency[0])


def test_bad_input_is_refused():
    ok = HalfTimes(np.ones((1, 4)), np.zeros((1, 4), bool))
    with pytest.raises(InputError, match="give \\[r\\] > 0"):
        compare_laws(np.ones(3), ok)
    with pytest.raises(InputError, match="positive"):
        fitted(np.arange(2.0), HalfTimes(np.array([0.0, 1.0]), np.zeros(2, bool)))
    with pytest.raises(InputError, match="at least one draw"):
        compare_laws(np.ones(4), ok, resamples=0)
    with pytest.raises(InputError, match="four directions"):
        partial_ranks(np.ones(4), np.ones(3), ok)
