"""Figures of the training experiments: curves while training, reconstructions, accuracy beside its baselines."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.figures import PALETTE, ordered_colors, panels

# Values of a per-patch normalised image that are drawn black and white: nearly all lie between.
_NORMALISED_RANGE = (-2.5, 2.5)
# What hidden pixels are painted with: a colour that grey images do not have.
_PAINT = np.array([0.74, 0.85, 0.93])
# Of captions.
_LETTERS_PER_INCH = 21


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


def accuracy_figure(
    table: Mapping[str, Mapping[str, np.ndarray]], ends: Mapping[str, np.ndarray], chance: float
) -> Figure:
    """Test accuracy of every probe on every kind of features; bars are means over networks, dots the networks.

    Args:
        table: accuracies [networks] by kind of features and probe. ends: accuracies [networks] of whole networks that
            were trained with labels, by how. chance: accuracy of always naming the most frequent class.
    """
    probes = list(dict.fromkeys(probe for by_probe in table.values() for probe in by_probe))
    groups = len(probes) + (1 if ends else 0)
    figure, axes = panels(1, 1, width=max(3.35, 1.9 + 1.4 * groups), height=2.5)
    panel = axes[0, 0]
    width = 0.8 / len(table)
    for i, (name, by_probe) in enumerate(table.items()):
        x = np.arange(len(probes)) + (i - (len(table) - 1) / 2) * width
        values = [100.0 * by_probe[probe] for probe in probes]
        means = [v.mean() for v in values]
        panel.bar(x, means, width=0.92 * width, color=PALETTE[i % len(PALETTE)], label=name)
        _dots(panel, x, values)
    for i, (name, accuracies) in enumerate(ends.items()):
        x = np.array([len(probes) + (i - (len(ends) - 1) / 2) * 0.3])
        panel.bar(
            x, [100.0 * accuracies.mean()], width=0.27, color="0.75", hatch=("///", "...", "xxx")[i % 3], label=name
        )
        _dots(panel, x, [100.0 * accuracies])
    panel.axhline(100.0 * chance, color="0.35", linestyle=":", linewidth=1.0, label="most frequent class")
    panel.set_xticks(range(groups), [f"{name} probe" for name in probes] + (["whole network\ntrained"] if ends else []))
    panel.grid(False, axis="x")
    panel.set_ylabel("test accuracy [%]")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", fontsize=6, frameon=False)
    return figure


def _dots(panel: Axes, x: np.ndarray, values: Sequence[np.ndarray]) -> None:
    """The networks of each bar, where there are several."""
    for position, networks in zip(x, values, strict=True):
        if len(networks) > 1:
            panel.plot(np.full(len(networks), position), networks, ".", color="black", markersize=2.5)
