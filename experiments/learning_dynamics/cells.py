"""One cell of the learning dynamics: networks of several seeds trained on one image set, looked at on the way."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import mae_align as ma
from experiments.harness.folder import silent
from experiments.learning_dynamics.dynamics import (
    DirectionErrors,
    direction_energy,
    group_shares,
    log_steps,
    variance_groups,
)
from experiments.learning_dynamics.reference import flow_cost, flow_half_times
from experiments.learning_dynamics.response import ResponseFilter
from experiments.learning_dynamics.spectrum import (
    ImageMap,
    Spectrum,
    keep_top,
    permute_spectrum,
    reverse_spectrum,
    rotate_pixels,
    shuffle_pixels,
    untouched,
    whiten,
)
from mae_align.data.frequency import error_by_band, mean_frequency
from mae_align.models import Autoencoder, ConvAutoencoder, MLPAutoencoder, Pixels
from mae_align.probes import ridge_probe
from mae_align.train.checkpoint import Checkpoints
from mae_align.train.ensemble import Training, TrainState, reconstruct
from mae_align.train.optimizer import momentum, warmup_cosine

Arrays = dict[str, np.ndarray]
GROUPS = 10
# Multiply-adds of the largest gradient flow that is integrated: an hour on two cores.
_LARGEST_FLOW = 1e14
# Images of one forward pass.
_BATCH = 500


class Images(enum.Enum):
    """What is made of the images before anything is trained on them."""

    original = "original"
    top = "top"
    whitened = "whitened"
    reversed = "reversed"
    permuted = "permuted"
    rotated = "rotated"
    shuffled = "shuffled"


class Learner(enum.Enum):
    """Network and rule of descent."""

    linear_descent = "linear_descent"
    linear_adamw = "linear_adamw"
    mlp_adamw = "mlp_adamw"
    mlp_momentum = "mlp_momentum"
    conv_adamw = "conv_adamw"
    conv_momentum = "conv_momentum"

    @property
    def is_linear(self) -> bool:
        """Whether it is the linear autoencoder from a small balanced start."""
        return self in (Learner.linear_descent, Learner.linear_adamw)

    @property
    def is_convolution(self) -> bool:
        """Whether it sees which pixels are neighbours."""
        return self in (Learner.conv_adamw, Learner.conv_momentum)


class Schedule(enum.Enum):
    """Learning rate over a run."""

    constant = "constant"
    one_cycle = "one_cycle"


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The networks and their training."""

    latent: int = 64
    """Size of the code, and number of directions that are followed."""
    mlp_hidden: tuple[int, ...] = (256,)
    """Hidden widths of the MLP's encoder; the decoder mirrors them."""
    conv_widths: tuple[int, ...] = (8, 16)
    """Channels of the convolutional encoder, each at half the resolution of the one before; mirrored in the decoder."""
    batch_size: int = 64
    """Images in a step."""
    steps: int = 2000
    """Steps of AdamW."""
    descent_steps: int = 3000
    """Steps of gradient descent, with and without momentum."""
    conv_steps: int = 1000
    """Steps of convolutional networks."""
    learning_rate: float = 1e-3
    """Of AdamW (largest one of a schedule)."""
    weight_decay: float = 1e-3
    """Of AdamW."""
    schedule: Schedule = Schedule.constant
    """Of AdamW. constant: half-times are in equal steps; one_cycle: as published, 30% warm-up and a cosine to 0."""
    descent_rate: float = 0.1
    """Of gradient descent on the linear network, in units of d / largest eigenvalue (over 0.25 it is not stable)."""
    momentum_rate: float = 0.02
    """Of momentum 0.9, in the same units."""
    start: float = 1e-3
    """Initial strength of a direction in the linear network, small and balanced (encoder = decoder transposed)."""


