"""Images projected on principal and on random subspaces, by the share of pixel variance these hold.

With the training images centred, cov(x) = U diag(s) U^T (r directions with variance, largest first), a family of nested
subspaces is an orthonormal basis B = U R of the range, and its m-th member spans the first m columns. Of the variance
tr cov(x) it holds::

    share(m) = sum_{i <= m} b_i^T cov(x) b_i / tr cov(x)

R is the identity (top), its columns in reverse (bottom), or a rotation drawn uniformly (random). Top m and bottom r - m
are complements: their shares add up to 1.
"""

from __future__ import annotations

import dataclasses
import enum
import functools

import numpy as np

from mae_align.data.patches import ImageShape
from mae_align.moments.moments import Moments
from mae_align.moments.principal import varying_components
from mae_align.runtime.checks import check_images
from mae_align.runtime.errors import InputError

# Images that are held in float64 at a time.
_ROWS = 2048


class Family(enum.Enum):
    """Which nested subspaces."""

    top = "top"
    bottom = "bottom"
    random = "random"


@dataclasses.dataclass(frozen=True)
class Subspace:
    """The member of a family.

    Attributes:
        family: which nested subspaces.
        dimension: m.
    """

    family: Family
    dimension: int

    @property
    def key(self) -> str:
        """A file name."""
        return f"{self.family.value}-{self.dimension}"


