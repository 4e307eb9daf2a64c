"""When does an autoencoder learn what? Half-times of principal directions, and whether eigenvalue or frequency decides.

"The bottom subspace is learned exponentially slower than the top" (Balestriero & LeCun, 2024, Fig. 1 bottom): linear,
MLP and convolutional autoencoders are trained, and at log-spaced steps it is noted how much of each eigen-direction of
the training covariance is missing (1 untouched, 0 learned), per group of directions with a tenth of the variance each,
per band of spatial frequency, at low and high response frequencies, and how well a linear probe reads the code.
Half-times against eigenvalues are fitted by a power law and by exponential laws; directions that are not learned in
time are censored. For gradient descent on the linear network the gradient flow from the same start is the reference,
where it takes less than about an hour: not in the paper preset.

Is it only the frequency principle? Two frequencies are told apart: *spatial* frequency of image content
(:mod:`mae_align.data.frequency`) and *response* frequency of the map (:mod:`experiments.learning_dynamics.response`).
And since eigenvalue and
spatial frequency go together in natural images, they are set apart by intervention: the first directions as they are
(top), with one eigenvalue for all (whitened), in reverse order (reversed) and dealt out at random (permuted), pixels
rotated at random (rotated) and moved about (shuffled). Rank correlations of half-times, one given the other, say which
of the two decides.

    python -m experiments.learning_dynamics                                         # digits
    python -m experiments.learning_dynamics --preset fashion_mnist --data idx:DIR
    python -m experiments.learning_dynamics --preset cifar10 --data npz:FILE        # at 16 x 16 pixels
    python -m experiments.learning_dynamics --preset paper --data npz:FILE          # accelerators: 50 epochs

Expected: half-time ~ eigenvalue^-a, with a = 1 in closed form for gradient descent on a linear network from an aligned
start, and near it otherwise. The autoencoders have neither batch normalisation nor a sigmoid, which published ones
have. Every trained cell is written when it is done: interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from tqdm import tqdm

import mae_align as ma
from experiments.harness.cli import launch
from experiments.harness.data import load_together
from experiments.harness.folder import RunFolder, shared_points, silent
from experiments.learning_dynamics.cells import (
    Arrays,
    Images,
    Learner,
    Schedule,
    TrainingConfig,
    cells,
    image_map,
    make_scene,
    make_training,
    num_steps,
    run_cell,
)
from experiments.learning_dynamics.report import write_report
from experiments.learning_dynamics.spectrum import Spectrum
from mae_align.runtime.files import fingerprint
from mae_align.train.checkpoint import Checkpoints

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or prepared:DIR."""
    image_size: int | None = None
    """Resize images to squares of this side, in pixels; none keeps them."""
    max_train: int | None = None
    """Use at most so many training images, drawn at random; none for all."""
    learners: tuple[Learner, ...] = (
        Learner.linear_descent,
        Learner.linear_adamw,
        Learner.mlp_momentum,
        Learner.mlp_adamw,
        Learner.conv_adamw,
    )
    """Networks and rules on the original images. Linear networks start small and balanced."""
    intervened: tuple[Learner, ...] = (Learner.mlp_adamw, Learner.conv_adamw)
    """Networks and rules on changed images."""
    interventions: tuple[Images, ...] = tuple(Images)[1:]
    """What is made of the images; those on the spectrum keep as many directions as the code has numbers."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the networks; trained together."""
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    """The networks and their training."""
    records: int = 24
    """Steps to look at, spaced evenly on a logarithmic axis."""
    looked_at: int = 800
    """Most training images, and most test images, to look at; probes are fitted on the former, tested on the latter."""
    bands: int = 6
    """Bands of spatial frequency."""
    response_points: int = 400
    """Images between which the map is filtered."""
    response_widths: tuple[float, ...] = (0.25, 0.35, 0.5)
    """Widths of the response filter, in root median squared distances of two images."""
    checkpoint: bool = False
    """Keep the networks of a cell at every look, for cells that take long: an interrupted one goes on from there."""
    resamples: int = 500
    """Bootstrap samples of seeds and directions."""
    seed: int = 0
    """Of the subsets, the interventions and the bootstrap."""
    out: str | None = None
    """Run folder; none for runs/learning_dynamics-DATA-HASH."""


_REAL = Config(max_train=10_000)
PRESETS = {
    "laptop": Config(
        training=TrainingConfig(
            latent=24, mlp_hidden=(64,), batch_size=64, steps=1500, descent_steps=2000, conv_steps=1000
        ),
    ),
    "fashion_mnist": _REAL,
    "cifar10": dataclasses.replace(_REAL, image_size=16),
    "paper": Config(
        seeds=(0, 1, 2, 3, 4),
        training=TrainingConfig(
            latent=512,
            mlp_hidden=(2432, 1792, 1152),
            conv_widths=(32, 152, 272, 392, 512),
            batch_size=256,
            steps=9750,
            descent_steps=50_000,
            conv_steps=9750,
            schedule=Schedule.one_cycle,
        ),
        records=60,
        looked_at=5000,
        response_points=2000,
        checkpoint=True,
    ),
}


