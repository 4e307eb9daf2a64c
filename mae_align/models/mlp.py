"""Autoencoder of dense layers; without hidden layers and activation it is the linear network of the closed forms."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mae_align.corruption import Corruption
from mae_align.models.base import BottleneckAutoencoder, ModelKind
from mae_align.models.layers import Activation, Dense
from mae_align.models.pixels import Pixels
from mae_align.runtime.errors import InputError


class MLPAutoencoder(BottleneckAutoencoder):
    """Dense layers d -> hidden -> latent -> decoder_hidden -> d, the activation between them.

    With ``hidden=()`` and ``activation=None`` it is affine, f(x') = b + Z^T V^T x': its loss converges to Theorem 3's
    minimum over tr cov(x), to PCA's without a corruption. With ``decoder_hidden=()`` the decoder alone is affine,
    f(x') = b + Z^T g(x'): Theorem 2's network, whose loss on its training images PCA's bounds from below.

    Args:
        pixels: normalisation, and the image shape.
        hidden: widths of the encoder's hidden layers.
        decoder_hidden: widths of the decoder's, None for the encoder's reversed.
        latent: number of features k.
        activation: between layers (not on the code), None for the identity.
        corruption: an object of :mod:`mae_align.corruption`, or None.
        dtype: of the products; parameters are float32.
        rngs: of the initial parameters (Xavier uniform, zero biases).

    Raises:
        InputError: a width or latent below 1, or a corruption that does not fit the images.

    Example:
        >>> import numpy as np
        >>> images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
        >>> model = MLPAutoencoder(Pixels.from_images(images), hidden=(8,), latent=3, rngs=nnx.Rngs(0))
        >>> model.encode(images).shape, model.reconstruct(images).shape
        ((5, 3), (5, 4, 4, 1))
    """

    kind: ClassVar[ModelKind] = ModelKind.MATMUL

    def __init__(
        self,
        pixels: Pixels,
        *,
        hidden: tuple[int, ...] = (512, 256),
        decoder_hidden: tuple[int, ...] | None = None,
        latent: int = 64,
        activation: Activation | None = jax.nn.gelu,
        corruption: Corruption | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(pixels, latent, corruption)
        back = tuple(hidden[::-1]) if decoder_hidden is None else tuple(decoder_hidden)
        if any(width < 1 for width in (*hidden, *back)):
            raise InputError(f"hidden widths {tuple(hidden)} and {back}: each must be at least 1")
        pixel_values = math.prod(self.image_shape)
        self.down = _stack((pixel_values, *hidden, latent), dtype, rngs)
        self.up = _stack((latent, *back, pixel_values), dtype, rngs)
        self.activation = activation

    def encoder(self, normalized: jax.Array) -> jax.Array:
        """Code of normalised images; see :meth:`BottleneckAutoencoder.encoder`."""
        return self._through(self.down, normalized.reshape(len(normalized), -1))

    def decoder(self, code: jax.Array) -> jax.Array:
        """Normalised images of a code; see :meth:`BottleneckAutoencoder.decoder`."""
        return self._through(self.up, code).reshape(-1, *self.image_shape)

    def _through(self, layers: nnx.List[Dense], x: jax.Array) -> jax.Array:
        for index, layer in enumerate(layers):
            if index and self.activation is not None:
                x = self.activation(x)
            x = layer(x)
        return x


def _stack(widths: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.List[Dense]:
    return nnx.List([Dense(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)])
