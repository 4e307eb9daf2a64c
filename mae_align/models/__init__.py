"""Networks that learn by reconstruction or from labels (flax.nnx), in stored pixel units like the closed forms.

There is no mathematics here: the loss that a linear network minimises is that of docs/theory.md, section 3.
"""

from mae_align.models.base import Autoencoder, BottleneckAutoencoder, ImageModel, ModelKind
from mae_align.models.classifier import Classifier, classification
from mae_align.models.conv import ConvAutoencoder
from mae_align.models.export import Layout, export_encoder
from mae_align.models.guided import GuidedAutoencoder, in_head, scale_gradient
from mae_align.models.layers import gelu_exact
from mae_align.models.mlp import MLPAutoencoder
from mae_align.models.pixels import Constant, Pixels
from mae_align.models.published import Pooling, PublishedAutoencoder, load_mae
from mae_align.models.resnet import ResNetAutoencoder
from mae_align.models.resnet9 import ResNet9
from mae_align.models.supervised import ConvClassifier, MLPClassifier, SupervisedNetwork, predicted_classes
from mae_align.models.vit_mae import (
    VIT_BASE,
    VIT_LARGE,
    VIT_NANO,
    VIT_SMALL,
    VIT_TINY,
    Loss,
    MaskedAutoencoder,
    MaskedPrediction,
    VitSize,
)

__all__ = [
    "VIT_BASE",
    "VIT_LARGE",
    "VIT_NANO",
    "VIT_SMALL",
    "VIT_TINY",
    "Autoencoder",
    "BottleneckAutoencoder",
    "Classifier",
    "Constant",
    "ConvAutoencoder",
    "ConvClassifier",
    "GuidedAutoencoder",
    "ImageModel",
    "Layout",
    "Loss",
    "MLPAutoencoder",
    "MLPClassifier",
    "MaskedAutoencoder",
    "MaskedPrediction",
    "ModelKind",
    "Pixels",
    "Pooling",
    "PublishedAutoencoder",
    "ResNet9",
    "ResNetAutoencoder",
    "SupervisedNetwork",
    "VitSize",
    "classification",
    "export_encoder",
    "gelu_exact",
    "in_head",
    "load_mae",
    "predicted_classes",
    "scale_gradient",
]
