"""How much faster is the factorised masking sweep, and is it the same? Measured in one run, against two baselines.

    python -m benchmarks.masking_sweep --data idx:DIR                 # Fashion-MNIST, every point: 15 minutes
    python -m benchmarks.masking_sweep --data npz:FILE --points 2     # CIFAR-10, 2 direct points, scaled to the grid

Data, grid and preprocessing (jitter of 0.001 std, no floor) are the same on all sides. Each method runs in a process of
its own, so that its peak memory is its own; reading and jittering the images is not counted on any side.

* ``ours``: ``Moments.from_arrays`` (the pass over the data) and ``masking_sweep``, float64, a second run after the one
  that compiled; compilation is printed apart.
* ``direct``: the published algorithm, per grid point from the samples: second moments, one generalised eigenproblem,
  ``numpy.linalg.qr`` of the n x d features. ``direct, lean`` is the same with one product over the samples for all
  moments, and with faster LAPACK drivers for the eigenproblem and the QR than the published ones.
* ``moments``: one SciPy generalised eigenproblem per grid point from moments that are kept (their pass over the data is
  counted once).

The baselines run with the better of one and of all BLAS threads, tried on one point (``--threads`` to try fewer).
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import mae_align as ma
from benchmarks.direct_method import direct_point, lean_direct_point, moments_point
from benchmarks.start import check_counts, start
from mae_align.data.patches import patch_labels
from mae_align.data.transforms import jitter
from mae_align.runtime.devices import compile_counter, worker_count


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or prepared:DIR; the training images are used."""
    patch_sizes: tuple[int, ...] = (1, 2, 4)
    """Sides of square patches, in pixels."""
    mask_ratios: tuple[float, ...] = tuple(float(p) for p in np.linspace(0.0, 0.99, 10))
    """Drop probabilities."""
    points: int | None = None
    """Grid points measured of each baseline, spread over the grid and scaled to all of it; none for every point."""
    repeats: int = 3
    """Runs of ours after the one that compiles; the median is reported."""
    threads: tuple[int, ...] = tuple(sorted({1, os.cpu_count() or 1}))
    """BLAS threads that the baselines try on their first point; the faster try counts."""
    seed: int = 0
    """Of the jitter."""
    method: str | None = None
    """Internal: the method that this process measures."""
    result: str | None = None
    """Internal: the file it writes."""


METHODS = ("ours", "moments", "direct", "direct, lean")


def main(config: Config) -> None:
    """Measure every method in its own process, or (internally) one of them in this one."""
    check_counts(config, "seed")
    if config.method is not None:
        _measure(config)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, curves = {}, {}
        for method in METHODS:
            target = Path(folder, f"{len(rows)}.npz")
            arguments = ["--method", method, "--result", str(target)]
            done = subprocess.run([sys.executable, "-m", "benchmarks.masking_sweep", *sys.argv[1:], *arguments])
            if done.returncode < 0:
                raise SystemExit(f"{method}: ended by {signal.Signals(-done.returncode).name}: enough memory?")
            if done.returncode:  # it has said why
                raise SystemExit(done.returncode)
            with np.load(target) as found:
                rows[method] = json.loads(str(found["row"]))
                curves[method] = {name: found[name] for name in found.files if name != "row"}
    _report(config, rows, curves)


def _grid(config: Config) -> list[tuple[int, float]]:
    return [(size, ratio) for size in config.patch_sizes for ratio in config.mask_ratios]


def _chosen(config: Config) -> list[int]:
    """Positions of the baseline's points: spread evenly over the grid, ends left out where few are wanted."""
    total = len(config.patch_sizes) * len(config.mask_ratios)
    count = total if config.points is None else min(config.points, total)
    return sorted({int((i + 0.5) * total / count) for i in range(count)})


def _measure(config: Config) -> None:
    started = time.perf_counter()
    data = ma.load_dataset(config.data, seed=config.seed)
    images = jitter(data.train_images, 0.001, config.seed)
    labels, classes = data.train_labels, data.classes
    loading = time.perf_counter() - started
    row, curves = (_ours if config.method == "ours" else _baseline)(config, images, labels, classes)
    row |= {
        "loading_s": loading,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "images": len(images),
        "pixels": int(np.prod(images.shape[1:])),
    }
    assert config.result is not None
    np.savez(config.result, row=json.dumps(row), **curves)


