"""What follows from trained cells: half-times, laws, correlations, and their tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr

from experiments.learning_dynamics.dynamics import HalfTimes, half_times
from experiments.learning_dynamics.half_time_laws import LawComparison, PartialRanks, compare_laws, partial_ranks
from experiments.learning_dynamics.learners import Learner
from experiments.learning_dynamics.scene import GROUPS, Arrays
from experiments.learning_dynamics.spectrum import Images

Row = dict[str, Any]
# Curves over members and records, and what their last axis is.
_CURVES = {
    "train_loss": (),
    "test_loss": (),
    "test_accuracy": (),
    "residual": ("direction",),
    "test_residual": ("direction",),
    "group_residual": ("group",),
    "band_error": ("band",),
    "response_low_error": ("width",),
    "response_high_error": ("width",),
}
# Fewer half-times than these say nothing about a law.
_FEWEST = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One cell and what follows from it.

    Attributes:
        images: what was made of the images.
        learner: network and rule.
        arrays: of ``follow`` in :mod:`experiments.learning_dynamics.__main__`.
        seen: half-times [E, m] by the residuals on training images.
        test: likewise on test images.
        laws: None where half-times are too few or all eigenvalues are equal.
        ranks: None where half-times are too few.
    """

    images: Images
    learner: Learner
    arrays: Arrays
    seen: HalfTimes
    test: HalfTimes
    laws: LawComparison | None
    ranks: PartialRanks | None

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.images.value}, {self.learner.value}"


def analyse(images: Images, learner: Learner, arrays: Arrays, *, resamples: int, seed: int) -> Cell:
    """Half-times, laws and correlations of a cell.

    Args:
        images: what was made of the images.
        learner: network and rule.
        arrays: of the cell.
        resamples: of the bootstrap.
        seed: of its draws.
    """
    seen, test = (half_times(arrays["steps"], arrays[name]) for name in ("residual", "test_residual"))
    enough = (~seen.censored).all(0).sum() >= _FEWEST
    values = arrays["eigenvalue"]
    varies = float(np.ptp(values)) > 1e-6 * float(values.max())
    laws = compare_laws(values, seen, resamples=resamples, seed=seed) if enough and varies else None
    ranks = partial_ranks(values, arrays["frequency"], seen, resamples=resamples, seed=seed) if enough else None
    return Cell(images, learner, arrays, seen, test, laws, ranks)


def as_dataset(cells: Sequence[Cell], seeds: Sequence[int], response_widths: Sequence[float]) -> xr.Dataset:
    """Curves of all cells over records; ``step`` says which step a record is of, NaN where a cell has fewer records."""

    def padded(name: str, axis: int) -> np.ndarray:
        parts, most = [], max(cell.arrays[name].shape[axis] for cell in cells)
        for cell in cells:
            part = cell.arrays[name].astype(np.float64)
            pad = [(0, 0)] * part.ndim
            pad[axis] = (0, most - part.shape[axis])
            parts.append(np.pad(part, pad, constant_values=np.nan))
        return np.stack(parts)

    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {"step": (("cell", "record"), padded("steps", 0))}
    for name, last in _CURVES.items():
        variables[name] = (("cell", "seed", "record", *last), padded(name, 1))
    for name in ("eigenvalue", "frequency"):
        variables[name] = (("cell", "direction"), padded(name, 0))
    coords = {"cell": [cell.name for cell in cells], "seed": list(seeds), "width": list(response_widths)}
    coords |= {"direction": np.arange(1, variables["residual"][1].shape[-1] + 1)}
    return xr.Dataset(variables, coords)


def half_time_rows(cell: Cell, seeds: Sequence[int]) -> Iterator[Row]:
    """One row per seed and direction."""
    flow = cell.arrays.get("flow_half_time")
    for e, seed in enumerate(seeds):
        for i, value in enumerate(cell.arrays["eigenvalue"]):
            row: Row = {"images": cell.images.value, "learner": cell.learner.value, "seed": seed}
            row |= {"direction": i + 1, "eigenvalue": value, "frequency": cell.arrays["frequency"][i]}
            row |= {"half_time": cell.seen.time[e, i], "censored": bool(cell.seen.censored[e, i])}
            row |= {"test_half_time": cell.test.time[e, i], "test_censored": bool(cell.test.censored[e, i])}
            yield row | {"flow_half_time": None if flow is None else flow[e, i]}


