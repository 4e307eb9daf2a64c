"""Probes of masked autoencoders over training beside the closed form: rows, agreement, figure and plain sentences."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata

from experiments.harness.figures import PALETTE, ordered_colors, panels
from experiments.harness.statistics import p_value, pearson, shuffled_within

MEASURES = ("accuracy", "r2")
"""Scores of the probes."""
# The prediction that is held against the probes.
_PREDICTED = "closed_eval_r2_logmean"
_PERMUTATIONS = 10_000
# Masks of a patch size without which a correlation within it says nothing.
_FEWEST = 3
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Probes of the networks of one mask over training.

    Attributes:
        patch_size: as asked for.
        mask_ratio: as asked for.
        hidden: share of patches that is hidden.
        steps: [T], the first 0.
        scores: by accuracy, r2, accuracy_validation and r2_validation, [T, E], one column a seed.
        predicted: row of :func:`mae_align.closed_form.predictions.closed_form_row`.
    """

    patch_size: int
    mask_ratio: float
    hidden: float
    steps: tuple[int, ...]
    scores: Mapping[str, np.ndarray]
    predicted: Mapping[str, Any]

    @property
    def about(self) -> Row:
        """First cells of its rows."""
        return {"patch_size": self.patch_size, "mask_ratio": self.mask_ratio, "hidden_share": self.hidden}

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.patch_size}x{self.patch_size} patches, {100 * self.hidden:.3g}% hidden"

    def mean(self, name: str) -> np.ndarray:
        """Mean of a score over seeds, [T]."""
        return self.scores[name].mean(axis=1)

    def settled(self, share: float = 0.9) -> int:
        """First step at which the mean r2 is through a share of its way from the untrained to its largest value."""
        mean = self.mean("r2")
        return self.steps[int((mean >= mean[0] + share * (mean.max() - mean[0])).argmax())]

    def rows(self, seeds: Sequence[int]) -> list[Row]:
        """One for each step and seed."""
        at = itertools.product(enumerate(self.steps), enumerate(seeds))
        return [
            {**self.about, "step": step, "seed": seed, **{n: float(x[t, e]) for n, x in self.scores.items()}}
            | dict(self.predicted)
            for (t, step), (e, seed) in at
        ]

    def summary(self) -> Row:
        """One row; what is best is chosen on validation images."""
        row = self.about
        for name in MEASURES:
            mean, last, best = self.mean(name), self.scores[name][-1], int(self.mean(f"{name}_validation").argmax())
            row |= {f"{name}_untrained": float(mean[0]), f"{name}_last": float(mean[-1])}
            row[f"{name}_last_sd"] = float(last.std(ddof=1)) if len(last) > 1 else float("nan")
            row |= {f"{name}_best": float(mean[best]), f"{name}_best_step": self.steps[best]}
        predicted = {
            key: x for key, x in self.predicted.items() if key.startswith("closed_eval_r2") and "_se_" not in key
        }
        return row | {"settled_step": self.settled()} | predicted


def agreement_over_time(curves: Sequence[Curve]) -> list[Row]:
    """Correlation within patch sizes of the predicted r2 and the mean r2 of the probes, at every step.

    Patch sizes differ for reasons that are not the mask's, so both are taken as deviations from the mean of their patch
    size, for Spearman's after ranking within it. The tests permute the masks of each patch size among themselves and
    are one-sided.

    Args:
        curves: at least three of a patch size for a correlation, all evaluated at the same steps.

    Returns:
        A row per step: step, masks, pearson, pearson_p, spearman, spearman_p, NaN where nothing moves; and which mask
        is best on validation images.
    """
    sizes = [curve.patch_size for curve in curves]
    parts = [np.flatnonzero(np.array(sizes) == size) for size in dict.fromkeys(sizes)]
    count, orders = len(curves), np.empty((0, len(curves)), np.int64)
    enough = max(map(len, parts)) >= _FEWEST
    if enough:
        found = shuffled_within(parts, count, _PERMUTATIONS, count, np.random.default_rng(0))
        orders = np.concatenate([orders, *found])
    predicted = np.array([float(curve.predicted[_PREDICTED]) for curve in curves])
    rows: list[Row] = []
    for i, step in enumerate(curves[0].steps):
        observed = np.array([curve.mean("r2")[i] for curve in curves])
        row: Row = {"step": step, "masks": count}
        for name, change in (("pearson", np.asarray), ("spearman", rankdata)):
            p, g = (_within(values, parts, change) for values in (predicted, observed))
            value = float(pearson(p, g)) if enough else float("nan")
            row |= {name: value, f"{name}_p": p_value(pearson(p[orders], g), value)}
        best = max(curves, key=lambda curve, i=i: curve.mean("accuracy_validation")[i])
        rows.append(row | {"best_patch_size": best.patch_size, "best_mask_ratio": best.mask_ratio})
    return rows


