"""What every network is, and every autoencoder: features, reconstruction and a loss of images in stored pixel units."""

from __future__ import annotations

import abc
import enum
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mae_align.corruption import Corruption
from mae_align.data.patches import ImageShape
from mae_align.models.pixels import Array, Constant, Pixels
from mae_align.runtime.errors import InputError

Metrics = dict[str, jax.Array]


class ModelKind(enum.Enum):
    """What a model's step is made of; the training program is chosen by it and the backend."""

    MATMUL = enum.auto()
    CONVOLUTION = enum.auto()


class ImageModel(nnx.Module):
    """A network on images in stored pixel units.

    Train and eval mode (batch normalisation) are the caller's: ``model.train()``, ``model.eval()``.

    Attributes:
        image_shape: (h, w, c).
        kind: what its step is made of.
    """

    kind: ClassVar[ModelKind]

    def __init__(self, pixels: Pixels) -> None:
        self.image_shape: ImageShape = pixels.image_shape
        self.pixel_mean = Constant(jnp.asarray(pixels.mean, jnp.float32))
        self.pixel_scale = Constant(jnp.asarray(pixels.scale, jnp.float32))

    @property
    def pixels(self) -> Pixels:
        """The normalisation of this model."""
        return Pixels(self.pixel_mean[...], self.pixel_scale[...])

    def check_shape(self, images: Array) -> None:
        """Refuse images that are not [b, h, w, c] with this model's (h, w, c)."""
        if tuple(images.shape[1:]) != self.image_shape:
            raise InputError(
                f"images have shape {list(images.shape)}: this model takes [b, {', '.join(map(str, self.image_shape))}]"
            )


class Autoencoder(ImageModel):
    """An autoencoder of images in stored pixel units.

    Nothing is masked or corrupted unless the method takes a key.

    Attributes:
        latent: number of features k.
    """

    def __init__(self, pixels: Pixels, latent: int) -> None:
        if latent < 1:
            raise InputError(f"latent={latent}: give at least one feature")
        super().__init__(pixels)
        self.latent = int(latent)

    @abc.abstractmethod
    def encode(self, images: Array) -> jax.Array:
        """Features [b, k] float32 of the images [b, h, w, c] as given, in stored pixel units."""

    @abc.abstractmethod
    def reconstruct(self, images: Array) -> jax.Array:
        """Reconstruction [b, h, w, c] float32 of the images [b, h, w, c] as given, both in stored pixel units."""

    @abc.abstractmethod
    def loss(self, images: Array, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Training loss, a mean over batch and pixels in normalised units.

        Args:
            images: [b, h, w, c] clean, in stored pixel units.
            key: PRNG key of the corruption.

        Returns:
            float32 scalar, and {"reconstruction": the same}.

        Raises:
            InputError: images of another shape.
        """

    def loss_and_features(self, images: Array, key: jax.Array) -> tuple[jax.Array, Metrics, jax.Array]:
        """:meth:`loss` and :meth:`encode` of the clean images, for training with a head on the features.

        Args:
            images: [b, h, w, c] clean, in stored pixel units.
            key: PRNG key of the corruption.

        Returns:
            The loss, its metrics, features [b, k] float32. Costs another pass of the encoder over all of the image,
            which leaves running batch statistics as the loss has made them.
        """
        loss, metrics = self.loss(images, key)
        return loss, metrics, nnx.clone(self).encode(images)

    def features(self, images: Array) -> jax.Array:
        """:meth:`encode`: what probes are given."""
        return self.encode(images)


class BottleneckAutoencoder(Autoencoder):
    """An autoencoder decoder(encoder(x')) of a corrupted image, with the clean image as target.

    Loss |x - f(x')|^2 / d in normalised units: the objective of Theorem 3 with a nonlinear f.

    Attributes:
        corruption: an object of :mod:`mae_align.corruption`, or None for x' = x.
    """

    def __init__(self, pixels: Pixels, latent: int, corruption: Corruption | None) -> None:
        super().__init__(pixels, latent)
        if corruption is not None:
            corruption.check(self.image_shape)
        self.corruption = corruption

    @abc.abstractmethod
    def encoder(self, normalized: jax.Array) -> jax.Array:
        """Code [b, k] of normalised images [b, h, w, c], in the compute dtype."""

    @abc.abstractmethod
    def decoder(self, code: jax.Array) -> jax.Array:
        """Normalised images [b, h, w, c] of a code [b, k], in the compute dtype."""

    def encode(self, images: Array) -> jax.Array:
        """Code of the images as given, [b, k] float32; see :meth:`Autoencoder.encode`."""
        self.check_shape(images)
        return self.encoder(self.pixels.normalize(images)).astype(jnp.float32)

    def reconstruct(self, images: Array) -> jax.Array:
        """Decoded code of the images as given, [b, h, w, c] float32; see :meth:`Autoencoder.reconstruct`."""
        self.check_shape(images)
        return self.pixels.restore(self.decoder(self.encoder(self.pixels.normalize(images))))

    def loss(self, images: Array, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """|x - f(x')|^2 / d, mean over the batch; see :meth:`Autoencoder.loss`."""
        loss, _ = self._loss_and_code(images, key)
        return loss, {"reconstruction": loss}

    def loss_and_features(self, images: Array, key: jax.Array) -> tuple[jax.Array, Metrics, jax.Array]:
        """One pass where nothing is corrupted: the features are the code that is decoded."""
        if self.corruption is not None:
            return super().loss_and_features(images, key)
        loss, code = self._loss_and_code(images, key)
        return loss, {"reconstruction": loss}, code.astype(jnp.float32)

    def _loss_and_code(self, images: Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        self.check_shape(images)
        pixels = self.pixels
        target = source = pixels.normalize(images)
        if self.corruption is not None:
            source = pixels.normalize(
                self.corruption.sample(key, jnp.asarray(images, jnp.float32), jnp.asarray(pixels.mean))
            )
        code = self.encoder(source)
        return jnp.mean(jnp.square(self.decoder(code).astype(jnp.float32) - target)), code
