"""Paired comparisons, table, figures and plain sentences of the guidance experiment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.guided_autoencoder.runs import GuidedSplit, Labels, Row
from experiments.harness.figures import COLUMN_WIDTH, PALETTE, legend_below, panels
from experiments.harness.folder import RunFolder
from experiments.harness.statistics import PairedDifference, paired_difference
from mae_align.metrics import report_table

_TRUE, _SHUFFLED, _LINEAR = Labels.true.value, Labels.shuffled.value, "linear"
_PUBLISHED = 0.01


def write_report(rows: Sequence[Row], folder: RunFolder, split: GuidedSplit, tolerance: float, probes: Sequence[str]):
    """Tables, figures and summary into the run folder.

    Args:
        rows: of networks and of the linear frontier. split: of their images. tolerance: percent. probes: their names.
    """
    folder.save_dataset("networks", report_table(rows))
    compared = [row for probe in probes for row in compare_weights(rows, probe)]
    folder.save_table("weights", compared)
    verdicts = [row for probe in probes for row in judge(rows, compared, probe, tolerance)]
    folder.save_table("claim", verdicts)
    figures = [
        folder.save_figure("guidance", trade_off_figure(rows, probes[0], tolerance)),
        folder.save_figure("latents", latent_figure(rows, verdicts, probes[0])),
    ]
    sizes = (len(part) for part in (split.fit_labels, split.probe_labels, split.val_labels, split.test_labels))
    head = "Guidance on {}: {} images train and guide, {} fit the probes, {} choose, {} test".format(split.name, *sizes)
    unit = (
        f"Weights are of the published loss (pixels in [0, 1]); in units in which 1 is the error of the mean image "
        f"they are {1 / split.published_unit:.3g} times as large."
    )
    text = "\n".join(summarise(compared, verdicts, tolerance))
    shown = [row for row in compared if row["probe"] == probes[0]]
    folder.summary(f"{head}\n{unit}\n\n{table_text(shown)}\n\nFigures: {figures[0]}  {figures[1]}\n\n{text}")


class Series:
    """Networks of one code size, labels and weight, in the order of their seeds.

    Attributes:
        val_error, test_error: [seeds]. val, test: [seeds] accuracy in percent.
    """

    def __init__(self, rows: Sequence[Row], probe: str) -> None:
        ordered = sorted(rows, key=lambda row: row["seed"])
        self.seeds = [row["seed"] for row in ordered]
        self.val_error, self.test_error = (np.array([row[f"{p}_error"] for row in ordered]) for p in ("val", "test"))
        self.val, self.test = (
            100 * np.array([row[f"{probe}_accuracy_{p}"] for row in ordered]) for p in ("val", "test")
        )


def series(rows: Sequence[Row], probe: str, latent: int, labels: str, weight: float) -> Series:
    """The networks of one code size, labels and weight.

    Args:
        rows: of all networks. probe: whose accuracy. latent, labels, weight: which networks; weight 0 has no labels.
    """
    labels = labels if weight > 0 else _TRUE
    return Series(
        [r for r in rows if (r["latent"], r["labels"]) == (latent, labels) and r.get("weight") == weight], probe
    )


def excess_percent(error: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Error above that of the unguided network of the same seed, in percent of it.

    Example:
        >>> excess_percent(np.array([1.1]), np.array([1.0])).round(6).tolist()
        [10.0]
    """
    return 100.0 * (error / base - 1.0)


def compare_weights(rows: Sequence[Row], probe: str) -> list[Row]:
    """One row for each code size, labels and positive weight: what guidance costs and gains, paired by seed.

    Args:
        rows: of all networks, and of the linear frontier (left out). probe: whose accuracy.

    Returns:
        Means over seeds of val_excess and val_gain; test_excess and test_gain with 95% paired t intervals; the
        accuracies themselves. Excess in percent of the unguided error, gains in points of accuracy.
    """
    networks = [row for row in rows if row["labels"] != _LINEAR]
    groups = dict.fromkeys((row["latent"], row["labels"], row["weight"]) for row in networks if row["weight"] > 0)
    found = []
    for latent, labels, weight in sorted(groups):
        base, guided = (series(networks, probe, latent, labels, w) for w in (0.0, weight))
        normalized = next(r["normalized_weight"] for r in networks if r["weight"] == weight)
        zero = np.zeros(len(base.seeds))
        excess = paired_difference(excess_percent(guided.test_error, base.test_error), zero)
        found.append(
            {
                "probe": probe,
                "latent": latent,
                "labels": labels,
                "weight": weight,
                "normalized_weight": normalized,
                "seeds": len(base.seeds),
                "val_excess": float(excess_percent(guided.val_error, base.val_error).mean()),
                "val_gain": float((guided.val - base.val).mean()),
                "unguided_error": float(base.test_error.mean()),
                "unguided_accuracy": float(base.test.mean()),
                "unguided_range": float(np.ptp(base.test)),
                "accuracy": float(guided.test.mean()),
                **_cells("test_excess", excess),
                **_cells("test_gain", paired_difference(guided.test, base.test)),
            }
        )
    return found


