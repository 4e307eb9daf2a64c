"""What stands after the colon of a data set's name: a path and, where a file leaves a choice, which of its columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mae_align.runtime.errors import InputError


def path_and_choices(argument: str, usage: str, known: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """A path and the choices behind it, ``PATH:KEY=VALUE:KEY=VALUE``; ``~`` stands for the home folder.

    Args:
        argument: as it was given.
        usage: how it is to be written, for messages.
        known: the keys that there are.

    Raises:
        InputError: a key that is not known, twice, or without a value.

    Example:
        >>> path_and_choices("faces.csv:numbers=age,height", "table:FILE", ["classes", "numbers"])
        (PosixPath('faces.csv'), {'numbers': 'age,height'})
    """
    path, *rest = argument.split(":")
    choices: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals and not choices:  # a colon of the path itself
            path = f"{path}:{part}"
        elif key not in known or not value or key in choices:
            raise InputError(f"{part!r} in {argument!r}: write {usage}, with {', '.join(f'{k}=...' for k in known)}")
        else:
            choices[key] = value
    return Path(os.path.expanduser(path)), choices
