"""How parameters move: AdamW with warm-up and cosine decay, and gradient descent with or without momentum.

Each function returns an Optax transformation for the parameters of *one* network. Members of an ensemble have one each
under `vmap`, so that norms are clipped per member; a member's own learning rate is a factor on what comes out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, warm-up and cosine decay of the learning rate, gradient clipping.

    Attributes:
        total_steps: length of the run; the learning rate is 0 from there on.
        learning_rate: largest value of the schedule.
        warmup_steps: steps of linear growth before the cosine.
        weight_decay: decoupled, times the learning rate; matrices and kernels only.
        b1, b2: decay rates of the first and second moment (those of the published masked autoencoder).
        eps: added to the root of the second moment. With 1e-6 one and many devices agree to about 1e-7 after 50 steps;
            with 1e-8 gradients of constant pixels, which are rounding alone, are blown up to 1e-4.
        clip_norm: largest norm of a member's gradient; None for no clipping.

    Raises:
        InputError: a value outside its range.

    Example:
        >>> OptimizerConfig(total_steps=100, warmup_steps=10).eps
        1e-06
    """

    total_steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-6
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _check_schedule(self.learning_rate, self.warmup_steps, self.total_steps)
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay={self.weight_decay}: give a number of at least 0")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise InputError(f"b1={self.b1}, b2={self.b2}: decay rates lie in [0, 1)")
        if not 0 < self.eps < math.inf:
            raise InputError(f"eps={self.eps}: give a positive number")
        _check_clip(self.clip_norm)


def warmup_cosine(learning_rate: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate over steps: linear growth, then half a cosine down to 0.

    With peak L, warm-up w and total T: ``L (t + 1) / w`` for t < w, then ``L (1 + cos(pi (t - w) / (T - w))) / 2``. The
    first step moves already, and after T nothing does.

    Args:
        learning_rate: L > 0.
        warmup_steps: w in 0..T - 1.
        total_steps: T >= 1.

    Returns:
        Function of the step (int32 scalar, from 0) to a float32 scalar. Traceable.

    Raises:
        InputError: a value outside its range.

    Example:
        >>> rate = warmup_cosine(1.0, 2, 4)
        >>> [round(float(rate(step)), 3) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    _check_schedule(learning_rate, warmup_steps, total_steps)

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((t - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        growth = jnp.minimum((t + 1.0) / max(warmup_steps, 1), 1.0)
        return learning_rate * growth * (1.0 + jnp.cos(jnp.pi * progress)) / 2.0

    return rate


def adamw(
    config: OptimizerConfig, apart: Callable[[jax.tree_util.KeyPath], bool] | None = None
) -> optax.GradientTransformation:
    """AdamW of a configuration: clip, scale by Adam, add decay, times -learning rate.

    Decay acts on parameters of two or more axes: not on biases, scales of norms and other vectors.

    Args:
        config: see :class:`OptimizerConfig`.
        apart: which parameters, by their paths, have a norm of their own to be clipped by, so that they do not shrink
            the step of the others (:func:`mae_align.models.in_head`); None: all have one norm together.

    Returns:
        A transformation of one network's parameters; its state is two copies of them, float32.

    Example:
        >>> rule = adamw(OptimizerConfig(total_steps=10, learning_rate=0.5, weight_decay=0.1))
        >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
        >>> updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
        >>> updates["kernel"].round(3).tolist(), updates["bias"].tolist()
        ([[-0.05...]], [-0.0])
    """
    return optax.chain(
        *_clipping(config.clip_norm, apart),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_decays),
        optax.scale_by_learning_rate(warmup_cosine(config.learning_rate, config.warmup_steps, config.total_steps)),
    )


def momentum(
    learning_rate: float | optax.Schedule, beta: float = 0.9, *, clip_norm: float | None = None
) -> optax.GradientTransformation:
    """Gradient descent with momentum: v <- beta v + g, parameters <- parameters - learning_rate v.

    Args:
        learning_rate: a number, or a schedule such as :func:`warmup_cosine`.
        beta: in [0, 1); 0 is plain gradient descent.
        clip_norm: largest norm of a member's gradient; None for no clipping.

    Returns:
        A transformation of one network's parameters; its state is one copy of them (none for beta = 0).

    Raises:
        InputError: a value outside its range.

    Example:
        >>> rule = momentum(0.5, 0.0)
        >>> rule.update(jnp.ones(2), rule.init(jnp.ones(2)))[0].tolist()
        [-0.5, -0.5]
    """
    if not callable(learning_rate):
        _check_schedule(learning_rate, 0, 1)
    if not 0 <= beta < 1:
        raise InputError(f"beta={beta}: momentum lies in [0, 1)")
    _check_clip(clip_norm)
    # A decay of 0 would carry a copy of the gradient along for nothing.
    return optax.chain(*_clipping(clip_norm), optax.sgd(learning_rate, momentum=beta or None))


def _decays(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _clipping(
    norm: float | None, apart: Callable[[jax.tree_util.KeyPath], bool] | None = None
) -> tuple[optax.GradientTransformation, ...]:
    if norm is None:
        return ()
    clip = optax.clip_by_global_norm(norm)
    if apart is None:
        return (clip,)

    def those(wanted: bool) -> Callable[[optax.Params], optax.Params]:
        return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: apart(path) is wanted, params)

    # One link of the chain, so that the states after it stand where they do without.
    return (optax.chain(optax.masked(clip, those(True)), optax.masked(clip, those(False))),)


def _check_clip(norm: float | None) -> None:
    if norm is not None and not 0 < norm < math.inf:
        raise InputError(f"clip_norm={norm}: give a positive number, or None for no clipping")


def _check_schedule(learning_rate: float, warmup_steps: int, total_steps: int) -> None:
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate={learning_rate}: give a positive number")
    if not (total_steps >= 1 and 0 <= warmup_steps < total_steps):
        raise InputError(
            f"total_steps={total_steps}, warmup_steps={warmup_steps}: give at least one step and a shorter warm-up"
        )
