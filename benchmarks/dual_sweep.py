"""Large images, few samples: a held-out masking sweep by the dual, and the primal beside it where both fit.

    python -m benchmarks.dual_sweep --data npz:FILE                                  # 224 x 224 x 3, 1,500 images
    python -m benchmarks.dual_sweep --data npz:FILE --image-size 24 --primal         # both, and how far apart

Images are resized to squares; enlarged ones have nearly singular patches, so that their curves say nothing about images
of that size. Prints the seconds of the factorisation and the sweep, the peak memory of the process, and held-out r2.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import time

import numpy as np
import xarray as xr

import mae_align as ma
from benchmarks.start import check_counts, start
from mae_align.data.resize import resize_images
from mae_align.runtime.devices import compile_counter, worker_count
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE or folder:DIR."""
    image_size: int = 224
    """Images are resized to squares of this side, in pixels."""
    images: int = 1500
    """Training images, the first of the data set."""
    test_images: int = 600
    """Held-out images, the first of the test images."""
    patch_sizes: tuple[int, ...] = (16, 32)
    """Sides of square patches, in pixels."""
    mask_ratios: tuple[float, ...] = tuple(float(p) for p in np.linspace(0.0, 0.99, 10))
    """Drop probabilities."""
    ks: tuple[int, ...] = (16, 64, 256)
    """Numbers of features to print."""
    groups: int = 20
    """Groups of held-out images, for standard errors."""
    pixel_noise: float | None = None
    """Variance of the measurement noise of a pixel; none: 1/12 for 8-bit images."""
    primal: bool = False
    """Also run the primal and print the largest differences."""


def main(config: Config) -> None:
    """Load, sweep, print."""
    check_counts(config)
    data = ma.load_dataset(config.data)
    if len(data.train_images) < config.images:
        raise InputError(f"--images {config.images}: the data set has {len(data.train_images)} training images")
    train = resize_images(data.train_images[: config.images], config.image_size)
    test = resize_images(data.test_images[: config.test_images], config.image_size)
    labels = data.train_labels[: config.images], data.test_labels[: config.test_images]
    classes = data.num_classes
    name, shape = data.name, train.shape[1:]
    print(
        f"{name}: {len(train)} training and {len(test)} test images of {'x'.join(map(str, shape))}, "
        f"d = {int(np.prod(shape))}; {worker_count()} workers, load {os.getloadavg()[0]:.1f}, "
        f"before the sweep {_peak():.2f} GB"
    )
    dual = _sweep(
        config,
        ma.Samples.from_arrays(train, labels[0], num_classes=classes),
        ma.Samples.from_arrays(test, labels[1], num_classes=classes, groups=config.groups),
    )
    _print_curves(config, dual)
    if not config.primal:
        return
    primal = _sweep(
        config,
        ma.Moments.from_arrays(train, labels[0], num_classes=classes),
        ma.Moments.from_arrays(test, labels[1], num_classes=classes, groups=config.groups),
        max_k=dual.attrs["rank"],
    )
    for label in ("alignment_percent", "r2", "eval_r2", "eval_r2_se"):
        scale = 1.0 if label == "alignment_percent" else 100.0
        gap = scale * abs(primal[label] - dual[label])
        at = ", ".join(f"{float(gap.sel(k=k).max()):.2g} at k={k}" for k in config.ks if k <= dual.sizes["k"])
        print(f"primal - dual, {label}: at most {float(gap.max()):.2g} percentage points; {at}")


def _sweep(
    config: Config, train: ma.Moments | ma.Samples, test: ma.Moments | ma.Samples, max_k: int | None = None
) -> xr.Dataset:
    start = time.perf_counter()
    with compile_counter() as compiled:
        result = ma.masking_sweep(
            train,
            config.patch_sizes,
            config.mask_ratios,
            eval_moments=test,
            max_k=max_k,
            pixel_noise=config.pixel_noise,
        )
    seconds = time.perf_counter() - start
    saturated = result.patch_size.values[result.saturated.values].tolist()
    print(
        f"{result.attrs['factorisation']}: {seconds:.1f} s for {result.r2[..., 0].size} points at every k up to "
        f"{result.sizes['k']} ({compiled.seconds:.1f} s of it compiling), peak memory {_peak():.2f} GB, "
        f"pixel noise {result.attrs['pixel_noise']:.3g}, saturated patch sizes {saturated or 'none'}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    return result


def _print_curves(config: Config, result: xr.Dataset) -> None:
    for size in config.patch_sizes:
        for k in (k for k in config.ks if k <= result.sizes["k"]):
            cell = result.sel(patch_size=size, k=k)
            pairs = zip(cell.eval_r2.values, cell.eval_r2_se.values, strict=True)
            print(f"patch {size:3d} k {k:4d} held-out r2: " + " ".join(f"{a:.3f}({b:.3f})" for a, b in pairs))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    start(main, Config)
