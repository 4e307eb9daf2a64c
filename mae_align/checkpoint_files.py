"""The folder of a run's checkpoints as files: whose it is, and which of them are whole."""

from __future__ import annotations

import enum
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

# Sizes of the files of a checkpoint, written into it when it is complete.
_SIZES = "sizes.json"


def claim(folder: Path, identity: str) -> str | None:
    """Write or compare identity.json.

    Args:
        folder: made if missing. identity: of the run.

    Returns:
        What is wrong, or None.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> claim(folder, "a"), claim(folder, "a"), "another" in str(claim(folder, "b"))
        (None, None, True)
    """
    mark = folder / "identity.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if mark.exists():
            found = json.loads(mark.read_text(encoding="utf-8"))["identity"]
            other = "holds checkpoints of another computation (other data or settings)"
            return None if found == identity else f"{folder} {other}: choose another folder or delete it"
        if any(entry.name.isdecimal() for entry in folder.iterdir()):
            return f"{folder} has checkpoints but no identity.json: choose another folder or delete it"
        unfinished = mark.with_name(".identity.json.tmp")
        unfinished.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")
        os.replace(unfinished, mark)
    except OSError as error:
        return f"cannot use the folder {folder} ({error.strerror}): choose another"
    except (ValueError, KeyError, TypeError):
        return f"{mark} is damaged: delete the folder {folder} and run again"
    return None


def put_aside_damaged(folder: Path) -> str | None:
    """Put checkpoints aside whose files are cut off or missing; what is wrong if no other is left, or None."""
    steps = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())
    found = {step: _condition(folder / str(step), newest=step == steps[-1]) for step in steps}
    whole = [step for step, condition in found.items() if condition is _Condition.WHOLE]
    if found and not whole:
        return none_left(folder, list(found))
    for step, condition in found.items():
        if condition is _Condition.PARTIAL and step < max(whole):
            # A run was killed while it removed the old one.
            shutil.rmtree(folder / str(step))
        elif condition is not _Condition.WHOLE:
            put_aside(folder, step, max(whole))
    return None


class _Condition(enum.Enum):
    """Of the files of a checkpoint: all as they were; some missing and the others as they were; some changed."""

    WHOLE = enum.auto()
    PARTIAL = enum.auto()
    CHANGED = enum.auto()


def _condition(checkpoint: Path, newest: bool) -> _Condition:
    """By size; and the files that Orbax reads at once are JSON."""
    try:
        for file in (checkpoint / "about" / "metadata", checkpoint / "metrics" / "metrics"):
            if file.exists():
                json.loads(file.read_text(encoding="utf-8"))
        sizes = checkpoint / _SIZES
        if not sizes.exists():
            # A run that is killed just after a save has not written them; before the next save it has.
            return _Condition.WHOLE if newest else _Condition.PARTIAL
        before, now = json.loads(sizes.read_text(encoding="utf-8")), _sizes(checkpoint)
    except (ValueError, OSError):
        return _Condition.CHANGED
    if before == now:
        return _Condition.WHOLE
    return _Condition.PARTIAL if now.items() <= before.items() else _Condition.CHANGED


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith(_SIZES))
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}


def write_sizes(checkpoint: Path) -> None:
    """Note the sizes of a complete checkpoint's files in it, once."""
    target = checkpoint / _SIZES
    if target.exists() or not checkpoint.is_dir():
        return
    unfinished = checkpoint / f"{_SIZES}.tmp"
    unfinished.write_text(json.dumps(_sizes(checkpoint)), encoding="utf-8")
    os.replace(unfinished, target)


def put_aside(folder: Path, step: int, used: int) -> None:
    """Move a damaged checkpoint out of the way of the one that will have its step, and say so."""
    place = _free(folder / f"damaged-{step}")
    os.replace(folder / str(step), place)
    message = (
        f"checkpoint {step} in {folder} is damaged and now called {place.name}: step {used} is the newest whole one"
    )
    warnings.warn(message, stacklevel=4)


def none_left(folder: Path, damaged: Sequence[int]) -> str:
    """What to say where no checkpoint can be used."""
    listed = ", ".join(map(str, sorted(damaged)))
    return f"{folder}: every checkpoint ({listed}) is damaged: delete the folder to start anew"


def _free(path: Path) -> Path:
    """The path itself, or with a number behind where that is taken."""
    return next(p for i in itertools.count() if not (p := Path(f"{path}-{i}") if i else path).exists())