def _ours(config: Config, images: np.ndarray, labels: np.ndarray, classes: int) -> tuple[dict, dict]:
    def run() -> tuple[float, float, ma.Moments, np.ndarray]:
        start = time.perf_counter()
        moments = ma.Moments.from_arrays(images, labels, num_classes=classes)
        middle = time.perf_counter()
        result = ma.masking_sweep(moments, config.patch_sizes, config.mask_ratios, pixel_noise=0.0)
        return middle - start, time.perf_counter() - middle, moments, result.alignment.values

    with compile_counter() as compiled:
        run()
    runs = [run() for _ in range(config.repeats)]
    alignment = runs[-1][3].reshape(len(_grid(config)), -1)
    row = {
        "seconds": statistics.median(a + b for a, b, _, _ in runs),
        "pass_s": statistics.median(a for a, _, _, _ in runs),
        "compile_s": compiled.seconds,
        "programs": compiled.count,
        "threads": worker_count(),
        "measured": len(_grid(config)),
    }
    return row, {str(i): 100 * np.sqrt(curve) for i, curve in enumerate(alignment)}


def _baseline(config: Config, images: np.ndarray, labels: np.ndarray, classes: int) -> tuple[dict, dict]:
    x = images.reshape(len(images), -1).astype(np.float64)
    x -= x.mean(0)
    x /= x.std()
    y = np.eye(classes)[labels]
    grid, chosen = _grid(config), _chosen(config)
    shape = images.shape[1:]
    before = 0.0
    if config.method == "moments":
        start = time.perf_counter()
        sxx, sxy, yty = x.T @ x, x.T @ y, y.T @ y
        before = time.perf_counter() - start

        def point(i: int) -> np.ndarray:
            return moments_point(sxx, sxy, yty, patch_labels(shape, grid[i][0]), grid[i][1])
    else:
        solve = direct_point if config.method == "direct" else lean_direct_point

        def point(i: int) -> np.ndarray:
            return solve(x, y, patch_labels(shape, grid[i][0]), grid[i][1])

    # The first point is tried with every number of BLAS threads; the faster try is its measurement.
    tries = {threads: _timed(point, chosen[0], threads) for threads in config.threads}
    threads = min(tries, key=lambda t: tries[t][0])
    took = [tries[threads], *(_timed(point, i, threads) for i in chosen[1:])]
    times = [seconds for seconds, _ in took]
    curves = {str(i): curve for i, (_, curve) in zip(chosen, took, strict=True)}
    mean = statistics.fmean(times)
    row = {"seconds": before + mean * len(grid), "pass_s": before, "threads": threads, "measured": len(chosen)}
    return row, curves


def _timed(point: Callable[[int], np.ndarray], i: int, threads: int) -> tuple[float, np.ndarray]:
    with threadpool_limits(threads, user_api="blas"):
        start = time.perf_counter()
        curve = point(i)
        seconds = time.perf_counter() - start
    print(f"  point {i}, {threads} BLAS threads: {seconds:.2f} s", file=sys.stderr, flush=True)
    return seconds, curve


def _report(config: Config, rows: dict[str, dict], curves: dict[str, dict]) -> None:
    ours = rows["ours"]
    print(
        f"\n{config.data}: {ours['images']:,} images of {ours['pixels']:,} pixels, {len(_grid(config))} grid points, "
        f"every k, float64; load average {os.getloadavg()[0]:.1f}"
    )
    print(f"ours: compilation {ours['compile_s']:.1f} s ({ours['programs']} programs), apart from the time below")
    head = (
        "method",
        "seconds",
        "of it the data pass",
        "ratio to ours",
        "points measured",
        "BLAS threads",
        "peak GiB",
        "largest difference [points]",
    )
    print("  ".join(head))
    for method, row in rows.items():
        same = [np.abs(curves["ours"][i] - curve).max() for i, curve in curves[method].items()]
        cells = (
            f"{row['seconds']:.1f}",
            f"{row['pass_s']:.1f}",
            f"{row['seconds'] / ours['seconds']:.1f}",
            f"{row['measured']} of {len(_grid(config))}",
            str(row["threads"]) if method != "ours" else f"{row['threads']} workers",
            f"{row['peak_gib']:.2f}",
            "" if method == "ours" else f"{max(same):.1e}",
        )
        print(
            "  ".join([method.ljust(19), *(cell.rjust(len(name)) for cell, name in zip(cells, head[1:], strict=True))])
        )


if __name__ == "__main__":
    start(main, Config)
