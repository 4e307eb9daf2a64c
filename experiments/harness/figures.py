"""How figures look: one size grid, one colour-blind-safe palette, labelled axes. Drawn without global state."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

Share = bool | Literal["none", "all", "row", "col"]
COLUMN_WIDTH = 3.35
"""Width of a paper's column in inches; figures are readable at multiples of it."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's colour-blind-safe colours, for categories."""
# Values of a per-patch normalised image that are drawn black and white: nearly all lie between.
_NORMALISED_RANGE = (-2.5, 2.5)
# What hidden pixels are painted with: a colour that grey images do not have.
_PAINT = np.array([0.74, 0.85, 0.93])
# Of captions.
_LETTERS_PER_INCH = 21
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


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a reconstruction figure.

    Attributes:
        title: what the images are.
        images: [images, h, w, c].
        low, high: the values drawn black and white.
        hidden: [images, h, w] pixels that are not shown but painted over, or None.
    """

    title: str
    images: np.ndarray
    low: float
    high: float
    hidden: np.ndarray | None = None

    @classmethod
    def pixels(cls, title: str, images: np.ndarray, like: np.ndarray, hidden: np.ndarray | None = None) -> Column:
        """Images in stored units, drawn from the smallest to the largest value of the images ``like``."""
        return cls(title, images, float(like.min()), float(like.max()), hidden)

    @classmethod
    def normalised(cls, title: str, images: np.ndarray) -> Column:
        """Images of which each patch has mean 0 and variance 1: grey is the mean of the patch."""
        return cls(title, images, *_NORMALISED_RANGE)

    def drawn(self) -> np.ndarray:
        """[images, h, w, 3] in 0..1."""
        shown = np.clip((self.images.astype(np.float64) - self.low) / max(self.high - self.low, 1e-12), 0, 1)
        # Of other numbers of channels than 3 the first is drawn, in grey.
        shown = shown if shown.shape[-1] == 3 else np.repeat(shown[..., :1], 3, axis=-1)
        return shown if self.hidden is None else np.where(self.hidden[..., None], _PAINT, shown)


def picture_figure(columns: Sequence[Column], caption: str) -> Figure:
    """Images in rows, what was done to them in columns, and a caption that says what is shown."""
    rows, width = len(columns[0].images), max(1.05 * len(columns), 3.35)
    figure, axes = panels(rows, len(columns), width=width / len(columns), height=0.85)
    for j, column in enumerate(columns):
        for i, image in enumerate(column.drawn()):
            axes[i, j].imshow(image, interpolation="nearest")
            axes[i, j].set_axis_off()
        axes[0, j].set_title(column.title, fontsize=7)
    text = textwrap.fill(caption, round(_LETTERS_PER_INCH * width))
    figure.supxlabel(text, fontsize=6.5)
    # Room for titles and caption.
    figure.set_size_inches(width, figure.get_size_inches()[1] + 0.12 * (3 + text.count("\n")))
    return figure


