"""README's Python snippets run as they stand, one after another, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def snippets() -> list[str]:
    """The code of every python block, in order, behind as many blank lines as put it on its line of README."""
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: block.start(1)].count("\n") + block[1] for block in found]


def test_the_python_snippets_run_in_order(capsys):
    blocks = snippets()
    assert len(blocks) == README.read_text(encoding="utf-8").count("```python") >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert capsys.readouterr().out == ""
    result, metrics = names["result"], names["metrics"]
    assert "je_eval_r2" in result and result.eval_r2.notnull().all()  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue]
    assert metrics["loss"].shape == (40, 2)  # pyright: ignore[reportIndexIssue]
