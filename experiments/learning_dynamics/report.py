"""What was learned when: tables, figures and plain sentences of the learning dynamics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiments.harness.folder import RunFolder
from experiments.learning_dynamics.analysis import (
    Cell,
    Key,
    Row,
    against_flow,
    analyse,
    as_dataset,
    half_time_rows,
    law_row,
    order_rows,
    rank_row,
    spread,
)
from experiments.learning_dynamics.cells import Arrays, Images
from experiments.learning_dynamics.figures import (
    frequency_figure,
    groups_figure,
    half_time_figure,
    intervention_figure,
    residual_figure,
    set_apart_figure,
    spectrum_figure,
)
from experiments.learning_dynamics.half_time_laws import Law, LawComparison


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
        folder.save_figure("spectra", spectrum_figure(plain, plain[0].arrays["seen"].shape[-1], title))
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
    beyond = cell.arrays["spectrum"][:, -1, laws.num_directions :]
    if beyond.size:
        yield (
            f"  Beyond the code's {laws.num_directions} directions the residual is {np.nanmean(beyond):.2f} on average "
            f"after training; {100 * (beyond < 0.5).mean():.0f}% of these directions are half learned."
        )
    yield (
        f"  Probe accuracy {100 * first:.1f}% before and {100 * last:.1f}% after training "
        "(ridge on the code, test images)."
    )
    flow = against_flow(cell)
    if flow:
        yield (
            f"  Against the gradient flow from the same start: exponent {flow['flow_exponent']:.2f}, half-times "
            f"{flow['flow_ratio_median']:.3f} times the flow's (median), within a factor "
            f"{flow['flow_ratio_spread']:.2f} of that."
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
                    f"{cell.name}: one eigenvalue for all; half-times differ by a factor {spread(cell):.3g}, "
                    f"correlation with frequency {_number(frequency[0])} {_ends(frequency)}: {verdict}."
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
