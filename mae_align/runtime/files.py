"""Files that are written whole or not at all, and what tells one computation's results from another's.

* :func:`whole_file`: every file here appears under its name only when it is complete.
* :func:`write_arrays`, :func:`read_arrays`: one file of arrays and fields with a kind, a version and a checksum.
* :func:`fingerprint`, :func:`identity`: a hash of data and settings, and of an object such as a corruption.
* :func:`claim`, :class:`PointStore`: a folder that belongs to one computation, and its finished points, so that one
  that was killed goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import secrets
import types
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mae_align.runtime.errors import InputError

# Of write_arrays: who wrote a file, and the member that says what is in it.
_FORMAT, _HEADER = "mae_align", "header"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write beside its place; it is moved there when the block ends, and removed where the block fails.

    Args:
        path: its place, in a folder that exists; a file that is there stays until then.

    Raises:
        OSError: a place that cannot be written to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with whole_file(path) as file:
        ...     _ = file.write(b"done")
        ...     before = path.exists()
        >>> before, path.read_text()
        (False, 'done')
    """
    # Not tempfile's: its files are for their owner alone, and prepared data or moments may be meant for others.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("xb") as file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(path: Path) -> None:
    """Remove what writers of ``path`` that were killed left beside it; no other writer may be at work.

    Example:
        >>> import tempfile
        >>> remove_unfinished(Path(tempfile.mkdtemp()) / "x.npz")
    """
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


class ArrayFile(NamedTuple):
    """What a file holds.

    Attributes:
        fields: JSON values.
        arrays: by name.
    """

    fields: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write_arrays(
    path: str | Path, kind: str, version: int, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write arrays and fields to one file, whole or not at all.

    Args:
        path: the file; its folder is made if missing.
        kind: what the file holds, in words for messages.
        version: of this kind, from 1.
        fields: JSON values.
        arrays: of numbers, by name; "header" is taken.

    Raises:
        InputError: a place that cannot be written to.

    Example:
        >>> import tempfile
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
        with whole_file(path) as file:
            np.savez(file, allow_pickle=False, **{_HEADER: text}, **arrays)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another place") from error


def read_arrays(path: str | Path, kind: str, version: int) -> ArrayFile:
    """Read a file of a kind and check every byte of it.

    Args:
        path: the file.
        kind: as it was written.
        version: the newest that the caller understands.

    Returns:
        Fields and arrays as they were written.

    Raises:
        InputError: a missing, foreign, damaged or newer file, or one of another kind.

    Example:
        >>> read_arrays("nowhere.npz", "moments", 1)
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: nowhere.npz: there is no such file
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
    """SHA-256 of all that a file holds."""
    settings = {"kind": kind, "version": version, "fields": dict(fields), "arrays": list(arrays)}
    # Through JSON and back, as the reader will see the fields: a tuple is a list there.
    return fingerprint(arrays.values(), json.loads(json.dumps(settings)))


def fingerprint(arrays: Iterable[np.ndarray], settings: Mapping[str, object]) -> str:
    """SHA-256 over arrays and settings: the identity of a computation.

    Args:
        arrays: any arrays.
        settings: JSON-able values (others by their ``repr``).

    Returns:
        64 hexadecimal digits.

    Example:
        >>> len(fingerprint([np.zeros(2)], {"k": 3}))
        64
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def identity(thing: object) -> str:
    """SHA-256 of an object's class and everything it holds: numbers, arrays, tuples, functions, objects of that kind.

    A function is known by its module, name, code, defaults, what it closes over and the globals that it names (those of
    other modules by their name alone).

    Args:
        thing: a corruption, a target operator, or a value that one of them holds.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: a value whose content cannot be told.

    Example:
        >>> identity(2.0) == identity(2.0) != identity(2.5)
        True
    """
    return fingerprint([], {"content": _content(thing)})


def _content(thing: object) -> object:
    """What tells a thing from another, as JSON values."""
    if thing is None or isinstance(thing, str | bool | int | float | bytes):
        return repr(thing)
    if isinstance(thing, np.generic):
        return repr(thing.item())
    if isinstance(thing, np.ndarray):
        return fingerprint([thing], {})
    if isinstance(thing, tuple | list):
        return [type(thing).__name__, *(_content(v) for v in thing)]
    if isinstance(thing, set | frozenset):
        return [type(thing).__name__, *sorted(repr(_content(v)) for v in thing)]
    if isinstance(thing, os.PathLike):
        return [type(thing).__name__, os.fspath(thing)]
    if isinstance(thing, dict):
        return {repr(k): _content(v) for k, v in thing.items()}
    if isinstance(thing, functools.partial):
        return [_content(thing.func), _content(thing.args), _content(thing.keywords)]
    if isinstance(thing, types.MethodType):
        return [_content(thing.__func__), _content(thing.__self__)]
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        name = f"{thing.__module__}.{thing.__qualname__}"
        parts = [name, _code(thing.__code__), _content(thing.__defaults__), *(_content(c) for c in cells)]
        if thing in _open:  # recursion
            return name
        _open.append(thing)
        try:
            return [*parts, {key: _content(value) for key, value in _named_globals(thing).items()}]
        finally:
            _open.remove(thing)
    if isinstance(thing, types.BuiltinFunctionType | type | types.ModuleType):
        return getattr(thing, "__qualname__", None) or thing.__name__
    if hasattr(thing, "__array__"):
        return fingerprint([np.asarray(thing)], {})
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    held = getattr(thing, "__dict__", {}) | {key: getattr(thing, key) for key in slots if hasattr(thing, key)}
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if not held and not dataclasses.is_dataclass(thing) and type(thing).__module__ == "builtins":
        raise InputError(f"{thing!r} of type {name} cannot be told from another: hold numbers, arrays or functions")
    return [name, {key: _content(value) for key, value in held.items()}]


# Functions that are being looked at, so that recursive ones end.
_open: list[types.FunctionType] = []


def _named_globals(function: types.FunctionType) -> dict[str, object]:
    """Globals that a function's code names; functions of installed packages are known by their name alone."""
    names, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    return {
        name: f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, types.FunctionType) and value.__module__ != function.__module__
        else value
        for name, value in found.items()
    }


