"""Figures of predicted against observed gains, and of predictors side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.alignment_vs_probe.agreement import Panel, gains
from experiments.alignment_vs_probe.predictors import OURS, Agreement
from experiments.harness.figures import PALETTE, panels

_MARKERS = ("o", "^", "s", "D", "v", "P")


def gain_figure(by_objective: Mapping[str, Panel], *, title: str = "") -> Figure:
    """Predicted gain across, observed gain up, a point per task, patch size and mask ratio over the lowest.

    Colour is the patch size, the marker the training objective; faint lines join the mask ratios of a task in their
    order, from the lowest at the origin. Each axis has its own scale. On the dashed line the gains are equal; it is
    left out where one is over four times the other, since it would run along an axis.

    Args:
        by_objective: panels by name of the training objective.
        title: above the axes.

    Returns:
        The figure, one column wide.

    Example:
        >>> y = np.random.default_rng(0).normal(size=(5, 2, 4, 3))
        >>> panel = Panel(tuple("abcde"), ("x",) * 5, (2, 4), (0.2, 0.4, 0.6, 0.8), y, y.mean(3), {})
        >>> len(gain_figure({"matched": panel}).axes[0].collections)
        2
    """
    figure, axes = panels(1, 1, width=3.35, height=3.1)
    axis: Axes = axes[0, 0]
    sizes = sorted({size for panel in by_objective.values() for size in panel.patch_sizes})
    color = {size: PALETTE[i % len(PALETTE)] for i, size in enumerate(sizes)}
    largest = np.zeros(2)
    for marker, panel in zip(_cycled(_MARKERS, len(by_objective)), by_objective.values(), strict=True):
        predicted, observed = 100 * gains(panel.predicted), 100 * gains(panel.scores)
        for j, size in enumerate(panel.patch_sizes):
            for i in range(len(panel.tasks)):
                there = np.isfinite(predicted[i, j]) & np.isfinite(observed[i, j])
                x, y = np.append(0.0, predicted[i, j][there]), np.append(0.0, observed[i, j][there])
                axis.plot(x, y, color=color[size], alpha=0.22, lw=0.6, zorder=1)
            x, y = predicted[:, j].ravel(), observed[:, j].ravel()
            axis.scatter(x, y, s=11, marker=marker, color=color[size], alpha=0.75, linewidths=0, zorder=2)
            largest = np.fmax(largest, [np.nanmax(np.abs(x), initial=0), np.nanmax(np.abs(y), initial=0)])
    axis.axhline(0.0, color="0.6", lw=0.6, zorder=0)
    axis.axvline(0.0, color="0.6", lw=0.6, zorder=0)
    equal = min(largest) > max(largest) / 4
    if equal:
        axis.axline((0.0, 0.0), slope=1.0, color="0.4", lw=0.8, ls="--", zorder=0)
    axis.set_xlabel("predicted gain: closed form, r2 [points]")
    axis.set_ylabel("observed gain: probe, r2 [points]")
    handles = [_key(color[size], "o", f"{size}x{size} patches") for size in sizes]
    if len(by_objective) > 1:
        markers = _cycled(_MARKERS, len(by_objective))
        handles += [_key("0.35", m, f"{name} loss") for m, name in zip(markers, by_objective, strict=True)]
    handles.append(Line2D([], [], color="0.35", alpha=0.5, lw=0.8, label="a task, from the\nlowest mask ratio on"))
    if equal:
        handles.append(Line2D([], [], color="0.4", lw=0.8, ls="--", label="observed = predicted"))
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=7, frameon=False)
    if title:
        axis.set_title(title, fontsize=8)
    return figure


def _cycled(values: Sequence[str], count: int) -> list[str]:
    return [values[i % len(values)] for i in range(count)]


def _key(color: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, ls="none", markersize=4.5, label=label)


def forest_figure(groups: Mapping[str, Sequence[Agreement]], *, label: str, level: float = 0.95) -> Figure:
    """Statistic and interval of every predictor, a block of rows per group; ours on top of each, filled.

    Args:
        groups: what was compared, by name (data set, objective).
        label: of the horizontal axis, the statistic.
        level: of the intervals, for the axis.

    Returns:
        The figure, one column wide; p of the permuted tasks stands beside ours.

    Example:
        >>> a = Agreement(OURS, 0.5, 0.2, 0.7, 0.01, 0.02, 0.1, 0, 0, 0, 1, 9, 18, 0, 0, 0, 99, 99)
        >>> len(forest_figure({"digits, matched": [a]}, label="correlation").axes[0].get_yticklabels())
        1
    """
    rows = sum(len(found) + 1 for found in groups.values())
    figure, axes = panels(1, 1, width=3.35, height=0.7 + 0.19 * rows)
    axis: Axes = axes[0, 0]
    ticks: list[float] = []
    names: list[str] = []
    y = 0.0
    for i, (group, found) in enumerate(groups.items()):
        # On white, for it may cross the line at 0.
        around = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axis.text(-1.02, y, group, fontsize=7, fontweight="bold", va="center", bbox=around)
        y += 1
        for one in found:
            ours = one.predictor == OURS
            color = PALETTE[0] if ours else "0.35"
            axis.plot([one.low, one.high], [y, y], color=color, lw=1.6 if ours else 1.0, solid_capstyle="butt")
            face = color if ours else "white"
            axis.plot(one.value, y, "o", color=color, markerfacecolor=face, markersize=4.5 if ours else 4)
            if not np.isfinite(one.value):
                axis.text(0.0, y, "not defined", fontsize=6, color=color, va="center", ha="center")
            elif np.isfinite(one.p_tasks):
                right = max(one.value, one.high if np.isfinite(one.high) else one.value)
                at, side = (right + 0.04, "left") if right < 0.6 else (min(one.value, one.low) - 0.04, "right")
                axis.text(at, y, _p_text(one.p_tasks), fontsize=6, color=color, va="center", ha=side)
            ticks.append(y)
            names.append(one.predictor)
            y += 1
        if i + 1 < len(groups):
            axis.axhline(y - 0.5, color="0.85", lw=0.6)
    axis.axvline(0.0, color="0.4", lw=0.8, ls="--", zorder=0)
    axis.set_yticks(ticks, names)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.set_ylim(y - 0.4, -0.7)
    axis.set_xlim(-1.05, 1.05)
    axis.set_xticks([-1.0, -0.5, 0.0, 0.5, 1.0])
    # Long labels: the axis is only half of the figure.
    axis.set_xlabel(f"{label}\n({100 * level:g}% interval; p: tasks permuted)", fontsize=7)
    return figure


def _p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
