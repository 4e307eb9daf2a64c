"""The rooms of the package: what may lie where, who may import whom. docs/architecture.md draws it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mae_align"
# Lower rooms come first; rooms of one line do not know each other.
FLOORS = (
    {"runtime"},
    {"data"},
    {"moments"},
    {"corruption"},
    {"closed_form", "models"},
    {"train"},
    {"probes"},
    {"metrics"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = FLOOR.keys() - {"metrics"}
BARE = ("mae_align", None)  # for its version, which all rooms may know


def named(code: str) -> Iterator[list[str]]:
    """Dotted names that code imports, at any depth, in parts, and what it takes from the bare package."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names if (alias.name, alias.asname) != BARE)
        elif isinstance(node, ast.ImportFrom):
            yield from ([*"." * node.level, *(node.module or "").split("."), alias.name] for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield [node.value.id, node.attr]


def upward(room: str, code: str) -> list[str]:
    """What a module in a room takes from a room above or beside it, from the package's public names or its users."""
    found = []
    for first, *rest in named(code):
        target = rest[0] if rest else ""
        if first == "mae_align" and target != "__version__":
            climbs = target != room and FLOOR.get(target, len(FLOORS)) >= FLOOR[room]
        else:
            climbs = first in (".", "experiments", "benchmarks", "tests")
        if climbs:
            found.append(".".join([first, *rest]))
    return found


def test_imports_run_one_way_and_the_experiments_are_not_known():
    files = [*PACKAGE.glob("*/**/*.py"), PACKAGE / "metrics.py"]
    assert len(files) > 50
    for file in files:
        code = file.read_text(encoding="utf-8")
        assert upward(file.relative_to(PACKAGE).with_suffix("").parts[0], code) == [], file
        assert "experiments." not in code, file


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("runtime", "from mae_align.closed_form.point import solve"),
        ("data", "from mae_align import moments"),
        ("moments", "import mae_align.corruption.base"),
        ("models", "def late():\n    from mae_align.closed_form.targets import HighPass"),
        ("closed_form", "import mae_align.models"),
        ("closed_form", "import mae_align\nmae_align.train"),
        ("train", "from mae_align.probes import ridge_probe"),
        ("probes", "import mae_align as ma"),
        ("metrics", "from experiments.harness import cli"),
        ("corruption", "from mae_align import Moments"),
        ("corruption", "from ..train import loop"),
    ],
)
def test_a_climbing_import_is_found(room, code):
    assert len(upward(room, code)) == 1
    own = f"from mae_align.{room} import anything\nfrom mae_align.runtime.errors import InputError"
    assert upward(room, f"{own}\nimport mae_align, numpy.linalg\nmae_align.__version__") == []


def test_nothing_but_rooms_lies_at_the_top():
    found = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert found == {*ROOMS, "__init__.py", "metrics.py", "py.typed"} and len(found) <= 12


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_every_room_says_its_idea_and_where_its_mathematics_stands(room):
    said = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert any(where in " ".join(said.split()) for where in ("docs/theory.md, section", "no mathematics"))


def test_documents_name_files_that_exist_and_functions_that_stand_in_them():
    root = PACKAGE.parent
    documents = [root / "README.md", root / "CONTRIBUTING.md", *root.glob("docs/*.md")]
    for document in documents:
        text = document.read_text(encoding="utf-8")
        for path in re.findall(r"\b(?:mae_align|experiments|tests|benchmarks|docs)/[\w/]+\.(?:py|md|sh)\b", text):
            assert (root / path).is_file(), f"{document.name}: {path}"
    # Section 12 of theory.md: | equation | `module` | `function`, ... |
    rows = re.findall(r"^\|[^|]*\| `([\w/]+\.py)` \|([^|]*)\|$", (root / "docs/theory.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for path, names in rows:
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", (root / path).read_text(encoding="utf-8")), f"{path}: {name}"


def test_no_experiment_imports_another():
    """What two need lies in the harness: the code of a run is that of its experiment, the harness and the package."""
    root = PACKAGE.parent / "experiments"
    for file in root.rglob("*.py"):
        own = file.relative_to(root).parts[0].removesuffix(".py")
        if own in ("harness", "runs", "__init__", "__main__"):
            continue
        named = set(re.findall(r"(?:from|import) experiments\.(\w+)", file.read_text(encoding="utf-8")))
        assert named <= {own, "harness"}, file
