"""Tables, figures, the test and the sentences of the masking sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from experiments.harness.figures import curves_over_k, ordered_colors, panels
from experiments.harness.statistics import simultaneous_limit
from experiments.masking_sweep.worth import Worth
from mae_align.closed_form.held_out import paired_se

MASK, JOINT = "mask", "joint embedding"
BETTER, WORSE, NEITHER = "better", "worse", "no detectable difference"


def difference_rows(result: xr.Dataset, ks: Sequence[int]) -> tuple[pd.DataFrame, float]:
    """Changes of r2 against no mask of every mask and of joint embedding at every k, with the one test of all of them.

    Args:
        result: of the sweep.
        ks: numbers of features.

    Returns:
        One row per difference: percentage points in-sample and, with held-out curves, on these with the paired standard
        error and the verdict; and how many standard errors detect one, NaN without held-out curves.
    """
    held_out = "eval_r2" in result
    at = result.sel(k=list(ks))
    plain = at.isel(patch_size=0).sel(mask_ratio=0.0)
    sizes = at.patch_size.values.tolist()
    cells: list[tuple[str, Any, float, str, xr.Dataset]] = [
        (MASK, size, float(ratio), "", at.sel(patch_size=size, mask_ratio=ratio))
        for size in sizes
        for ratio in at.mask_ratio.values[at.mask_ratio.values > 0]
    ]
    joint = [(JOINT, size, math.nan, "je_", at.sel(patch_size=size)) for size in sizes]
    cells += [cell for cell in joint if not bool(cell[4].je_r2.isnull().any())]
    rows, influences = [], []
    for features, size, ratio, prefix, cell in cells:
        names = {"features": features, "patch_size": size, "mask_ratio": ratio}
        columns = {"change": 100 * (cell[f"{prefix}r2"] - plain.r2).values}
        if held_out:
            influence = (cell[f"{prefix}eval_influence"] - plain.eval_influence).transpose("group", "k").values
            influences.append(influence)
            columns["eval_change"] = 100 * (cell[f"{prefix}eval_r2"] - plain.eval_r2).values
            columns["eval_change_se"] = 100 * paired_se(influence)
        rows += [{**names, "k": k, **{n: float(v[i]) for n, v in columns.items()}} for i, k in enumerate(ks)]
    frame = pd.DataFrame(rows)
    if not held_out:
        return frame, math.nan
    limit = simultaneous_limit(np.concatenate(influences, axis=1))
    # A standard error that is not a number, or a limit of infinity, detects nothing.
    found = np.abs(frame.eval_change) > limit * frame.eval_change_se
    frame["eval_verdict"] = np.where(found, np.where(frame.eval_change > 0, BETTER, WORSE), NEITHER)
    return frame, limit


def chosen_rows(
    result: xr.Dataset, validation: xr.Dataset | None, ks: Sequence[int], differences: pd.DataFrame
) -> pd.DataFrame:
    """One row per k: the best and worst mask and the best joint embedding, chosen on validation, measured on test.

    Without validation curves, the choice and the measurement are in-sample, and the row says so.

    Args:
        result: of the sweep on which is reported.
        validation: of the sweep on which is chosen, or None.
        ks: numbers of features.
        differences: of :func:`difference_rows`.

    Returns:
        The rows.
    """
    held_out = validation is not None
    prefix = "eval_" if held_out else ""
    choose, _ = difference_rows(result if validation is None else validation, ks)
    rows = []
    for k in ks:
        plain = result.isel(patch_size=0).sel(mask_ratio=0.0, k=k)
        row: dict[str, Any] = {"k": k, "measured": "test images" if held_out else "in-sample"}
        row["r2_no_mask"] = float(plain[f"{prefix}r2"])
        for which, features, sign in (("best", MASK, 1), ("worst", MASK, -1), ("joint", JOINT, 1)):
            there = choose.loc[(choose.k == k) & (choose.features == features)]
            if there.empty:
                continue
            # The same cells in the same order: a row has the same number in both tables.
            cell = differences.loc[there.index[int(np.argmax(sign * there[f"{prefix}change"]))]]
            row[f"{which}_patch"] = cell.patch_size
            if features == MASK:
                row[f"{which}_ratio"] = cell.mask_ratio
            row[f"{which}_change"] = cell[f"{prefix}change"]
            if held_out and which == "best":
                row["best_validation_change"] = float(there.eval_change.max())
            if held_out:
                row[f"{which}_se"], row[f"{which}_verdict"] = cell.eval_change_se, cell.eval_verdict
        rows.append(row)
    return pd.DataFrame(rows)


def at_the_edge(chosen: pd.DataFrame, differences: pd.DataFrame, image_shape: tuple[int, int, int]) -> list[str]:
    """A line where the best mask lies on the edge of the grid, with the values that would extend it; else nothing.

    Args:
        chosen: of :func:`chosen_rows`.
        differences: of :func:`difference_rows`, which has all cells.
        image_shape: (h, w, c).

    Example:
        >>> cells = pd.DataFrame({"features": "mask", "patch_size": [2, 2, 2], "mask_ratio": [0.25, 0.5, 0.75]})
        >>> best = pd.DataFrame({"k": [4, 8], "best_patch": [2, 2], "best_ratio": [0.5, 0.75]})
        >>> at_the_edge(best, cells, (2, 2, 1))
        ['At k = 8 the best mask has the largest ratio of the grid: extend it with --mask-ratios ... 0.88.']
    """
    masks = differences[differences.features == MASK]
    ratios, sizes = sorted(set(masks.mask_ratio) - {0.0}), sorted(set(masks.patch_size))
    nearer_one, half = round((1 + ratios[-1]) / 2, 2), round(ratios[0] / 2, 3)
    notes = []
    # Over all pixels of an image, or a single pixel, a patch cannot grow or shrink.
    for what, column, value, option, more, possible in (
        ("largest ratio", "best_ratio", ratios[-1], "--mask-ratios", nearer_one, ratios[-1] < nearer_one < 1),
        ("smallest ratio", "best_ratio", ratios[0], "--mask-ratios", half, 0 < half < ratios[0]),
        (
            "largest patch",
            "best_patch",
            sizes[-1],
            "--patch-sizes",
            2 * sizes[-1],
            2 * sizes[-1] < min(image_shape[:2]),
        ),
        ("smallest patch", "best_patch", sizes[0], "--patch-sizes", sizes[0] // 2, sizes[0] > 1),
    ):
        of_a_pair = len(ratios if column == "best_ratio" else sizes) > 1
        ks = chosen.k[chosen[column] == value] if possible and of_a_pair else []
        if len(ks):
            notes.append(
                f"At k = {', '.join(map(str, ks))} the best mask has the {what} of the grid: extend it with "
                f"{option} ... {more:g}."
            )
    return notes


def shown(chosen: pd.DataFrame) -> pd.DataFrame:
    """The table of the summary: changes in percentage points of r2."""
    shown = pd.DataFrame({"k": chosen.k, f"r2, {chosen.measured[0]}": chosen.r2_no_mask.map("{:.4f}".format)})
    for which in ("best", "worst"):
        masks = zip(chosen[f"{which}_ratio"], chosen[f"{which}_patch"], strict=True)
        shown[f"{which} mask"] = [f"{ratio:g} of {_side(size)}" for ratio, size in masks]
        shown[f"{which}: change [points]"] = _changes(chosen, which)
    if "joint_change" in chosen:
        shown["joint embedding"] = chosen.joint_patch.map(_side)
        shown["joint: change [points]"] = _changes(chosen, "joint")
    return shown


def _changes(chosen: pd.DataFrame, which: str) -> list[str]:
    changes = chosen[f"{which}_change"]
    if f"{which}_se" not in chosen:
        return [f"{change:+.2f}" for change in changes]
    return [f"{change:+.2f} +- {se:.2f}" for change, se in zip(changes, chosen[f"{which}_se"], strict=True)]


def _side(size: Any) -> str:
    return f"{size}x{size}" if isinstance(size, int | np.integer) else str(size)


def verdict(chosen: pd.DataFrame, differences: pd.DataFrame, limit: float, gain: Worth | None) -> list[str]:
    """At most three sentences: what masking is worth, how many masks help or hurt, what the chosen ones do."""
    sentences = [] if gain is None else [gain.sentence]
    if not math.isnan(limit):
        masks = differences[differences.features == MASK]
        better, worse = ((masks.eval_verdict == v).sum() for v in (BETTER, WORSE))
        sentences.append(
            f"On test images {better} of {len(masks)} cells (a mask and a k) are better than no mask and {worse} are "
            f"worse (by over {limit:.1f} paired standard errors: simultaneous 95% intervals)."
        )
    if chosen.measured[0] == "in-sample":
        sentences.append(
            "The table is in-sample, which flatters and has no standard error: decide on held-out images (--held-out)."
        )
        return sentences
    chosen_ones = f"The mask that is best on validation images, against no mask: {_by_verdict(chosen, 'best')}."
    if "joint_verdict" in chosen:
        chosen_ones += f" Joint embedding of masked views (linear): {_by_verdict(chosen, 'joint')}."
    return [*sentences, chosen_ones]


def _by_verdict(chosen: pd.DataFrame, which: str) -> str:
    """Which verdicts hold at which k."""
    verdicts = list(zip(chosen.k, chosen[f"{which}_verdict"], strict=True))
    there = {word: [str(k) for k, v in verdicts if v == word] for word in (BETTER, WORSE, NEITHER)}
    return "; ".join(f"{word} at k = {', '.join(ks)}" for word, ks in there.items() if ks)


def saturation(result: xr.Dataset) -> list[str]:
    """A line that names the patch sizes with at least as many pixel values as there are training images, if any."""
    sizes = [_side(size) for size in result.patch_size.values[result.saturated.values]]
    if not sizes:
        return []
    return [
        f"Patches of {', '.join(sizes)} have at least as many pixel values as there are training images, "
        f"{result.attrs['num_train']}: each fits them exactly but for the pixel noise, which their curves then show."
    ]


def figures(result: xr.Dataset, ks: Sequence[int], differences: pd.DataFrame, limit: float) -> dict[str, Figure]:
    """All figures of the sweep by name."""
    return {"relative_change": change_figure(result), "heat_map": heat_map(result, ks, differences, limit)}


def change_figure(result: xr.Dataset) -> Figure:
    """Change against no mask over k: one column per patch size, colour by mask ratio, joint embedding dashed.

    Upper row: relative change of 100 sqrt(alignment), in-sample (the published figure). Lower row, where there are
    held-out curves: change of the held-out r2 in percentage points.
    """
    rows = [("alignment", "je_alignment")] + ([("eval_r2", "je_eval_r2")] if "eval_r2" in result else [])
    sizes = result.patch_size.values
    figure, axes = panels(len(rows), len(sizes), width=2.3, height=1.9, sharex=True, sharey="row")
    ratios = [float(p) for p in result.mask_ratio.values if p > 0]
    colors = ordered_colors(len(ratios))
    for i, (name, joint) in enumerate(rows):
        low, high = 0.0, 0.0
        for j, size in enumerate(sizes):
            panel = axes[i, j]
            at = result.sel(patch_size=size)
            curves = np.stack([_change(at[name], at[name].sel(mask_ratio=p)) for p in ratios])
            curves_over_k(panel, result.k.values, curves, colors, [f"mask {p:g}" for p in ratios])
            panel.plot(result.k, _change(at[name], at[joint]), "--", color="black", label="joint embedding")
            panel.axhline(0.0, color="0.5", linewidth=0.8)
            low, high = min(low, np.nanmin(curves)), max(high, np.nanmax(curves))
            if i == 0:
                panel.set_title(f"patch {_side(size)}", fontsize=8)
            if i + 1 < len(rows):
                panel.set_xlabel("")
        margin = 0.08 * (high - low) or 1.0
        # Joint embedding may leave the panel at small k: the masks set the scale.
        axes[i, 0].set_ylim(low - margin, high + margin)
        axes[i, 0].set_ylabel(
            "relative change of\n100 sqrt(alignment) [%]\n(in-sample)"
            if name == "alignment"
            else "change of r2\n[percentage points]\n(held-out)"
        )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, frameon=False)
    return figure


def _change(all_ratios: xr.DataArray, curve: xr.DataArray) -> np.ndarray:
    """Against no mask: relative change of sqrt(alignment) in percent, or of r2 in percentage points."""
    reference = all_ratios.sel(mask_ratio=0.0)
    if str(all_ratios.name) == "alignment":
        return 100.0 * (np.sqrt((curve / reference).values) - 1.0)
    return 100.0 * (curve - reference).values


def heat_map(result: xr.Dataset, ks: Sequence[int], differences: pd.DataFrame, limit: float) -> Figure:
    """Change of r2 against no mask, mask ratio x patch size at chosen k, in-sample and held-out.

    A dot marks held-out changes that the test of :func:`difference_rows` detects.
    """
    names = {"change": "in-sample"} | ({} if math.isnan(limit) else {"eval_change": "held-out"})
    masks = differences[differences.features == MASK]
    sizes, ratios = masks.patch_size.unique(), masks.mask_ratio.unique()
    figure, axes = panels(len(names), len(ks), width=1.75, height=0.75 + 0.17 * len(ratios), sharex=True, sharey=True)
    for j, k in enumerate(ks):
        at = masks.loc[masks.k == k]
        for i, (name, where) in enumerate(names.items()):
            panel = axes[i, j]
            # Masks are in the order of the patch sizes, then of the ratios.
            change = at[name].to_numpy().reshape(len(sizes), -1).T
            bound = max(float(np.abs(change).max()), 1e-9)
            image = panel.imshow(change, cmap="PuOr_r", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
            panel.grid(False)
            panel.set_xticks(range(len(sizes)), [str(v) for v in sizes])
            panel.set_yticks(range(len(ratios)), [f"{p:g}" for p in ratios])
            if name == "eval_change":
                found = (at.eval_verdict != NEITHER).to_numpy().reshape(len(sizes), -1).T
                for y, x in zip(*np.nonzero(found), strict=True):
                    panel.plot(x, y, "o", color="white", markeredgecolor="black", markersize=3, markeredgewidth=0.6)
            if i == 0:
                panel.set_title(f"k = {k}", fontsize=8)
            if i + 1 == len(names):
                panel.set_xlabel("patch side [pixels]")
            if j == 0:
                panel.set_ylabel(f"{where}\nmask ratio")
            bar = figure.colorbar(image, ax=panel, fraction=0.08)
            if j + 1 == len(ks):
                bar.set_label("change of r2 [points]", fontsize=7)
            bar.ax.tick_params(labelsize=6)
    if not math.isnan(limit):
        figure.supxlabel(f"dot: over {limit:.1f} paired standard errors, 95% for all cells together", fontsize=7)
    return figure
