"""Supervised classification on an encoder: fine-tuning, training from scratch, the supervised baseline."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mae_align.data.patches import ImageShape
from mae_align.models.base import Autoencoder, Metrics, ModelKind
from mae_align.models.layers import Dense
from mae_align.models.pixels import Array
from mae_align.runtime.errors import InputError


class ClassHead(Dense):
    """Linear head on features, float32, N(0, 0.01^2) at first as in the published fine-tuning of vision transformers.

    Raises:
        InputError: fewer than two classes.

    Example:
        >>> ClassHead(3, 2, rngs=nnx.Rngs(0))(jnp.ones((4, 3))).shape
        (4, 2)
    """

    def __init__(self, features: int, num_classes: int, *, rngs: nnx.Rngs) -> None:
        if num_classes < 2:
            raise InputError(f"num_classes={num_classes}: a task needs at least two classes")
        super().__init__(features, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)


def classification(logits: jax.Array, labels: Array) -> Metrics:
    """Cross-entropy in nats and accuracy, means over the batch.

    Args:
        logits: [b, q] float32.
        labels: [b] integers in 0..q - 1.

    Returns:
        {"cross_entropy", "accuracy"}, float32 scalars.

    Example:
        >>> found = classification(jnp.zeros((2, 2)), jnp.array([0, 1]))
        >>> round(float(found["cross_entropy"]), 4), float(found["accuracy"])
        (0.6931, 0.5)
    """
    # A product with one-hot rows: a gather's gradient is a scatter.
    chosen = jax.nn.one_hot(labels, logits.shape[1], dtype=jnp.float32)
    cross_entropy = -(chosen * jax.nn.log_softmax(logits)).sum(axis=1).mean()
    return {"cross_entropy": cross_entropy, "accuracy": (logits.argmax(axis=1) == labels).astype(jnp.float32).mean()}


class AutoencoderWithHead(nnx.Module):
    """An autoencoder and a linear head on its features; subclasses say how they are trained.

    Args:
        autoencoder: pretrained or not.
        num_classes: at least 2.
        rngs: of the head.

    Raises:
        InputError: fewer than two classes.
    """

    def __init__(self, autoencoder: Autoencoder, num_classes: int, *, rngs: nnx.Rngs) -> None:
        self.autoencoder = autoencoder
        self.head = ClassHead(autoencoder.latent, num_classes, rngs=rngs)

    @property
    def kind(self) -> ModelKind:
        """What the autoencoder's step is made of."""
        return self.autoencoder.kind

    @property
    def image_shape(self) -> ImageShape:
        """(h, w, c)."""
        return self.autoencoder.image_shape

    def features(self, images: Array) -> jax.Array:
        """Features of the autoencoder, [b, k] float32."""
        return self.autoencoder.features(images)

    def logits(self, images: Array) -> jax.Array:
        """Logits of the head, [b, classes] float32."""
        return self.head(self.features(images))


class Classifier(AutoencoderWithHead):
    """Linear classifier on the features of an encoder, both trained.

    The parameters of the autoencoder that its features do not use get gradients of zero.

    Example:
        >>> import numpy as np
        >>> from mae_align.models import MLPAutoencoder, Pixels
        >>> images = np.random.default_rng(0).normal(size=(6, 2, 2, 1))
        >>> inner = MLPAutoencoder(Pixels.from_images(images), hidden=(), latent=2, rngs=nnx.Rngs(0))
        >>> Classifier(inner, 3, rngs=nnx.Rngs(1)).logits(images).shape
        (6, 3)
    """

    def loss(self, images: Array, labels: Array, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Cross-entropy in nats.

        Args:
            images: [b, h, w, c] in stored pixel units.
            labels: [b] integer class labels.
            key: unused.

        Returns:
            float32 scalar, and {"cross_entropy", "accuracy"}.

        Raises:
            InputError: images of another shape.
        """
        del key
        metrics = classification(self.logits(images), labels)
        return metrics["cross_entropy"], metrics