class Scene(NamedTuple):
    """One image set, ready to train on.

    Attributes:
        spectrum: of the training images as given to the networks. mean_frequency: [r] of its directions, cycles per
            pixel. images: [n, h, w, c] float32 in units in which the mean image as reconstruction has a loss of 1.
        seen: indices of the training images that are looked at. held_out: test images.
        seen_labels, held_out_labels: of both. seen_energy [r], held_out_energy [r]: along each direction.
        filter: of the response frequencies, at the first of the held-out images. num_classes: of the labels.
    """

    spectrum: Spectrum
    mean_frequency: np.ndarray
    images: np.ndarray
    seen: np.ndarray
    held_out: np.ndarray
    seen_labels: np.ndarray
    held_out_labels: np.ndarray
    seen_energy: np.ndarray
    held_out_energy: np.ndarray
    filter: ResponseFilter
    num_classes: int


def image_map(kind: Images, spectrum: Spectrum, count: int, seed: int) -> ImageMap:
    """What an intervention does to images of a spectrum.

    Args:
        kind: which. spectrum: of the stored images. count: directions that interventions on the spectrum keep.
        seed: of those that draw numbers.
    """
    makers: dict[Images, Callable[[], ImageMap]] = {
        Images.original: lambda: untouched(spectrum),
        Images.top: lambda: keep_top(spectrum, count),
        Images.whitened: lambda: whiten(spectrum, count),
        Images.reversed: lambda: reverse_spectrum(spectrum, count),
        Images.permuted: lambda: permute_spectrum(spectrum, count, seed),
        Images.rotated: lambda: rotate_pixels(spectrum, seed),
        Images.shuffled: lambda: shuffle_pixels(spectrum, seed),
    }
    return makers[kind]()


def make_scene(
    data: ma.ImageDataset, moved: ImageMap, *, seen: int, response_points: int, widths: tuple[float, ...], seed: int
) -> Scene:
    """The images of a data set under a map, and what they are looked at with.

    Args:
        data: training and test images. moved: of their spectrum. seen: most training, and most test, images to look at.
        response_points: of the response filter. widths: see :class:`ResponseFilter`. seed: of the choice of images.
    """
    rng = np.random.default_rng([seed, 7])
    chosen = [
        np.sort(rng.choice(len(labels), min(seen, len(labels)), replace=False))
        for labels in (data.train_labels, data.test_labels)
    ]
    spectrum, images = moved.spectrum, moved.apply(data.train_images)
    held_out = moved.apply(data.test_images[chosen[1]])
    return Scene(
        spectrum,
        mean_frequency(spectrum.vectors.T.reshape(-1, *spectrum.image_shape)),
        images,
        chosen[0],
        held_out,
        data.train_labels[chosen[0]],
        data.test_labels[chosen[1]],
        direction_energy(images[chosen[0]], spectrum),
        direction_energy(held_out, spectrum),
        ResponseFilter.of(held_out[:response_points], widths),
        data.num_classes,
    )


def num_steps(learner: Learner, config: TrainingConfig) -> int:
    """Steps that a learner is trained for."""
    if learner.is_convolution:
        return config.conv_steps
    return config.descent_steps if learner in (Learner.linear_descent, Learner.mlp_momentum) else config.steps


def rate_factor(learner: Learner, config: TrainingConfig, spectrum: Spectrum) -> float:
    """Learning rate of descent on images of a spectrum, and 1 for AdamW, which has its own."""
    unit = spectrum.num_pixels / float(spectrum.values[0])
    if learner is Learner.linear_descent:
        return config.descent_rate * unit
    if learner in (Learner.mlp_momentum, Learner.conv_momentum):
        return config.momentum_rate * unit
    return 1.0


def make_training(learner: Learner, config: TrainingConfig, shape: tuple[int, int, int], seeds: int) -> Training:
    """The programs of a learner; they serve every image set of this shape.

    Raises:
        InputError: sizes that do not fit.
    """
    # Scenes are normalised already: the networks take them as they are.
    pixels = Pixels(np.zeros(shape, np.float32), np.array(1.0, np.float32))

    def make(rngs: nnx.Rngs) -> Autoencoder:
        if learner.is_convolution:
            return ConvAutoencoder(pixels, widths=config.conv_widths, latent=config.latent, rngs=rngs)
        if learner.is_linear:
            return _balanced(pixels, config, rngs)
        return MLPAutoencoder(pixels, hidden=config.mlp_hidden, latent=config.latent, rngs=rngs)

    return Training(make, reconstruct, _rule(learner, config), batch_size=config.batch_size, num_members=seeds)