def cell_row(cell: Cell) -> Row:
    """Everything about a cell: laws, correlations, the flow, what lies beyond the code, and the probe."""
    row: Row = {"images": cell.images.value, "learner": cell.learner.value}
    if (laws := cell.laws) is not None:
        row |= {"exponent": laws.exponent, "exponent_low": laws.low, "exponent_high": laws.high}
        for law, fits in laws.fits.items():
            row |= {f"{name}_{law.name}": float(getattr(fits, name)[0]) for name in ("r2", "aic", "sigma", "slope")}
        row |= {"aic_gain": laws.aic_gain, "aic_gain_low": laws.gain_low, "aic_gain_high": laws.gain_high}
        row |= {"resamples": laws.resamples}
    row |= against_flow(cell)
    if (ranks := cell.ranks) is not None:
        row["rho_between"] = ranks.between
        for name in ("eigenvalue", "frequency", "eigenvalue_given", "frequency_given"):
            value, low, high = getattr(ranks, name)
            row |= {f"rho_{name}": value, f"rho_{name}_low": low, f"rho_{name}_high": high}
    followed, accuracy = len(cell.arrays["eigenvalue"]), cell.arrays["test_accuracy"]
    row |= {"directions": followed, "num_censored": float(cell.seen.censored.sum(1).mean())}
    row["latest_over_earliest"] = spread(cell)
    beyond = cell.arrays["all_residual"][:, -1, followed:]
    if beyond.size:
        row |= {"beyond_residual": float(np.nanmean(beyond)), "beyond_half_learned": float((beyond < 0.5).mean())}
    return row | {"accuracy_before": accuracy[:, 0].mean(), "accuracy_after": accuracy[:, -1].mean()}


def against_flow(cell: Cell) -> Row:
    """How the half-times of descent compare with those of the flow from the same start; {} for other cells."""
    flow = cell.arrays.get("flow_half_time")
    if flow is None:
        return {}
    both = ~cell.seen.censored & np.isfinite(flow)
    ratio = np.log(cell.seen.time[both] / flow[both])
    if not len(ratio):
        return {}
    known = HalfTimes(np.where(np.isfinite(flow), flow, cell.arrays["steps"][-1]), ~np.isfinite(flow))
    return {
        "flow_exponent": compare_laws(cell.arrays["eigenvalue"], known, resamples=1).exponent,
        "flow_ratio_median": float(np.exp(np.median(ratio))),
        "flow_ratio_spread": float(np.exp(np.abs(ratio - np.median(ratio)).max())),
    }


def spread(cell: Cell) -> float:
    """Latest over earliest half-time, geometric means over seeds (censored ones as if they came at the last step)."""
    mean = np.exp(np.log(cell.seen.time).mean(0))
    return float(mean.max() / mean.min())


def order_rows(cell: Cell, response_widths: Sequence[float]) -> Iterator[Row]:
    """When each group of directions, spatial band and response frequency is half learned: geometric mean over seeds."""
    groups, bands = cell.arrays["group_residual"], cell.arrays["band_error"]
    count = bands.shape[-1]
    series = {f"variance group {g + 1} of {GROUPS}": groups[..., g] for g in range(GROUPS)}
    series |= {f"spatial frequency band {b + 1} of {count}": bands[..., b] for b in range(count)}
    low_share = {}
    for w, width in enumerate(response_widths):
        low_share[f"response frequency low, width {width:g}"] = cell.arrays["low_share"][w]
        for part in ("low", "high"):
            errors = cell.arrays[f"response_{part}_error"]
            series[f"response frequency {part}, width {width:g}"] = errors[..., w]
    for what, residuals in series.items():
        found = half_times(cell.arrays["steps"], residuals[..., None])
        time = found.time[:, 0]
        row: Row = {"images": cell.images.value, "learner": cell.learner.value, "what": what}
        row["half_time"] = float(np.exp(np.log(time).mean())) if np.isfinite(time).all() else None
        yield row | {"censored": int(found.censored.sum()), "seeds": len(time), "low_share": low_share.get(what)}
