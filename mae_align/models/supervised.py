"""Networks that classify images: a narrow convolutional one, a dense one, and what all have in common."""

from __future__ import annotations

import abc
import itertools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mae_align.models.base import ImageModel, Metrics, ModelKind
from mae_align.models.classifier import ClassHead, classification
from mae_align.models.conv import check_positive
from mae_align.models.layers import Dense
from mae_align.models.pixels import Pixels
from mae_align.runtime.checks import check_images
from mae_align.runtime.errors import InputError

_he_normal = nnx.initializers.he_normal()


class SupervisedNetwork(ImageModel):
    """A trunk of its own and a linear head, trained on the cross-entropy of the labels.

    Call ``train()`` before training steps and ``eval()`` before anything is predicted.

    Attributes:
        width: number of features before the head.
    """

    def __init__(self, pixels: Pixels, width: int, num_classes: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(pixels)
        self.width = int(width)
        self.head = ClassHead(width, num_classes, rngs=rngs)

    @abc.abstractmethod
    def trunk(self, normalized: jax.Array) -> jax.Array:
        """Features [b, k] of normalised images [b, h, w, c], in the compute dtype."""

    def features(self, images: jax.Array) -> jax.Array:
        """What the head is given, [b, k] float32, of images [b, h, w, c] in stored pixel units."""
        self.check_shape(images)
        return self.trunk(self.pixels.normalize(images)).astype(jnp.float32)

    def logits(self, images: jax.Array) -> jax.Array:
        """[b, classes] float32 of images [b, h, w, c] in stored pixel units."""
        return self.head(self.features(images))

    def loss(self, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Cross-entropy in nats; see :meth:`mae_align.models.Classifier.loss`."""
        del key
        metrics = classification(self.logits(images), labels)
        return metrics["cross_entropy"], metrics


class ConvClassifier(SupervisedNetwork):
    """A narrow network for CPUs: 2x2 blocks of pixels as channels, 3x3 convolutions, the mean over the last map.

    All convolutions but the first have stride 2. Blocks of pixels as channels make the first one a layer of 6x6 pixels
    and stride 2, and several times as fast as one on three channels.

    Args:
        pixels: normalisation, and the image shape.
        num_classes: at least 2.
        widths: channels of the convolutions.
        batch_norm: batch normalisation after each; without it a bias.
        dtype: of the products; parameters are float32.
        rngs: of the initial parameters (He normal).

    Raises:
        InputError: no width, a width below 1, fewer than two classes.

    Example:
        >>> images = np.random.default_rng(0).integers(0, 256, (5, 7, 7, 1), dtype=np.uint8)
        >>> model = ConvClassifier(Pixels.from_images(images), 3, widths=(4, 8), rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> jax.eval_shape(model.logits, images).shape
        (5, 3)
    """

    kind: ClassVar[ModelKind] = ModelKind.CONVOLUTION

    def __init__(
        self,
        pixels: Pixels,
        num_classes: int,
        *,
        widths: tuple[int, ...] = (24, 48, 96),
        batch_norm: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_positive("widths", widths)
        super().__init__(pixels, widths[-1], num_classes, rngs=rngs)
        steps = itertools.pairwise((4 * self.image_shape[2], *widths))
        self.convolutions = nnx.List(
            [
                nnx.Conv(
                    a,
                    b,
                    (3, 3),
                    2 if index else 1,
                    use_bias=not batch_norm,
                    kernel_init=_he_normal,
                    dtype=dtype,
                    rngs=rngs,
                )
                for index, (a, b) in enumerate(steps)
            ]
        )
        self.norms = _norms(widths, dtype, rngs) if batch_norm else None

    def trunk(self, normalized: jax.Array) -> jax.Array:
        """Features of normalised images; see :meth:`SupervisedNetwork.trunk`."""
        return _through(self.convolutions, self.norms, space_to_depth(normalized)).mean(axis=(1, 2))


class MLPClassifier(SupervisedNetwork):
    """Dense layers with rectifiers.

    Args:
        pixels: normalisation, and the image shape.
        num_classes: at least 2.
        hidden: widths of the layers; the published network has :func:`linear_widths`.
        batch_norm: batch normalisation before each rectifier.
        dtype: of the products; parameters are float32.
        rngs: of the initial parameters (He normal).

    Raises:
        InputError: no hidden layer, a width below 1, fewer than two classes.

    Example:
        >>> images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
        >>> model = MLPClassifier(Pixels.from_images(images), 3, hidden=(8,), rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> model.logits(images).shape
        (5, 3)
    """

    kind: ClassVar[ModelKind] = ModelKind.MATMUL

    def __init__(
        self,
        pixels: Pixels,
        num_classes: int,
        *,
        hidden: tuple[int, ...] = (512, 256),
        batch_norm: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_positive("hidden", hidden)
        super().__init__(pixels, hidden[-1], num_classes, rngs=rngs)
        widths = itertools.pairwise((math.prod(self.image_shape), *hidden))
        self.layers = nnx.List([Dense(a, b, dtype=dtype, kernel_init=_he_normal, rngs=rngs) for a, b in widths])
        self.norms = _norms(hidden, dtype, rngs) if batch_norm else None

    def trunk(self, normalized: jax.Array) -> jax.Array:
        """Features of normalised images; see :meth:`SupervisedNetwork.trunk`."""
        return _through(self.layers, self.norms, normalized.reshape(len(normalized), -1))


def linear_widths(inputs: int, outputs: int, depth: int) -> tuple[int, ...]:
    """Widths of the hidden layers between inputs and outputs, evenly spaced, as published.

    Args:
        inputs, outputs: of the network.
        depth: numbers in the spacing, both ends included.

    Returns:
        depth - 2 widths, rounded down.

    Example:
        >>> linear_widths(3072, 10, 4)
        (2051, 1030)
    """
    return tuple(int(width) for width in np.linspace(inputs, outputs, depth)[1:-1])


def space_to_depth(x: jax.Array) -> jax.Array:
    """2x2 blocks of pixels as channels; an odd side is filled up with zeros.

    Args:
        x: [b, h, w, c].

    Returns:
        [b, ceil(h / 2), ceil(w / 2), 4 c]; channel (2 i + j) c + k is pixel (i, j) of the block, channel k.

    Example:
        >>> space_to_depth(jnp.arange(4.0).reshape(1, 2, 2, 1)).tolist()
        [[[[0.0, 1.0, 2.0, 3.0]]]]
    """
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    blocks = x.reshape(batch, rows, 2, columns, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, rows, columns, 4 * channels)


def predicted_classes(model: nnx.Module, images: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """The class of the largest logit, in the mode that the model is in.

    Args:
        model: with ``logits(images)``, as of :meth:`mae_align.train.ensemble.Training.model`.
        images: [n, h, w, c] in stored pixel units.
        batch_size: images at a time; the last batch is filled up, so that one program serves.

    Returns:
        [n] int64.

    Raises:
        InputError: images of another shape than the model's, or a batch size below 1.

    Example:
        >>> images = np.random.default_rng(0).normal(size=(5, 4, 4, 1))
        >>> model = MLPClassifier(Pixels.from_images(images), 3, hidden=(8,), rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> predicted_classes(model, images, 2).shape
        (5,)
    """
    images = check_images(images)
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give at least 1")
    size = min(batch_size, len(images))
    found = []
    for start in range(0, len(images), size):
        rows = images[start : start + size]
        full = np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)]).astype(np.float32)
        found.append(np.asarray(_logits(model, jnp.asarray(full)))[: len(rows)].argmax(axis=1))
    return np.concatenate(found)


@jax.jit
def _logits(model: SupervisedNetwork, images: jax.Array) -> jax.Array:
    return model.logits(images)


def _through(layers: nnx.List, norms: nnx.List[nnx.BatchNorm] | None, x: jax.Array) -> jax.Array:
    """Each layer, its normalisation where there is one, and a rectifier."""
    for index, layer in enumerate(layers):
        x = layer(x)
        x = jax.nn.relu(x if norms is None else norms[index](x))
    return x


def _norms(widths: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.List[nnx.BatchNorm]:
    """Batch normalisation of each layer: float32 statistics, running ones of momentum 0.9."""
    return nnx.List([nnx.BatchNorm(w, momentum=0.9, use_fast_variance=False, dtype=dtype, rngs=rngs) for w in widths])
