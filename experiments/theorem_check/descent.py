"""Gradient descent on linear autoencoders, on exact expected losses and on sampled corruptions.

Parameters are whitened coordinates of a network: V = whiten a, W and Z in units of root mean square deviations, so that
one learning rate serves data of any scale. The loss is divided by its value at V = 0 ("share").
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mae_align as ma
from mae_align.closed_form.autoencoder import denoising_loss, supervised_loss
from mae_align.closed_form.factorize import PrimalProblem
from mae_align.corruption import Corruption, CorruptionMoments
from mae_align.runtime.devices import solve_context

_HIGHEST = jax.lax.Precision.HIGHEST
# Steps at which losses are noted, evenly spread on a logarithmic axis.
_RECORDS = 40
# How many steps may be queued on a device; what they draw must fit in its memory.
_STEPS_AHEAD = 16


class Network(NamedTuple):
    """A linear autoencoder with head, or its whitened coordinates.

    Attributes:
        encoder: [d, k] V. head: [k, q] W; q = 0 without supervision. decoder: [k, d] Z.
    """

    encoder: jax.Array | np.ndarray
    head: jax.Array | np.ndarray
    decoder: jax.Array | np.ndarray

    @classmethod
    def of(cls, closed: ma.LinearAutoencoder) -> Self:
        """The network of a closed form."""
        return cls(closed.encoder, closed.head, closed.decoder)


class Objective(NamedTuple):
    """An exact expected loss and the coordinates in which it is minimised.

    Attributes:
        whiten: [d, d] L^-T with the second moments L L^T of the encoder's input. head_unit, decoder_unit: W and Z are
            these times their coordinates. total: loss at V = 0.
        lam: weight of reconstruction. sxx, sxy, syy: covariances. corruption: moments of x'.
    """

    whiten: np.ndarray
    head_unit: float
    decoder_unit: float
    total: float
    lam: float
    sxx: np.ndarray
    sxy: np.ndarray
    syy: np.ndarray
    corruption: CorruptionMoments

    @classmethod
    def supervised(cls, problem: PrimalProblem, sxy: np.ndarray, lam: float) -> Self:
        """Theorem 1 with weight ``lam`` of reconstruction.

        Args:
            problem: floor included. sxy: [d, q]. lam: finite.
        """
        made = cls.denoising(problem, sxy, CorruptionMoments(problem.sxx, problem.sxx, 1.0))
        return made._replace(lam=lam, total=float(np.trace(problem.syy)) + lam * made.total)

    @classmethod
    def denoising(cls, problem: PrimalProblem, sxy: np.ndarray, corruption: CorruptionMoments) -> Self:
        """Theorem 3 with a corruption whose second moments are positive definite.

        Args:
            problem: floor included. sxy: [d, q]. corruption: moments of x'.
        """
        trace_x, trace_y = float(np.trace(problem.sxx)), float(np.trace(problem.syy))
        return cls(
            whiten=np.linalg.inv(np.linalg.cholesky(corruption.keep * corruption.gram)).T,
            head_unit=math.sqrt(trace_y / len(problem.syy)),
            decoder_unit=math.sqrt(trace_x / len(problem.sxx)),
            total=trace_x,
            lam=1.0,
            sxx=problem.sxx,
            sxy=sxy,
            syy=problem.syy,
            corruption=corruption,
        )

    def network(self, a: Network) -> Network:
        """The network at whitened coordinates."""
        encoder = jnp.dot(self.whiten, a.encoder, precision=_HIGHEST)
        return Network(encoder, self.head_unit * a.head, self.decoder_unit * a.decoder)


def supervised_share(network: Network, objective: Objective) -> jax.Array:
    """Loss of Theorem 1, as a share of the loss at V = 0."""
    v, w, z = map(jnp.asarray, network)
    sxx, sxy, syy = map(jnp.asarray, (objective.sxx, objective.sxy, objective.syy))
    return supervised_loss(v, w, z, objective.lam, sxx, sxy, syy) / objective.total


def denoising_share(network: Network, objective: Objective) -> jax.Array:
    """Loss of Theorem 3, as a share of the loss at V = 0."""
    v, _, z = map(jnp.asarray, network)
    return denoising_loss(v, z, jnp.asarray(objective.sxx), objective.corruption) / objective.total


Share = Callable[[Network, Objective], jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a descent is run: Adam, its learning rate decaying to 0 along a cosine, from random starts.

    Attributes:
        starts: number of random starts. steps: number of steps. learning_rate: the first one. seed: of the starts.
    """

    starts: int
    steps: int
    learning_rate: float
    seed: int

    @property
    def records(self) -> list[int]:
        """Numbers of steps after which the loss is noted; the last is ``steps``."""
        return np.unique(np.geomspace(1, self.steps, _RECORDS).round().astype(int)).tolist()

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The same object for equal plans, so that one compiled descent serves all cases of one shape."""
        return _adam(self.learning_rate, self.steps)

    def start(self, objective: Objective, k: int, q: int, dtype: str) -> tuple[Network, optax.OptState]:
        """Random coordinates [starts, ...], features of unit variance and a small decoder, and Adam's state."""
        # NumPy: these few numbers are not worth compiling a generator for every shape.
        rng = np.random.default_rng(self.seed)
        d = len(objective.sxx)
        scales = {(d, k): 1.0 / math.sqrt(d), (k, q): 0.1 / math.sqrt(k), (k, d): 0.1 / math.sqrt(k)}
        a = Network(*(jnp.asarray(x * rng.normal(size=(self.starts, *shape)), dtype) for shape, x in scales.items()))
        return a, self.optimizer.init(a)