def main(config: Config) -> None:
    """Train, look, fit and compare.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    _check(config)
    data = _subset(load_together(config.data, image_size=config.image_size, seed=config.seed), config)
    moments = ma.Moments.from_arrays(data.train_images)
    spectrum = Spectrum.of(moments)
    training = config.training
    if training.latent > spectrum.rank:
        raise ma.InputError(
            f"--training.latent {training.latent}: these images vary in {spectrum.rank} directions, give at most that"
        )
    if training.batch_size > len(data.train_labels):
        raise ma.InputError(f"--training.batch-size {training.batch_size}: there are {len(data.train_labels)} images")
    todo = cells(config.learners, config.intervened, config.interventions)
    # Refuses sizes that do not fit before anything is trained.
    trainings = {x: make_training(x, training, data.image_shape, len(config.seeds)) for _, x in todo}
    folder = RunFolder.open("learning_dynamics", config.data, config, config.out)
    identity = fingerprint([getattr(data, name) for name in _ARRAYS], {"arrays": 2})
    store = shared_points(folder.points, identity)
    found: dict[tuple[Images, Learner], Arrays] = {}
    scene, kind = None, None
    total = sum(num_steps(x, training) for _, x in todo)
    with tqdm(total=total, desc="learning dynamics", unit="step", disable=silent()) as bar:
        for images, learner in todo:
            key = f"{images.value}-{learner.value}"
            arrays = store.load(key)
            if arrays is None:
                if scene is None or kind is not images:
                    moved = image_map(images, spectrum, training.latent, config.seed)
                    scene, kind = _scene(config, data, moved), images
                arrays = _cell(config, trainings[learner], scene, learner, folder.shared / "networks" / key, identity)
                store.save(key, arrays)
            found[images, learner] = arrays
            bar.update(num_steps(learner, training))
    write_report(
        found,
        folder,
        title=f"{data.name}: {len(data.train_labels)} images of {'x'.join(map(str, data.image_shape))}",
        seeds=config.seeds,
        response_widths=config.response_widths,
        resamples=config.resamples,
        seed=config.seed,
    )


def _scene(config: Config, data: ma.ImageDataset, moved):
    return make_scene(
        data,
        moved,
        seen=config.looked_at,
        response_points=min(config.response_points, config.looked_at, len(data.test_labels)),
        widths=config.response_widths,
        seed=config.seed,
    )


def _cell(config: Config, training, scene, learner: Learner, where: Path, identity: str) -> Arrays:
    def run(checkpoints: Checkpoints | None) -> Arrays:
        return run_cell(
            learner,
            training,
            scene,
            config.training,
            config.seeds,
            records=config.records,
            bands=config.bands,
            checkpoints=checkpoints,
            label=where.name,
        )

    if not config.checkpoint:
        return run(None)
    with Checkpoints.open(where, identity=identity, every=1, keep_latest=1) as checkpoints:
        return run(checkpoints)


def _subset(data: ma.ImageDataset, config: Config) -> ma.ImageDataset:
    n = len(data.train_labels)
    if config.max_train is None or config.max_train >= n:
        return data
    rows = np.sort(np.random.default_rng(config.seed).choice(n, config.max_train, replace=False))
    return dataclasses.replace(data, train_images=data.train_images[rows], train_labels=data.train_labels[rows])


def _check(config: Config) -> None:
    """Refuse settings that no data could fit."""
    for name in ("learners", "intervened", "interventions", "seeds", "response_widths"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ma.InputError(f"--{name.replace('_', '-')} repeats a value: give each once")
    least = {"max_train": 40, "looked_at": 40, "response_points": 3, "records": 4, "bands": 1, "resamples": 20}
    for name, least_value in least.items():
        value = getattr(config, name)
        if value is not None and value < least_value:
            raise ma.InputError(f"--{name.replace('_', '-')} {value}: give at least {least_value}")
    if min(config.seed, *config.seeds) < 0:
        raise ma.InputError("--seed and --seeds: give whole numbers of at least 0")
    if not all(np.isfinite(w) and w > 0 for w in config.response_widths):
        raise ma.InputError(f"--response-widths {config.response_widths}: give numbers over 0")
    training = config.training
    for name in ("latent", "batch_size", "steps", "descent_steps", "conv_steps"):
        least_value = 4 if name == "latent" else 1
        if getattr(training, name) < least_value:
            raise ma.InputError(f"--training.{name.replace('_', '-')}: give at least {least_value}")
    for name in ("learning_rate", "descent_rate", "momentum_rate"):
        if not (np.isfinite(getattr(training, name)) and getattr(training, name) > 0):
            raise ma.InputError(f"--training.{name.replace('_', '-')} {getattr(training, name)}: give a number over 0")
    if not 0 < training.start < 1:
        raise ma.InputError(f"--training.start {training.start}: give a strength between 0 and 1")


if __name__ == "__main__":
    launch(main, Config, PRESETS)
