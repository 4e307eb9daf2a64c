"""Is reconstruction ill-posed for perception: the same reconstruction error, very different accuracy?

The guidance experiment of Balestriero & LeCun (2024), arXiv 2402.11337: an autoencoder with a bottleneck is trained for
reconstruction + weight * cross-entropy of a linear head on its code. At weight 0 the head learns on detached features.
Here the heads of training are not what is reported: fresh probes are fitted on images that the guidance never saw,
every choice is made on validation images, and test images are only measured. Members of one ensemble differ in seed and
weight; runs of one seed share initial weights and the order of images, and are compared pair by pair. Beside them:

* the control, the same guidance with shuffled labels;
* the exact frontier of Theorem 1: linear encoders with the best trade-off of both errors, same code size, same probes.

The claim counts as reproduced where, at the weight that is best on validation images among those that cost at most 1%
of reconstruction error there, the test reconstruction error is within 1% of the unguided one's, the paired interval of
the gain in accuracy lies above 0, and the gain is larger than the range of the unguided seeds.

Weights are in the published units: pixels scaled to [0, 1], mean squared error + weight * cross-entropy. Our networks
minimise the same in units in which 1 is the error of the mean image; tables give that weight too (Fashion-MNIST: 11.5
times the published one). The published loss has a second, nonlinear head of the same weight; ours has the linear one.

Paper: guidance by labels
Time: 1 minute

    python -m experiments.guided_autoencoder                                          # bundled digits
    python -m experiments.guided_autoencoder --preset fashion_mnist --data idx:DIR    # 8 minutes
    python -m experiments.guided_autoencoder --preset cifar10 --data npz:FILE         # 8 minutes
    python -m experiments.guided_autoencoder --preset paper --data folder:DIR         # ResNet-34 at 224: accelerators
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Annotated

import mae_align as ma
from experiments.guided_autoencoder import report
from experiments.guided_autoencoder.frontier import linear_rows
from experiments.guided_autoencoder.networks import (
    Ensemble,
    GuidedSplit,
    GuidedTraining,
    Labels,
    make_training,
    trained_rows,
)
from experiments.harness.autoencoders import Autoencoder, Kind
from experiments.harness.cli import launch_experiment
from experiments.harness.columns import PROBE
from experiments.harness.config import Bounds, Counts, Positive, RunConfig, Seeds
from experiments.harness.data import Split
from experiments.harness.ensembles import Probe
from experiments.harness.run import Run
from mae_align.metrics import report_table
from mae_align.train.augment import Augmentation

Weights = Annotated[tuple[float, ...], Bounds(least=0, unique=True)]


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the experiment."""

    probe_fraction: Annotated[float, Bounds(above=0, below=1)] = 0.375
    """Share of the training images on which probes are fitted, and nothing else."""
    latents: Counts = (8, 16)
    """Sizes of the code."""
    guidance: Weights = (0.0, 3e-5, 1e-4, 3e-4, 1e-3, 1e-2)
    """Weights of the labels, in published units (pixels in [0, 1]); 0 is always needed. The paper has 0 and 0.01."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """Seeds of the networks; all weights have all of them."""
    seeds_at_once: Annotated[int | None, Bounds(least=1)] = None
    """Train the networks of so many seeds side by side; none for all. Smaller needs less memory."""
    control: bool = True
    """Train the same networks guided by shuffled labels as well."""
    network: Autoencoder = dataclasses.field(default_factory=lambda: Autoencoder(mlp_widths=(64, 32)))
    """The autoencoders."""
    training: GuidedTraining = dataclasses.field(
        default_factory=lambda: GuidedTraining(
            epochs=60,
            batch_size=64,
            learning_rate=1e-3,
            warmup_epochs=1.0,
            weight_decay=0.0,
            beta2=0.999,
            clip_norm=math.inf,
        )
    )
    """Their training."""
    probes: Annotated[tuple[Probe, ...], Bounds(unique=True)] = (Probe.ridge, Probe.logistic)
    """Probes on the code; weights are chosen and the claim is judged by each for itself."""
    frontier: Weights | None = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0, 50.0, 100.0)
    """Relative weights lambda tr Sxx / tr Syy of reconstruction in Theorem 1; infinity (PCA) is added.

    None leaves the linear frontier out: its problem has as many rows and columns as an image has pixel values.
    """
    tolerance: Positive = 1.0
    """Reconstruction errors within so many percent count as equal."""

    def check(self) -> None:
        """Refuse weights that leave nothing to compare."""
        super().check()
        if 0.0 not in self.guidance or len(self.guidance) < 2:
            raise ma.InputError("--guidance: give 0, what everything is compared with, and at least one other")


_LAPTOP = Config()
_REAL = Config(
    max_train=16_000,
    latents=(32, 64),
    guidance=(0.0, 1e-4, 3e-4, 1e-3, 1e-2),
    network=Autoencoder(mlp_widths=(256, 128)),
    training=dataclasses.replace(_LAPTOP.training, epochs=20, batch_size=128),
)
PRESETS = {
    "laptop": _LAPTOP,
    "fashion_mnist": _REAL,
    "cifar10": dataclasses.replace(_REAL, image_size=16),
    # ResNet-34, Adam, 1,000 epochs of batches of 128, augmented; the one-cycle schedule is a warm-up and a cosine here.
    "paper": Config(
        data="folder:imagenette2",
        image_size=224,
        latents=(128, 256, 512, 640, 1024, 2048, 3072, 4096),
        guidance=(0.0, 0.01),
        seeds_at_once=1,
        probe_fraction=0.2 / 0.9,
        validation_fraction=0.1,
        network=Autoencoder(Kind.resnet, resnet_blocks=(3, 4, 6, 3), stem_stride=4),
        training=dataclasses.replace(
            _LAPTOP.training,
            epochs=1000,
            batch_size=128,
            learning_rate=2e-4,
            warmup_epochs=300.0,
            augmentation=Augmentation(smallest_crop=0.5, flip=0.5, grey=0.2),
            bfloat16=True,
        ),
        frontier=None,
    ),
}
_INTERVALS = {
    "test_excess": "reconstruction error of test images over that of the unguided network of the same seed [%]",
    "test_gain": "accuracy of the probe on test images over that of the unguided network of the same seed [points]",
    "control_gain": "test_gain of shuffled labels at this weight [points]",
    "over_control": "accuracy on test images over that of shuffled labels at this weight [points]",
}
COLUMNS = {
    "row": "number of the row",
    "dataset": "name of the data set",
    "latent": "size of the code",
    "labels": "what guides: true or shuffled labels; linear is the exact frontier of Theorem 1",
    "weight": "weight of the cross-entropy, pixels in [0, 1]",
    "normalized_weight": "weight of the cross-entropy where 1 is the reconstruction error of the mean image",
    "seed": "seed of the initial weights and of the order of the images",
    "lam_relative": "weight of reconstruction in Theorem 1 over tr Syy / tr Sxx",
    "fit_error": "reconstruction error of the fitted images over that of their mean [share]",
    "fit_r2": "share of the label variance of the fitted images that the code explains [share]",
    "val_error": "reconstruction error of validation images over that of the mean image [share]",
    "test_error": "reconstruction error of test images over that of the mean image [share]",
    "head_accuracy_test": "accuracy of the head of training on test images [share]",
    "rankme": "effective rank of the codes of test images",
    **{name.replace("probe", probe.value, 1): text for probe in Probe for name, text in PROBE.items()},
    **{f"{probe.value}_*": "protocol: settings of the probe" for probe in Probe},
    "probe": "whose accuracy",
    "seeds": "number of pairs of networks",
    "val_excess": "mean reconstruction error of validation images over that of the unguided network [%]",
    "val_gain": "mean accuracy on validation images over that of the unguided network [points]",
    "unguided_error": "mean test_error without guidance [share]",
    "unguided_accuracy": "mean accuracy on test images without guidance [%]",
    "unguided_range": "largest minus smallest accuracy of the unguided seeds on test images [points]",
    "accuracy": "mean accuracy on test images [%]",
    **_INTERVALS,
    **{f"{name}_low": f"lower end of the 95% paired t interval of {name}" for name in _INTERVALS},
    **{f"{name}_high": f"upper end of the 95% paired t interval of {name}" for name in _INTERVALS},
    "reproduced": "whether the claim holds at the weight that is best on validation images",
    "outcome": "the same in words, with the reason",
    "control_excess": "mean test_excess of shuffled labels at this weight [%]",
    "linear_gain": "gain of the exact linear frontier over PCA at the same cost on test images [points]",
}


def main(config: Config, run: Run[Split]) -> None:
    """Train, probe, compare."""
    split = GuidedSplit.of(run.data, config.probe_fraction, config.seed)
    _check(config, split)
    steps = config.training.steps(len(split.fit_images))
    ensembles = {ensemble.key: ensemble for ensemble in plan(config)}
    # Refuses sizes that do not fit before anything is trained.
    trainings = {key: make_training(split, config.network, config.training, e) for key, e in ensembles.items()}
    probes = [probe.value for probe in config.probes]
    lambdas = config.frontier
    linear = []
    if lambdas is not None:
        linear = run.once("frontier", lambda: linear_rows(split, config.latents, lambdas, config.probes))
    networks = run.sweep(
        ensembles,
        lambda ensemble: trained_rows(run, split, trainings[ensemble.key], steps, ensemble, config.probes),
        unit="ensemble",
    )
    run.dataset("networks", report_table([*linear, *networks.to_dict("records")]))
    compared = [row for probe in probes for row in report.compare_weights(networks, probe)]
    claim = [row for probe in probes for row in report.judge(networks, linear, compared, probe, config.tolerance)]
    if not claim:
        raise ma.InputError("every unguided network diverged: give a smaller --training.learning-rate")
    run.table("weights", compared, show=report.shown([row for row in compared if row["probe"] == probes[0]]))
    run.table("claim", claim, show=report.shown(claim, "outcome"))
    run.figure("guidance", report.trade_off_figure(networks, linear, probes[0], config.tolerance))
    run.figure("latents", report.latent_figure(networks, claim, probes[0]))
    fit, probe = len(split.fit_labels), len(split.probe_labels)
    run.notes.append(f"Of the training images {fit} train and guide, {probe} fit the probes.")
    run.verdict(*report.sentences(compared, claim, config.tolerance))


def plan(config: Config) -> Iterator[Ensemble]:
    """The ensembles: for each code size and each group of seeds, guided by true labels and by shuffled ones."""
    size = config.seeds_at_once or len(config.seeds)
    groups = [config.seeds[i : i + size] for i in range(0, len(config.seeds), size)]
    for latent, seeds in itertools.product(config.latents, groups):
        yield Ensemble(latent, Labels.true, _crossed(config.guidance, seeds))
        if config.control:
            # At weight 0 labels do not reach the autoencoder.
            yield Ensemble(latent, Labels.shuffled, _crossed([w for w in config.guidance if w > 0], seeds))


def _crossed(weights: Sequence[float], seeds: Sequence[int]) -> tuple[tuple[float, int], ...]:
    return tuple(itertools.product(weights, seeds))


def _check(config: Config, split: GuidedSplit) -> None:
    pixels, images = math.prod(split.data.image_shape), len(split.fit_images)
    if config.frontier is not None and max(config.latents) >= min(pixels, images):
        raise ma.InputError(
            f"--latents {max(config.latents)}: Theorem 1 needs codes smaller than the {pixels} pixel values and the "
            f"{images} images; choose smaller ones or --frontier None"
        )


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
