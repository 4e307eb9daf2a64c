"""Table, figures and plain sentences of the masking sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.harness.figures import curves_over_k, ordered_colors, panels
from mae_align.closed_form.held_out import paired_se

Row = dict[str, Any]


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


def heat_map(result: xr.Dataset, ks: Sequence[int]) -> Figure:
    """Change of r2 against no mask, mask ratio x patch size at chosen k, in-sample and held-out.

    A dot marks held-out changes of two standard errors and more.
    """
    names = ["r2"] + (["eval_r2"] if "eval_r2" in result else [])
    ratios = [float(p) for p in result.mask_ratio.values if p > 0]
    figure, axes = panels(len(names), len(ks), width=1.75, height=0.75 + 0.17 * len(ratios), sharex=True, sharey=True)
    for j, k in enumerate(ks):
        at = result.sel(k=k)
        for i, name in enumerate(names):
            panel = axes[i, j]
            # [ratio, patch]
            change = 100.0 * (at[name].sel(mask_ratio=ratios) - at[name].sel(mask_ratio=0.0)).transpose(
                "mask_ratio", "patch_size"
            )
            bound = max(float(np.abs(change).max()), 1e-9)
            image = panel.imshow(change, cmap="PuOr_r", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
            panel.grid(False)
            panel.set_xticks(range(result.sizes["patch_size"]), [str(v) for v in result.patch_size.values])
            panel.set_yticks(range(len(ratios)), [f"{p:g}" for p in ratios])
            if name == "eval_r2" and result.sizes["group"] > 1:
                influence = at.eval_influence
                se = 100.0 * _se(influence.sel(mask_ratio=ratios), influence.sel(mask_ratio=0.0))
                for y, x in zip(*np.nonzero(np.abs(change.values) >= 2 * se), strict=True):
                    panel.plot(x, y, "o", color="white", markeredgecolor="black", markersize=3, markeredgewidth=0.6)
            if i == 0:
                panel.set_title(f"k = {k}", fontsize=8)
            if i + 1 == len(names):
                panel.set_xlabel("patch side [pixels]")
            if j == 0:
                panel.set_ylabel(("in-sample" if name == "r2" else "held-out") + "\nmask ratio")
            bar = figure.colorbar(image, ax=panel, fraction=0.08)
            if j + 1 == len(ks):
                bar.set_label("change of r2 [points]", fontsize=7)
            bar.ax.tick_params(labelsize=6)
    if "eval_r2" in result and result.sizes["group"] > 1:
        figure.supxlabel("dot: at least two standard errors of the paired held-out difference", fontsize=7)
    return figure


def _se(influence: xr.DataArray, reference: xr.DataArray) -> np.ndarray:
    """[ratio, patch] paired standard errors of differences, from influences with a group axis."""
    difference = (influence - reference).transpose("mask_ratio", "group", "patch_size")
    return paired_se(difference.values)


def verdict_rows(result: xr.Dataset, validation: xr.Dataset | None, ks: Sequence[int]) -> list[Row]:
    """One row per k: the best and worst mask and the best joint embedding, chosen on validation, measured on test.

    Without validation curves, the choice and the measurement are in-sample, and the row says so.
    """
    return [_row(result, validation, k) for k in ks]


def _row(result: xr.Dataset, validation: xr.Dataset | None, k: int) -> Row:
    held_out = validation is not None
    name = "eval_r2" if held_out else "r2"
    choose = (validation if validation is not None else result).sel(k=k)
    masked = choose[name].sel(mask_ratio=choose.mask_ratio > 0).stack(cell=("patch_size", "mask_ratio"))
    report = result.sel(k=k)
    reference = report[name].isel(patch_size=0).sel(mask_ratio=0.0)
    row: Row = {"k": k, "measured": "test images" if held_out else "in-sample", "r2_no_mask": float(reference)}
    for which, position in (("best", np.argmax(masked.values)), ("worst", np.argmin(masked.values))):
        size, ratio = masked.cell.values[position]
        cell = report.sel(patch_size=size, mask_ratio=ratio)
        row |= {f"{which}_patch": size, f"{which}_ratio": float(ratio)}
        row |= _difference(f"{which}_", report, cell, name)
    joint = choose[f"je_{name}"]
    if not bool(joint.isnull().all()):
        size = joint.patch_size.values[int(np.nanargmax(joint.values))]
        row["joint_patch"] = size
        row |= _difference("joint_", report, report.sel(patch_size=size), f"je_{name}")
    return row


def _difference(prefix: str, report: xr.Dataset, cell: xr.Dataset, name: str) -> Row:
    """Change of r2 against no mask in percentage points, with its paired standard error on held-out images."""
    plain = report.isel(patch_size=0).sel(mask_ratio=0.0)
    out: Row = {f"{prefix}change": 100.0 * float(cell[name] - plain[name.removeprefix("je_")])}
    if "eval" in name:
        influence = cell[name.replace("r2", "influence")] - plain.eval_influence
        out[f"{prefix}se"] = 100.0 * float(paired_se(influence.values[:, None])[0])
    return out


def table_text(rows: Sequence[Row]) -> str:
    """The rows as a plain-text table; changes are in percentage points of r2."""
    where = rows[0]["measured"]
    header = ["k", "r2 no mask", "best mask", "change", "worst mask", "change", "joint embedding", "change"]
    lines = [header]
    for row in rows:
        joint = "joint_change" in row
        lines.append(
            [
                str(row["k"]),
                f"{row['r2_no_mask']:.4f}",
                f"{row['best_ratio']:g} of {_side(row['best_patch'])}",
                _pm(row, "best_"),
                f"{row['worst_ratio']:g} of {_side(row['worst_patch'])}",
                _pm(row, "worst_"),
                _side(row["joint_patch"]) if joint else "-",
                _pm(row, "joint_") if joint else "-",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([f"r2 of a linear probe on k features, {where}; changes in percentage points", *text])


def _side(size: Any) -> str:
    return f"{size}x{size}" if isinstance(size, int | np.integer) else str(size)


def _pm(row: Row, prefix: str) -> str:
    se = row.get(f"{prefix}se")
    return f"{row[prefix + 'change']:+.2f}" + ("" if se is None else f" +- {se:.2f}")


def summarise(rows: Sequence[Row]) -> Iterator[str]:
    """Plain sentences: what helps, what hurts, how joint embedding compares."""
    where = rows[0]["measured"]
    if where == "in-sample":
        yield "In-sample curves flatter and have no standard error here: decide on held-out images (--held-out)."
    helps = [row for row in rows if _verdict(row, "best_") > 0]
    if helps:
        cells = "; ".join(
            f"k={row['k']}: mask {row['best_ratio']:g} of {_side(row['best_patch'])} patches {_pm(row, 'best_')}"
            for row in helps
        )
        yield f"Helps ({where}, points of r2 against no mask): {cells}."
    still = [str(row["k"]) for row in rows if _verdict(row, "best_") == 0]
    if still:
        yield f"At k = {', '.join(still)}: no detectable difference between the best mask and no mask."
    backfires = [row for row in rows if _verdict(row, "best_") < 0]
    if backfires:
        yield (
            f"At k = {', '.join(str(row['k']) for row in backfires)}: even the mask that looked best on validation "
            "images is worse than no mask."
        )
    hurts = [row for row in rows if _verdict(row, "worst_") < 0]
    if hurts:
        cells = "; ".join(
            f"k={row['k']}: mask {row['worst_ratio']:g} of {_side(row['worst_patch'])} patches {_pm(row, 'worst_')}"
            for row in hurts
        )
        yield f"Hurts: {cells}."
    else:
        yield "No mask of the grid hurts detectably at these k."
    joint = [row for row in rows if "joint_change" in row]
    if joint:
        words = {1: "better than", 0: "not detectably different from", -1: "worse than"}
        cells = "; ".join(
            f"k={row['k']}: {words[_verdict(row, 'joint_')]} reconstruction without mask, {_pm(row, 'joint_')}"
            for row in joint
        )
        yield f"Joint embedding of masked views (whitened, linear): {cells}."


def saturation(result: xr.Dataset) -> list[str]:
    """A line that names the patch sizes with at least as many pixel values as there are training images, if any."""
    sizes = [_side(size) for size in result.patch_size.values[result.saturated.values]]
    if not sizes:
        return []
    return [
        f"Patches of {', '.join(sizes)} have at least as many pixel values as there are training images, "
        f"{result.attrs['num_train']}: each fits them exactly but for the pixel noise, which their curves then show."
    ]


def _verdict(row: Row, prefix: str) -> int:
    """Sign of a change, 0 below two standard errors."""
    change = row[f"{prefix}change"]
    # A standard error that is not a number detects nothing.
    return int(np.sign(change)) if abs(change) >= 2 * row.get(f"{prefix}se", 0.0) else 0
