"""Figures of the learning dynamics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation

from experiments.harness.figures import PALETTE, legend_below, ordered_colors, panels
from experiments.learning_dynamics.analysis import Cell
from experiments.learning_dynamics.half_time_laws import Law
from experiments.learning_dynamics.learners import Learner
from experiments.learning_dynamics.scene import GROUPS
from experiments.learning_dynamics.spectrum import Images

_NAMES = {
    Learner.linear_descent: "linear, gradient descent",
    Learner.linear_adamw: "linear, AdamW",
    Learner.mlp_adamw: "MLP, AdamW",
    Learner.mlp_momentum: "MLP, momentum",
    Learner.conv_adamw: "convolutional, AdamW",
    Learner.conv_momentum: "convolutional, momentum",
}


def residual_figure(cells: Sequence[Cell], title: str) -> Figure:
    """Residual of each direction over steps, mean over seeds, dark to light from the largest eigenvalue on."""
    figure, axes = panels(1, len(cells), width=2.1, height=2.2, sharey=True)
    norm = LogNorm(1, max(len(cell.arrays["eigenvalue"]) for cell in cells))
    for axis, cell in zip(axes[0], cells, strict=True):
        residual = cell.arrays["residual"].mean(0)
        for i, color in enumerate(_by_norm(norm, np.arange(1, residual.shape[1] + 1))):
            axis.plot(_shifted(cell), residual[:, i], color=color, lw=0.7)
        axis.axhline(0.5, color="0.4", lw=0.7, ls="--")
        axis.set_title(_NAMES[cell.learner], fontsize=8)
        _steps_axis(axis)
    axes[0, 0].set_ylabel("residual of a direction", fontsize=7)
    axes[0, 0].set_ylim(-0.03, 1.6)
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes[0, -1])
    bar.set_label("direction, by eigenvalue", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=8)
    return figure


def spectrum_figure(cells: Sequence[Cell], latent: int, title: str) -> Figure:
    """Energy of the reconstruction along every direction, early to late dark to light; the data's in black.

    The published figure. Energy alone can be right with the wrong content: residuals are beside it.
    """
    figure, axes = panels(1, len(cells), width=2.1, height=2.3, sharey=True)
    for axis, cell in zip(axes[0], cells, strict=True):
        energy, data = cell.arrays["energy"].mean(0), cell.arrays["data_energy"]
        looks = np.unique(np.linspace(0, len(energy) - 1, 8).round().astype(int))
        rank = np.arange(1, len(data) + 1)
        for look, color in zip(looks, ordered_colors(len(looks)), strict=True):
            # What is not reconstructed at all has no place on a logarithmic axis.
            axis.plot(rank, np.where(energy[look] > 0, energy[look], np.nan), color=color, lw=0.8)
        axis.plot(rank, data, color="black", lw=1.2)
        axis.axvline(latent, color="0.4", lw=0.8, ls="--")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(data[data > 0].min() / 10, data.max() * 3)
        axis.set_title(f"{_NAMES[cell.learner]}\n{cell.arrays['steps'][-1]} steps", fontsize=8)
        axis.set_xlabel("direction, by eigenvalue", fontsize=7)
    axes[0, 0].set_ylabel("energy [normalised pixels, squared]", fontsize=7)
    shades = ordered_colors(8)
    handles = [
        Line2D([], [], color="black", label="images"),
        Line2D([], [], color=shades[0], label="reconstructions before training"),
        Line2D([], [], color=shades[-1], label="after the last step"),
        Line2D([], [], color="0.4", ls="--", label="size of the code"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=8)
    return figure


def half_time_figure(cells: Sequence[Cell], title: str) -> Figure:
    """Half-time against eigenvalue, every seed a point, with the fitted power law and the best exponential one.

    Directions that are not half learned are open triangles at the last step.
    """
    figure, axes = panels(1, len(cells), width=2.1, height=2.3, sharey=False)
    for axis, cell in zip(axes[0], cells, strict=True):
        values = cell.arrays["eigenvalue"]
        _points(axis, cell, [PALETTE[0]] * len(values))
        if cell.laws is not None:
            grid = np.geomspace(values.min(), values.max(), 100)
            power, other = cell.laws.fits[Law.power], cell.laws.fits[Law.exponential]
            axis.plot(grid, np.exp(power.intercept[0] + power.slope[0] * np.log(grid)), color=PALETTE[1], lw=1.2)
            axis.plot(
                grid, np.exp(other.intercept[0] + other.slope[0] * grid / values.max()), color="0.5", lw=1, ls=":"
            )
            text = f"a = {cell.laws.exponent:.2f} ({cell.laws.low:.2f}, {cell.laws.high:.2f})\nR2 {power.r2[0]:.3f}"
            axis.text(0.97, 0.97, text, transform=axis.transAxes, ha="right", va="top", fontsize=7)
        reference = cell.arrays.get("flow_half_time")
        if reference is not None:
            axis.plot(np.tile(values, len(reference)), reference.ravel(), "k+", ms=3)
        axis.set_title(_NAMES[cell.learner], fontsize=8)
        axis.set_xlabel("eigenvalue", fontsize=7)
        _logarithmic(axis)
    axes[0, 0].set_ylabel("half-time [steps]", fontsize=7)
    handles = [
        Line2D([], [], color=PALETTE[1], label="power law"),
        Line2D([], [], color="0.5", ls=":", label="exponential in the eigenvalue"),
        Line2D([], [], color=PALETTE[0], marker="^", ls="none", mfc="none", ms=4, label="later than the last step"),
        Line2D([], [], color="k", marker="+", ls="none", ms=4, label="gradient flow, same start"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=8)
    return figure


def groups_figure(cells: Sequence[Cell], title: str) -> Figure:
    """Residual of groups of directions with a tenth of the variance each (above), loss and probe accuracy (below)."""
    figure, axes = panels(2, len(cells), width=2.1, height=1.9, sharey="row", sharex="col")
    for column, cell in zip(axes.T, cells, strict=True):
        groups = cell.arrays["group_residual"].mean(0)
        for g, color in enumerate(ordered_colors(GROUPS)):
            if np.isfinite(groups[:, g]).all():
                column[0].plot(_shifted(cell), groups[:, g], color=color, label=f"{g + 1}")
        column[0].set_title(_NAMES[cell.learner], fontsize=8)
        for name, label, color in (("test_accuracy", "probe accuracy", PALETTE[1]), ("test_loss", "loss", PALETTE[0])):
            _band(column[1], cell, cell.arrays[name], color, f"{label} (test)")
        _steps_axis(column[1])
    axes[0, 0].set_ylabel("residual", fontsize=7)
    axes[0, 0].set_ylim(-0.03, 1.6)
    axes[1, 0].set_ylim(0.0, 1.2)
    axes[1, 0].set_ylabel("share", fontsize=7)
    legend_below(figure, axes[0, -1], 8, title="above: tenth of variance", loc="outside lower left")
    legend_below(figure, axes[1, -1], 2, title="below", loc="outside lower right")
    figure.suptitle(title, fontsize=8)
    return figure


def frequency_figure(cells: Sequence[Cell], widths: Sequence[float], title: str) -> Figure:
    """Errors by spatial frequency of the image (above) and by response frequency of the map (below): not the same."""
    figure, axes = panels(2, len(cells), width=2.1, height=1.9, sharey=True, sharex="col")
    for column, cell in zip(axes.T, cells, strict=True):
        bands = cell.arrays["band_error"]
        for b, color in enumerate(ordered_colors(bands.shape[-1])):
            _band(column[0], cell, bands[..., b], color, f"{b + 1}")
        for w, (width, color) in enumerate(zip(widths, PALETTE, strict=False)):
            for part, style in (("low", "-"), ("high", "--")):
                _band(
                    column[1], cell, cell.arrays[f"response_{part}_error"][..., w], color, f"{part}, {width:g}", style
                )
        column[0].set_title(_NAMES[cell.learner], fontsize=8)
        _steps_axis(column[1])
        for axis in column:
            axis.axhline(0.5, color="0.4", lw=0.7, ls="--", zorder=0)
    axes[0, 0].set_ylim(-0.03, 1.6)
    axes[0, 0].set_ylabel("error by spatial\nfrequency of the image", fontsize=7)
    axes[1, 0].set_ylabel("error by response\nfrequency of the map", fontsize=7)
    legend_below(figure, axes[0, -1], 8, title="above: radial band, low to high", loc="outside lower left")
    legend_below(figure, axes[1, -1], 8, title="below: part, filter width", loc="outside lower right")
    figure.suptitle(title, fontsize=8)
    return figure


def intervention_figure(cells: Sequence[Cell], title: str) -> Figure:
    """Half-time against eigenvalue under each intervention, coloured by the frequency of the direction."""
    learners = list(dict.fromkeys(cell.learner for cell in cells))
    kinds = [kind for kind in Images if any(cell.images is kind for cell in cells)]
    figure, axes = panels(len(learners), len(kinds), width=1.6, height=1.7)
    frequencies = np.concatenate([cell.arrays["frequency"] for cell in cells])
    norm = Normalize(float(frequencies.min()), float(frequencies.max()))
    by_key = {(cell.learner, cell.images): cell for cell in cells}
    for row, learner in zip(axes, learners, strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            cell = by_key.get((learner, kind))
            if cell is None:
                axis.set_axis_off()
                continue
            _points(axis, cell, _by_norm(norm, cell.arrays["frequency"]))
            _logarithmic(axis)
            if kind is Images.whitened:
                middle = float(cell.arrays["eigenvalue"].mean())
                axis.set_xlim(middle / 10, middle * 10)
                axis.set_ylim(np.nanmin(cell.seen.time) / 3, np.nanmax(cell.seen.time) * 3)
            if learner is learners[0]:
                axis.set_title(kind.value, fontsize=8)
            if learner is learners[-1] or by_key.get((learners[-1], kind)) is None:
                axis.set_xlabel("eigenvalue", fontsize=7)
        row[0].set_ylabel(f"{_NAMES[learner]}\nhalf-time [steps]", fontsize=7)
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, pad=0.01)
    bar.set_label("mean frequency\n[cycles per pixel]", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=8)
    return figure


def set_apart_figure(cells: Sequence[Cell], title: str) -> Figure:
    """Rank correlation of half-time with eigenvalue given frequency, and the other way round, with intervals."""
    learners = list(dict.fromkeys(cell.learner for cell in cells))
    rows = max(sum(cell.learner is x for cell in cells) for x in learners)
    figure, axes = panels(1, len(learners), width=2.3, height=0.9 + 0.3 * rows, sharex=True)
    kinds = [kind for kind in Images if any(cell.images is kind for cell in cells)]
    for axis, learner in zip(axes[0], learners, strict=True):
        for cell in (cell for cell in cells if cell.learner is learner):
            assert cell.ranks is not None
            y = kinds.index(cell.images)
            parts = (
                (cell.ranks.eigenvalue_given, PALETTE[0], "o", -0.14),
                (cell.ranks.frequency_given, PALETTE[1], "s", 0.14),
            )
            for (value, low, high), color, marker, shift in parts:
                if np.isfinite(value):
                    axis.plot([low, high], [y + shift] * 2, color=color, lw=1.2)
                    axis.plot(value, y + shift, marker, color=color, ms=4)
        axis.axvline(0.0, color="0.4", lw=0.8, ls="--", zorder=0)
        axis.set_yticks(
            range(len(kinds)), [kind.value for kind in kinds] if learner is learners[0] else [""] * len(kinds)
        )
        axis.set_ylim(len(kinds) - 0.5, -0.5)
        axis.set_xlim(-1.08, 1.08)
        axis.set_title(_NAMES[learner], fontsize=8)
        axis.set_xlabel("partial rank correlation\nwith half-time", fontsize=7)
    handles = [
        Line2D([], [], color=PALETTE[0], marker="o", ms=4, label="eigenvalue, frequency held fixed"),
        Line2D([], [], color=PALETTE[1], marker="s", ms=4, label="frequency, eigenvalue held fixed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=8)
    return figure


def _points(axis: Axes, cell: Cell, colors: Sequence[Any]) -> None:
    """Half-times of all seeds; censored ones open."""
    values, shade = cell.arrays["eigenvalue"], np.asarray([to_rgba(c) for c in colors])
    for time, censored in zip(*cell.seen, strict=True):
        axis.scatter(values[~censored], time[~censored], s=6, c=shade[~censored], linewidths=0, alpha=0.8)
        axis.scatter(
            values[censored],
            time[censored],
            s=10,
            marker="^",
            facecolors="none",
            edgecolors=list(map(tuple, shade[censored])),
            linewidths=0.6,
        )


def _band(axis: Axes, cell: Cell, curves: np.ndarray, color: Any, label: str, style: str = "-") -> None:
    """Mean over seeds [E, T], and from the least to the greatest of them."""
    x = _shifted(cell)
    axis.plot(x, curves.mean(0), color=color, label=label, ls=style)
    axis.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.2, lw=0)


def _shifted(cell: Cell) -> np.ndarray:
    """Steps for a logarithmic axis: step 0 at 0.5."""
    return np.maximum(cell.arrays["steps"], 0.5)


def _logarithmic(axis: Axes) -> None:
    """Both axes; minor ticks have labels only where there would be none else."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1, 0.5)))
    axis.tick_params(which="both", labelsize=6)


def _steps_axis(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.set_xlabel("step (left end: before training)", fontsize=7)


def _by_norm(norm: Any, values: np.ndarray) -> list[Any]:
    return [tuple(c) for c in matplotlib.colormaps["viridis"](norm(values))]
