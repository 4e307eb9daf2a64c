"""The tidy table of networks probed on tasks: its columns, in one place, and what becomes of its rows.

A row is one trained network probed on one task: who it is, what the closed form says of its corruption and the task,
what its probe found, and what else was measured of the network. A table that holds the required columns can come from
anywhere, and rows can be added to it.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.alignment_vs_probe.agreement import Panel
from mae_align.runtime.errors import InputError

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        name: in the header. of: type of its cells. required: whether the analysis needs it. text: what it says.
    """

    name: str
    of: type
    required: bool
    text: str


COLUMNS: tuple[Column, ...] = (
    Column("dataset", str, True, "data set"),
    Column("task", str, True, "name of the task"),
    Column("task_kind", str, True, "kind of the task"),
    Column("patch_size", int, True, "side of a patch, pixels"),
    Column("mask_ratio", float, True, "share of the patches that is hidden, as asked for"),
    Column("objective", str, True, "training objective: matched (all raw pixels) or standard (hidden patches)"),
    Column("seed", int, True, "seed of the network"),
    Column("probe_r2_test", float, True, "r2 of the probe on test images"),
    Column("probe_r2_train", float, False, "r2 of the probe on the images it was fitted on"),
    Column("probe_r2_val", float, False, "r2 of the probe on validation images"),
    Column("probe_accuracy_train", float, False, "accuracy of the probe on the images it was fitted on; classes only"),
    Column("probe_accuracy_val", float, False, "accuracy of the probe on validation images; classes only"),
    Column("probe_accuracy_test", float, False, "accuracy of the probe on test images; classes only"),
    Column("closed_eval_r2_logmean", float, True, "closed form: held-out r2, mean over log k up to the rank"),
    Column("closed_eval_r2_k8", float, False, "closed form: held-out r2 of 8 features"),
    Column("closed_eval_r2_k32", float, False, "closed form: held-out r2 of 32 features"),
    Column("closed_eval_r2_k128", float, False, "closed form: held-out r2 of 128 features"),
    Column("closed_r2_logmean", float, False, "closed form: in-sample r2, mean over log k up to the rank"),
    Column("closed_r2_k8", float, False, "closed form: in-sample r2 of 8 features"),
    Column("closed_r2_k32", float, False, "closed form: in-sample r2 of 32 features"),
    Column("closed_r2_k128", float, False, "closed form: in-sample r2 of 128 features"),
    Column("closed_rank", int, False, "closed form: number of features that the images and the corruption leave"),
    Column("closed_clipped", str, False, "closed form: numbers of features over the rank, answered at the rank"),
    Column("reconstruction_loss", float, True, "held-out training loss, comparable within an objective only"),
    Column("rankme", float, True, "effective rank of the features of test images"),
    Column("latent", int, False, "number of features of the encoder"),
    Column("realized_ratio", float, False, "share of the patches that is hidden, in whole patches"),
    Column("probe_name", str, False, "protocol: probe"),
    Column("probe_features", str, False, "protocol: what it was fitted on"),
    Column("probe_normalization", str, False, "protocol: normalisation of the features"),
    Column("probe_n_train", int, False, "protocol: images it was fitted on"),
    Column("probe_n_val", int, False, "protocol: images its strength was chosen on"),
    Column("probe_n_test", int, False, "protocol: images it was tested on"),
    Column("probe_seed", int, False, "protocol: seed of the split"),
    Column("probe_strength", float, False, "protocol: chosen strength"),
    Column("probe_selected_by", str, False, "protocol: what was best on the validation images"),
)
"""All columns that the analysis knows; others are kept and ignored. Numbers of features may be any."""
_CLOSED = re.compile(r"closed_(eval_)?r2_k(\d+)")
KEYS = ("dataset", "task", "patch_size", "mask_ratio", "objective", "seed")
"""What tells rows apart: one row for each combination."""
REQUIRED = tuple(column.name for column in COLUMNS if column.required)
"""Columns without which there is no analysis."""


