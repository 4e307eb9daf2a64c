"""Autoencoder with a supervised head: reconstruction guided by labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mae_align.models.base import Metrics
from mae_align.models.classifier import AutoencoderWithHead, classification
from mae_align.models.pixels import Array


@jax.custom_vjp
def scale_gradient(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x itself; its gradient is multiplied by the weight.

    Args:
        x: any shape.
        weight: scalar; it gets no gradient.

    Returns:
        x.

    Example:
        >>> jax.grad(lambda x: 3 * scale_gradient(x, jnp.float32(0.5)))(1.0).item()
        1.5
    """
    del weight
    return x


def _scale_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, weight


def _scale_backward(weight: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    return grad * weight, jnp.zeros_like(weight)


scale_gradient.defvjp(_scale_forward, _scale_backward)


def in_head(path: jax.tree_util.KeyPath) -> bool:
    """Whether a parameter of a :class:`GuidedAutoencoder` is its head's.

    Args:
        path: of the parameter in the tree of all parameters.

    Example:
        >>> jax.tree_util.tree_map_with_path(lambda path, _: in_head(path), {"autoencoder": {"head": 1}, "head": [1]})
        {'autoencoder': {'head': False}, 'head': [True]}
    """
    return path[:1] == (jax.tree_util.DictKey("head"),)


class GuidedAutoencoder(AutoencoderWithHead):
    """An autoencoder and a linear head on its features.

    loss = reconstruction + weight * cross-entropy for the autoencoder, while the head gets the full gradient of the
    cross-entropy whatever the weight: at weight 0 it is an online probe that leaves the gradient of the autoencoder
    alone, and its batch statistics. Its steps too, where gradients are not clipped or the head's are clipped apart:
    ``adamw(config, in_head)``.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from mae_align.models import MLPAutoencoder, Pixels
        >>> images = np.random.default_rng(0).normal(size=(6, 2, 2, 1))
        >>> inner = MLPAutoencoder(Pixels.from_images(images), hidden=(), latent=2, rngs=nnx.Rngs(0))
        >>> model = GuidedAutoencoder(inner, 3, rngs=nnx.Rngs(1))
        >>> loss, metrics = model.loss(images, np.array([0, 1, 2, 0, 1, 2]), jax.random.key(0), jnp.float32(0.1))
        >>> sorted(metrics)
        ['accuracy', 'cross_entropy', 'reconstruction']
    """

    def reconstruct(self, images: Array) -> jax.Array:
        """Reconstruction of the autoencoder, [b, h, w, c] float32 in stored pixel units."""
        return self.autoencoder.reconstruct(images)

    def loss(self, images: Array, labels: Array, key: jax.Array, weight: jax.Array) -> tuple[jax.Array, Metrics]:
        """Reconstruction + weight * cross-entropy.

        Args:
            images: [b, h, w, c] clean, in stored pixel units.
            labels: [b] integer class labels.
            key: PRNG key of the corruption.
            weight: float32 scalar, may be traced.

        Returns:
            float32 scalar, and {"reconstruction", "cross_entropy", "accuracy"}.

        Raises:
            InputError: images of another shape.
        """
        reconstruction, _, features = self.autoencoder.loss_and_features(images, key)
        metrics = classification(self.head(scale_gradient(features, weight)), labels)
        gradients = reconstruction + metrics["cross_entropy"]
        # The value that belongs to the encoder's gradient, with the gradient of the line above.
        value = jax.lax.stop_gradient(reconstruction + weight * metrics["cross_entropy"])
        return value + (gradients - jax.lax.stop_gradient(gradients)), {"reconstruction": reconstruction, **metrics}
