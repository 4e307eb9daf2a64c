"""Arrays with a header in one file: written whole or not at all, versioned, with a checksum, and without pickle.

The file is an uncompressed ``.npz`` whose first member, ``header``, is JSON text in UTF-8 bytes::

    {"format": "mae_align", "kind": ..., "version": ..., "arrays": [names], "fields": {...}, "sha256": ...}

and whose other members are the arrays. ``sha256`` covers the kind, the version, the fields and every array with its
name, dtype and shape.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_align.errors import InputError
from mae_align.store import fingerprint

_FORMAT = "mae_align"
_HEADER = "header"


class ArrayFile(NamedTuple):
    """What a file holds.

    Attributes:
        fields: JSON values. arrays: by name.
    """

    fields: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write_arrays(
    path: str | Path, kind: str, version: int, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a file beside its place and move it there.

    Args:
        path: the file; its folder is made if missing.
        kind: what the file holds, in words for messages. version: of this kind, from 1.
        fields: JSON values. arrays: of numbers, by name; "header" is taken.

    Raises:
        InputError: a place that cannot be written to.

    Example:
        >>> file = os.path.join(tempfile.mkdtemp(), "x.npz")
        >>> write_arrays(file, "numbers", 1, {"unit": "m"}, {"a": np.arange(2)})
        >>> read_arrays(file, "numbers", 1)
        ArrayFile(fields={'unit': 'm'}, arrays={'a': array([0, 1])})
    """
    path = Path(path)
    header = {
        "format": _FORMAT,
        "kind": kind,
        "version": version,
        "arrays": list(arrays),
        "fields": dict(fields),
        "sha256": _checksum(kind, version, fields, arrays),
    }
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another place") from error
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **{_HEADER: text}, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {path} ({error.strerror}): choose another place") from error
        raise


def remove_unfinished(path: str | Path) -> None:
    """Remove what writers of ``path`` that were killed left beside it; no other writer may be at work.

    Example:
        >>> remove_unfinished(os.path.join(tempfile.mkdtemp(), "x.npz"))
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def read_arrays(path: str | Path, kind: str, version: int) -> ArrayFile:
    """Read a file of a kind and check every byte of it.

    Args:
        path: the file. kind: as it was written. version: the newest that the caller understands.

    Returns:
        Fields and arrays as they were written.

    Raises:
        InputError: a missing, foreign, damaged or newer file, or one of another kind.

    Example:
        >>> read_arrays("nowhere.npz", "moments", 1)
        Traceback (most recent call last):
        ...
        mae_align.errors.InputError: nowhere.npz: there is no such file
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    damaged = f"{path} is damaged or cut off: make the {kind} again"
    foreign = f"{path} is not a file of {kind} that mae_align wrote"
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                # The first bytes of a zip file without its end: cut off.
                raise InputError(damaged if file.read(4) == b"PK\x03\x04" else foreign)
        # Opened here: NumPy leaves a file open where its directory is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            if _HEADER not in members.files:
                raise InputError(foreign)
            header = _parsed(members[_HEADER])
            if header.get("format") != _FORMAT:
                raise InputError(foreign)
            if header["kind"] != kind:
                raise InputError(f"{path} holds {header['kind']}, not {kind}: give another file")
            if header["version"] > version:
                raise InputError(
                    f"{path} has version {header['version']} of the format of {kind}, newer than {version}: "
                    "read it with the mae_align that wrote it, or update this one"
                )
            arrays = {name: members[name] for name in header["arrays"]}
        if header["sha256"] != _checksum(kind, header["version"], header["fields"], arrays):
            raise InputError(damaged)
    except InputError:
        raise
    except (ValueError, OSError, EOFError, KeyError, TypeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise InputError(damaged) from error
    return ArrayFile(header["fields"], arrays)


def _parsed(text: np.ndarray) -> dict[str, Any]:
    """The header, or an empty one where there is other content under its name."""
    try:
        header = json.loads(text.tobytes().decode())
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def _checksum(kind: str, version: int, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    settings = {"kind": kind, "version": version, "fields": dict(fields), "arrays": list(arrays)}
    # Through JSON and back, as the reader will see the fields: a tuple is a list there.
    return fingerprint(arrays.values(), json.loads(json.dumps(settings)))
