"""The autoencoders that experiments train: which kind and how large, in one set of words."""

from __future__ import annotations

import dataclasses
import enum
from typing import Annotated, Any

import jax.numpy as jnp
from flax import nnx

from experiments.harness.config import Bounds, Count
from mae_align.models import ConvAutoencoder, MLPAutoencoder, Pixels, ResNetAutoencoder
from mae_align.models.base import BottleneckAutoencoder


class Kind(enum.Enum):
    """Kinds of autoencoders."""

    mlp = "mlp"
    conv = "conv"
    resnet = "resnet"


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Kind and sizes of autoencoders; the same words in every experiment."""

    kind: Kind = Kind.mlp
    """Dense layers, strided convolutions, or residual blocks."""
    widths: Annotated[tuple[int, ...], Bounds(least=1)] = (256,)
    """Widths of the encoder's dense layers, or its channels after each halving by convolutions, or numbers of residual
    blocks per stage; the decoder mirrors them."""
    resnet_width: Count = 64
    """Channels of the first residual stage; each further one has twice as many."""
    stem_stride: Count = 1
    """Stride of the first convolution of a residual network: 4 for images of 224 pixels."""

    def make(
        self, pixels: Pixels, *, latent: int, bfloat16: bool, rngs: nnx.Rngs, **options: Any
    ) -> BottleneckAutoencoder:
        """A network with random weights.

        Args:
            pixels: how images are normalised.
            latent: size of the code.
            bfloat16: whether it computes in bfloat16.
            rngs: of the weights.
            options: of all kinds, such as the corruption.

        Raises:
            InputError: sizes that do not fit the images or each other.
        """
        common = {"latent": latent, "dtype": jnp.bfloat16 if bfloat16 else jnp.float32, "rngs": rngs, **options}
        if self.kind is Kind.mlp:
            return MLPAutoencoder(pixels, hidden=self.widths, **common)
        if self.kind is Kind.conv:
            return ConvAutoencoder(pixels, widths=self.widths, **common)
        return ResNetAutoencoder(
            pixels, blocks=self.widths, width=self.resnet_width, stem_stride=self.stem_stride, **common
        )
