"""What a result was computed from, as text that is equal only where the parameters are."""

from __future__ import annotations

import dataclasses
import functools
import os
import types

import numpy as np

from mae_align.errors import InputError
from mae_align.store import fingerprint


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
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]
