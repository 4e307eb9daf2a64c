"""Target operators: reconstruct W x instead of x.

With A W^T = cov(x', W x) in place of A the theorems stay as they are: V spans the top-k solutions of
A W^T W A^T v = mu G v, and in the coordinates of the factorised problem the only change is diag(s) -> R^T W^T W R
(docs/theory.md, section 4.8).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Self

import numpy as np

from mae_align.corruption.base import short_name
from mae_align.corruption.linear import GaussianBlur
from mae_align.data.patches import ImageShape, PatchSize, patch_hw, patch_labels
from mae_align.moments.moments import Moments
from mae_align.moments.principal import varying_components
from mae_align.runtime.errors import InputError


class TargetOperator(abc.ABC):
    """A linear map W of images that is reconstructed instead of the image."""

    @property
    def name(self) -> str:
        """Short name for tables and the record of a result.

        Example:
            >>> HighPass(2.0).name
            'HighPass(sigma=2)'
        """
        return short_name(self)

    @abc.abstractmethod
    def apply(self, images: np.ndarray) -> np.ndarray:
        """W x, linear and without a constant.

        Args:
            images: [m, h, w, c] float64.

        Returns:
            [m, p] float64.

        Raises:
            InputError: images that do not fit.
        """


@dataclasses.dataclass(frozen=True)
class HighPass(TargetOperator):
    """The image minus its Gaussian blur.

    Attributes:
        sigma: standard deviation of the blur in pixels, positive.

    Raises:
        InputError: sigma not positive and finite.

    Example:
        >>> abs(HighPass(1.0).apply(np.ones((1, 3, 3, 1)))).max() < 1e-12
        np.True_
    """

    sigma: float

    def __post_init__(self) -> None:
        GaussianBlur(self.sigma)

    def apply(self, images: np.ndarray) -> np.ndarray:
        """x - blur(x), [m, h w c]."""
        return (images - GaussianBlur(self.sigma).apply(images)).reshape(len(images), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Components(TargetOperator):
    """Coordinates along some principal components: the error is that of the projection on them.

    Attributes:
        components: [d, p] orthonormal columns.

    Raises:
        InputError: columns that are not orthonormal, or none.

    Example:
        >>> Components(np.eye(4)[:, 2:]).apply(np.arange(4.0).reshape(1, 2, 2, 1)).tolist()
        [[2.0, 3.0]]
    """

    components: np.ndarray

    def __post_init__(self) -> None:
        e = np.asarray(self.components, np.float64)
        if e.ndim != 2 or e.shape[1] == 0 or not np.abs(e.T @ e - np.eye(e.shape[1])).max() < 1e-6:
            raise InputError("components: give at least one orthonormal column [d, p]")
        object.__setattr__(self, "components", e)

    @classmethod
    def top(cls, moments: Moments, count: int) -> Self:
        """The ``count`` components of largest variance.

        Raises:
            InputError: count outside 1..number of components with variance.
        """
        vectors = varying_components(moments).vectors
        return cls(vectors[:, : _checked(count, vectors.shape[1])])

    @classmethod
    def bottom(cls, moments: Moments, count: int) -> Self:
        """The ``count`` components of smallest variance, leaving out directions in which the images do not vary.

        Raises:
            InputError: count outside 1..number of components with variance.
        """
        vectors = varying_components(moments).vectors
        return cls(vectors[:, vectors.shape[1] - _checked(count, vectors.shape[1]) :])

    def apply(self, images: np.ndarray) -> np.ndarray:
        """E^T x, [m, p].

        Raises:
            InputError: components of other images.
        """
        flat = images.reshape(len(images), -1)
        if flat.shape[1] != len(self.components):
            raise InputError(f"components of {len(self.components)} pixel values, images of {flat.shape[1]}")
        return flat @ self.components


@dataclasses.dataclass(frozen=True)
class PatchMeanRemoved(TargetOperator):
    """The image minus the mean of each of its patches, all channels together (the linear part of MAE's norm_pix).

    Attributes:
        patch_size: int or (h, w) in pixels; border patches are cut off by the image.

    Raises:
        InputError: a bad patch size; (once the image is known) a patch larger than the image.

    Example:
        >>> PatchMeanRemoved(2).apply(np.arange(4.0).reshape(1, 2, 2, 1)).tolist()
        [[-1.5, -0.5, 0.5, 1.5]]
    """

    patch_size: PatchSize

    def __post_init__(self) -> None:
        patch_hw(self.patch_size)

    def apply(self, images: np.ndarray) -> np.ndarray:
        """x minus patch means, [m, h w c]."""
        _, height, width, channels = images.shape
        label = patch_labels((height, width, channels), self.patch_size)
        flat = images.reshape(len(images), -1)
        order = np.argsort(label, kind="stable")
        first = np.searchsorted(label[order], np.arange(label.max() + 1))
        sums = np.add.reduceat(flat[:, order], first, axis=1)
        return flat - (sums / np.bincount(label))[:, label]


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixTarget(TargetOperator):
    """W x for any matrix.

    Attributes:
        matrix: [p, d] W, acting on images flattened in (h, w, c) order.

    Raises:
        InputError: not a matrix of finite numbers.

    Example:
        >>> MatrixTarget(np.ones((1, 4))).apply(np.ones((2, 2, 2, 1))).tolist()
        [[4.0], [4.0]]
    """

    matrix: np.ndarray

    def __post_init__(self) -> None:
        matrix = np.asarray(self.matrix, np.float64)
        if matrix.ndim != 2 or 0 in matrix.shape or not np.isfinite(matrix).all():
            raise InputError(f"matrix of shape {list(matrix.shape)}: give finite numbers [p, d]")
        object.__setattr__(self, "matrix", matrix)

    def apply(self, images: np.ndarray) -> np.ndarray:
        """W x, [m, p].

        Raises:
            InputError: a matrix for images of another size.
        """
        flat = images.reshape(len(images), -1)
        if flat.shape[1] != self.matrix.shape[1]:
            raise InputError(f"matrix for {self.matrix.shape[1]} pixel values, images of {flat.shape[1]}")
        return flat @ self.matrix.T


def _checked(count: int, most: int) -> int:
    if not isinstance(count, int | np.integer) or not 1 <= count <= most:
        raise InputError(
            f"count={count}: these images vary along {most} components, give a whole number from 1 to that"
        )
    return int(count)


def mapped(target: TargetOperator, images: np.ndarray) -> np.ndarray:
    """W applied to images, checked.

    Args:
        target: W.
        images: [m, h, w, c] float64.

    Returns:
        [m, p] float64.

    Raises:
        InputError: an operator that does not give finite rows [m, p] for these images.

    Example:
        >>> mapped(PatchMeanRemoved(2), np.ones((1, 2, 2, 1))).tolist()
        [[0.0, 0.0, 0.0, 0.0]]
    """
    found = np.asarray(target.apply(images), np.float64)
    if found.ndim != 2 or len(found) != len(images) or not np.isfinite(found).all():
        shapes = f"{list(images.shape)} into {list(found.shape)}"
        raise InputError(f"{target.name} turns images {shapes}: it must give finite numbers [m, p]")
    return found


def target_gram(target: TargetOperator, root: np.ndarray, image_shape: ImageShape) -> np.ndarray:
    """R^T W^T W R, with W applied to the columns of R as images.

    Args:
        target: W.
        root: [d, r] R.
        image_shape: (h, w, c).

    Returns:
        [r, r] in the precision of ``root``. Cost: W on r images and r^2 p.

    Raises:
        InputError: as :func:`mapped`, or an operator that leaves nothing of these images.

    Example:
        >>> target_gram(MatrixTarget(np.array([[1.0, 0.0]])), 2 * np.eye(2), (1, 2, 1)).tolist()
        [[4.0, 0.0], [0.0, 0.0]]
    """
    found = mapped(target, root.T.reshape(-1, *image_shape).astype(np.float64))
    check_something_left(target, float((found**2).sum()), float((root.astype(np.float64) ** 2).sum()))
    return (found @ found.T).astype(root.dtype)


def check_something_left(target: TargetOperator, after: float, before: float) -> None:
    """Refuse an operator that leaves no variance of the images.

    Args:
        target: W.
        after: variance of W x.
        before: variance of x.

    Raises:
        InputError: nothing is left beyond rounding.

    Example:
        >>> check_something_left(PatchMeanRemoved(2), 1.0, 2.0)
    """
    if not after > 1e-20 * before:
        raise InputError(f"{target.name} leaves nothing of these images: there is nothing to reconstruct")
