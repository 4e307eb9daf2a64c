"""Which runs are there, and how do two of them differ?

Lists the run folders below a folder: experiment, data set, the options that were given, date and state. Compares two of
them: the settings that differ, and their main tables side by side.

Paper: none, for run folders
Time: 1 second

    python -m experiments.runs                      # those below runs/
    python -m experiments.runs list OTHER_FOLDER
    python -m experiments.runs compare RUN_A RUN_B
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from experiments.harness.cli import described, one_line_errors
from experiments.harness.config import written_options
from experiments.harness.run import code_of
from mae_align.runtime.errors import InputError

# Not what a run is about.
_PLACES = ("--out", "--data")


def list_runs(folder: Annotated[Path, tyro.conf.Positional] = Path("runs")) -> None:
    """List the run folders below a folder, newest first.

    Args:
        folder: where they lie.
    """
    found = sorted(folder.rglob("run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not found:
        raise InputError(f"there is no run folder below {folder}: give the folder that holds them")
    rows = []
    for path in found:
        record = _read(path)
        rows.append(
            {
                "folder": str(path.parent),
                "experiment": record.get("experiment", "?"),
                "data": record.get("data", "?"),
                "options": _options(record.get("command", "")) or "the defaults",
                "started": str(record.get("started", "?"))[:16].replace("T", " "),
                "state": _state(record),
            }
        )
    print(_left_aligned(pd.DataFrame(rows)))


def compare(a: tyro.conf.Positional[Path], b: tyro.conf.Positional[Path]) -> None:
    """Print the settings in which two runs differ, and their main tables side by side.

    Args:
        a: a run folder.
        b: another of the same experiment.
    """
    first, second = _settings(a), _settings(b)
    if first["--experiment"] != second["--experiment"]:
        raise InputError(
            f"{a} is a run of {first['--experiment']} and {b} of {second['--experiment']}: give two of one"
        )
    rows = [
        {"setting": name, "A": first.get(name, "-"), "B": second.get(name, "-")}
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    ]
    print(f"A: {a}\nB: {b}\n")
    print(_left_aligned(pd.DataFrame(rows)) if rows else "The settings are the same.")
    same = [name for name, part in _read(a / "data.json").items() if _read(b / "data.json").get(name) == part]
    print(f"\nThe same images and labels: {', '.join(same) or 'none'}.")
    names = [_read(folder / "run.json").get("table") for folder in (a, b)]
    if names[0] is None or names[0] != names[1]:
        print("They have no main table in common.")
        return
    frames = [pd.read_csv(folder / f"{names[0]}.csv") for folder in (a, b)]
    # A column that is called like a setting, in the singular, says which cell a row is of.
    cells = [name for name in frames[0] if {f"--{name}s".replace("_", "-"), f"--{name}".replace("_", "-")} & set(first)]
    print(f"\n{names[0]}.csv\n{side_by_side(frames[0], frames[1], cells)}")


def side_by_side(a: pd.DataFrame, b: pd.DataFrame, cells: Sequence[str] = ()) -> str:
    """Two tables by their common columns of whole numbers and text, and those named; of every other the values of both.

    Example:
        >>> print(side_by_side(pd.DataFrame({"k": [1], "r2": [0.5]}), pd.DataFrame({"k": [1], "r2": [0.25]})))
         k  r2 (A)  r2 (B)
         1     0.5    0.25
    """
    common = [name for name in a if name in b]
    keys = [name for name in common if name in cells or "f" not in (a[name].dtype.kind, b[name].dtype.kind)]
    if not keys or a.duplicated(keys).any() or b.duplicated(keys).any():
        a, b = (frame.reset_index(names="row") for frame in (a, b))
        keys = ["row"]
    both = a.merge(b, on=keys, how="outer", suffixes=(" (A)", " (B)"), sort=False)
    values = [name for name in a if name not in keys and name in b]
    return both[keys + [f"{name} ({side})" for name in values for side in "AB"]].to_string(index=False, na_rep="-")


def _state(record: dict[str, Any]) -> str:
    """Whether a run has ended, and what the same command does."""
    same = record.get("code") == code_of(str(record.get("experiment")))
    if record.get("finished"):
        return "finished" if same else "finished, by other code"
    return "not finished: the same command goes on" if same else "not finished, by other code"


def _left_aligned(frame: pd.DataFrame) -> str:
    """A table of text, its columns as wide as their longest cell."""
    cells = [list(frame.columns), *frame.astype(str).to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _settings(folder: Path) -> dict[str, str]:
    """Settings of a run by option."""
    written, more = _read(folder / "config.json"), _read(folder / "run.json").get("added", {})
    found: dict[str, list[str]] = {}
    last = ""
    options = [*written_options(written.get("config", {})), *written_options(more)]
    for word in ["--experiment", written.get("experiment", "?"), *options]:
        if word.startswith("--"):
            found[word] = []
            last = word
        else:
            found[last].append(word)
    # A truth value has no word of its own: --NAME or --no-NAME.
    return {
        re.sub(r"(^--|\.)no-", r"\1", name): " ".join(values) or ("no" if re.search(r"(^--|\.)no-", name) else "yes")
        for name, values in found.items()
    }


def _options(command: str) -> str:
    """What was given on the command line beside the data and the folder."""
    words, kept, skipping = shlex.split(command)[3:], [], False
    for word in words:
        if word.startswith("--"):
            skipping = word.partition("=")[0] in _PLACES
        if not skipping:
            kept.append(word)
    return shlex.join(kept)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        raise ValueError
    except OSError:
        raise InputError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except ValueError:
        raise InputError(f"{path} is damaged") from None


def main(argv: list[str] | None = None) -> None:
    """Read the command line; without a command, list."""
    import sys

    words = sys.argv[1:] if argv is None else argv
    command, description = described(main)
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            {"list": list_runs, "compare": compare}, prog=command, description=description or "", args=words or ["list"]
        )


if __name__ == "__main__":
    main()
