"""Finished parts of a sweep on disk, so that a killed sweep goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from mae_align.errors import InputError


def fingerprint(arrays: Iterable[np.ndarray], settings: Mapping[str, object]) -> str:
    """SHA-256 over arrays and settings: the identity of a computation.

    Args:
        arrays: any arrays. settings: JSON-able values (others by their ``repr``).

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


class PointStore:
    """A folder of finished points; every file is written whole or not at all.

    Args:
        path: folder, made if missing. identity: what the points belong to (see :func:`fingerprint`).

    Raises:
        InputError: the folder holds points of another computation or cannot be written, or its identity file is
            damaged.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> PointStore(folder, "a").save("p0", {"x": np.ones(1)})
        >>> PointStore(folder, "a").load("p0")["x"].tolist(), PointStore(folder, "a").load("p1")
        ([1.0], None)
    """

    def __init__(self, path: str | Path, identity: str) -> None:
        self.path = Path(path)
        mark = self.path / "identity.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not mark.exists():
                self._write(mark, lambda file: file.write(json.dumps({"identity": identity}).encode()))
                return
        except OSError as error:
            raise InputError(f"cannot use the folder {self.path} ({error.strerror}): choose another one") from error
        try:
            found = json.loads(mark.read_text())["identity"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"{mark} is damaged: delete the folder {self.path} and run again") from error
        if found != identity:
            raise InputError(
                f"{self.path} holds points of another computation (other data or settings): "
                "choose another folder or delete it"
            )

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
        self._write(self.path / f"{key}.npz", lambda file: np.savez(file, allow_pickle=False, **arrays))

    def _write(self, target: Path, write: Callable[[IO[bytes]], object]) -> None:
        handle, name = tempfile.mkstemp(dir=self.path, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
