"""Can a corruption matter for any task? Answered from the images alone, without labels.

For every mask (and noise level) and number of features k: how far the span of the denoising autoencoder's features is
from that of principal components. Where the two agree, no task can gain or lose; where they are no further apart than
two samples of this many images would be, the difference is within sampling noise; elsewhere it can matter, and the
masking sweep measures it for a task at hand. (Label-free criterion of Balestriero & LeCun, 2024, made quantitative.)

    python -m experiments.diagnose_corruption                                   # bundled digits: seconds on 2 CPU cores
    python -m experiments.diagnose_corruption --data folder:DIR --image-size 32
    python -m experiments.diagnose_corruption --preset paper --data npz:FILE --measure   # the masks of Fig. 7

The labels of the data set are not looked at, unless ``--measure`` asks for the changes of r2 that its own task sees,
beside the verdicts. The ``paper`` preset takes the 30 masks of Fig. 7: minutes at 3,072 pixels on 2 cores. Interrupted,
the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import xarray as xr

import mae_align as ma
from experiments.diagnose_corruption.report import figure, rows_of, summarise, table_text
from experiments.harness.cli import launch
from experiments.harness.data import load_together
from experiments.harness.folder import RunFolder
from mae_align.closed_form.grid import GridSpec
from mae_align.corruption import Corruption
from mae_align.runtime.devices import worker_count


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the diagnosis."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or prepared:DIR."""
    patch_sizes: tuple[int, ...] = (1, 2, 4)
    """Sides of square patches, in pixels."""
    mask_ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    """Shares of patches to mask, from 0 to 1."""
    noise_levels: tuple[float, ...] = (0.1, 1.0)
    """Isotropic Gaussian noise, in standard deviations of all pixels."""
    ks: tuple[int, ...] = (4, 8, 16, 32)
    """Numbers of features."""
    num_targets: int = 10
    """Number of classes that the mean of the largest sines is for."""
    groups: int = 20
    """Groups of images; their even and odd halves show what sampling does."""
    image_size: int | None = None
    """Resize images to squares of this side, in pixels; none keeps them."""
    pixel_noise: float | None = None
    """Variance of the measurement noise of a pixel; none: quantisation noise, 1/12 for 8-bit images."""
    measure: bool = False
    """Also measure what the masks change for the data set's own labels, in-sample and on its test images."""
    seed: int = 0
    """Of the split, for data sets without test images of their own."""
    workers: int | None = None
    """Threads; none for one per core."""
    out: str | None = None
    """Run folder; none for runs/diagnose_corruption-DATA-HASH."""


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        mask_ratios=tuple(float(p) for p in np.linspace(0.0, 0.99, 10)),
        ks=(8, 32, 128, 256),
    ),
}


