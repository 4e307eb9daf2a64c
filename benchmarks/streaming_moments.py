"""How fast and how large is the one pass over the images?

    python -m benchmarks.streaming_moments                 # d = 3,072, a minute or two
    python -m benchmarks.streaming_moments --pixels 784

Prints, in one run: the float32 matmul rate of this machine (square matrices of side d); the rate of the pass over 8-bit
and over float32 images on one device, with 2 n d^2 operations counted for n images, and its ratio to the matmul rate
(over 100% is possible: the sums are symmetric, and little more than one triangle is computed); and the peak memory of a
process that streams n and 2 n images. Batches are made on the fly; making them is part of no timing. Medians over the
repeats.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.start import check_counts, start
from mae_align.moments.streaming import stream_moments
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import data_mesh

_POOL = 4  # different batches


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    pixels: int = 3072
    """Pixel values d of an image."""
    images: int = 32_768
    """Images n of a pass."""
    batch: int = 4096
    """Images of a batch."""
    repeats: int = 3
    """Timed passes; the median counts."""
    memory_of: str | None = None
    """Used by the benchmark itself: stream once in this dtype and print the peak memory."""


def batches(config: Config, dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """n images of d pixels with 10 classes, from a small pool of batches."""
    rng = np.random.default_rng(0)
    pool = [rng.integers(0, 256, (config.batch, config.pixels, 1, 1), dtype=np.uint8) for _ in range(_POOL)]
    pool = [images.astype(dtype) for images in pool]
    labels = np.arange(config.batch) % 10
    for i in range(config.images // config.batch):
        yield pool[i % _POOL], labels


class _Apart:
    """Batches whose making is not part of the time."""

    def __init__(self, source: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        self.source, self.seconds = source, 0.0

    def __iter__(self) -> _Apart:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        start = time.perf_counter()
        try:
            return next(self.source)
        finally:
            self.seconds += time.perf_counter() - start


def pass_seconds(config: Config, dtype: str) -> float:
    """Seconds of one pass over the images, from the first batch to the moments."""
    source = _Apart(batches(config, dtype))
    start = time.perf_counter()
    moments = stream_moments(source, num_classes=10, mesh=data_mesh(jax.devices()[:1]))
    seconds = time.perf_counter() - start - source.seconds
    assert moments.count == config.images
    return seconds


def matmul_rate(config: Config) -> float:
    """Operations per second of a float32 product of square matrices of side d."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(config.pixels, config.pixels)).astype(np.float32))
    multiply = jax.jit(lambda x: jnp.dot(x, x, precision=jax.lax.Precision.HIGHEST))
    jax.block_until_ready(multiply(a))
    times = []
    for _ in range(max(config.repeats, 5)):
        start = time.perf_counter()
        jax.block_until_ready(multiply(a))
        times.append(time.perf_counter() - start)
    return 2 * config.pixels**3 / statistics.median(times)


def peak_mib(config: Config, dtype: str, images: int) -> float:
    """Peak resident memory of a fresh process that streams this many images."""
    command = [sys.executable, "-m", "benchmarks.streaming_moments", "--memory-of", dtype]
    command += ["--pixels", str(config.pixels), "--images", str(images), "--batch", str(config.batch)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _high_water_mib() -> float:
    """Of this program alone: what getrusage says of a child includes its parent's memory."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "the peak memory is read from Linux's /proc"
    return int(found[1]) / 1024


def main(config: Config) -> None:
    """Run the benchmark."""
    check_counts(config)
    if config.memory_of is not None:
        pass_seconds(config, config.memory_of)
        print(_high_water_mib())
        return
    if config.images < config.batch:
        raise InputError(f"--images {config.images}: give at least one batch, --batch {config.batch}")
    n, d = config.images // config.batch * config.batch, config.pixels
    config = dataclasses.replace(config, images=n)
    load = os.getloadavg()[0]
    print(f"d = {d:,}, n = {n:,}, batches of {config.batch:,}, one device, {os.cpu_count()} cores, load {load:.1f}")
    small = dataclasses.replace(config, images=config.batch)
    rates: dict[str, list[float]] = {"uint8": [], "float32": []}
    matmul = []
    for dtype in rates:
        pass_seconds(small, dtype)  # compiles
    for _ in range(config.repeats):  # in turns: what else the machine does hits all alike
        matmul.append(matmul_rate(config))
        for dtype, found in rates.items():
            found.append(2 * n * d * d / pass_seconds(config, dtype))
    peak = statistics.median(matmul)
    print(f"float32 matmul            {peak / 1e9:7.1f} GFLOP/s")
    for dtype, found in rates.items():
        rate = statistics.median(found)
        images = rate / (2 * d * d)
        print(
            f"moments of {dtype:8} images {rate / 1e9:7.1f} GFLOP/s  {100 * rate / peak:4.0f}%  {images:,.0f} images/s"
        )
    for dtype in rates:
        once, twice = (peak_mib(config, dtype, k * n) for k in (1, 2))
        print(f"peak memory, {dtype:8} images: {once:,.0f} MiB for n, {twice:,.0f} MiB for 2 n")


if __name__ == "__main__":
    start(main, Config)
