"""Corruptions that are only known by sampling: second moments by averaging over images and draws, with their error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.corruption.base import CleanImages, Corruption, CorruptionMoments
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class SampledCorruption(Corruption):
    """Any function (image, key) -> image as a corruption: G and A estimated from draws on the images themselves.

    Every image is corrupted ``views`` times. G is the covariance of all corrupted images, A theirs with the clean ones;
    the spread of the per-view estimates gives the standard error of their mean. It covers the randomness of the
    corruption, for these images; a function that uses no key has none. Where the clean covariance carries a pixel noise
    floor, the images that are corrupted carry Gaussian noise of the same variance.

    Attributes:
        function: (image [h, w, c] float32, PRNG key) -> [h, w, c]; traceable by JAX.
        views: draws per image, at least 1; with 1 the standard error is NaN.
        seed: of the estimate.
        batch_size: images at a time; it does not change the draws.

    Raises:
        InputError: no draws; (once the images are known) a function that changes their shape or gives NaN.

    Example:
        >>> flip = SampledCorruption(lambda image, key: jnp.where(jax.random.bernoulli(key), image[:, ::-1], image), 4)
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> clean = CleanImages(np.cov(x.reshape(50, 4).T, bias=True), x.reshape(50, 4).mean(0), (2, 2, 1), images=x)
        >>> found = flip.moments(clean)
        >>> found.gram.shape, 0.0 < found.cross_se < 0.5
        ((4, 4), True)
    """

    function: Callable[[jax.Array, jax.Array], jax.Array]
    views: int
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("views", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise InputError(f"{name}={value}: give a whole number of at least 1")

    def moments(self, clean: CleanImages) -> CorruptionMoments:
        """Estimates from ``views`` passes over the images, accumulated in float64.

        Args:
            clean: the clean images, with ``images``.

        Returns:
            Estimated moments with their standard errors, keep = 1. Cost: views 4 n d^2; memory 5 d^2.

        Raises:
            InputError: no images, images of another shape, moments that are not about the mean.
        """
        if clean.images is None:
            raise InputError(f"{self.name} has no exact moments: pass the training images (images=...)")
        if not clean.centered:
            raise InputError("a sampled corruption needs moments about the mean: make them with center=True")
        gram, cross, mean = _Running(), _Running(), _Running()
        moved = np.zeros((len(clean.sxx),) * 2)
        for view in range(self.views):
            own_gram, own_cross, own_mean = self._one_view(clean, jax.random.fold_in(jax.random.key(self.seed), view))
            gram.add(own_gram)
            cross.add(own_cross)
            step = own_mean - mean.value
            mean.add(own_mean)
            # Views have means of their own; the covariance over all draws adds their spread.
            moved += step[:, None] * (own_mean - mean.value)
        spread = moved / self.views
        return CorruptionMoments(
            gram.value + spread, cross.value, 1.0, mean.value, gram.relative_error(), cross.relative_error()
        )

    def _one_view(self, clean: CleanImages, key: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """cov(x') [d, d] and cov(x', x) [d, d] about this view's means, and E[x'] - mean_x [d]."""
        d = len(clean.sxx)
        gram, cross, total, start, count = np.zeros((d, d)), np.zeros((d, d)), np.zeros(d), np.zeros(d), 0
        for images in _batches(clean, self.batch_size):
            numbers = np.arange(count, count + len(images), dtype=np.uint32)
            noise = np.float32(np.sqrt(clean.pixel_noise))
            x, out = (
                np.asarray(a, np.float64)
                for a in _corrupted(images.astype(np.float32), numbers, key, noise, function=self.function)
            )
            if out.shape != images.shape:
                raise InputError(f"the function turns an image {list(images.shape[1:])} into {list(out.shape[1:])}")
            if not np.isfinite(out).all():
                raise InputError(f"{self.name} gives NaN or infinite pixels")
            x, out = (a.reshape(len(a), d) - clean.mean_x for a in (x, out))
            gram += out.T @ out
            cross += out.T @ x
            total += out.sum(0)
            start += x.sum(0)
            count += len(images)
        if count == 0:
            raise InputError("there are no images to corrupt: give at least one")
        total, start = total / count, start / count
        gram, cross = gram / count - total[:, None] * total, cross / count - total[:, None] * start
        return gram, cross, total

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """One draw of the function per image."""
        del fill
        keys = jax.random.split(key, len(images))
        return jax.vmap(self.function)(images.astype(jnp.float32), keys).astype(jnp.float32)


class _Running:
    """Mean of matrices seen one by one, and the summed squares of their deviations (Welford)."""

    def __init__(self) -> None:
        self.count, self.value, self.squares = 0, np.zeros(()), 0.0

    def add(self, matrix: np.ndarray) -> None:
        self.count += 1
        step = matrix - self.value
        self.value = self.value + step / self.count
        self.squares += float(np.sum(step * (matrix - self.value)))

    def relative_error(self) -> float:
        """Standard error of the mean over the mean, both in Frobenius norm."""
        if self.count < 2:
            return float("nan")
        error = np.sqrt(max(self.squares, 0.0) / (self.count - 1) / self.count)
        size = np.linalg.norm(self.value)
        return float(error / size) if size > 0 else (float("inf") if error > 0 else 0.0)


@partial(jax.jit, static_argnames="function")
def _corrupted(
    images: jax.Array,
    numbers: jax.Array,
    key: jax.Array,
    deviation: jax.Array,
    *,
    function: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Images with noise, and their corruption; every image draws by its number, whatever the batch."""

    def one(image: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        own, floor = jax.random.split(jax.random.fold_in(key, number))
        noisy = image + deviation * jax.random.normal(floor, image.shape, jnp.float32)
        return noisy, function(noisy, own)

    return jax.vmap(one)(images, numbers)


def _batches(clean: CleanImages, size: int) -> Iterator[np.ndarray]:
    """The images, at most ``size`` at a time."""
    images = clean.images
    parts: Iterable[np.ndarray] = images() if callable(images) else (images,)  # pyright: ignore[reportAssignmentType]
    for part in parts:
        if np.shape(part)[1:] != tuple(clean.image_shape):
            raise InputError(
                f"images have shape {list(np.shape(part))}, the moments are of {list(clean.image_shape)}: "
                "give the same images"
            )
        for begin in range(0, len(part), size):
            yield np.asarray(part[begin : begin + size])
