"""Which mask ratio and patch size make reconstruction learn what a task needs?

Paper: Fig. 7
Time: 10 seconds

The main job. For every patch size, mask ratio and number of features k: the linear masked autoencoder in closed form
(Theorem 3 of Balestriero & LeCun, 2024), and how much of the task a linear probe on its features explains, in-sample
and on held-out images. The best cell is chosen on validation images; then everything is fitted on training and
validation images together and reported on the test images. Linear joint embedding of two masked views stands beside it.

One test decides what the summary and the heat map call better or worse than no mask: the paired differences on test
images of all masks, and of joint embedding, at all --ks, in simultaneous 95% intervals.

    python -m experiments.masking_sweep                                   # bundled digits: seconds on 2 CPU cores
    python -m experiments.masking_sweep --data idx:DIR --ks 8 32 128      # Fashion-MNIST: about a minute
    python -m experiments.masking_sweep --preset paper --data npz:FILE    # the published protocol: in-sample Fig. 7
    python -m experiments.masking_sweep --train-moments FIT --validation-moments VALIDATION --test-moments TEST

The last form starts from files of ``python -m experiments.stream_moments``, for data that is read once or elsewhere.
Without validation moments nothing can be chosen on held-out images: the table then chooses and measures in-sample and
says so; with test moments the heat map, curves.nc and the count of better and worse masks are held-out all the same.

The ``paper`` preset follows the published preprocessing (jitter of 0.001 std, no pixel noise floor, patches 1, 2, 4,
ten ratios from 0 to 0.99, every k); its numbers are in docs/results.md. Interrupted, the same command goes on where it
stopped.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Annotated

import numpy as np
import xarray as xr

import mae_align as ma
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Counts, Groups, NotNegative, Ratios, RunConfig, Task, Workers
from experiments.harness.data import Split, check_groups
from experiments.harness.run import Run
from experiments.masking_sweep.inputs import Files, Images, Inputs, Summary
from experiments.masking_sweep.report import (
    at_the_edge,
    chosen_rows,
    difference_rows,
    figures,
    saturation,
    shown,
    verdict,
)
from experiments.masking_sweep.worth import worth
from mae_align.closed_form.grid import GridSpec
from mae_align.runtime.processes import refused_together


class MaskFamily(enum.Enum):
    """How the masked patches of an image are drawn."""

    independent = "independent"
    fixed_count = "fixed_count"
    random_ratio = "random_ratio"


_FAMILIES = {
    MaskFamily.independent: ma.PatchMasking,
    MaskFamily.fixed_count: ma.FixedCountPatchMasking,
    MaskFamily.random_ratio: ma.RandomRatioMasking,
}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the masking sweep."""

    TAKES = (Task.classes, Task.targets)

    train_moments: str | None = None
    """Moment file of the training images, in the place of a data set."""
    validation_moments: str | None = None
    """Moment file of the validation images, on which the best cell is chosen; none: no choice on held-out images."""
    test_moments: str | None = None
    """Moment file of the test images, in at least 2 groups; none: in-sample curves alone."""
    patch_sizes: Counts = (1, 2, 4)
    """Sides of square patches, in pixels. Where one does not divide the image, patches at the border are smaller."""
    mask_ratios: Ratios = tuple(round(0.11 * i, 2) for i in range(10))
    """Shares of patches to mask, from 0 to 1. No mask (0) is always computed: it is the reference."""
    masking: MaskFamily = MaskFamily.independent
    """Independent patches (the paper), an exact count (masked autoencoders), or a random ratio per image."""
    ks: Counts = (4, 8, 16, 32)
    """Numbers of features for the table, the heat map and the test."""
    max_k: Annotated[int | None, Bounds(least=1)] = None
    """Largest number of features in the curves; none for the rank of the data."""
    groups: Groups = 20
    """Groups of test images whose spread gives the standard errors."""
    pixel_noise: Annotated[float | None, Bounds(least=0)] = None
    """Variance of the measurement noise of a pixel; none: quantisation noise, 1/12 for 8-bit images."""
    jitter: NotNegative = 0.0
    """Noise added to the images before anything else, in standard deviations of all pixels (published: 0.001)."""
    held_out: bool = True
    """Whether to choose and report on held-out images; without, only the in-sample curves of the paper."""
    workers: Workers = None
    """Threads; none for one per core."""

    def check(self) -> None:
        """Refuse a grid without a mask, and curves that end before the table."""
        super().check()
        if not any(ratio > 0 for ratio in self.mask_ratios):
            raise ma.InputError("--mask-ratios 0: give at least one ratio over 0, no mask is always computed")
        if self.max_k is not None and self.max_k < max(self.ks):
            raise ma.InputError(f"--max-k {self.max_k}: give at least the largest --ks ({max(self.ks)})")


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        mask_ratios=tuple(float(p) for p in np.linspace(0.0, 0.99, 10)),
        ks=(32, 100, 256),
        pixel_noise=0.0,
        jitter=0.001,
        held_out=False,
    ),
}
COLUMNS = {
    "k": "number of features",
    "features": "whose features: of a mask, or of joint embedding of two masked views",
    "patch_size": "side of square patches [pixels]",
    "mask_ratio": "share of masked patches",
    "num_patches": "patches of an image",
    "realized_ratio": "share of masked patches that is drawn on average",
    "p_eff": "ratio of independent patches of the same closed form",
    "saturated": "whether a patch has as many pixel values as there are training images: fits them exactly",
    "change": "r2 of a linear probe minus that without mask, in-sample [percentage points]",
    "eval_change": "r2 of a linear probe minus that without mask, on test images [percentage points]",
    "eval_change_se": "standard error of eval_change, paired over groups of test images [percentage points]",
    "eval_verdict": "better or worse where the simultaneous 95% interval of eval_change leaves out 0",
    "measured": "images on which r2 and the changes of this table are measured",
    "r2_no_mask": "r2 of a linear probe on k features without mask",
    "*_patch": "side of patches of the mask that is best or worst, or of joint embedding, where it is chosen [pixels]",
    "*_ratio": "share of masked patches of the mask that is best or worst where it is chosen",
    "*_change": "r2 of a linear probe minus r2_no_mask [percentage points]",
    "*_se": "standard error of the change, paired over groups of test images [percentage points]",
    "*_verdict": "as eval_verdict",
    "best_validation_change": "r2 minus that without mask on validation images, for the mask that is best there "
    "[percentage points]",
    "mask": "the mask that gains the most on validation images",
    "r2_change": "r2 of a linear probe minus that without mask, on test images [percentage points]",
    "r2_change_se": "standard error of r2_change, paired over groups of test images [percentage points]",
    "accuracy_no_mask": "test images that the least-squares classifier on k features gets right, without mask "
    "[percentage points]",
    "accuracy": "likewise with the mask [percentage points]",
    "accuracy_change": "accuracy minus accuracy_no_mask [percentage points]",
    "accuracy_change_se": "standard error of accuracy_change, paired over test images [percentage points]",
}