def main(config: Config) -> None:
    """Run the diagnosis of a configuration.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    data = load_together(config.data, image_size=config.image_size, seed=config.seed)
    _check(config, data)
    folder = RunFolder.open("diagnose_corruption", config.data, config, config.out, ignore=("out", "workers"))
    moments = ma.Moments.from_arrays(data.train_images, groups=config.groups)
    scale = float(np.sqrt(np.diag(moments.sxx).mean()))
    corruptions = _corruptions(config, scale)
    found = ma.compare_many(
        moments,
        corruptions,
        config.ks,
        num_targets=config.num_targets,
        pixel_noise=config.pixel_noise,
        run=ma.RunOptions(workers=config.workers, progress=True, store=folder.points / "spans"),
    )
    if config.measure:
        found = found.merge(_measured(config, data, folder), join="left")
    folder.save_dataset("diagnosis", found)
    path = folder.save_figure("moved_share", figure(found, config.patch_sizes, config.mask_ratios))
    rows = rows_of(found)
    folder.save_table("verdicts", rows)
    lines = [
        f"Diagnosis of corruptions on {data.name}: {moments.count} images of {moments.num_pixels} pixel values, rank "
        f"{found.attrs['rank']}, pixel noise {found.attrs['pixel_noise']:.3g}; no labels were used"
        + (" for the verdicts" if config.measure else ""),
        "",
        table_text(rows),
        "",
        f"Figure: {path}",
        "",
        *summarise(found),
    ]
    folder.summary("\n".join(lines))


def mask_name(size: int, ratio: float) -> str:
    """Name of a mask in tables.

    Example:
        >>> mask_name(2, 0.75)
        'mask 0.75 of 2x2'
    """
    return f"mask {ratio:g} of {size}x{size}"


def _corruptions(config: Config, scale: float) -> dict[str, Corruption | None]:
    masks = {mask_name(s, p): ma.PatchMasking(s, p) for s in config.patch_sizes for p in config.mask_ratios}
    noise = {f"noise {level:g} std": ma.GaussianNoise(level * scale) for level in config.noise_levels}
    return {**masks, **noise}


def _check(config: Config, data: ma.ImageDataset) -> None:
    """Refuse settings that do not fit the data before anything is computed or written."""
    GridSpec.checked(data.image_shape, config.patch_sizes, [0.0], config.mask_ratios, [math.inf], ma.PatchMasking)
    worker_count(config.workers)
    most = int(np.prod(data.image_shape))
    if min(config.ks) < 1 or max(config.ks) > most or len(set(config.ks)) < len(config.ks):
        given = " ".join(map(str, config.ks))
        raise ma.InputError(f"--ks {given}: the images have {most} pixel values, give each k in 1..{most} once")
    for level in config.noise_levels:
        if not (math.isfinite(level) and level >= 0):
            raise ma.InputError(f"--noise-levels {level}: give a number of at least 0")
    if not 2 <= config.groups <= len(data.train_images) // 2:
        raise ma.InputError(
            f"--groups {config.groups}: with {len(data.train_images)} images give from 2 to half as many groups"
        )
    if (data.train_images == data.train_images[:1]).all():
        raise ma.InputError("the images are constant: there is nothing to reconstruct")


def _measured(config: Config, data: ma.ImageDataset, folder: RunFolder) -> xr.Dataset:
    """Changes of r2 against no mask for the data set's own labels, in percentage points, over corruption and k."""
    classes = data.num_classes
    train = ma.Moments.from_arrays(data.train_images, data.train_labels, num_classes=classes)
    test = ma.Moments.from_arrays(data.test_images, data.test_labels, num_classes=classes, groups=config.groups)
    result = ma.masking_sweep(
        train,
        config.patch_sizes,
        [0.0, *(p for p in config.mask_ratios if p > 0)],
        eval_moments=test,
        max_k=max(config.ks),
        pixel_noise=config.pixel_noise,
        run=ma.RunOptions(workers=config.workers, progress=True, store=folder.points / "measured"),
    ).sel(k=list(config.ks))
    out: dict[str, list[np.ndarray]] = {"r2_change": [], "eval_r2_change": [], "eval_r2_change_se": []}
    names = []
    for size in config.patch_sizes:
        for ratio in config.mask_ratios:
            cell, plain = (result.sel(patch_size=size, mask_ratio=p) for p in (ratio, 0.0))
            names.append(mask_name(size, ratio))
            out["r2_change"].append(100 * (cell.r2 - plain.r2).values)
            out["eval_r2_change"].append(100 * (cell.eval_r2 - plain.eval_r2).values)
            influence = (cell.eval_influence - plain.eval_influence).transpose("group", "k").values
            out["eval_r2_change_se"].append(100 * ma.paired_se(influence))
    data_vars = {name: (("corruption", "k"), np.stack(values)) for name, values in out.items()}
    return xr.Dataset(data_vars, {"corruption": names, "k": list(config.ks)})


if __name__ == "__main__":
    launch(main, Config, PRESETS)