def _within(values: np.ndarray, parts: Sequence[np.ndarray], change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Deviations from the mean of each part, of values or their ranks; differences that are rounding are none."""
    found = np.zeros(len(values))
    scale = np.abs(values).max()
    for part in parts:
        own = values[part]
        if np.ptp(own) > 1e-9 * scale:
            found[part] = change(own) - change(own).mean()
    return found


def shown(table: pd.DataFrame, ks: Sequence[int]) -> pd.DataFrame:
    """What the summary shows of the masks: shares in percent."""
    columns = {
        "patch": table.patch_size,
        "hidden": (100 * table.hidden_share).round(1),
        "untrained": (100 * table.accuracy_untrained).round(1),
        "last acc.": (100 * table.accuracy_last).round(1),
        "sd": (100 * table.accuracy_last_sd).round(1),
        "best": (100 * table.accuracy_best).round(1),
        "at step": table.accuracy_best_step,
        "r2 last": table.r2_last.round(3),
        "90% at step": table.settled_step,
    }
    closed = {f"predicted r2 k={k}": table[f"closed_eval_r2_k{k}"].round(3) for k in ks}
    return pd.DataFrame(columns | closed | {"over log k": table[_PREDICTED].round(3)})


def sentences(curves: Sequence[Curve], raw: Mapping[str, float], agreement: Sequence[Row]) -> list[str]:
    """What came out, in plain words, whatever it is."""
    chosen = [curve.mean("accuracy_validation")[-1] for curve in curves]
    best, worst = curves[int(np.argmax(chosen))], curves[int(np.argmin(chosen))]
    pairs = 100 * (best.scores["accuracy"][-1] - worst.scores["accuracy"][-1])
    spread = f" (seeds {pairs.min():+.1f} to {pairs.max():+.1f})" if len(pairs) > 1 else ""
    one, other = (100 * curve.mean("accuracy")[-1] for curve in (best, worst))
    found = [
        f"After {curves[0].steps[-1]} steps {best.label} is best ({one:.1f}% of test images right) and {worst.label} "
        f"worst ({other:.1f}%), both chosen on validation images: {pairs.mean():+.1f} points{spread}.",
        f"The same probe on raw pixels has accuracy {100 * raw['accuracy']:.1f}% and r2 {raw['r2']:.3f}.",
    ]
    known = [row for row in agreement if np.isfinite(row["pearson"])]
    if not known:
        return [
            *found,
            "The order of the masks cannot be held against the closed form: fewer than three of each patch size, or "
            "none moves.",
        ]
    end = known[-1]
    verdict = "agrees with" if end["pearson_p"] <= 0.05 and end["pearson"] > 0 else "does not follow"
    return [
        *found,
        f"Over {end['masks']} masks, within patch size, r2 of the probes at step {end['step']} {verdict} the closed "
        f"form's (mean over log k, held out): correlation {end['pearson']:+.2f} (p = {end['pearson_p']:.2g}, masks "
        f"permuted within patch size), by rank {end['spearman']:+.2f} (p = {end['spearman_p']:.2g}); at step "
        f"{known[0]['step']} it is {known[0]['pearson']:+.2f}.",
    ]


def dynamics_figure(
    dataset: str, curves: Sequence[Curve], raw: Mapping[str, float], agreement: Sequence[Row]
) -> Figure:
    """Probe accuracy over training, a panel per patch size; then what was predicted, and how well, over the steps.

    Bands are the range over seeds; untrained networks stand left of step 1.
    """
    sizes = list(dict.fromkeys(curve.patch_size for curve in curves))
    ratios = sorted({curve.mask_ratio for curve in curves})
    colors = dict(zip(ratios, ordered_colors(len(ratios)), strict=True))
    figure, axes = panels(1, len(sizes) + 2, width=2.5, height=2.5)
    for axis, size in zip(axes[0], sizes, strict=False):
        for curve in (c for c in curves if c.patch_size == size):
            # A logarithmic axis has no 0.
            x, y, color = np.maximum(curve.steps, 0.5), 100 * curve.scores["accuracy"], colors[curve.mask_ratio]
            axis.plot(x, y.mean(axis=1), color=color, label=f"{100 * curve.hidden:.3g}% hidden")
            axis.fill_between(x, y.min(axis=1), y.max(axis=1), color=color, alpha=0.2, lw=0)
        axis.axhline(100 * raw["accuracy"], color="0.4", lw=0.8, ls="--", label="raw pixels")
        axis.set(xscale="log", xlabel="step (left end: untrained)")
        axis.set_title(f"{dataset}: {size}x{size} patches", fontsize=8)
        _legend_below(axis)
    axes[0, 0].set_ylabel("test accuracy of ridge probe [%]")
    limits = np.array([axis.get_ylim() for axis in axes[0, : len(sizes)]])
    for axis in axes[0, : len(sizes)]:
        axis.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    outcome, over_time = axes[0, -2], axes[0, -1]
    for i, size in enumerate(sizes):
        own = sorted((c for c in curves if c.patch_size == size), key=lambda c: c.hidden)
        x, color = [100 * c.hidden for c in own], PALETTE[i % len(PALETTE)]
        probes, closed = [c.mean("r2")[-1] for c in own], [c.predicted[_PREDICTED] for c in own]
        outcome.plot(x, probes, "o-", color=color, markersize=4, label=f"probe, {size}x{size}")
        outcome.plot(x, closed, "s--", color=color, markersize=3, label=f"closed form, {size}x{size}")
    outcome.set(xlabel="patches hidden [%]", ylabel="held-out r2\n(closed form: mean over log k)")
    outcome.set_title("last step", fontsize=8)
    _legend_below(outcome)
    known = [row for row in agreement if np.isfinite(row["pearson"])]
    if known:
        x, y = np.maximum([row["step"] for row in known], 0.5), [row["pearson"] for row in known]
        over_time.plot(x, y, "o-", color="black", markersize=4)
        over_time.set_xscale("log")
    else:
        over_time.text(0.5, 0.5, "fewer than three masks\nof a patch size", transform=over_time.transAxes, ha="center")
    over_time.axhline(0.0, color="0.6", lw=0.8)
    over_time.set(ylim=(-1.05, 1.05), xlabel="step (left end: untrained)")
    over_time.set_ylabel("correlation over masks,\nwithin patch size")
    over_time.set_title("closed form against probe r2", fontsize=8)
    return figure


def _legend_below(axis: Axes) -> None:
    """Under the axes, where it hides no curve."""
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2, frameon=False)
