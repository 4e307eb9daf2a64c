"""Which images are easier to classify: those of the top principal subspace or of the bottom one?

On Tiny ImageNet, Balestriero & LeCun (2024), arXiv 2402.11337, have a ResNet9 reach 55% on the bottom principal
subspace with 20% of the pixel variance and 45% on the top one with 90%. Training images, their contrast normalised, are
projected on a subspace that holds a chosen share of their variance, networks of several seeds are trained on the
projections, and test images are projected with the mean and directions of the training images. Beside both ends stand
controls: random subspaces of the same variance, and top, bottom and random subspaces of the same dimension, since equal
variance is not equal dimension; and a linear probe on each. Networks with and without batch normalisation on images of
several scales show what rescaling each projected image has to do with it.

Paper: Fig. 1 (top)
Time: 2 minutes

    python -m experiments.subspace_classification                                          # digits: a smoke test
    python -m experiments.subspace_classification --preset fashion_mnist --data idx:DIR
    python -m experiments.subspace_classification --preset cifar10 --data npz:FILE         # 15 minutes
    python -m experiments.subspace_classification --preset paper --data folder:DIR         # ResNet9: accelerators

As published, images are moved and mirrored after the projection, which takes them a little out of the subspace;
``--training.augmentation.shift 0 --training.augmentation.flip 0`` does without. If nothing is said, they are moved by
an eighth of the side, and digits and characters are not mirrored. Shares are those really kept: dimensions are whole
numbers. A random subspace is one for each dimension, drawn by --seed: intervals of comparisons with it are over
networks on this one, not over draws of the subspace. A subspace on which a network diverges is left out, and the
summary says so.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Annotated, Any

import numpy as np

import mae_align as ma
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, RunConfig, Seeds
from experiments.harness.data import Split
from experiments.harness.run import Run
from experiments.subspace_classification.images import Preparation, Scale, prepared, scaled
from experiments.subspace_classification.networks import (
    Network,
    Sizes,
    Study,
    SubspaceTraining,
    Views,
    make_training,
    mirrors,
    trained,
)
from experiments.subspace_classification.principal import Family, PrincipalAxes, Subspace
from experiments.subspace_classification.report import Point, write_report
from mae_align.probes import Rows, ridge_probe
from mae_align.probes.inputs import one_scale

_ROWS = 4096
Shares = Annotated[tuple[float, ...], Bounds(above=0, below=1, unique=True)]
Networks = Annotated[tuple[Network, ...], Bounds(unique=True)]


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the experiment."""

    preparation: Preparation = Preparation.contrast
    """Divide each image by the standard deviation of its pixels, as published, or all by one number."""
    top: Shares = (0.8, 0.9)
    """Shares of the variance of top subspaces; top 1 - v is the complement of bottom v."""
    bottom: Shares = (0.1, 0.2)
    """Shares of the variance of bottom subspaces."""
    matched: Shares = (0.2,)
    """Bottom shares whose two complements are matched in variance and dimension by other subspaces."""
    networks: Networks = (Network.conv, Network.mlp)
    """Trained on every subspace, each projected image rescaled."""
    scale_networks: Networks = (Network.conv, Network.conv_without_norm)
    """Trained on images of every scale, on the subspaces of --scale-shares."""
    scales: Annotated[tuple[Scale, ...], Bounds(unique=True)] = (Scale.per_image, Scale.raw)
    """per_image: each projected image rescaled, as published; whole_set: one number per subspace; raw: as projected."""
    scale_shares: Shares = (0.2,)
    """Bottom shares on which scales are compared, with their complements."""
    network: Sizes = dataclasses.field(default_factory=Sizes)
    """Widths of the networks."""
    training: SubspaceTraining = dataclasses.field(
        default_factory=lambda: SubspaceTraining(epochs=8, warmup_epochs=1.2, weight_decay=1e-3, beta2=0.999)
    )
    """The training of all networks."""
    seeds: Seeds = (0, 1, 2)
    """Seeds: the same initial networks and orders of images on every subspace."""

    def check(self) -> None:
        """Refuse shares that are compared and not trained on."""
        super().check()
        missing = sorted({*self.matched, *self.scale_shares} - set(self.bottom))
        if missing:
            raise ma.InputError(f"--matched and --scale-shares name {missing}, which --bottom has not: add them there")


