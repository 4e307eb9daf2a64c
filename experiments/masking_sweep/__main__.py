"""Which mask ratio and patch size make reconstruction learn what a task needs?

The main job, and Fig. 7 of the paper. For every patch size, mask ratio and number of features k: the linear masked
autoencoder in closed form (Theorem 3 of Balestriero & LeCun, 2024), and how much of the task a linear probe on its
features explains, in-sample and on held-out images. The best cell is chosen on a validation split and reported on the
test images, with the standard error of its difference to no mask on the same images. Linear joint embedding of two
masked views stands beside it.

    python -m experiments.masking_sweep                                   # bundled digits: seconds on 2 CPU cores
    python -m experiments.masking_sweep --data idx:DIR --ks 8 32 128      # Fashion-MNIST: about a minute
    python -m experiments.masking_sweep --preset paper --data npz:FILE    # the published protocol: in-sample Fig. 7
    python -m experiments.masking_sweep --train-moments FIT --validation-moments VALIDATION --test-moments TEST

The last form starts from files of ``python -m experiments.stream_moments``, for data that is read once or elsewhere.
Without validation moments nothing can be chosen on held-out images: the table then chooses and measures in-sample and
says so; with test moments the figures and curves.nc hold the held-out curves all the same.

The ``paper`` preset follows the published preprocessing (jitter of 0.001 std, no pixel noise floor, patches 1, 2, 4,
ten ratios from 0 to 0.99, every k); its numbers are in docs/results.md. Interrupted, the same command goes on where it
stopped.
"""

from __future__ import annotations

import dataclasses
import enum
import math

import numpy as np
import xarray as xr

import mae_align as ma
from experiments.harness.cli import launch
from experiments.harness.data import DataChoices, Inputs, MomentFiles, load_together
from experiments.harness.folder import RunFolder, atomic_path, netcdf3_ready
from experiments.masking_sweep.report import (
    change_figure,
    heat_map,
    saturation,
    summarise,
    table_text,
    verdict_rows,
)
from mae_align.closed_form.grid import GridSpec
from mae_align.data.patches import ImageShape
from mae_align.moments.samples import Samples
from mae_align.runtime.devices import worker_count
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
class Config:
    """Settings of the masking sweep."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or prepared:DIR."""
    train_moments: str | None = None
    """Moment file of the training images, in the place of a data set."""
    validation_moments: str | None = None
    """Moment file of the validation images, on which the best cell is chosen; none: no choice on held-out images."""
    test_moments: str | None = None
    """Moment file of the test images, in at least 2 groups; none: in-sample curves alone."""
    patch_sizes: tuple[int, ...] = (1, 2, 4)
    """Sides of square patches, in pixels. Where one does not divide the image, patches at the border are smaller."""
    mask_ratios: tuple[float, ...] = tuple(round(0.11 * i, 2) for i in range(10))
    """Shares of patches to mask, from 0 to 1. No mask (0) is always computed: it is the reference."""
    masking: MaskFamily = MaskFamily.independent
    """Independent patches (the paper), an exact count (masked autoencoders), or a random ratio per image."""
    ks: tuple[int, ...] = (4, 8, 16, 32)
    """Numbers of features for the table, the heat map and the summary."""
    max_k: int | None = None
    """Largest number of features in the curves; none for the rank of the data."""
    image_size: int | None = None
    """Resize images to squares of this side, in pixels; none keeps them."""
    validation_fraction: float = 0.2
    """Share of the training images on which the best cell is chosen."""
    groups: int = 20
    """Groups of test images whose spread gives the standard errors."""
    pixel_noise: float | None = None
    """Variance of the measurement noise of a pixel; none: quantisation noise, 1/12 for 8-bit images."""
    jitter: float = 0.0
    """Noise added to the images before anything else, in standard deviations of all pixels (published: 0.001)."""
    held_out: bool = True
    """Whether to choose and report on held-out images; without, only the in-sample curves of the paper."""
    seed: int = 0
    """Of the splits and the jitter."""
    workers: int | None = None
    """Threads; none for one per core."""
    out: str | None = None
    """Run folder; none for runs/masking_sweep-DATA-HASH."""


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


