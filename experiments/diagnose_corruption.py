"""Can a corruption matter for any task? Answered from the images alone, without labels.

Paper: Fig. 7, without labels
Time: 5 seconds

For every mask (and noise level) and number of features k: how far the span of the denoising autoencoder's features is
from that of principal components. Where the two agree, no task can gain or lose; where they are no further apart than
two samples of this many images would be, the difference is within sampling noise; elsewhere it can matter, and the
masking sweep measures it for a task at hand. (Label-free criterion of Balestriero & LeCun, 2024, made quantitative.)

    python -m experiments.diagnose_corruption                                   # bundled digits: seconds on 2 CPU cores
    python -m experiments.diagnose_corruption --data folder:DIR --image-size 32
    python -m experiments.diagnose_corruption --preset paper --data npz:FILE --measure   # the masks of Fig. 7

The verdicts do not look at the labels, so that pictures without any do (``images:DIR``). ``--measure`` asks for the
changes of r2 that the data set's own task sees, beside them. Nothing is chosen, so that training and validation images
are used together. The ``paper`` preset takes the 30 masks of Fig. 7: minutes at 3,072 pixels on 2 cores. Interrupted,
the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import mae_align as ma
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Count, Counts, Groups, Ratios, RunConfig, Task, Workers
from experiments.harness.data import Split, check_groups
from experiments.harness.figures import PALETTE, panels
from experiments.harness.run import Run
from mae_align.closed_form.compare import CAN_MATTER, INERT, NOT_IDENTIFIED, TOO_FEW_IMAGES, WITHIN_NOISE
from mae_align.closed_form.grid import GridSpec
from mae_align.corruption import Corruption

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Zeros have to be drawn somewhere on a logarithmic axis.
_LEAST = 1e-3


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the diagnosis."""

    TAKES = (Task.classes, Task.targets, Task.nothing)

    patch_sizes: Counts = (1, 2, 4)
    """Sides of square patches, in pixels."""
    mask_ratios: Ratios = (0.25, 0.5, 0.75, 0.9)
    """Shares of patches to mask, from 0 to 1."""
    noise_levels: Annotated[tuple[float, ...], Bounds(least=0, unique=True)] = (0.1, 1.0)
    """Isotropic Gaussian noise, in standard deviations of all pixels."""
    ks: Counts = (4, 8, 16, 32)
    """Numbers of features."""
    num_targets: Count = 10
    """Number of classes that the mean of the largest sines is for."""
    groups: Groups = 20
    """Groups of images; their even and odd halves show what sampling does."""
    pixel_noise: Annotated[float | None, Bounds(least=0)] = None
    """Variance of the measurement noise of a pixel; none: quantisation noise, 1/12 for 8-bit images."""
    measure: bool = False
    """Also measure what the masks change for the data set's own labels, in-sample and on its test images."""
    workers: Workers = None
    """Threads; none for one per core."""


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        mask_ratios=tuple(float(p) for p in np.linspace(0.0, 0.99, 10)),
        ks=(8, 32, 128, 256),
    ),
}
COLUMNS = {
    "corruption": "mask, or noise in standard deviations of all pixels",
    "k": "number of features",
    "verdict": f"{INERT}, {WITHIN_NOISE}, {CAN_MATTER}, {NOT_IDENTIFIED} (eigenvalues tie, or fewer features than k) "
    f"or {TOO_FEW_IMAGES} to tell from sampling noise",
    "largest_sine": "bound on the change of in-sample r2 of any task; some task attains it",
    "mean_top_sine": "mean of the largest sines, a bound for --num-targets classes",
    "moved_share": "sum of squared sines over k: the share of the span that moves",
    "rms_change": "root mean square change of r2 of a random task",
    "eigengap": "gap between eigenvalues k and k + 1 of the features, relative to eigenvalue k",
    "reference_eigengap": "eigengap of the principal components",
    "sampling_ratio": "largest loss of the first j features, relative to that between samples; up to 1 is noise",
    "sampling_share": "moved_share between two samples of so many images",
    "r2_change": "r2 of a linear probe minus that without mask, in-sample [percentage points]",
    "eval_r2_change": "r2 of a linear probe minus that without mask, on test images [percentage points]",
    "eval_r2_change_se": "standard error of eval_r2_change, paired over groups of test images [percentage points]",
}


def main(config: Config, run: Run[Split]) -> None:
    """Diagnose every corruption, and say which can matter.

    Raises:
        InputError: settings that do not fit the images, before any long work.
    """
    images, labels = run.data.refit()
    _check(config, run.data, len(images))
    moments = ma.Moments.from_arrays(images, groups=config.groups)
    scale = float(np.sqrt(np.diag(moments.sxx).mean()))
    found = ma.compare_many(
        moments,
        _corruptions(config, scale),
        config.ks,
        num_targets=config.num_targets,
        pixel_noise=config.pixel_noise,
        run=ma.RunOptions(workers=config.workers, progress=True, store=run.folder.points / "spans"),
    )
    if config.measure:
        found = found.merge(_measured(config, images, labels, run), join="left")
    run.dataset("diagnosis", found)
    rows = rows_of(found)
    run.table("verdicts", rows, show=shown(rows))
    run.figure("sampling_ratio", ratio_figure(found, config))
    run.notes.append(
        "A number says how much of the features is lost by the corruption, in multiples of what another sample of as "
        f"many images loses; up to 1 is sampling noise. {len(images)} images, rank {found.attrs['rank']}, pixel noise "
        f"{found.attrs['pixel_noise']:.3g}; the verdicts use no labels."
    )
    if config.measure:
        run.notes.append("In brackets: the measured change of r2 on test images, in percentage points.")
    run.verdict(*verdict(rows))


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


