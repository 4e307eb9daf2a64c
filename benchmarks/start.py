"""The command line of a benchmark, and the machine in a line."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import jax
import tyro

from mae_align.devices import worker_count
from mae_align.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def start(main: Callable[[ConfigT], object], config_class: type[ConfigT], *zero: str) -> None:
    """Read the settings from the command line and run; what is refused is one line on standard error, and status 2.

    Whole numbers are at least 1, but at least 0 in the fields named ``zero``.
    """
    module = sys.modules[main.__module__]
    try:
        prog = f"python -m {module.__spec__.name if module.__spec__ else module.__name__}"
        config = tyro.cli(config_class, prog=prog, description=module.__doc__)
        check_counts(config, *zero)
        main(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_counts(config: DataclassInstance, *zero: str) -> None:
    """Refuse whole numbers below 1, or below 0 in the fields named ``zero``, and options without any value.

    Raises:
        InputError: names the option.

    >>> check_counts(dataclasses.make_dataclass("Config", ["images"])(images=3))
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        option = "--" + field.name.replace("_", "-")
        least = 0 if field.name in zero else 1
        if value == ():
            raise InputError(f"{option} has no value: give at least one, or leave the option out")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not isinstance(number, bool) and number < least:
                raise InputError(f"{option} {number}: give at least {least}")


def machine() -> str:
    """JAX, the device, the cores and the load of this moment.

    >>> machine().startswith("JAX ")
    True
    """
    kind = jax.devices()[0].device_kind
    return f"JAX {jax.__version__} on {kind}, {worker_count()} cores, load {os.getloadavg()[0]:.1f}"