_DEFAULT = Config()
_REAL = Config(max_train=10_000, training=dataclasses.replace(_DEFAULT.training, augmentation=Views(4, 0.5)))
PRESETS = {
    "laptop": Config(
        training=dataclasses.replace(_DEFAULT.training, epochs=20, warmup_epochs=3.0, augmentation=Views(1, 0.0)),
    ),
    "fashion_mnist": dataclasses.replace(
        _REAL, training=dataclasses.replace(_REAL.training, augmentation=Views(2, 0.5))
    ),
    "cifar10": _REAL,
    "paper": Config(
        # The published abscissae; what is plotted is what they really hold.
        top=(0.483, 0.557, 0.631, 0.705, 0.778, 0.852, 0.9, 0.926),
        bottom=(0.0195, 0.042, 0.068, 0.098, 0.14, 0.2, 0.517),
        networks=(Network.resnet9, Network.mlp),
        scale_networks=(Network.resnet9,),
        network=Sizes(mlp_widths=None),
        training=dataclasses.replace(
            _DEFAULT.training, epochs=50, batch_size=512, learning_rate=1e-3, warmup_epochs=15.0, bfloat16=True
        ),
    ),
}
COLUMNS = {
    "row": "number of the row",
    "dataset": "name of the data set",
    "network": "what was trained",
    "scale": "what projected images were divided by",
    "family": "which nested subspaces: top, bottom or random",
    "dimension": "dimensions of the subspace",
    "share": "share of the variance of the training images that the subspace holds [share]",
    "seed": "seed of the initial weights and of the order of the images",
    "accuracy": "accuracy on test images; without a seed, the mean over seeds [share]",
    "accuracy_sd": "standard deviation over seeds of the accuracy on test images [share]",
    "accuracy_train": "accuracy on 2000 of the training images, not moved or mirrored [share]",
    "linear_accuracy": "accuracy of a linear probe on test images; its strength is chosen on validation images [share]",
    "linear_r2": "share of the label variance of test images that the linear probe explains [share]",
    "kind": "why the two are compared",
    "study": "network and scale, or network and subspace where scales are compared",
    "first": "what is compared",
    "second": "what with",
    "mean": "accuracy on test images of the first minus that of the second, mean over seeds [share]",
    "low": "lower end of its 95% t interval over seeds [share]",
    "high": "upper end of its 95% t interval over seeds [share]",
    "image_se": "its standard error from the sampling of test images [share]",
    "better": "which of the two is; empty where no difference is detected",
}


def main(config: Config, run: Run[Split]) -> None:
    """Project, train, compare."""
    data = prepared(run.data, config.preparation)
    studies = _all_studies(config)
    # Made before anything is projected: it refuses sizes that do not fit.
    trainings = {
        network: make_training(network, data, config.network, config.training, len(config.seeds))
        for network in dict.fromkeys(study.network for study in studies)
    }
    axes = PrincipalAxes.of(moments(data.train_images), seed=config.seed)
    plan = subspaces(config, axes)

    @functools.lru_cache(maxsize=1)
    def projected(subspace: Subspace) -> tuple[np.ndarray, np.ndarray]:
        return axes.project(data.train_images, subspace), axes.project(data.test_images, subspace)

    def point(key: str, cell: tuple[Study, Subspace]) -> Point:
        study, subspace = cell
        images = functools.cache(lambda: scaled(*projected(subspace), study.scale))
        steps = config.training.steps(len(data.train_labels))
        found = trained(run, key, trainings[study.network], config.seeds, steps, images)
        return Point(study, subspace, axes.share(subspace), found["correct"], found["fitted"])

    def linear(subspace: Subspace) -> list[dict[str, Any]]:
        parts = data.train_images, data.validation_images, data.test_images
        train, val, test = (axes.coordinates(part, subspace) for part in parts)
        found = ridge_probe(
            train,
            data.train_labels,
            test,
            data.test_labels,
            num_classes=data.num_classes,
            val=Rows(val, data.validation_labels),
            normalization=one_scale,
        )
        return [{"linear_accuracy": found.accuracy_test, "linear_r2": found.r2_test}]

    probes = run.sweep({f"linear-{subspace.key}": subspace for subspace in plan}, linear, unit="probe")
    cells = [(study, subspace) for subspace in plan for study in _studies(config, subspace, axes)]
    points = run.each({f"{study.key}-{s.key}": (study, s) for study, s in cells}, point, unit="ensemble")
    views = config.training.augmentation.of(data.name, data.image_shape)
    if config.training.augmentation.flip is None and mirrors(data.name) is None:
        run.notes.append(
            f"Images of {data.name} are not mirrored: --training.augmentation.flip 0.5 mirrors half of them."
        )
    run.notes.append(
        f"{axes.rank} directions hold the variance, the first alone {axes.shares(Family.top)[0]:.1%}. Training images "
        f"are moved by up to {views.shift} pixels each way, and {views.flip:.0%} of them are mirrored."
    )
    found = dict(zip(plan, probes.to_dict("records"), strict=True))
    write_report(run, axes, list(points.values()), found, config.seeds, studies[: len(config.networks)])


def moments(images: np.ndarray) -> ma.Moments:
    """Moments of images, summed in float64.

    Args:
        images: [n, h, w, c].
    """
    parts = (images[i : i + _ROWS].astype(np.float64) for i in range(0, len(images), _ROWS))
    found = ma.Moments.from_arrays(next(parts))
    for part in parts:
        found = found.update(part)
    return found


def subspaces(config: Config, axes: PrincipalAxes) -> list[Subspace]:
    """Every subspace of a run, each once; the first is all that the images show.

    Args:
        config: shares.
        axes: of the training images.
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
        axes: of the training images.
        share: of the bottom subspace.
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
    """Studies of a run, those of every subspace first."""
    everywhere = [Study(network, Scale.per_image) for network in config.networks]
    scales = [Study(*pair) for pair in itertools.product(config.scale_networks, config.scales)]
    return list(dict.fromkeys([*everywhere, *scales]))


def _studies(config: Config, subspace: Subspace, axes: PrincipalAxes) -> list[Study]:
    """Studies of one subspace."""
    compared = set[Subspace]()
    for share in config.scale_shares:
        bottom = axes.nearest(Family.bottom, share)
        compared |= {bottom, Subspace(Family.top, axes.rank - bottom.dimension)}
    return _all_studies(config)[: None if subspace in compared else len(config.networks)]


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
