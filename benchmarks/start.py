"""The command line of a benchmark, and the machine in a line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
import tyro

from mae_align.devices import worker_count
from mae_align.errors import InputError

ConfigT = TypeVar("ConfigT")


def start(main: Callable[[ConfigT], object], config_class: type[ConfigT], description: str | None) -> None:
    """Read the settings from the command line and run; what is refused is one line on standard error, and status 2."""
    try:
        main(tyro.cli(config_class, description=description))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def machine() -> str:
    """JAX, the device, the cores and the load of this moment.

    >>> machine().startswith("JAX ")
    True
    """
    kind = jax.devices()[0].device_kind
    return f"JAX {jax.__version__} on {kind}, {worker_count()} cores, load {os.getloadavg()[0]:.1f}"
