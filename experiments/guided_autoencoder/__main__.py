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

    python -m experiments.guided_autoencoder                                          # bundled digits
    python -m experiments.guided_autoencoder --preset fashion_mnist --data idx:DIR
    python -m experiments.guided_autoencoder --preset cifar10 --data npz:FILE
    python -m experiments.guided_autoencoder --preset paper --data folder:DIR         # ResNet-34 at 224: accelerators

Every ensemble is checkpointed while it trains and its measurements are kept: interrupted, the same command goes on
where it stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from tqdm import tqdm

import mae_align as ma
from experiments.guided_autoencoder.frontier import linear_rows
from experiments.guided_autoencoder.report import write_report
from experiments.guided_autoencoder.runs import (
    GuidedSplit,
    Labels,
    NetworkConfig,
    Probe,
    Runs,
    make_training,
    measure,
    train,
)
from experiments.harness.cli import launch
from experiments.harness.data import load_together
from experiments.harness.folder import Parts, RunFolder, silent
from mae_align.runtime.files import fingerprint


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
    probe_fraction: float = 0.3
    """Share of the training images on which probes are fitted, and nothing else."""
    validation_fraction: float = 0.2
    """Share of the training images on which weights and probe strengths are chosen."""
    latents: tuple[int, ...] = (8, 16)
    """Sizes of the code."""
    weights: tuple[float, ...] = (0.0, 3e-5, 1e-4, 3e-4, 1e-3, 1e-2)
    """Weights of the labels, in published units (pixels in [0, 1]); 0 is always needed. The paper has 0 and 0.01."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the networks; all weights have all of them."""
    seeds_at_once: int | None = None
    """Train the networks of so many seeds side by side; none for all. Smaller needs less memory."""
    control: bool = True
    """Train the same networks guided by shuffled labels as well."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """The autoencoders and their training."""
    probes: tuple[Probe, ...] = (Probe.ridge, Probe.logistic)
    """Probes on the code; weights are chosen and the claim is judged by each for itself."""
    frontier: tuple[float, ...] | None = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0, 50.0, 100.0)
    """Relative weights lambda tr Sxx / tr Syy of reconstruction in Theorem 1; infinity (PCA) is added.

    None leaves the linear frontier out: its problem has as many rows and columns as an image has pixel values.
    """
    tolerance: float = 1.0
    """Reconstruction errors within so many percent count as equal."""
    seed: int = 0
    """Of the subsets and of the shuffled labels."""
    out: str | None = None
    """Run folder; none for runs/guided_autoencoder-DATA-HASH."""


_REAL = Config(
    max_train=20_000,
    latents=(32, 64),
    weights=(0.0, 1e-4, 3e-4, 1e-3, 1e-2),
    network=NetworkConfig(widths=(256, 128), epochs=20, batch_size=128),
)
PRESETS = {
    "laptop": Config(),
    "fashion_mnist": _REAL,
    "cifar10": dataclasses.replace(_REAL, image_size=16),
    "paper": Config(
        data="folder:imagenette2",
        image_size=224,
        latents=(128, 256, 512, 640, 1024, 2048, 3072, 4096),
        weights=(0.0, 0.01),
        seeds_at_once=1,
        probe_fraction=0.2,
        validation_fraction=0.1,
        network=NetworkConfig.resnet34(),
        frontier=None,
    ),
}


def main(config: Config) -> None:
    """Train, probe, compare.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    _check(config)
    data = load_together(config.data, image_size=config.image_size, seed=config.seed)
    split = GuidedSplit.of(
        data,
        probe_fraction=config.probe_fraction,
        validation_fraction=config.validation_fraction,
        max_train=config.max_train,
        max_test=config.max_test,
        seed=config.seed,
    )
    pixels = math.prod(split.image_shape)
    if config.frontier is not None and max(config.latents) >= min(pixels, len(split.fit_images)):
        raise ma.InputError(
            f"--latents {max(config.latents)}: Theorem 1 needs codes smaller than the {pixels} pixel values and the "
            f"{len(split.fit_images)} images; choose smaller ones or --frontier None"
        )
    parts = list(plan(config))
    # Refuses sizes that do not fit before anything is trained.
    for runs in parts:
        make_training(split, config.network, runs)
    folder = RunFolder.open("guided_autoencoder", config.data, config, config.out)
    store = Parts(folder.points, fingerprint(split.arrays(), {"probes": [p.value for p in config.probes]}))
    rows = []
    if (lambdas := config.frontier) is not None:
        rows += store.once("frontier", lambda: linear_rows(split, config.latents, lambdas, config.probes))
    bar = tqdm(parts, desc="ensembles", unit="ensemble", disable=silent())
    for runs in bar:
        bar.set_postfix_str(runs.key)
        rows += store.once(runs.key, lambda runs=runs: _observed(config, split, runs, folder))
    write_report(rows, folder, split, config.tolerance, [p.value for p in config.probes])