def load(config: Config) -> Inputs:
    """The data set, cut up, or the files of moments.

    Raises:
        InputError: data that cannot be read, or settings that do not go together.
    """
    if config.train_moments is not None:
        sizes = config.image_size, config.max_train, config.max_validation, config.max_test
        if any(size is not None for size in sizes) or config.jitter != 0:
            raise ma.InputError(
                "--image-size, --max-train, --max-validation, --max-test and --jitter go with --data: "
                "moment files are what they are"
            )
        with refused_together():
            return Files.read(config.train_moments, config.validation_moments, config.test_moments)
    if config.validation_moments is not None or config.test_moments is not None:
        raise ma.InputError(
            "--validation-moments and --test-moments go with --train-moments: give all of them as files"
        )
    return Images(Split.load(config), config.data, config.held_out, config.groups, config.jitter, config.seed)


def main(config: Config, run: Run[Inputs]) -> None:
    """Sweep the grid, and say which masks help.

    Raises:
        InputError: settings that do not fit the images, before any long work.
    """
    _check(config, run.data)
    parts = run.data.parts()
    validation = None if parts.choice is None else _sweep(config, *parts.choice, run, "validation")
    result = _sweep(config, parts.train, parts.test, run, "in_sample" if parts.test is None else "test")
    influence = [str(name) for name in result if "influence" in str(name)]
    run.dataset("curves", result.drop_vars(influence))
    if influence:
        # By group: any two cells can be compared later with the standard error of their difference.
        run.netcdf("influence", result[influence])
    # Fewer images than pixels: the validation sweep has fewer training images, and so a smaller rank.
    most = min(part.sizes["k"] for part in (result, validation) if part is not None)
    ks = [k for k in config.ks if k <= most]
    if not ks:
        raise ma.InputError(f"every --ks is over the rank {most} of these images: give a smaller k")
    differences, critical = difference_rows(result, ks)
    run.table("differences", differences)
    chosen = chosen_rows(result, validation, ks, differences)
    run.table("summary", chosen, show=shown(chosen))
    for name, figure in figures(result, ks, differences, critical).items():
        run.figure(name, figure)
    rank, noise = result.attrs["rank"], result.attrs["pixel_noise"]
    run.notes.append(f"Rank {rank}, pixel noise {noise:.3g}.")
    if parts.test is not None and validation is None:
        run.notes.append(
            "No validation moments: the table is in-sample; the count, figures and curves.nc are held-out."
        )
    if len(ks) < len(config.ks):
        run.notes.append(f"k over the rank {most} of these images are left out.")
    run.notes.extend(saturation(result))
    run.notes.extend(at_the_edge(chosen, differences, run.data.image_shape))
    gain = worth(run.data, parts, chosen, _FAMILIES[config.masking], noise)
    if gain is not None:
        run.table("worth", [dataclasses.asdict(gain)])
    run.verdict(*verdict(chosen, differences, critical, gain))


def _check(config: Config, inputs: Inputs) -> None:
    """Refuse settings that do not fit the images before anything is computed or written."""
    GridSpec.checked(
        inputs.image_shape, config.patch_sizes, [0.0], _ratios(config), [math.inf], _FAMILIES[config.masking]
    )
    if isinstance(inputs, Images) and config.held_out:
        check_groups(config.groups, len(inputs.split.test_labels))
    most = math.prod(inputs.image_shape)
    if max(config.ks) > most:
        given = " ".join(map(str, config.ks))
        raise ma.InputError(f"--ks {given}: the images have {most} pixel values, give k in 1..{most}")
    if config.max_k is not None and config.max_k > most:
        raise ma.InputError(f"--max-k {config.max_k}: the images have {most} pixel values, give at most that")


def _ratios(config: Config) -> list[float]:
    """The grid with its reference, 0, first."""
    return [0.0, *(p for p in config.mask_ratios if p != 0.0)]


def _sweep(config: Config, moments: Summary, held_out: Summary | None, run: Run[Inputs], name: str) -> xr.Dataset:
    return ma.masking_sweep(
        moments,
        config.patch_sizes,
        _ratios(config),
        masking=_FAMILIES[config.masking],
        eval_moments=held_out,
        max_k=config.max_k,
        pixel_noise=config.pixel_noise,
        run=ma.RunOptions(workers=config.workers, progress=True, store=run.folder.points / name),
    )


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS, load)