def _cells(name: str, found: PairedDifference) -> Row:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def judge(rows: Sequence[Row], compared: Sequence[Row], probe: str, tolerance: float) -> list[Row]:
    """One row for each code size: is the claim reproduced?

    The weight is the one of largest mean gain on validation images among those whose mean cost there is at most the
    tolerance; where none is that cheap, the cheapest one, and the claim is not reproduced.

    Args:
        rows: of all networks and of the linear frontier. compared: of :func:`compare_weights`. probe: whose accuracy.
        tolerance: percent of reconstruction error that count as equal.

    Returns:
        The row of the chosen weight with ``affordable``, ``reproduced``; control_gain and over_control (gain beyond
        that of shuffled labels) with intervals, NaN without the control; linear_gain, gain of the exact linear frontier
        over PCA at the same cost on test images, NaN without it.
    """
    found = []
    mine = [row for row in compared if row["probe"] == probe]
    for latent in dict.fromkeys(row["latent"] for row in mine):
        offered = [row for row in mine if (row["latent"], row["labels"]) == (latent, _TRUE)]
        affordable = [row for row in offered if row["val_excess"] <= tolerance]
        if affordable:
            best = max(affordable, key=lambda row: row["val_gain"])
        else:
            best = min(offered, key=lambda row: row["val_excess"])
        equal = abs(best["test_excess"]) <= tolerance
        apart = best["test_gain_low"] > 0 and best["test_gain"] > best["unguided_range"]
        found.append(
            {
                **best,
                "affordable": bool(affordable),
                "equal_error": equal,
                "reproduced": bool(affordable) and equal and apart,
                **_control(rows, best),
                "linear_gain": linear_gain(rows, probe, latent, best["test_excess"]),
            }
        )
    return found


def _control(rows: Sequence[Row], best: Row) -> Row:
    """Gain of shuffled labels at the chosen weight, and of true ones over them."""
    at = (rows, best["probe"], best["latent"])
    control = series(*at, _SHUFFLED, best["weight"])
    if not control.seeds:
        nothing = PairedDifference(0, math.nan, math.nan, math.nan, math.nan)
        return _cells("control_gain", nothing) | _cells("over_control", nothing) | {"control_excess": math.nan}
    base, guided = series(*at, _TRUE, 0.0), series(*at, _TRUE, best["weight"])
    return {
        "control_excess": float(excess_percent(control.test_error, base.test_error).mean()),
        **_cells("control_gain", paired_difference(control.test, base.test)),
        **_cells("over_control", paired_difference(guided.test, control.test)),
    }


def linear_frontier(rows: Sequence[Row], probe: str, latent: int) -> tuple[np.ndarray, np.ndarray]:
    """Cost and accuracy of the linear codes of one size on test images, cheapest first.

    Returns:
        [m] percent of PCA's error, [m] accuracy in percent; empty without the frontier.
    """
    of = sorted(
        (row for row in rows if (row["labels"], row["latent"]) == (_LINEAR, latent)),
        key=lambda row: -row["lam_relative"],
    )
    if not of:
        return np.empty(0), np.empty(0)
    error = np.array([row["test_error"] for row in of])
    return 100 * (error / error[0] - 1), 100 * np.array([row[f"{probe}_accuracy_test"] for row in of])


