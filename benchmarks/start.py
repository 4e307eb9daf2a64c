"""The command line of a benchmark, and the machine in a line."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import jax
import tyro

from experiments.harness.cli import described
from experiments.harness.config import check
from mae_align.runtime.devices import worker_count
from mae_align.runtime.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def start(main: Callable[[ConfigT], object], config_class: type[ConfigT]) -> None:
    """Read the settings from the command line and run; what is refused is one line on standard error, and status 2.

    A benchmark has no presets and does not go on where it stopped, so it is not launched as an experiment is.
    """
    command, description = described(main)
    try:
        main(tyro.cli(config_class, prog=command, description=description))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_counts(config: DataclassInstance, *zero: str) -> None:
    """Refuse whole numbers below 1, or below 0 in the fields named ``zero``, and options without any value.

    Raises:
        InputError: names the option.

    >>> check_counts(dataclasses.make_dataclass("Config", [("images", int)])(images=3))
    """
    check(config)
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), 0 if field.name in zero else 1
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not isinstance(number, bool) and number < least:
                raise InputError(f"--{field.name.replace('_', '-')} {number}: give at least {least}")


def machine() -> str:
    """JAX, the device, the cores and the load of this moment.

    >>> machine().startswith("JAX ")
    True
    """
    kind = jax.devices()[0].device_kind
    return f"JAX {jax.__version__} on {kind}, {worker_count()} cores, load {os.getloadavg()[0]:.1f}"
