"""Which images are easier to classify: those of the top principal subspace or of the bottom one?

Fig. 1 (top) of Balestriero & LeCun (2024), arXiv 2402.11337: on Tiny ImageNet a ResNet9 reaches 55% on the bottom
principal subspace with 20% of the pixel variance and 45% on the top one with 90%. Training images, their contrast
normalised, are projected on a subspace that holds a chosen share of their variance, networks of several seeds are
trained on the projections, and test images are projected with the mean and directions of the training images. Beside
both ends stand controls: random subspaces of the same variance, and top, bottom and random subspaces of the same
dimension, since equal variance is not equal dimension; and a linear probe on each. Networks with and without batch
normalisation on images of several scales show what rescaling each projected image has to do with it.

    python -m experiments.subspace_classification                                          # digits: a smoke test
    python -m experiments.subspace_classification --preset fashion_mnist --data idx:DIR
    python -m experiments.subspace_classification --preset cifar10 --data npz:FILE         # 15 minutes
    python -m experiments.subspace_classification --preset paper --data folder:DIR         # ResNet9: accelerators

As published, images are cropped and mirrored after the projection, which takes them a little out of the subspace;
``--training.crop 0 --training.flip False`` does without. If nothing is said, the crop is an eighth of the side, and
digits and characters are not mirrored. Shares are those really kept: dimensions are whole numbers. A subspace on which
a network diverges is left out of the comparisons, and the report says so.
Every finished network is kept: interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools

import jax
import numpy as np

import mae_align as ma
from experiments.harness.cli import launch
from experiments.harness.data import load_together
from experiments.harness.folder import RunFolder, shared_points
from experiments.subspace_classification.networks import (
    Network,
    Scale,
    Study,
    TrainingConfig,
    contrast_normalized,
    make_training,
    measure,
    scaled,
    settled,
)
from experiments.subspace_classification.principal import Family, PrincipalAxes, Subspace
from experiments.subspace_classification.report import Linear, Point, write_report
from mae_align.moments.moments import Moments
from mae_align.probes import ridge_probe
from mae_align.probes.inputs import one_scale
from mae_align.runtime.devices import is_cpu, worker_count
from mae_align.runtime.files import fingerprint
from mae_align.runtime.pool import Task, TaskGroup, run_groups
from mae_align.train.ensemble import Training

_ROWS = 4096


class Preparation(enum.Enum):
    """What images are divided by before anything else."""

    contrast = "contrast"
    whole_set = "whole_set"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or prepared:DIR."""
    image_size: int | None = None
    """Resize images to squares of this side, in pixels; none keeps them."""
    max_train: int | None = None
    """Use at most so many training images, drawn at random; none for all."""
    max_test: int | None = None
    """Use at most so many test images; none for all."""
    preparation: Preparation = Preparation.contrast
    """Divide each image by the standard deviation of its pixels, as published, or all by one number."""
    top: tuple[float, ...] = (0.8, 0.9)
    """Shares of the variance of top subspaces; top 1 - v is the complement of bottom v."""
    bottom: tuple[float, ...] = (0.1, 0.2)
    """Shares of the variance of bottom subspaces."""
    matched: tuple[float, ...] = (0.2,)
    """Bottom shares whose two complements are matched in variance and dimension by other subspaces."""
    network: Network = Network.conv
    """Trained on every subspace, each projected image rescaled."""
    others: tuple[Network, ...] = (Network.mlp,)
    """Trained likewise, beside it."""
    scale_networks: tuple[Network, ...] = (Network.conv, Network.conv_without_norm)
    """Trained on images of every scale, on the subspaces of --scale-shares."""
    scales: tuple[Scale, ...] = (Scale.per_image, Scale.raw)
    """per_image: each projected image rescaled, as published; whole_set: one number per subspace; raw: as projected."""
    scale_shares: tuple[float, ...] = (0.2,)
    """Bottom shares on which scales are compared, with their complements."""
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    """The training of all networks."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds: the same initial networks and orders of images on every subspace."""
    seed: int = 0
    """Of the images that are drawn, and of the random subspaces."""
    workers: int | None = None
    """Networks trained side by side on a CPU; none for one per core."""
    out: str | None = None
    """Run folder; none for runs/subspace_classification-DATA-HASH."""