def training_figure(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], levels: Mapping[str, float], images_per_step: int
) -> Figure:
    """Training loss, online probe accuracy and other online measurements against the images seen.

    Args:
        records: lines of metrics.jsonl: "step" and values, a number or a list with one number per member.
        names: of the members.
        levels: baselines of the online probe, drawn as horizontal lines: accuracy by name.
        images_per_step: images of a step, which turns steps into images seen.
    """
    series = _series(records)
    wanted = [("loss", "training loss"), ("probe_accuracy", "online ridge probe,\nvalidation accuracy [%]")]
    wanted += [("rankme", "effective rank (RankMe)\nof validation features")]
    shown = [(name, label) for name, label in wanted if name in series]
    figure, axes = panels(1, len(shown), width=2.5, height=2.2)
    colors = PALETTE if len(names) <= len(PALETTE) else ordered_colors(len(names))
    for panel, (name, label) in zip(axes[0], shown, strict=True):
        steps, values = series[name]
        factor = 100.0 if name == "probe_accuracy" else 1.0
        for j in range(values.shape[1]):
            title = names[j] if values.shape[1] == len(names) else name
            # A marker: a short run has a single measurement.
            marker = "" if name == "loss" else "."
            panel.plot(steps * images_per_step, factor * values[:, j], marker=marker, color=colors[j], label=title)
        panel.set(xlabel="images seen", ylabel=label)
        if name == "loss" and np.nanmin(values) > 0:
            panel.set_yscale("log")
        if name == "probe_accuracy":
            dashes = itertools.cycle([(4, 2), (1, 1), (4, 1, 1, 1), (1, 0)])
            for (baseline, accuracy), dash in zip(levels.items(), dashes, strict=False):
                panel.axhline(100.0 * accuracy, color="0.35", linestyle=(0, dash), linewidth=1.0, label=baseline)
    handles, labels = [], []
    for panel in axes[0]:
        for handle, text in zip(*panel.get_legend_handles_labels(), strict=True):
            if text not in labels:
                handles.append(handle)
                labels.append(text)
    figure.legend(handles, labels, loc="outside right center", fontsize=6, frameon=False)
    return figure


def _series(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps [n] and values [n, members] by name."""
    found: dict[str, tuple[list[int], list[np.ndarray]]] = {}
    for record in records:
        for name, value in record.items():
            if name in ("step", "seconds") or isinstance(value, str):
                continue
            steps, values = found.setdefault(name, ([], []))
            steps.append(int(record["step"]))
            # What is not finite was written as null.
            numbers = value if isinstance(value, list) else [value]
            values.append(np.array([np.nan if number is None else number for number in numbers]))
    return {name: (np.array(steps), np.stack(values)) for name, (steps, values) in found.items()}


def accuracy_figure(reported: pd.DataFrame, chance: float) -> Figure:
    """Test accuracy of every probe on every kind of features; bars are means over networks, dots the networks.

    Args:
        reported: rows with ``compared_as``, ``probe`` ("none" for whole networks trained with labels) and
            ``accuracy_test``.
        chance: accuracy of always naming the most frequent class.
    """
    frozen, whole = reported[reported.probe != "none"], reported[reported.probe == "none"]
    probes, names = list(frozen.probe.unique()), list(frozen.compared_as.unique())
    ends = list(whole.compared_as.unique())
    groups = len(probes) + bool(ends)
    figure, axes = panels(1, 1, width=max(3.35, 1.9 + 1.4 * groups), height=2.5)
    panel, width = axes[0, 0], 0.8 / len(names)

    def bar(x: float, values: pd.Series, width: float, **style: Any) -> None:
        panel.bar(x, 100.0 * values.mean(), width=width, **style)
        if len(values) > 1:
            panel.plot(np.full(len(values), x), 100.0 * values, ".", color="black", markersize=2.5)

    for i, name in enumerate(names):
        for j, probe in enumerate(probes):
            values = frozen.accuracy_test[(frozen.compared_as == name) & (frozen.probe == probe)]
            label = name if j == 0 else None
            bar(
                j + (i - (len(names) - 1) / 2) * width,
                values,
                0.92 * width,
                color=PALETTE[i % len(PALETTE)],
                label=label,
            )
    for i, name in enumerate(ends):
        x, hatch = len(probes) + (i - (len(ends) - 1) / 2) * 0.3, ("///", "...", "xxx")[i % 3]
        bar(x, whole.accuracy_test[whole.compared_as == name], 0.27, color="0.75", hatch=hatch, label=name)
    panel.axhline(100.0 * chance, color="0.35", linestyle=":", linewidth=1.0, label="most frequent class")
    panel.set_xticks(range(groups), [f"{name} probe" for name in probes] + ["whole network\ntrained"] * bool(ends))
    panel.grid(False, axis="x")
    panel.set_ylabel("test accuracy [%]")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", fontsize=6, frameon=False)
    return figure
