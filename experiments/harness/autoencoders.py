"""The autoencoders that experiments train: which kind and how large, in one set of words."""

from __future__ import annotations

import dataclasses
import enum
from typing import Annotated, Any

import jax.numpy as jnp
from flax import nnx

from experiments.harness.config import Bounds, Count, Widths
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
    mlp_widths: Widths = (256,)
    """Widths of the encoder's dense layers; the decoder mirrors them, as it does those of the other kinds."""
    conv_widths: Widths = (32, 64, 128)
    """Channels of the convolutional encoder after each halving."""
    resnet_blocks: Annotated[tuple[int, ...], Bounds(least=1)] = (3, 4, 6, 3)
    """Residual blocks of each stage; 3 4 6 3 are those of ResNet-34."""
    resnet_width: Count = 64
    """Channels of the first residual stage; each further one has twice as many."""
    stem_stride: Count = 1
    """Stride of the first convolution of a residual network: 4 for images of 224 pixels."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that this kind has: widths, channels or blocks.

        Example:
            >>> Autoencoder(Kind.conv, conv_widths=(4, 8)).sizes
            (4, 8)
        """
        return {Kind.mlp: self.mlp_widths, Kind.conv: self.conv_widths, Kind.resnet: self.resnet_blocks}[self.kind]

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
            return MLPAutoencoder(pixels, hidden=self.mlp_widths, **common)
        if self.kind is Kind.conv:
            return ConvAutoencoder(pixels, widths=self.conv_widths, **common)
        return ResNetAutoencoder(
            pixels, blocks=self.resnet_blocks, width=self.resnet_width, stem_stride=self.stem_stride, **common
        )
