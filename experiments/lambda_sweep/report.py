"""Table, figures and sentences of the lambda sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import mae_align as ma
from experiments.harness import figures as plot

Row = dict[str, Any]
# Shortfalls of r2 below this are rounding.
_SAME_R2 = 1e-9


def excess_percent(result: xr.Dataset, name: str = "reconstruction_mse") -> xr.DataArray:
    """Reconstruction error above PCA's at the same k, in percent of it; 0 at lambda = infinity."""
    error = result[name]
    return 100.0 * (error / error.sel(lam_relative=math.inf) - 1.0)


def frontier_weights(excess: np.ndarray, budget: float) -> np.ndarray:
    """How to mix the solved lambdas to spend a budget of reconstruction error.

    Between the two neighbouring points of the trade-off curve the mix is linear; the curve is concave, so that this
    does not flatter.

    Args:
        excess: [lambdas] over PCA's error, lambda ascending, so that it falls to 0 at the end.
        budget: in the same unit.

    Returns:
        [lambdas] weights that sum to 1, on at most two points. All on lambda = 0 where even this end costs less than
        the budget.

    Example:
        >>> frontier_weights(np.array([4.0, 2.0, 0.0]), 1.0).tolist()
        [0.0, 0.5, 0.5]
    """
    weights = np.zeros(len(excess))
    above = np.flatnonzero(excess > budget)
    if not above.size:
        weights[0] = 1.0
        return weights
    # The last point over the budget and the next one, the first within it.
    i = int(above[-1])
    share = (budget - excess[i + 1]) / (excess[i] - excess[i + 1])
    weights[i], weights[i + 1] = share, 1.0 - share
    return weights


def report_rows(result: xr.Dataset, validation: xr.Dataset, budget: float) -> list[Row]:
    """One row per k.

    Args:
        result: fitted on all training images, held-out curves on test images, with the angles of the spans.
        validation: fitted without the validation images, held-out curves on these. budget: percent of PCA's error.

    Returns:
        r2 of PCA; gains of r2 over it for the budget, at the end lambda -> 0+, and at the lambda that is best on the
        validation images, in-sample and on test images with paired standard errors; what the budget costs on test
        images; the shortfall and the angle of the invariance test.
    """
    return [_row(result.sel(k=k), validation.sel(k=k), int(k), budget) for k in result.k.values]


def _row(at: xr.Dataset, validation: xr.Dataset, k: int, budget: float) -> Row:
    spent = frontier_weights(excess_percent(at).values, budget)
    best = int(np.argmax(validation.eval_r2.values))
    only = np.eye(at.sizes["lam_relative"])
    pca = at.sel(lam_relative=math.inf)
    zero = at.sel(lam_relative=0.0)
    return (
        {"k": k, "r2_pca": float(pca.r2), "eval_r2_pca": float(pca.eval_r2)}
        | _gain(at, spent, "budget")
        | _gain(at, only[0], "zero")
        | {"best_lam_relative": float(at.lam_relative[best])}
        | _gain(at, only[best], "best")
        | {
            "shortfall": float(zero.r2 - pca.r2),
            "angle_zero_to_pca": float(zero.angle_largest),
            "depends_on_lambda": float(zero.r2 - pca.r2) > _SAME_R2,
        }
    )


def _gain(at: xr.Dataset, weights: np.ndarray, name: str) -> Row:
    """Gain over PCA of a mix of lambdas, and what it costs in reconstruction error."""
    influence = np.tensordot(weights, at.eval_influence.values, 1) - at.eval_influence.sel(lam_relative=math.inf).values
    return {
        f"{name}_excess_percent": float(weights @ excess_percent(at).values),
        f"{name}_eval_excess_percent": float(weights @ excess_percent(at, "eval_reconstruction_mse").values),
        f"{name}_gain": float(weights @ at.r2.values - at.r2.sel(lam_relative=math.inf)),
        f"{name}_eval_gain": float(weights @ at.eval_r2.values - at.eval_r2.sel(lam_relative=math.inf)),
        f"{name}_eval_gain_se": float(ma.paired_se(influence[:, None])[0]),
    }


def shown(rows: Sequence[Row], budget: float) -> pd.DataFrame:
    """The table of the summary: gains of r2 over PCA at the budget, at the chosen lambda and at the OLS/RRR end."""
    heads = {"budget": f"+{budget:g}%", "best": "chosen", "zero": "0+"}
    table = pd.DataFrame({"k": [row["k"] for row in rows]})
    table["PCA: train"] = [f"{row['r2_pca']:.4f}" for row in rows]
    table["test"] = [f"{row['eval_r2_pca']:.4f}" for row in rows]
    for name, head in heads.items():
        if name == "best":
            table["chosen lambda"] = [f"{row['best_lam_relative']:g}" for row in rows]
        else:
            table[f"{head}: train"] = [f"{row[f'{name}_gain']:+.4f}" for row in rows]
        table[f"{head}: test"] = [_pm(row, name) for row in rows]
        if name != "budget":
            table[f"{head}: costs [%]"] = [f"{row[f'{name}_excess_percent']:.1f}" for row in rows]
    return table


def _pm(row: Row, name: str) -> str:
    return f"{row[f'{name}_eval_gain']:+.4f} +- {row[f'{name}_eval_gain_se']:.4f}"


