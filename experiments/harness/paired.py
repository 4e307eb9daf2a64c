"""Differences between runs that share seeds and test images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from mae_align.runtime.errors import InputError


class PairedDifference(NamedTuple):
    """Mean of a - b over seeds.

    Attributes:
        mean: of the differences. low, high: t interval over the seeds, NaN with one seed.
        image_se: standard error from the sampling of test images, for these seeds.
    """

    mean: float
    low: float
    high: float
    image_se: float

    @property
    def detected(self) -> bool:
        """Whether the interval over seeds leaves out 0 and the mean is two standard errors of the images from it."""
        return bool((self.low > 0.0 or self.high < 0.0) and abs(self.mean) >= 2.0 * self.image_se)


def paired_difference(a: np.ndarray, b: np.ndarray, level: float = 0.95) -> PairedDifference:
    """Difference of accuracy of two kinds of networks with the same seeds on the same test images.

    With d = a - b: mean over all, a t interval of n_seeds - 1 degrees of freedom from the means of each seed, and the
    standard error over images of the means of each image.

    Args:
        a, b: [E, n] whether the network of seed e is right on image i, truth values or numbers.
        level: of the interval, inside (0, 1).

    Returns:
        In the units of a and b.

    Raises:
        InputError: shapes that differ or are not [E, n], an empty axis, a level outside (0, 1).

    Example:
        >>> right = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
        >>> found = paired_difference(right, np.zeros((2, 4), bool))
        >>> found.mean, round(found.low, 2), round(found.high, 2), found.detected
        (0.625, -0.96, 2.21, False)
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or 0 in a.shape:
        raise InputError(f"results of shape {list(a.shape)} and {list(b.shape)}: give the same [seeds, images]")
    if not 0.0 < level < 1.0:
        raise InputError(f"level={level}: give a number inside (0, 1)")
    difference = a - b
    mean = float(difference.mean())
    image_se = _standard_error(difference.mean(axis=0))
    half = float(_standard_error(difference.mean(axis=1)) * student.ppf((1.0 + level) / 2.0, max(len(a) - 1, 1)))
    return PairedDifference(mean, mean - half, mean + half, image_se)


def _standard_error(values: np.ndarray) -> float:
    """Of the mean; NaN for one value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
