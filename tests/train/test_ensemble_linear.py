"""Linear networks reach the closed-form minimum of Theorems 1 and 3."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mae_align as ma
from mae_align.corruption.base import CleanImages
from mae_align.models import MLPAutoencoder, ModelKind, Pixels
from mae_align.runtime.processes import train_mesh
from mae_align.train.ensemble import Training, TrainState, reconstruct
from mae_align.train.optimizer import OptimizerConfig, adamw
from tests import oracles

K = 4
SAMPLE = oracles.draw(0, 128)
IMAGES = SAMPLE.images.astype(np.float32)
MOMENTS = ma.Moments.from_arrays(IMAGES, SAMPLE.labels)
PIXELS = Pixels.of(MOMENTS)
SCALE = float(PIXELS.scale)


def trained(make_model, objective, learning_rate: float, steps: int) -> tuple[Training, TrainState]:
    """Full batches, the learning rate down to 0: its decay averages the masks out."""
    config = OptimizerConfig(
        total_steps=steps, learning_rate=learning_rate, warmup_steps=20, weight_decay=0.0, b2=0.999, clip_norm=None
    )
    training = Training(
        make_model,
        objective,
        adamw(config),
        batch_size=len(IMAGES),
        num_members=2,
        mesh=train_mesh(devices=jax.devices()[:1]),
    )
    state, _ = training.advance(training.init([0, 1]), training.put(IMAGES, SAMPLE.y), steps)
    return training, state


def affine(model: MLPAutoencoder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V [d, k], Z [k, d] and the bias [d] of a linear network, float64."""
    parts = (model.down[0].kernel, model.up[0].kernel, model.down[0].bias, model.up[0].bias)
    v, z, inner, outer = (np.asarray(part[...], np.float64) for part in parts)
    return v, z, inner @ z + outer


def check(loss: float, best: float) -> None:
    assert -1e-6 < loss / best - 1 < 1e-3


@pytest.mark.parametrize("corruption", [ma.PatchMasking((3, 5), 0.5), ma.GaussianNoise(SCALE)], ids=["mask", "noise"])
def test_theorem_3(corruption):
    def linear(rngs: nnx.Rngs) -> MLPAutoencoder:
        return MLPAutoencoder(PIXELS, hidden=(), activation=None, latent=K, corruption=corruption, rngs=rngs)

    training, state = trained(linear, reconstruct, 3e-2, 1000)
    best = ma.denoising_autoencoder(MOMENTS, corruption, K, pixel_noise=0.0).loss
    found = corruption.moments(CleanImages(MOMENTS.sxx, MOMENTS.mean_x, MOMENTS.image_shape))
    gram, cross = found.keep * found.gram, found.keep * found.cross
    assert best < 0.8 * np.trace(MOMENTS.sxx)
    for member in range(2):
        v, z, bias = affine(training.model(state, member))
        # E|b + Z^T V^T (x' - m) - (x - m)|^2 over images and corruption, E x' = m.
        f = v @ z
        error = np.trace(MOMENTS.sxx) - 2 * np.sum(f * cross) + np.trace(f.T @ gram @ f)
        check(error + SCALE**2 * bias @ bias, best)


class Supervised(nnx.Module):
    """A linear autoencoder and a linear head on its code."""

    kind = ModelKind.MATMUL

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = MLPAutoencoder(PIXELS, hidden=(), activation=None, latent=K, rngs=rngs)
        self.head = nnx.Linear(K, SAMPLE.y.shape[1], rngs=rngs)
        self.image_shape = self.inner.image_shape


LAM = 0.02  # per squared normalised pixel


def supervise_and_reconstruct(model, images, labels, key, member):
    del member
    reconstruction, metrics = model.inner.loss(images, key)
    error = model.head(model.inner.encode(images)) - labels
    return LAM * images[0].size * reconstruction + jnp.mean(jnp.sum(error * error, axis=1)), metrics


def test_theorem_1():
    training, state = trained(Supervised, supervise_and_reconstruct, 5e-2, 2500)
    lam = LAM / SCALE**2
    best = ma.supervised_autoencoder(MOMENTS, lam, K, pixel_noise=0.0).loss
    # Both parts count: neither PCA nor least squares alone is the answer.
    assert 0.2 < lam * np.trace(MOMENTS.sxx) / np.trace(MOMENTS.syy) < 20
    x = IMAGES.reshape(len(IMAGES), -1).astype(np.float64)
    x -= x.mean(0)
    for member in range(2):
        model = training.model(state, member)
        v, z, bias = affine(model.inner)
        code = x / SCALE @ v + np.asarray(model.inner.down[0].bias[...], np.float64)
        guess = code @ np.asarray(model.head.kernel[...], np.float64) + np.asarray(model.head.bias[...], np.float64)
        task = np.mean(np.sum((guess - SAMPLE.y) ** 2, axis=1))
        check(task + lam * np.mean(np.sum((SCALE * (x / SCALE @ v @ z + bias) - x) ** 2, axis=1)), best)