def plan(config: Config) -> Iterator[Runs]:
    """The ensembles: for each code size and each group of seeds, guided by true labels and by shuffled ones."""
    size = config.seeds_at_once or len(config.seeds)
    groups = [config.seeds[i : i + size] for i in range(0, len(config.seeds), size)]
    for latent, seeds in itertools.product(config.latents, groups):
        yield Runs(latent, Labels.true, _crossed(config.weights, seeds))
        if config.control:
            # At weight 0 labels do not reach the autoencoder.
            yield Runs(latent, Labels.shuffled, _crossed([w for w in config.weights if w > 0], seeds))


def _crossed(weights: Sequence[float], seeds: Sequence[int]) -> tuple[tuple[float, int], ...]:
    return tuple(itertools.product(weights, seeds))


def _observed(config: Config, split: GuidedSplit, runs: Runs, folder: RunFolder) -> list[dict[str, object]]:
    training = make_training(split, config.network, runs)
    state = train(training, split, config.network, runs, folder.shared / "networks" / runs.key)
    return list(measure(training, state, split, runs, config.probes))


def _check(config: Config) -> None:
    """Refuse settings that no data could fit."""
    for name in ("latents", "weights", "seeds", "probes", "frontier"):
        values = getattr(config, name) or ()
        if len(set(values)) < len(values):
            raise ma.InputError(f"--{name} repeats a value: give each once")
    for weight in config.weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ma.InputError(f"--weights {weight:g}: give finite numbers of at least 0")
    if 0.0 not in config.weights or len(config.weights) < 2:
        raise ma.InputError("--weights: give 0, what everything is compared with, and at least one other")
    for value in config.frontier or ():
        if not (math.isfinite(value) and value >= 0):
            raise ma.InputError(f"--frontier {value:g}: give finite numbers of at least 0")
    for name in ("probe_fraction", "validation_fraction"):
        if not 0 < getattr(config, name) < 1:
            raise ma.InputError(f"--{name.replace('_', '-')}: give a share between 0 and 1")
    if config.probe_fraction + config.validation_fraction >= 1:
        raise ma.InputError("--probe-fraction and --validation-fraction leave no images to train on: make them smaller")
    for name in ("max_train", "max_test"):
        value = getattr(config, name)
        if value is not None and value < 40:
            raise ma.InputError(f"--{name.replace('_', '-')} {value}: give at least 40 images")
    if min(config.seed, *config.seeds) < 0 or min(config.latents) < 1:
        raise ma.InputError("--seed and --seeds must be at least 0, --latents at least 1")
    if config.seeds_at_once is not None and config.seeds_at_once < 1:
        raise ma.InputError(f"--seeds-at-once {config.seeds_at_once}: give at least 1")
    if not (math.isfinite(config.tolerance) and config.tolerance > 0):
        raise ma.InputError(f"--tolerance {config.tolerance:g}: give a percentage over 0")
    config.network.check()


if __name__ == "__main__":
    launch(main, Config, PRESETS)
