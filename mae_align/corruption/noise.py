"""Additive Gaussian noise, with one standard deviation or one per pixel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.corruption.base import CleanImages, CorruptionMoments, ExactCorruption, need_signal
from mae_align.data.patches import ImageShape
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianNoise(ExactCorruption):
    """Additive Gaussian noise x' = x + sigma * eps: G = S + diag(sigma^2), A = S.

    One sigma for all pixels leaves the encoder's span at PCA's (the paper's corollary); one per pixel moves it.

    Attributes:
        sigma: standard deviation in the units of the stored pixels, a number or an array [h, w, c].

    Raises:
        InputError: negative or infinite sigma; a shape that is not the image's.

    Example:
        >>> GaussianNoise(2.0).moments(CleanImages(np.eye(4), np.zeros(4), (2, 2, 1))).gram[0, 0]
        np.float64(5.0)
    """

    sigma: float | np.ndarray

    def __post_init__(self) -> None:
        sigma = np.asarray(self.sigma, np.float64)
        if not np.isfinite(sigma).all() or (sigma < 0).any():
            raise InputError("sigma must be finite and not negative (in the units of the stored pixels)")

    def check(self, image_shape: ImageShape) -> None:
        """Refuse images of another shape than sigma's."""
        shape = np.shape(self.sigma)
        if shape and shape != tuple(image_shape):
            raise InputError(f"sigma has shape {list(shape)}: give a number or the image's {list(image_shape)}")

    def push(self, before: CorruptionMoments, clean: CleanImages) -> CorruptionMoments:
        """G gains diag(sigma^2); A and the mean stay. Cost d^2."""
        self.check(clean.image_shape)
        sigma = np.asarray(self.sigma, np.float64)
        if sigma.any():
            need_signal(before)
        variance = np.broadcast_to(sigma**2, clean.image_shape).reshape(-1)
        return before._replace(gram=before.gram + np.diag(variance) / (before.keep or 1.0))

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """Images plus noise (nothing is dropped, so the fill is not used)."""
        del fill
        noise = jax.random.normal(key, images.shape, jnp.float32)
        return images.astype(jnp.float32) + jnp.broadcast_to(jnp.asarray(self.sigma, jnp.float32), images.shape) * noise
