"""Does the closed form say which mask helps which task? The statistic of ``alignment_vs_probe``.

The data are scores of tasks a probed on networks of patch size s, mask ratio r and seed e, and predictions of them,
p[a, s, r]. All tasks are probed on the *same* networks. The unit is (task, patch size); within it the observed gain
over the lowest ratio, g[a, s, r] = mean_e y[a, s, r, e] - mean_e y[a, s, r0, e], is held against the predicted one.
Three statistics, each a function of scores (they take the gains themselves):

- :func:`mean_unit_correlation` (**the primary one**): the mean over units of Pearson's correlation over the ratios. The
  lowest ratio takes part with its gain of 0. Leaving it out would drop one of few points and make all the others carry
  its noise; with it, the correlation of gains is that of scores, and no ratio is special. Every unit counts the same.
- :func:`pooled_correlation`: deviations from unit means, all units in one correlation. Units that move more count
  more, so it is steadier where ratios are few and tasks are inert; large tasks can decide it.
- :func:`patch_correlation`: within a patch size, over tasks and ratios together: also whether the tasks that were
  predicted to gain most do.

The tests and the interval (:func:`experiments.alignment_vs_probe.predictors.compare_predictors`):

**Null of tasks permuted.** The predictions of task a meet the observations of task b, one permutation for all patch
sizes and ratios: a trend that all tasks share (all fall with the ratio) is in the null, so that a small p says that the
predictions know *which task*. It takes tasks for exchangeable; tasks of a kind are alike, so there is a second test
that permutes within kinds only. A predictor that does not know the task (mask ratio, loss, RankMe) is the same under
every permutation: no test, p = NaN; what it explains is in the difference to ours, which has an interval. That
difference has the p-value of ours, since the rival's part of it never moves. :func:`task_average` makes such a rival of
our own predictions.

**Null of ratios permuted.** The predictor's ratios are permuted, within each patch size, alike for all tasks: networks
are the exchangeable things. It applies to every predictor and says whether it follows the ratios at all. Few ratios
have few permutations: with R ratios and S patch sizes no p is below 1 / (R!)^S.

**Interval.** Tasks are resampled with replacement, whole; within, the seeds of every (patch size, ratio), alike for all
tasks since they share the networks. Deviations of seeds are stretched by sqrt(E / (E - 1)), without which the variance
of a mean of E resampled seeds is (E - 1) / E of what it should be: half for two (Rao & Wu, 1988). Redrawn
scores carry the noise of seeds twice, which lowers their correlations: plain percentiles err on the low side and cover
the statistic's mean a little more often than they say (97% for 95%, simulated with 17 tasks and two seeds; the
bias-corrected ones covered 91%). With one seed the interval does not know how networks differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from mae_align.runtime.errors import InputError

# Predicted and observed scores [..., A, S, R] to [...]; NaN where not defined.
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Below this share of the largest score a difference is rounding: the prediction of an inert task.
_CONSTANT = 1e-9
# Ratios without which a correlation says nothing: two points always lie on a line.
_LEAST_RATIOS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """Scores and predictions of A tasks on networks of S patch sizes, R mask ratios and E seeds.

    Attributes:
        tasks: [A] names.
        kinds: [A] kind of each.
        patch_sizes: [S].
        mask_ratios: [R], ascending.
        observed: [A, S, R, E] scores, NaN where there is no such network (for all tasks alike).
        predicted: [A, S, R], finite where there are networks.
        rivals: by name, [S, R, E] of networks or [S, R], larger for better; NaN where there is no network.

    Raises:
        InputError: shapes that do not fit, fewer than two tasks or three ratios, predictions or scores that are missing
            for some tasks only.

    Example:
        >>> y = np.random.default_rng(0).normal(size=(5, 2, 4, 3))
        >>> panel = Panel(tuple("abcde"), ("x",) * 5, (2, 4), (0.2, 0.4, 0.6, 0.8), y, y.mean(3), {})
        >>> panel.scores.shape
        (5, 2, 4)
    """

    tasks: tuple[str, ...]
    kinds: tuple[str, ...]
    patch_sizes: tuple[int, ...]
    mask_ratios: tuple[float, ...]
    observed: np.ndarray
    predicted: np.ndarray
    rivals: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        a, s, r = len(self.tasks), len(self.patch_sizes), len(self.mask_ratios)
        shape = self.observed.shape
        if len(shape) != 4 or shape[:3] != (a, s, r) or self.predicted.shape != (a, s, r) or len(self.kinds) != a:
            raise InputError(
                f"observed {list(shape)}, predicted {list(self.predicted.shape)}: give [{a}, {s}, {r}, seeds] and "
                f"[{a}, {s}, {r}], and a kind per task"
            )
        if a < 2 or r < _LEAST_RATIOS or list(self.mask_ratios) != sorted(set(self.mask_ratios)):
            raise InputError(f"{a} task(s) and mask ratios {list(self.mask_ratios)}: give two and three, ascending")
        there = np.isfinite(self.observed)
        if (there != there[:1]).any():
            lost = self.tasks[int(np.argmax((there != there.any(0)).any((1, 2, 3))))]
            raise InputError(f"task {lost!r} lacks scores that others have: leave it out or complete it")
        cells = there[0].any(-1)
        if not np.isfinite(self.predicted[:, cells]).all():
            raise InputError("there are networks without a prediction: complete or drop those rows")
        for name, values in self.rivals.items():
            if values.shape not in ((s, r), shape[1:]) or not np.isfinite(seed_mean(values, there[0]))[cells].all():
                raise InputError(f"rival {name!r} {list(values.shape)}: give finite numbers {list(shape[1:])}")

    @property
    def networks(self) -> np.ndarray:
        """[S, R, E] bool: which networks there are."""
        return np.isfinite(self.observed[0])

    @property
    def scores(self) -> np.ndarray:
        """[A, S, R] mean over seeds; NaN where there is no network."""
        return seed_mean(self.observed, self.networks)


def seed_mean(values: np.ndarray, networks: np.ndarray) -> np.ndarray:
    """Mean over the seeds that there are.

    Args:
        values: [..., S, R, E], or [S, R] which stays what it is.
        networks: [S, R, E] bool.

    Returns:
        [..., S, R], NaN where there is no network.

    Example:
        >>> seed_mean(np.array([[[1.0, 3.0], [5.0, np.nan]]]), np.array([[[True, True], [True, False]]])).tolist()
        [[2.0, 5.0]]
    """
    count = networks.sum(-1)
    if values.ndim == 2:
        return np.where(count > 0, values, np.nan)
    return np.where(count > 0, np.where(networks, values, 0.0).sum(-1) / np.maximum(count, 1), np.nan)


def _centred(p: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Deviations from unit means, 0 at ratios without a network; and which units vary, [..., A, S] each."""
    there = np.isfinite(p) & np.isfinite(g)
    count = there.sum(-1)
    varies, deviations = [], []
    for x in (p, g):
        x = np.where(there, x, 0.0)
        d = np.where(there, x - (x.sum(-1) / np.maximum(count, 1))[..., None], 0.0)
        scale = np.abs(x).max((-3, -2, -1), keepdims=True)
        varies.append((np.abs(d) > _CONSTANT * scale).any(-1) & (count >= _LEAST_RATIOS))
        deviations.append(d)
    return *deviations, *varies  # pyright: ignore[reportReturnType]