def _check(config: Config, data: Split, count: int) -> None:
    """Refuse settings that do not fit the data before anything is computed or written."""
    GridSpec.checked(data.image_shape, config.patch_sizes, [0.0], config.mask_ratios, [math.inf], ma.PatchMasking)
    most = math.prod(data.image_shape)
    if max(config.ks) > most:
        given = " ".join(map(str, config.ks))
        raise ma.InputError(f"--ks {given}: the images have {most} pixel values, give each k in 1..{most}")
    if config.groups > count // 2:
        raise ma.InputError(f"--groups {config.groups}: with {count} images give from 2 to half as many groups")
    if config.measure and not data.class_names:
        raise ma.InputError(f"--measure asks about labels, and {data.name} has none: leave it out")
    if config.measure:
        check_groups(config.groups, len(data.test_labels))


def _measured(config: Config, images: np.ndarray, labels: np.ndarray, run: Run[Split]) -> xr.Dataset:
    """Changes of r2 against no mask for the data set's own labels, in percentage points, over corruption and k."""
    result = ma.masking_sweep(
        ma.Moments.from_arrays(images, labels, num_classes=run.data.num_classes),
        config.patch_sizes,
        [0.0, *(p for p in config.mask_ratios if p > 0)],
        eval_moments=run.data.moments(groups=config.groups)[1],
        max_k=max(config.ks),
        pixel_noise=config.pixel_noise,
        run=ma.RunOptions(workers=config.workers, progress=True, store=run.folder.points / "measured"),
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


def rows_of(found: xr.Dataset) -> pd.DataFrame:
    """One row per corruption and k: the verdict, the figures, and the measured changes of r2 where there are any."""
    names = ["verdict", "largest_sine", "mean_top_sine", "moved_share", "rms_change", "eigengap", "sampling_ratio"]
    names += [name for name in ("r2_change", "eval_r2_change", "eval_r2_change_se") if name in found]
    return found[[*names, "sampling_share"]].to_dataframe(dim_order=["corruption", "k"]).reset_index()


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """The table of the summary: a line per corruption, a column per k.

    Example:
        >>> rows = pd.DataFrame([{"corruption": "noise", "k": 4, "verdict": "can matter", "sampling_ratio": 2.51}])
        >>> print(shown(rows).to_string(index=False))
        corruption           k = 4
             noise 2.5x can matter
    """
    text = rows.sampling_ratio.map(_times) + rows.verdict
    if "eval_r2_change" in rows:
        text += ["" if math.isnan(change) else f" ({change:+.2f})" for change in rows.eval_r2_change]
    columns = {"corruption": rows.corruption.unique()}
    return pd.DataFrame(columns | {f"k = {k}": text[rows.k == k].to_numpy() for k in rows.k.unique()})


def _times(ratio: float) -> str:
    """A ratio in the table; nothing where it is not known."""
    return "" if math.isnan(ratio) else f"{ratio:.1f}x " if ratio < 9.95 else f"{ratio:.0f}x "


def verdict(rows: pd.DataFrame) -> list[str]:
    """At most three sentences: how many cells have which verdict, what can never matter, and where to go on."""
    counts = [(rows.verdict == text).sum() for text in (INERT, WITHIN_NOISE, CAN_MATTER)]
    rest = len(rows) - sum(counts)
    sentences = [
        f"Of {len(rows)} cells (a corruption and a k), {counts[0]} cannot matter for any task, {counts[1]} are within "
        f"what another sample of images would change, {counts[2]} can matter, and {rest} cannot be told."
    ]
    never = [str(name) for name, same in rows.groupby("corruption", sort=False) if (same.verdict == INERT).all()]
    if never:
        sentences.append(f"Cannot matter for any task, at every k: {', '.join(never)}.")
    if counts[2]:
        sentences.append("Whether a mask helps or hurts depends on the task: python -m experiments.masking_sweep.")
    return sentences


def ratio_figure(found: xr.Dataset, config: Config) -> Figure:
    """What decides: the loss by a mask, relative to that by sampling, against the mask ratio, a panel per k."""
    ks = found.k.values
    drawing, axes = panels(1, len(ks), width=1.9, height=2.2, sharey=True)
    for axis, k in zip(axes[0], ks, strict=True):
        axis.axhspan(_LEAST, 1.0, color="0.85", lw=0, label="within sampling noise")
        for size, color, marker in zip(config.patch_sizes, PALETTE, _MARKERS, strict=False):
            names = [mask_name(size, ratio) for ratio in config.mask_ratios]
            ratios = np.maximum(found.sampling_ratio.sel(corruption=names, k=k).values, _LEAST)
            axis.plot(
                config.mask_ratios, ratios, color=color, marker=marker, markersize=3, label=f"{size}x{size} patches"
            )
        axis.set_yscale("log")
        axis.set_ylim(_LEAST, max(10.0, 1.5 * float(np.nanmax(found.sampling_ratio, initial=1.0))))
        axis.yaxis.set_minor_locator(LogLocator(subs=()))
        axis.set_xlim(-0.03, 1.03)
        axis.set_title(f"k = {k}", fontsize=8)
        axis.set_xlabel("mask ratio")
    axes[0, 0].set_ylabel("loss of features by the mask,\nin multiples of sampling")
    axes[0, -1].legend(loc="lower right", fontsize=6)
    return drawing


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