def linear_gain(rows: Sequence[Row], probe: str, latent: int, excess: float) -> float:
    """Points of accuracy that the linear frontier gains over PCA for a cost, linearly between the solved lambdas.

    Args:
        rows: of the frontier among others. probe: whose accuracy. latent: size of the code. excess: percent.

    Returns:
        The gain; 0 for no cost, NaN without a frontier or past its end.
    """
    cost, accuracy = linear_frontier(rows, probe, latent)
    if not len(cost) or excess > cost.max():
        return math.nan
    # Test errors of nearly equal lambdas may be out of order by rounding.
    return float(np.interp(max(excess, 0.0), np.maximum.accumulate(cost), accuracy) - accuracy[0])


def table_text(compared: Sequence[Row]) -> str:
    """The comparisons as plain text."""
    lines = [
        f"Test images, against the unguided network of the same seed; {compared[0]['probe']} probe",
        f"{'k':>5} {'labels':>9} {'weight':>8} {'ours':>8} {'reconstruction error':>28} {'accuracy [points]':>28}",
    ]
    for row in compared:
        cost, gain = (_pm(row, name) for name in ("test_excess", "test_gain"))
        lines.append(
            f"{row['latent']:>5} {row['labels']:>9} {row['weight']:>8.2g} {row['normalized_weight']:>8.2g} "
            f"{cost:>27}% {gain:>28}"
        )
    return "\n".join(lines)


def _pm(row: Row, name: str) -> str:
    """A mean and its interval."""
    if not math.isfinite(row[name]):
        return "not measured"
    if not math.isfinite(row[f"{name}_low"]):
        return f"{row[name]:+.2f} (one seed)"
    return f"{row[name]:+.2f} [{row[f'{name}_low']:+.2f}, {row[f'{name}_high']:+.2f}]"


def summarise(compared: Sequence[Row], verdicts: Sequence[Row], tolerance: float) -> Iterator[str]:
    """Plain sentences: the claim for each probe and code size, and what the published weight costs."""
    yield (
        f"Claim: at equal reconstruction error (within {tolerance:g}%) accuracy differs by more than the seeds do. The "
        "weight is chosen on validation images; means and 95% paired intervals on test images:"
    )
    for row in verdicts:
        outcome = "reproduced" if row["reproduced"] else f"not reproduced ({_reason(row)})"
        yield (
            f"  code {row['latent']}, {row['probe']}: {outcome}. Weight {row['weight']:g}: reconstruction error "
            f"{_pm(row, 'test_excess')}%, accuracy {row['unguided_accuracy']:.1f} -> {row['accuracy']:.1f}%, "
            f"{_pm(row, 'test_gain')} points (unguided seeds range over {row['unguided_range']:.2f}); shuffled labels "
            f"{_pm(row, 'control_gain')}, true over shuffled {_pm(row, 'over_control')}; exact linear frontier at that "
            f"cost {_linear(row)}"
        )
    published = [row for row in compared if (row["weight"], row["labels"]) == (_PUBLISHED, _TRUE)]
    for row in published:
        yield (
            f"  The published weight {_PUBLISHED:g}, code {row['latent']}, {row['probe']}: reconstruction error "
            f"{_pm(row, 'test_excess')}%, accuracy {_pm(row, 'test_gain')} points"
        )


def _linear(row: Row) -> str:
    return f"{row['linear_gain']:+.2f}" if math.isfinite(row["linear_gain"]) else "not measured"


def _reason(row: Row) -> str:
    if not row["affordable"]:
        return "every weight costs more on validation images"
    if not row["equal_error"]:
        return "its test error differs by more"
    if not math.isfinite(row["test_gain_low"]):
        return "one seed has no spread"
    if row["test_gain_low"] <= 0:
        return "the interval of the gain holds 0"
    return "the unguided seeds differ by more"


def trade_off_figure(rows: Sequence[Row], probe: str, tolerance: float) -> Figure:
    """Accuracy against cost in reconstruction error, a panel for each code size.

    Small points are networks, lines join the means over seeds of one weight.
    """
    latents = list(dict.fromkeys(row["latent"] for row in rows))
    columns = min(len(latents), 4)
    lines = math.ceil(len(latents) / columns)
    figure, grid = panels(lines, columns, width=max(0.85 * COLUMN_WIDTH, 5.2 / columns), height=2.6)
    for axis, latent in zip(grid.ravel(), latents, strict=False):
        _trade_off(axis, rows, probe, latent, tolerance)
        axis.set_title(f"code of {latent}", fontsize=8)
    for axis in grid.ravel()[len(latents) :]:
        axis.set_visible(False)
    for axis in grid[-1]:
        axis.set_xlabel("reconstruction error over unguided [%]")
    for axis in grid[:, 0]:
        axis.set_ylabel(f"test accuracy, {probe} probe [%]")
    legend_below(figure, grid[0, 0], 2)
    return figure


