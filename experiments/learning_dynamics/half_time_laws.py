"""Which law half-times follow: regressions of log half-times in which unfinished directions are censored, not dropped.

The model is log t_i = b^T z_i + sigma e_i with e_i standard normal; a direction that was not half learned by step T_i
says only that log t_i > log T_i (Tobit). With the parameters delta = b / sigma and gamma = 1 / sigma the likelihood is
concave (Olsen, 1978)::

    sum over observed of log gamma - (gamma log t - delta^T z)^2 / 2
    + sum over censored of log Phi(delta^T z - gamma log T)

and Newton's method with step halving finds its one maximum, for all bootstrap resamples side by side.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import numpy as np
from scipy.special import log_ndtr
from scipy.stats import rankdata

from experiments.harness.statistics import check_draws, interval, pearson
from experiments.learning_dynamics.dynamics import HalfTimes
from mae_align.runtime.errors import InputError

# Half-times are not known better than this, in units of the spread of log t: keeps sigma from 0 where a law is exact.
_FLOOR = 1e-6
_ITERATIONS = 60
_HALVINGS = 30


class Law(enum.Enum):
    """How the logarithm of the half-time depends on a direction."""

    power = "power law in the eigenvalue"
    exponential = "exponential in the eigenvalue"
    rank = "exponential in the rank"


class Fits(NamedTuple):
    """Censored regressions log t = intercept + slope x, one for each set of weights.

    Attributes:
        intercept: [B] of the line.
        slope: [B].
        sigma: [B] standard deviation of log t about the line.
        r2: [B] 1 - sigma^2 / sigma0^2 with sigma0 of the line without slope: the usual one where nothing is censored.
        aic: [B] 2 (3 - log likelihood).
    """

    intercept: np.ndarray
    slope: np.ndarray
    sigma: np.ndarray
    r2: np.ndarray
    aic: np.ndarray


class LawComparison(NamedTuple):
    """The laws held against each other on the half-times of one setting.

    Attributes:
        fits: by law, of the data first and then of the bootstrap samples.
        exponent: a of half-time ~ eigenvalue^-a.
        low: end of its bootstrap interval.
        high: the other one.
        aic_gain: AIC of the best exponential law minus that of the power law: positive where the power law is better.
        gain_low: end of its interval.
        gain_high: the other one.
        num_directions: r.
        num_censored: mean number over seeds.
        resamples: bootstrap samples in which all laws could be fitted.
    """

    fits: dict[Law, Fits]
    exponent: float
    low: float
    high: float
    aic_gain: float
    gain_low: float
    gain_high: float
    num_directions: int
    num_censored: float
    resamples: int


class PartialRanks(NamedTuple):
    """Rank correlations of half-times with eigenvalue and frequency.

    Attributes:
        eigenvalue: Spearman's correlation with it alone, and the ends of its interval; NaN where it does not vary.
        frequency: likewise.
        eigenvalue_given: the partial correlation, the frequency held fixed.
        frequency_given: the eigenvalue held fixed.
        between: Spearman's correlation of eigenvalue and frequency themselves.
    """

    eigenvalue: tuple[float, float, float]
    frequency: tuple[float, float, float]
    eigenvalue_given: tuple[float, float, float]
    frequency_given: tuple[float, float, float]
    between: float


def law_inputs(law: Law, values: np.ndarray) -> np.ndarray:
    """What log t is linear in: log s, s / s_1 or the rank 1, 2, ...

    Args:
        law: which.
        values: [r] eigenvalues s > 0.

    Example:
        >>> (
        ...     law_inputs(Law.rank, np.array([4.0, 1.0])).tolist(),
        ...     law_inputs(Law.exponential, np.array([4.0, 1.0])).tolist(),
        ... )
        ([1.0, 2.0], [1.0, 0.25])
    """
    s = np.asarray(values, np.float64)
    if law is Law.power:
        return np.log(s)
    if law is Law.exponential:
        return s / s.max()
    return rankdata(-s, method="average")


def fit_censored(x: np.ndarray, times: HalfTimes, weights: np.ndarray) -> Fits:
    """The lines of greatest likelihood.

    Args:
        x: [n].
        times: [n], positive.
        weights: [B, n] >= 0, of the terms of each likelihood.

    Returns:
        The fits; NaN where fewer than two different x are observed. Cost: a few dozen Newton steps for all together.

    Raises:
        InputError: shapes that differ, times that are not positive.

    Example:
        >>> x = np.arange(5.0)
        >>> times = HalfTimes(np.exp(2 * np.minimum(x, 3) + [0.1, -0.1, -0.1, 0.1, 0.0]), x > 3)
        >>> fit_censored(x, times, np.ones((1, 5))).slope.round(3).tolist()
        [2.0...]
    """
    if x.ndim != 1 or times.time.shape != x.shape or not (np.isfinite(times.time) & (times.time > 0)).all():
        raise InputError(f"x {list(x.shape)} and half-times {list(times.time.shape)}: give [n] and positive [n]")
    if times.censored.all() or np.ptp(x) <= 1e-12 * np.abs(x).max(initial=0.0):
        return Fits(*(np.full(len(weights), np.nan) for _ in range(5)))
    y = np.log(times.time)
    (mx, sx), (my, sy) = ((float(a.mean()), float(a.std()) or 1.0) for a in (x, y))
    design = np.stack([np.ones_like(x), (x - mx) / sx], axis=1)
    seen = (weights > 0) & ~times.censored
    # Two different x at least, or a line has no slope.
    some = [
        np.where(seen, x, fill).max(1) if fill < 0 else np.where(seen, x, fill).min(1) for fill in (-np.inf, np.inf)
    ]
    possible = some[0] > some[1]
    fitted = weights[possible]
    line, level = (_newton(z, (y - my) / sy, times.censored, fitted) for z in (design, design[:, :1]))
    likelihood = line[1] - math.log(sy) * (fitted * ~times.censored).sum(1)
    gamma = line[0][:, -1]
    slope = line[0][:, 1] / gamma * sy / sx
    intercept = my + line[0][:, 0] / gamma * sy - slope * mx
    r2 = 1.0 - (level[0][:, -1] / gamma) ** 2
    parts = []
    for part in (intercept, slope, sy / gamma, r2, 2.0 * (3.0 - likelihood)):
        whole = np.full(len(weights), np.nan)
        whole[possible] = part
        parts.append(whole)
    return Fits(*parts)


def compare_laws(
    values: np.ndarray, times: HalfTimes, *, resamples: int = 500, level: float = 0.95, seed: int = 0
) -> LawComparison:
    """Power law against exponential laws, with bootstrap intervals over seeds and directions.

    Seeds share their images, so that they are no independent evidence on a direction: each term of the likelihood has
    the weight 1 / number of seeds, and AIC is that of one run. Resamples draw seeds and, apart from them, directions.

    Args:
        values: [r] eigenvalues.
        times: [E, r] of E seeds; NaN ones are left out.
        resamples: of the bootstrap.
        level: of its intervals.
        seed: of its draws.

    Returns:
        Fits and intervals. Cost: a second for 500 resamples of 3 x 64 half-times.

    Raises:
        InputError: shapes that do not fit, values or times that are not positive, bad settings.

    Example:
        >>> s = 100.0 / np.arange(1, 21)
        >>> t = 50.0 / s * np.exp(0.1 * np.random.default_rng(0).normal(size=(2, 20)))
        >>> found = compare_laws(s, HalfTimes(t, np.zeros((2, 20), bool)), resamples=50)
        >>> found.low < 1.0 < found.high, found.aic_gain > 0
        (True, True)
    """
    s = np.asarray(values, np.float64)
    check_draws(1, resamples, level, seed)
    if times.time.ndim != 2 or times.time.shape[1:] != s.shape or not (s > 0).all():
        raise InputError(
            f"{list(s.shape)} eigenvalues and half-times {list(times.time.shape)}: give [r] > 0 and [E, r]"
        )
    seeds, r = times.time.shape
    known = np.isfinite(times.time).ravel()
    flat = HalfTimes(np.where(known, times.time.ravel(), 1.0), times.censored.ravel())
    rng = np.random.default_rng(seed)
    drawn = [_counts(rng, n, resamples) for n in (seeds, r)]
    counts = [np.concatenate([np.ones((1, n)), c]) for n, c in zip((seeds, r), drawn, strict=True)]
    weights = (counts[0][:, :, None] * counts[1][:, None, :]).reshape(resamples + 1, -1) * known / seeds
    fits = {law: fit_censored(np.tile(law_inputs(law, s), seeds), flat, weights) for law in Law}
    gain = np.fmin(fits[Law.exponential].aic, fits[Law.rank].aic) - fits[Law.power].aic
    exponent = -fits[Law.power].slope
    return LawComparison(
        fits,
        float(exponent[0]),
        *interval(exponent[1:], level),
        float(gain[0]),
        *interval(gain[1:], level),
        r,
        float(times.censored.sum()) / seeds,
        int(np.isfinite(exponent[1:]).sum()),
    )


def partial_ranks(
    values: np.ndarray,
    frequencies: np.ndarray,
    times: HalfTimes,
    *,
    resamples: int = 2_000,
    level: float = 0.95,
    seed: int = 0,
) -> PartialRanks:
    """Does the half-time follow the eigenvalue or the frequency, the other held fixed?

    Over directions, of the mean rank over seeds (censored ones are later than all others, and tied): with r_ab
    Spearman's correlations, r_ts.f = (r_ts - r_tf r_sf) / sqrt((1 - r_tf^2)(1 - r_sf^2)). Resamples draw directions.

    Args:
        values: [r] eigenvalues.
        frequencies: [r].
        times: [E, r] of E seeds, finite.
        resamples: of the bootstrap.
        level: of its intervals.
        seed: of its draws.

    Returns:
        Correlations with intervals; where one of the two does not vary, nothing is held fixed: the partial correlation
        of the other is its plain one.

    Raises:
        InputError: shapes that do not fit, fewer than four directions, half-times that are not finite.

    Example:
        >>> s = np.geomspace(100.0, 1.0, 20)
        >>> f = np.random.default_rng(0).permutation(20) / 40.0
        >>> found = partial_ranks(s, f, HalfTimes(1.0 / s[None], np.zeros((1, 20), bool)), resamples=20)
        >>> round(found.eigenvalue_given[0], 6)
        -1.0
    """
    s, f = np.asarray(values, np.float64), np.asarray(frequencies, np.float64)
    check_draws(1, resamples, level, seed)
    if len(s) < 4 or f.shape != s.shape or times.time.shape[1:] != s.shape or not np.isfinite(times.time).all():
        raise InputError(
            f"{list(s.shape)} eigenvalues, {list(f.shape)} frequencies and half-times {list(times.time.shape)}: give "
            "at least four directions and finite half-times [E, r]"
        )
    # Rounding of equal eigenvalues is no order among them.
    s = np.round(s / s.max(), 9)
    late = np.where(times.censored, np.inf, times.time)
    t = rankdata(late, axis=1).mean(0)
    rng = np.random.default_rng(seed)
    index = np.concatenate([np.arange(len(s))[None], rng.integers(0, len(s), (resamples, len(s)))])
    t, s, f = (rankdata(a[index], axis=1) for a in (t, s, f))
    ts, tf, sf = pearson(t, s), pearson(t, f), pearson(s, f)

    def with_ends(draws: np.ndarray) -> tuple[float, float, float]:
        return (float(draws[0]), *interval(draws[1:], level))

    return PartialRanks(
        with_ends(ts), with_ends(tf), with_ends(_partial(ts, tf, sf)), with_ends(_partial(tf, ts, sf)), float(sf[0])
    )


def _partial(wanted: np.ndarray, other: np.ndarray, between: np.ndarray) -> np.ndarray:
    """Correlation of t and a given b, from those of (t, a), (t, b), (a, b); the plain one where b does not vary."""
    rest = (1 - other**2) * (1 - between**2)
    # Where b orders t or a exactly there is nothing left of it to correlate.
    safe = rest > 1e-12
    value = np.clip((wanted - other * between) / np.sqrt(np.where(safe, rest, 1.0)), -1.0, 1.0)
    return np.where(np.isnan(other) & np.isnan(between), wanted, np.where(safe, value, np.nan))


def _counts(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """[resamples, n] how often each of n things is drawn in a bootstrap sample."""
    return rng.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


def _newton(z: np.ndarray, y: np.ndarray, censored: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters [B, p + 1] (delta, gamma) and log likelihoods [B] for weights [B, n]."""
    p, seen = z.shape[1], ~censored
    rows = np.concatenate([z, -y[:, None]], axis=1)  # delta^T z - gamma y

    def value(theta: np.ndarray) -> np.ndarray:
        v = theta @ rows.T
        gamma = np.maximum(theta[:, -1:], np.finfo(float).tiny)
        observed = np.log(gamma) - v**2 / 2 - (_FLOOR * gamma) ** 2 / 2 - math.log(2 * math.pi) / 2
        found = (w * np.where(seen, observed, log_ndtr(v))).sum(1)
        return np.where(theta[:, -1] > 0, found, -np.inf)

    # Least squares with censored ones taken as observed.
    gram = np.einsum("bn,ni,nj->bij", w, z, z) + 1e-9 * np.eye(p)
    ols = np.linalg.solve(gram, np.einsum("bn,ni,n->bi", w, z, y)[..., None])[..., 0]
    spread = np.sqrt((w * (y - ols @ z.T) ** 2).sum(1) / w.sum(1))
    gamma = 1.0 / np.maximum(spread, 1e-3)
    theta = np.concatenate([ols * gamma[:, None], gamma[:, None]], axis=1)
    best = value(theta)
    for _ in range(_ITERATIONS):
        v = theta @ rows.T
        gamma = theta[:, -1:]
        mills = np.exp(-(v**2) / 2 - math.log(2 * math.pi) / 2 - log_ndtr(v))
        slope = w * np.where(seen, -v, mills)
        curve = w * np.where(seen, 1.0, mills * (mills + v))
        gradient = slope @ rows
        hessian = np.einsum("bn,ni,nj->bij", curve, rows, rows)
        counted = (w * seen).sum(1)
        gradient[:, -1] += counted * (1.0 / gamma[:, 0] - _FLOOR**2 * gamma[:, 0])
        hessian[:, -1, -1] += counted * (1.0 / gamma[:, 0] ** 2 + _FLOOR**2)
        hessian += 1e-12 * np.eye(p + 1) * np.einsum("bii->b", hessian)[:, None, None]
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        if (np.einsum("bi,bi->b", step, gradient) < 1e-12 * (1.0 + np.abs(best))).all():
            break
        scale = np.ones(len(w))
        tried = theta + step
        for _ in range(_HALVINGS):
            worse = value(tried) < best - 1e-13 * (1.0 + np.abs(best))
            if not worse.any():
                break
            scale = np.where(worse, scale / 2, scale)
            tried = theta + scale[:, None] * step
        theta = np.where((value(tried) >= best - 1e-13 * (1.0 + np.abs(best)))[:, None], tried, theta)
        best = value(theta)
    return theta, best
