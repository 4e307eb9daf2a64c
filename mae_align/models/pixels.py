"""The units in which networks see images and losses are measured."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_align.data.patches import ImageShape
from mae_align.moments.moments import Moments
from mae_align.runtime.checks import check_images
from mae_align.runtime.errors import InputError

# Images, labels and constants may be NumPy's.
Array = jax.Array | np.ndarray
# Images of one sum in float64.
_CHUNK = 1024


class Constant(nnx.Variable):
    """A value that is saved with the model and not trained."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """Mean image and one scale of the stored pixels.

    The scale is ``scale^2 = tr cov(x) / d``: a squared error of 1 per pixel is that of predicting the mean image. It is
    one number on purpose: a scale per channel or pixel would be another target operator, that is another problem than
    the closed form's.

    Attributes:
        mean: [h, w, c] float32 mean image.
        scale: scalar float32, both in stored pixel units; of published networks [1, 1, 1, c], one per channel.

    Example:
        >>> pixels = Pixels.from_images(np.array([0.0, 4.0]).reshape(2, 1, 1, 1))
        >>> float(pixels.scale), pixels.normalize(np.full((1, 1, 1, 1), 4.0)).tolist()
        (2.0, [[[[1.0]]]])
    """

    mean: Array
    scale: Array

    @classmethod
    def of(cls, moments: Moments) -> Pixels:
        """The mean and scale that moments record.

        Args:
            moments: of the training images, about the mean.

        Returns:
            NumPy arrays. Cost d^2.

        Raises:
            InputError: moments about zero, or images that are all the same.

        Example:
            >>> x = np.array([0.0, 4.0]).reshape(2, 1, 1, 1)
            >>> float(Pixels.of(Moments.from_arrays(x)).scale)
            2.0
        """
        if not moments.center:
            raise InputError("these moments are about zero: make them with center=True to normalise images with them")
        return _pixels(moments.mean_x.reshape(moments.image_shape), float(np.trace(moments.sxx)) / moments.num_pixels)

    @classmethod
    def from_images(cls, images: np.ndarray) -> Pixels:
        """The mean and scale of images in memory, summed in float64.

        Args:
            images: [n, h, w, c] uint8 or floating.

        Returns:
            NumPy arrays. Two passes over the images.

        Raises:
            InputError: wrong rank or dtype, NaN, or images that are all the same.

        Example:
            >>> Pixels.from_images(np.array([0, 4], np.uint8).reshape(2, 1, 1, 1)).mean.tolist()
            [[[2.0]]]
        """
        images = check_images(images)
        chunks = [slice(start, start + _CHUNK) for start in range(0, len(images), _CHUNK)]
        mean, variance = np.zeros(images.shape[1:]), 0.0
        for part in chunks:
            mean += images[part].sum(axis=0, dtype=np.float64) / len(images)
        for part in chunks:
            variance += float(np.square(images[part] - mean).sum()) / images.size
        return _pixels(mean, variance)

    @property
    def image_shape(self) -> ImageShape:
        """(h, w, c)."""
        height, width, channels = self.mean.shape
        return height, width, channels

    def normalize(self, images: Array) -> jax.Array:
        """(images - mean) / scale.

        Args:
            images: [b, h, w, c] in stored pixel units, any numeric dtype.

        Returns:
            [b, h, w, c] float32. Traceable.

        Example:
            >>> Pixels(np.ones((1, 1, 1), np.float32), np.float32(2)).normalize(np.full((1, 1, 1, 1), 5)).item()
            2.0
        """
        return (jnp.asarray(images).astype(jnp.float32) - jnp.asarray(self.mean)[None]) / self.scale

    def restore(self, normalized: Array) -> jax.Array:
        """Mean + scale * normalized, the inverse of :meth:`normalize`.

        Args:
            normalized: [b, h, w, c].

        Returns:
            [b, h, w, c] float32 in stored pixel units.

        Example:
            >>> Pixels(np.ones((1, 1, 1), np.float32), np.float32(2)).restore(np.full((1, 1, 1, 1), 2.0)).item()
            5.0
        """
        return jnp.asarray(normalized).astype(jnp.float32) * self.scale + jnp.asarray(self.mean)[None]


def _pixels(mean: np.ndarray, variance: float) -> Pixels:
    if not variance > 0.0:
        raise InputError("all images are the same: there is no variance to reconstruct, give other images")
    return Pixels(np.asarray(mean, np.float32), np.asarray(np.sqrt(variance), np.float32))