def _at_k(row: Row, name: str) -> str:
    """The difference on test images in words."""
    if name == "best" and math.isinf(row["best_lam_relative"]):
        return f"k = {row['k']}: PCA itself"
    undetected = abs(row[f"{name}_eval_gain"]) < 2 * row[f"{name}_eval_gain_se"]
    return f"k = {row['k']}: {f'no detectable difference ({_pm(row, name)})' if undetected else _pm(row, name)}"


def verdict(rows: Sequence[Row], budget: float) -> list[str]:
    """Three sentences: what the budget buys, what the chosen lambda does, whether the encoder depends on lambda."""
    depends = [str(row["k"]) for row in rows if row["depends_on_lambda"]]
    others = [str(row["k"]) for row in rows if not row["depends_on_lambda"]]
    parts = [f"depends on lambda at k = {', '.join(depends)}, where PCA falls short of the best r2 of k features"]
    parts = (parts if depends else []) + ([f"does not at k = {', '.join(others)}"] if others else [])
    return [
        f"{budget:g}% more reconstruction error than PCA's buys r2 on test images (+- paired standard error): "
        f"{'; '.join(_at_k(row, 'budget') for row in rows)}.",
        f"The lambda chosen on validation images, against PCA: {'; '.join(_at_k(row, 'best') for row in rows)}.",
        f"The encoder {'; it '.join(parts)}.",
    ]


def trade_off_figure(result: xr.Dataset, budget: float) -> Figure:
    """r2 against reconstruction error above PCA's, one line per k: test images solid, in-sample dashed."""
    figure, axes = plot.panels(1, 1, width=1.6 * plot.COLUMN_WIDTH, height=3.0)
    axis = axes[0, 0]
    excess = excess_percent(result)
    for k, color in zip(result.k.values, plot.ordered_colors(result.sizes["k"]), strict=True):
        x = excess.sel(k=k).values
        for name, style in (("eval_r2", "-"), ("r2", "--")):
            y = result[name].sel(k=k).values
            axis.plot(x, y, style, color=color)
            axis.plot(x[:1], y[:1], "s", x[-1:], y[-1:], "o", color=color, markersize=4, clip_on=False)
    axis.axvline(budget, color="0.5", linewidth=0.8)
    # Linear up to the budget, so that PCA at 0 is in the picture, logarithmic above.
    axis.set_xscale("symlog", linthresh=budget, linscale=1.0)
    axis.set_xlim(left=0.0)
    ticks = [t for t in (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= float(excess.max())]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(f"reconstruction error above PCA's on training images [%]\n(logarithmic from {budget:g})")
    axis.set_ylabel("r2")
    _legend(figure, result, [("-", "test images"), ("--", "in-sample"), ("o", "PCA"), ("s", "OLS / RRR")])
    return figure


def lambda_figure(result: xr.Dataset) -> Figure:
    """Principal angles to PCA and r2 against lambda, one line per k; both ends beside the finite values."""
    figure, axes = plot.panels(1, 2, width=1.15 * plot.COLUMN_WIDTH, height=2.8)
    angles, r2 = axes[0]
    for k, color in zip(result.k.values, plot.ordered_colors(result.sizes["k"]), strict=True):
        at = result.sel(k=k)
        for axis, name, style in (
            (angles, "angle_largest", "-"),
            (angles, "angle_median", ":"),
            (r2, "eval_r2", "-"),
            (r2, "r2", "--"),
        ):
            _over_lambda(axis, at[name], style, color)
    for axis in (angles, r2):
        axis.set_xlabel("lambda tr Sxx / tr Syy")
    angles.set_ylabel("principal angle to PCA [degrees]")
    angles.set_ylim(-2, 92)
    r2.set_ylabel("r2")
    _legend(
        figure,
        result,
        [("-", "largest angle; test r2"), (":", "median angle"), ("--", "in-sample r2"), ("o", "end of lambda")],
    )
    return figure


def _over_lambda(axis: Axes, curve: xr.DataArray, style: str, color: Any) -> None:
    """One curve on a logarithmic axis; 0+ and infinity as markers one decade outside."""
    lam = curve.lam_relative.values
    inner = np.isfinite(lam) & (lam > 0)
    low, high = lam[inner].min() / 10, lam[inner].max() * 10
    axis.plot(lam[inner], curve.values[inner], style, color=color)
    axis.plot([low, high], curve.values[[0, -1]], "o", color=color, markersize=3)
    axis.set_xscale("log")
    decades = 10.0 ** np.arange(math.ceil(math.log10(low)) + 1, math.floor(math.log10(high)), 2)
    axis.set_xticks([low, *decades, high], ["0+", *(f"{d:g}" for d in decades), "inf"])
    axis.set_xticks([], minor=True)


def _legend(figure: Figure, result: xr.Dataset, styles: Sequence[tuple[str, str]]) -> None:
    """Colours of k, then what the line styles and markers mean."""
    colors = plot.ordered_colors(result.sizes["k"])
    handles = [Line2D([], [], color=c, label=f"k = {k}") for k, c in zip(result.k.values, colors, strict=True)]
    for style, label in styles:
        marker = style in "os"
        handles.append(
            Line2D(
                [],
                [],
                color="black",
                marker=style if marker else "",
                linestyle="none" if marker else style,  # pyright: ignore[reportArgumentType]
                markersize=4,
                label=label,
            )
        )
    figure.legend(handles=handles, loc="outside right center", fontsize=7, frameon=False)
