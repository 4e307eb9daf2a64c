"""Probes of masked autoencoders over training beside the closed form: tables, figure and plain sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata

import mae_align as ma
from experiments.alignment_vs_probe.agreement import pooled_correlation
from experiments.harness.figures import PALETTE, ordered_colors, panels
from experiments.harness.folder import RunFolder
from experiments.harness.statistics import p_value, shuffled_within
from mae_align.metrics import report_table

Row = dict[str, float | int | str]
# The prediction that is held against the probes.
_PREDICTED = "closed_eval_r2_logmean"
_PERMUTATIONS = 10_000
# Masks of a patch size without which a correlation within it says nothing.
_FEWEST = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Probes of the networks of one mask over training.

    Attributes:
        patch_size, mask_ratio: as asked for. realized: share of patches that is hidden.
        steps: [T], the first 0. accuracy, r2: [T, E] of the test images, one column a seed.
        predicted: row of :func:`mae_align.closed_form.predictions.closed_form_row`.
    """

    patch_size: int
    mask_ratio: float
    realized: float
    steps: tuple[int, ...]
    accuracy: np.ndarray
    r2: np.ndarray
    predicted: Mapping[str, float | int | str]

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.patch_size}x{self.patch_size} patches, {100 * self.realized:.3g}% hidden"

    def settled(self, share: float = 0.9) -> int:
        """First step at which the mean r2 is through a share of its way from the untrained to its largest value."""
        mean = self.r2.mean(axis=1)
        reached = mean >= mean[0] + share * (mean.max() - mean[0])
        return self.steps[int(reached.argmax())]


def write_report(
    folder: RunFolder,
    data: ma.ImageDataset,
    curves: Sequence[Curve],
    ks: Sequence[int],
    raw: Mapping[str, float],
    seeds: Sequence[int],
) -> None:
    """Tables, figure and summary.

    Args:
        folder: where to. data: what was trained on. curves: one per mask. ks: numbers of features of the closed form.
        raw: accuracy and r2 of the same probe on raw pixels. seeds: of the networks.
    """
    rows = [row for curve in curves for row in _rows(data.name, curve, seeds)]
    folder.save_dataset("probes", report_table(rows))
    table = [_table_row(data.name, curve, ks) for curve in curves]
    folder.save_table("masks", table)
    agreement = agreement_over_time(curves)
    folder.save_table("agreement", agreement)
    folder.save_figure("masking_dynamics", dynamics_figure(data.name, curves, raw, agreement))
    folder.summary("\n".join([_table_text(table, ks), "", *sentences(data, curves, raw, agreement)]))


def _rows(dataset: str, curve: Curve, seeds: Sequence[int]) -> Iterator[Row]:
    about: Row = {"dataset": dataset, "patch_size": curve.patch_size, "mask_ratio": curve.mask_ratio}
    about |= {"hidden_share": curve.realized}
    for step, accuracy, r2 in zip(curve.steps, curve.accuracy, curve.r2, strict=True):
        for seed, a, r in zip(seeds, accuracy, r2, strict=True):
            yield about | {"step": step, "seed": seed, "accuracy": float(a), "r2": float(r)} | dict(curve.predicted)


def _table_row(dataset: str, curve: Curve, ks: Sequence[int]) -> Row:
    row: Row = {"dataset": dataset, "patch_size": curve.patch_size, "mask_ratio": curve.mask_ratio}
    row["hidden_share"] = curve.realized
    for name, values in (("accuracy", curve.accuracy), ("r2", curve.r2)):
        mean = values.mean(axis=1)
        row |= {f"{name}_untrained": float(mean[0]), f"{name}_last": float(mean[-1])}
        row[f"{name}_last_sd"] = float(values[-1].std(ddof=1)) if values.shape[1] > 1 else float("nan")
        row |= {f"{name}_best": float(mean.max()), f"{name}_best_step": curve.steps[int(mean.argmax())]}
    row["settled_step"] = curve.settled()
    row |= {f"closed_eval_r2_k{k}": curve.predicted[f"closed_eval_r2_k{k}"] for k in ks}
    return row | {_PREDICTED: curve.predicted[_PREDICTED]}


