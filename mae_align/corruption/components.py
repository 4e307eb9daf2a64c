"""Masks of principal components: x' = mean + E diag(b) E^T (x - mean) with random b in {0, 1}^d.

In the basis E of the clean images' own principal components S is diagonal, so only the keep probabilities m_i count:
G = A = E diag(m_i s_i) E^T and mu_i = m_i s_i. Where m_i s_i keeps the order of s_i the mask is inert.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.corruption.base import CleanImages, CorruptionMoments, ExactCorruption, independent_pairs, push_mask
from mae_align.data.patches import ImageShape
from mae_align.moments.moments import Moments
from mae_align.moments.principal import principal_components
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class BasisMask(ExactCorruption):
    """A random mask of the coordinates of x - mean in an orthonormal basis; a dropped coordinate becomes the mean's.

    Attributes:
        components: [d, d] orthonormal columns E.
    """

    components: np.ndarray

    def __post_init__(self) -> None:
        e = np.asarray(self.components, np.float64)
        if e.ndim != 2 or e.shape[0] != e.shape[1] or not np.abs(e.T @ e - np.eye(len(e))).max() < 1e-6:
            raise InputError("components: give all d orthonormal columns [d, d], see principal_components")
        object.__setattr__(self, "components", e)

    @abc.abstractmethod
    def probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """Keep probabilities m [d] of components and M [d, d] of pairs."""

    @abc.abstractmethod
    def sample_kept(self, key: jax.Array, batch: int) -> jax.Array:
        """[batch, d] bool: which components are kept."""

    def check(self, image_shape: ImageShape) -> None:
        """Refuse images of another size than the components'."""
        d = math.prod(image_shape)
        if len(self.components) != d:
            raise InputError(f"components of {len(self.components)} pixel values, images of {d}: make them from these")

    def push(self, before: CorruptionMoments, clean: CleanImages) -> CorruptionMoments:
        """G = E [M * (E^T gram E) + cov(b) * a a^T] E^T, A = E diag(m) E^T cross, a = E^T (E[x] - E[x']).

        Cost: six products of size d.
        """
        inside, offset = self._inside(before, clean)
        kept, pair = self.probabilities()
        out = push_mask(inside, kept, pair, offset)
        e = self.components
        return out._replace(
            gram=e @ out.gram @ e.T, cross=e @ out.cross, offset=e @ np.broadcast_to(out.offset, len(e))
        )

    def _inside(self, before: CorruptionMoments, clean: CleanImages) -> tuple[CorruptionMoments, np.ndarray | None]:
        """The moments in the coordinates of the components, and the offset of their fill."""
        e = self.components
        self.check(clean.image_shape)
        moved = e.T @ np.broadcast_to(before.offset, len(e))
        inside = before._replace(gram=e.T @ before.gram @ e, cross=e.T @ before.cross, offset=moved)
        return inside, -moved if moved.any() else None

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """Set the dropped components to those of the mean image."""
        e, high = jnp.asarray(self.components, jnp.float32), jax.lax.Precision.HIGHEST
        mean = fill.astype(jnp.float32)[None]
        inside = jnp.dot((images.astype(jnp.float32) - mean).reshape(len(images), -1), e, precision=high)
        inside = jnp.where(self.sample_kept(key, len(images)), inside, 0.0)
        return mean + jnp.dot(inside, e.T, precision=high).reshape(images.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class ComponentMasking(BasisMask):
    """Each principal component is kept independently: with equal probabilities inert at every ratio (negative control).

    Attributes:
        components: [d, d] orthonormal columns E.
        keep: probability in (0, 1], one number or one per component [d].

    Raises:
        InputError: probabilities outside [0, 1] or all 0; components that are not orthonormal.

    Example:
        >>> ComponentMasking(np.eye(2), 0.5).probabilities()[1].tolist()
        [[0.5, 0.25], [0.25, 0.5]]
    """

    keep: float | np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        keep = np.asarray(self.keep, np.float64)
        if keep.shape not in ((), (len(self.components),)) or not ((keep >= 0) & (keep <= 1)).all() or not keep.any():
            raise InputError(
                f"keep: give a probability, or one for each of {len(self.components)} components, not all 0"
            )

    @classmethod
    def from_moments(cls, moments: Moments, keep: float | np.ndarray) -> Self:
        """The mask of these images' principal components, largest first.

        Example:
            >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
            >>> ComponentMasking.from_moments(Moments.from_arrays(x, np.arange(50) % 2), 0.5).name
            'ComponentMasking(components=array[4, 4], keep=0.5)'
        """
        return cls(principal_components(moments).vectors, keep)

    def probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """m as given and M_ij = m_i m_j for i != j, exact."""
        kept = np.broadcast_to(np.asarray(self.keep, np.float64), len(self.components))
        return kept, independent_pairs(kept)

    def sample_kept(self, key: jax.Array, batch: int) -> jax.Array:
        """Independent draws, [batch, d] bool."""
        chance = jnp.broadcast_to(jnp.asarray(self.keep, jnp.float32), (1, len(self.components)))
        return jax.random.uniform(key, (batch, len(self.components)), jnp.float32) < chance


@dataclasses.dataclass(frozen=True, eq=False)
class VarianceShareMasking(BasisMask):
    """PMAE's mask of principal components: a random set that holds about a share of the variance is dropped.

    Per image the components are permuted and the non-empty prefix whose cumulative share of the variance is nearest to
    ``share`` is dropped (Bizeul et al., 2025, arXiv 2502.06314). Keep probabilities then differ between components, so
    unlike :class:`ComponentMasking` it need not be inert. They have no closed form: they are estimated from ``draws``
    permutations with a fixed seed, and the moments carry the standard error.

    Attributes:
        components: [d, d] orthonormal columns E.
        variances: [d] along each.
        share: in (0, 1).
        draws: permutations for the estimate, at least 2.
        seed: of the estimate.

    Raises:
        InputError: values out of range; components that are not orthonormal.

    Example:
        >>> mask = VarianceShareMasking(np.eye(3), np.array([8.0, 1.0, 1.0]), 0.1)
        >>> mask.probabilities()[0].round(1).tolist()  # whichever component comes first is dropped
        [0.7, 0.7, 0.7]
    """

    variances: np.ndarray
    share: float
    draws: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        variances = np.asarray(self.variances, np.float64)
        if variances.shape != (len(self.components),) or (variances < 0).any() or not variances.sum() > 0:
            raise InputError(f"variances: give one for each of {len(self.components)} components, at least 0")
        if not 0 < self.share < 1:
            raise InputError(f"share={self.share}: give the share of the variance to drop, between 0 and 1")
        if not isinstance(self.draws, int | np.integer) or self.draws < 2:
            raise InputError(f"draws={self.draws}: give a whole number of at least 2")
        object.__setattr__(self, "variances", variances)

    @classmethod
    def from_moments(cls, moments: Moments, share: float, *, draws: int = 4096, seed: int = 0) -> Self:
        """The mask of these images' principal components.

        Example:
            >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
            >>> VarianceShareMasking.from_moments(Moments.from_arrays(x, np.arange(50) % 2), 0.3).share
            0.3
        """
        return cls(*principal_components(moments), share, draws, seed)

    def sample_kept(self, key: jax.Array, batch: int) -> jax.Array:
        """One permutation per image, [batch, d] bool."""
        d = len(self.components)
        order = jnp.argsort(jax.random.uniform(key, (batch, d), jnp.float32), axis=1)
        relative = jnp.asarray(self.variances / self.variances.sum(), jnp.float32)
        last = jnp.argmin(jnp.abs(jnp.cumsum(relative[order], axis=1) - self.share), axis=1)
        # Position of each component in its permutation; the prefix up to and including ``last`` goes.
        return jnp.argsort(order, axis=1) > last[:, None]

    def probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """Shares of ``draws`` seeded permutations. Cost: draws d^2."""
        kept = np.asarray(self.sample_kept(jax.random.key(self.seed), self.draws)).astype(np.float64)
        return kept.mean(0), kept.T @ kept / self.draws

    def push(self, before: CorruptionMoments, clean: CleanImages) -> CorruptionMoments:
        """As :meth:`BasisMask.push`, with the standard errors of the estimated probabilities."""
        out = super().push(before, clean)
        inside, _ = self._inside(before, clean)
        kept, pair = self.probabilities()
        variance = np.sum(pair * (1.0 - pair) * inside.gram**2) / self.draws
        gram_se = float(np.sqrt(variance) / np.linalg.norm(out.gram))
        variance = np.sum((kept * (1.0 - kept))[:, None] * inside.cross**2) / self.draws
        cross_se = float(np.sqrt(variance) / np.linalg.norm(out.cross))
        return out._replace(gram_se=np.hypot(before.gram_se, gram_se), cross_se=np.hypot(before.cross_se, cross_se))