_CURVES = ((_TRUE, "guided by labels", PALETTE[1], "o-"), (_SHUFFLED, "guided by shuffled labels", "0.45", "s--"))


def _trade_off(axis: Axes, rows: Sequence[Row], probe: str, latent: int, tolerance: float) -> None:
    base = series(rows, probe, latent, _TRUE, 0.0)
    of = [row for row in rows if row["latent"] == latent and row["labels"] != _LINEAR]
    reach = tolerance
    for labels, name, color, style in _CURVES:
        weights = sorted({row["weight"] for row in of if row["labels"] == labels and row["weight"] > 0})
        if not weights:
            continue
        means = [(0.0, float(base.test.mean()))]
        for weight in weights:
            one = series(rows, probe, latent, labels, weight)
            cost = excess_percent(one.test_error, base.test_error)
            axis.plot(cost, one.test, style[0], color=color, markersize=2.5, alpha=0.4, markeredgewidth=0)
            means.append((float(cost.mean()), float(one.test.mean())))
            reach = max(reach, float(cost.max()))
        axis.plot(*zip(*means, strict=True), style, color=color, markersize=4, label=name)
    axis.plot(np.zeros(len(base.test)), base.test, "o", color="black", markersize=2.5, alpha=0.5, markeredgewidth=0)
    axis.plot(0.0, base.test.mean(), "o", color="black", markersize=4.5, label="not guided", zorder=4)
    cost, accuracy = linear_frontier(rows, probe, latent)
    if len(cost):
        # The whole curve, cut where the networks end.
        low, high = axis.get_ylim()
        low = min(low, float(accuracy[cost <= reach].min()) - 0.03 * (high - low))
        axis.plot(cost, accuracy, "-", color=PALETTE[0], marker="D", markersize=3, label="linear, exact")
        axis.set_ylim(low, high)
    axis.axvspan(-tolerance, tolerance, color="0.9", zorder=0, label=f"within {tolerance:g}%")
    axis.set_xscale("symlog", linthresh=tolerance, linscale=0.8)
    axis.set_xlim(-2 * tolerance, 1.3 * reach)
    ticks = [t for t in (-1, 0, 1, 3, 10, 30, 100, 300) if -tolerance <= t * tolerance <= reach or t == 1]
    axis.set_xticks([t * tolerance for t in ticks], [f"{t * tolerance:g}" for t in ticks])
    axis.set_xticks([], minor=True)


def latent_figure(rows: Sequence[Row], verdicts: Sequence[Row], probe: str) -> Figure:
    """Reconstruction error and accuracy against the size of the code, unguided and at the chosen weight."""
    figure, axes = panels(1, 2, width=0.95 * COLUMN_WIDTH, height=2.5)
    chosen = {row["latent"]: row["weight"] for row in verdicts if row["probe"] == probe}
    latents = sorted(chosen)
    # Side by side, for their ranges overlap.
    for shift, (labels, name, color, style) in zip(
        (0.96, 1.0, 1.04), (("", "not guided", "black", "o-"), *_CURVES), strict=True
    ):
        found: list[tuple[int, Series]] = []
        for latent in latents:
            one = series(rows, probe, latent, labels or _TRUE, chosen[latent] if labels else 0.0)
            if one.seeds:
                found.append((latent, one))
        for axis, values in zip(axes[0], ("test_error", "test"), strict=True):
            bars: list[Any] = [getattr(one, values) for _, one in found]
            if not bars:
                continue
            mean = np.array([b.mean() for b in bars])
            ends = np.abs(np.array([[b.min(), b.max()] for b in bars]).T - mean)
            axis.errorbar([shift * k for k, _ in found], mean, ends, fmt=style, color=color, markersize=3.5, label=name)
    for axis, label in zip(
        axes[0], ("test reconstruction error\n(mean image: 1)", f"test accuracy, {probe} probe [%]"), strict=True
    ):
        axis.set_xscale("log")
        axis.set_xticks(latents, [str(k) for k in latents])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("size of the code")
        axis.set_ylabel(label)
    legend_below(figure, axes[0, 0], 3)
    return figure
