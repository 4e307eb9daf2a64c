"""Our predictions beside rival ones, by one function: statistic, interval, tests, and the difference to ours."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np

from experiments.alignment_vs_probe.agreement import (
    Panel,
    Statistic,
    mean_unit_correlation,
    pooled_slope,
    seed_mean,
    task_average,
    unit_correlations,
)
from experiments.harness.statistics import batches, check_draws, interval, p_value, shuffled_within
from mae_align.runtime.errors import InputError

OURS = "closed form"
"""Name of our predictions."""
OURS_WITHOUT_TASK = "closed form, mean over tasks"
"""Name of the rival that our own predictions make when they do not know the task."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How one predictor agrees with what was observed.

    Attributes:
        predictor: name.
        value: of the statistic; NaN where no unit has one.
        low: lower end of the interval.
        high: its upper end.
        p_tasks: one-sided, tasks permuted; NaN for predictors that do not know the task, and where there is nothing to
            permute.
        p_within_kinds: likewise, within kinds of tasks only.
        p_ratios: one-sided, ratios permuted.
        difference: value of ours minus this one.
        difference_low: lower end of its interval on the same resamples.
        difference_high: its upper end.
        slope: observed change per predicted change within units (:func:`pooled_slope`).
        num_tasks: tasks.
        num_units: units that have a correlation.
        constant_predicted: units without one, since the prediction does not move (an inert task).
        constant_observed: units without one, since the observation does not move.
        too_few_ratios: units with fewer than three ratios.
        permutations: draws of the test of tasks.
        resamples: those in which the statistic is defined.
    """

    predictor: str
    value: float
    low: float
    high: float
    p_tasks: float
    p_within_kinds: float
    p_ratios: float
    difference: float
    difference_low: float
    difference_high: float
    slope: float
    num_tasks: int
    num_units: int
    constant_predicted: int
    constant_observed: int
    too_few_ratios: int
    permutations: int
    resamples: int


def compare_predictors(
    panel: Panel,
    *,
    statistic: Statistic = mean_unit_correlation,
    permutations: int = 10_000,
    resamples: int = 4_000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Agreement, ...]:
    """The statistic of our predictions, of their average over tasks, and of every rival.

    What the tests and the interval assume is said in :mod:`experiments.alignment_vs_probe.agreement`.

    Args:
        panel: scores and predictions.
        statistic: which; declare one before looking.
        permutations: of tasks and of ratios; all of them where there are no more.
        resamples: of the interval.
        level: of the interval.
        seed: of everything random.

    Returns:
        Ours first, then the average over tasks, then the panel's rivals in their order. Cost: (permutations +
        resamples) A S R per predictor.

    Raises:
        InputError: bad settings, or a rival of a name that is taken.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> p = rng.normal(size=(6, 2, 4))
        >>> y = p[..., None] + 0.1 * rng.normal(size=(6, 2, 4, 2))
        >>> panel = Panel(tuple("abcdef"), ("x",) * 6, (2, 4), (0.2, 0.4, 0.6, 0.8), y, p, {"ratio": p[0]})
        >>> ours, average, ratio = compare_predictors(panel, resamples=200)
        >>> ours.value > 0.9, ours.p_tasks < 0.01, ratio.p_tasks, ratio.difference_low > 0
        (True, True, nan, True)
    """
    check_draws(permutations, resamples, level, seed)
    taken = {OURS, OURS_WITHOUT_TASK} & set(panel.rivals)
    if taken:
        raise InputError(f"a rival is called {taken.pop()!r}, which is ours: give it another name")
    rivals: dict[str, np.ndarray] = {OURS_WITHOUT_TASK: task_average(panel.predicted), **panel.rivals}
    drawn, values = _resampled(panel, rivals, statistic, resamples, seed), {}
    found = []
    for name, predictor in {OURS: panel.predicted, **rivals}.items():
        flat = predictor if name == OURS else _for_tasks(seed_mean(predictor, panel.networks), len(panel.tasks))
        values[name] = float(statistic(flat, panel.scores))
        low, high = interval(drawn[name], level)
        difference = values[OURS] - values[name]
        ends = interval(drawn[OURS] - drawn[name], level)
        by_task, tried, by_kind = math.nan, 0, math.nan
        if name == OURS:
            by_task, tried = _permute_tasks(panel, statistic, ("",) * len(panel.tasks), permutations, seed)
            by_kind, _ = _permute_tasks(panel, statistic, panel.kinds, permutations, seed)
        found.append(
            Agreement(
                name,
                values[name],
                low,
                high,
                by_task,
                by_kind,
                _permute_ratios(panel, flat, statistic, permutations, seed),
                difference,
                *(ends if name != OURS else (0.0, 0.0)),
                float(pooled_slope(flat, panel.scores)),
                len(panel.tasks),
                *_count_units(flat, panel.scores),
                tried,
                int(np.isfinite(drawn[name]).sum()),
            )
        )
    return tuple(found)


def reliability(panel: Panel, statistic: Statistic = mean_unit_correlation) -> float:
    """How well one seed's scores predict another's: what any predictor could reach of single networks.

    The mean of the statistic over pairs of seeds, each of which has a network at every patch size and ratio that
    either has. Scores averaged over E seeds are steadier than single ones, by the Spearman-Brown formula E c / (1 +
    (E - 1) c) for a correlation c.

    Args:
        panel: scores.
        statistic: which.

    Returns:
        The mean; NaN with one seed.

    Example:
        >>> y = np.random.default_rng(0).normal(size=(5, 2, 4, 1)) * np.ones(2)
        >>> round(reliability(Panel(tuple("abcde"), ("x",) * 5, (2, 4), (0.2, 0.4, 0.6, 0.8), y, y[..., 0], {})), 6)
        1.0
    """
    seeds = range(panel.observed.shape[-1])
    pairs = [(panel.observed[..., a], panel.observed[..., b]) for a, b in itertools.combinations(seeds, 2)]
    values = [float(statistic(a, b)) for a, b in pairs if np.array_equal(np.isnan(a), np.isnan(b))]
    values = [value for value in values if np.isfinite(value)]
    return float(np.mean(values)) if values else math.nan


def _for_tasks(predictor: np.ndarray, count: int) -> np.ndarray:
    """[..., S, R] of networks as [..., A, S, R], a view."""
    expanded = predictor[..., None, :, :]
    return np.broadcast_to(expanded, (*expanded.shape[:-3], count, *expanded.shape[-2:]))


def _count_units(predicted: np.ndarray, observed: np.ndarray) -> tuple[int, int, int, int]:
    """Units with a correlation; without: prediction constant, observation constant, too few ratios."""
    there = np.isfinite(observed).sum(-1) >= 3
    defined = np.isfinite(unit_correlations(predicted, observed))
    # A predictor against itself has a correlation wherever it varies.
    moves = np.isfinite(unit_correlations(predicted, np.where(np.isfinite(observed), predicted, np.nan)))
    return int(defined.sum()), int((there & ~moves).sum()), int((there & moves & ~defined).sum()), int((~there).sum())


def _permute_tasks(
    panel: Panel, statistic: Statistic, strata: tuple[str, ...], permutations: int, seed: int
) -> tuple[float, int]:
    """p-value and number of permutations of whole tasks within strata."""
    value, scores = float(statistic(panel.predicted, panel.scores)), panel.scores
    parts = [np.flatnonzero(np.array(strata) == name) for name in dict.fromkeys(strata)]
    rng = np.random.default_rng([seed, 0])
    drawn = [
        statistic(panel.predicted[order], scores)
        for order in shuffled_within(parts, len(strata), permutations, scores.size, rng)
    ]
    every = np.concatenate(drawn) if drawn else np.empty(0)
    return p_value(every, value), len(every)


def _permute_ratios(panel: Panel, predictor: np.ndarray, statistic: Statistic, permutations: int, seed: int) -> float:
    """p-value of ratios of the predictor permuted within patch sizes, alike for all tasks."""
    cells = np.asarray(panel.networks.any(-1))
    s, r = len(panel.patch_sizes), len(panel.mask_ratios)
    # Cells (patch size, ratio) are numbered through; each patch size is a stratum of those that have networks.
    parts = [np.flatnonzero(row) + i * r for i, row in enumerate(cells) if row.any()]
    rng = np.random.default_rng([seed, 1])
    flat = predictor.reshape(len(predictor), s * r)
    scores = panel.scores
    drawn = []
    for order in shuffled_within(parts, s * r, permutations, scores.size, rng):
        moved = flat[:, order].swapaxes(0, 1).reshape(len(order), *scores.shape)
        drawn.append(statistic(moved, scores))
    every = np.concatenate(drawn) if drawn else np.empty(0)
    return p_value(every, float(statistic(predictor, scores)))


def _resampled(
    panel: Panel, rivals: Mapping[str, np.ndarray], statistic: Statistic, resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """[resamples] statistic of every predictor, on the same resamples of tasks and, within, of seeds."""
    a, s, r, e = panel.observed.shape
    rng = np.random.default_rng([seed, 2])
    networks = panel.networks
    count = networks.sum(-1)
    # Seeds that are there come first, so that a number below their count picks one.
    first = np.argsort(~networks, axis=-1, kind="stable")
    stretch = np.where(count > 1, np.sqrt(count / np.maximum(count - 1, 1)), 0.0)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in (OURS, *rivals)}
    for size in batches(resamples, panel.observed.size):
        tasks = rng.integers(0, a, (size, a))
        picked = np.floor(rng.random((size, s, r, e)) * np.maximum(count, 1)[..., None]).astype(np.int64)
        # How often each seed of a cell is drawn, of as many draws as the cell has seeds.
        used = np.arange(e) < count[..., None]
        seeds = np.take_along_axis(np.broadcast_to(first, picked.shape), picked, -1)
        weight = ((seeds[..., None] == np.arange(e)) & used[..., None]).sum(-2) / np.maximum(count, 1)[..., None]

        def redrawn(values: np.ndarray, weight: np.ndarray = weight) -> np.ndarray:
            """Means over redrawn seeds of [..., S, R, E], as [size, ..., S, R]."""
            mean = seed_mean(values, networks)
            if values.ndim == 2:
                return np.broadcast_to(mean, (len(weight), *mean.shape))
            deviation = np.where(networks, values - mean[..., None], 0.0)
            return mean + stretch * np.einsum("...sre,bsre->b...sr", deviation, weight)

        scores = np.take_along_axis(redrawn(panel.observed), tasks[..., None, None], 1)
        drawn[OURS].append(statistic(panel.predicted[tasks], scores))
        for name, values in rivals.items():
            if name == OURS_WITHOUT_TASK:
                # The average is over the tasks of the resample.
                predictor = panel.predicted[tasks].mean(1)
            else:
                predictor = redrawn(values)
            drawn[name].append(statistic(_for_tasks(predictor, a), scores))
    return {name: np.concatenate(parts) for name, parts in drawn.items()}