def _balanced(pixels: Pixels, config: TrainingConfig, rngs: nnx.Rngs) -> MLPAutoencoder:
    """Linear autoencoder with W1 = W2^T of independent normal entries, |W1 c|^2 = start on average for unit c."""
    model = MLPAutoencoder(pixels, hidden=(), activation=None, latent=config.latent, rngs=rngs)
    kernel = model.down[0].kernel
    drawn = jax.random.normal(rngs.params(), kernel[...].shape) * math.sqrt(config.start / config.latent)
    kernel[...] = drawn
    model.up[0].kernel[...] = drawn.T
    return model


def _rule(learner: Learner, config: TrainingConfig) -> optax.GradientTransformation:
    if learner in (Learner.mlp_momentum, Learner.conv_momentum):
        return momentum(1.0, 0.9)
    if learner is Learner.linear_descent:
        return momentum(1.0, 0.0)
    steps = num_steps(learner, config)
    rates: dict[Schedule, float | optax.Schedule] = {
        Schedule.constant: config.learning_rate,
        Schedule.one_cycle: warmup_cosine(config.learning_rate, min(round(0.3 * steps), steps - 1), steps),
    }
    return optax.adamw(
        rates[config.schedule],
        eps=1e-6,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    )


def run_cell(
    learner: Learner,
    training: Training,
    scene: Scene,
    config: TrainingConfig,
    seeds: tuple[int, ...],
    *,
    records: int,
    bands: int,
    checkpoints: Checkpoints | None,
    label: str,
) -> Arrays:
    """Train the networks of a cell and look at them at log-spaced steps.

    Args:
        learner: of ``training``. scene: what it learns. config: of the training. seeds: one per member.
        records: number of looks. bands: of spatial frequency. checkpoints: to go on from, or None.
        label: for the progress bar.

    Returns:
        steps [T]; with E members and m followed directions: seen, held_out [E, T, m] residuals; groups [E, T, 10]
        residuals of variance groups; with r directions in all: spectrum [E, T, r] residuals, energy [E, T, r] of the
        reconstructions and data_energy [r] of what was looked at; bands [E, T, bands] error shares; low, high
        [E, T, w] squared response errors; loss, held_out_loss, accuracy [E, T]; values, frequency [m]; low_share [w];
        group_sizes [10]; rate []. A run whose loss stops being finite has NaN from there on. A linear network under
        descent also has reference_half_times [E, m], of the gradient flow from its own start, where these take fewer
        than 1e14 multiply-adds (an hour).
    """
    steps = log_steps(num_steps(learner, config), records)
    rate = rate_factor(learner, config, scene.spectrum)
    state = training.init(seeds, learning_rates=[rate] * len(seeds))
    data = training.put(scene.images)
    followed = min(config.latent, scene.spectrum.rank)
    values = scene.spectrum.values[:followed]
    found: dict[str, Any] = {
        "steps": steps,
        "values": values,
        "frequency": scene.mean_frequency[:followed],
        "low_share": scene.filter.low_share(scene.held_out[: scene.filter.weights.shape[1]]),
        "group_sizes": np.bincount(variance_groups(scene.spectrum.values, GROUPS), minlength=GROUPS),
        "rate": np.array(rate),
        "data_energy": scene.seen_energy,
    }
    if learner is Learner.linear_descent:
        cost = flow_cost(config.descent_rate, config.descent_steps, config.latent, scene.spectrum.rank, len(seeds))
        if cost < _LARGEST_FLOW:
            found["reference_half_times"] = flow_half_times(training, state, scene.spectrum, steps, rate)[:, :followed]
    looks: list[Arrays] = []
    if checkpoints is not None and checkpoints.latest_step() is not None:
        _, state, position = checkpoints.restore(state)
        looks = [{k: np.array(v) for k, v in look.items()} for look in position["looks"]]
    with tqdm(total=int(steps[-1]), desc=label, unit="step", leave=False, disable=silent()) as bar:
        for index, step in enumerate(steps.tolist()):
            bar.update(step - bar.n)
            if index < len(looks):
                continue
            if index and not np.isfinite(looks[-1]["loss"]).any():
                looks.append(looks[-1])  # nothing comes back from NaN
                continue
            if index:
                state, _ = training.advance(state, data, step - int(steps[index - 1]))
            looks.append(_look(training, state, scene, followed, bands))
            if checkpoints is not None and index:
                plain = [{k: v.tolist() for k, v in look.items()} for look in looks]
                checkpoints.save(step, state, {"looks": plain}, {})
    return found | {key: np.stack([look[key] for look in looks], axis=1) for key in looks[0]}


