"""Labelled images as they are: the input of the dual factorisation, for fewer samples than pixels.

Second moments of d pixel values take 8 d^2 bytes (181 GB at 224 x 224 x 3). With n < d samples the same problem lives
in n dimensions, and the images themselves are the smaller summary: :class:`Samples` takes the place of
:class:`mae_align.moments.moments.Moments` in every sweep, and :func:`summarize` picks the cheaper of the two.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np

from mae_align.moments.accumulate import group_of
from mae_align.moments.moments import Moments, check_alike
from mae_align.runtime.checks import check_images, check_targets
from mae_align.runtime.errors import InputError
from mae_align.runtime.memory import accumulator_bytes, check_memory, dual_bytes, primal_bytes

_ARRAYS = ("images", "targets", "member")


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """A labelled image set in memory, in groups (for standard errors). Build it with :meth:`from_arrays`.

    Attributes:
        images: [n, h, w, c] uint8, float32 or float64, contiguous.
        targets: [n, q] float64.
        member: [n] group of each sample, in [0, num_groups).
        num_groups: g.
        center: whether images and targets are taken about their means (True) or about zero.
        preprocessing: free description of what was done to the stored pixels before; part of the problem's identity.

    Example:
        >>> images = np.arange(48, dtype=np.uint8).reshape(4, 3, 4, 1)
        >>> s = Samples.from_arrays(images, np.array([0, 1, 0, 1]))
        >>> s.count, s.image_shape, s.mean_y.tolist()
        (4, (3, 4, 1), [0.5, 0.5])
    """

    images: np.ndarray
    targets: np.ndarray
    member: np.ndarray
    num_groups: int
    center: bool
    preprocessing: str

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        targets: np.ndarray,
        *,
        num_classes: int | None = None,
        center: bool = True,
        groups: int = 1,
        preprocessing: str = "stored pixels",
    ) -> Samples:
        """Samples of arrays in memory, checked like those of :meth:`mae_align.moments.moments.Moments.from_arrays`.

        Args:
            images: [n, h, w, c] uint8 or floating.
            targets: [n] integer class labels (made one-hot), or any float targets [n, q] or [n].
            num_classes: q for class labels; default: largest label + 1.
            center: take images and targets about their means (default) or about zero.
            groups: samples are spread over this many groups by the hash that moments use.
            preprocessing: description of how the pixels were made.

        Returns:
            The samples. Nothing is computed; images that are contiguous are not copied.

        Raises:
            InputError: wrong ranks or lengths, NaN or infinite values, labels out of range, a single class.

        Example:
            >>> Samples.from_arrays(np.zeros((2, 2, 2, 1)), np.array([[0.5], [1.0]])).num_targets
            1
        """
        images = np.ascontiguousarray(check_images(images))
        y = check_targets(targets, len(images), num_classes)
        if groups < 1:
            raise InputError(f"groups={groups}: ask for at least 1 group")
        return cls(images, y, group_of(np.arange(len(images)), groups), groups, center, preprocessing)

    def merge(self, other: Samples) -> Samples:
        """The union of two sample sets; every sample keeps its group.

        Args:
            other: samples made in the same way.

        Returns:
            The merged samples; their images are copied.

        Raises:
            InputError: the two were made differently (shape, dtype, centring, preprocessing, targets, groups).

        Example:
            >>> a = Samples.from_arrays(np.zeros((2, 1, 1, 1)), np.array([0, 1]))
            >>> a.merge(a).count
            4
        """
        check_alike(self, other, ("image_shape", "pixel_dtype", "center", "preprocessing", "num_targets", "num_groups"))
        parts = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _ARRAYS}
        return dataclasses.replace(self, **parts)

    @property
    def state(self) -> tuple[np.ndarray, ...]:
        """All arrays that define these samples (for a fingerprint)."""
        return tuple(getattr(self, name) for name in _ARRAYS)

    @property
    def count(self) -> int:
        """Number of samples n."""
        return len(self.images)

    @property
    def counts(self) -> np.ndarray:
        """[g] samples per group."""
        return np.bincount(self.member, minlength=self.num_groups)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        return self.images.shape[1:]

    @property
    def pixel_dtype(self) -> str:
        """Dtype name of the pixels."""
        return self.images.dtype.name

    @property
    def most_rank(self) -> int:
        """Largest rank of the samples about their mean."""
        return min(self.count - self.center, self.num_pixels)

    @property
    def num_pixels(self) -> int:
        """Number of pixel values d = h w c."""
        return int(np.prod(self.image_shape))

    @property
    def num_targets(self) -> int:
        """Number of target columns q."""
        return self.targets.shape[1]

    @property
    def quantization_step(self) -> float:
        """Distance of neighbouring pixel values: 1 for 8-bit images, 0 where it is not known."""
        return 1.0 if self.pixel_dtype == "uint8" else 0.0

    @property
    def rows(self) -> np.ndarray:
        """[n, d] flattened images, in their own dtype."""
        return self.images.reshape(self.count, -1)

    @cached_property
    def mean_x(self) -> np.ndarray:
        """[d] mean image (exact for 8-bit images), or zeros where ``center`` is False."""
        if not self.center:
            return np.zeros(self.num_pixels)
        sums = self.rows.sum(0, dtype=np.int64 if self.pixel_dtype == "uint8" else np.float64)
        return sums / self.count

    @property
    def mean_y(self) -> np.ndarray:
        """[q] mean target, or zeros where ``center`` is False."""
        return self.targets.mean(0) if self.center else np.zeros(self.num_targets)

    @property
    def syy(self) -> np.ndarray:
        """[q, q] covariance of the targets."""
        y = self.targets - self.mean_y
        return y.T @ y / self.count

    @property
    def yty(self) -> np.ndarray:
        """[q, q] uncentred second moment mean(y y^T)."""
        return self.targets.T @ self.targets / self.count


def dual_is_cheaper(n: int, d: int) -> bool:
    """Whether the dual of n samples costs less than the primal of d pixel values.

    Multiply-adds of one factorisation, one patch size and one grid point; an eigendecomposition of size m counts 12 m^3
    and three of them are made::

        primal = n d^2 + d^3 + 36 d^3     moments, P, and eigendecompositions of size d
        dual   = 3 d n^2 + 36 n^3         inner products, P and the blocks, and eigendecompositions of size n

    Args:
        n: number of samples.
        d: number of pixel values.

    Example:
        >>> dual_is_cheaper(1500, 150528), dual_is_cheaper(1500, 784)
        (True, False)
    """
    return n < d and 3 * d * n**2 + 36 * n**3 < n * d**2 + 37 * d**3


def merged(first: Moments | Samples, second: Moments | Samples) -> Moments | Samples:
    """The union of two summaries of one kind.

    Raises:
        InputError: two kinds, or made differently.

    Example:
        >>> a = summarize(np.zeros((2, 1, 1, 1)), np.array([0, 1]))
        >>> merged(a, a).count
        4
    """
    if isinstance(first, Samples) and isinstance(second, Samples):
        return first.merge(second)
    if isinstance(first, Moments) and isinstance(second, Moments):
        return first.merge(second)
    kinds = f"{type(first).__name__} and {type(second).__name__}"
    raise InputError(f"{kinds} do not merge: make both of one kind (summarize(..., like=first))")


def summarize(
    images: np.ndarray,
    targets: np.ndarray,
    *,
    num_classes: int | None = None,
    center: bool = True,
    groups: int = 1,
    preprocessing: str = "stored pixels",
    like: Moments | Samples | None = None,
) -> Moments | Samples:
    """What sweeps need of a data set: second moments, or the samples themselves where that costs less.

    Samples are kept where n < d and 3 d n^2 + 36 n^3 < n d^2 + 37 d^3 (:func:`dual_is_cheaper`).

    Args:
        images: [n, h, w, c] uint8 or floating.
        targets: [n] class labels, or numbers [n] or [n, q].
        num_classes: q for class labels.
        center: take both about their means.
        groups: for standard errors.
        preprocessing: description of how the pixels were made.
        like: the summary this one goes with (held-out data with its training data, parts to be merged): the same kind.

    Returns:
        Moments or samples; both go into every sweep.

    Raises:
        InputError: as :meth:`mae_align.moments.moments.Moments.from_arrays`, or neither fits into memory.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> [type(summarize(rng.normal(size=(n, 4, 4, 1)), np.arange(n) % 2)).__name__ for n in (8, 40)]
        ['Samples', 'Moments']
    """
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "center": center,
        "groups": groups,
        "preprocessing": preprocessing,
    }
    images = check_images(images)
    n, d = len(images), int(np.prod(images.shape[1:]))
    if isinstance(like, Samples) or (like is None and dual_is_cheaper(n, d)):
        samples = Samples.from_arrays(images, targets, **options)
        if like is None:
            check_memory(
                dual_bytes(n, d), f"the dual of {n} samples ({n} x {n})", "use fewer samples or smaller images"
            )
        return samples
    q = check_targets(targets, n, num_classes).shape[1]
    needed = max(accumulator_bytes(d, q, max(groups, 1)), 8 * max(groups, 1) * d**2 + primal_bytes(d))
    remedy = f"shrink the images, or give fewer samples than pixel values (here {n} samples)"
    check_memory(needed, f"second moments of {d} pixel values in {groups} group(s)", remedy)
    return Moments.from_arrays(images, targets, **options)