def agreement_over_time(curves: Sequence[Curve]) -> list[Row]:
    """Correlation within patch sizes of the predicted r2 and the mean r2 of the probes, at every step.

    Patch sizes differ for reasons that are not the mask's, so both are taken as deviations from the mean of their patch
    size (:func:`experiments.alignment_vs_probe.agreement.pooled_correlation`), for Spearman's after ranking within
    it. The tests permute the masks of each patch size among themselves and are one-sided.

    Args:
        curves: at least three of a patch size for a correlation, all evaluated at the same steps.

    Returns:
        A row per step: step, masks, pearson, pearson_p, spearman, spearman_p; NaN where nothing moves.
    """
    sizes = list(dict.fromkeys(curve.patch_size for curve in curves))
    ratios = sorted({curve.mask_ratio for curve in curves})
    at = np.array([sizes.index(c.patch_size) * len(ratios) + ratios.index(c.mask_ratio) for c in curves])
    parts = [at[[curve.patch_size == size for curve in curves]] for size in sizes]

    def grid(values: Sequence[float]) -> np.ndarray:
        """[1, S, R], NaN where there is no such mask."""
        found = np.full(len(sizes) * len(ratios), np.nan)
        found[at] = values
        return found.reshape(1, len(sizes), len(ratios))

    orders = np.empty((0, len(sizes) * len(ratios)), np.int64)
    if max(map(len, parts)) >= _FEWEST:
        drawn = shuffled_within(parts, orders.shape[1], _PERMUTATIONS, orders.shape[1], np.random.default_rng(0))
        orders = np.concatenate(list(drawn))
    predicted = grid([float(curve.predicted[_PREDICTED]) for curve in curves])
    rows: list[Row] = []
    for i, step in enumerate(curves[0].steps):
        observed = grid([float(curve.r2[i].mean()) for curve in curves])
        row: Row = {"step": step, "masks": len(curves)}
        row |= _tested("pearson", predicted, observed, orders)
        if np.isfinite(float(row["pearson"])):
            first, second = (rankdata(x, axis=-1, nan_policy="omit") for x in (predicted, observed))
            row |= _tested("spearman", first, second, orders)
        rows.append(row)
    return rows


def _tested(name: str, predicted: np.ndarray, observed: np.ndarray, orders: np.ndarray) -> Row:
    """Correlation of [1, S, R] within patch sizes, and its p-value under permutations [b, S R] of the predictions."""
    value = float(pooled_correlation(predicted, observed))
    moved = predicted.ravel()[orders].reshape(len(orders), *predicted.shape)
    return {name: value, f"{name}_p": p_value(pooled_correlation(moved, observed), value)}


