"""Figures of the check of Theorem 2."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.figures import COLUMN_WIDTH, PALETTE, ordered_colors, panels
from experiments.theorem2_check.networks import Decoder


def components(frame: pd.DataFrame) -> list[str]:
    """Columns of r2, one for each principal component."""
    return [name for name in frame.columns if name.startswith("r2_")]


def means(frame: pd.DataFrame, decoder: Decoder, lam: float, width: int) -> pd.DataFrame:
    """Means over seeds of an ensemble's networks, by step."""
    of = frame.loc[(frame.decoder == decoder.value) & (frame.lam == lam) & (frame.width == width)]
    return of.drop(columns="decoder").groupby("step").mean()


def component_figure(frame: pd.DataFrame, early: float) -> Figure:
    """R^2 of every principal component over training, widest network: linear decoder beside a nonlinear one."""
    width, names = int(frame.width.max()), components(frame)
    k = len(names)
    figure, axes = panels(1, 2, width=0.95 * COLUMN_WIDTH, height=2.5, sharey=True)
    for axis, decoder in zip(axes[0], Decoder, strict=True):
        course = means(frame, decoder, math.inf, width)
        if course.empty:
            continue
        named = {0, 1, k // 4, k // 2, k - 1}
        for i, color in enumerate(ordered_colors(k)):
            label = f"component {i + 1}" if i in named else None
            axis.plot(course.index, course[names[i]], color=color, lw=1.0, label=label)
        axis.axvline(early * course.index[-1], color="0.5", lw=0.8, ls=":", label="early")
        _over_steps(axis, int(course.index[-1]))
        axis.set_title(f"{decoder.value} decoder, width {width}", fontsize=8)
    axes[0, 0].set_ylabel("R2 of a principal component\nfrom the code")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, frameon=False)
    return figure


def convergence_figure(frame: pd.DataFrame) -> Figure:
    """Excess over PCA's loss and median angle over training, by width; losses at finite lambda between their minima."""
    finite = sorted(lam for lam in frame.lam.unique() if not math.isinf(lam))
    widths = sorted(frame.width.unique())
    figure, axes = panels(1, 2 + len(finite), width=0.85 * COLUMN_WIDTH, height=2.6)
    for width, color in zip(widths, ordered_colors(len(widths)), strict=True):
        for decoder, style in zip(Decoder, ("-", "--"), strict=True):
            course = means(frame, decoder, math.inf, width)
            excess = 100 * (course.codes_loss / course.free_loss - 1)
            label = f"width {width}, {decoder.value} decoder"
            axes[0, 0].plot(course.index, excess, style, color=color, label=label)
            axes[0, 1].plot(course.index, course.angle_median, style, color=color)
        for axis, lam in zip(axes[0, 2:], finite, strict=True):
            course = means(frame, Decoder.linear, lam, width)
            axis.plot(course.index, course.codes_loss, color=color)
    for axis, lam in zip(axes[0, 2:], finite, strict=True):
        one = frame[frame.lam == lam].iloc[0]
        axis.axhline(one.linear_loss, color=PALETTE[1], lw=1.0, ls="-.", label="minimum, Theorem 1")
        axis.axhline(one.free_loss, color="black", lw=1.0, ls=":", label="minimum, free codes")
        axis.set_ylabel(f"loss at lambda = {lam:g}")
        axis.set_title("linear decoder and head", fontsize=8)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("loss of the best linear decoder\nover PCA's [%]")
    axes[0, 1].set_ylabel("median angle to PCA [degrees]")
    for axis in axes[0]:
        _over_steps(axis, int(frame.step.max()))
    found = [axis.get_legend_handles_labels() for axis in (axes[0, 0], *axes[0, 2:3])]
    handles, labels = ([item for part in found for item in part[i]] for i in (0, 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def _over_steps(axis: Axes, last: int) -> None:
    axis.set_xscale("symlog", linthresh=1.0, linscale=0.5)
    ticks = [0, *(10**i for i in range(int(math.log10(last)) + 1))]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(-0.1, 1.1 * last)
    axis.set_xlabel("training step")
