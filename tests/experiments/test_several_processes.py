"""The experiments on deep networks give the same tables in two processes as in one with eight devices."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest

from experiments.__main__ import ROOT
from tests.experiments.cases import reopen, run_experiment
from tests.two_processes import run_processes

pytestmark = pytest.mark.slow

# 48 images in a step: as many devices as there are here and in two processes divide them.
CASES = {
    "theorem2_check": (
        "--max-train 200 --latent 4 --widths 8 --lambdas inf --seeds 0 --evaluations 3 "
        "--training.epochs 25 --training.batch-size 48 --training.warmup-epochs 2.5",
        "networks",
    ),
    "learning_dynamics": (
        "--max-train 200 --learners mlp_adamw --intervened mlp_adamw --interventions reversed --seeds 0 1 "
        "--evaluations 6 --looked-at 60 --bands 3 --response-points 30 --response-widths 0.5 --resamples 20 --latent 6 "
        "--training.batch-size 48 --training.steps 60",
        "half_times",
    ),
    "masking_dynamics": (
        "--max-train 200 --patch-sizes 4 --mask-ratios 0.5 0.75 --evaluations 3 --network.width 8 --network.depth 0 "
        "--network.heads 2 --network.decoder-width 8 --network.decoder-depth 1 --network.decoder-heads 2 "
        "--training.epochs 2 --training.batch-size 48",
        "probes",
    ),
    "subspace_classification": (
        "--max-train 200 --max-test 80 --networks mlp conv --scale-networks mlp --top 0.8 --bottom 0.2 --seeds 0 "
        "--training.epochs 2 --training.batch-size 48 --training.warmup-epochs 0.3 --training.augmentation.shift 1 "
        "--network.mlp-widths 8 --network.conv-widths 4 4",
        "points",
    ),
}


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def compare(ours: list[dict[str, str]], expected: list[dict[str, str]]) -> None:
    assert len(ours) == len(expected) > 2
    for found, right in zip(ours, expected, strict=True):
        assert found.keys() == right.keys()
        for key in found.keys() - {"seconds"}:
            try:
                number = float(right[key])
            except ValueError:
                assert found[key] == right[key]
            else:
                assert float(found[key]) == pytest.approx(number, rel=1e-3, abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_same_table_and_go_on_together(name, tmp_path):
    options, file = CASES[name]
    options = options.split()

    def run_two() -> None:
        run_processes(f"-m experiments.{name}", *options, "--out", tmp_path / "two", devices=1, timeout=150)

    run_two()
    folder = (ROOT / name).is_dir()
    module = importlib.import_module(f"experiments.{name}.__main__" if folder else f"experiments.{name}")
    run_experiment(module, *options, "--out", tmp_path / "one")
    expected = table(tmp_path / "one", file)
    compare(table(tmp_path / "two", file), expected)
    # What was trained lies in the folder of the run, not in one that is gone.
    parts = {path.name for path in (tmp_path / "two").iterdir()}
    assert parts == {path.name for path in (tmp_path / "one").iterdir()} and "points" in parts
    # What is there is read by the first process for both, and the one that is missing is made by both.
    points = {path: path.stat().st_mtime_ns for path in (tmp_path / "two" / "points").glob("*.npz")}
    lost = max(points, key=lambda path: points[path])
    lost.unlink()
    # A run that has ended would only show its result.
    reopen(tmp_path / "two")
    run_two()
    again = {path: path.stat().st_mtime_ns for path in points}
    assert {path for path in points if again[path] != points[path]} == {lost}
    compare(table(tmp_path / "two", file), expected)
