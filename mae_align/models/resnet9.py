"""ResNet9 as the published classification on principal subspaces has it."""

from __future__ import annotations

import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mae_align.models.base import ModelKind
from mae_align.models.pixels import Pixels
from mae_align.models.resnet import ConvNorm
from mae_align.models.supervised import SupervisedNetwork
from mae_align.runtime.errors import InputError

_WIDTHS = (64, 128, 256, 512, 1028)
# Stages that end with a residual block; the stem is stage 0.
_RESIDUAL = frozenset({1, 3, 4})


class ResNet9(SupervisedNetwork):
    """Convolutions with batch normalisation and rectifier, each stage after the stem halving the image.

    With f(x) = relu(norm(conv 3x3(x)))::

        stem f, then four stages  x <- maxpool 2x2 (f(x)),   after stages 1, 3 and 4 also  x <- x + f(f(x))

    then the largest value of each channel and a linear head (Balestriero & LeCun, 2024, arXiv 2402.11337).

    Args:
        pixels: normalisation, and the image shape.
        num_classes: at least 2.
        widths: channels of the stem and the four stages; 1,028 of the last is as published.
        dtype: of the products; parameters and batch statistics are float32.
        rngs: of the initial parameters (He).

    Raises:
        InputError: images under 16 pixels, not five widths, a width below 1, fewer than two classes.

    Example:
        >>> import numpy as np
        >>> images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
        >>> model = ResNet9(Pixels.from_images(images), 10, widths=(2, 2, 2, 2, 4), rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> jax.eval_shape(model.features, images).shape
        (2, 4)
    """

    kind: ClassVar[ModelKind] = ModelKind.CONVOLUTION

    def __init__(
        self,
        pixels: Pixels,
        num_classes: int,
        *,
        widths: tuple[int, ...] = _WIDTHS,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if len(widths) != len(_WIDTHS) or min(widths) < 1:
            raise InputError(f"widths {tuple(widths)}: give {len(_WIDTHS)} numbers, each at least 1")
        if min(pixels.image_shape[:2]) < 2 ** (len(widths) - 1):
            height, width, _ = pixels.image_shape
            raise InputError(f"images of {height} x {width} are halved four times: give at least 16 x 16 pixels")
        super().__init__(pixels, widths[-1], num_classes, rngs=rngs)

        def conv(a: int, b: int) -> ConvNorm:
            return ConvNorm(a, b, 3, 1, dtype=dtype, rngs=rngs)

        self.stem = conv(self.image_shape[2], widths[0])
        self.stages = nnx.List([conv(a, b) for a, b in itertools.pairwise(widths)])
        self.residuals = nnx.List(
            [nnx.List([conv(w, w), conv(w, w)]) if stage in _RESIDUAL else None for stage, w in enumerate(widths)][1:]
        )

    def trunk(self, normalized: jax.Array) -> jax.Array:
        """Features of normalised images; see :meth:`SupervisedNetwork.trunk`."""
        x = jax.nn.relu(self.stem(normalized))
        for stage, residual in zip(self.stages, self.residuals, strict=True):
            x = nnx.max_pool(jax.nn.relu(stage(x)), (2, 2), (2, 2))
            if residual is not None:
                first, second = residual
                x = x + jax.nn.relu(second(jax.nn.relu(first(x))))
        return x.max(axis=(1, 2))
