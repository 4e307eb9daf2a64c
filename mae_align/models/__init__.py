"""Networks that learn by reconstruction (flax.nnx), in stored pixel units like the closed forms."""

from mae_align.models.base import Autoencoder, BottleneckAutoencoder, ModelKind
from mae_align.models.classifier import Classifier, classification
from mae_align.models.conv import ConvAutoencoder
from mae_align.models.guided import GuidedAutoencoder, scale_gradient
from mae_align.models.layers import gelu_exact
from mae_align.models.mlp import MLPAutoencoder
from mae_align.models.pixels import Constant, Pixels
from mae_align.models.resnet import ResNetAutoencoder
from mae_align.models.vit_mae import (
    VIT_BASE,
    VIT_LARGE,
    VIT_NANO,
    VIT_SMALL,
    VIT_TINY,
    AllPixels,
    MaskedAutoencoder,
    MaskedPatches,
    MaskedPrediction,
    VitSize,
)

__all__ = [
    "VIT_BASE",
    "VIT_LARGE",
    "VIT_NANO",
    "VIT_SMALL",
    "VIT_TINY",
    "AllPixels",
    "Autoencoder",
    "BottleneckAutoencoder",
    "Classifier",
    "Constant",
    "ConvAutoencoder",
    "GuidedAutoencoder",
    "MLPAutoencoder",
    "MaskedAutoencoder",
    "MaskedPatches",
    "MaskedPrediction",
    "ModelKind",
    "Pixels",
    "ResNetAutoencoder",
    "VitSize",
    "classification",
    "gelu_exact",
    "scale_gradient",
]
