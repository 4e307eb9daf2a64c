"""Tables of results in the docs are what their run folders say."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "tables.py"
COLUMNS = '{"k": "k", "r2": "r2 .1%", "x": "{r2:.2f} at {k}"}'
TABLE = f'<!-- table {{"run": "toy", "csv": "rows", "query": "k < 3", "columns": {COLUMNS}}} -->\n'


@pytest.fixture
def tables(tmp_path):
    run, docs = tmp_path / "run", tmp_path / "docs"
    run.mkdir()
    docs.mkdir()
    (run / "rows.csv").write_text("k,r2\n1,0.25\n2,\n3,0.5\n")
    command = "python -m experiments.toy --data npz:/a/b.npz --ks 1 --out /a/c"
    (run / "run.json").write_text(json.dumps({"command": command, "finished": "2026-01-02T03:04:05+00:00"}))
    (run / "config.json").write_text('{"config": {"data": "idx:/a/b"}}')
    (run / "summary.txt").write_text("It is.\nFigures: /a/b.png\n")
    for name in ("data.json", "columns.md"):
        (run / name).write_text("")
    (docs / "tables.py").write_text(SCRIPT.read_text())
    (docs / "page.md").write_text(f"Before.\n\n{TABLE}old\n<!-- /table -->\nAfter.\n")
    return runpy.run_path(str(docs / "tables.py")), run, docs


def test_a_table_is_written_from_its_run(tables, capsys):
    module, run, docs = tables
    assert module["main"](["keep", str(run), "toy"]) == 0
    assert module["main"](["check"]) == 1 and "page.md" in capsys.readouterr().out
    assert module["main"](["write"]) == 0 and module["main"](["check"]) == 0
    rows = "| k | r2 | x |\n|---|---|---|\n| 1 | 25.0% | 0.25 at 1 |\n| 2 |  |  |\n"
    expected = rows + "\n`python -m experiments.toy --data npz:FILE --ks 1`, 2026-01-02.\n"
    assert (docs / "page.md").read_text() == f"Before.\n\n{TABLE}{expected}<!-- /table -->\nAfter.\n"


def test_kept_runs_name_no_path_of_a_machine(tables):
    module, run, docs = tables
    module["keep"](run, "toy")
    assert "/a" not in "".join(path.read_text() for path in (docs / "runs" / "toy").iterdir())
    (run / "run.json").write_text('{"finished": null}')
    with pytest.raises(SystemExit, match="not finished"):
        module["keep"](run, "toy")


def test_the_tables_of_the_docs_are_those_of_their_runs():
    found = subprocess.run([sys.executable, str(SCRIPT), "check"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
