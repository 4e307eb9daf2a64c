"""What do masks change while a masked autoencoder learns, and what did the closed form say?

The nonlinear side of Sec. 5 of Balestriero & LeCun (2024), arXiv 2402.11337: masks help or hurt by data set, shape and
ratio. For every patch size and mask ratio, masked autoencoders of several seeds are trained side by side; at steps
spaced evenly in the logarithm, a ridge probe of the labels is fitted on features of unmasked images. Beside each curve
stands what Theorem 3 says of a linear masked autoencoder with the same exact-count mask: the label variance r2 that its
best k features explain on held-out images. The report says whether the order that the closed form predicts for the
masks of each patch size is there, and from which step on.

    python -m experiments.masking_dynamics                                          # digits: a smoke test
    python -m experiments.masking_dynamics --preset fashion_mnist --data idx:DIR
    python -m experiments.masking_dynamics --preset cifar10 --data npz:FILE         # at 16 pixels, 18 minutes
    python -m experiments.masking_dynamics --preset paper --data folder:DIR         # accelerators

Every evaluation is kept and every network checkpointed with it: interrupted, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import mae_align as ma
from experiments.harness.cli import launch
from experiments.harness.data import load_together
from experiments.harness.folder import Parts, RunFolder, shared_points, silent
from experiments.masking_dynamics.report import Curve, write_report
from mae_align.closed_form.predictions import closed_form_row
from mae_align.corruption import FixedCountPatchMasking
from mae_align.models import AllPixels, MaskedAutoencoder, MaskedPatches, Pixels
from mae_align.moments.moments import Moments
from mae_align.probes import raw_pixels, ridge_probe
from mae_align.runtime.files import fingerprint
from mae_align.runtime.processes import train_mesh
from mae_align.train.checkpoint import Checkpoints
from mae_align.train.ensemble import Training, TrainState, reconstruct
from mae_align.train.loop import fit
from mae_align.train.optimizer import OptimizerConfig, adamw

# Images of one forward pass when features are taken.
_FEATURE_BATCH = 500
# Groups of held-out images, for the standard errors of the prediction.
_GROUPS = 5
_MEASURES = ("accuracy", "r2")


class Loss(enum.Enum):
    """Of hidden patches, each normalised as published or in raw pixels, or of all pixels, which Theorem 3 solves."""

    norm_pix = "norm_pix"
    hidden = "hidden"
    matched = "matched"


_OBJECTIVES = {
    Loss.norm_pix: MaskedPatches(norm_pix=True),
    Loss.hidden: MaskedPatches(norm_pix=False),
    Loss.matched: AllPixels(),
}


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The masked autoencoders and their training."""

    width: int = 64
    """Width of the encoder's tokens, and number of features."""
    depth: int = 2
    """Blocks of the encoder."""
    heads: int = 4
    """Attention heads of the encoder."""
    decoder_width: int = 64
    """Width of the decoder's tokens."""
    decoder_depth: int = 1
    """Blocks of the decoder."""
    decoder_heads: int = 4
    """Attention heads of the decoder."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW: linear growth, then half a cosine down to 0."""
    warmup_epochs: float = 0.5
    """Epochs in which the learning rate grows."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    bfloat16: bool = False
    """Compute in bfloat16, parameters and losses in float32: for accelerators."""


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
    max_probe: int = 4_000
    """Probes are fitted on so many of the training images and tested on so many of the test images at most."""
    patch_sizes: tuple[int, ...] = (2, 4)
    """Sides of square patches, in pixels; each must divide the image."""
    mask_ratios: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Shares of patches to mask; numbers are rounded, and at least one patch stays visible."""
    loss: Loss = Loss.norm_pix
    """Hidden patches, normalised as published (norm_pix) or raw (hidden), or all raw pixels (matched)."""
    network: NetworkConfig = NetworkConfig()
    """The masked autoencoders."""
    evaluations: int = 12
    """Steps at which probes are fitted, spaced evenly in the logarithm from 1 to the last; before the first too."""
    ks: tuple[int, ...] = (8, 32)
    """Numbers of features of the closed form, beside the width of the networks and the mean over log k."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the networks."""
    seeds_at_once: int | None = None
    """Train the networks of so many seeds side by side; none for all. Smaller needs less memory."""
    seed: int = 0
    """Of the images that are drawn."""
    out: str | None = None
    """Run folder; none for runs/masking_dynamics-DATA-HASH."""


