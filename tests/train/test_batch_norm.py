"""Batch statistics taken anew on given images."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from mae_align.models import BottleneckAutoencoder, ModelKind, Pixels
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import train_mesh
from mae_align.train.batch_norm import recalibrated
from mae_align.train.ensemble import Training, TrainState, reconstruct
from mae_align.train.optimizer import OptimizerConfig, adamw
from mae_align.train.step import Program
from tests.train.train_cases import QUICK, examples

IMAGES = examples()[0][:32]


class Normed(BottleneckAutoencoder):
    """Two dense layers with batch normalisation on the way to the code, one on the way back."""

    kind = ModelKind.MATMUL

    def __init__(self, pixels: Pixels, *, rngs: nnx.Rngs) -> None:
        super().__init__(pixels, 3, None)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in ((16, 5), (5, 3), (3, 16))])
        self.norms = nnx.List([nnx.BatchNorm(b, momentum=0.9, use_fast_variance=False, rngs=rngs) for b in (5, 3, 16)])

    def encoder(self, normalized: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norms[0](self.layers[0](normalized.reshape(-1, 16))))
        return self.norms[1](self.layers[1](x))

    def decoder(self, code: jax.Array) -> jax.Array:
        return self.norms[2](self.layers[2](code)).reshape(-1, 4, 4, 1)


def started(program: Program, batch: int) -> tuple[Training, TrainState]:
    pixels = Pixels.from_images(IMAGES)
    training = Training(
        lambda rngs: Normed(pixels, rngs=rngs),
        reconstruct,
        adamw(OptimizerConfig(total_steps=1)),
        batch_size=batch,
        num_members=2,
        mesh=train_mesh(devices=jax.devices()[:1]),
        program=program,
        compiler_options=QUICK,
    )
    return training, training.init([0, 1])


def dense(model: Normed, layer: int, x: np.ndarray) -> np.ndarray:
    linear: Any = model.layers[layer]
    return x @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...])


def normal(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def flat(model: Normed) -> np.ndarray:
    return ((IMAGES - np.float64(model.pixel_mean[...])) / np.float64(model.pixel_scale[...])).reshape(32, 16)


def test_features_are_normalised_by_the_statistics_of_their_images():
    """One batch of all images: in eval mode each layer is normalised by them."""
    training, state = started(Program.ONE_BY_ONE, 32)
    clean = recalibrated(training, state, IMAGES)
    old, new = (training.features(s, IMAGES, 32) for s in (state, clean))
    for member in range(2):
        model = training.model(state, member)
        expected = normal(dense(model, 1, np.maximum(normal(dense(model, 0, flat(model))), 0.0)))
        np.testing.assert_allclose(new[member], expected, atol=1e-4)
        assert np.abs(old[member] - expected).max() > 0.1
    assert clean.params is state.params
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(s.rest) for s in (state, clean)), strict=True):
        # The layer of the way back keeps its statistics, too.
        on_the_way = jax.tree_util.keystr(path).startswith(("['norms'][0]", "['norms'][1]"))
        assert np.array_equal(a, b) != on_the_way and (a.dtype, a.sharding) == (b.dtype, b.sharding)


def test_statistics_are_means_over_batches():
    training, state = started(Program.VMAPPED_SCAN, 8)
    clean = recalibrated(training, state, IMAGES)
    model, found = training.model(state, 0), training.model(clean, 0).norms[0]
    first = dense(model, 0, flat(model))
    np.testing.assert_allclose(found.mean[...], first.mean(0), atol=1e-5)
    batches = first[np.random.default_rng(0).permutation(32)].reshape(4, 8, 5)
    np.testing.assert_allclose(found.var[...], batches.var(1).mean(0), rtol=1e-4)
    with pytest.raises(InputError, match="7 images are fewer than a batch of 8"):
        recalibrated(training, state, IMAGES[:7])
