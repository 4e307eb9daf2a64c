"""What a training step takes and gives: the state of an ensemble, its random numbers, and objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Metrics = dict[str, jax.Array]

# Streams of random numbers of a member, folded into its key before anything else: they never meet.
_WEIGHTS, _STEPS, _ORDERS = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """What the networks of an ensemble may differ in beside their seed.

    Attributes:
        learning_rate: [E] float32, factor on the optimiser's learning rate.
        guidance: [E] float32, weight of the labels. Inside a step both are the scalars of one member.
    """

    learning_rate: jax.Array
    guidance: jax.Array


Objective = Callable[[Any, jax.Array, Any, jax.Array, Member], tuple[jax.Array, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainState:
    """Everything that a run goes on from, for E networks; a pytree.

    Attributes:
        step: int32 scalar, steps made by every member.
        params: trained parameters; every array has a leading axis E.
        rest: the other variables (batch statistics, constants), leading axis E.
        opt_state: state of the optimiser, leading axis E.
        keys: [E] typed PRNG keys, constant over the run. member: see :class:`Member`.
    """

    step: jax.Array
    params: nnx.State
    rest: nnx.State
    opt_state: optax.OptState
    keys: jax.Array
    member: Member

    @property
    def num_members(self) -> int:
        """E."""
        return self.keys.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Orders:
    """The order of the images that each member is going through: a memo, remade where another one is asked for.

    Attributes:
        rows: [E, n] int32. epoch: [E] int32, -1 where there is none yet. keys: [E, ...] uint32, key data of whom it is.
    """

    rows: jax.Array
    epoch: jax.Array
    keys: jax.Array

    @classmethod
    def blank(cls, keys: jax.Array, n: int) -> Orders:
        """No permutation yet.

        Args:
            keys: [E] typed. n: number of images.
        """
        members = keys.shape[0]
        data = jnp.zeros_like(jax.random.key_data(keys))
        return cls(jnp.zeros((members, n), jnp.int32), jnp.full(members, -1, jnp.int32), data)

    def at(self, keys: jax.Array, epoch: jax.Array) -> Orders:
        """The permutations of these members in this epoch; costs a sort only where they are not at hand.

        Args:
            keys: [E] typed. epoch: int32 scalar.
        """
        data = jax.random.key_data(keys)
        known = (self.epoch == epoch).all() & (self.keys == data).all()
        rows = jax.lax.cond(known, lambda: self.rows, lambda: permutations(keys, epoch, self.rows.shape[1]))
        return Orders(rows, jnp.full_like(self.epoch, 0) + epoch, data)


def weights_key(key: jax.Array) -> jax.Array:
    """The key of a member's initial parameters."""
    return jax.random.fold_in(key, _WEIGHTS)


def step_key(key: jax.Array, step: jax.Array) -> jax.Array:
    """The key of everything random in one step of a member: masks and noise."""
    return jax.random.fold_in(jax.random.fold_in(key, _STEPS), step)


def permutations(keys: jax.Array, epoch: jax.Array, n: int) -> jax.Array:
    """The order in which each member goes through n images in one epoch; depends on its own key alone.

    Args:
        keys: [E] typed. epoch: int32 scalar. n: number of images.

    Returns:
        [E, n] int32, each row a permutation of 0..n - 1.
    """

    def one(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, _ORDERS), epoch)
        return jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))

    return jax.vmap(one)(keys)


def reconstruct(
    model: Any, images: jax.Array, labels: Any, key: jax.Array, member: Member
) -> tuple[jax.Array, Metrics]:
    """The autoencoder's own loss, labels unused.

    Args:
        model: with `loss(images, key)`. images: [b, h, w, c] float32 in stored units. labels: anything.
        key: PRNG key of the step. member: unused.

    Returns:
        The loss, float32 scalar, and the model's metrics.
    """
    del labels, member
    return model.loss(images, key)


def guide(model: Any, images: jax.Array, labels: Any, key: jax.Array, member: Member) -> tuple[jax.Array, Metrics]:
    """Reconstruction and, weighted by the member's guidance, the cross-entropy of the labels.

    Args:
        model: with `loss(images, labels, key, weight)`, as :class:`mae_align.models.GuidedAutoencoder`.
        images: [b, h, w, c] float32 in stored units. labels: [b] int32. key: PRNG key of the step.
        member: its guidance counts.

    Returns:
        The loss, float32 scalar, and the model's metrics.
    """
    return model.loss(images, labels, key, member.guidance)


def classify(model: Any, images: jax.Array, labels: Any, key: jax.Array, member: Member) -> tuple[jax.Array, Metrics]:
    """The classifier's own loss.

    Args:
        model: with `loss(images, labels, key)`, as :class:`mae_align.models.Classifier`.
        images: [b, h, w, c] float32 in stored units. labels: [b] int32. key: PRNG key of the step. member: unused.

    Returns:
        The loss, float32 scalar, and the model's metrics.
    """
    del member
    return model.loss(images, labels, key)