_LAPTOP = Config(
    network=NetworkConfig(width=32, decoder_width=32, epochs=20, batch_size=64), mask_ratios=(0.25, 0.5, 0.75)
)
_REAL = Config(
    max_train=10_000, max_test=10_000, network=NetworkConfig(epochs=8, batch_size=64, warmup_epochs=1.0), evaluations=9
)
PRESETS = {
    "laptop": _LAPTOP,
    "fashion_mnist": dataclasses.replace(_REAL, patch_sizes=(4, 7)),
    "cifar10": dataclasses.replace(_REAL, image_size=16),
    "paper": Config(
        max_probe=50_000,
        patch_sizes=(2, 4, 8),
        mask_ratios=(0.15, 0.3, 0.45, 0.6, 0.75, 0.9),
        # Five networks at once, or 1024 images of 256 patches in one step, are more than an accelerator's memory.
        network=NetworkConfig(192, 12, 3, 128, 2, 4, epochs=400, batch_size=256, warmup_epochs=20.0, bfloat16=True),
        evaluations=24,
        ks=(8, 32, 128),
        seeds=(0, 1, 2, 3, 4),
        seeds_at_once=1,
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A mask."""

    patch_size: int
    mask_ratio: float

    @property
    def key(self) -> str:
        """A file name."""
        return f"patch{self.patch_size}-ratio{self.mask_ratio:g}"


def main(config: Config) -> None:
    """Train, probe over time, predict, compare.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    _check(config)
    data = _used(load_together(config.data, image_size=config.image_size, seed=config.seed), config)
    pixels = Pixels.from_images(data.train_images)
    cells = [Cell(*of) for of in itertools.product(config.patch_sizes, config.mask_ratios)]
    # Refuses sizes that do not fit before anything is trained.
    trainings = {cell: make_training(pixels, cell, config, len(data.train_images)) for cell in cells}
    folder = RunFolder.open("masking_dynamics", config.data, config, config.out)
    arrays = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    mark = fingerprint(arrays, {"config": dataclasses.asdict(dataclasses.replace(config, out=None))})
    store, closed = shared_points(folder.points, mark), Parts(folder.points, mark)
    probed = _probed(data, config)
    raw = probe(raw_pixels(probed.train_images), raw_pixels(probed.test_images), probed, config)
    steps = milestones(num_steps(config.network, len(data.train_images)), config.evaluations)

    @functools.cache
    def moments() -> tuple[Moments, Moments]:
        classes = data.num_classes
        train = Moments.from_arrays(data.train_images, data.train_labels, num_classes=classes)
        return train, Moments.from_arrays(data.test_images, data.test_labels, num_classes=classes, groups=_GROUPS)

    ks = tuple(dict.fromkeys((*config.ks, config.network.width)))
    curves = []
    groups = seed_groups(config)
    with tqdm(total=len(cells) * len(groups) * len(steps), desc="networks", unit="evaluation", disable=silent()) as bar:
        for cell, training in trainings.items():
            bar.set_postfix_str(cell.key)
            masking = FixedCountPatchMasking.from_ratio(cell.patch_size, cell.mask_ratio, data.image_shape)
            predicted = closed.once(
                f"{cell.key}-closed_form",
                lambda masking=masking: closed_form_row(moments()[0], masking, moments()[1], ks),
            )
            parts = []
            for seeds in groups:
                key = cell.key if len(groups) == 1 else f"{cell.key}-seeds{'-'.join(map(str, seeds))}"
                with Checkpoints.open(
                    folder.shared / "networks" / key, identity=mark, every=steps[-1], keep_latest=1
                ) as checkpoints:
                    found = []
                    state = None
                    for step in steps:
                        scores = store.load(f"{key}-step{step}")
                        if scores is None:
                            state = _state_at(step, state, training, data.train_images, seeds, checkpoints)
                            scores = evaluate(training, state, probed, config)
                            store.save(f"{key}-step{step}", scores)
                        found.append(scores)
                        bar.update()
                parts.append({name: np.stack([row[name] for row in found]) for name in _MEASURES})
            stacked = {name: np.concatenate([part[name] for part in parts], axis=1) for name in _MEASURES}
            realized = 1.0 - masking.keep_probability(data.image_shape)
            curves.append(Curve(cell.patch_size, cell.mask_ratio, realized, steps, **stacked, predicted=predicted))
    write_report(folder, data, curves, ks, raw, config.seeds)


def _check(config: Config) -> None:
    """Refuse settings that no data could fit."""
    for name in ("patch_sizes", "mask_ratios", "seeds", "ks"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ma.InputError(f"--{name.replace('_', '-')} repeats a value: give each once")
    for name in ("max_train", "max_test", "max_probe"):
        value = getattr(config, name)
        if value is not None and value < 40:
            raise ma.InputError(f"--{name.replace('_', '-')} {value}: give at least 40 images")
    if config.evaluations < 2 or min(config.ks) < 1 or min(config.seed, *config.seeds) < 0:
        raise ma.InputError("--evaluations must be at least 2, --ks at least 1, --seed and --seeds at least 0")
    if config.seeds_at_once is not None and (config.seeds_at_once < 1 or len(config.seeds) % config.seeds_at_once):
        raise ma.InputError(
            f"--seeds-at-once {config.seeds_at_once}: give a number that divides that of --seeds, {len(config.seeds)}"
        )
    if config.network.epochs < 1 or config.network.batch_size < 1:
        raise ma.InputError("--network: give at least one epoch and batches of at least 1")


def seed_groups(config: Config) -> list[tuple[int, ...]]:
    """Seeds that are trained side by side.

    Example:
        >>> seed_groups(Config(seeds=(3, 4), seeds_at_once=1))
        [(3,), (4,)]
    """
    size = config.seeds_at_once or len(config.seeds)
    return [config.seeds[i : i + size] for i in range(0, len(config.seeds), size)]


def _used(data: ma.ImageDataset, config: Config) -> ma.ImageDataset:
    """The images that are trained on and those that are held out."""
    rng = np.random.default_rng(config.seed)
    train, test = (
        np.sort(rng.permutation(len(labels))[:most])
        for labels, most in ((data.train_labels, config.max_train), (data.test_labels, config.max_test))
    )
    return _rows(data, train, test)


def _probed(data: ma.ImageDataset, config: Config) -> ma.ImageDataset:
    """The images of the probes: the same for every network and step."""
    rng = np.random.default_rng([config.seed, 1])
    train, test = (np.sort(rng.permutation(len(y))[: config.max_probe]) for y in (data.train_labels, data.test_labels))
    return _rows(data, train, test)


def _rows(data: ma.ImageDataset, train: np.ndarray, test: np.ndarray) -> ma.ImageDataset:
    parts = (data.train_images[train], data.train_labels[train], data.test_images[test], data.test_labels[test])
    return ma.ImageDataset(*parts, data.class_names, data.name)


def num_steps(network: NetworkConfig, num_images: int) -> int:
    """Steps of a training."""
    return network.epochs * max(num_images // network.batch_size, 1)


def milestones(total: int, count: int) -> tuple[int, ...]:
    """Steps at which networks are looked at: 0, then evenly spaced in the logarithm; equal ones once.

    Args:
        total: the last. count: how many after 0, before equal ones are dropped.

    Example:
        >>> milestones(100, 3)
        (0, 1, 10, 100)
    """
    return (0, *np.unique(np.geomspace(1, total, count).round().astype(int)).tolist())


def make_training(pixels: Pixels, cell: Cell, config: Config, num_images: int) -> Training:
    """The networks of one mask, one for each seed of a group, as an ensemble.

    Raises:
        InputError: sizes that do not fit the images or each other.
    """
    network = config.network
    total = num_steps(network, num_images)
    warmup = min(round(network.warmup_epochs * total / network.epochs), total - 1)
    optimizer = OptimizerConfig(
        total_steps=total,
        learning_rate=network.learning_rate,
        warmup_steps=warmup,
        weight_decay=network.weight_decay,
    )

    def make(rngs: nnx.Rngs) -> MaskedAutoencoder:
        return MaskedAutoencoder(
            pixels,
            patch_size=cell.patch_size,
            mask_ratio=cell.mask_ratio,
            width=network.width,
            depth=network.depth,
            heads=network.heads,
            decoder_width=network.decoder_width,
            decoder_depth=network.decoder_depth,
            decoder_heads=network.decoder_heads,
            objective=_OBJECTIVES[config.loss],
            dtype=jnp.bfloat16 if network.bfloat16 else jnp.float32,
            rngs=rngs,
        )

    # One CPU device is all of its cores.
    devices = jax.devices()[:1] if jax.default_backend() == "cpu" and jax.process_count() == 1 else None
    return Training(
        make,
        reconstruct,
        adamw(optimizer),
        batch_size=network.batch_size,
        num_members=len(seed_groups(config)[0]),
        mesh=train_mesh(devices=devices),
    )


def _state_at(
    step: int,
    state: TrainState | None,
    training: Training,
    images: np.ndarray,
    seeds: Sequence[int],
    checkpoints: Checkpoints,
) -> TrainState:
    """The networks after so many steps, from where they are or from the latest checkpoint.

    An evaluation that was lost from before the checkpoint means to train up to it again, beside the checkpoint.
    """
    state = training.init(seeds) if state is None else state
    if step == 0:
        return state
    newest = checkpoints.latest_step()
    if newest is not None and newest > step:
        return fit(training, state, training.put(images), num_steps=step - int(state.step))
    return fit(training, state, training.put(images), num_steps=step, checkpoints=checkpoints)


def evaluate(training: Training, state: TrainState, data: ma.ImageDataset, config: Config) -> dict[str, np.ndarray]:
    """Test scores of a ridge probe on unmasked images, for each network.

    Returns:
        accuracy and r2, [E] each.
    """
    parts = [training.features(state, images, _FEATURE_BATCH) for images in (data.train_images, data.test_images)]
    found = [probe(train, test, data, config) for train, test in zip(*parts, strict=True)]
    return {name: np.array([row[name] for row in found]) for name in _MEASURES}


def probe(train: np.ndarray, test: np.ndarray, data: ma.ImageDataset, config: Config) -> dict[str, float]:
    """Test accuracy and r2 of a ridge probe; its strength is chosen on a part of the training images."""
    labels = data.train_labels, data.test_labels
    found = ridge_probe(train, labels[0], test, labels[1], num_classes=data.num_classes, seed=config.seed)
    return {name: getattr(found, f"{name}_test") for name in _MEASURES}


if __name__ == "__main__":
    launch(main, Config, PRESETS)
