"""Finished parts of a run on disk, so that a killed run computes none of them twice."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mae_align.distributed import of_first
from mae_align.sharded import shared_store
from mae_align.store import PointStore


class Parts:
    """Parts by name, each written when it is done.

    Of several processes the first has the files, and all of them get its parts.

    Args:
        folder: where they are kept. identity: of the data they belong to, see :func:`mae_align.store.fingerprint`.

    Raises:
        InputError: the folder holds parts of other data.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.identity = identity
        self._store = shared_points(folder, identity)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """The part of that name: read where it is finished, computed (by all processes) and written where not.

        Args:
            key: a file name. compute: gives numbers, text, and lists and mappings of them.
        """
        found = self._store.load(key)
        if found is None:
            text = of_first(json.dumps(compute(), default=_plain).encode()).decode()
            found = {"json": np.array(text)}
            self._store.save(key, found)
        return json.loads(str(found["json"]))


def shared_points(folder: Path, identity: str) -> PointStore:
    """Finished points made of arrays; of several processes the first has the files, and all of them get its points.

    Args:
        folder: where they are kept. identity: of what they belong to, see :func:`mae_align.store.fingerprint`.

    Raises:
        InputError: the folder holds points of something else.
    """
    store = shared_store(folder, lambda: identity)
    assert store is not None
    return store


def silent() -> bool:
    """Whether this process shows no progress: of several only the first does."""
    return jax.process_index() > 0


def _plain(value: object) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as JSON")
