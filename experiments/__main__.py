"""Lists the experiments: their names, what of the paper they show, how long they take, and their questions."""

from __future__ import annotations

import ast
import difflib
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent
_NOT_RUN = {"__init__", "__main__", "harness", "__pycache__"}


class Listed(NamedTuple):
    """An experiment as its module's docstring describes it.

    Attributes:
        name: what follows ``python -m experiments.``
        paper: figure or theorem, from the line ``Paper: ...``; empty without one.
        time: of the default command on 2 CPU cores, from the line ``Time: ...``.
        question: the first line.
    """

    name: str
    paper: str
    time: str
    question: str


def experiments(root: Path = ROOT) -> list[Listed]:
    """Everything in the folder that runs, by name; read from the files, nothing is imported.

    Example:
        >>> [one.paper for one in experiments() if one.name == "minimal"]
        ['Theorem 3, without a corruption']
    """
    found = []
    for path in sorted(root.iterdir()):
        file = path / "__main__.py" if path.is_dir() else path
        if path.stem in _NOT_RUN or file.suffix != ".py" or not file.exists():
            continue
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        paper, time = (re.search(rf"^{word}: (.*)$", text, re.MULTILINE) for word in ("Paper", "Time"))
        question = text.partition("\n")[0]
        found.append(Listed(path.stem, paper[1] if paper else "", time[1] if time else "", question))
    return found


def table(listed: list[Listed]) -> str:
    """The list as aligned text."""
    rows = [("python -m experiments.", "paper", "2 CPU cores", "question")]
    rows += [(one.name, one.paper, one.time, one.question) for one in listed]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)


def main(argv: list[str]) -> int:
    """Print the list; a name as an argument gets the command to run, or the nearest name."""
    listed = experiments()
    if not argv or argv[0] in ("-h", "--help"):
        print(table(listed))
        return 0
    names = [one.name for one in listed]
    name = argv[0].removeprefix("experiments.")
    if name in names:
        print(f"run it with: python -m experiments.{name} --help", file=sys.stderr)
        return 2
    near = difflib.get_close_matches(name, names, 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else "python -m experiments lists them"
    print(f"error: there is no experiment {name!r}: {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
