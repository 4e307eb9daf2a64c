"""What was learned when: tables, figures and plain sentences of the learning dynamics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from experiments.dynamics_cells import GROUPS, Arrays, Images, Learner
from experiments.dynamics_figures import (
    frequency_figure,
    groups_figure,
    half_time_figure,
    intervention_figure,
    residual_figure,
    set_apart_figure,
)
from experiments.run_folder import RunFolder
from mae_align.dynamics import HalfTimes, half_times
from mae_align.half_time_laws import Law, LawComparison, PartialRanks, compare_laws, partial_ranks

Key = tuple[Images, Learner]
Row = dict[str, object]

_CURVES = ("loss", "held_out_loss", "accuracy")
# Fewer half-times than these say nothing about a law.
_FEWEST = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One cell and what follows from it.

    Attributes:
        arrays: of :func:`experiments.dynamics_cells.run_cell`. seen, held_out: half-times [E, m] by the residuals on
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


def write_report(
    found: Mapping[Key, Arrays],
    folder: RunFolder,
    *,
    title: str,
    seeds: Sequence[int],
    response_widths: Sequence[float],
    resamples: int,
    seed: int,
) -> list[Cell]:
    """Analyse cells and write tables, figures and a summary.

    Args:
        found: arrays of the cells. folder: where to. title: of the data. seeds: of the members.
        response_widths: of the response filter, relative. resamples, seed: of the bootstrap.

    Returns:
        The analysis. Files: dynamics.nc and .csv (curves), half_times.csv, laws.csv, correlations.csv, orders.csv,
        figures as .png and .pdf, summary.txt.
    """
    cells = analyse(found, resamples=resamples, seed=seed)
    folder.save_dataset("dynamics", as_dataset(cells, seeds, response_widths))
    folder.save_table("half_times", list(half_time_rows(cells, seeds)))
    folder.save_table("laws", [law_row(cell) for cell in cells if cell.laws is not None])
    folder.save_table("correlations", [rank_row(cell) for cell in cells if cell.ranks is not None])
    folder.save_table("orders", [row for cell in cells for row in order_rows(cell, response_widths)])
    plain = [cell for cell in cells if cell.images is Images.original]
    changed = [cell for cell in cells if cell.learner in {c.learner for c in cells if c.images is not Images.original}]
    if plain:
        folder.save_figure("residuals", residual_figure(plain, title))
        folder.save_figure("half_times", half_time_figure(plain, title))
        folder.save_figure("groups", groups_figure(plain, title))
        folder.save_figure("frequency", frequency_figure(plain, response_widths, title))
    if changed:
        folder.save_figure("interventions", intervention_figure(changed, title))
    ranked = [cell for cell in cells if cell.ranks is not None]
    if ranked:
        folder.save_figure("set_apart", set_apart_figure(ranked, title))
    text = [f"Learning dynamics on {title}, {len(seeds)} seeds.", "", *law_table(cells), ""]
    folder.summary("\n".join([*text, *rank_table(cells), "", *sentences(cells, response_widths)]))
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
    return row | {"resamples": laws.resamples} | _against_flow(cell)


def _against_flow(cell: Cell) -> Row:
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


def law_table(cells: Sequence[Cell]) -> list[str]:
    """Exponents and how the laws compare, as lines of text."""
    lines = [
        ["half-time ~ eigenvalue^-a", "a", "interval", "R2", "R2 exp", "R2 rank", "AIC gain (interval)", "censored"]
    ]
    for cell in cells:
        if cell.laws is None:
            lines.append([cell.name, "diverged" if cell.diverged else "-", *[""] * 6])
            continue
        laws = cell.laws
        r2 = [f"{laws.fits[law].r2:.3f}" for law in (Law.power, Law.exponential, Law.rank)]
        gain = f"{laws.aic_gain:+.0f} ({laws.gain_low:+.0f}, {laws.gain_high:+.0f})"
        ends = f"({laws.low:.2f}, {laws.high:.2f})"
        censored = f"{laws.num_censored:.3g} of {laws.num_directions}"
        lines.append([cell.name, f"{laws.exponent:.2f}", ends, *r2, gain, censored])
    return _aligned(lines)


def rank_table(cells: Sequence[Cell]) -> list[str]:
    """Rank correlations of half-times, as lines of text."""
    head = ["rank correlation of half-time with", "eigenvalue", "frequency", "eigenvalue | frequency"]
    lines = [[*head, "frequency | eigenvalue", "the two", "last/first"]]
    for cell in cells:
        if cell.ranks is None:
            continue
        parts = [cell.ranks.eigenvalue, cell.ranks.frequency, cell.ranks.eigenvalue_given, cell.ranks.frequency_given]
        text = [_number(p[0]) if i < 2 else f"{_number(p[0])} {_ends(p)}" for i, p in enumerate(parts)]
        lines.append([cell.name, *text, _number(cell.ranks.between), f"{spread(cell):.3g}"])
    return _aligned(lines)


def sentences(cells: Sequence[Cell], response_widths: Sequence[float]) -> Iterator[str]:
    """What came out, in plain words, whatever it is."""
    for cell in cells:
        if cell.diverged:
            step = cell.arrays["steps"][~np.isfinite(cell.arrays["loss"]).all(0)][0]
            yield f"{cell.name}: a loss is not finite at step {step}; nothing is fitted to it."
        if cell.images is Images.original and cell.laws is not None:
            yield from _plain_sentences(cell, cell.laws)
    yield from _apart_sentences(cells)
    for cell in cells:
        if cell.images is Images.original and not cell.diverged:
            yield _principle_sentence(cell, response_widths)
    yield (
        "Published (Balestriero & LeCun, 2024): the bottom subspace is learned exponentially slower than the top "
        "(qualitative). A power law in the eigenvalue is what gradient descent on a linear network has in closed form "
        "(exponent 1); an exponential in the rank is the same law where eigenvalues fall exponentially with the rank."
    )


def _plain_sentences(cell: Cell, laws: LawComparison) -> Iterator[str]:
    power = laws.fits[Law.power]
    better = "better than either exponential law"
    if laws.gain_low <= 0:
        better = "no better than the best exponential law" if laws.gain_high >= 0 else "worse than an exponential law"
    censored = (
        f", {laws.num_censored:.3g} of {laws.num_directions} directions not half learned" if laws.num_censored else ""
    )
    yield (
        f"{cell.name}: half-time ~ eigenvalue^-{laws.exponent:.2f} (95% interval {laws.low:.2f} to {laws.high:.2f}), "
        f"R2 {power.r2:.3f}; {better} (AIC gain {laws.aic_gain:+.0f}, {laws.gain_low:+.0f} to {laws.gain_high:+.0f})"
        f"{censored}."
    )
    accuracy = cell.arrays["accuracy"]
    first, last = accuracy[:, 0].mean(), accuracy[:, -1].mean()
    yield f"  Probe accuracy {100 * first:.1f}% before and {100 * last:.1f}% after training (ridge on the code, test images)."
    flow = _against_flow(cell)
    if flow:
        yield (
            f"  Against the gradient flow from the same start: exponent {flow['flow_exponent']:.2f}, half-times "
            f"{flow['flow_ratio_median']:.3f} times the flow's (median), within a factor {flow['flow_ratio_spread']:.2f} of that."
        )


def _apart_sentences(cells: Sequence[Cell]) -> Iterator[str]:
    """Eigenvalue or frequency, learner by learner, where the two are set apart."""
    for learner in dict.fromkeys(cell.learner for cell in cells):
        for cell in cells:
            if cell.learner is not learner or cell.ranks is None or cell.images is Images.original:
                continue
            value, frequency = cell.ranks.eigenvalue_given, cell.ranks.frequency_given
            if math.isnan(cell.ranks.eigenvalue[0]):
                sure = frequency[1] > 0 or frequency[2] < 0
                way = "higher frequencies later" if frequency[0] > 0 else "higher frequencies earlier"
                verdict = way if sure else "no detectable order by frequency"
                yield (
                    f"{cell.name}: one eigenvalue for all; half-times differ by a factor {spread(cell):.3g}, correlation "
                    f"with frequency {_number(frequency[0])} {_ends(frequency)}: {verdict}."
                )
                continue
            follows = [
                name
                for name, (_, low, high) in (("the eigenvalue", value), ("frequency", frequency))
                if low > 0 or high < 0
            ]
            yield (
                f"{cell.name}: half-time with eigenvalue given frequency {_number(value[0])} {_ends(value)}, with "
                f"frequency given eigenvalue {_number(frequency[0])} {_ends(frequency)}: follows "
                f"{' and '.join(follows) or 'neither detectably'}."
            )


def _principle_sentence(cell: Cell, response_widths: Sequence[float]) -> str:
    """Which is half learned first, low or high, by both meanings of frequency."""
    rows = {str(row["what"]): row for row in order_rows(cell, response_widths)}
    bands = [row for what, row in rows.items() if what.startswith("spatial")]
    text = ", ".join(_when(row) for row in bands)
    response = "; ".join(
        f"width {width:g}: low {_when(rows[f'response frequency low, width {width:g}'])}, high "
        f"{_when(rows[f'response frequency high, width {width:g}'])} (low holds {100 * share:.0f}%)"
        for width, share in zip(response_widths, cell.arrays["low_share"], strict=True)
    )
    return (
        f"{cell.name}: half-error steps of spatial bands, low to high: {text}. "
        f"Of response frequencies (another measurement), {response}."
    )


def _when(row: Row) -> str:
    if row["half_time"] is None:
        return "-"
    return f"{'>' if row['censored'] else ''}{row['half_time']:.3g}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"


def _ends(value: tuple[float, float, float]) -> str:
    return "" if math.isnan(value[0]) else f"({value[1]:+.2f}, {value[2]:+.2f})"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        text.append("  ".join(cells).rstrip())
    return text
