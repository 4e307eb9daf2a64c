"""How far do an image set's principal components serve its labels? Alignment over k, and what lowers it.

Fig. 2 of Balestriero & LeCun (2024), arXiv 2402.11337. The features of a linear autoencoder are the principal
components; the curves show how much of the labels a linear probe on k of them explains: r2 in-sample and on held-out
images, and 100 sqrt(alignment), the score of the published figure (relative to full rank, in-sample). Beside the sets
themselves, three studies test what the figure suggests, each by changing one thing of one set:

* classes: nested random subsets of the classes, equal numbers of training images;
* resolution: average pooling;
* background: the same glyphs and labels over crops of natural images, of contrast 0 to 1.

    python -m experiments.alignment_curves                                # bundled digits and photographs, 10 s
    python -m experiments.alignment_curves --studies sets --datasets digits idx:DIR npz:FILE
    python -m experiments.alignment_curves --studies background --ks 2 8 32 128
        --background.foreground npz:GLYPHS --background.backgrounds npz:PHOTOS

On 2 CPU cores the first takes 10 s, five sets of up to 60,000 x 784 and 50,000 x 3,072 take 3 minutes (4 GiB), the
background study of 60,000 x 784 takes 45 s; ``--preset paper`` wants the sets of the published figure as files in the
working folder. Expected of the first command: digits at k = 16, r2 0.568, held-out 0.562 +- 0.016, 100 sqrt(alignment)
93.10; over photographs at full contrast held-out r2 is 0.156 +- 0.012 lower. Larger runs are in docs/results.md.
Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import mae_align as ma
from experiments.alignment_curves.report import report_background, report_classes, report_resolution, report_sets
from experiments.alignment_curves.studies import (
    Backgrounds,
    Curve,
    Job,
    Protocol,
    background_jobs,
    blended,
    class_jobs,
    like_foreground,
    photographs,
    resolution_jobs,
    run_jobs,
    set_jobs,
)
from experiments.harness.cli import launch
from experiments.harness.data import load_together
from experiments.harness.folder import RunFolder
from mae_align.moments.moments import group_of
from mae_align.runtime.files import PointStore, fingerprint
from mae_align.runtime.processes import refused_together

_PHOTOGRAPHS = "photographs"
_EXAMPLES = 6


class Study(enum.Enum):
    """What to draw."""

    sets = "sets"
    classes = "classes"
    resolution = "resolution"
    background = "background"


@dataclasses.dataclass(frozen=True)
class Classes:
    """Study of the number of classes."""

    dataset: str = "digits"
    """A set of many classes."""
    counts: tuple[int, ...] = (2, 3, 5, 10)
    """Numbers of classes; a larger subset contains the smaller ones."""
    orders: int = 5
    """Random orders of the classes; the spread between them gives the standard errors."""


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Study of the resolution."""

    dataset: str = "digits"
    """The set to pool."""
    factors: tuple[int, ...] = (1, 2, 4)
    """Sides of the blocks of pixels that are averaged; each must divide the image."""


@dataclasses.dataclass(frozen=True)
class Background:
    """Study of the background."""

    foreground: str = "digits"
    """Glyphs, bright on black."""
    backgrounds: str = _PHOTOGRAPHS
    """Natural images to crop: photographs (two that scikit-learn bundles) or a data set."""
    contrasts: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Contrasts of the background, from 0 (black) to 1."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the alignment curves."""

    datasets: tuple[str, ...] = ("digits",)
    """Sets of the first figure: digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or prepared:DIR."""
    studies: tuple[Study, ...] = tuple(Study)
    """Which figures to make: the sets themselves, and three studies that change one thing of one set."""
    classes: Classes = Classes()
    resolution: Resolution = Resolution()
    background: Background = Background()
    ks: tuple[int, ...] = (8, 16)
    """Numbers of features for the tables and the summary."""
    center: bool = True
    """Covariances about the mean. Without: moments about zero, as in the first published protocol."""
    pixel_noise: float | None = None
    """Variance of the measurement noise of a pixel; none: quantisation, 1/12 for 8-bit images (published: 1e-4)."""
    image_size: int | None = None
    """Resize all images to squares of this side, in pixels; none keeps them."""
    max_train: int | None = None
    """Use at most so many training images of each set, drawn at random; none for all."""
    groups: int = 20
    """Groups of test images whose spread gives the standard errors."""
    seed: int = 0
    """Of the splits, the class subsets and the background crops."""
    workers: int | None = None
    """Threads; none for one per core, as far as memory goes."""
    out: str | None = None
    """Run folder; none for runs/alignment_curves-DATA-HASH."""


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        datasets=(
            "npz:arabic_characters.npz",
            "npz:arabic_digits.npz",
            "npz:svhn.npz",
            "idx:fashion-mnist",
            "npz:cifar10.npz",
            "npz:cifar100.npz",
        ),
        classes=Classes("npz:cifar100.npz", (10, 20, 50, 100), orders=10),
        resolution=Resolution("npz:cifar10.npz", (1, 2, 4, 8)),
        background=Background("npz:arabic_digits.npz", "npz:cifar10.npz"),
        ks=(32, 128),
    ),
}


