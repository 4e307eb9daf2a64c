"""Networks and the rules of descent by which they learn."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Annotated

import jax
import numpy as np
import optax
from flax import nnx

from experiments.harness.config import Bounds, Count, NotNegative, Positive, Widths
from experiments.harness.train import training_programs
from experiments.learning_dynamics.spectrum import Spectrum
from mae_align.models import Autoencoder, ConvAutoencoder, MLPAutoencoder, Pixels
from mae_align.train.ensemble import Training, reconstruct
from mae_align.train.optimizer import momentum, warmup_cosine


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
class Sizes:
    """Sizes of the networks."""

    mlp_widths: Widths = (256,)
    """Hidden widths of the MLP's encoder; the decoder mirrors them."""
    conv_widths: Widths = (8, 16)
    """Channels of the convolutional encoder, each at half the resolution of the one before; mirrored in the decoder."""
    start: Annotated[float, Bounds(above=0, below=1)] = 1e-3
    """Initial strength of a direction in the linear network, small and balanced (encoder = decoder transposed)."""


@dataclasses.dataclass(frozen=True)
class Descent:
    """How networks are trained, in steps: half-times are counted in them."""

    batch_size: Count = 64
    """Images in a step."""
    steps: Count = 2000
    """Steps of AdamW."""
    descent_steps: Count = 3000
    """Steps of gradient descent, with and without momentum."""
    conv_steps: Count = 1000
    """Steps of convolutional networks."""
    learning_rate: Positive = 1e-3
    """Of AdamW (largest one of a schedule)."""
    weight_decay: NotNegative = 1e-3
    """Of AdamW."""
    schedule: Schedule = Schedule.constant
    """Of AdamW. constant: half-times are in equal steps; one_cycle: as published, 30% warm-up and a cosine to 0."""
    descent_rate: Positive = 0.1
    """Of gradient descent on the linear network, in units of d / largest eigenvalue (over 0.25 it is not stable)."""
    momentum_rate: Positive = 0.02
    """Of momentum 0.9, in the same units."""


def num_steps(learner: Learner, descent: Descent) -> int:
    """Steps that a learner is trained for."""
    if learner.is_convolution:
        return descent.conv_steps
    return descent.descent_steps if learner in (Learner.linear_descent, Learner.mlp_momentum) else descent.steps


def rate_factor(learner: Learner, descent: Descent, spectrum: Spectrum) -> float:
    """Learning rate of descent on images of a spectrum, and 1 for AdamW, which has its own."""
    unit = spectrum.num_pixels / float(spectrum.values[0])
    if learner is Learner.linear_descent:
        return descent.descent_rate * unit
    if learner in (Learner.mlp_momentum, Learner.conv_momentum):
        return descent.momentum_rate * unit
    return 1.0


def make_training(
    learner: Learner, sizes: Sizes, latent: int, descent: Descent, shape: tuple[int, int, int], members: int
) -> Training:
    """The programs of a learner; they serve every image set of this shape.

    Raises:
        InputError: sizes that do not fit.
    """
    # Scenes are normalised already: the networks take them as they are.
    pixels = Pixels(np.zeros(shape, np.float32), np.array(1.0, np.float32))

    def make(rngs: nnx.Rngs) -> Autoencoder:
        if learner.is_convolution:
            return ConvAutoencoder(pixels, widths=sizes.conv_widths, latent=latent, rngs=rngs)
        if learner.is_linear:
            return _balanced(pixels, latent, sizes.start, rngs)
        return MLPAutoencoder(pixels, hidden=sizes.mlp_widths, latent=latent, rngs=rngs)

    rule = _rule(learner, descent)
    return training_programs(make, reconstruct, rule, batch_size=descent.batch_size, num_members=members)


def _balanced(pixels: Pixels, latent: int, start: float, rngs: nnx.Rngs) -> MLPAutoencoder:
    """Linear autoencoder with W1 = W2^T of independent normal entries, |W1 c|^2 = start on average for unit c."""
    model = MLPAutoencoder(pixels, hidden=(), activation=None, latent=latent, rngs=rngs)
    kernel = model.down[0].kernel
    drawn = jax.random.normal(rngs.params(), kernel[...].shape) * math.sqrt(start / latent)
    kernel[...] = drawn
    model.up[0].kernel[...] = drawn.T
    return model


def _rule(learner: Learner, descent: Descent) -> optax.GradientTransformation:
    if learner in (Learner.mlp_momentum, Learner.conv_momentum):
        return momentum(1.0, 0.9)
    if learner is Learner.linear_descent:
        return momentum(1.0, 0.0)
    steps = num_steps(learner, descent)
    rates: dict[Schedule, float | optax.Schedule] = {
        Schedule.constant: descent.learning_rate,
        Schedule.one_cycle: warmup_cosine(descent.learning_rate, min(round(0.3 * steps), steps - 1), steps),
    }
    return optax.adamw(
        rates[descent.schedule],
        eps=1e-6,
        weight_decay=descent.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    )
