"""Linear maps of the image (blur, downsampling, any matrix), and corruptions one after another.

x' = B x has G = B S B^T and A = B S.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.corruption.base import CleanImages, Corruption, CorruptionMoments, ExactCorruption
from mae_align.corruption.sampled import SampledCorruption
from mae_align.data.patches import ImageShape, PatchSize, patch_grid, patch_hw
from mae_align.runtime.errors import InputError


class LinearMap(ExactCorruption):
    """A fixed linear map of the stored pixels; subclasses say how it acts."""

    @abc.abstractmethod
    def apply(self, images: np.ndarray) -> np.ndarray:
        """B x for float64 images [m, h, w, c]."""

    @abc.abstractmethod
    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """B x; nothing is random and nothing is dropped."""

    def push(self, before: CorruptionMoments, clean: CleanImages) -> CorruptionMoments:
        """G = B gram B^T, A = B cross, E[x'] = B E[x]."""

        def on_columns(a: np.ndarray) -> np.ndarray:
            return self.apply(a.T.reshape(-1, *clean.image_shape)).reshape(a.T.shape).T

        half = on_columns(before.gram)
        gram = on_columns(np.ascontiguousarray(half.T))
        mean = on_columns((clean.mean_x + before.offset)[:, None])[:, 0]
        return before._replace(gram=(gram + gram.T) / 2, cross=on_columns(before.cross), offset=mean - clean.mean_x)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearCorruption(LinearMap):
    """x' = B x for any matrix.

    Attributes:
        matrix: [d, d] B, acting on images flattened in (h, w, c) order.

    Raises:
        InputError: not a square matrix of finite numbers.

    Example:
        >>> LinearCorruption(0.5 * np.eye(4)).apply(np.ones((1, 2, 2, 1))).sum()
        np.float64(2.0)
    """

    matrix: np.ndarray

    def __post_init__(self) -> None:
        matrix = np.asarray(self.matrix, np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.isfinite(matrix).all():
            raise InputError(f"matrix of shape {list(matrix.shape)}: give finite numbers [d, d]")
        object.__setattr__(self, "matrix", matrix)

    @classmethod
    def from_function(cls, function: Callable[[np.ndarray], np.ndarray], image_shape: ImageShape) -> Self:
        """The matrix of a linear function of a batch of images.

        Args:
            function: float64 [m, h, w, c] -> [m, h, w, c].
            image_shape: (h, w, c).

        Returns:
            The corruption. Cost: the function of d images, d^2 memory.

        Raises:
            InputError: a function that changes the shape or is not linear.

        Example:
            >>> LinearCorruption.from_function(lambda x: x[:, ::-1], (2, 2, 1)).matrix[0].tolist()
            [0.0, 0.0, 1.0, 0.0]
        """
        d = int(np.prod(image_shape))
        out = np.asarray(function(np.eye(d).reshape(d, *image_shape)), np.float64)
        if out.shape != (d, *image_shape):
            raise InputError(f"the function turns {[d, *image_shape]} into {list(out.shape)}: it must keep the shape")
        made = cls(out.reshape(d, d).T)
        probe = np.random.default_rng(0).normal(size=(2, *image_shape))
        direct = np.asarray(function(probe), np.float64)
        if np.abs(made.apply(probe) - direct).max() > 1e-5 * max(np.abs(direct).max(), 1.0):
            raise InputError("the function is not linear: give it to SampledCorruption")
        return made

    @staticmethod
    def gaussian_blur(sigma: float) -> GaussianBlur:
        """Blur with a Gaussian of this standard deviation in pixels."""
        return GaussianBlur(sigma)

    @staticmethod
    def average_pool(factor: PatchSize) -> AveragePool:
        """Downsampling by averages over cells of this size, spread back over the cell."""
        return AveragePool(factor)

    def apply(self, images: np.ndarray) -> np.ndarray:
        """B x.

        Raises:
            InputError: images of another size.
        """
        self._check(images.shape)
        return (images.reshape(len(images), -1) @ self.matrix.T).reshape(images.shape)

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """B x."""
        del key, fill
        self._check(images.shape)
        flat = images.astype(jnp.float32).reshape(len(images), -1)
        out = jnp.dot(flat, jnp.asarray(self.matrix.T, jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return out.reshape(images.shape)

    def _check(self, shape: tuple[int, ...]) -> None:
        if int(np.prod(shape[1:])) != len(self.matrix):
            raise InputError(f"matrix for {len(self.matrix)} pixel values, images {list(shape[1:])}: give one size")


class SeparableMap(LinearMap):
    """A linear map along the height and then along the width, the same for every channel."""

    @abc.abstractmethod
    def axis_matrices(self, image_shape: ImageShape) -> tuple[np.ndarray, np.ndarray]:
        """[h, h] and [w, w] matrices."""

    def apply(self, images: np.ndarray) -> np.ndarray:
        """B x along both axes. Cost h + w per pixel value."""
        down, across = self.axis_matrices(images.shape[1:])
        return np.einsum(
            "ij,mjwc->miwc", down, np.einsum("ij,mhjc->mhic", across, images, optimize=True), optimize=True
        )

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """B x."""
        del key, fill
        _, height, width, channels = images.shape
        down, across = (jnp.asarray(a, jnp.float32) for a in self.axis_matrices((height, width, channels)))
        high = jax.lax.Precision.HIGHEST
        return jnp.einsum("ik,jl,mklc->mijc", down, across, images.astype(jnp.float32), precision=high)


@dataclasses.dataclass(frozen=True)
class GaussianBlur(SeparableMap):
    """Blur with a Gaussian kernel, its weights scaled to sum to 1 inside the image (a constant image stays).

    Attributes:
        sigma: standard deviation of the kernel in pixels, positive.

    Raises:
        InputError: sigma not positive and finite.

    Example:
        >>> GaussianBlur(1.0).apply(np.ones((1, 3, 3, 1))).round(6).min()
        np.float64(1.0)
    """

    sigma: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.sigma) and self.sigma > 0):
            raise InputError(f"blur of sigma={self.sigma}: give a positive number of pixels")

    def axis_matrices(self, image_shape: ImageShape) -> tuple[np.ndarray, np.ndarray]:
        """Row-normalised Gaussian weights along each axis."""
        return _gaussian(image_shape[0], self.sigma), _gaussian(image_shape[1], self.sigma)


@dataclasses.dataclass(frozen=True)
class AveragePool(SeparableMap):
    """Downsampling: every cell becomes its average. Cells at the border are cut off by the image.

    Attributes:
        factor: int or (h, w), size of a cell in pixels.

    Raises:
        InputError: a bad size; (once the image is known) a cell larger than the image.

    Example:
        >>> AveragePool(2).apply(np.arange(4.0).reshape(1, 2, 2, 1)).reshape(4).tolist()
        [1.5, 1.5, 1.5, 1.5]
    """

    factor: PatchSize

    def __post_init__(self) -> None:
        patch_hw(self.factor)

    def axis_matrices(self, image_shape: ImageShape) -> tuple[np.ndarray, np.ndarray]:
        """Block averages along each axis."""
        patch_grid(image_shape, self.factor)
        high, wide = patch_hw(self.factor)
        return _averages(image_shape[0], high), _averages(image_shape[1], wide)


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Compose(Corruption):
    """Corruptions one after another, the first one first: ``Compose(GaussianNoise(5.0), PatchMasking(4, 0.75))``.

    Exact where all parts are; with a part that is only sampled the whole is estimated by sampling.

    Attributes:
        parts: the corruptions; those of a part that is itself composed are taken out of it.

    Raises:
        InputError: nothing to compose.

    Example:
        >>> from mae_align.corruption import GaussianNoise, PatchMasking
        >>> clean = CleanImages(np.eye(4), np.zeros(4), (2, 2, 1))
        >>> Compose(GaussianNoise(1.0), PatchMasking(1, 0.5)).moments(clean).gram[0, 0]
        np.float64(2.0)
    """

    parts: tuple[Corruption, ...]

    def __init__(self, *parts: Corruption) -> None:
        if not parts or not all(isinstance(part, Corruption) for part in parts):
            raise InputError("Compose: give one corruption or more, the first one first")
        flat = [inner for part in parts for inner in (part.parts if isinstance(part, Compose) else (part,))]
        object.__setattr__(self, "parts", tuple(flat))

    @property
    def name(self) -> str:
        """The parts' names in order."""
        return " + ".join(part.name for part in self.parts)

    def check(self, image_shape: ImageShape) -> None:
        """Refuse images that a part does not fit."""
        for part in self.parts:
            part.check(image_shape)

    def moments(self, clean: CleanImages) -> CorruptionMoments:
        """Each part's change of the moments in order; estimated from the images where a part has no exact moments."""
        sampled = [part for part in self.parts if not isinstance(part, ExactCorruption)]
        if not sampled:
            found = CorruptionMoments(clean.sxx, clean.sxx, 1.0)
            for part in self.parts:
                assert isinstance(part, ExactCorruption)
                found = part.push(found, clean)
            return found
        settings = [part for part in sampled if isinstance(part, SampledCorruption)]
        if len(settings) < len(sampled):
            names = [part.name for part in sampled if not isinstance(part, SampledCorruption)]
            raise InputError(f"{names[0]} cannot be composed: derive it from ExactCorruption, or use SampledCorruption")
        mean = jnp.asarray(clean.mean_x.reshape(clean.image_shape), jnp.float32)
        whole = dataclasses.replace(
            max(settings, key=lambda part: part.views),
            function=lambda image, key: self.sample(key, image[None], mean)[0],
        )
        return whole.moments(clean)

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """Every part in order, with a key of its own."""
        for part, own in zip(self.parts, jax.random.split(key, len(self.parts)), strict=True):
            images = part.sample(own, images, fill)
        return images.astype(jnp.float32)


def _gaussian(size: int, sigma: float) -> np.ndarray:
    """[size, size] weights of a Gaussian blur, each row of sum 1."""
    distance = np.arange(size)[:, None] - np.arange(size)
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    return weights / weights.sum(1, keepdims=True)


def _averages(size: int, cell: int) -> np.ndarray:
    """[size, size] averages over cells."""
    label = np.arange(size) // cell
    same = (label[:, None] == label).astype(np.float64)
    return same / same.sum(1, keepdims=True)
