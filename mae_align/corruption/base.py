"""What every corruption is: second moments of x' for the closed forms, a sampler for the training of networks.

With covariances where E[x'] is not the mean image (the autoencoder is affine)::

    G = cov(x') = keep * gram      A = cov(x', x) = keep * cross      E[x'] = E[x] + offset

Corruptions with exact moments know how to change the moments of what they are applied to
(:meth:`ExactCorruption.push`), so that corruptions after one another are exact too.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.data.patches import ImageShape, PatchSize, patch_hw
from mae_align.runtime.errors import InputError

Images = np.ndarray | Callable[[], Iterable[np.ndarray]]
Fill = float | np.ndarray | tuple | None


class CleanImages(NamedTuple):
    """What a corruption may ask about the clean images.

    Attributes:
        sxx: [d, d] covariance, pixel noise floor included.
        mean_x: [d] mean image, the default fill.
        image_shape: (h, w, c), d = h w c.
        pixel_noise: variance of the floor in ``sxx``, squared pixel units.
        centered: whether ``sxx`` is about the mean; if not, it is about 0 and so is ``mean_x``.
        images: the images themselves [n, h, w, c], or a function that starts a new pass over batches of them; only
            corruptions without exact moments need them.
    """

    sxx: np.ndarray
    mean_x: np.ndarray
    image_shape: ImageShape
    pixel_noise: float = 0.0
    centered: bool = True
    images: Images | None = None


class CorruptionMoments(NamedTuple):
    """Second moments of a corruption: cov(x') = keep * gram, cov(x', x) = keep * cross, E[x'] = E[x] + offset.

    ``keep`` is split off because it scales both and so never changes the encoder: ``gram`` and ``cross`` stay finite
    where everything is masked (keep = 0).

    Attributes:
        gram: [d, d] symmetric positive semidefinite.
        cross: [d, d].
        keep: scalar in [0, 1].
        offset: [d], or 0.0.
        gram_se, cross_se: standard errors of gram and cross relative to their Frobenius norms: the root of the sum of
            the entries' squared standard errors over the norm; 0 where the moments are exact.
    """

    gram: np.ndarray
    cross: np.ndarray
    keep: float
    offset: np.ndarray | float = 0.0
    gram_se: float = 0.0
    cross_se: float = 0.0


class Corruption(abc.ABC):
    """A random map x -> x' with second moments and a sampler of itself."""

    @property
    def name(self) -> str:
        """Short name for tables and axes.

        Example:
            >>> from mae_align.corruption import PatchMasking
            >>> PatchMasking(2, 0.5).name
            'PatchMasking(patch_size=2, ratio=0.5)'
        """
        return short_name(self)

    def check(self, image_shape: ImageShape) -> None:
        """Refuse images that the corruption does not fit, before any work.

        By the shapes that its sampler takes; a corruption without a sampler is left to its moments.

        Args:
            image_shape: (h, w, c).

        Raises:
            InputError: see the class.
        """
        image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
        batch = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        try:
            out = jax.eval_shape(lambda batch, fill: self.sample(jax.random.key(0), batch, fill), batch, image)
        except NotImplementedError:
            return
        if out.shape != batch.shape:
            raise InputError(f"{self.name} turns an image {list(image_shape)} into {list(out.shape[1:])}")

    @abc.abstractmethod
    def moments(self, clean: CleanImages) -> CorruptionMoments:
        """Second moments of the corrupted image.

        Args:
            clean: moments of the clean images, and the images where they are needed.

        Returns:
            gram [d, d], cross [d, d], keep, offset, float64.

        Raises:
            InputError: a corruption that does not fit the images.
        """

    @abc.abstractmethod
    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """Corrupt a batch, independently per image.

        Args:
            key: PRNG key.
            images: [b, h, w, c].
            fill: [h, w, c] the mean image: value of a dropped pixel, unless the corruption has a fill of its own.

        Returns:
            [b, h, w, c] float32. Traceable.
        """


class ExactCorruption(Corruption):
    """A corruption whose moments follow from those of what it is applied to."""

    @abc.abstractmethod
    def push(self, before: CorruptionMoments, clean: CleanImages) -> CorruptionMoments:
        """Moments of the corruption of an image that was corrupted before.

        Args:
            before: moments of the image it is applied to.
            clean: the clean images (their mean is the default fill).

        Returns:
            Moments of the result; ``before`` is left as it is. float64.

        Raises:
            InputError: a corruption that does not fit the images.
        """

    def moments(self, clean: CleanImages) -> CorruptionMoments:
        """Exact moments of the corrupted clean image; see :meth:`Corruption.moments`."""
        return self.push(CorruptionMoments(clean.sxx, clean.sxx, 1.0), clean)


def short_name(thing: object) -> str:
    """Class name and the parameters that are plain values; arrays by their shape, defaults of None left out.

    Example:
        >>> class Blur:
        ...     def __init__(self):
        ...         self.sigma, self.weights, self.fill = 2.0, np.ones(3), None
        >>> short_name(Blur())
        'Blur(sigma=2, weights=array[3])'
    """

    def say(value: object) -> str:
        if isinstance(value, np.ndarray):
            return f"array{list(value.shape)}" if value.ndim else f"{float(value):g}"
        if isinstance(value, float):
            return f"{value:g}"
        if isinstance(value, tuple):
            if value and isinstance(value[0], tuple):
                return f"array{list(np.shape(value))}"
            return "(" + ", ".join(say(v) for v in value) + ")"
        return getattr(value, "__name__", None) or getattr(value, "name", None) or repr(value)

    parts = [f"{name}={say(value)}" for name, value in vars(thing).items() if value is not None]
    return f"{type(thing).__name__}({', '.join(parts)})"


def frozen_fill(fill: Fill) -> float | tuple | None:
    """A fill as a hashable value: None, a float or nested tuples.

    Raises:
        InputError: not finite numbers.

    Example:
        >>> frozen_fill(np.array([[[0.0], [1.0]]])), frozen_fill(3)
        ((((0.0,), (1.0,)),), 3.0)
    """
    if fill is None:
        return None
    try:
        value = np.asarray(fill, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError("fill: give a number or an array [h, w, c] in the units of the stored pixels") from error
    if value.ndim not in (0, 3) or not np.isfinite(value).all():
        raise InputError(
            f"fill of shape {list(value.shape)}: give a finite number or array [h, w, c] in units of the stored pixels"
        )

    def freeze(part: object) -> object:
        return tuple(freeze(p) for p in part) if isinstance(part, list) else part

    return freeze(value.tolist())  # pyright: ignore[reportReturnType]


def fill_values(fill: Fill, image_shape: ImageShape) -> np.ndarray:
    """A fill of its own as pixel values [d].

    Raises:
        InputError: an array of another shape than the image's.

    Example:
        >>> fill_values(0.5, (1, 2, 1)).tolist()
        [0.5, 0.5]
    """
    value = np.asarray(fill, np.float64)
    if value.ndim and value.shape != tuple(image_shape):
        raise InputError(f"fill has shape {list(value.shape)}: give a number or the image's {list(image_shape)}")
    return np.broadcast_to(value, image_shape).reshape(-1)


def fill_offset(fill: Fill, before: CorruptionMoments, clean: CleanImages) -> np.ndarray | None:
    """c = fill - E[x'] of the image before [d]; None where it is 0 (the fill is the mean of a mean-preserving map).

    Raises:
        InputError: another fill with moments that are not about the mean.

    Example:
        >>> clean = CleanImages(np.eye(2), np.array([1.0, 2.0]), (1, 2, 1))
        >>> fill_offset(0.0, CorruptionMoments(np.eye(2), np.eye(2), 1.0), clean).tolist()
        [-1.0, -2.0]
    """
    if fill is None:
        return None if not np.any(before.offset) else np.broadcast_to(-np.asarray(before.offset), clean.mean_x.shape)
    if not clean.centered:
        raise InputError("a fill of its own needs moments about the mean: make them with center=True")
    return fill_values(fill, clean.image_shape) - clean.mean_x - before.offset


def dropped_replaced(images: jax.Array, kept: jax.Array, fill: Fill, mean_image: jax.Array) -> jax.Array:
    """Images whose dropped pixels are the fill of its own, or else the mean image's.

    Args:
        images: [b, h, w, c].
        kept: [b, h, w, c or 1] bool.
        fill: as :func:`frozen_fill` gives it.
        mean_image: [h, w, c].

    Returns:
        [b, h, w, c] float32. Traceable.

    Raises:
        InputError: a fill of another shape than the image's.

    Example:
        >>> images, kept = jnp.ones((1, 1, 2, 1)), jnp.array([True, False]).reshape(1, 1, 2, 1)
        >>> dropped_replaced(images, kept, 7.0, images[0]).ravel().tolist()
        [1.0, 7.0]
    """
    _, height, width, channels = images.shape
    shape = (height, width, channels)
    value = mean_image if fill is None else fill_values(fill, shape).reshape(shape)
    return jnp.where(kept, images.astype(jnp.float32), jnp.asarray(value, jnp.float32)[None])


def over_pixels(kept: jax.Array, image_shape: ImageShape, patch_size: PatchSize) -> jax.Array:
    """A mask of patches as one of pixels; what hangs over is cut off, which makes the border patches smaller.

    Args:
        kept: [b, down, across], of the patches.
        image_shape: (h, w, c).
        patch_size: int or (h, w) in pixels.

    Returns:
        [b, h, w, 1]. Traceable.

    Example:
        >>> over_pixels(jnp.array([[[True, False]]]), (2, 3, 1), 2)[0, 0, :, 0].tolist()
        [True, True, False]
    """
    high, wide = patch_hw(patch_size)
    return jnp.repeat(jnp.repeat(kept, high, axis=1), wide, axis=2)[:, : image_shape[0], : image_shape[1], None]


def independent_pairs(kept: np.ndarray) -> np.ndarray:
    """M [d, d] of entries that are kept independently: M_ij = m_i m_j for i != j, M_ii = m_i.

    Example:
        >>> independent_pairs(np.array([0.5, 1.0])).tolist()
        [[0.5, 0.5], [0.5, 1.0]]
    """
    pair = kept[:, None] * kept
    np.fill_diagonal(pair, kept)
    return pair


def push_mask(
    before: CorruptionMoments, kept: np.ndarray, pair: np.ndarray, offset: np.ndarray | None
) -> CorruptionMoments:
    """Moments of x'' = delta * x' + (1 - delta) * f for a random 0-1 mask delta, in any orthonormal coordinates.

    gram'' = M * gram + cov(delta) * c c^T / keep, cross'' = diag(m) cross, M * A elementwise; c = f - E[x'].

    Args:
        before: moments of x'.
        kept: [d] m, P(kept).
        pair: [d, d] M, P(both kept).
        offset: c [d], or None for 0.

    Returns:
        Moments of x''. Cost d^2.

    Raises:
        InputError: a mask with another fill after one that drops everything.

    Example:
        >>> one = CorruptionMoments(np.eye(1), np.eye(1), 1.0)
        >>> push_mask(one, np.array([0.5]), np.array([[0.5]]), np.array([2.0])).gram.tolist()
        [[1.5]]
    """
    gram, moved = pair * before.gram, before.offset
    if offset is not None:
        need_signal(before)
        gram = gram + (pair - kept[:, None] * kept) * (offset[:, None] * offset) / before.keep
        moved = moved + (1.0 - kept) * offset
    return before._replace(gram=gram, cross=kept[:, None] * before.cross, offset=moved)


def need_signal(before: CorruptionMoments) -> None:
    """Refuse to add randomness to an image that is dropped with certainty: there is no limit to speak of.

    Raises:
        InputError: keep = 0.
    """
    if before.keep == 0.0:
        raise InputError(
            "a corruption after a mask that drops everything has nothing to act on: lower its ratio below 1"
        )
