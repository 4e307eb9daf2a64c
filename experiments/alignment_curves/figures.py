"""Figures of the alignment curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from experiments.alignment_curves.studies import Curve
from experiments.harness.figures import PALETTE, ordered_colors, panels
from mae_align.closed_form.held_out import paired_se

_SCORE = "100 sqrt(alignment) [%]"
_LABEL = 28  # characters of a set's name that fit beside the panels
_BAND = "held-out: solid, band of two standard errors; in-sample: dashed"


def set_figure(curves: Mapping[str, Curve], r2_name: str) -> Figure:
    """Several sets in one figure, in absolute k and in k / d (the published Fig. 2 has both axes).

    Args:
        curves: by label. r2_name: what r2 is, for the axis.

    Returns:
        2 x 2 panels: r2 and 100 sqrt(alignment).
    """
    colors = list(PALETTE) if len(curves) <= len(PALETTE) else ordered_colors(len(curves))
    named = {label if len(label) <= _LABEL else f"...{label[-_LABEL:]}": curve for label, curve in curves.items()}
    return _both_axes(named if len(named) == len(curves) else curves, colors, r2_name)


def resolution_figure(curves: Mapping[int, Curve], shape: Sequence[int], r2_name: str) -> Figure:
    """One curve per pooling factor; as :func:`set_figure`.

    Args:
        curves: by factor. shape: of the unpooled image. r2_name: for the axis.

    Returns:
        2 x 2 panels.
    """
    named = {f"{shape[0] // f} x {shape[1] // f} pixels": curve for f, curve in curves.items()}
    return _both_axes(named, ordered_colors(len(named)), r2_name)


def _both_axes(curves: Mapping[str, Curve], colors: Sequence, r2_name: str) -> Figure:
    figure, axes = panels(2, 2, width=2.9, height=2.2, sharey="row")
    for column, as_share in ((0, False), (1, True)):
        for (label, curve), color in zip(curves.items(), colors, strict=False):
            k = np.arange(1, len(curve.r2) + 1)
            x = 100.0 * k / int(curve.num_pixels) if as_share else k
            _r2_lines(axes[0, column], x, curve, color, label)
            axes[1, column].plot(x, curve.percent, color=color, label=label)
        for panel in axes[:, column]:
            if as_share:
                panel.set_xlabel("share of features k / d [%]")
            else:
                _log_k(panel)
    axes[0, 0].set_ylabel(r2_name)
    axes[1, 0].set_ylabel(f"{_SCORE}\n(in-sample)")
    _floor(axes[0, 0], [curve.eval_r2 for curve in curves.values()])
    axes[0, 0].set_title(_BAND, fontsize=6.5, loc="left")
    _legend(figure, axes[1, 0])
    return figure


def class_figure(curves: Mapping[tuple[int, int], Curve], ks: Sequence[int], r2_name: str) -> Figure:
    """Means over random class subsets with bands of one standard deviation between subsets.

    Args:
        curves: by (order, count). ks: numbers of features for the right panel. r2_name: for the axis.

    Returns:
        Three panels: held-out r2 and 100 sqrt(alignment) against k, held-out r2 against the number of classes.
    """
    orders = sorted({order for order, _ in curves})
    counts = sorted({count for _, count in curves})
    figure, axes = panels(1, 3, width=2.5, height=2.3)
    left, middle, right = axes[0]
    means, highest = [], 0.0
    for count, color in zip(counts, ordered_colors(len(counts)), strict=True):
        group = [curves[order, count] for order in orders]
        length = min(len(curve.r2) for curve in group)
        k = np.arange(1, length + 1)
        for panel, values in (
            (left, np.stack([curve.eval_r2[:length] for curve in group])),
            (middle, np.stack([curve.percent[:length] for curve in group])),
        ):
            mean, spread = values.mean(0), values.std(0, ddof=min(1, len(group) - 1))
            panel.plot(k, mean, color=color, label=f"{count} classes")
            panel.fill_between(k, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
            if panel is left:
                means.append(mean)
                # Beyond the best k, the spread of an overfitted probe has no bounds.
                highest = max(highest, float((mean + spread)[: int(mean.argmax()) + 1].max()))
    for k, color in zip((k for k in ks if all(k <= len(c.r2) for c in curves.values())), PALETTE, strict=False):
        values = np.array([[curves[order, count].eval_r2[k - 1] for count in counts] for order in orders])
        right.plot(np.tile(counts, (len(orders), 1)), values, ".", color=color, markersize=3, alpha=0.6)
        right.plot(counts, values.mean(0), color=color, label=f"k = {k}")
        limited = np.array(counts) - 1 > k
        right.plot(np.array(counts)[limited], values.mean(0)[limited], "o", color=color, mfc="white", markersize=4)
    _log_k(left)
    _log_k(middle)
    _floor(left, means)
    left.set_ylim(top=1.05 * highest)
    left.set_ylabel(_held_out_name(r2_name))
    left.set_title("mean and spread of random subsets", fontsize=6.5, loc="left")
    middle.set_ylabel(f"{_SCORE}\n(in-sample)")
    right.set_xscale("log")
    right.set_xticks(counts, [str(c) for c in counts])
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xlabel("number of classes")
    right.set_title("points: subsets; circles: k < classes - 1", fontsize=6.5, loc="left")
    right.set_ylabel(_held_out_name(r2_name))
    right.legend(fontsize=6, frameon=False)
    _legend(figure, left)
    return figure


def background_figure(
    curves: Mapping[float, Curve],
    changes: Mapping[int, tuple[np.ndarray, np.ndarray]],
    examples: np.ndarray,
    r2_name: str,
) -> Figure:
    """The same glyphs over backgrounds of growing contrast.

    Args:
        curves: by contrast, the reference first. changes: by k, difference of held-out r2 to the reference and its
            standard error, both [contrasts]. examples: [contrasts, images, h, w, c] uint8. r2_name: for the axis.

    Returns:
        2 x 3 panels: examples, held-out r2 and 100 sqrt(alignment) against k; change of r2, r2 relative to its best
        and features needed against contrast.
    """
    figure, axes = panels(2, 3, width=2.5, height=2.2)
    contrasts = list(curves)
    _montage(axes[0, 0], examples, contrasts)
    for (contrast, curve), color in zip(curves.items(), ordered_colors(len(curves)), strict=True):
        k = np.arange(1, len(curve.r2) + 1)
        _held_out_line(axes[0, 1], k, curve, color, f"contrast {contrast:g}")
        axes[0, 2].plot(k, curve.percent, color=color)
    for panel in axes[0, 1:]:
        _log_k(panel)
    _floor(axes[0, 1], [curve.eval_r2 for curve in curves.values()])
    axes[0, 1].set_ylabel(_held_out_name(r2_name))
    axes[0, 2].set_ylabel(f"{_SCORE}\n(in-sample)")
    for (k, (change, se)), color in zip(changes.items(), PALETTE, strict=False):
        shares = [curve.eval_share() for curve in curves.values()]
        share = np.array([values[k - 1] for values, _ in shares])
        share_se = np.array([paired_se(influence)[k - 1] for _, influence in shares])
        _points(axes[1, 0], contrasts, change, se, color, f"k = {k}")
        _points(axes[1, 1], contrasts, share, share_se, color, f"k = {k}")
    axes[1, 0].axhline(0.0, color="0.5", linewidth=0.8)
    axes[1, 0].set_ylabel(f"change of held-out r2\nagainst contrast {contrasts[0]:g}")
    axes[1, 1].set_ylabel("held-out r2 over\nits best over k")
    axes[1, 0].legend(fontsize=6.5, frameon=False)
    axes[1, 2].plot(contrasts, [curve.eval_k90 for curve in curves.values()], "o-", color="black", markersize=3)
    axes[1, 2].plot(contrasts, [curve.k90 for curve in curves.values()], "s--", color="0.5", markersize=3)
    axes[1, 2].legend(["held-out, of its best", "in-sample, of full rank"], fontsize=6.5, frameon=False)
    axes[1, 2].set_ylabel("k that reaches 90% of r2")
    axes[1, 2].set_ylim(bottom=0)
    for panel in axes[1]:
        panel.set_xlabel("contrast of the background")
    figure.supxlabel("bands and bars: two standard errors", fontsize=7)
    _legend(figure, axes[0, 1])
    return figure


def _montage(panel: Axes, examples: np.ndarray, contrasts: Sequence[Any]) -> None:
    """Examples as one picture: a column per contrast."""
    count, rows, h, w, c = examples.shape
    tiles = np.pad(examples, ((0, 0), (0, 0), (1, 0), (1, 0), (0, 0)), constant_values=255)
    picture = tiles.transpose(1, 2, 0, 3, 4).reshape(rows * (h + 1), count * (w + 1), c)
    panel.imshow(picture[..., 0] if c == 1 else picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.set_yticks([])
    panel.set_xticks((np.arange(count) + 0.5) * (w + 1), [f"{contrast:g}" for contrast in contrasts])
    panel.tick_params(length=0)
    panel.set_xlabel("contrast of the background")


def _points(panel: Axes, x: Sequence[float], y: np.ndarray, se: np.ndarray, color: Any, label: str) -> None:
    panel.errorbar(x, y, 2 * se, color=color, capsize=2, marker="o", markersize=3, linewidth=1, label=label)


def _r2_lines(panel: Axes, x: np.ndarray, curve: Curve, color: Any, label: str) -> None:
    _held_out_line(panel, x, curve, color, label)
    panel.plot(x, curve.r2, "--", color=color, linewidth=0.8)


def _held_out_line(panel: Axes, x: np.ndarray, curve: Curve, color: Any, label: str) -> None:
    panel.plot(x, curve.eval_r2, color=color, label=label)
    if not np.isnan(curve.eval_r2_se).any():
        low, high = curve.eval_r2 - 2 * curve.eval_r2_se, curve.eval_r2 + 2 * curve.eval_r2_se
        panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _held_out_name(r2_name: str) -> str:
    """Without the explanation, for small panels."""
    return r2_name.partition(":")[0] + ", held-out"


def _log_k(panel: Axes) -> None:
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(numticks=10))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("number of features k")


def _floor(panel: Axes, curves: Sequence[np.ndarray]) -> None:
    """Cut far below zero, where an overfitted probe does worse than the mean."""
    if min(float(curve.min()) for curve in curves) < -0.1:
        panel.set_ylim(bottom=-0.1)


def _legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, frameon=False)
