"""Batch statistics of a trained network, taken anew on the images that its features will be of."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import place
from mae_align.train.batches import check_examples
from mae_align.train.ensemble import Training, TrainState
from mae_align.train.step import compile_statistics


def has_batch_statistics(state: TrainState) -> bool:
    """Whether networks normalise by running statistics of batches.

    Args:
        state: of any training.
    """
    return bool(jax.tree.leaves(nnx.filter_state(state.rest, nnx.BatchStat)))


def recalibrated(training: Training, state: TrainState, images: np.ndarray) -> TrainState:
    """The state with the batch statistics of given images, to take features of such images with.

    A corruption leaves the statistics of corrupted images, which are not those of clean ones. Here they are the means,
    over all whole batches of the training's size in an order drawn once, of the mean and the variance in each batch,
    every layer behind layers that normalise by that batch.

    Args:
        training: of the state.
        state: it stays as it is.
        images: [n, h, w, c] in stored units, at least a batch, the same in every process.

    Returns:
        The same parameters, and new statistics of the layers on the way to the features; layers behind keep theirs.
        Without batch statistics the state itself. Cost: one pass to the features of each member, and one program.

    Raises:
        InputError: images of another shape, NaN, or fewer than a batch.

    Source: Wu & Johnson, Rethinking "Batch" in BatchNorm (2021), precise statistics.

    Example:
        >>> from mae_align.models import MLPAutoencoder, Pixels
        >>> from mae_align.train.optimizer import OptimizerConfig, adamw
        >>> from mae_align.train.ensemble import reconstruct
        >>> x = np.random.default_rng(0).normal(size=(8, 2, 2, 1))
        >>> make = lambda rngs: MLPAutoencoder(Pixels.from_images(x), hidden=(), latent=2, rngs=rngs)
        >>> rule = adamw(OptimizerConfig(total_steps=1))
        >>> training = Training(make, reconstruct, rule, batch_size=8, num_members=1)
        >>> state = training.init([0])
        >>> has_batch_statistics(state), recalibrated(training, state, x) is state
        (False, True)
    """
    if not has_batch_statistics(state):
        return state
    images, _ = check_examples(images, None, training.image_shape, None)
    size = training.batch_size
    if len(images) < size:
        raise InputError(f"{len(images)} images are fewer than a batch of {size}: give more")
    order = np.random.default_rng(0).permutation(len(images))
    batches = order[: len(order) // size * size].reshape(-1, size)
    statistics = compile_statistics(training.program, training.recipe)
    sums: dict[str, np.ndarray] = {}
    for rows in batches:
        part = images[rows]
        found = statistics(state, place(part.shape, training.recipe.sharding("data"), part.__getitem__))
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            name = jax.tree_util.keystr(path)
            sums[name] = sums.get(name, np.zeros(leaf.shape)) + leaf

    def put(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        total = sums.get(jax.tree_util.keystr(path))
        if total is None:
            return leaf
        return place(
            leaf.shape, training.recipe.sharding("ensemble"), (total / len(batches)).astype(leaf.dtype).__getitem__
        )

    return dataclasses.replace(state, rest=jax.tree_util.tree_map_with_path(put, state.rest))