def unit_correlations(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Pearson's correlation over the mask ratios within every unit (task, patch size).

    Args:
        predicted: [..., A, S, R] scores; NaN where there is no network.
        observed: likewise.

    Returns:
        [..., A, S]; NaN where one of the two is constant (an inert task) or there are fewer than three ratios.

    Example:
        >>> p = np.array([[[0.0, 1.0, 2.0]], [[1.0, 1.0, 1.0]]])
        >>> unit_correlations(p, np.array([[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]])).ravel().tolist()
        [1.0, nan]
    """
    p, g, p_varies, g_varies = _centred(predicted, observed)
    defined = p_varies & g_varies
    below = np.sqrt((p**2).sum(-1) * (g**2).sum(-1))
    return np.where(defined, (p * g).sum(-1) / np.where(defined, below, 1.0), np.nan)


def mean_unit_correlation(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Mean of :func:`unit_correlations` over the units that have one: the primary statistic.

    Args:
        predicted: [..., A, S, R] scores.
        observed: likewise.

    Returns:
        [...]; NaN where no unit has a correlation.

    Example:
        >>> x = np.arange(6.0).reshape(2, 1, 3)
        >>> float(mean_unit_correlation(x, -x))
        -1.0
    """
    each = unit_correlations(predicted, observed)
    count = np.isfinite(each).sum((-2, -1))
    return np.where(count > 0, np.nansum(each, (-2, -1)) / np.maximum(count, 1), np.nan)


def pooled_correlation(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """One correlation of all deviations from unit means: sum p g / sqrt(sum p^2 sum g^2).

    Args:
        predicted: [..., A, S, R] scores. An inert task adds nothing above and its noise below.
        observed: likewise.

    Returns:
        [...]; NaN where one of the two is constant in all units.

    Example:
        >>> x = np.arange(6.0).reshape(2, 1, 3)
        >>> float(pooled_correlation(x, x))
        1.0
    """
    p, g, p_varies, g_varies = _centred(predicted, observed)
    defined = p_varies.any((-2, -1)) & g_varies.any((-2, -1))
    below = np.sqrt((p**2).sum((-3, -2, -1)) * (g**2).sum((-3, -2, -1)))
    return np.where(defined, (p * g).sum((-3, -2, -1)) / np.where(defined, below, 1.0), np.nan)


def pooled_slope(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Observed change per predicted change, least squares within units: sum p g / sum p^2; 1 where they are equal.

    Args:
        predicted: [..., A, S, R] scores.
        observed: likewise.

    Returns:
        [...], units of the observed score per unit of the predictor; NaN where predictions are constant.

    Example:
        >>> x = np.arange(6.0).reshape(2, 1, 3)
        >>> float(pooled_slope(x, 0.5 * x))
        0.5
    """
    p, g, p_varies, _ = _centred(predicted, observed)
    defined = p_varies.any((-2, -1))
    below = np.where(defined, (p**2).sum((-3, -2, -1)), 1.0)
    return np.where(defined, (p * g).sum((-3, -2, -1)) / below, np.nan)


def gains(scores: np.ndarray) -> np.ndarray:
    """Scores minus the score of the same unit at the lowest mask ratio that has a network.

    Args:
        scores: [..., A, S, R], ratios ascending; NaN where there is no network.

    Returns:
        [..., A, S, R], NaN at that ratio itself and where there is no network.

    Example:
        >>> gains(np.array([[[1.0, 3.0, 2.0]]])).ravel().tolist()
        [nan, 2.0, 1.0]
    """
    there = np.isfinite(scores)
    lowest = there.argmax(-1)[..., None]
    at = np.arange(scores.shape[-1]) == lowest
    return np.where(at, np.nan, scores - np.take_along_axis(scores, lowest, -1))


def patch_correlation(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Correlation of predicted and observed gains over tasks and ratios within a patch size, mean over patch sizes.

    Args:
        predicted: [..., A, S, R] scores; the lowest ratio has no gain of its own here.
        observed: likewise.

    Returns:
        [...]; NaN where no patch size has a correlation.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(3, 2, 4))
        >>> round(float(patch_correlation(x, 2 * x + 1)), 6)
        1.0
    """
    # One unit per patch size: [..., 1, S, A R].
    flat = []
    for scores in (predicted, observed):
        moved = np.moveaxis(gains(scores), -3, -2)
        flat.append(moved.reshape(*moved.shape[:-2], -1)[..., None, :, :])
    return mean_unit_correlation(*flat)


def task_average(predicted: np.ndarray) -> np.ndarray:
    """The predictor without the task: predictions averaged over tasks, a rival that sees only the networks.

    Args:
        predicted: [A, S, R].

    Returns:
        [S, R].

    Example:
        >>> task_average(np.arange(4.0).reshape(2, 1, 2)).tolist()
        [[1.0, 2.0]]
    """
    return predicted.mean(0)
