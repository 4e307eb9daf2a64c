from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.harness.cli import launch
from mae_align.runtime.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[3]

COUNTING = '''"""Counts to a number. Like Figure 0 of no paper."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Annotated

from experiments.harness.cli import launch
from experiments.harness.config import ELSEWHERE
from experiments.harness.folder import RunFolder
from mae_align.runtime.errors import InputError


@dataclass(frozen=True)
class Config:
    """What to count."""

    numbers: tuple[int, ...] = (1, 2, 3)
    """The numbers, in this order."""
    pause: Annotated[float, ELSEWHERE] = 0.0
    """Seconds before the second number."""
    out: Annotated[str | None, ELSEWHERE] = None
    """The run folder."""


PRESETS = {"laptop": Config(), "paper": Config(numbers=(10, 20))}


def main(config: Config) -> None:
    if min(config.numbers) < 0:
        raise InputError(f"numbers={config.numbers}: give numbers of at least 0")
    folder = RunFolder.open("counting", "numbers", config, config.out)
    for number in config.numbers:
        point = folder.points / str(number)
        if point.exists():
            continue
        point.touch()
        print("counted", number, flush=True)
        time.sleep(config.pause)
    folder.summary(f"{len(list(folder.points.iterdir()))} counted")


if __name__ == "__main__":
    launch(main, Config, PRESETS)
'''


@dataclasses.dataclass(frozen=True)
class Noise:
    """Noise."""

    sigmas: tuple[float, ...] = (0.5,)
    """Standard deviations."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings."""

    patch_sizes: tuple[int, ...] = (1, 2)
    """Sides of the patches."""
    seed: int = 0
    """Seed of the split."""
    out: str | None = None
    """The run folder."""
    noise: Noise = Noise()

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: give a seed of at least 0")


PRESETS = {"laptop": Config(), "paper": Config(patch_sizes=(1, 2, 4), seed=7)}


def configured(*argv: str) -> Config:
    """The configuration that a command line gives."""
    seen: list[Config] = []

    def main(config: Config) -> None:
        seen.append(config)

    launch(main, Config, PRESETS, argv)
    (config,) = seen
    return config


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Standard error of a command line that ends with status 2 before `main`."""

    def main(config: Config) -> None:
        pytest.fail(f"main was called with {config}")

    with pytest.raises(SystemExit) as exit_info:
        launch(main, Config, PRESETS, argv)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], Config()),
        (["--preset", "paper"], Config(patch_sizes=(1, 2, 4), seed=7)),
        (["--seed", "3", "--preset=paper"], Config(patch_sizes=(1, 2, 4), seed=3)),
        (["--preset", "paper", "--preset", "laptop"], Config()),
        (["--patch-sizes", "4", "8", "--out", "x"], Config(patch_sizes=(4, 8), out="x")),
        (["--noise.sigmas", "1", "2"], Config(noise=Noise(sigmas=(1.0, 2.0)))),
    ],
)
def test_options_are_read_over_the_preset(argv, expected):
    assert configured(*argv) == expected


def test_unknown_preset_is_one_line_with_the_choices(capsys):
    message = refused(capsys, "--preset", "big")
    assert message == "error: --preset 'big': there is no such preset, use laptop or paper\n"
    assert refused(capsys, "--preset=").startswith("error: --preset '': there is no such preset")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--patch-sizes"], "--patch-sizes has no value"),
        (["--patch-sizes", "--seed", "1"], "--patch-sizes has no value"),
        (["--noise.sigmas"], "--noise.sigmas has no value"),
        (["--seed", "-1"], "seed=-1: give a seed of at least 0"),
    ],
)
def test_bad_values_are_one_line(capsys, argv, message):
    error = refused(capsys, *argv)
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--seed", "x"], ["--seed", "'x'"]),
        (["--sede", "1"], ["--sede"]),
        (["--preset"], ["--preset"]),
        (["--preset", "--seed", "1"], ["--preset"]),
        (["stray"], ["stray"]),
    ],
)
def test_options_that_cannot_be_read_are_explained(capsys, argv, parts):
    error = refused(capsys, *argv)
    assert "Traceback" not in error
    for part in parts:
        assert part in error


def test_input_error_of_the_experiment_is_one_line(capsys):
    def main(config: Config) -> None:
        raise InputError("k=9 is over the rank 4: ask for k <= 4")

    with pytest.raises(SystemExit) as exit_info:
        launch(main, Config, PRESETS, [])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: k=9 is over the rank 4: ask for k <= 4\n"


def test_other_errors_keep_their_traceback():
    def main(config: Config) -> None:
        raise ValueError("a fault of the program, not of the input")

    with pytest.raises(ValueError, match="a fault of the program"):
        launch(main, Config, PRESETS, [])


@pytest.mark.parametrize(
    ("argv", "seed"), [(["--help"], "default: 0"), (["--preset", "paper", "--help"], "default: 7")]
)
def test_help_shows_presets_fields_and_defaults(capsys, argv, seed):
    def main(config: Config) -> None:
        pytest.fail("main was called")

    with pytest.raises(SystemExit) as exit_info:
        launch(main, Config, PRESETS, argv)
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for part in ("--preset {laptop,paper}", "--patch-sizes", "Sides of the patches.", seed):
        assert part in text


# --- as users run it ---


@pytest.fixture
def command(tmp_path: Path):
    """Starts the counting experiment in an empty folder, as `python -m counting OPTIONS`."""
    (tmp_path / "counting.py").write_text(COUNTING)

    def start(*argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "counting", *argv],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_module_runs_and_its_docstring_is_its_help(command, tmp_path):
    plain, other, helped, bad = (
        command("--out", "first"),
        command("--preset", "paper"),
        command("--help"),
        command("--numbers", "1", "-2"),
    )
    out, err = plain.communicate(timeout=60)
    assert (plain.returncode, out, err) == (
        0,
        "counted 1\ncounted 2\ncounted 3\n3 counted\n",
        "",
    )
    assert (tmp_path / "first" / "summary.txt").read_text() == "3 counted\n"
    out, err = other.communicate(timeout=60)
    assert (other.returncode, out, err) == (0, "counted 10\ncounted 20\n2 counted\n", "")
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("counting-numbers-")
    out, err = helped.communicate(timeout=60)
    assert (helped.returncode, err) == (0, "")
    assert "usage: python -m counting" in out
    assert "Counts to a number. Like Figure 0 of no paper." in out
    assert "Seconds before the second number." in out
    out, err = bad.communicate(timeout=60)
    assert (bad.returncode, out) == (2, "")
    assert err == "error: numbers=(1, -2): give numbers of at least 0\n"


def test_interrupted_run_says_how_to_go_on_and_does(command):
    first = command("--pause", "60")
    assert first.stdout.readline() == "counted 1\n"
    # Python drops an interrupt that arrives in a callback of the garbage collector: press again, as a user would.
    for _ in range(5):
        first.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(timeout=5)
            break
    out, err = first.communicate(timeout=60)
    assert (first.returncode, out) == (130, "")
    assert err == "\ninterrupted: the same command goes on where it stopped\n"
    second = command()
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out, err) == (0, "counted 2\ncounted 3\n3 counted\n", "")
