"""The tidy table of networks probed on tasks: its columns and what becomes of its rows.

A row is one trained network probed on one task: who it is, what the closed form says of its corruption and the task,
what its probe found, and what else was measured of the network. A table that holds the required columns can come from
anywhere, and rows can be added to it.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.alignment_vs_probe.agreement import Panel
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import refused_together

Row = dict[str, Any]


REQUIRED: Mapping[str, type] = {
    "dataset": str,
    "task": str,
    "task_kind": str,
    "patch_size": int,
    "mask_ratio": float,
    "objective": str,
    "seed": int,
    "probe_r2_test": float,
    "closed_eval_r2_logmean": float,
    "reconstruction_loss": float,
    "rankme": float,
}
"""Columns without which there is no analysis, and the types of their cells."""
_TYPES: Mapping[str, type] = {
    **REQUIRED,
    **{f"probe_{what}_{part}": float for what in ("accuracy", "r2") for part in ("train", "val", "test")},
    **dict.fromkeys(("closed_r2_logmean", "realized_ratio", "probe_strength"), float),
    **dict.fromkeys(("closed_rank", "latent", "probe_n_train", "probe_n_val", "probe_n_test", "probe_seed"), int),
}
_CLOSED = re.compile(r"closed_(eval_)?r2_k(\d+)")
KEYS = ("dataset", "task", "patch_size", "mask_ratio", "objective", "seed")
"""What tells rows apart: one row for each combination."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of a file, to be analysed.

    Attributes:
        name: of the file, without its ending.
        rows: of :func:`check_rows`.
        digest: of the file.
    """

    name: str
    rows: list[Row]
    digest: str

    @classmethod
    def read(cls, path: str) -> Table:
        """Read a tidy CSV; of several processes all refuse what one cannot read.

        Args:
            path: of the file; columns by name, in any order, further ones allowed.

        Returns:
            Rows with cells of their types; an empty cell is NaN in columns of numbers.

        Raises:
            InputError: no such file, or what :func:`check_rows` finds.
        """
        with refused_together():
            try:
                content = Path(path).read_bytes()
                lines = io.StringIO(content.decode("utf-8"), newline="")
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise InputError(
                    f"cannot read {path} ({why}): give a CSV with the columns of this experiment"
                ) from None
            try:
                rows = check_rows(list(csv.DictReader(lines)))
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            return cls(Path(path).stem, rows, hashlib.sha256(content).hexdigest())

    @property
    def label(self) -> str:
        """What the run folder is called after."""
        return self.name

    @property
    def description(self) -> str:
        """The first line of the summary."""
        return f"{self.name}: {len(self.rows)} rows"

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Hash of the file."""
        return {"rows": self.digest}


def closed_form_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns of held-out r2 of a number of features that rows have, fewest features first."""
    found = {int(match[2]): name for row in rows for name in row if (match := _CLOSED.fullmatch(name)) and match[1]}
    return tuple(found[k] for k in sorted(found))


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
        dataset: which.
        objective: which.
        panel: scores, predictions and rivals.
        left_out: tasks without all scores.
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


def enough_ratios(rows: Sequence[Row]) -> list[Row]:
    """Rows of the losses that have networks at three mask ratios; fewer have no correlation."""
    ratios: dict[str, set[float]] = {}
    for row in rows:
        ratios.setdefault(row["objective"], set()).add(row["mask_ratio"])
    return [row for row in rows if len(ratios[row["objective"]]) >= 3]


def groups_of(rows: Sequence[Row], predicted: str, observed: str) -> list[Group]:
    """One panel per data set and objective.

    Args:
        rows: of :func:`check_rows`.
        predicted: column.
        observed: column.

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
