"""Do nonlinear encoders learn the principal subspace? Theorem 2 against trained networks.

Theorem 2 of Balestriero & LeCun (2024), arXiv 2402.11337: a high-capacity encoder with a *linear* decoder is equivalent
to the linear autoencoder, always; with a nonlinear decoder, early in training. With unlimited capacity the codes of n
images are a free k x n matrix. For reconstruction alone (lambda = infinity) the best one is PCA's whatever the encoder,
and PCA's loss bounds that of every network with a linear decoder on its training images. At a finite lambda

    min over H, W, Z  E|W h - y|^2 / tr Syy + lambda E|Z h - x|^2 / tr Sxx

the best free code is PCA of (x, y) side by side, scaled alike, which is *not* Theorem 1's: a linear encoder must find y
in x. Both problems are solved here, and the networks are compared with each.

Encoders of one hidden layer of growing width are trained with a linear decoder (and a linear head where lambda is
finite) to convergence, and with a nonlinear decoder of the same width. At log-spaced steps: share of each principal
component's variance that the codes explain linearly (R^2), principal angles between the codes and the components in
the space of the images, and the loss of the best linear decoder. The largest angle says little: the last components
have nearly equal variance and mix with the next ones, so the median and R^2 per component are reported.

    python -m experiments.theorem2_check                                          # bundled digits
    python -m experiments.theorem2_check --preset fashion_mnist --data idx:DIR
    python -m experiments.theorem2_check --preset cifar10 --data npz:FILE
    python -m experiments.theorem2_check --preset paper --data npz:FILE           # accelerators

Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

import mae_align as ma
from experiments.harness.cli import launch
from experiments.harness.data import load_together
from experiments.harness.folder import RunFolder, shared_points, silent
from experiments.theorem2_check.networks import (
    Case,
    Decoder,
    NetworkConfig,
    References,
    follow,
    make_training,
    record_steps,
)
from experiments.theorem2_check.report import write_report
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
    latent: int = 8
    """Size of the code, the number of components."""
    widths: tuple[int, ...] = (16, 64, 256)
    """Widths of the encoder's hidden layer, at least the code's size: a narrower one bounds its rank."""
    lambdas: tuple[float, ...] = (math.inf, 1.0)
    """Relative weights of reconstruction with a linear decoder: lambda tr Sxx / tr Syy; infinity for it alone."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the networks; trained together."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """Training of the networks."""
    records: int = 16
    """Steps at which codes are measured, about: log-spaced, the start and the end among them."""
    early: float = 0.03
    """Share of the steps that counts as early."""
    seed: int = 0
    """Of the subset."""
    out: str | None = None
    """Run folder; none for runs/theorem2_check-DATA-HASH."""


_REAL = Config(max_train=10_000, latent=16, widths=(32, 128, 512), network=NetworkConfig(steps=6_000, batch_size=256))
PRESETS = {
    "laptop": Config(),
    "fashion_mnist": _REAL,
    "cifar10": dataclasses.replace(_REAL, image_size=16),
    "paper": Config(
        latent=512,
        widths=(1024, 4096, 16384),
        network=NetworkConfig(steps=200_000, batch_size=1024, learning_rate=5e-4),
        records=24,
    ),
}


def main(config: Config) -> None:
    """Train, measure, compare.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    _check(config)
    data = load_together(config.data, image_size=config.image_size, seed=config.seed)
    n = len(data.train_labels)
    rows = np.arange(n)
    if config.max_train is not None and config.max_train < n:
        rows = np.sort(np.random.default_rng(config.seed).choice(n, config.max_train, replace=False))
    images, labels = data.train_images[rows], data.train_labels[rows]
    cases = list(plan(config))
    references = References.of(images, labels, data.num_classes, config.latent)
    for case in cases:
        # Refuses sizes that do not fit before anything is trained.
        make_training(references, config.network, case)
    folder = RunFolder.open("theorem2_check", config.data, config, config.out)
    store = shared_points(folder.points, fingerprint([images, labels], {}))
    steps = record_steps(config.network.steps, config.records)
    found = []
    bar = tqdm(cases, desc="networks", unit="ensemble", disable=silent())
    for case in bar:
        bar.set_postfix_str(case.key)
        found += follow(references, config.network, case, steps, store, folder.shared / "networks" / case.key)
    write_report(found, folder, references, data.name, config.early)


def plan(config: Config) -> Iterator[Case]:
    """The ensembles: each width with a linear decoder at every lambda, and with a nonlinear one for reconstruction."""
    for width in config.widths:
        yield Case(width, Decoder.linear, tuple(itertools.product(config.lambdas, config.seeds)))
        yield Case(width, Decoder.nonlinear, tuple((math.inf, seed) for seed in config.seeds))


def _check(config: Config) -> None:
    """Refuse settings that no data could fit."""
    for name in ("widths", "lambdas", "seeds"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ma.InputError(f"--{name} repeats a value: give each once")
    if math.inf not in config.lambdas:
        raise ma.InputError("--lambdas: give inf, reconstruction alone, and finite weights beside it")
    for lam in config.lambdas:
        if not lam > 0:
            raise ma.InputError(f"--lambdas {lam:g}: give relative weights over 0")
    if min(config.widths) < 1 or config.latent < 2 or config.records < 3:
        raise ma.InputError("--widths must be at least 1, --latent at least 2, --records at least 3")
    if min(config.widths) < config.latent:
        raise ma.InputError(
            f"--widths {min(config.widths)}: a layer narrower than the code bounds its rank, give at least --latent "
            f"{config.latent}"
        )
    if min(config.seed, *config.seeds) < 0:
        raise ma.InputError("--seed and --seeds: give whole numbers of at least 0")
    if not 0 < config.early < 1:
        raise ma.InputError(f"--early {config.early:g}: give a share between 0 and 1")
    if config.max_train is not None and config.max_train < 40:
        raise ma.InputError(f"--max-train {config.max_train}: give at least 40 images")
    config.network.check()


if __name__ == "__main__":
    launch(main, Config, PRESETS)