_LAPTOP = Config(training=TrainingConfig(epochs=20, batch_size=64, crop=1, flip=False))
_REAL = dataclasses.replace(_LAPTOP, max_train=10_000, training=TrainingConfig(crop=4, flip=True))
PRESETS = {
    "laptop": _LAPTOP,
    "fashion_mnist": dataclasses.replace(_REAL, training=TrainingConfig(crop=2, flip=True)),
    "cifar10": _REAL,
    "paper": Config(
        # The published abscissae; what is plotted is what they really hold.
        top=(0.483, 0.557, 0.631, 0.705, 0.778, 0.852, 0.9, 0.926),
        bottom=(0.0195, 0.042, 0.068, 0.098, 0.14, 0.2, 0.517),
        matched=(0.2,),
        network=Network.resnet9,
        others=(Network.mlp,),
        scale_networks=(Network.resnet9,),
        training=TrainingConfig(
            epochs=50, batch_size=512, learning_rate=1e-3, warmup=0.3, mlp_widths=None, bfloat16=True
        ),
    ),
}


def main(config: Config) -> None:
    """Project, train, compare.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    _check(config)
    data = prepared(load_together(config.data, image_size=config.image_size, seed=config.seed), config)
    training = settled(config.training, data.name, data.image_shape)
    # One after another on all devices, unless these are the cores of this process.
    alone = is_cpu(jax.devices()[0]) and jax.process_count() == 1
    devices = jax.devices()[:1] if alone else jax.devices()
    workers = worker_count(config.workers)  # refused whatever the devices, if it is not a number of workers
    workers = workers if alone else 1
    # Made before anything is projected: it refuses sizes that do not fit.
    trainings = {
        network: make_training(
            network, data.image_shape, data.num_classes, training, len(data.train_labels), config.seeds, devices
        )
        for network in dict.fromkeys(study.network for study in _all_studies(config))
    }
    folder = RunFolder.open("subspace_classification", config.data, config, config.out, ignore=("out", "workers"))
    axes = PrincipalAxes.of(_moments(data), seed=config.seed)
    plan = subspaces(config, axes)
    arrays = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    store = shared_points(folder.points, fingerprint(arrays, {"rank": axes.rank}))
    groups = [_group(subspace, config, data, axes, trainings) for subspace in plan]
    found = run_groups(groups, workers=workers, store=store, progress=jax.process_index() == 0)
    shares = {subspace: axes.share(subspace) for subspace in plan}
    points = [
        Point(study, subspace, shares[subspace], [found[_key(study, subspace, seed)] for seed in config.seeds])
        for subspace in plan
        for study in _studies(config, subspace, axes)
    ]
    linear = [
        Linear(subspace, shares[subspace], float(row["accuracy"]), float(row["r2"]))
        for subspace, row in ((s, found[f"linear-{s.key}"]) for s in plan)
    ]
    write_report(folder, data, axes, points, linear, config.seeds, training.augmentation)


def _check(config: Config) -> None:
    """Refuse settings that no data could fit."""
    for name in ("top", "bottom", "matched", "scale_shares"):
        values = getattr(config, name)
        if not all(0.0 < v < 1.0 for v in values):
            raise ma.InputError(f"--{name.replace('_', '-')} {list(values)}: give shares inside (0, 1)")
    missing = sorted({*config.matched, *config.scale_shares} - set(config.bottom))
    if missing:
        raise ma.InputError(f"--matched and --scale-shares name {missing}, which --bottom has not: add them there")
    each_once = {"network and --others": (config.network, *config.others)}
    each_once |= {"scale-networks": config.scale_networks, "scales": config.scales}
    for name, values in each_once.items():
        if len(set(values)) < len(values):
            raise ma.InputError(f"--{name} {' '.join(v.value for v in values)} repeats a value: give each once")
    for name in ("max_train", "max_test"):
        value = getattr(config, name)
        if value is not None and value < 40:
            raise ma.InputError(f"--{name.replace('_', '-')} {value}: give at least 40 images")
    if len(set(config.seeds)) < len(config.seeds) or min(config.seed, *config.seeds) < 0:
        raise ma.InputError("--seeds: give different whole numbers of at least 0, and so --seed")
    if config.training.epochs < 1 or config.training.batch_size < 2 or not 0.0 <= config.training.warmup < 1.0:
        raise ma.InputError("--training: give at least one epoch, batches of at least 2 and a warm-up inside [0, 1)")


def prepared(data: ma.ImageDataset, config: Config) -> ma.ImageDataset:
    """The images that are used, float32, of standard deviation near 1.

    Args:
        data: as it was read. config: which images, and what they are divided by.
    """
    rng = np.random.default_rng(config.seed)
    train, test = (
        np.arange(len(labels)) if most is None or most >= len(labels) else np.sort(rng.permutation(len(labels))[:most])
        for labels, most in ((data.train_labels, config.max_train), (data.test_labels, config.max_test))
    )
    images, held_out = data.train_images[train], data.test_images[test]
    if config.preparation is Preparation.contrast:
        images, held_out = contrast_normalized(images), contrast_normalized(held_out)
    else:
        spread = np.float32(images.std(dtype=np.float64))
        images, held_out = images.astype(np.float32) / spread, held_out.astype(np.float32) / spread
    labels = data.train_labels[train], data.test_labels[test]
    return ma.ImageDataset(images, labels[0], held_out, labels[1], data.class_names, data.name)


def _moments(data: ma.ImageDataset) -> Moments:
    """Of the training images, summed in float64."""
    parts = (data.train_images[i : i + _ROWS].astype(np.float64) for i in range(0, len(data.train_images), _ROWS))
    moments = Moments.from_arrays(next(parts))
    for part in parts:
        moments = moments.update(part)
    return moments


def subspaces(config: Config, axes: PrincipalAxes) -> list[Subspace]:
    """Every subspace of a run, each once; the first is all that the images show.

    Args:
        config: shares. axes: of the training images.
    """
    found = [Subspace(Family.top, axes.rank)]
    found += [axes.nearest(Family.top, share) for share in config.top]
    found += [axes.nearest(Family.bottom, share) for share in config.bottom]
    found += [Subspace(Family.top, axes.rank - axes.nearest(Family.bottom, v).dimension) for v in config.scale_shares]
    for share in config.matched:
        found += controls(axes, share)
    # All of the image has no other side, whatever it is called.
    return list(dict.fromkeys(s for i, s in enumerate(found) if i == 0 or 0 < s.dimension < axes.rank))


def controls(axes: PrincipalAxes, share: float) -> list[Subspace]:
    """What the bottom subspace of a share and its complement are held against.

    Random subspaces of the variance of each, and for the dimension of each the other two families.

    Args:
        axes: of the training images. share: of the bottom subspace.
    """
    bottom = axes.nearest(Family.bottom, share)
    top = Subspace(Family.top, axes.rank - bottom.dimension)
    found = [top]
    for one, other in ((bottom, Family.top), (top, Family.bottom)):
        if one.dimension:
            found += [axes.nearest(Family.random, axes.share(one))]
            found += [Subspace(other, one.dimension), Subspace(Family.random, one.dimension)]
    return [s for s in found if s.dimension]


def _all_studies(config: Config) -> list[Study]:
    main_scale = [Study(network, Scale.per_image) for network in (config.network, *config.others)]
    scales = [Study(*pair) for pair in itertools.product(config.scale_networks, config.scales)]
    return list(dict.fromkeys([*main_scale, *scales]))


def _studies(config: Config, subspace: Subspace, axes: PrincipalAxes) -> list[Study]:
    """Studies of one subspace."""
    everywhere = [Study(network, Scale.per_image) for network in (config.network, *config.others)]
    compared = set[Subspace]()
    for share in config.scale_shares:
        bottom = axes.nearest(Family.bottom, share)
        compared |= {bottom, Subspace(Family.top, axes.rank - bottom.dimension)}
    return _all_studies(config) if subspace in compared else everywhere


def _key(study: Study, subspace: Subspace, seed: int) -> str:
    return f"{study.key}-{subspace.key}-seed{seed}"


# Training and test images by scale.
_Images = dict[Scale, tuple[np.ndarray, np.ndarray]]


def _group(
    subspace: Subspace,
    config: Config,
    data: ma.ImageDataset,
    axes: PrincipalAxes,
    trainings: dict[Network, Training],
) -> TaskGroup[_Images]:
    """Everything that is measured on one subspace; its images are projected once."""
    studies = _studies(config, subspace, axes)

    def images() -> _Images:
        pair = axes.project(data.train_images, subspace), axes.project(data.test_images, subspace)
        return {scale: scaled(*pair, scale) for scale in dict.fromkeys(study.scale for study in studies)}

    def linear(_: _Images) -> list[dict[str, np.ndarray]]:
        train, test = (axes.coordinates(part, subspace) for part in (data.train_images, data.test_images))
        labels = data.train_labels, data.test_labels
        found = ridge_probe(
            train, labels[0], test, labels[1], num_classes=data.num_classes, normalization=one_scale, seed=config.seed
        )
        return [{"accuracy": np.asarray(found.accuracy_test), "r2": np.asarray(found.r2_test)}]

    tasks: list[Task[_Images]] = [Task((f"linear-{subspace.key}",), linear)]
    for study in studies:
        training = trainings[study.network]
        for start in range(0, len(config.seeds), training.num_members):
            seeds = config.seeds[start : start + training.num_members]

            def solve(
                basis: _Images, study: Study = study, training: Training = training, seeds: tuple[int, ...] = seeds
            ) -> list[dict[str, np.ndarray]]:
                train, test = basis[study.scale]
                labelled = (train, data.train_labels), (test, data.test_labels)
                return measure(training, seeds, config.training, *labelled)

            tasks.append(Task(tuple(_key(study, subspace, seed) for seed in seeds), solve))
    return TaskGroup(images, tasks)


if __name__ == "__main__":
    launch(main, Config, PRESETS)
