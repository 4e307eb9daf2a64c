"""How figures look: one size grid, one colour-blind-safe palette, labelled axes. Drawn without global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

Share = bool | Literal["none", "all", "row", "col"]
COLUMN_WIDTH = 3.35
"""Width of a paper's column in inches; figures are readable at multiples of it."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's colour-blind-safe colours, for categories."""
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
}


def panels(
    rows: int, columns: int, *, width: float, height: float, sharex: Share = False, sharey: Share = False
) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of axes in the project's style.

    Args:
        rows, columns: of panels. width, height: of one panel, inches. sharex, sharey: as in matplotlib.

    Returns:
        The figure (object interface, Agg canvas) and its axes [rows, columns].

    Example:
        >>> figure, axes = panels(1, 2, width=2.0, height=1.5)
        >>> axes.shape
        (1, 2)
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    return figure, axes


def legend_below(
    figure: Figure, axis: Axes, columns: int, *, title: str | None = None, loc: str = "outside lower center"
) -> None:
    """The legend of an axis under the whole figure, where it hides nothing.

    Args:
        figure: of :func:`panels`. axis: whose labelled artists it names. columns: of the legend.
        title: above it. loc: matplotlib's name of a place outside.

    Example:
        >>> figure, axes = panels(1, 1, width=2.0, height=1.5)
        >>> _ = axes[0, 0].plot([1, 2], label="line")
        >>> legend_below(figure, axes[0, 0], 1)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['line']
    """
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, title=title, loc=loc, ncols=columns, fontsize=7, title_fontsize=7, frameon=False)  # pyright: ignore[reportArgumentType]


def ordered_colors(count: int) -> list[tuple[float, float, float, float]]:
    """Colours for an ordered quantity (mask ratio, contrast): viridis without its palest end.

    Args:
        count: how many.

    Returns:
        RGBA tuples, dark to light.

    Example:
        >>> len(ordered_colors(3))
        3
    """
    return [tuple(c) for c in matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, count))]


def curves_over_k(axes: Axes, k: np.ndarray, curves: np.ndarray, colors: Sequence, labels: Sequence[str]) -> None:
    """Lines against the number of features, on a logarithmic axis.

    Args:
        axes: where. k: [k]. curves: [lines, k]. colors, labels: one per line.

    Example:
        >>> figure, axes = panels(1, 1, width=2.0, height=1.5)
        >>> curves_over_k(axes[0, 0], np.arange(1, 4), np.ones((1, 3)), PALETTE[:1], ["PCA"])
        >>> axes[0, 0].get_xscale()
        'log'
    """
    for curve, color, label in zip(curves, colors, labels, strict=True):
        axes.plot(k, curve, color=color, label=label)
    axes.set_xscale("log")
    # Plain numbers at the powers of ten; an automatic locator drops them on small panels.
    axes.xaxis.set_major_locator(FixedLocator([10.0**i for i in range(int(np.log10(max(k))) + 1)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("number of features k")
