"""Paired comparisons, figures and the verdict of the guidance experiment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.guided_autoencoder.networks import Labels
from experiments.harness.figures import COLUMN_WIDTH, PALETTE, legend_below, panels
from experiments.harness.statistics import paired_difference

Row = dict[str, Any]
_TRUE, _SHUFFLED = Labels.true.value, Labels.shuffled.value
_CURVES = ((_TRUE, "guided by labels", PALETTE[1], "o-"), (_SHUFFLED, "guided by shuffled labels", "0.45", "s--"))
PUBLISHED_WEIGHT = 0.01


def series(networks: pd.DataFrame, probe: str, latent: int, labels: str, weight: float) -> pd.DataFrame:
    """Networks of one code size, labels and weight, by seed.

    Args:
        networks: a row for each.
        probe: whose accuracy.
        latent: size of the code.
        labels: what guides; weight 0 has no labels.
        weight: of the labels.

    Returns:
        Over the seeds, ascending: val_error and test_error; val and test, accuracies in percent.
    """
    of = (networks.latent == latent) & (networks.weight == weight) & (networks.labels == (labels if weight else _TRUE))
    own = networks[of].set_index("seed").sort_index()
    accuracies = {part: 100 * own[f"{probe}_accuracy_{part}"] for part in ("val", "test")}
    return pd.DataFrame({"val_error": own.val_error, "test_error": own.test_error, **accuracies})


def pair(
    networks: pd.DataFrame, probe: str, latent: int, one: tuple[str, float], other: tuple[str, float]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The series of two kinds of networks, each of labels and a weight, on the seeds that both have."""
    a, b = (series(networks, probe, latent, *which) for which in (one, other))
    seeds = a.index.intersection(b.index)
    return a.loc[seeds], b.loc[seeds]


