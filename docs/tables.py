"""Tables of results in docs/*.md, written from run folders; none is copied by hand.

    python docs/tables.py keep RUN_FOLDER NAME    # keeps the tables and settings of a run in docs/runs/NAME
    python docs/tables.py write                   # writes every table of docs/*.md anew
    python docs/tables.py check                   # status 1 if one of them is not what its run says

A table stands between two comments. The first says where it comes from, as JSON::

    <!-- table {"run": "NAME", "csv": "masks", "query": "k == 2", "columns": {"score": "r2 .0%"}} -->
    <!-- /table -->

``columns`` maps the head of a column to a column of the CSV and, after a space, its format; or to a text with columns
in braces, ``"{a:.2f} ({a_low:.2f}, {a_high:.2f})"``. Where a number is missing the cell is empty. ``query`` may be left
out; it selects rows as pandas does. The command and the date of the run stand below the table.
"""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path
from typing import Any

import pandas as pd

DOCS = Path(__file__).parent
_TABLE = re.compile(r"(<!-- table (\{.*?\}) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
_KEPT = ("config.json", "data.json", "run.json", "columns.md", "summary.txt")
_MOST_BYTES = 200_000


def keep(run: Path, name: str) -> None:
    """Copy what tables are made of, without the paths of this machine.

    Raises:
        SystemExit: the run is not finished.
    """
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    if not record["finished"]:
        raise SystemExit(f"{run} is not finished: run its command again first")
    target = DOCS / "runs" / name
    target.mkdir(parents=True, exist_ok=True)
    tables = [path.name for path in run.glob("*.csv") if path.stat().st_size <= _MOST_BYTES]
    for file in [*_KEPT, *sorted(tables)]:
        text = (run / file).read_text(encoding="utf-8")
        text = re.sub(r"\b(idx|folder|prepared):[^\s\"']+", r"\1:DIR", re.sub(r"\bnpz:[^\s\"']+", "npz:FILE", text))
        text = re.sub(r" --out[ =][^\s\"']+", "", text)
        if file == "summary.txt":
            text = "\n".join(line for line in text.splitlines() if not line.startswith("Figures:")) + "\n"
        (target / file).write_text(text, encoding="utf-8")


def table(spec: dict[str, object]) -> str:
    """One table as Markdown, and the command and date of its run.

    Args:
        spec: run, csv, columns and perhaps query, as in the module's docstring.
    """
    folder = DOCS / "runs" / str(spec["run"])
    frame = pd.read_csv(folder / f"{spec['csv']}.csv")
    if "query" in spec:
        frame = frame.query(str(spec["query"]))
    columns = spec["columns"]
    assert isinstance(columns, dict)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in frame.to_dict("records"):
        lines.append("| " + " | ".join(_cell(row, source) for source in columns.values()) + " |")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return "\n".join(lines) + f"\n\n`{record['command']}`, {record['finished'][:10]}.\n"


def _cell(row: dict[str, Any], source: str) -> str:
    """One cell: a column, a column and its format, or a text with columns in braces."""
    if "{" not in source:
        column, _, form = source.partition(" ")
        source = f"{{{column}:{form}}}" if form else f"{{{column}}}"
    names = [name for _, name, _, _ in string.Formatter().parse(source) if name]
    return "" if any(pd.isna(row[name]) for name in names) else source.format(**row)


def written(text: str) -> str:
    """A page with every table written anew."""
    return _TABLE.sub(lambda found: found[1] + table(json.loads(found[2])) + found[4], text)


def main(argv: list[str]) -> int:
    """Keep, write or check."""
    if argv[:1] == ["keep"] and len(argv) == 3:
        keep(Path(argv[1]), argv[2])
        return 0
    if argv not in (["write"], ["check"]):
        print(__doc__, file=sys.stderr)
        return 2
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = written(old)
        if new != old:
            stale.append(page.name)
            if argv == ["write"]:
                page.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'written' if argv == ['write'] else 'not what its runs say: python docs/tables.py write'}")
    return int(bool(stale) and argv == ["check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
