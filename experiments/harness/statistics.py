"""Paired differences of runs, and the permutations, p-values and intervals that experiments share.

Everything is seeded, vectorised over resamples, in float64 NumPy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from mae_align.runtime.errors import InputError

# Numbers held at a time by permutations and resamples.
_NUMBERS = 4_000_000
# Random signs, and their seed, of simultaneous intervals.
_FLIPS, _SEED = 10_000, 0


class PairedDifference(NamedTuple):
    """Mean of n paired differences and its interval.

    Attributes:
        pairs: n.
        mean: of the differences.
        low: lower end of the t interval, NaN for a single pair.
        high: its upper end.
        spread: standard deviation of the differences, n - 1 in the denominator; NaN for a single pair.
    """

    pairs: int
    mean: float
    low: float
    high: float
    spread: float


def paired_difference(a: np.ndarray, b: np.ndarray, *, level: float = 0.95) -> PairedDifference:
    """Mean of a - b with the t interval mean +- t_{n-1} s / sqrt n of paired runs.

    Assumes that the differences are independent and about normal; what the two runs of a pair share (seed, initial
    weights, order of the images) drops out of them.

    Args:
        a: [n] finite numbers, one per seed.
        b: [n] those that they are paired with.
        level: of the interval, inside (0, 1).

    Returns:
        The mean and its interval, float64.

    Raises:
        InputError: no pairs, shapes that differ, NaN or infinite values, a level outside (0, 1).

    Example:
        >>> found = paired_difference(np.array([3.0, 4.0, 5.0]), np.array([1.0, 3.0, 2.0]))
        >>> found.mean, round(found.low, 3), round(found.high, 3)
        (2.0, -0.484, 4.484)
    """
    a, b = (np.asarray(values, np.float64) for values in (a, b))
    if a.ndim != 1 or a.shape != b.shape or not len(a) or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(f"a {list(a.shape)} and b {list(b.shape)}: give finite numbers [n] in pairs, at least one")
    if not 0.0 < level < 1.0:
        raise InputError(f"level={level}: give a number inside (0, 1)")
    difference = a - b
    mean, n = float(difference.mean()), len(difference)
    if n == 1:
        return PairedDifference(1, mean, math.nan, math.nan, math.nan)
    spread = float(difference.std(ddof=1))
    half = float(t.ppf((1 + level) / 2, n - 1)) * spread / math.sqrt(n)
    return PairedDifference(n, mean, mean - half, mean + half, spread)


WORTH = 0.5
"""Gain in percentage points, of accuracy or of r2, below which a sentence says that something is not worth it."""


class AccuracyDifference(NamedTuple):
    """Mean of a - b over seeds and test images.

    Attributes:
        mean: of the differences.
        low: lower end of the t interval over the seeds, NaN with one seed.
        high: its upper end.
        image_se: standard error from the sampling of test images, for these seeds; NaN with one image.
    """

    mean: float
    low: float
    high: float
    image_se: float

    @property
    def detected(self) -> bool:
        """Whether the interval over seeds leaves out 0 and the mean is two standard errors of the images from it."""
        return bool((self.low > 0.0 or self.high < 0.0) and abs(self.mean) >= 2.0 * self.image_se)


def accuracy_difference(a: np.ndarray, b: np.ndarray, *, level: float = 0.95) -> AccuracyDifference:
    """Difference of accuracy of two kinds of networks with the same seeds on the same test images.

    :func:`paired_difference` of the accuracies of each seed, and beside it the standard error over images of the means
    over seeds of each image: a difference is there only if both say so.

    Args:
        a: [E, n] whether the network of seed e is right on image i, truth values or numbers.
        b: [E, n] those of the other kind.
        level: of the interval, inside (0, 1).

    Returns:
        In the units of a and b.

    Raises:
        InputError: shapes that differ or are not [E, n], an empty axis, a level outside (0, 1).

    Example:
        >>> right = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
        >>> found = accuracy_difference(right, np.zeros((2, 4), bool))
        >>> found.mean, round(found.low, 2), round(found.high, 2), found.detected
        (0.625, -0.96, 2.21, False)
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or 0 in a.shape:
        raise InputError(f"results of shape {list(a.shape)} and {list(b.shape)}: give the same [seeds, images]")
    seeds = paired_difference(a.mean(axis=1), b.mean(axis=1), level=level)
    images = (a - b).mean(axis=0)
    image_se = float(images.std(ddof=1)) / math.sqrt(len(images)) if len(images) > 1 else math.nan
    return AccuracyDifference(seeds.mean, seeds.low, seeds.high, image_se)


def simultaneous_limit(influence: np.ndarray) -> float:
    """How many standard errors a difference must have so that all intervals hold together with 95%.

    Under no difference, the influences psi_gc of a group of images on all differences c could as well have the other
    sign. The limit is the 95% quantile, over random signs w_g, of max_c |sum_g w_g psi_gc| / se_c, with the standard
    error of the flipped sample, se_c^2 = G/(G-1) sum_g (w_g psi_gc - mean)^2: for few groups it is as wide as a t
    interval, and correlated differences need less than independent ones (Westfall & Young, 1993).

    Args:
        influence: [g, c] influences of the groups, mean 0 over g; columns of zeros count for nothing.

    Returns:
        The limit; infinity with fewer than two groups.

    Example:
        >>> one = np.random.default_rng(0).normal(size=(20, 1))
        >>> round(simultaneous_limit(one - one.mean()), 1)
        2.1
    """
    influence = influence[:, (influence != 0).any(0)]
    groups = len(influence)
    if groups < 2 or not influence.size:
        return math.inf
    signs = np.random.default_rng(_SEED).choice([-1.0, 1.0], size=(_FLIPS, groups))
    squares = (influence**2).sum(0)
    largest = np.empty(_FLIPS)
    for rows in np.array_split(np.arange(_FLIPS), 20):
        sums = signs[rows] @ influence
        # Signs that make all groups equal have no spread: the largest statistic there is.
        spread = np.maximum(groups / (groups - 1) * (squares - sums**2 / groups), np.finfo(float).tiny)
        largest[rows] = (np.abs(sums) / np.sqrt(spread)).max(1)
    return float(np.quantile(largest, 0.95))


