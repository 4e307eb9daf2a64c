"""Corruptions x' of an image x: exact second moments for the closed forms, a sampler for the training of networks.

Theorem 3 of Balestriero & LeCun (2024) needs two matrices of a corruption, with x centred and S = cov(x)::

    G = E[x' x'^T] = keep * gram      A = E[x' x^T] = keep * cross

``keep`` is split off because it scales both and so never changes the encoder: ``gram`` and ``cross`` stay finite where
everything is masked (keep = 0).

A dropped pixel becomes the fill, by default the mean image (0 once centred). A patch mask drops whole patches, all
channels together. Where the patch does not divide the side, the border patches are smaller patches of their own. Every
*exchangeable* patch mask has the moments of independent dropping with probability
``p_eff = 1 - P(two given patches kept) / P(one kept)``.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.errors import InputError
from mae_align.patches import ImageShape, PatchSize, check_ratio, patch_grid, patch_hw, patch_labels


class CorruptionMoments(NamedTuple):
    """Second moments of a corruption, E[x' x'^T] = keep * gram and E[x' x^T] = keep * cross.

    Attributes:
        gram: [d, d] symmetric positive semidefinite. cross: [d, d]. keep: scalar in [0, 1].
    """

    gram: np.ndarray
    cross: np.ndarray
    keep: float


class Corruption(abc.ABC):
    """A random map x -> x' with known second moments and a sampler of itself."""

    @abc.abstractmethod
    def moments(self, sxx: np.ndarray, image_shape: ImageShape) -> CorruptionMoments:
        """Exact moments of the corrupted centred image.

        Args:
            sxx: [d, d] covariance of the clean image. image_shape: (h, w, c), d = h w c.

        Returns:
            gram [d, d], cross [d, d], keep. Cost d^2, float64.
        """

    @abc.abstractmethod
    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """Corrupt a batch, independently per image.

        Args:
            key: PRNG key. images: [b, h, w, c]. fill: [h, w, c] value of a dropped pixel (the mean image).

        Returns:
            [b, h, w, c] float32. Traceable.
        """


class PatchMask(Corruption):
    """An exchangeable mask of whole patches; subclasses say how many patches are dropped."""

    patch_size: PatchSize

    @abc.abstractmethod
    def keep_probability(self, image_shape: ImageShape) -> float:
        """P(a given patch is kept); 1 minus it is the realised mask ratio."""

    @abc.abstractmethod
    def pair_share(self, image_shape: ImageShape) -> float:
        """P(two given patches kept) / P(one kept), its limit where both vanish."""

    @abc.abstractmethod
    def sample_kept(self, key: jax.Array, batch: int, num_patches: int) -> jax.Array:
        """[batch, num_patches] bool: which patches are kept."""

    @classmethod
    @abc.abstractmethod
    def from_ratio(cls, patch_size: PatchSize, ratio: float, image_shape: ImageShape) -> Self:
        """The member of this family whose expected share of dropped patches is nearest to ``ratio``."""

    def p_eff(self, image_shape: ImageShape) -> float:
        """Drop probability of the independent mask with the same encoder; 0 (PCA) where there is one patch."""
        down, across = patch_grid(image_shape, self.patch_size)
        # With one patch the image is kept or lost as a whole: G and A are multiples of S, which is PCA.
        return 0.0 if down * across == 1 else 1.0 - self.pair_share(image_shape)

    def moments(self, sxx: np.ndarray, image_shape: ImageShape) -> CorruptionMoments:
        """Moments G = keep [(1 - p) S + p D] with D the part of S within patches, A = keep S, p = ``p_eff``.

        Args:
            sxx: [d, d]. image_shape: (h, w, c).

        Returns:
            gram [d, d], cross [d, d], keep. Source: Theorem 3 with the second moments of a patch mask.
        """
        label = patch_labels(image_shape, self.patch_size)
        p = self.p_eff(image_shape)
        gram = np.where(label[:, None] == label[None, :], sxx, (1.0 - p) * sxx)
        return CorruptionMoments(gram, sxx, self.keep_probability(image_shape))

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """Replace dropped patches by the fill.

        Args:
            key: PRNG key. images: [b, h, w, c]. fill: [h, w, c].

        Returns:
            [b, h, w, c] float32.
        """
        batch, height, width, channels = images.shape
        down, across = patch_grid((height, width, channels), self.patch_size)
        ph, pw = patch_hw(self.patch_size)
        kept = self.sample_kept(key, batch, down * across).reshape(batch, down, across)
        # Whole patches are spread out and the overhang cut off, which makes the border patches smaller.
        mask = jnp.repeat(jnp.repeat(kept, ph, axis=1), pw, axis=2)[:, :height, :width, None]
        return jnp.where(mask, images.astype(jnp.float32), fill.astype(jnp.float32)[None])


@dataclasses.dataclass(frozen=True)
class PatchMasking(PatchMask):
    """Each patch is dropped independently with probability ``ratio`` (Bernoulli mask of the paper).

    Attributes:
        patch_size: int or (h, w) in pixels. ratio: drop probability in [0, 1].

    Raises:
        InputError: ratio outside [0, 1] or a bad patch size.

    Example:
        >>> PatchMasking(2, 0.75).p_eff((4, 4, 1))
        0.75
    """

    patch_size: PatchSize
    ratio: float

    def __post_init__(self) -> None:
        patch_hw(self.patch_size)
        check_ratio(self.ratio)

    @classmethod
    def from_ratio(cls, patch_size: PatchSize, ratio: float, image_shape: ImageShape) -> Self:
        """The mask with this drop probability.

        Example:
            >>> PatchMasking.from_ratio(2, 0.5, (4, 4, 1))
            PatchMasking(patch_size=2, ratio=0.5)
        """
        del image_shape
        return cls(patch_size, float(ratio))

    def keep_probability(self, image_shape: ImageShape) -> float:
        """1 - ratio."""
        del image_shape
        return 1.0 - self.ratio

    def pair_share(self, image_shape: ImageShape) -> float:
        """1 - ratio: patches are independent."""
        del image_shape
        return 1.0 - self.ratio

    def p_eff(self, image_shape: ImageShape) -> float:
        """The ratio itself (0 where there is one patch).

        Example:
            >>> PatchMasking(4, 0.5).p_eff((4, 4, 1))
            0.0
        """
        down, across = patch_grid(image_shape, self.patch_size)
        return 0.0 if down * across == 1 else float(self.ratio)

    def sample_kept(self, key: jax.Array, batch: int, num_patches: int) -> jax.Array:
        """Independent draws, [batch, num_patches] bool."""
        return jax.random.uniform(key, (batch, num_patches), jnp.float32) >= self.ratio


@dataclasses.dataclass(frozen=True)
class FixedCountPatchMasking(PatchMask):
    """Exactly ``num_visible`` of the N patches are kept, drawn without replacement (He et al., 2022).

    p_eff = (1 - n/N) N/(N - 1). Border patches count as patches, whatever their size.

    Attributes:
        patch_size: int or (h, w) in pixels. num_visible: n in 1..N.

    Raises:
        InputError: no visible patch, or (once the image is known) more than there are.

    Example:
        >>> FixedCountPatchMasking(2, 1).p_eff((4, 4, 1))
        1.0
    """

    patch_size: PatchSize
    num_visible: int

    def __post_init__(self) -> None:
        patch_hw(self.patch_size)
        if self.num_visible < 1:
            raise InputError(
                f"num_visible={self.num_visible}: at least one patch must stay visible; lower the mask ratio"
            )

    @classmethod
    def from_ratio(cls, patch_size: PatchSize, ratio: float, image_shape: ImageShape) -> Self:
        """The count nearest to (1 - ratio) N.

        Raises:
            InputError: the ratio leaves no visible patch.

        Example:
            >>> FixedCountPatchMasking.from_ratio(2, 0.7, (4, 4, 1))
            FixedCountPatchMasking(patch_size=2, num_visible=1)
        """
        check_ratio(ratio)
        down, across = patch_grid(image_shape, patch_size)
        visible = round((1.0 - ratio) * down * across)
        if visible < 1:
            raise InputError(
                f"mask ratio {ratio:g} leaves none of the {down * across} patches of size {patch_size} visible: "
                f"stay at or below {1 - 1 / (down * across):.4g}"
            )
        return cls(patch_size, visible)

    def _count(self, image_shape: ImageShape) -> int:
        down, across = patch_grid(image_shape, self.patch_size)
        if self.num_visible > down * across:
            raise InputError(
                f"num_visible={self.num_visible} but the image has {down * across} patches of size {self.patch_size}"
            )
        return down * across

    def keep_probability(self, image_shape: ImageShape) -> float:
        """Share of patches kept, n / N."""
        return self.num_visible / self._count(image_shape)

    def pair_share(self, image_shape: ImageShape) -> float:
        """(n - 1) / (N - 1)."""
        return (self.num_visible - 1) / max(self._count(image_shape) - 1, 1)

    def sample_kept(self, key: jax.Array, batch: int, num_patches: int) -> jax.Array:
        """The ``num_visible`` smallest of random numbers, [batch, num_patches] bool."""
        if self.num_visible > num_patches:
            raise InputError(f"num_visible={self.num_visible} but the image has {num_patches} patches")
        order = jnp.argsort(jax.random.uniform(key, (batch, num_patches), jnp.float32), axis=1)
        return jnp.argsort(order, axis=1) < self.num_visible


@dataclasses.dataclass(frozen=True)
class RandomRatioMasking(PatchMask):
    """A drop probability drawn per image, uniform on [low, high]; patches then independent.

    p_eff = 1 - E[(1 - p)^2] / E[1 - p].

    Attributes:
        patch_size: int or (h, w) in pixels. low, high: 0 <= low <= high <= 1.

    Raises:
        InputError: bounds out of order or outside [0, 1].

    Example:
        >>> round(RandomRatioMasking(2, 0.0, 1.0).p_eff((4, 4, 1)), 6)
        0.333333
    """

    patch_size: PatchSize
    low: float
    high: float

    def __post_init__(self) -> None:
        patch_hw(self.patch_size)
        check_ratio(self.low)
        check_ratio(self.high)
        if self.low > self.high:
            raise InputError(f"mask ratios from {self.low} to {self.high}: low must not be over high")

    @classmethod
    def from_ratio(cls, patch_size: PatchSize, ratio: float, image_shape: ImageShape) -> Self:
        """The widest interval in [0, 1] with this ratio in its middle.

        Example:
            >>> RandomRatioMasking.from_ratio(2, 0.75, (4, 4, 1))
            RandomRatioMasking(patch_size=2, low=0.5, high=1.0)
        """
        del image_shape
        check_ratio(ratio)
        half = min(ratio, 1.0 - ratio)
        return cls(patch_size, float(ratio - half), float(ratio + half))

    def keep_probability(self, image_shape: ImageShape) -> float:
        """1 - (low + high) / 2."""
        del image_shape
        return 1.0 - (self.low + self.high) / 2

    def pair_share(self, image_shape: ImageShape) -> float:
        """E[(1 - p)^2] / E[1 - p], with keep rates a >= b at the ends: 2 (a^2 + ab + b^2) / (3 (a + b))."""
        del image_shape
        a, b = 1.0 - self.low, 1.0 - self.high
        return 2 * (a * a + a * b + b * b) / (3 * (a + b)) if a + b > 0 else 0.0

    def sample_kept(self, key: jax.Array, batch: int, num_patches: int) -> jax.Array:
        """One ratio per image, then independent draws, [batch, num_patches] bool."""
        key_ratio, key_mask = jax.random.split(key)
        ratio = jax.random.uniform(key_ratio, (batch, 1), jnp.float32, self.low, self.high)
        return jax.random.uniform(key_mask, (batch, num_patches), jnp.float32) >= ratio


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianNoise(Corruption):
    """Additive Gaussian noise x' = x + sigma * eps: G = S + diag(sigma^2), A = S.

    One sigma for all pixels leaves the encoder's span at PCA's (the paper's corollary); one per pixel moves it.

    Attributes:
        sigma: standard deviation in the units of the stored pixels, a number or an array [h, w, c].

    Raises:
        InputError: negative or infinite sigma; a shape that is not the image's.

    Example:
        >>> GaussianNoise(2.0).moments(np.eye(4), (2, 2, 1)).gram[0, 0]
        np.float64(5.0)
    """

    sigma: float | np.ndarray

    def __post_init__(self) -> None:
        sigma = np.asarray(self.sigma, np.float64)
        if not np.isfinite(sigma).all() or (sigma < 0).any():
            raise InputError("sigma must be finite and not negative (in the units of the stored pixels)")

    def moments(self, sxx: np.ndarray, image_shape: ImageShape) -> CorruptionMoments:
        """Moments gram = S + diag(sigma^2), cross = S, keep = 1.

        Args:
            sxx: [d, d]. image_shape: (h, w, c).

        Returns:
            gram [d, d], cross [d, d], keep.
        """
        sigma = np.asarray(self.sigma, np.float64)
        if sigma.ndim and sigma.shape != tuple(image_shape):
            raise InputError(f"sigma has shape {list(sigma.shape)}: give a number or the image's {list(image_shape)}")
        variance = np.broadcast_to(sigma**2, image_shape).reshape(-1)
        return CorruptionMoments(sxx + np.diag(variance), sxx, 1.0)

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """Images plus noise (nothing is dropped, so the fill is not used).

        Args:
            key: PRNG key. images: [b, h, w, c]. fill: [h, w, c].

        Returns:
            [b, h, w, c] float32.
        """
        del fill
        noise = jax.random.normal(key, images.shape, jnp.float32)
        return images.astype(jnp.float32) + jnp.broadcast_to(jnp.asarray(self.sigma, jnp.float32), images.shape) * noise