@functools.cache
def _adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


State = tuple[Network, optax.OptState]


@functools.partial(jax.jit, static_argnames=("share", "optimizer"))
def _descend(
    state: State,
    first: int,
    last: int,
    objective: Objective,
    *,
    share: Share,
    optimizer: optax.GradientTransformation,
) -> State:
    """Steps first to last - 1 of all starts."""
    gradient = jax.vmap(jax.grad(lambda a: share(objective.network(a), objective)))

    def step(_: jax.Array, state: State) -> State:
        a, memory = state
        updates, memory = optimizer.update(gradient(a), memory)
        return _moved(a, updates), memory

    return jax.lax.fori_loop(first, last, step, state)


def _moved(a: Network, updates: optax.Updates) -> Network:
    moved = optax.apply_updates(a, updates)
    assert isinstance(moved, Network)
    return moved


@functools.partial(jax.jit, static_argnames="share")
def _shares(a: Network, objective: Objective, *, share: Share) -> jax.Array:
    """[starts] shares at whitened coordinates."""
    return jax.vmap(lambda one: share(objective.network(one), objective))(a)


def minimise_exact(objective: Objective, share: Share, k: int, q: int, plan: Plan) -> np.ndarray:
    """Adam on an exact expected loss, in float64.

    Args:
        objective: the loss. share: ``supervised_share`` or ``denoising_share``. plan: the descent.
        k: features. q: targets, 0 without head.

    Returns:
        [starts, records] share of the loss after each of ``plan.records``. Cost per step: starts d^2 k.
    """
    shares = []
    with solve_context():
        state = plan.start(objective, k, q, "float64")
        for first, last in itertools.pairwise([0, *plan.records]):
            state = _descend(state, first, last, objective, share=share, optimizer=plan.optimizer)
            shares.append(np.asarray(_shares(state[0], objective, share=share)))
    return np.stack(shares, axis=1)


class Pixels(NamedTuple):
    """Images on the device that trains.

    Attributes:
        images: [n, h, w, c] as stored. mean: [h, w, c] float32. noise_width: of the uniform measurement noise.
    """

    images: jax.Array
    mean: jax.Array
    noise_width: np.float32

    @classmethod
    def of(cls, images: np.ndarray, problem: PrimalProblem) -> Self:
        """The training images, and noise whose variance is the problem's pixel noise floor."""
        mean = jnp.asarray(problem.mean_x.reshape(problem.image_shape), jnp.float32)
        return cls(jnp.asarray(images), mean, np.float32(math.sqrt(12.0 * problem.pixel_noise)))