@jax.jit
def _reconstructed(model: Autoencoder, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return model.reconstruct(images), model.features(images)


def _outputs(model: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reconstructions and features; the last batch is filled up, so that one program serves."""
    parts = []
    for start in range(0, len(images), _BATCH):
        part = images[start : start + _BATCH]
        rows = np.concatenate([part, np.repeat(part[:1], _BATCH - len(part), axis=0)])
        parts.append([np.asarray(a)[: len(part)] for a in _reconstructed(model, jnp.asarray(rows))])
    reconstructed, features = zip(*parts, strict=True)
    return np.concatenate(reconstructed), np.concatenate(features)


def _look(training: Training, state: TrainState, scene: Scene, followed: int, bands: int) -> Arrays:
    """Everything that is noted of all members at one step, each with a leading axis of members."""
    each = [_look_at(training.model(state, e), scene, followed, bands) for e in range(training.num_members)]
    return {key: np.stack([one[key] for one in each]) for key in each[0]}


def _look_at(model: Any, scene: Scene, followed: int, bands: int) -> Arrays:
    seen_images, held_out = scene.images[scene.seen], scene.held_out
    (seen, seen_features), (test, test_features) = (_outputs(model, x) for x in (seen_images, held_out))
    points, widths, spectrum = scene.filter.weights.shape[1], len(scene.filter.widths), scene.spectrum
    if not (np.isfinite(seen).all() and np.isfinite(test).all()):
        sizes = {
            "seen": followed,
            "spectrum": spectrum.rank,
            "energy": spectrum.rank,
            "held_out": followed,
            "groups": GROUPS,
            "bands": bands,
            "low": widths,
            "high": widths,
        }
        blank = {name: np.full(size, np.nan) for name, size in sizes.items()}
        return blank | {name: np.array(np.nan) for name in ("loss", "held_out_loss", "accuracy")}
    few = spectrum.first(followed)
    on_seen = DirectionErrors(direction_energy(seen - seen_images, spectrum), scene.seen_energy)
    on_test = DirectionErrors(direction_energy(test - held_out, few), scene.held_out_energy[:followed])
    response = scene.filter.errors(held_out[:points], test[:points])
    probe = ridge_probe(
        seen_features, scene.seen_labels, test_features, scene.held_out_labels, num_classes=scene.num_classes
    )
    return {
        "seen": on_seen.share[:followed],
        "spectrum": on_seen.share,
        "energy": direction_energy(seen, spectrum),
        "held_out": on_test.share,
        "groups": group_shares(on_seen, variance_groups(spectrum.values, GROUPS), GROUPS),
        "bands": error_by_band(held_out, test, bands).share,
        "low": response.low,
        "high": response.high,
        "loss": np.array(np.square(seen - seen_images, dtype=np.float64).mean()),
        "held_out_loss": np.array(np.square(test - held_out, dtype=np.float64).mean()),
        "accuracy": np.array(probe.accuracy_test),
    }


def cells(
    learners: tuple[Learner, ...], intervened: tuple[Learner, ...], interventions: tuple[Images, ...]
) -> list[tuple[Images, Learner]]:
    """What is trained: all learners on the original images, some on changed ones.

    A rotation leaves a convolution nothing to slide over: that pair is left out.
    """
    found = [(Images.original, learner) for learner in learners]
    found += itertools.product([i for i in interventions if i is not Images.original], intervened)
    return [(i, x) for i, x in dict.fromkeys(found) if not (i is Images.rotated and x.is_convolution)]