def check_draws(permutations: int, resamples: int, level: float, seed: int) -> None:
    """Refuse settings of tests and intervals that make no sense.

    Raises:
        InputError: fewer than one draw, a level outside (0, 1), a negative seed.

    Example:
        >>> check_draws(10_000, 10_000, 0.95, 0)
    """
    if permutations < 1 or resamples < 1 or seed < 0 or not 0.0 < level < 1.0:
        raise InputError(
            f"permutations={permutations}, resamples={resamples}, level={level}, seed={seed}: give at least one draw "
            "of each, a level inside (0, 1) and a seed from 0"
        )


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the last axis: sum (a - mean a)(b - mean b) over the root of the sums of squares.

    Args:
        a: [..., n].
        b: [..., n], broadcast with it.

    Returns:
        [...], NaN where one of the two is constant up to rounding.

    Example:
        >>> pearson(np.array([1.0, 2.0, 3.0]), np.array([[3.0, 2.0, 1.0], [5.0, 5.0, 5.0]])).tolist()
        [-1.0, nan]
    """
    a0, b0 = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    aa, bb = (a0**2).sum(-1), (b0**2).sum(-1)
    # Rounding of a constant is no variation.
    varies = (aa > 1e-24 * (a**2).sum(-1)) & (bb > 1e-24 * (b**2).sum(-1))
    below = np.where(varies, np.sqrt(aa * bb), 1.0)
    return np.where(varies, np.clip((a0 * b0).sum(-1) / below, -1.0, 1.0), np.nan)


def shuffled_within(
    parts: Sequence[np.ndarray], total: int, most: int, numbers: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Permutations of 0..total - 1 that move positions within each part only, in batches.

    All but the identity where there are at most ``most`` of them, else random.

    Args:
        parts: positions of each part, disjoint; others stay.
        total: how many positions.
        most: number of permutations.
        numbers: that are held for each permutation of a batch.
        rng: of the random ones.

    Yields:
        [b, total] int64.

    Example:
        >>> parts = [np.array([0, 2]), np.array([1])]
        >>> [p.tolist() for p in shuffled_within(parts, 3, 10, 3, np.random.default_rng(0))]
        [[[2, 1, 0]]]
    """
    ways = math.prod(math.factorial(len(part)) for part in parts)
    if ways <= most:
        each = [[part[list(p)] for p in itertools.permutations(range(len(part)))] for part in parts]
        orders = np.tile(np.arange(total), (ways, 1))
        for i, choice in enumerate(itertools.product(*each)):
            for part, moved in zip(parts, choice, strict=True):
                orders[i, part] = moved
        # The first is the identity.
        for start in range(1, ways, max(1, _NUMBERS // numbers)):
            yield orders[start : min(ways, start + max(1, _NUMBERS // numbers))]
        return
    for size in batches(most, numbers):
        orders = np.tile(np.arange(total), (size, 1))
        for part in parts:
            orders[:, part] = part[rng.random((size, len(part))).argsort(1)]
        yield orders


def batches(total: int, numbers: int) -> Iterator[int]:
    """Sizes of batches that add up to a number of draws of so many numbers each.

    Example:
        >>> list(batches(10, 1_000_000))
        [4, 4, 2]
    """
    most = max(1, _NUMBERS // max(numbers, 1))
    for start in range(0, total, most):
        yield min(most, total - start)


def p_value(drawn: np.ndarray, value: float) -> float:
    """(1 + hits) / (1 + tried), a hit being a draw at least as large as the value; draws without a value are no hits.

    Counting the data as one of the draws keeps the test valid for any number of them (Phipson & Smyth, 2010).

    Args:
        drawn: [n] statistic of each permutation.
        value: of the data.

    Returns:
        In (0, 1]; NaN where nothing was drawn or the data have no value.

    Example:
        >>> p_value(np.array([0.1, 0.5, 0.9]), 0.5)
        0.75
    """
    if not len(drawn) or not np.isfinite(value):
        return math.nan
    # The same sum in another order is the same value.
    hits = (drawn >= value - 1e-12 * max(1.0, abs(value))).sum()
    return float((1 + hits) / (1 + len(drawn)))


def interval(drawn: np.ndarray, level: float) -> tuple[float, float]:
    """Percentile interval of bootstrap draws.

    Args:
        drawn: [n] statistic of each resample; NaN ones are left out.
        level: inside (0, 1).

    Returns:
        Lower and upper end; NaN without draws.

    Example:
        >>> low, high = interval(np.linspace(-1.0, 1.0, 1001), 0.9)
        >>> round(low, 3), round(high, 3)
        (-0.9, 0.9)
    """
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
