"""How fast a map turns with its input: low and high *response* frequencies by the filtering method of Xu et al.

Not spatial frequency. A network is a map of points x_i (whole images) to outputs h_i; its low response frequencies are
what is left when outputs are averaged over neighbouring *inputs*::

    h_i^low = sum_j G(x_i - x_j) h_j / sum_j G(x_i - x_j),   G(u) = exp(-|u|^2 / (2 width^2)),   h^high = h - h^low

and with the target map y: e_low = |y^low - h^low| / |y^low|, e_high likewise. The frequency principle (Xu et al. 2019,
arXiv 1901.06523) says that e_low falls first. For an autoencoder y_i = x_i: the target is the identity. The frequency
of image *content* is :mod:`mae_align.data.frequency`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mae_align.runtime.errors import InputError


class ResponseErrors(NamedTuple):
    """Errors by response frequency.

    Attributes:
        low: [w] squared relative errors e_low^2, one per width of the filter; NaN where the target has nothing there.
        high: [w] e_high^2.
    """

    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ResponseFilter:
    """The averaging over neighbouring inputs, for several widths.

    Attributes:
        widths: [w] standard deviations of the weights, in units of inputs.
        weights: [w, n, n], rows add up to 1.
    """

    widths: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, inputs: np.ndarray, relative_widths: Sequence[float]) -> ResponseFilter:
        """Weights between points.

        Args:
            inputs: [n, ...] points, n >= 2: a sub-sample, since the cost is n^2 d and the memory w n^2.
            relative_widths: [w] > 0, in units of the root of the median squared distance of two points. In many
                dimensions distances hardly differ: well below 1 the weights fall on the point itself, and all is low.

        Returns:
            float64 weights.

        Raises:
            InputError: fewer than two points, points that are all the same, or widths that are not positive.

        Example:
            >>> f = ResponseFilter.of(np.array([[0.0], [1.0]]), [1.0])
            >>> f.weights[0].round(3).tolist()
            [[0.622, 0.378], [0.378, 0.622]]
        """
        x = np.asarray(inputs, np.float64).reshape(len(inputs), -1)
        scales = np.asarray(relative_widths, np.float64)
        if len(x) < 2 or scales.ndim != 1 or not len(scales) or not (np.isfinite(scales) & (scales > 0)).all():
            raise InputError(f"{len(x)} points, widths {scales.tolist()}: give two points and widths over 0")
        x = x - x.mean(0)
        norms = (x**2).sum(1)
        squared = np.maximum(norms[:, None] + norms - 2.0 * x @ x.T, 0.0)
        np.fill_diagonal(squared, 0.0)
        median = float(np.median(squared[~np.eye(len(x), dtype=bool)]))
        if not median > 0:
            raise InputError("most of these points are the same: give points that differ")
        widths = scales * np.sqrt(median)
        weights = np.exp(-squared / (2.0 * widths[:, None, None] ** 2))
        return cls(widths, weights / weights.sum(2, keepdims=True))

    def split(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Low and high part of a map.

        Args:
            outputs: [n, ...] at the points.

        Returns:
            [w, n, p] each; they add up to the outputs.
        """
        h = np.asarray(outputs, np.float64).reshape(len(outputs), -1)
        low = self.weights @ h
        return low, h - low

    def low_share(self, targets: np.ndarray) -> np.ndarray:
        """Share of the target's energy in its low part, |y^low|^2 / (|y^low|^2 + |y^high|^2), [w].

        Args:
            targets: [n, ...] at the points.
        """
        low, high = ((part**2).sum((1, 2)) for part in self.split(targets))
        return low / (low + high)

    def errors(self, targets: np.ndarray, outputs: np.ndarray) -> ResponseErrors:
        """Relative errors of a map at low and at high response frequencies.

        Args:
            targets: [n, ...] y_i at the points.
            outputs: [n, ...] h_i.

        Returns:
            Squared errors: 1 where the outputs are 0, 0 where they are the targets. Cost 2 w n^2 p.

        Raises:
            InputError: shapes that do not fit.

        Example:
            >>> x = np.random.default_rng(0).normal(size=(20, 3))
            >>> f = ResponseFilter.of(x, [0.5])
            >>> f.errors(x, 0 * x).low.tolist(), f.errors(x, x).high.tolist()
            ([1.0], [0.0])
        """
        if np.shape(targets) != np.shape(outputs) or len(targets) != self.weights.shape[1]:
            raise InputError(
                f"targets {list(np.shape(targets))} and outputs {list(np.shape(outputs))}: give one of each "
                f"for each of the {self.weights.shape[1]} points"
            )
        wanted = [(part**2).sum((1, 2)) for part in self.split(targets)]
        missed = [(part**2).sum((1, 2)) for part in self.split(np.asarray(outputs, np.float64) - targets)]
        shares = [np.where(w > 0, m / np.where(w > 0, w, 1.0), np.nan) for w, m in zip(wanted, missed, strict=True)]
        return ResponseErrors(*shares)
