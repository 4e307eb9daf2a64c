"""Residual autoencoder: a ResNet of basic blocks (He et al., 2016) and its mirror."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mae_align.corruption import Corruption
from mae_align.models.base import BottleneckAutoencoder, ModelKind
from mae_align.models.conv import check_positive, list_sides, upsample
from mae_align.models.layers import Dense
from mae_align.models.pixels import Pixels

_he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nnx.Module):
    """Padded convolution without bias, then batch normalisation (float32 statistics, running ones of momentum 0.9).

    Example:
        >>> layer = ConvNorm(1, 2, 3, 2, rngs=nnx.Rngs(0))
        >>> layer.eval()
        >>> jax.eval_shape(layer, jnp.ones((3, 5, 5, 1))).shape
        (3, 3, 3, 2)
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.conv = nnx.Conv(
            inputs, outputs, (size, size), stride, use_bias=False, kernel_init=_he_normal, dtype=dtype, rngs=rngs
        )
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, use_fast_variance=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, inputs] to [b, ceil(h / stride), ceil(w / stride), outputs]."""
        return self.norm(self.conv(x))


class BasicBlock(nnx.Module):
    """relu(shortcut(x) + f(x)) with f two 3x3 convolutions; the shortcut is the identity where shapes allow.

    Example:
        >>> block = BasicBlock(1, 2, 2, rngs=nnx.Rngs(0))
        >>> block.eval()
        >>> jax.eval_shape(block, jnp.ones((3, 5, 5, 1))).shape
        (3, 3, 3, 2)
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.first = ConvNorm(inputs, outputs, 3, stride, dtype=dtype, rngs=rngs)
        self.second = ConvNorm(outputs, outputs, 3, 1, dtype=dtype, rngs=rngs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else ConvNorm(inputs, outputs, 1, stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, inputs] to [b, ceil(h / stride), ceil(w / stride), outputs]."""
        kept = x if self.shortcut is None else self.shortcut(x)
        return jax.nn.relu(kept + self.second(jax.nn.relu(self.first(x))))


class ResNetAutoencoder(BottleneckAutoencoder):
    """ResNet encoder, a dense code from all of its last map, and the mirrored decoder.

    Stage i has ``blocks[i]`` basic blocks of ``width * 2^i`` channels; all but the first halve the image. The decoder
    undoes the stages in reverse by nearest upsampling before the last block of each. ``blocks=(2, 2, 2, 2)`` with width
    64 is ResNet-18, ``(3, 4, 6, 3)`` ResNet-34.

    Call ``train()`` before training steps and ``eval()`` before features are taken: batch normalisation differs. After
    training with a corruption its running statistics are of corrupted images; for features of clean ones give it theirs
    (:func:`mae_align.train.batch_norm.recalibrated`).

    Args:
        pixels: normalisation, and the image shape.
        blocks: basic blocks per stage.
        width: channels of the first stage.
        latent: number of features k.
        stem_stride: stride of the first convolution, of size max(3, 2 stride - 1): 1 for small images (3x3), 4 for
            images of 224 pixels (7x7; the published one has 7x7 of stride 2 and a pooling).
        corruption: an object of :mod:`mae_align.corruption`, or None.
        dtype: of the products; parameters are float32.
        rngs: of the initial parameters.

    Raises:
        InputError: no stage, a number below 1, or a corruption that does not fit the images.

    Example:
        >>> import numpy as np
        >>> images = np.random.default_rng(0).integers(0, 256, (5, 7, 7, 1), dtype=np.uint8)
        >>> model = ResNetAutoencoder(Pixels.from_images(images), blocks=(1,), width=4, latent=3, rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> jax.eval_shape(model.reconstruct, images).shape
        (5, 7, 7, 1)
    """

    kind: ClassVar[ModelKind] = ModelKind.CONVOLUTION

    def __init__(
        self,
        pixels: Pixels,
        *,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        width: int = 64,
        latent: int = 64,
        stem_stride: int = 1,
        corruption: Corruption | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(pixels, latent, corruption)
        check_positive("blocks", blocks)
        check_positive("width and stem_stride", (width, stem_stride))
        height, across, channels = self.image_shape
        strides = (1, *(2 for _ in blocks[1:]))
        widths = [width * 2**stage for stage in range(len(blocks))]
        self.sides = list_sides((height, across), (stem_stride, *strides))
        self.code_shape = (*self.sides[-1], widths[-1])

        def stage(shapes: list[tuple[int, int, int]]) -> nnx.List[BasicBlock]:
            return nnx.List([BasicBlock(a, b, stride, dtype=dtype, rngs=rngs) for a, b, stride in shapes])

        before = [width, *widths[:-1]]
        self.stem = ConvNorm(channels, width, max(3, 2 * stem_stride - 1), stem_stride, dtype=dtype, rngs=rngs)
        self.down = nnx.List(
            [
                stage([(a, b, stride), *[(b, b, 1)] * (count - 1)])
                for a, b, stride, count in zip(before, widths, strides, blocks, strict=True)
            ]
        )
        self.to_code = Dense(math.prod(self.code_shape), latent, dtype=dtype, rngs=rngs)
        self.from_code = Dense(latent, math.prod(self.code_shape), dtype=dtype, rngs=rngs)
        self.up = nnx.List(
            [
                stage([*[(b, b, 1)] * (count - 1), (b, a, 1)])
                for a, b, count in reversed(list(zip(before, widths, blocks, strict=True)))
            ]
        )
        self.out = nnx.Conv(width, channels, (3, 3), dtype=dtype, rngs=rngs)

    def encoder(self, normalized: jax.Array) -> jax.Array:
        """Code of normalised images; see :meth:`BottleneckAutoencoder.encoder`."""
        x = jax.nn.relu(self.stem(normalized))
        for blocks in self.down:
            for block in blocks:
                x = block(x)
        return self.to_code(x.reshape(len(x), -1))

    def decoder(self, code: jax.Array) -> jax.Array:
        """Normalised images of a code; see :meth:`BottleneckAutoencoder.decoder`."""
        x = jax.nn.relu(self.from_code(code)).reshape(-1, *self.code_shape)
        for blocks, sides in zip(self.up, self.sides[-2:0:-1], strict=True):
            *first, last = blocks
            for block in first:
                x = block(x)
            x = last(upsample(x, sides))
        return self.out(upsample(x, self.sides[0]))
