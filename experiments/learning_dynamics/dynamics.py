"""What a network has learned of each principal direction, and when.

With c_i the eigenvectors of the covariance of the training images, x0 = x - mean and x_hat a reconstruction::

    residual_i = sum_n (c_i^T (x_hat_n - x_n))^2 / sum_n (c_i^T x0_n)^2

is 1 where nothing of a direction is reconstructed (the mean image) and 0 where all of it is; it is over 1 where a
network puts noise of its own there. The energy of the reconstruction, which is plotted at times, can be right with the
wrong content. The half-time is the step at which the residual first falls to 1/2, on a logarithmic axis of steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.learning_dynamics.spectrum import Spectrum
from mae_align.runtime.errors import InputError

_HALF = 0.5
# Images whose coordinates are held at a time.
_ROWS = 2048


class HalfTimes(NamedTuple):
    """When each direction was half learned.

    Attributes:
        time: [..., r] in steps; where it is censored, the last step that was looked at. NaN where there is no residual.
        censored: [..., r] bool, True where the residual never fell to the level: the half-time is later than ``time``.
    """

    time: np.ndarray
    censored: np.ndarray


def direction_energy(images: np.ndarray, spectrum: Spectrum) -> np.ndarray:
    """Mean square along each direction, of the images as they are: mean over n of (c_i^T x_n)^2.

    Of centred images it is their variance (held-out ones: about the training mean); of the difference of
    reconstructions and images it is the error.

    Args:
        images: [n, h, w, c].
        spectrum: whose directions.

    Returns:
        [r] float64, squared pixel units. Cost n d r.

    Raises:
        InputError: images of another shape.

    Example:
        >>> from mae_align.moments.moments import Moments
        >>> x = np.random.default_rng(0).normal(size=(20, 2, 2, 1))
        >>> s = Spectrum.of(Moments.from_arrays(x))
        >>> bool(np.allclose(direction_energy(x - s.mean.reshape(2, 2, 1), s), s.values))
        True
    """
    if images.ndim != 4 or images.shape[1:] != spectrum.image_shape:
        raise InputError(f"images have shape {list(images.shape)}: give [n, h, w, c] of {list(spectrum.image_shape)}")
    found = np.zeros(spectrum.rank)
    for start in range(0, len(images), _ROWS):
        rows = images[start : start + _ROWS].reshape(-1, spectrum.num_pixels).astype(np.float64)
        found += ((rows @ spectrum.vectors) ** 2).sum(0)
    return found / len(images)


def shares(error: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Residuals: error over energy, NaN where there is no energy.

    Args:
        error: [r] mean square of x_hat - x along each direction.
        energy: [r] that of x - mean.

    Returns:
        [r] float64.

    Example:
        >>> shares(np.array([1.0, 1.0]), np.array([2.0, 0.0])).tolist()
        [0.5, nan]
    """
    return np.where(energy > 0, error / np.where(energy > 0, energy, 1.0), np.nan)


def variance_groups(values: np.ndarray, count: int = 10) -> np.ndarray:
    """Groups of directions that hold equal shares of the variance (deciles for ten).

    Direction i belongs to the group in which the middle of its own share of the cumulated variance lies. A direction
    with more than a group's share leaves the groups beside it empty.

    Args:
        values: [r] variances, descending.
        count: number of groups.

    Returns:
        [r] int64 in 0..count - 1, ascending.

    Raises:
        InputError: no group.

    Example:
        >>> variance_groups(np.array([5.0, 3.0, 1.0, 1.0]), 2).tolist()
        [0, 1, 1, 1]
    """
    if count < 1:
        raise InputError(f"{count} groups: give at least 1")
    middle = (np.cumsum(values) - np.asarray(values) / 2) / np.sum(values)
    return np.minimum((middle * count).astype(np.int64), count - 1)


def group_shares(error: np.ndarray, energy: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Residual of each group of directions: error over energy, both summed over the group.

    Args:
        error: [r] mean square of x_hat - x along each direction.
        energy: [r] that of x - mean.
        groups: [r] of :func:`variance_groups`.
        count: number of groups.

    Returns:
        [count], NaN for empty groups.

    Example:
        >>> group_shares(np.array([1.0, 1.0]), np.array([3.0, 1.0]), np.array([1, 1]), 2).tolist()
        [nan, 0.5]
    """
    return shares(*(np.bincount(groups, part, minlength=count) for part in (error, energy)))


def half_times(steps: np.ndarray, residuals: np.ndarray) -> HalfTimes:
    """When residuals first fall to 1/2, interpolated in the logarithm of the step.

    Between steps a < b with residuals over and under 1/2: log t = log a + (log b - log a) (r_a - 1/2) / (r_a - r_b);
    from step 0, where there is no logarithm, t itself is interpolated. A residual of 1/2 from the first step on has its
    half-time there.

    Args:
        steps: [T] ascending, from 0 on.
        residuals: [..., T, r].

    Returns:
        Half-times [..., r]; directions that never get there are censored at the last step. A residual that is not a
        number before it gets there makes NaN.

    Raises:
        InputError: steps that do not ascend, or shapes that do not fit.

    Example:
        >>> found = half_times(np.array([0, 1, 100]), np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.9]]))
        >>> found.time.round(6).tolist(), found.censored.tolist()
        ([10.0, 100.0], [False, True])
    """
    t, r = np.asarray(steps, np.float64), np.asarray(residuals, np.float64)
    if t.ndim != 1 or len(t) < 2 or t[0] < 0 or (np.diff(t) <= 0).any() or r.ndim < 2 or r.shape[-2] != len(t):
        raise InputError(f"steps {list(t.shape)} and residuals {list(r.shape)}: give ascending [T] and [..., T, r]")
    below = r <= _HALF
    reached = below.any(-2)
    first = below.argmax(-2)
    before = np.maximum(first - 1, 0)
    upper, lower = (np.take_along_axis(r, i[..., None, :], -2)[..., 0, :] for i in (before, first))
    a, b = t[before], t[first]
    # From 1 at the step before to 0 at the step of the crossing.
    fall = np.where(upper > lower, (upper - _HALF) / np.where(upper > lower, upper - lower, 1.0), 1.0)
    from_zero = a == 0
    logs = [np.log(np.where(from_zero, 1.0, x)) for x in (a, b)]
    between = np.where(from_zero, b * fall, np.exp(logs[0] + (logs[1] - logs[0]) * fall))
    time = np.where(reached, np.where(first == 0, t[0], between), t[-1])
    # Not a number up to where it is reached, or up to the end.
    upto = np.arange(len(t))[:, None] <= np.where(reached, first, len(t) - 1)[..., None, :]
    unknown = (np.isnan(r) & upto).any(-2)
    return HalfTimes(np.where(unknown, np.nan, time), np.asarray(~reached & ~unknown))
