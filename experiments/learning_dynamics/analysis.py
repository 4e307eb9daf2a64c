"""What follows from trained cells: half-times, laws, correlations, and their tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from experiments.learning_dynamics.cells import GROUPS, Arrays, Images, Learner
from experiments.learning_dynamics.dynamics import HalfTimes, half_times
from experiments.learning_dynamics.half_time_laws import LawComparison, PartialRanks, compare_laws, partial_ranks

Key = tuple[Images, Learner]
Row = dict[str, object]
_CURVES = ("loss", "held_out_loss", "accuracy")
# Fewer half-times than these say nothing about a law.
_FEWEST = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One cell and what follows from it.

    Attributes:
        arrays: of :func:`experiments.learning_dynamics.cells.run_cell`. seen, held_out: half-times [E, m] by the
            residuals on
            training and on test images. diverged: whether a member's loss stopped being finite.
        laws: None where half-times are too few or all eigenvalues are equal. ranks: None where half-times are too few.
    """

    images: Images
    learner: Learner
    arrays: Arrays
    seen: HalfTimes
    held_out: HalfTimes
    diverged: bool
    laws: LawComparison | None
    ranks: PartialRanks | None

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.images.value}, {self.learner.value}"


def analyse(found: Mapping[Key, Arrays], *, resamples: int, seed: int) -> list[Cell]:
    """Half-times, laws and correlations of every cell.

    Args:
        found: arrays of the cells. resamples, seed: of the bootstrap.
    """
    cells = []
    for (images, learner), arrays in found.items():
        seen, held_out = (half_times(arrays["steps"], arrays[name]) for name in ("seen", "held_out"))
        diverged = not np.isfinite(arrays["loss"]).all()
        enough = not diverged and (~seen.censored).all(0).sum() >= _FEWEST
        values = arrays["values"]
        varies = float(np.ptp(values)) > 1e-6 * float(values.max())
        draws = {"resamples": resamples, "seed": seed}
        laws = compare_laws(values, seen, **draws) if enough and varies else None
        ranks = partial_ranks(values, arrays["frequency"], seen, **draws) if enough else None
        cells.append(Cell(images, learner, arrays, seen, held_out, diverged, laws, ranks))
    return cells


def as_dataset(cells: Sequence[Cell], seeds: Sequence[int], response_widths: Sequence[float]) -> xr.Dataset:
    """Curves of all cells over records; ``step`` says which step a record is of, NaN where a cell has fewer records.

    Args:
        cells: of :func:`analyse`. seeds: of the members. response_widths: relative.
    """

    def padded(name: str, axis: int) -> np.ndarray:
        parts, most = [], max(cell.arrays[name].shape[axis] for cell in cells)
        for cell in cells:
            part = cell.arrays[name].astype(np.float64)
            pad = [(0, 0)] * part.ndim
            pad[axis] = (0, most - part.shape[axis])
            parts.append(np.pad(part, pad, constant_values=np.nan))
        return np.stack(parts)

    names = [cell.name for cell in cells]
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {"step": (("cell", "record"), padded("steps", 0))}
    for name in _CURVES:
        variables[name] = (("cell", "seed", "record"), padded(name, 1))
    last = {"seen": "direction", "held_out": "direction", "groups": "group", "bands": "band"}
    last |= {"low": "width", "high": "width"}
    labels = {"seen": "residual", "held_out": "held_out_residual", "groups": "group_residual", "bands": "band_error"}
    labels |= {"low": "response_low_error", "high": "response_high_error"}
    for name, dim in last.items():
        variables[labels[name]] = (("cell", "seed", "record", dim), padded(name, 1))
    for name in ("values", "frequency"):
        variables[{"values": "eigenvalue"}.get(name, name)] = (("cell", "direction"), padded(name, 0))
    coords = {"cell": names, "seed": list(seeds), "width": list(response_widths)}
    coords |= {"direction": np.arange(1, variables["residual"][1].shape[-1] + 1)}
    return xr.Dataset(variables, coords)


