"""Figure, table and sentences of the diagnosis of corruptions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.harness.figures import PALETTE, panels
from mae_align.closed_form.compare import CAN_MATTER, INERT, NOT_IDENTIFIED, TOO_FEW_IMAGES, WITHIN_NOISE

Row = dict[str, object]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Below this nothing of the span moves; zeros have to be drawn somewhere on a logarithmic axis.
_LEAST = 1e-5


def figure(found: xr.Dataset, patch_sizes: Sequence[int], mask_ratios: Sequence[float]) -> Figure:
    """Moved share of the span against the mask ratio, a panel per k; what sampling moves as a grey band.

    Args:
        found: of the diagnosis. patch_sizes, mask_ratios: of its masks.

    Returns:
        The figure.
    """
    ks = found.k.values
    drawing, axes = panels(1, len(ks), width=1.9, height=2.2, sharey=True)
    for axis, k in zip(axes[0], ks, strict=True):
        level = float(found.sampling_share.sel(k=k))
        if np.isfinite(level):
            axis.axhspan(_LEAST, max(level, _LEAST), color="0.85", lw=0, label="sampling noise")
        for size, color, marker in zip(patch_sizes, PALETTE, _MARKERS, strict=False):
            names = [f"mask {ratio:g} of {size}x{size}" for ratio in mask_ratios]
            moved = np.maximum(found.moved_share.sel(corruption=names, k=k).values, _LEAST)
            axis.plot(mask_ratios, moved, color=color, marker=marker, markersize=3, label=f"{size}x{size} patches")
        axis.set_yscale("log")
        axis.set_ylim(_LEAST, 2.0)
        axis.yaxis.set_minor_locator(LogLocator(subs=()))
        axis.set_xlim(-0.03, 1.03)
        axis.set_title(f"k = {k}", fontsize=8)
        axis.set_xlabel("mask ratio")
    axes[0, 0].set_ylabel("share of the span that moves")
    axes[0, -1].legend(loc="lower right", fontsize=6)
    return drawing


def rows_of(found: xr.Dataset) -> list[Row]:
    """One row per corruption and k.

    Args:
        found: of the diagnosis.

    Returns:
        Rows with the verdict, the figures, and the measured changes of r2 where there are any.
    """
    names = ["verdict", "largest_sine", "mean_top_sine", "moved_share", "rms_change", "eigengap", "sampling_ratio"]
    names += [name for name in ("r2_change", "eval_r2_change", "eval_r2_change_se") if name in found]
    rows: list[Row] = []
    for corruption in found.corruption.values:
        for k in found.k.values:
            cell = found.sel(corruption=corruption, k=k)
            row: Row = {"corruption": str(corruption), "k": int(k)}
            row |= {name: str(cell[name].item()) if name == "verdict" else float(cell[name]) for name in names}
            rows.append(row | {"sampling_share": float(cell.sampling_share)})
    return rows


def table_text(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as a plain-text table: a line per corruption, a column per k.

    Example:
        >>> row = {"corruption": "noise", "k": 4, "verdict": "inert", "moved_share": 0.0}
        >>> print(table_text([row]))
        share of the span that moves; verdict
        corruption        k = 4
             noise  0.000 inert
    """
    ks = list(dict.fromkeys(row["k"] for row in rows))
    lines = [["corruption", *(f"k = {k}" for k in ks)]]
    for name in dict.fromkeys(row["corruption"] for row in rows):
        cells = [row for row in rows if row["corruption"] == name]
        lines.append([str(name), *(f"{row['moved_share']:.3f} {row['verdict']}{_measured(row)}" for row in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    measured = any("eval_r2_change" in row for row in rows)
    about = "; in brackets the measured change of held-out r2 in percentage points" if measured else ""
    return "\n".join([f"share of the span that moves; verdict{about}", *text])


def _measured(row: Mapping[str, object]) -> str:
    change = row.get("eval_r2_change")
    return "" if change is None or np.isnan(change) else f" ({change:+.2f})"  # pyright: ignore


def summarise(found: xr.Dataset) -> Iterator[str]:
    """Plain sentences: what cannot matter, what sampling hides, what can matter."""
    verdict = found.verdict
    for text, sentence in (
        (INERT, "Cannot matter for any task"),
        (WITHIN_NOISE, "Within what another sample of images would change"),
        (CAN_MATTER, "Can matter"),
        (NOT_IDENTIFIED, "Features not identified (eigenvalues tie, or fewer features than k)"),
        (TOO_FEW_IMAGES, "Too few images to tell from sampling noise"),
    ):
        always = [str(name) for name in verdict.corruption.values if (verdict.sel(corruption=name) == text).all()]
        if always:
            yield f"{sentence}, at every k: {', '.join(always)}."
        some = {
            str(name): [int(k) for k in verdict.k.values if verdict.sel(corruption=name, k=k) == text]
            for name in verdict.corruption.values
        }
        parts = [f"{name} (k = {', '.join(map(str, ks))})" for name, ks in some.items() if ks and name not in always]
        if parts:
            yield f"{sentence}, at some k: {'; '.join(parts)}."
    if (verdict == CAN_MATTER).any():
        yield "Whether it helps or hurts depends on the task: python -m experiments.masking_sweep measures it."
