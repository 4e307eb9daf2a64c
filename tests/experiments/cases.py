"""What tests of experiments share: run one as its command does, and read what it left."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import ModuleType

import pytest

from experiments.harness.cli import launch_experiment
from experiments.harness.data import Split


def run_experiment(module: ModuleType, *arguments: object) -> None:
    """Run the experiment of a module with the arguments of its command line."""
    load = getattr(module, "load", Split.load)
    launch_experiment(
        module.main, module.Config, module.PRESETS, module.COLUMNS, load, [str(argument) for argument in arguments]
    )


def refusal(capsys: pytest.CaptureFixture[str], module: ModuleType, *arguments: object) -> str:
    """The one line with which an experiment refuses its arguments; it must print nothing else."""
    with pytest.raises(SystemExit) as end:
        run_experiment(module, *arguments)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def reopen(folder: Path) -> None:
    """Make a run that has ended one that was stopped before it wrote its verdict."""
    record = folder / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": None}))


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
