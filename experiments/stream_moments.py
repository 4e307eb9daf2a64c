"""Second moments of a data set, read once and saved: what every closed form and sweep starts from.

Paper: none, for data
Time: 5 seconds

    python -m experiments.stream_moments --out digits.npz                                  # bundled digits: seconds
    python -m experiments.stream_moments --data tfds:cifar10 --split fit --out fit.npz
    python -m experiments.stream_moments --data tfds:cifar10 --split test --out test.npz

Images are read as they are needed, not into memory as a whole, and their rows are split over all devices. Progress is
shown with images per second and the time left. Killed at any time, the same command goes on after the last batch saved
(in OUT.unfinished, every --checkpoint-every seconds). 8-bit images give the same file for every batch size, number of
devices and of processes, and interruption.

Several processes: start the same command once for each, with --coordinator HOST:PORT --num-processes M --process-id I,
the environment variables MAE_ALIGN_COORDINATOR, MAE_ALIGN_NUM_PROCESSES and MAE_ALIGN_PROCESS_ID, or, where JAX finds
the others itself (TPU pods, Slurm), MAE_ALIGN_DISTRIBUTED=auto. Each reads a part of the images; --out must be on
storage that process 0 can write, and OUT.unfinished on storage that each can.

`python -m experiments.masking_sweep --train-moments fit.npz --validation-moments ... --test-moments ...` goes on from
the files. With the same --seed and --validation-fraction, fit and validation are the split that it would make itself; a
data set with validation images of its own keeps to these. Targets that are no classes are summed as they are; where
their units differ, scale them first, for r2 weighs them by their variance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

import mae_align as ma
from experiments.harness.cli import launch
from mae_align.data import open_splits
from mae_align.data.pipeline import ImageBatch, batches, process_range
from mae_align.data.source import SubsetSource
from mae_align.data.split import validation_rows
from mae_align.runtime.processes import data_mesh, gathered, refused_together, start_distributed


class Split(enum.Enum):
    """A part of a data set."""

    train = "train"
    """All training images."""
    fit = "fit"
    """The training images without the validation images."""
    validation = "validation"
    """A share of the training images, by class."""
    test = "test"
    """The test images."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the data pass."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, table:FILE.csv, images:DIR, cifar:DIR, stl10:DIR, svhn:DIR,
    tfds:NAME or prepared:DIR."""
    split: Split = Split.train
    """Which images: train, test, or the two parts of train, fit and validation."""
    out: str = "moments.npz"
    """The file to write. It must not exist."""
    groups: int | None = None
    """Groups of images whose spread gives standard errors; none: 20 of test images, 1 of others."""
    image_size: int | tuple[int, int] | None = None
    """Resize images to squares of this side, or to HEIGHT WIDTH, in pixels; none keeps them."""
    center: bool = True
    """Covariances; without, moments about zero."""
    validation_fraction: float = 0.2
    """Share of the training images that is validation."""
    seed: int = 0
    """Of the splits."""
    batch_size: int = 1024
    """Images read at a time by each process."""
    checkpoint_every: float = 60.0
    """Seconds between saves; 0 for every batch."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes share the work."""
    num_processes: int | None = None
    """How many processes share the work."""
    process_id: int | None = None
    """Which of them this is, from 0."""


PRESETS = {"laptop": Config()}


@dataclasses.dataclass(frozen=True)
class Share:
    """The images of one process.

    Attributes:
        batches: (images, labels, indices in the split). count: images in them.
        num_classes: of the whole data set; None where the labels are no classes.
        identity: which images they are.
    """

    batches: Iterable[ImageBatch]
    count: int
    num_classes: int | None
    identity: str


def make_share(config: Config, process: int, processes: int) -> Share:
    """One process's part of the chosen split, in batches.

    Raises:
        InputError: data that cannot be read, fewer images than processes.
    """
    splits = open_splits(config.data, image_size=config.image_size, seed=config.seed)
    source = splits.test if config.split is Split.test else splits.train
    if config.split is Split.validation and splits.validation is not None:
        source = splits.validation
    elif config.split in (Split.fit, Split.validation) and splits.validation is None:
        # By the numbers of the classes, as the masking sweep splits images in memory.
        parts = validation_rows(source.labels(), config.validation_fraction, config.seed)
        source = SubsetSource(source, parts[0 if config.split is Split.fit else 1], source.name)
    if len(source) < processes:
        raise ma.InputError(f"{len(source)} images for {processes} processes: start fewer")
    stream = batches(source, batch_size=config.batch_size, process_index=process, process_count=processes)
    count = len(process_range(len(source), process, processes))
    return Share(stream, count, source.num_classes, f"{source.fingerprint()}, batches of {config.batch_size}")


def main(config: Config) -> None:
    """Compute and save the moments of a configuration.

    Raises:
        InputError: bad settings or data, before any long work; a file that exists.
    """
    out = Path(config.out).expanduser()
    if config.batch_size < 1:
        raise ma.InputError(f"--batch-size {config.batch_size}: give at least 1")
    if not (math.isfinite(config.checkpoint_every) and config.checkpoint_every >= 0):
        raise ma.InputError(f"--checkpoint-every {config.checkpoint_every}: give seconds, at least 0")
    start_distributed(config.coordinator, config.num_processes, config.process_id)
    mesh, process = data_mesh(), jax.process_index()
    with refused_together():
        if out.exists():
            raise ma.InputError(f"{out} exists already: delete it or choose another --out")
        share = make_share(config, process, jax.process_count())
    unfinished = out.with_name(f"{out.name}.unfinished")
    moments = ma.stream_moments(
        share.batches,
        num_classes=share.num_classes,
        center=config.center,
        groups=(20 if config.split is Split.test else 1) if config.groups is None else config.groups,
        preprocessing="stored pixels" if config.image_size is None else f"resized to {_size(config)} pixels",
        mesh=mesh,
        total=share.count,
        progress=True,
        checkpoint=unfinished,
        checkpoint_every=config.checkpoint_every,
        identity=share.identity,
    )
    if process == 0:
        moments.save(out)
    # No process forgets its sums before the result is on disk.
    gathered([np.zeros(1)], mesh)
    for file in unfinished.glob(f"moments-{process}-of-*.npz"):
        file.unlink()
    with contextlib.suppress(OSError):  # until the last process leaves, the folder holds files of others
        unfinished.rmdir()
    if process == 0:
        asked = "targets" if share.num_classes is None else "classes"
        print(
            f"{out}: moments of {moments.count} images of {moments.num_pixels} pixel values ({moments.pixel_dtype}), "
            f"{moments.num_targets} {asked}, {len(moments.counts)} group(s)"
        )


def _size(config: Config) -> str:
    """The size of resized images in words."""
    return "x".join(map(str, np.atleast_1d(np.array(config.image_size))))


if __name__ == "__main__":
    launch(main, Config, PRESETS)