def main(config: Config) -> None:
    """Draw the curves of a configuration.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    _check_numbers(config)
    loaded = _load(config)
    backgrounds = _load_backgrounds(config, loaded)
    _check_fit(config, loaded)
    jobs = _jobs(config, loaded, backgrounds)
    examples = _examples(config, loaded, backgrounds)
    every = [job for study in jobs.values() for job in study.values()]
    memory = _check_memory(every)
    label = next(iter(loaded)) if len(loaded) == 1 else "several"
    folder = RunFolder.open("alignment_curves", label, config, config.out, ignore=("out", "workers"))
    arrays = [a for data in loaded.values() for a in _arrays(data)]
    store = PointStore(
        folder.points, fingerprint([*arrays, *(backgrounds or ())], {"jobs": [job.key for job in every]})
    )
    found = run_jobs(every, store, config.workers, memory)
    lines: list[str] = []
    for study, members in jobs.items():
        curves = {value: found[job.key] for value, job in members.items()}
        lines += [*_report(study, folder, curves, config, loaded, examples), ""]
    folder.summary("\n".join([*lines, f"Figures and tables: {folder.path}"]))


def _arrays(data: ma.ImageDataset) -> tuple[np.ndarray, ...]:
    return data.train_images, data.train_labels, data.test_images, data.test_labels


def _check_numbers(config: Config) -> None:
    """Refuse settings that no data could fit."""
    lists: dict[str, Iterable[Any]] = {
        "--datasets": config.datasets,
        "--classes.counts": config.classes.counts,
        "--resolution.factors": config.resolution.factors,
        "--background.contrasts": config.background.contrasts,
        "--ks": config.ks,
    }
    for option, values in lists.items():
        values = list(values)
        if len(set(values)) < len(values):
            raise ma.InputError(f"{option} {_words(values)} repeats a value: give each once")
    for contrast in config.background.contrasts:
        if not 0 <= contrast <= 1:
            raise ma.InputError(f"--background.contrasts {contrast:g}: give numbers from 0 to 1")
    if min(config.ks) < 1:
        raise ma.InputError(f"--ks {_words(config.ks)}: give numbers of at least 1")
    for option, value in (("--groups", config.groups), ("--classes.orders", config.classes.orders)):
        if value < 1:
            raise ma.InputError(f"{option} {value}: give a number of at least 1")
    if config.max_train is not None and config.max_train < 2:
        raise ma.InputError(f"--max-train {config.max_train}: give at least 2 images")
    if config.pixel_noise is not None and not (math.isfinite(config.pixel_noise) and config.pixel_noise >= 0):
        raise ma.InputError(f"--pixel-noise {config.pixel_noise:g}: give a variance of at least 0")


def _labels(config: Config) -> list[str]:
    """The data sets that the chosen studies need, each once."""
    needed = {
        Study.sets: config.datasets,
        Study.classes: (config.classes.dataset,),
        Study.resolution: (config.resolution.dataset,),
        Study.background: (config.background.foreground,),
    }
    return list(dict.fromkeys(label for study in config.studies for label in needed[study]))


def _load(config: Config) -> dict[str, ma.ImageDataset]:
    """The data sets by label, training images thinned out where asked for."""
    loaded = {}
    for label in _labels(config):
        data = load_together(label, image_size=config.image_size, seed=config.seed)
        n = len(data.train_labels)
        if config.max_train is not None and n > config.max_train:
            rows = np.sort(np.random.default_rng(config.seed).choice(n, config.max_train, replace=False))
            data = dataclasses.replace(data, train_images=data.train_images[rows], train_labels=data.train_labels[rows])
        loaded[label] = data
    return loaded


def _load_backgrounds(config: Config, loaded: Mapping[str, ma.ImageDataset]) -> Backgrounds | None:
    if Study.background not in config.studies:
        return None
    label = config.background.backgrounds
    if label == _PHOTOGRAPHS:
        with refused_together():
            found = photographs()
    else:
        try:
            data = loaded.get(label) or load_together(label, image_size=config.image_size, seed=config.seed)
        except ma.InputError as error:
            raise ma.InputError(f"--background.backgrounds: {error} (or {_PHOTOGRAPHS})") from None
        found = Backgrounds(data.train_images, data.test_images)
    return like_foreground(found, loaded[config.background.foreground].image_shape[2])


def _check_fit(config: Config, loaded: Mapping[str, ma.ImageDataset]) -> None:
    """Refuse settings that do not fit the data."""
    for label, data in loaded.items():
        most = math.prod(data.image_shape)
        if min(config.ks) > most:
            raise ma.InputError(
                f"--ks {_words(config.ks)}: images of {label} have {most} pixel values, give a smaller k"
            )
        members = np.bincount(group_of(np.arange(len(data.test_labels)), config.groups), minlength=config.groups)
        if not members.all():
            raise ma.InputError(
                f"--groups {config.groups}: the {len(data.test_labels)} test images of {label} leave a group empty, "
                "give fewer groups"
            )
    if Study.classes in config.studies:
        data = loaded[config.classes.dataset]
        for count in config.classes.counts:
            if not 2 <= count <= data.num_classes:
                raise ma.InputError(
                    f"--classes.counts {count}: {config.classes.dataset} has {data.num_classes} classes, "
                    f"give numbers from 2 to {data.num_classes}"
                )
        fewest = np.bincount(data.train_labels, minlength=data.num_classes).min() * min(config.classes.counts)
        if fewest < 2 * max(config.classes.counts):
            raise ma.InputError(
                f"--classes.counts {_words(config.classes.counts)}: equal numbers of training images would leave fewer "
                f"than 2 of each class of {config.classes.dataset}, give counts that are closer"
            )
    if Study.resolution in config.studies:
        h, w, _ = loaded[config.resolution.dataset].image_shape
        for factor in config.resolution.factors:
            if factor < 1 or h % factor or w % factor:
                divisors = [f for f in range(1, min(h, w) + 1) if h % f == 0 and w % f == 0]
                raise ma.InputError(
                    f"--resolution.factors {factor} does not divide the {h} x {w} images of "
                    f"{config.resolution.dataset}: give some of {_words(divisors)}"
                )


def _jobs(
    config: Config, loaded: Mapping[str, ma.ImageDataset], backgrounds: Backgrounds | None
) -> dict[Study, dict[Any, Job]]:
    """All curves to compute, by study and condition; the reference of a study comes first."""
    protocol = Protocol(config.center, config.groups, config.pixel_noise)
    jobs: dict[Study, dict[Any, Job]] = {}
    if Study.sets in config.studies:
        jobs[Study.sets] = dict(set_jobs({label: loaded[label] for label in config.datasets}, protocol))
    if Study.classes in config.studies:
        counts = sorted(config.classes.counts)
        data = loaded[config.classes.dataset]
        jobs[Study.classes] = dict(class_jobs(data, counts, config.classes.orders, config.seed, protocol))
    if Study.resolution in config.studies:
        data = loaded[config.resolution.dataset]
        jobs[Study.resolution] = dict(resolution_jobs(data, sorted(config.resolution.factors), protocol))
    if backgrounds is not None:
        data, contrasts = loaded[config.background.foreground], sorted(config.background.contrasts)
        jobs[Study.background] = dict(background_jobs(data, backgrounds, contrasts, config.seed, protocol))
    return jobs


def _examples(
    config: Config, loaded: Mapping[str, ma.ImageDataset], backgrounds: Backgrounds | None
) -> np.ndarray | None:
    """The first test images at each contrast, [contrasts, images, h, w, c]; refuses what cannot be blended."""
    if backgrounds is None:
        return None
    data = loaded[config.background.foreground]
    try:
        made = [blended(data, backgrounds, c, config.seed).test_images for c in sorted(config.background.contrasts)]
    except ma.InputError as error:
        raise ma.InputError(f"{config.background.foreground} over {config.background.backgrounds}: {error}") from None
    return np.stack([images[:_EXAMPLES] for images in made])


def _check_memory(jobs: Sequence[Job]) -> int:
    """Memory of this machine in bytes; refuses images whose moments would not fit."""
    if not hasattr(os, "sysconf"):  # Windows
        return 8 * 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    largest = max(jobs, key=lambda job: job.memory)
    if largest.memory > memory:
        raise ma.InputError(
            f"images of {largest.num_pixels} values need about {largest.memory / 2**30:.0f} GiB and this machine has "
            f"{memory / 2**30:.0f}: give a smaller --image-size or --groups"
        )
    return memory


def _words(values: Iterable[Any]) -> str:
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _report(
    study: Study,
    folder: RunFolder,
    curves: dict[Any, Curve],
    config: Config,
    loaded: Mapping[str, ma.ImageDataset],
    examples: np.ndarray | None,
) -> list[str]:
    """Files of one study, and its part of the summary."""
    r2_name = "r2: share of label variance" if config.center else "r2 about zero: share of E|y|^2"
    if study is Study.sets:
        return report_sets(folder, curves, config.ks, r2_name)
    if study is Study.classes:
        return report_classes(folder, curves, config.ks, r2_name, config.classes.dataset)
    if study is Study.resolution:
        label = config.resolution.dataset
        return report_resolution(folder, curves, config.ks, r2_name, label, loaded[label].image_shape)
    assert examples is not None
    over = f"{config.background.foreground} over {config.background.backgrounds}"
    return report_background(folder, curves, config.ks, r2_name, over, examples)


if __name__ == "__main__":
    launch(main, Config, PRESETS)
