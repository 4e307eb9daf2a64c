"""How far do an image set's principal components serve its labels? Alignment over k, and what lowers it.

Paper: Fig. 2
Time: 10 seconds

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

All studies are of --data unless they name a set of their own. Nothing is chosen: training and validation images are
fitted together, and held-out r2 is that of the test images.

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
from typing import Annotated, Any

import numpy as np

import mae_align as ma
from experiments.alignment_curves.report import report_background, report_classes, report_resolution, report_sets
from experiments.alignment_curves.studies import (
    Backgrounds,
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
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Count, Counts, Groups, Ratios, RunConfig, Workers
from experiments.harness.data import Split, check_groups
from experiments.harness.run import Run
from mae_align.runtime.files import fingerprint
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

    dataset: str | None = None
    """A set of many classes; none for --data."""
    counts: Annotated[tuple[int, ...], Bounds(least=2, unique=True)] = (2, 3, 5, 10)
    """Numbers of classes; a larger subset contains the smaller ones."""
    orders: Count = 5
    """Random orders of the classes; the spread between them gives the standard errors."""


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Study of the resolution."""

    dataset: str | None = None
    """The set to pool; none for --data."""
    factors: Counts = (1, 2, 4)
    """Sides of the blocks of pixels that are averaged; each must divide the image."""


