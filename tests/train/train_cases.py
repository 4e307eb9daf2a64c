"""Small trainings that several tests share; each compiles once."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mae_align as ma
from mae_align.models import GuidedAutoencoder, MaskedAutoencoder, MLPAutoencoder, Pixels
from mae_align.runtime.processes import train_mesh
from mae_align.train.ensemble import Training, guide, reconstruct
from mae_align.train.optimizer import OptimizerConfig, adamw
from mae_align.train.step import Program

N, SHAPE, CLASSES, BATCH = 43, (4, 4, 1), 3, 8
# Compiles in half the time.
QUICK = {"xla_backend_optimization_level": 0}
CONFIG = OptimizerConfig(total_steps=60, learning_rate=1e-2, warmup_steps=4, weight_decay=0.1, clip_norm=0.5)


@cache
def examples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, N)
    images = 90 + 40 * labels[:, None, None, None] + rng.integers(-60, 60, (N, *SHAPE))
    images[:, 0, 0] = 7  # constant: a gradient of 0
    return images.clip(0, 255).astype(np.uint8), labels


def guided(rngs: nnx.Rngs) -> GuidedAutoencoder:
    """Masks, labels and a head; nothing in it is symmetric between members."""
    pixels = Pixels.from_images(examples()[0])
    inner = MLPAutoencoder(pixels, hidden=(6,), latent=4, corruption=ma.PatchMasking(2, 0.5), rngs=rngs)
    return GuidedAutoencoder(inner, CLASSES, rngs=rngs)


def transformer(rngs: nnx.Rngs) -> MaskedAutoencoder:
    return MaskedAutoencoder(
        Pixels.from_images(examples()[0]),
        corruption=ma.FixedCountPatchMasking(2, num_visible=2),
        width=8,
        depth=1,
        heads=2,
        decoder_width=8,
        decoder_depth=1,
        decoder_heads=2,
        rngs=rngs,
    )


@cache
def training(
    members: int = 3,
    *,
    devices: int = 1,
    ensemble: int = 1,
    steps: int | None = None,
    program: Program | None = None,
    vit: bool = False,
) -> Training:
    return Training(
        transformer if vit else guided,
        reconstruct if vit else guide,
        adamw(CONFIG),
        batch_size=BATCH,
        num_members=members,
        mesh=train_mesh(ensemble, jax.devices()[:devices]),
        steps_per_call=steps,
        program=program,
        compiler_options=QUICK,
    )


def leaves(state) -> list[np.ndarray]:
    """Host copies of everything, keys as their data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.array(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(state)]


def same_bits(a, b) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