def half_time_rows(cells: Sequence[Cell], seeds: Sequence[int]) -> Iterator[Row]:
    """One row per cell, seed and direction; frequency in cycles per pixel, half-times in steps."""
    for cell in cells:
        reference = cell.arrays.get("reference_half_times")
        for e, seed in enumerate(seeds):
            for i, value in enumerate(cell.arrays["values"]):
                row: Row = {"images": cell.images.value, "learner": cell.learner.value, "seed": seed}
                row |= {"direction": i + 1, "eigenvalue": value, "frequency": cell.arrays["frequency"][i]}
                row |= {"half_time": cell.seen.time[e, i], "censored": bool(cell.seen.censored[e, i])}
                row |= {"held_out_half_time": cell.held_out.time[e, i]}
                row |= {"held_out_censored": bool(cell.held_out.censored[e, i])}
                yield row | {"flow_half_time": None if reference is None else reference[e, i]}


def law_row(cell: Cell) -> Row:
    """The laws of one cell as a row."""
    laws = cell.laws
    assert laws is not None
    row: Row = {"images": cell.images.value, "learner": cell.learner.value, "exponent": laws.exponent}
    row |= {"exponent_low": laws.low, "exponent_high": laws.high, "directions": laws.num_directions}
    row |= {"censored": laws.num_censored}
    for law, fit in laws.fits.items():
        row |= {f"r2_{law.name}": fit.r2, f"aic_{law.name}": fit.aic, f"sigma_{law.name}": fit.sigma}
        row |= {f"slope_{law.name}": fit.slope}
    row |= {"aic_gain": laws.aic_gain, "aic_gain_low": laws.gain_low, "aic_gain_high": laws.gain_high}
    return row | {"resamples": laws.resamples} | against_flow(cell)


def against_flow(cell: Cell) -> Row:
    """How the half-times of descent compare with those of the flow from the same start; {} for other cells."""
    reference = cell.arrays.get("reference_half_times")
    if reference is None or cell.diverged:
        return {}
    both = ~cell.seen.censored & np.isfinite(reference)
    ratio = np.log(cell.seen.time[both] / reference[both])
    if not len(ratio):
        return {}
    flow = HalfTimes(np.where(np.isfinite(reference), reference, cell.arrays["steps"][-1]), ~np.isfinite(reference))
    return {
        "flow_exponent": compare_laws(cell.arrays["values"], flow, resamples=1).exponent,
        "flow_ratio_median": float(np.exp(np.median(ratio))),
        "flow_ratio_spread": float(np.exp(np.abs(ratio - np.median(ratio)).max())),
    }


def rank_row(cell: Cell) -> Row:
    """The correlations of one cell as a row."""
    ranks = cell.ranks
    assert ranks is not None
    row: Row = {"images": cell.images.value, "learner": cell.learner.value, "between": ranks.between}
    for name in ("eigenvalue", "frequency", "eigenvalue_given", "frequency_given"):
        value, low, high = getattr(ranks, name)
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row | {"latest_over_earliest": spread(cell)}


def spread(cell: Cell) -> float:
    """Latest over earliest half-time, geometric means over seeds (censored ones as if they came at the last step)."""
    mean = np.exp(np.log(cell.seen.time).mean(0))
    return float(mean.max() / mean.min())


def order_rows(cell: Cell, response_widths: Sequence[float]) -> Iterator[Row]:
    """When each group of directions, spatial band and response frequency is half learned: geometric mean over seeds."""
    series = [(f"variance group {g + 1} of {GROUPS}", cell.arrays["groups"][..., g]) for g in range(GROUPS)]
    bands = cell.arrays["bands"].shape[-1]
    series += [(f"spatial frequency band {b + 1} of {bands}", cell.arrays["bands"][..., b]) for b in range(bands)]
    for w, width in enumerate(response_widths):
        for part in ("low", "high"):
            series.append((f"response frequency {part}, width {width:g}", cell.arrays[part][..., w]))
    for what, shares in series:
        found = half_times(cell.arrays["steps"], shares[..., None])
        time, known = found.time[:, 0], np.isfinite(found.time[:, 0])
        row: Row = {"images": cell.images.value, "learner": cell.learner.value, "what": what}
        row |= {"half_time": float(np.exp(np.log(time[known]).mean())) if known.all() else None}
        yield row | {"censored": int(found.censored.sum()), "seeds": len(time)}