def main(config: Config) -> None:
    """Run the sweep of a configuration.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    inputs, folder = _open(config)
    validation = None
    if inputs.choice is not None:
        validation = _sweep(config, *inputs.choice, folder, "validation")
    result = _sweep(config, inputs.train, inputs.test, folder, "in_sample" if inputs.test is None else "test")
    influence = [str(name) for name in result if "influence" in str(name)]
    folder.save_dataset("curves", result.drop_vars(influence))
    if influence:
        # By group: any two cells can be compared later with the standard error of their difference.
        with atomic_path(folder.path / "influence.nc") as file:
            netcdf3_ready(result[influence]).to_netcdf(file, engine="scipy")
    # Fewer images than pixels: the validation sweep has fewer training images, and so a smaller rank.
    most = min(part.sizes["k"] for part in (result, validation) if part is not None)
    ks = [k for k in config.ks if k <= most]
    if not ks:
        raise ma.InputError(f"every --ks is over the rank {most} of these images: give a smaller k")
    figures = [
        folder.save_figure("relative_change", change_figure(result)),
        folder.save_figure("heat_map", heat_map(result, ks)),
    ]
    rows = verdict_rows(result, validation, ks)
    tests = "no" if inputs.test is None else inputs.test.count
    folder.save_table("summary", rows)
    lines = [
        f"Masking sweep on {inputs.name}: {inputs.train.count} training and {tests} test images, "
        f"rank {result.attrs['rank']}, pixel noise {result.attrs['pixel_noise']:.3g}",
        "",
        table_text(rows),
        "",
        f"Figures: {figures[0]}  {figures[1]}",
        "",
        *summarise(rows),
    ]
    if inputs.test is not None and validation is None:
        lines.append("(no validation moments: held-out curves are in the figures and in curves.nc, without a choice)")
    lines += saturation(result)
    if len(ks) < len(config.ks):
        lines.append(f"(k over the rank {most} of these images left out)")
    folder.summary("\n".join(lines))


def _open(config: Config) -> tuple[Inputs, RunFolder]:
    """Check everything, then open the run folder and make or read the moments."""

    def folder(label: str) -> RunFolder:
        return RunFolder.open("masking_sweep", label, config, config.out, ignore=("out", "workers"))

    if config.train_moments is not None:
        if config.image_size is not None or config.jitter != 0:
            raise ma.InputError(
                "--image-size and --jitter go with --data: the pixels of moment files are what they were"
            )
        with refused_together():
            inputs = MomentFiles(config.train_moments, config.validation_moments, config.test_moments).load()
        _check(config, inputs.train.image_shape)
        return inputs, folder(f"moments:{config.train_moments}")
    if config.validation_moments is not None or config.test_moments is not None:
        raise ma.InputError(
            "--validation-moments and --test-moments go with --train-moments: give all of them as files"
        )
    data = load_together(config.data, image_size=config.image_size, seed=config.seed)
    _check(config, data.image_shape)
    choices = DataChoices(config.held_out, config.validation_fraction, config.groups, config.jitter, config.seed)
    choices.check(data)
    opened = folder(config.data)
    return choices.moments(data), opened


def _check(config: Config, image_shape: ImageShape) -> None:
    """Refuse settings that do not fit the images before anything is computed or written."""
    GridSpec.checked(image_shape, config.patch_sizes, [0.0], _ratios(config), [math.inf], _FAMILIES[config.masking])
    worker_count(config.workers)
    if not any(ratio > 0 for ratio in config.mask_ratios):
        raise ma.InputError("--mask-ratios 0: give at least one ratio over 0, no mask is always computed")
    most = int(np.prod(image_shape))
    if min(config.ks) < 1 or max(config.ks) > most:
        given = " ".join(map(str, config.ks))
        raise ma.InputError(f"--ks {given}: the images have {most} pixel values, give k in 1..{most}")
    if config.max_k is not None and not max(config.ks) <= config.max_k <= most:
        raise ma.InputError(f"--max-k {config.max_k}: give a number from the largest --ks ({max(config.ks)}) to {most}")
    if not (math.isfinite(config.jitter) and config.jitter >= 0):
        raise ma.InputError(f"--jitter {config.jitter}: give a number of at least 0")
    if config.pixel_noise is not None and not (math.isfinite(config.pixel_noise) and config.pixel_noise >= 0):
        raise ma.InputError(f"--pixel-noise {config.pixel_noise}: give a variance of at least 0 (pixel_noise)")


def _ratios(config: Config) -> list[float]:
    """The grid with its reference, 0, first."""
    return [0.0, *(p for p in config.mask_ratios if p != 0.0)]


def _sweep(
    config: Config, moments: ma.Moments | Samples, held_out: ma.Moments | Samples | None, folder: RunFolder, name: str
) -> xr.Dataset:
    return ma.masking_sweep(
        moments,
        config.patch_sizes,
        _ratios(config),
        masking=_FAMILIES[config.masking],
        eval_moments=held_out,
        max_k=config.max_k,
        pixel_noise=config.pixel_noise,
        run=ma.RunOptions(workers=config.workers, progress=True, store=folder.points / name),
    )


if __name__ == "__main__":
    launch(main, Config, PRESETS)