def _table_text(table: Sequence[Row], ks: Sequence[int]) -> str:
    names = ["accuracy_untrained", "accuracy_last", "accuracy_last_sd", "accuracy_best", "accuracy_best_step"]
    closed = [*(f"closed_eval_r2_k{k}" for k in ks), _PREDICTED]
    head = ["patch", "hidden", "untrained", "last acc.", "sd", "best", "at step", "r2 last", "90% at step"]
    lines = [[*head, *(f"predicted r2 k={k}" for k in ks), "over log k"]]
    for row in table:
        cells = [str(row["patch_size"]), f"{100 * float(row['hidden_share']):.1f}%"]
        cells += [f"{100 * float(row[name]):.1f}" for name in names[:-1]] + [str(row[names[-1]])]
        cells += [f"{float(row['r2_last']):.3f}", str(row["settled_step"])]
        lines.append([*cells, *(f"{float(row[name]):.3f}" for name in closed)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def sentences(
    data: ma.ImageDataset, curves: Sequence[Curve], raw: Mapping[str, float], agreement: Sequence[Row]
) -> Iterator[str]:
    """What came out, in plain words, whatever it is."""
    seeds = curves[0].accuracy.shape[1]
    yield (
        f"{data.name}: {len(data.train_labels)} training images, {seeds} seeds, {curves[0].steps[-1]} steps; the same "
        f"probe on raw pixels: accuracy {100 * raw['accuracy']:.1f}, r2 {raw['r2']:.3f}."
    )
    last = np.array([curve.accuracy[-1].mean() for curve in curves])
    best, worst = curves[int(last.argmax())], curves[int(last.argmin())]
    pairs = 100 * (best.accuracy[-1] - worst.accuracy[-1])
    spread = f" (seeds {pairs.min():+.1f} to {pairs.max():+.1f})" if seeds > 1 else ""
    yield (
        f"At the last step {best.label} is best ({100 * last.max():.1f}) and {worst.label} worst "
        f"({100 * last.min():.1f}): {pairs.mean():+.1f} points{spread}; both were chosen on these images, so the "
        "difference errs on the large side."
    )
    leaders: list[tuple[int, Curve]] = []
    for i, step in enumerate(curves[0].steps):
        leader = max(curves, key=lambda curve, i=i: curve.accuracy[i].mean())
        if not leaders or leaders[-1][1] is not leader:
            leaders.append((step, leader))
    turns = "; ".join(f"from step {step} {curve.label}" for step, curve in leaders)
    yield f"In front: {turns} (chosen on these images)."
    for curve in curves:
        mean = curve.accuracy.mean(axis=1)
        fall = 100 * (mean.max() - mean[-1])
        where = curve.steps[int(mean.argmax())]
        yield (
            f"  {curve.label}: {100 * mean[0]:.1f} untrained, {100 * mean[-1]:.1f} at last; largest at step {where}"
            f"{f' (chosen on these images), {fall:.1f} points above the last' if where != curve.steps[-1] else ''}; "
            f"90% of its gain in r2 by step {curve.settled()}."
        )
    known = [row for row in agreement if np.isfinite(float(row.get("pearson", np.nan)))]
    if not known:
        yield (
            "The order of the masks cannot be held against the closed form: fewer than three of each patch size, or "
            "none moves."
        )
        return
    end = known[-1]
    verdict = "agrees with" if float(end["pearson_p"]) <= 0.05 and float(end["pearson"]) > 0 else "does not follow"
    yield (
        f"Over {end['masks']} masks, within patch size, r2 of the probes at step {end['step']} {verdict} the closed "
        f"form's (mean over log k, held out): correlation {float(end['pearson']):+.2f} (p = "
        f"{float(end['pearson_p']):.2g}, masks permuted within patch size), by rank {float(end['spearman']):+.2f} (p = "
        f"{float(end['spearman_p']):.2g}); at step {known[0]['step']} it is {float(known[0]['pearson']):+.2f}. "
        "Untrained networks differ by patch size alone."
    )


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
            x = np.maximum(curve.steps, 0.5)
            color = colors[curve.mask_ratio]
            axis.plot(x, 100 * curve.accuracy.mean(axis=1), color=color, label=f"{100 * curve.realized:.3g}% hidden")
            low, high = (100 * f(curve.accuracy, axis=1) for f in (np.min, np.max))
            axis.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        axis.axhline(100 * raw["accuracy"], color="0.4", lw=0.8, ls="--", label="raw pixels")
        axis.set_xscale("log")
        axis.set_xlabel("step (left end: untrained)")
        axis.set_title(f"{dataset}: {size}x{size} patches", fontsize=8)
        _legend_below(axis)
    axes[0, 0].set_ylabel("test accuracy of ridge probe [%]")
    limits = np.array([axis.get_ylim() for axis in axes[0, : len(sizes)]])
    for axis in axes[0, : len(sizes)]:
        axis.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    outcome, over_time = axes[0, -2], axes[0, -1]
    for i, size in enumerate(sizes):
        own = sorted((c for c in curves if c.patch_size == size), key=lambda c: c.realized)
        x, color = [100 * c.realized for c in own], PALETTE[i % len(PALETTE)]
        outcome.plot(x, [c.r2[-1].mean() for c in own], "o-", color=color, markersize=4, label=f"probe, {size}x{size}")
        closed = [float(c.predicted[_PREDICTED]) for c in own]
        outcome.plot(x, closed, "s--", color=color, markersize=3, label=f"closed form, {size}x{size}")
    outcome.set_xlabel("patches hidden [%]")
    outcome.set_ylabel("held-out r2\n(closed form: mean over log k)")
    outcome.set_title("last step", fontsize=8)
    _legend_below(outcome)
    known = [row for row in agreement if np.isfinite(float(row.get("pearson", np.nan)))]
    if known:
        x, y = np.maximum([float(row["step"]) for row in known], 0.5), [float(row["pearson"]) for row in known]
        over_time.plot(x, y, "o-", color="black", markersize=4)
        over_time.set_xscale("log")
    else:
        over_time.text(0.5, 0.5, "fewer than three masks\nof a patch size", transform=over_time.transAxes, ha="center")
    over_time.axhline(0.0, color="0.6", lw=0.8)
    over_time.set_ylim(-1.05, 1.05)
    over_time.set_xlabel("step (left end: untrained)")
    over_time.set_ylabel("correlation over masks,\nwithin patch size")
    over_time.set_title("closed form against probe r2", fontsize=8)
    return figure


def _legend_below(axis: Axes) -> None:
    """Under the axes, where it hides no curve."""
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2, frameon=False)
