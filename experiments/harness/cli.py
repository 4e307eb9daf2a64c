"""The one command line of all experiments.

An experiment is a frozen dataclass of settings, a few presets of it and a function. Its module ends

    if __name__ == "__main__":
        launch_experiment(main, Config, PRESETS, COLUMNS)

and `python -m experiments.NAME --preset paper --seed 3` runs `main` with the preset "paper", one
field changed. Programs that have no run folder end with `launch(main, Config, PRESETS)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from experiments.harness.config import RunConfig, check, written_options
from experiments.harness.data import Split
from experiments.harness.run import Data, Run, execute
from mae_align.runtime.devices import check_platforms
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import start_distributed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
ConfigT = TypeVar("ConfigT", bound="DataclassInstance")
RunConfigT = TypeVar("RunConfigT", bound=RunConfig)
_DEFAULT_PRESET = "laptop"


def launch(
    main: Callable[[ConfigT], object],
    config_class: type[ConfigT],
    presets: Mapping[str, ConfigT],
    argv: Sequence[str] | None = None,
) -> None:
    """Reads the command line, runs an experiment, and turns bad input into one line.

    `--preset` names the preset whose values are the defaults of all other options; "laptop" unless
    given. `--help` shows the docstring of the experiment's module and every field.

    Args:
        main: The experiment.
        config_class: The dataclass of its settings; no field may be called `preset`.
        presets: Settings by name, "laptop" among them.
        argv: Arguments after the program's name. None: those of this process.

    Raises:
        SystemExit: Status 2 for bad options and for an `InputError` (one line on standard error),
            130 for an interrupt, 143 for a training that SIGTERM stopped, 0 after `--help`.
    """
    with one_line_errors():
        config = _parse(main, config_class, presets, sys.argv[1:] if argv is None else list(argv))
        check(config)
        # Options win over the environment, where an experiment has them.
        start_distributed(*(getattr(config, name, None) for name in ("coordinator", "num_processes", "process_id")))
        check_platforms()
        main(config)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends a program that is refused or interrupted with one line and the status that `launch` gives."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        # A progress bar leaves the cursor in its line.
        print("\ninterrupted: the same command goes on where it stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        # Loaded already where it can have been raised; other experiments do without.
        from mae_align.train.loop import Preempted

        if not isinstance(error, Preempted):
            raise
        print(f"\n{error}", file=sys.stderr)
        raise SystemExit(error.status) from None


def launch_experiment(
    main: Callable[[RunConfigT, Run[Any]], None],
    config_class: type[RunConfigT],
    presets: Mapping[str, RunConfigT],
    columns: Mapping[str, str],
    load: Callable[[Any], Data] = Split.load,
    argv: Sequence[str] | None = None,
) -> None:
    """Reads the command line and runs an experiment in its run folder; see `launch` and `experiments.harness.run`.

    `--config FILE` takes the settings of a run folder's config.json; options beside it win over the file.

    Args:
        main: The experiment.
        config_class: The dataclass of its settings.
        presets: Settings by name, "laptop" among them.
        columns: A line for every column of its tables.
        load: Reads its data.
        argv: Arguments after the program's name. None: those of this process.

    Raises:
        SystemExit: As `launch`.
    """
    name = described(main)[0].split()[-1].rpartition(".")[2]

    def run(config: RunConfigT) -> None:
        execute(name, main, config, load, columns)

    run.__module__ = main.__module__
    given = sys.argv[1:] if argv is None else list(argv)
    with one_line_errors():
        given = with_written(given, name)
    launch(run, config_class, presets, given)


def with_written(argv: Sequence[str], experiment: str) -> list[str]:
    """Arguments with `--config FILE` replaced by what the file says, first, so that all others win over it.

    Beside it, run.json says what was only added to the report, such as further probes.

    Args:
        argv: Arguments of an experiment.
        experiment: Its name; the file must be of a run of it.

    Raises:
        InputError: A file that is not there, not a run's config.json, or of another experiment.

    Example:
        >>> with_written(["--seed", "3"], "masking_sweep")
        ['--seed', '3']
    """
    rest, files = [], []
    waiting = iter(argv)
    for argument in waiting:
        if argument == "--config":
            files.append(next(waiting, "--"))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    if not files:
        return rest
    if len(files) > 1:
        raise InputError("--config is given twice: give one file")
    if files[0].startswith("--"):
        raise InputError("--config needs a file: give RUN_FOLDER/config.json")
    if Path(files[0]).is_dir():
        raise InputError(f"--config {files[0]!r} is a folder: give {Path(files[0], 'config.json')}")
    try:
        written = json.loads(Path(files[0]).read_text(encoding="utf-8"))
        settings, of = written["config"], written["experiment"]
        record = Path(files[0]).with_name("run.json")
        more = json.loads(record.read_text(encoding="utf-8")).get("added", {}) if record.exists() else {}
    except OSError as error:
        raise InputError(f"--config {files[0]!r}: cannot be read ({error.strerror}): give a config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--config {files[0]!r} is not the config.json of a run folder") from None
    if of != experiment:
        raise InputError(f"--config {files[0]!r} is of the experiment {of}: run python -m experiments.{of} with it")
    return [*written_options(settings), *written_options(more), *rest]


def _parse(
    main: Callable[..., object],
    config_class: type[ConfigT],
    presets: Mapping[str, ConfigT],
    argv: Sequence[str],
) -> ConfigT:
    # First pass: the preset, because it decides the defaults that the second pass shows and uses.
    name = _named_preset(argv)
    if name not in presets:
        raise InputError(f"--preset {name!r}: there is no such preset, use {' or '.join(presets)}")
    choice = Annotated[
        Literal[tuple(presets)],  # pyright: ignore[reportInvalidTypeForm]
        tyro.conf.arg(help="Where the defaults of all other options come from; --help shows them."),
    ]
    # Second pass: everything. The nameless level makes the fields of the settings plain options.
    arguments = dataclasses.make_dataclass(
        "Arguments",
        [("preset", choice), ("config", Annotated[config_class, tyro.conf.arg(name="")])],
    )
    command, description = described(main)
    parsed: Any = tyro.cli(
        arguments,
        prog=command,
        description=description,
        args=argv,
        default=arguments(_DEFAULT_PRESET, presets[name]),
    )
    return parsed.config


def described(main: Callable[..., object]) -> tuple[str, str | None]:
    """What `--help` says of a program: the command that runs the function's module, and the module's docstring."""
    module = sys.modules[main.__module__]
    # Run with -m, the module is called __main__; its spec has the name.
    spec = getattr(module, "__spec__", None)
    return f"python -m {(spec.name if spec else module.__name__).removesuffix('.__main__')}", module.__doc__


def _named_preset(argv: Sequence[str]) -> str:
    """The last preset named; the second pass reports an option without its value."""
    name = _DEFAULT_PRESET
    for option, value in itertools.pairwise([*argv, "--"]):
        if option == "--preset" and not value.startswith("--"):
            name = value
        elif option.startswith("--preset="):
            name = option.removeprefix("--preset=")
    return name
