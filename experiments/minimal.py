"""How much of the task do the best k features of a linear autoencoder explain? The smallest experiment, to copy.

One grid (the number of features), one measurement (a closed form and its held-out score), a table, a figure and a
verdict. See experiments/README.md for what to change in a copy.

Paper: Theorem 3, without a corruption
Time: 5 seconds

    python -m experiments.minimal
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mae_align as ma
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Counts, RunConfig, Task
from experiments.harness.data import Split
from experiments.harness.figures import panels
from experiments.harness.run import Run


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the experiment."""

    TAKES = (Task.classes, Task.targets)

    ks: Counts = (2, 4, 8, 16)
    """Numbers of features."""


PRESETS = {"laptop": Config()}
COLUMNS = {
    "k": "number of features",
    "test_r2": "share of the label variance of test images that a linear probe on k features explains",
    "test_r2_se": "standard error of test_r2 over groups of test images",
}


def main(config: Config, run: Run[Split]) -> None:
    """Measure every cell of the grid, and say what came out."""
    train, test = run.data.moments(groups=10)
    # One call gives every k. What is expensive in each cell belongs into measure: it is computed once and kept.
    curves = ma.masking_sweep(train, [1], [0.0], eval_moments=test).isel(patch_size=0, mask_ratio=0)
    if max(config.ks) > curves.sizes["k"]:
        raise ma.InputError(f"--ks {max(config.ks)}: these images have rank {curves.sizes['k']}, give a smaller k")

    def measure(k: int) -> list[dict[str, Any]]:
        at = curves.sel(k=k)
        return [{"k": k, "test_r2": float(at.eval_r2), "test_r2_se": float(at.eval_r2_se)}]

    frame = run.sweep({f"k{k}": k for k in config.ks}, measure)
    run.table("rows", frame, show=frame.round(3))
    figure, axes = panels(1, 1, width=3.2, height=2.4)
    axes[0, 0].errorbar(frame.k, frame.test_r2, frame.test_r2_se, marker="o")
    axes[0, 0].set(xlabel="number of features k", ylabel="test r2 of a linear probe", ylim=(0, 1))
    run.figure("curve", figure)
    best = frame.loc[frame.test_r2.idxmax()]
    run.verdict(f"{best.k:.0f} features explain the most of the labels: {best.test_r2:.3f} of their variance.")


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