@dataclasses.dataclass(frozen=True, eq=False)
class PrincipalAxes:
    """Principal directions of the training images, and a random basis of the same range.

    Attributes:
        image_shape: (h, w, c).
        mean: [d].
        axes: [d, r] U, float64.
        variance: [r] s, descending.
        seed: of the rotation.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(90, 2, 2, 1)) * np.array([3.0, 2.0, 1.0, 1.0]).reshape(2, 2, 1)
        >>> axes = PrincipalAxes.of(Moments.from_arrays(x))
        >>> bottom = axes.nearest(Family.bottom, 0.15)
        >>> bottom.dimension, axes.nearest(Family.top, 0.85).dimension
        (2, 2)
        >>> axes.project(x, bottom).shape
        (90, 2, 2, 1)
    """

    image_shape: ImageShape
    mean: np.ndarray
    axes: np.ndarray
    variance: np.ndarray
    seed: int

    @classmethod
    def of(cls, moments: Moments, *, seed: int = 0) -> PrincipalAxes:
        """Directions in which the images of these moments vary, beyond rounding.

        Args:
            moments: of the training images, centred.
            seed: of the random family.

        Returns:
            The directions. Cost: one eigh of size d.

        Raises:
            InputError: moments about zero, or images that are all the same.
        """
        if not moments.center:
            raise InputError("principal subspaces are about the mean image: give moments made with center=True")
        vectors, variances = varying_components(moments)
        if not len(variances):
            raise InputError("the images are constant: there are no directions to project them on")
        return cls(moments.image_shape, moments.mean_x, vectors, variances, seed)

    @property
    def rank(self) -> int:
        """Number of directions r."""
        return len(self.variance)

    @functools.cached_property
    def rotation(self) -> np.ndarray:
        """[r, r] of the random family, uniform over rotations and reflections. Cost 4/3 r^3, once."""
        gaussian = np.random.default_rng([self.seed, self.rank]).standard_normal((self.rank, self.rank))
        q, upper = np.linalg.qr(gaussian)
        # With the signs of R's diagonal the QR of a Gaussian matrix is uniform.
        return q * np.sign(np.diag(upper))

    def shares(self, family: Family) -> np.ndarray:
        """Share of the variance that each member of a family holds.

        Args:
            family: which.

        Returns:
            [r], ascending to 1; entry m - 1 is that of dimension m.
        """
        variance = self.variance
        if family is Family.bottom:
            variance = variance[::-1]
        elif family is Family.random:
            variance = np.square(self.rotation).T @ variance
        return np.cumsum(variance) / self.variance.sum()

    def share(self, subspace: Subspace) -> float:
        """Share of the variance that a subspace holds, in (0, 1]."""
        self.check(subspace)
        return float(min(self.shares(subspace.family)[subspace.dimension - 1], 1.0))

    def check(self, subspace: Subspace) -> None:
        """Refuse a dimension that does not exist.

        Raises:
            InputError: outside 1..r.
        """
        if not 1 <= subspace.dimension <= self.rank:
            raise InputError(f"a subspace of {subspace.dimension} dimensions: these images have 1 to {self.rank}")

    def nearest(self, family: Family, share: float) -> Subspace:
        """The member whose share is nearest to the one asked for; what it really holds is :meth:`share`.

        Bottom v and top 1 - v are complements wherever both have a direction.

        Args:
            family: which.
            share: in (0, 1].

        Raises:
            InputError: a share outside (0, 1].
        """
        if not 0.0 < share <= 1.0:
            raise InputError(f"a subspace with {share} of the variance: give a share above 0, at most 1")
        if family is Family.bottom and share < 1.0:
            # By the complement, so that rounding and ties fall on the same split.
            left = np.append(0.0, self.shares(Family.top))[:-1]
            return Subspace(family, self.rank - int(np.abs(left - (1.0 - share)).argmin()))
        return Subspace(family, int(np.abs(self.shares(family) - share).argmin()) + 1)

    def basis(self, subspace: Subspace) -> np.ndarray:
        """Orthonormal basis.

        Args:
            subspace: which.

        Returns:
            [d, m] float64.

        Raises:
            InputError: a dimension that does not exist.
        """
        self.check(subspace)
        if subspace.family is Family.top:
            return self.axes[:, : subspace.dimension]
        if subspace.family is Family.bottom:
            return self.axes[:, : -subspace.dimension - 1 : -1]
        return self.axes @ self.rotation[:, : subspace.dimension]

    def _complement(self, subspace: Subspace) -> np.ndarray:
        """[d, r - m] orthonormal basis of the rest of the range."""
        if subspace.family is Family.top:
            return self.axes[:, subspace.dimension :]
        if subspace.family is Family.bottom:
            return self.axes[:, : self.rank - subspace.dimension]
        return self.axes @ self.rotation[:, subspace.dimension :]

    def coordinates(self, images: np.ndarray, subspace: Subspace) -> np.ndarray:
        """Coordinates B_m^T (x - mean) of images.

        Args:
            images: [n, h, w, c] in the pixels of the moments, training or held-out ones alike.
            subspace: which.

        Returns:
            [n, m] float32, computed in float64. Cost n d m.

        Raises:
            InputError: images of another shape, a dimension that does not exist.
        """
        basis = self.basis(subspace)
        return np.concatenate([(x @ basis).astype(np.float32) for x in self._centred(images)])

    def project(self, images: np.ndarray, subspace: Subspace) -> np.ndarray:
        """Orthogonal projection B_m B_m^T (x - mean) of the centred images.

        What held-out images show outside the range of the training ones is in no subspace.

        Args:
            images: [n, h, w, c] in the pixels of the moments.
            subspace: which.

        Returns:
            [n, h, w, c] float32, without the mean image; computed in float64. Cost 2 n d min(m, r - m) where all
            pixels vary, 2 n d m otherwise.

        Raises:
            InputError: images of another shape, a dimension that does not exist.
        """
        self.check(subspace)
        by_rest = self.rank == len(self.mean) and 2 * subspace.dimension > self.rank
        basis = self._complement(subspace) if by_rest else self.basis(subspace)
        found = np.empty((len(images), len(self.mean)), np.float32)
        start = 0
        for x in self._centred(images):
            inside = (x @ basis) @ basis.T
            found[start : start + len(x)] = x - inside if by_rest else inside
            start += len(x)
        return found.reshape(len(images), *self.image_shape)

    def _centred(self, images: np.ndarray):
        """Flattened images minus the mean, float64, some rows at a time."""
        images = check_images(images)
        if images.shape[1:] != tuple(self.image_shape):
            raise InputError(f"images have shape {list(images.shape[1:])}: the axes are of {list(self.image_shape)}")
        for start in range(0, len(images), _ROWS):
            part = images[start : start + _ROWS]
            yield part.reshape(len(part), -1) - self.mean