def _code(code: types.CodeType) -> list[object]:
    """What a function does: its instructions, the names they use and their constants."""
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


def claim(folder: Path, identity: str, what: str) -> None:
    """Make a folder that of one computation, noted in its identity.json, or make sure that it is.

    Args:
        folder: made if missing.
        identity: what the folder belongs to (see :func:`fingerprint`).
        what: it holds, for messages.

    Raises:
        InputError: the folder holds those of another computation or cannot be used, or its identity.json is damaged.

    Example:
        >>> import tempfile
        >>> claim(folder := Path(tempfile.mkdtemp()), "a", "points")
        >>> claim(folder, "b", "points")
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: ... holds points of another computation (other data or settings): ...
    """
    mark = folder / "identity.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            with whole_file(mark) as file:
                file.write(json.dumps({"identity": identity}).encode())
            return
    except OSError as error:
        raise InputError(f"cannot use the folder {folder} ({error.strerror}): choose another one") from error
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))["identity"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{mark} is damaged: delete the folder {folder} and run again") from error
    if found != identity:
        raise InputError(
            f"{folder} holds {what} of another computation (other data or settings): choose another folder or delete it"
        )


class PointStore:
    """A folder of finished points; every file is written whole or not at all.

    Args:
        path: folder, made if missing.
        identity: what the points belong to (see :func:`fingerprint`).

    Raises:
        InputError: as :func:`claim`.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> PointStore(folder, "a").save("p0", {"x": np.ones(1)})
        >>> PointStore(folder, "a").load("p0")["x"].tolist(), PointStore(folder, "a").load("p1")
        ([1.0], None)
    """

    def __init__(self, path: str | Path, identity: str) -> None:
        self.path = Path(path)
        claim(self.path, identity, "points")

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a finished point, or None; a damaged file is reported and computed again."""
        file = self.path / f"{key}.npz"
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as data:
                return {name: data[name] for name in data.files}
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
            warnings.warn(f"{file} is damaged and is computed again", stacklevel=2)
            return None

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the arrays of a finished point."""
        with whole_file(self.path / f"{key}.npz") as file:
            np.savez(file, allow_pickle=False, **arrays)
