"""Convolutional autoencoder, and what it shares with the residual one."""

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

Sides = tuple[int, int]


class ConvAutoencoder(BottleneckAutoencoder):
    """3x3 convolutions of stride 2, a dense code, and the mirror: nearest upsampling and 3x3 convolutions.

    Any image size: sides are halved rounding up, and upsampling cuts off what is over.

    Args:
        pixels: normalisation, and the image shape.
        widths: channels after each halving.
        latent: number of features k.
        activation: after every layer but the code and the output.
        corruption: an object of :mod:`mae_align.corruption`, or None.
        dtype: of the products; parameters are float32.
        rngs: of the initial parameters.

    Raises:
        InputError: no width, a width or latent below 1, or a corruption that does not fit the images.

    Example:
        >>> import numpy as np
        >>> images = np.random.default_rng(0).integers(0, 256, (5, 7, 7, 1), dtype=np.uint8)
        >>> model = ConvAutoencoder(Pixels.from_images(images), widths=(4, 8), latent=3, rngs=nnx.Rngs(0))
        >>> jax.eval_shape(model.reconstruct, images).shape
        (5, 7, 7, 1)
    """

    kind: ClassVar[ModelKind] = ModelKind.CONVOLUTION

    def __init__(
        self,
        pixels: Pixels,
        *,
        widths: tuple[int, ...] = (32, 64, 128),
        latent: int = 64,
        activation: Activation = jax.nn.gelu,
        corruption: Corruption | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(pixels, latent, corruption)
        check_positive("widths", widths)
        height, width, channels = self.image_shape
        self.sides = list_sides((height, width), (2,) * len(widths))
        self.code_shape = (*self.sides[-1], widths[-1])
        steps = list(itertools.pairwise((channels, *widths)))

        def conv(inputs: int, outputs: int, stride: int) -> nnx.Conv:
            return nnx.Conv(inputs, outputs, (3, 3), stride, dtype=dtype, rngs=rngs)

        self.down = nnx.List([conv(a, b, 2) for a, b in steps])
        self.to_code = Dense(math.prod(self.code_shape), latent, dtype=dtype, rngs=rngs)
        self.from_code = Dense(latent, math.prod(self.code_shape), dtype=dtype, rngs=rngs)
        self.up = nnx.List([conv(b, a, 1) for a, b in reversed(steps)])
        self.activation = activation

    def encoder(self, normalized: jax.Array) -> jax.Array:
        """Code of normalised images; see :meth:`BottleneckAutoencoder.encoder`."""
        x = normalized
        for conv in self.down:
            x = self.activation(conv(x))
        return self.to_code(x.reshape(len(x), -1))

    def decoder(self, code: jax.Array) -> jax.Array:
        """Normalised images of a code; see :meth:`BottleneckAutoencoder.decoder`."""
        x = self.from_code(code).reshape(-1, *self.code_shape)
        for conv, sides in zip(self.up, self.sides[-2::-1], strict=True):
            x = conv(upsample(self.activation(x), sides))
        return x


def check_positive(name: str, values: tuple[int, ...]) -> None:
    """Refuse an empty tuple and numbers below 1."""
    if not values or any(value < 1 for value in values):
        raise InputError(f"{name} {tuple(values)}: give at least one number, each at least 1")


def list_sides(sides: Sides, strides: tuple[int, ...]) -> tuple[Sides, ...]:
    """Height and width before and after each padded convolution of these strides.

    Example:
        >>> list_sides((28, 7), (2, 2))
        ((28, 7), (14, 4), (7, 2))
    """
    found = [sides]
    for stride in strides:
        found.append((-(-found[-1][0] // stride), -(-found[-1][1] // stride)))
    return tuple(found)


def upsample(x: jax.Array, sides: Sides) -> jax.Array:
    """Nearest upsampling by the whole factor that covers ``sides``, cut to them.

    Args:
        x: [b, h, w, c].
        sides: height and width of the result.

    Returns:
        [b, *sides, c], pixel (i, j) is x[i // factor, j // factor].

    Example:
        >>> upsample(jnp.arange(2.0).reshape(1, 1, 2, 1), (1, 3))[0, 0, :, 0].tolist()
        [0.0, 0.0, 1.0]
    """
    batch, height, width, channels = x.shape
    fy, fx = -(-sides[0] // height), -(-sides[1] // width)
    # A broadcast, whose gradient is a plain sum; that of a gather would be a scatter.
    spread = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, fy, width, fx, channels))
    return spread.reshape(batch, height * fy, width * fx, channels)[:, : sides[0], : sides[1]]
