"""Exchangeable masks of whole patches.

A dropped pixel becomes the fill, by default the mean image (0 once centred). A patch mask drops whole patches, all
channels together. Where the patch does not divide the side, the border patches are smaller patches of their own. Every
*exchangeable* patch mask has the moments of independent dropping with probability
``p_eff = 1 - P(two given patches kept) / P(one kept)``.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.corruption.base import (
    CleanImages,
    CorruptionMoments,
    ExactCorruption,
    Fill,
    dropped_replaced,
    fill_offset,
    frozen_fill,
    need_signal,
    over_pixels,
)
from mae_align.data.patches import ImageShape, PatchSize, check_ratio, patch_grid, patch_hw, patch_labels
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class PatchMask(ExactCorruption):
    """An exchangeable mask of whole patches; subclasses say how many patches are dropped.

    Attributes:
        patch_size: int or (h, w) in pixels.
        fill: value of a dropped pixel, a number or an array [h, w, c] in the units of the stored pixels; None for the
            mean image. With a fill of its own a mask leaves the family that
            :func:`mae_align.closed_form.sweep.masking_sweep` solves:
            :func:`mae_align.closed_form.corruption_sweep.corruption_sweep` takes it.
    """

    patch_size: PatchSize
    fill: Fill = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        patch_hw(self.patch_size)
        # Arrays become tuples, so that masks stay values.
        object.__setattr__(self, "fill", frozen_fill(self.fill))

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

    def effective_drop(self, image_shape: ImageShape) -> float:
        """Drop probability of the independent mask with the same moments up to a factor; 0 where there is one patch."""
        down, across = patch_grid(image_shape, self.patch_size)
        # With one patch the image is kept or lost as a whole: G and A are multiples of S, which is PCA.
        return 0.0 if down * across == 1 else 1.0 - self.pair_share(image_shape)

    def p_eff(self, image_shape: ImageShape) -> float:
        """Drop probability of the independent mask with the same encoder; 0 (PCA) where there is one patch.

        Raises:
            InputError: a mask with a fill of its own, whose encoder no independent mask with the mean image has.
        """
        if self.fill is not None:
            raise InputError(
                "a mask with a fill of its own is not in the family of masking_sweep: give it to corruption_sweep"
            )
        return self.effective_drop(image_shape)

    def push(self, before: CorruptionMoments, clean: CleanImages) -> CorruptionMoments:
        """G = keep [(1 - p) S + p D] with D the part of S within patches, A = keep S, p = ``effective_drop``.

        With m the keep probability and c = fill - E[x'], the covariance of the mask times c c^T comes on top. Cost d^2.
        Source: Theorem 3 with the second moments of a patch mask.
        """
        label = patch_labels(clean.image_shape, self.patch_size)
        same = label[:, None] == label[None, :]
        p, keep = self.effective_drop(clean.image_shape), self.keep_probability(clean.image_shape)
        gram = np.where(same, before.gram, (1.0 - p) * before.gram)
        c, offset = fill_offset(self.fill, before, clean), before.offset
        if c is not None:
            need_signal(before)
            gram += np.where(same, 1.0 - keep, 1.0 - p - keep) / before.keep * (c[:, None] * c[None, :])
            offset = offset + (1.0 - keep) * c
        return before._replace(gram=gram, keep=before.keep * keep, offset=offset)

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """Replace dropped patches by the fill."""
        batch, height, width, channels = images.shape
        shape = (height, width, channels)
        down, across = patch_grid(shape, self.patch_size)
        kept = self.sample_kept(key, batch, down * across).reshape(batch, down, across)
        return dropped_replaced(images, over_pixels(kept, shape, self.patch_size), self.fill, fill)


@dataclasses.dataclass(frozen=True)
class PatchMasking(PatchMask):
    """Each patch is dropped independently with probability ``ratio`` (Bernoulli mask of the paper).

    Attributes:
        patch_size: int or (h, w) in pixels.
        ratio: drop probability in [0, 1].

    Raises:
        InputError: ratio outside [0, 1] or a bad patch size.

    Example:
        >>> PatchMasking(2, 0.75).p_eff((4, 4, 1))
        0.75
    """

    ratio: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio)

    @classmethod
    def from_ratio(cls, patch_size: PatchSize, ratio: float, image_shape: ImageShape) -> Self:
        """The mask with this drop probability.

        Example:
            >>> PatchMasking.from_ratio(2, 0.5, (4, 4, 1))
            PatchMasking(patch_size=2, fill=None, ratio=0.5)
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

    def effective_drop(self, image_shape: ImageShape) -> float:
        """The ratio itself (0 where there is one patch).

        Example:
            >>> PatchMasking(4, 0.5).effective_drop((4, 4, 1))
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
        patch_size: int or (h, w) in pixels.
        num_visible: n in 1..N.

    Raises:
        InputError: no visible patch, or (once the image is known) more than there are.

    Example:
        >>> FixedCountPatchMasking(2, 1).p_eff((4, 4, 1))
        1.0
    """

    num_visible: int

    def __post_init__(self) -> None:
        super().__post_init__()
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
            FixedCountPatchMasking(patch_size=2, fill=None, num_visible=1)
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

    def sample_order(self, key: jax.Array, batch: int, num_patches: int) -> jax.Array:
        """A permutation of the patches of each image, [batch, num_patches]: the first ``num_visible`` are kept."""
        if self.num_visible > num_patches:
            raise InputError(f"num_visible={self.num_visible} but the image has {num_patches} patches")
        return jnp.argsort(jax.random.uniform(key, (batch, num_patches), jnp.float32), axis=1)

    def sample_kept(self, key: jax.Array, batch: int, num_patches: int) -> jax.Array:
        """The ``num_visible`` first of :meth:`sample_order`, [batch, num_patches] bool."""
        return jnp.argsort(self.sample_order(key, batch, num_patches), axis=1) < self.num_visible


@dataclasses.dataclass(frozen=True)
class RandomRatioMasking(PatchMask):
    """A drop probability drawn per image, uniform on [low, high]; patches then independent.

    p_eff = 1 - E[(1 - p)^2] / E[1 - p].

    Attributes:
        patch_size: int or (h, w) in pixels.
        low, high: 0 <= low <= high <= 1.

    Raises:
        InputError: bounds out of order or outside [0, 1].

    Example:
        >>> round(RandomRatioMasking(2, 0.0, 1.0).p_eff((4, 4, 1)), 6)
        0.333333
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.low)
        check_ratio(self.high)
        if self.low > self.high:
            raise InputError(f"mask ratios from {self.low} to {self.high}: low must not be over high")

    @classmethod
    def from_ratio(cls, patch_size: PatchSize, ratio: float, image_shape: ImageShape) -> Self:
        """The widest interval in [0, 1] with this ratio in its middle.

        Example:
            >>> RandomRatioMasking.from_ratio(2, 0.75, (4, 4, 1))
            RandomRatioMasking(patch_size=2, fill=None, low=0.5, high=1.0)
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
