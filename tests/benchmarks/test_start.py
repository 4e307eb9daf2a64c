"""Tests of the benchmarks' one command line."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest

from benchmarks.start import check_counts, start
from mae_align.errors import InputError


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
    start(lambda config: seen.append(config), Config, "seed")
    assert seen == [Config(rounds=2, sizes=(7,))]
    monkeypatch.setattr(sys, "argv", ["start", "--rounds", "0"])
    with pytest.raises(SystemExit, match="2"):
        start(lambda config: seen.append(config), Config, "seed")
    assert len(seen) == 1 and capsys.readouterr().err == "error: --rounds 0: give at least 1\n"


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
    zero = {"train_step": ["members"], "masking_sweep": ["seed"]}.get(name, [])
    with pytest.raises(SystemExit, match="2"):
        start(module.main, module.Config, *zero)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {argv[0]}") and printed.err.count("\n") == 1