@functools.partial(jax.jit, static_argnames="batch_size")
def _clean_batches(keys: jax.Array, i: int, pixels: Pixels, *, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Batch i of each key: keys for its corruption, and random images with measurement noise [keys, batch, h, w, c]."""

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        which, noise, corrupt = jax.random.split(jax.random.fold_in(key, i), 3)
        stored = pixels.images[jax.random.randint(which, (batch_size,), 0, len(pixels.images))]
        unit = jax.random.uniform(noise, stored.shape, jnp.float32, -0.5, 0.5)
        return corrupt, stored.astype(jnp.float32) + pixels.noise_width * unit

    return jax.vmap(one)(keys)


@functools.partial(jax.jit, static_argnames="corruption")
def _corrupted(
    keys: jax.Array, clean: jax.Array, mean: jax.Array, *, corruption: Corruption
) -> tuple[jax.Array, jax.Array]:
    """Corrupted and clean images about the mean, [keys, batch, d] float32 each."""
    corrupted = jax.vmap(corruption.sample, (0, 0, None))(keys, clean, mean)
    flat = (*clean.shape[:2], -1)
    return (corrupted - mean[None, None]).reshape(flat), (clean - mean[None, None]).reshape(flat)


def _draw(
    keys: jax.Array, i: int, pixels: Pixels, corruption: Corruption, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """Draw i of each key; two programs, because the first serves every corruption."""
    return _corrupted(*_clean_batches(keys, i, pixels, batch_size=batch_size), pixels.mean, corruption=corruption)


def _loss_of_batch(network: Network, corrupted: jax.Array, clean: jax.Array) -> jax.Array:
    """Mean over a batch of |Z^T V^T x' - x|^2."""
    features = jnp.dot(corrupted, network.encoder, precision=_HIGHEST)
    return jnp.mean(jnp.sum((jnp.dot(features, network.decoder, precision=_HIGHEST) - clean) ** 2, axis=1))


@functools.partial(jax.jit, static_argnames="optimizer")
def _sampled_step(
    state: State,
    drawn: tuple[jax.Array, jax.Array],
    objective: Objective,
    *,
    optimizer: optax.GradientTransformation,
) -> State:
    """One step of all starts, each on its own images."""

    def share(a: Network, corrupted: jax.Array, clean: jax.Array) -> jax.Array:
        return _loss_of_batch(objective.network(a), corrupted, clean) / objective.total

    a, memory = state
    updates, memory = optimizer.update(jax.vmap(jax.grad(share))(a, *drawn), memory)
    return _moved(a, updates), memory


def minimise_sampled(
    objective: Objective, corruption: Corruption, pixels: Pixels, k: int, batch_size: int, plan: Plan
) -> np.ndarray:
    """Adam on images that the corruption's own sampler corrupts, in float32, judged by the exact expected loss.

    Drawing and stepping are compiled apart: one serves every k, the other every corruption.

    Args:
        objective: exact loss of this corruption. corruption: sampled. pixels: the images. k: features.
        batch_size: images per step and start. plan: the descent.

    Returns:
        [starts, records] share of the exact loss after each of ``plan.records``. Cost per step: starts batch d k.
    """
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), objective)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(plan.seed), 1), plan.starts)
    state, shares = plan.start(objective, k, 0, "float32"), []
    for first, last in itertools.pairwise([0, *plan.records]):
        for i in range(first, last):
            drawn = _draw(keys, i, pixels, corruption, batch_size)
            state = _sampled_step(state, drawn, low, optimizer=plan.optimizer)
            if i % _STEPS_AHEAD == 0:
                jax.block_until_ready(state)
        learned = jax.tree.map(lambda a: np.asarray(a, np.float64), state[0])
        with solve_context():
            shares.append(np.asarray(_shares(learned, objective, share=denoising_share)))
    return np.stack(shares, axis=1)


_losses_of_batches = jax.jit(jax.vmap(_loss_of_batch, (None, 0, 0)))


def sampled_loss(
    network: Network, corruption: Corruption, pixels: Pixels, batch_size: int, batches: int, plan: Plan
) -> tuple[float, float]:
    """Mean of |Z^T V^T x' - x|^2 over sampled corruptions.

    Args:
        network: to be measured. corruption, pixels: what is drawn. batch_size: images per batch.
        batches: at least so many. plan: its seed, and as many batches at a time as it has starts.

    Returns:
        Mean and its standard error, squared pixel units.
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(plan.seed), 2), plan.starts)
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), network)
    draws = (_draw(keys, i, pixels, corruption, batch_size) for i in range(-(-batches // plan.starts)))
    losses = np.concatenate([np.asarray(_losses_of_batches(low, *drawn), np.float64) for drawn in draws])
    return float(losses.mean()), float(losses.std(ddof=1) / math.sqrt(len(losses)))
