"""Small networks of every kind, and images for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_align.corruption import FixedCountPatchMasking, GaussianNoise
from mae_align.models import (
    Autoencoder,
    ConvAutoencoder,
    Loss,
    MaskedAutoencoder,
    MLPAutoencoder,
    Pixels,
    ResNetAutoencoder,
)

Model = TypeVar("Model", bound=nnx.Module)
SHAPE = (4, 6, 2)
BATCH = 6
PATCH = (2, 3)
VIT = {
    "corruption": FixedCountPatchMasking(PATCH, num_visible=2),
    "width": 8,
    "depth": 1,
    "heads": 2,
    "decoder_width": 12,
    "decoder_depth": 1,
    "decoder_heads": 3,
}


def draw(n: int = BATCH, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Images [n, *shape] uint8 with a mean image that is not flat."""
    rng = np.random.default_rng(seed)
    mean = rng.uniform(40, 200, shape)
    return np.clip(mean + rng.normal(size=(n, *shape)) * 30, 0, 255).astype(np.uint8)


IMAGES = draw()
LABELS = np.arange(BATCH) % 3
PIXELS = Pixels.from_images(IMAGES)


def vit(rngs: nnx.Rngs, *, pixels: Pixels = PIXELS, **changes: object) -> MaskedAutoencoder:
    return MaskedAutoencoder(pixels, **{**VIT, **changes}, rngs=rngs)  # pyright: ignore[reportArgumentType]


def _noisy_mlp(rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> Autoencoder:
    return MLPAutoencoder(PIXELS, hidden=(7,), latent=3, corruption=GaussianNoise(20.0), dtype=dtype, rngs=rngs)


ZOO: dict[str, Callable[[nnx.Rngs, jax.typing.DTypeLike], Autoencoder]] = {
    "mlp": lambda rngs, dtype: MLPAutoencoder(PIXELS, hidden=(7, 5), latent=3, dtype=dtype, rngs=rngs),
    "noisy_mlp": _noisy_mlp,
    "conv": lambda rngs, dtype: ConvAutoencoder(PIXELS, widths=(4, 5), latent=3, dtype=dtype, rngs=rngs),
    "resnet": lambda rngs, dtype: ResNetAutoencoder(PIXELS, blocks=(1, 2), width=4, latent=3, dtype=dtype, rngs=rngs),
    "vit": lambda rngs, dtype: vit(rngs, dtype=dtype, objective=Loss.standard),
    "vit_all": lambda rngs, dtype: vit(rngs, dtype=dtype, depth=1, objective=Loss.matched),
}


def build(construct: Callable[[], Model], seed: int = 0) -> Model:
    """A module with parameters by NumPy: nothing to compile, biases and scales not at their special first values."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple, p: jax.ShapeDtypeStruct) -> jax.Array:
        center = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        spread = 0.2 if len(p.shape) == 1 else 1.0 / np.sqrt(np.prod(p.shape[:-1]))
        return jnp.asarray(center + spread * rng.normal(size=p.shape), p.dtype)

    graph, params, _ = nnx.split(nnx.eval_shape(construct), nnx.Param, ...)
    constants = jax.jit(lambda: nnx.state(construct(), nnx.Not(nnx.Param)))()
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, params), constants)


@functools.cache
def make(name: str, seed: int = 0, dtype: jax.typing.DTypeLike = jnp.float32) -> Autoencoder:
    return build(lambda: ZOO[name](nnx.Rngs(0), dtype), seed)