def closed_form_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns of held-out r2 of a number of features that rows have, fewest features first."""
    found = {int(match[2]): name for row in rows for name in row if (match := _CLOSED.fullmatch(name)) and match[1]}
    return tuple(found[k] for k in sorted(found))


def read_table(path: str | Path) -> list[Row]:
    """Read a tidy CSV.

    Args:
        path: of the file; columns by name, in any order, further ones allowed.

    Returns:
        Rows with cells of the types of ``COLUMNS``; an empty cell is NaN in columns of numbers.

    Raises:
        InputError: no such file, or what :func:`check_rows` finds.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows: list[Row] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read {path} ({why}): give a CSV with the columns of this experiment") from None
    try:
        return check_rows(rows)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows with cells of the right types.

    Args:
        rows: mappings of column to cell, numbers or text.

    Returns:
        New rows.

    Raises:
        InputError: no rows, a required column that is missing, a cell that is no number, two rows of the same network
            and task.
    """
    if not rows:
        raise InputError("the table has no rows: give those of rows.csv of a run")
    seen: dict[tuple[Any, ...], int] = {}
    checked = []
    for number, row in enumerate(rows, start=1):
        lost = [name for name in REQUIRED if row.get(name) in (None, "")]
        if lost:
            raise InputError(f"row {number} has no {lost[0]}: the table needs {', '.join(REQUIRED)}")
        cells = {name: _cell(value, _type(name), name, number) for name, value in row.items() if name}
        key = tuple(cells[name] for name in KEYS)
        if key in seen:
            raise InputError(f"rows {seen[key]} and {number} have the same {', '.join(KEYS)}: drop one of them")
        seen[key] = number
        checked.append(cells)
    return checked


_TYPES = {column.name: column.of for column in COLUMNS}


def _type(name: str) -> type:
    return _TYPES.get(name, float if _CLOSED.fullmatch(name) else str)


def _cell(value: Any, of: type, name: str, number: int) -> Any:
    if of is str:
        return "" if value is None else str(value)
    if value is None or value == "":
        return math.nan
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise InputError(f"row {number}: {name} is {value!r}, not a number") from None
    return int(found) if of is int and found.is_integer() else found


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The rows of one data set and objective, as a panel.

    Attributes:
        dataset, objective: which. panel: scores, predictions and rivals. left_out: tasks without all scores.
        networks_left_out: networks that no more than half of the tasks have.
    """

    dataset: str
    objective: str
    panel: Panel
    left_out: tuple[str, ...]
    networks_left_out: int

    @property
    def name(self) -> str:
        """For titles and tables."""
        return f"{self.dataset}, {self.objective} loss"


def groups_of(rows: Sequence[Row], predicted: str, observed: str) -> list[Group]:
    """One panel per data set and objective.

    Args:
        rows: of :func:`check_rows`. predicted, observed: columns.

    Returns:
        Groups in the order of the rows. Tasks that lack a score or prediction on a network that other tasks of the
        group have are left out, by name, and so are networks that no more than half of the tasks have, by number; a
        column that no task has gives no group.

    Raises:
        InputError: a network whose own measures differ between tasks; fewer than two tasks or three ratios.
    """
    found = []
    for dataset, objective in dict.fromkeys((row["dataset"], row["objective"]) for row in rows):
        part = [row for row in rows if (row["dataset"], row["objective"]) == (dataset, objective)]
        kinds = {row["task"]: row["task_kind"] for row in part}
        axes = [sorted({row[name] for row in part}) for name in ("patch_size", "mask_ratio", "seed")]
        shape = tuple(map(len, axes))
        tasks = list(kinds)
        scores, closed = (np.full((len(tasks), *shape), np.nan) for _ in range(2))
        networks = {name: np.full(shape, np.nan) for name in ("reconstruction_loss", "rankme")}
        for row in part:
            at = tuple(
                axis.index(row[name]) for axis, name in zip(axes, ("patch_size", "mask_ratio", "seed"), strict=True)
            )
            scores[(tasks.index(row["task"]), *at)] = row.get(observed, math.nan)
            closed[(tasks.index(row["task"]), *at)] = row.get(predicted, math.nan)
            for name, values in networks.items():
                if np.isfinite(values[at]) and not math.isclose(values[at], row[name], rel_tol=1e-5):
                    who = f"{dataset}, {objective}, patch size {_who(row)}"
                    raise InputError(f"{name} of one network ({who}) differs between its tasks: it is not one network")
                values[at] = row[name]
        there = np.isfinite(scores) & np.isfinite(closed)
        whole = np.asarray(there.any((1, 2, 3)))
        # The networks that most tasks have; a task that lacks one of them is left out.
        wanted = np.asarray(there[whole].mean(0) > 0.5) if whole.any() else np.zeros(shape, bool)
        dropped = int((there.any(0) & ~wanted).sum())
        kept = [i for i in range(len(tasks)) if (there[i] | ~wanted).all() and whole[i]]
        if not kept:
            continue
        scores, closed = np.where(wanted, scores[kept], np.nan), np.where(wanted, closed[kept], np.nan)
        count = np.isfinite(closed).sum(-1)
        mean = np.where(count > 0, np.nansum(closed, -1) / np.maximum(count, 1), np.nan)
        rivals = {
            "mask ratio": np.broadcast_to(np.array(axes[1], np.float64), shape[:2]),
            "lower reconstruction loss": -networks["reconstruction_loss"],
            "RankMe": networks["rankme"],
        }
        names = tuple(tasks[i] for i in kept)
        panel = Panel(names, tuple(kinds[t] for t in names), tuple(axes[0]), tuple(axes[1]), scores, mean, rivals)
        found.append(Group(dataset, objective, panel, tuple(t for t in tasks if t not in names), dropped))
    return found


def _who(row: Mapping[str, Any]) -> str:
    return f"{row['patch_size']}, ratio {row['mask_ratio']:g}, seed {row['seed']}"