def excess_percent(error: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Error above that of the unguided network of the same seed, in percent of it.

    Example:
        >>> excess_percent(np.array([1.1]), np.array([1.0])).round(6).tolist()
        [10.0]
    """
    return 100.0 * (error / base - 1.0)


def compare_weights(networks: pd.DataFrame, probe: str) -> list[Row]:
    """What guidance costs and gains, paired by seed.

    Args:
        networks: a row for each network; those without an unguided one of the same code and seed are left out.
        probe: whose accuracy.

    Returns:
        One row for each code size, labels and positive weight: means over seeds of val_excess and val_gain; test_excess
        and test_gain with 95% paired t intervals; the accuracies themselves. Excess in percent of the unguided error,
        gains in points of accuracy.
    """
    found = []
    normalized = dict(zip(networks.weight, networks.normalized_weight, strict=True))
    groups = zip(networks.latent, networks.labels, networks.weight, strict=True)
    for latent, labels, weight in sorted({group for group in groups if group[2] > 0}):
        guided, base = pair(networks, probe, latent, (labels, weight), (labels, 0.0))
        if base.empty:
            continue
        excess = excess_percent(guided.test_error.to_numpy(), base.test_error.to_numpy())
        found.append(
            {
                "probe": probe,
                "latent": latent,
                "labels": labels,
                "weight": weight,
                "normalized_weight": normalized[weight],
                "seeds": len(base),
                "val_excess": float(excess_percent(guided.val_error.to_numpy(), base.val_error.to_numpy()).mean()),
                "val_gain": float((guided.val - base.val).mean()),
                "unguided_error": float(base.test_error.mean()),
                "unguided_accuracy": float(base.test.mean()),
                "unguided_range": float(np.ptp(base.test)),
                "accuracy": float(guided.test.mean()),
                **_interval("test_excess", excess, np.zeros(len(excess))),
                **_interval("test_gain", guided.test.to_numpy(), base.test.to_numpy()),
            }
        )
    return found


def _interval(name: str, a: np.ndarray, b: np.ndarray) -> Row:
    """Mean and ends of the interval of a - b; NaN without pairs."""
    if not len(a):
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), math.nan)
    found = paired_difference(a, b)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def judge(
    networks: pd.DataFrame, linear: Sequence[Row], compared: Sequence[Row], probe: str, tolerance: float
) -> list[Row]:
    """Is the claim reproduced?

    The weight is the one of largest mean gain on validation images among those whose mean cost there is at most the
    tolerance; where none is that cheap, the cheapest one, and the claim is not reproduced.

    Args:
        networks: a row for each.
        linear: rows of the linear frontier; none where it was left out.
        compared: of :func:`compare_weights`.
        probe: whose accuracy.
        tolerance: percent of reconstruction error that count as equal.

    Returns:
        One row for each code size: that of the chosen weight with `reproduced` and `outcome`; control_excess;
        control_gain and over_control (gain beyond that of shuffled labels) with intervals, NaN without the control;
        linear_gain, see :func:`linear_gain`.
    """
    found = []
    mine = [row for row in compared if (row["probe"], row["labels"]) == (probe, _TRUE)]
    for latent in dict.fromkeys(row["latent"] for row in mine):
        offered = [row for row in mine if row["latent"] == latent]
        affordable = [row for row in offered if row["val_excess"] <= tolerance]
        if affordable:
            best = max(affordable, key=lambda row: row["val_gain"])
        else:
            best = min(offered, key=lambda row: row["val_excess"])
        reason = _reason(best, tolerance, affordable=bool(affordable))
        at, weight = (networks, probe, latent), best["weight"]
        control, base = pair(*at, (_SHUFFLED, weight), (_TRUE, 0.0))
        guided, over = pair(*at, (_TRUE, weight), (_SHUFFLED, weight))
        excess = excess_percent(control.test_error.to_numpy(), base.test_error.to_numpy())
        found.append(
            {
                **best,
                "reproduced": not reason,
                "outcome": f"not reproduced: {reason}" if reason else "reproduced",
                "control_excess": float(excess.mean()) if len(excess) else math.nan,
                **_interval("control_gain", control.test.to_numpy(), base.test.to_numpy()),
                **_interval("over_control", guided.test.to_numpy(), over.test.to_numpy()),
                "linear_gain": linear_gain(linear, probe, latent, best["test_excess"]),
            }
        )
    return found


def _reason(row: Row, tolerance: float, *, affordable: bool) -> str:
    """Why a chosen weight does not reproduce the claim; empty where it does."""
    if not affordable:
        return "every weight costs more on validation images"
    if abs(row["test_excess"]) > tolerance:
        return "its test error differs by more"
    if not math.isfinite(row["test_gain_low"]):
        return "one seed has no spread"
    if row["test_gain_low"] <= 0:
        return "the interval of the gain holds 0"
    return "" if row["test_gain"] > row["unguided_range"] else "the unguided seeds differ by more"


def linear_frontier(linear: Sequence[Row], probe: str, latent: int) -> tuple[np.ndarray, np.ndarray]:
    """Cost and accuracy of the linear codes of one size on test images, cheapest first.

    Returns:
        [m] percent of PCA's error, [m] accuracy in percent; empty without the frontier.
    """
    of = sorted((row for row in linear if row["latent"] == latent), key=lambda row: -row["lam_relative"])
    error, accuracy = (np.array([row[name] for row in of]) for name in ("test_error", f"{probe}_accuracy_test"))
    return excess_percent(error, error[:1]), 100 * accuracy


def linear_gain(linear: Sequence[Row], probe: str, latent: int, excess: float) -> float:
    """Points of accuracy that the linear frontier gains over PCA for a cost, linearly between the solved lambdas.

    Args:
        linear: rows of the frontier.
        probe: whose accuracy.
        latent: size of the code.
        excess: percent.

    Returns:
        The gain; 0 for no cost, NaN without a frontier or past its end.
    """
    cost, accuracy = linear_frontier(linear, probe, latent)
    if not len(cost) or excess > cost.max():
        return math.nan
    # Test errors of nearly equal lambdas may be out of order by rounding.
    return float(np.interp(max(excess, 0.0), np.maximum.accumulate(cost), accuracy) - accuracy[0])


def shown(rows: Sequence[Row], *more: str) -> pd.DataFrame:
    """What the summary shows of compared weights: costs and gains with their intervals.

    Args:
        rows: of :func:`compare_weights` or :func:`judge`.
        more: further columns.
    """
    return pd.DataFrame(
        {
            "probe": row["probe"],
            "code": row["latent"],
            "labels": row["labels"],
            "weight": f"{row['weight']:g}",
            "error over unguided [%]": with_interval(row, "test_excess"),
            "accuracy [points]": with_interval(row, "test_gain"),
            **{name: row[name] for name in more},
        }
        for row in rows
    )


def with_interval(row: Row, name: str) -> str:
    """A mean and its interval."""
    if not math.isfinite(row[name]):
        return "not measured"
    if not math.isfinite(row[f"{name}_low"]):
        return f"{row[name]:+.2f} (one seed)"
    return f"{row[name]:+.2f} [{row[f'{name}_low']:+.2f}, {row[f'{name}_high']:+.2f}]"


def sentences(compared: Sequence[Row], claim: Sequence[Row], tolerance: float) -> Iterator[str]:
    """The verdict: how often the claim holds, the largest gain, and what the published weight does."""
    yes = [row for row in claim if row["reproduced"]]
    where = ", ".join(f"code {row['latent']} by the {row['probe']} probe" for row in yes)
    yield (
        f"At equal reconstruction error (within {tolerance:g}%) accuracy differs by more than the seeds do in "
        f"{len(yes)} of {len(claim)} cases{': ' + where if where else ''}."
    )
    best = max(yes or claim, key=lambda row: row["test_gain"])
    linear = best["linear_gain"]
    yield (
        f"Code {best['latent']}, {best['probe']} probe, weight {best['weight']:g}: reconstruction error "
        f"{with_interval(best, 'test_excess')}%, accuracy {best['unguided_accuracy']:.1f} to {best['accuracy']:.1f}%, "
        f"{with_interval(best, 'test_gain')} points; over shuffled labels {with_interval(best, 'over_control')}, exact "
        f"linear frontier at that cost {f'{linear:+.2f}' if math.isfinite(linear) else 'not measured'}."
    )
    published = [row for row in compared if (row["weight"], row["labels"]) == (PUBLISHED_WEIGHT, _TRUE)]
    if published:
        costs, gains = ([row[name] for row in published] for name in ("test_excess", "test_gain"))
        yield (
            f"The published weight {PUBLISHED_WEIGHT:g} costs {min(costs):+.1f} to {max(costs):+.1f}% of "
            f"reconstruction error and gains {min(gains):+.1f} to {max(gains):+.1f} points."
        )


def trade_off_figure(networks: pd.DataFrame, linear: Sequence[Row], probe: str, tolerance: float) -> Figure:
    """Accuracy against cost in reconstruction error, a panel for each code size.

    Small points are networks, lines join the means over seeds of one weight.
    """
    latents = sorted(networks.latent.unique())
    columns = min(len(latents), 4)
    lines = math.ceil(len(latents) / columns)
    figure, grid = panels(lines, columns, width=max(0.85 * COLUMN_WIDTH, 5.2 / columns), height=2.6)
    for axis, latent in zip(grid.ravel(), latents, strict=False):
        _trade_off(axis, networks, linear_frontier(linear, probe, latent), probe, latent, tolerance)
        axis.set_title(f"code of {latent}", fontsize=8)
    for axis in grid.ravel()[len(latents) :]:
        axis.set_visible(False)
    for axis in grid[-1]:
        axis.set_xlabel("reconstruction error over unguided [%]")
    for axis in grid[:, 0]:
        axis.set_ylabel(f"test accuracy, {probe} probe [%]")
    legend_below(figure, grid[0, 0], 2)
    return figure


def _trade_off(
    axis: Axes,
    networks: pd.DataFrame,
    frontier: tuple[np.ndarray, np.ndarray],
    probe: str,
    latent: int,
    tolerance: float,
) -> None:
    base = series(networks, probe, latent, _TRUE, 0.0).test
    reach = tolerance
    for labels, name, color, style in _CURVES:
        means = [(0.0, base.mean())]
        own = networks[(networks.latent == latent) & (networks.labels == labels) & (networks.weight > 0)]
        for weight in sorted(own.weight.unique()):
            guided, unguided = pair(networks, probe, latent, (labels, weight), (labels, 0.0))
            if guided.empty:
                continue
            cost = excess_percent(guided.test_error.to_numpy(), unguided.test_error.to_numpy())
            axis.plot(cost, guided.test, style[0], color=color, markersize=2.5, alpha=0.4, markeredgewidth=0)
            means.append((float(cost.mean()), float(guided.test.mean())))
            reach = max(reach, float(cost.max()))
        if len(means) > 1:
            axis.plot(*zip(*means, strict=True), style, color=color, markersize=4, label=name)
    axis.plot(np.zeros(len(base)), base, "o", color="black", markersize=2.5, alpha=0.5, markeredgewidth=0)
    axis.plot(0.0, base.mean(), "o", color="black", markersize=4.5, label="not guided", zorder=4)
    cost, accuracy = frontier
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


def latent_figure(networks: pd.DataFrame, claim: Sequence[Row], probe: str) -> Figure:
    """Reconstruction error and accuracy against the size of the code, unguided and at the chosen weight."""
    figure, axes = panels(1, 2, width=0.95 * COLUMN_WIDTH, height=2.5)
    chosen = {row["latent"]: row["weight"] for row in claim if row["probe"] == probe}
    heads = {"test_error": "test reconstruction error\n(mean image: 1)", "test": f"test accuracy, {probe} probe [%]"}
    # Side by side, for their ranges overlap.
    kinds = zip((0.96, 1.0, 1.04), (("", "not guided", "black", "o-"), *_CURVES), strict=True)
    for shift, (labels, name, color, style) in kinds:
        found = {k: series(networks, probe, k, labels or _TRUE, w if labels else 0.0) for k, w in chosen.items()}
        found = {latent: one for latent, one in found.items() if len(one)}
        for axis, column in zip(axes[0], heads, strict=True):
            spread = np.array([[one[column].min(), one[column].mean(), one[column].max()] for one in found.values()])
            if len(spread):
                bars = np.abs(spread[:, [0, 2]] - spread[:, [1]]).T
                x = [shift * latent for latent in found]
                axis.errorbar(x, spread[:, 1], bars, fmt=style, color=color, markersize=3.5, label=name)
    for axis, label in zip(axes[0], heads.values(), strict=True):
        axis.set_xscale("log")
        axis.set_xticks(list(chosen), [str(k) for k in chosen])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("size of the code")
        axis.set_ylabel(label)
    legend_below(figure, axes[0, 0], 3)
    return figure
