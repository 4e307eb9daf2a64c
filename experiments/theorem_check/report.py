"""Table, figure and sentences of the theorem check."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.harness import figures as plot

# Rounding of a loss, relative to its value for an encoder that sees nothing.
_ROUNDING = 1e-11
# How far the sampled loss of the closed form may be from the stated minimum.
_MAX_STANDARD_ERRORS = 4.0


class Part(enum.Enum):
    """What is held against the closed form, by its title."""

    supervised = "Theorem 1, exact loss"
    denoising = "Theorem 3, exact loss"
    sampled = "Theorem 3, sampled corruptions"


Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One minimum to be checked.

    Attributes:
        part: kind of check. setting: the lambda or the corruption. k: number of features.
        tolerance: largest relative excess over the closed-form minimum that passes. solve: the work.
    """

    part: Part
    setting: str
    k: int
    tolerance: float
    solve: Callable[[], Arrays]


def row_of(case: Case, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One row of the table.

    Args:
        case: what was checked. found: arrays of its outcome.

    Returns:
        The numbers, and whether all of them pass: ``excess``, that of the worst start at the end; ``lowest``, the
        lowest excess anywhere on the way; ``closed_form_error``, how far the closed-form network's own loss is from
        the stated minimum; ``standard_errors``, how far its loss on sampled corruptions is (sampled cases only).
    """
    minimum = float(found["minimum"])
    # Relative to the minimum, as the excess is.
    rounding = _ROUNDING * float(found["total"]) / minimum
    row: dict[str, Any] = {
        "part": case.part.value,
        "setting": case.setting,
        "k": case.k,
        "minimum": minimum,
        "excess": float(found["excess"][:, -1].max()),
        "lowest": float(found["excess"].min()),
        "closed_form_error": float(found["attained"]) / minimum - 1.0,
        "starts": len(found["excess"]),
        "tolerance": case.tolerance,
    }
    passed = (
        row["excess"] <= case.tolerance and row["lowest"] >= -rounding and abs(row["closed_form_error"]) <= rounding
    )
    if "sampled_loss" in found:
        row["standard_errors"] = float((found["sampled_loss"] - found["minimum"]) / found["sampled_loss_se"])
        passed = passed and abs(row["standard_errors"]) <= _MAX_STANDARD_ERRORS
    return row | {"passed": bool(passed)}


def shown(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of the summary, a line per case."""
    return pd.DataFrame(
        {
            "part": [row["part"] for row in rows],
            "setting": [row["setting"] for row in rows],
            "k": [row["k"] for row in rows],
            "minimum": [f"{row['minimum']:.5g}" for row in rows],
            "excess": [f"{row['excess']:.1e}" for row in rows],
            "lowest": [f"{row['lowest']:.1e}" for row in rows],
            "sampled": [f"{row['standard_errors']:+.1f} se" if "standard_errors" in row else "-" for row in rows],
            "": ["passed" if row["passed"] else "FAILED" for row in rows],
        }
    )


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Two sentences: how near the descents came, and whether all checks pass."""
    worst = [
        f"{part.value}: {max(row['excess'] for row in rows if row['part'] == part.value):.1e} "
        f"(up to {next(row['tolerance'] for row in rows if row['part'] == part.value):g} passes)"
        for part in Part
    ]
    passed = sum(row["passed"] for row in rows)
    return [
        f"{passed} of {len(rows)} cases pass; the worst descent ends above the closed-form minimum, relative to it, by "
        f"{'; '.join(worst)}; the lowest point on any way is at {min(row['lowest'] for row in rows):+.1e}.",
        "PASS: gradient descent finds the closed-form minima and nothing below them."
        if passed == len(rows)
        else "FAIL: see the lines marked FAILED in the table above.",
    ]


def excess_figure(solved: Sequence[tuple[Case, Mapping[str, np.ndarray]]]) -> Figure:
    """Relative excess of the worst start against the step, one panel per part, one line per case, log-log."""
    figure, axes = plot.panels(1, len(Part), width=2.8, height=2.5)
    ks = dict.fromkeys(case.k for case, _ in solved)
    styles = dict(zip(ks, itertools.cycle(("-", "--", ":", "-.")), strict=False))
    for axis, part in zip(axes[0], Part, strict=True):
        mine = [(case, found) for case, found in solved if case.part is part]
        colors = {}
        for case, found in mine:
            color = colors.setdefault(case.setting, plot.PALETTE[len(colors) % len(plot.PALETTE)])
            # Below rounding there is nothing to see, and zero has no logarithm.
            axis.plot(found["step"], np.maximum(found["excess"].max(0), 1e-16), styles[case.k], color=color)
        tolerance = mine[0][0].tolerance
        axis.axhline(tolerance, color="0.4", linewidth=0.8)
        axis.annotate("passes below", (0.02, tolerance), xycoords=("axes fraction", "data"), fontsize=6, va="top")
        axis.set(xscale="log", yscale="log", xlabel="step")
        axis.set_title(part.value, fontsize=8)
        # The sampled cases share the colours of the exact ones beside them.
        handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
        if part is Part.sampled:
            handles = [axis.plot([], [], style, color="black", label=f"k = {k}")[0] for k, style in styles.items()]
        axis.legend(handles=handles, loc="lower left", fontsize=6, frameon=False)
    axes[0, 0].set_ylabel("excess over the closed-form\nminimum, relative")
    return figure


def as_dataset(solved: Sequence[tuple[Case, Mapping[str, np.ndarray]]], parts: Sequence[Part]) -> xr.Dataset:
    """Excess over case, start and step of the cases of some parts."""
    mine = [(case, found) for case, found in solved if case.part in parts]
    return xr.Dataset(
        {
            "excess": (("case", "start", "step"), np.stack([found["excess"] for _, found in mine])),
            "minimum": ("case", np.array([found["minimum"] for _, found in mine])),
        },
        {
            "part": ("case", [case.part.value for case, _ in mine]),
            "setting": ("case", [case.setting for case, _ in mine]),
            "k": ("case", [case.k for case, _ in mine]),
            "step": mine[0][1]["step"],
            "case": np.arange(len(mine)),
            "start": np.arange(len(mine[0][1]["excess"])),
        },
    )