@dataclasses.dataclass(frozen=True)
class Background:
    """Study of the background."""

    foreground: str | None = None
    """Glyphs, bright on black; none for --data."""
    backgrounds: str = _PHOTOGRAPHS
    """Natural images to crop: photographs (two that scikit-learn bundles) or a data set."""
    contrasts: Ratios = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Contrasts of the background, from 0 (black) to 1."""


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the alignment curves."""

    datasets: tuple[str, ...] | None = None
    """Sets of the first figure, named as for --data; none for --data alone."""
    studies: tuple[Study, ...] = tuple(Study)
    """Which figures to make: the sets themselves, and three studies that change one thing of one set."""
    classes: Classes = Classes()
    resolution: Resolution = Resolution()
    background: Background = Background()
    ks: Counts = (8, 16)
    """Numbers of features for the tables and the summary."""
    center: bool = True
    """Covariances about the mean. Without: moments about zero, as in the first published protocol."""
    pixel_noise: Annotated[float | None, Bounds(least=0)] = None
    """Variance of the measurement noise of a pixel; none: quantisation, 1/12 for 8-bit images (published: 1e-4)."""
    groups: Groups = 20
    """Groups of test images whose spread gives the standard errors."""
    workers: Workers = None
    """Threads; none for one per core, as far as memory goes."""

    def label_of(self, study: Study) -> str:
        """The set that a study of one set changes."""
        own = {
            Study.classes: self.classes.dataset,
            Study.resolution: self.resolution.dataset,
            Study.background: self.background.foreground,
        }
        return own.get(study) or self.data

    def labels_of(self, study: Study) -> tuple[str, ...]:
        """All sets that a study needs, each once."""
        if study is Study.sets:
            return self.datasets or (self.data,)
        others = [self.background.backgrounds] if study is Study.background else []
        return tuple(dict.fromkeys([self.label_of(study), *(o for o in others if o != _PHOTOGRAPHS)]))


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        data="npz:cifar10.npz",
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
_R2 = "share of the label variance (of E|y|^2 with --no-center) that a linear probe on k principal components explains"
COLUMNS = {
    "set": "data set",
    "classes": "number of classes",
    "order": "number of the random order of the classes",
    "factor": "side of the blocks that are averaged [pixels]",
    "contrast": "contrast of the background, 0 is black",
    "k": "number of features",
    "d": "pixel values of an image",
    "n": "images that are fitted",
    "num_pixels": "pixel values of an image",
    "num_train": "images that are fitted",
    "num_test": "test images",
    "share_of_d": "k over the pixel values of an image",
    "r2": f"{_R2}, in-sample",
    "alignment": "the paper's alignment ratio (uncentred Y^T Y, relative to full rank), in-sample",
    "alignment_percent": "100 sqrt(alignment), in-sample [%]",
    "eval_r2": f"{_R2}, on test images",
    "eval_r2_se": "standard error of eval_r2 over groups of test images",
    "eval_r2_spread": "standard deviation of eval_r2 between orders of the classes",
    "eval_share": "eval_r2 over its largest value over k",
    "eval_share_se": "standard error of eval_share over groups of test images",
    "bound": "k over the number of classes less one, at most 1: what k features can explain of balanced classes",
    "k90": "smallest k whose r2 reaches 90% of its value at full rank",
    "eval_k90": "smallest k whose eval_r2 reaches 90% of its largest value over k",
    "r2_change": "eval_r2 minus that of the first condition",
    "r2_change_se": "standard error of r2_change, paired over groups of test images or over orders of the classes",
    "share_change": "eval_share minus that of the first condition",
    "share_change_se": "standard error of share_change, paired over groups of test images",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Sets:
    """The data sets of all studies.

    Attributes:
        name: of the set, or "several". splits: by label. backgrounds: to crop from; None without that study.
    """

    name: str
    splits: Mapping[str, Split]
    backgrounds: Backgrounds | None

    @property
    def description(self) -> str:
        """The sets in words, a line for each."""
        return "\n".join(split.description for split in self.splits.values())

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Of the one set, or of all of them together."""
        prints = {label: split.fingerprint for label, split in self.splits.items()}
        if len(prints) == 1:
            return next(iter(prints.values()))
        parts = ("train", "validation", "test")
        return {part: fingerprint([], {label: one[part] for label, one in prints.items()}) for part in parts}

    def datasets(self) -> dict[str, ma.ImageDataset]:
        """By label, what is fitted (`Split.refit`) and the test images."""
        return {
            label: ma.ImageDataset(*s.refit(), s.test_images, s.test_labels, s.class_names, s.name)
            for label, s in self.splits.items()
        }


def load(config: Config) -> Sets:
    """The sets of the chosen studies, each cut up by the one rule.

    Raises:
        InputError: sets that cannot be read or split.
    """
    splits: dict[str, Split] = {}
    for label in dict.fromkeys(label for study in config.studies for label in config.labels_of(study)):
        try:
            splits[label] = Split.load(dataclasses.replace(config, data=label))
        except ma.InputError as error:
            if label != config.background.backgrounds:
                raise
            raise ma.InputError(f"--background.backgrounds: {error} (or {_PHOTOGRAPHS})") from None
    name = next(iter(splits.values())).name if len(splits) == 1 else "several"
    if Study.background not in config.studies:
        return Sets(name, splits, None)
    if config.background.backgrounds == _PHOTOGRAPHS:
        with refused_together():
            found = photographs()
    else:
        split = splits[config.background.backgrounds]
        found = Backgrounds(split.refit()[0], split.test_images)
    channels = splits[config.label_of(Study.background)].image_shape[2]
    return Sets(name, splits, like_foreground(found, channels))


def main(config: Config, run: Run[Sets]) -> None:
    """Draw the curves of a configuration.

    Raises:
        InputError: settings that do not fit the data, before any long work.
    """
    loaded = run.data.datasets()
    _check_fit(config, loaded)
    jobs = _jobs(config, loaded, run.data.backgrounds)
    examples = _examples(config, loaded, run.data.backgrounds)
    every = [job for study in jobs.values() for job in study.values()]
    memory = _check_memory(every)
    found = run_jobs(every, run.store, config.workers, memory)
    curves: dict[Study, dict[Any, Any]] = {
        study: {value: found[job.key] for value, job in members.items()} for study, members in jobs.items()
    }
    r2_name = "r2: share of label variance" if config.center else "r2 about zero: share of E|y|^2"
    sentences: list[str] = []
    if Study.classes in curves:
        sentences += report_classes(run, curves[Study.classes], config.ks, r2_name)
    if Study.resolution in curves:
        shape = loaded[config.label_of(Study.resolution)].image_shape
        sentences += report_resolution(run, curves[Study.resolution], config.ks, r2_name, shape)
    if examples is not None:
        sentences += report_background(run, curves[Study.background], config.ks, r2_name, examples)
    if Study.sets in curves:
        of_sets = report_sets(run, curves[Study.sets], config.ks, r2_name)
        # Three sentences are enough: beside three studies, the table alone compares the sets.
        sentences += of_sets if len(sentences) < 3 else []
    run.notes.append(f"Tables: {r2_name}; changes are against the first condition of a study, on test images.")
    run.verdict(*sentences)


def _check_fit(config: Config, loaded: Mapping[str, ma.ImageDataset]) -> None:
    """Refuse settings that do not fit the data."""
    for label, data in loaded.items():
        most = math.prod(data.image_shape)
        if min(config.ks) > most:
            raise ma.InputError(
                f"--ks {_words(config.ks)}: images of {label} have {most} pixel values, give a smaller k"
            )
        check_groups(config.groups, len(data.test_labels))
    if Study.classes in config.studies:
        label = config.label_of(Study.classes)
        data = loaded[label]
        for count in config.classes.counts:
            if count > data.classes:
                raise ma.InputError(
                    f"--classes.counts {count}: {label} has {data.classes} classes, "
                    f"give numbers from 2 to {data.classes}"
                )
        fewest = np.bincount(data.train_labels, minlength=data.classes).min() * min(config.classes.counts)
        if fewest < 2 * max(config.classes.counts):
            raise ma.InputError(
                f"--classes.counts {_words(config.classes.counts)}: equal numbers of training images would leave fewer "
                f"than 2 of each class of {label}, give counts that are closer"
            )
    if Study.resolution in config.studies:
        label = config.label_of(Study.resolution)
        h, w, _ = loaded[label].image_shape
        for factor in config.resolution.factors:
            if h % factor or w % factor:
                divisors = [f for f in range(1, min(h, w) + 1) if h % f == 0 and w % f == 0]
                raise ma.InputError(
                    f"--resolution.factors {factor} does not divide the {h} x {w} images of "
                    f"{label}: give some of {_words(divisors)}"
                )


def _jobs(
    config: Config, loaded: Mapping[str, ma.ImageDataset], backgrounds: Backgrounds | None
) -> dict[Study, dict[Any, Job]]:
    """All curves to compute, by study and condition; the reference of a study comes first."""
    protocol = Protocol(config.center, config.groups, config.pixel_noise)
    jobs: dict[Study, dict[Any, Job]] = {}
    if Study.sets in config.studies:
        jobs[Study.sets] = dict(set_jobs({label: loaded[label] for label in config.labels_of(Study.sets)}, protocol))
    if Study.classes in config.studies:
        counts = sorted(config.classes.counts)
        data = loaded[config.label_of(Study.classes)]
        jobs[Study.classes] = dict(class_jobs(data, counts, config.classes.orders, config.seed, protocol))
    if Study.resolution in config.studies:
        data = loaded[config.label_of(Study.resolution)]
        jobs[Study.resolution] = dict(resolution_jobs(data, sorted(config.resolution.factors), protocol))
    if backgrounds is not None:
        data, contrasts = loaded[config.label_of(Study.background)], sorted(config.background.contrasts)
        jobs[Study.background] = dict(background_jobs(data, backgrounds, contrasts, config.seed, protocol))
    return jobs


def _examples(
    config: Config, loaded: Mapping[str, ma.ImageDataset], backgrounds: Backgrounds | None
) -> np.ndarray | None:
    """The first test images at each contrast, [contrasts, images, h, w, c]; refuses what cannot be blended."""
    if backgrounds is None:
        return None
    label = config.label_of(Study.background)
    data = loaded[label]
    try:
        made = [blended(data, backgrounds, c, config.seed).test_images for c in sorted(config.background.contrasts)]
    except ma.InputError as error:
        raise ma.InputError(f"{label} over {config.background.backgrounds}: {error}") from None
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


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS, load)
