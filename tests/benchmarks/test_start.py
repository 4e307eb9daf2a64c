"""Tests of the benchmarks' one command line."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys

import pytest

from benchmarks.start import check_counts, start
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings."""

    rounds: int = 3
    sizes: tuple[int, ...] = (1, 2)
    seed: int = 0
    limit: int | None = None
    ratio: float = 0.0
    quick: bool = False


def test_counts_below_one_and_options_without_a_value_are_refused_by_name() -> None:
    check_counts(Config(), "seed")
    for wrong, message in [
        (Config(rounds=0), "--rounds 0: give at least 1"),
        (Config(sizes=(4, 0)), "--sizes 0: give at least 1"),
        (Config(sizes=()), "--sizes has no value"),
        (Config(limit=-2), "--limit -2: give at least 1"),
        (Config(seed=-1), "--seed -1: give at least 0"),
    ]:
        with pytest.raises(InputError, match=message):
            check_counts(wrong, "seed")


def test_a_command_line_is_read_checked_and_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(sys, "argv", ["start", "--rounds", "2", "--sizes", "7"])

    def main(config: Config) -> None:
        check_counts(config, "seed")
        seen.append(config)

    start(main, Config)
    assert seen == [Config(rounds=2, sizes=(7,))]
    monkeypatch.setattr(sys, "argv", ["start", "--rounds", "0"])
    with pytest.raises(SystemExit, match="2"):
        start(main, Config)
    assert len(seen) == 1 and capsys.readouterr().err == "error: --rounds 0: give at least 1\n"
    monkeypatch.setattr(sys, "argv", ["start", "--help"])
    with pytest.raises(SystemExit, match="0"):
        start(main, Config)
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m {__name__} ") and "Tests of the benchmarks" in printed


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("train_step", ["--repeats", "0"]),
        ("train_step", ["--matmul-sizes"]),
        ("train_step", ["--members", "-1"]),
        ("masking_sweep", ["--points", "0"]),
        ("masking_sweep", ["--threads", "0"]),
        ("layer_products", ["--rows", "0"]),
        ("dual_sweep", ["--images", "0"]),
        ("streaming_moments", ["--batch", "0"]),
        ("streaming_moments", ["--images", "5", "--batch", "6"]),
    ],
)
def test_every_benchmark_refuses_before_it_measures(
    name: str, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *argv])
    with pytest.raises(SystemExit, match="2"):
        start(module.main, module.Config)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {argv[0]}") and printed.err.count("\n") == 1


@pytest.mark.parametrize(("code", "ends"), [(-9, "ours: ended by SIGKILL: enough memory?"), (2, 2)])
def test_a_sweep_ends_with_the_process_that_it_started(
    code: int, ends: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("benchmarks.masking_sweep")
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, code))
    with pytest.raises(SystemExit) as raised:
        module.main(module.Config(seed=0))
    assert raised.value.code == ends
