"""Principal directions of images, and image sets whose spectrum or geometry is changed in closed form.

With the covariance Sxx = C diag(s) C^T of the training images, every set here is the linear image ``x' = B (x - mean)``
of the given one, so that its covariance B Sxx B^T and its directions are known without another pass over the data::

    untouched          B = I                                       s, C
    keep_top           B = C_m C_m^T                               s_1..s_m, C_m
    reassign           B = C_m diag(sqrt(s' / s)) C_m^T            s'_1..s'_m, C_m (whitened, reversed, ...)
    rotate_pixels      B = Q, orthogonal at random                 s, Q C
    shuffle_pixels     B = P, a permutation of the places          s, P C

In natural images eigenvalue and spatial frequency go together. Changing s' on the same directions, or moving pixels
under the same eigenvalues, sets the two apart.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from mae_align.data.patches import ImageShape
from mae_align.moments.moments import Moments
from mae_align.runtime.errors import InputError

# Images transformed in float64 at a time.
_ROWS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """Principal directions of centred images, by descending eigenvalue; directions without variance are left out.

    Attributes:
        image_shape: (h, w, c); d = h w c. mean: [d]. vectors: [d, r] orthonormal columns. values: [r] > 0, variances in
            squared pixel units.

    Example:
        >>> x = np.zeros((4, 1, 2, 1))
        >>> x[:, 0, 0, 0] = [1.0, -1.0, 1.0, -1.0]
        >>> Spectrum.of(Moments.from_arrays(x)).values.tolist()
        [1.0]
    """

    image_shape: ImageShape
    mean: np.ndarray
    vectors: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, moments: Moments) -> Spectrum:
        """Directions of the images that moments were made of.

        Args:
            moments: about the mean.

        Returns:
            float64 arrays. Cost: one eigh of size d.

        Raises:
            InputError: moments about zero, or images that are all the same.

        Example:
            >>> x = np.random.default_rng(0).normal(size=(9, 2, 2, 1))
            >>> Spectrum.of(Moments.from_arrays(x)).vectors.shape
            (4, 4)
        """
        if not moments.center:
            raise InputError("these moments are about zero: make them with center=True to take principal directions")
        values, vectors = np.linalg.eigh(moments.sxx)
        kept = np.flatnonzero(values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps)[::-1]
        if not len(kept):
            raise InputError("all images are the same: there is no variance to learn, give other images")
        return cls(moments.image_shape, moments.mean_x, vectors[:, kept], values[kept])

    @property
    def num_pixels(self) -> int:
        """d."""
        return len(self.mean)

    @property
    def rank(self) -> int:
        """r, the number of directions with variance."""
        return len(self.values)

    def first(self, count: int) -> Spectrum:
        """The first directions alone.

        Args:
            count: number of directions, at least 1; all of them where there are fewer.
        """
        return dataclasses.replace(self, vectors=self.vectors[:, :count], values=self.values[:count])

    def coordinates(self, images: np.ndarray) -> np.ndarray:
        """Coordinates along the directions, C^T (x - mean).

        Args:
            images: [n, h, w, c].

        Returns:
            [n, r] float64. Cost n d r.

        Raises:
            InputError: images of another shape.
        """
        return self._centred(images) @ self.vectors

    def _centred(self, images: np.ndarray) -> np.ndarray:
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise InputError(
                f"images have shape {list(images.shape)}: give [n, {', '.join(map(str, self.image_shape))}]"
            )
        return images.reshape(len(images), -1).astype(np.float64) - self.mean


@dataclasses.dataclass(frozen=True, eq=False)
class ImageMap:
    """A linear map of centred images, scaled so that the mean variance of a pixel is 1, and the spectrum that it gives.

    Attributes:
        source: spectrum of the images it takes. matrix: [d, d]. spectrum: of the images it gives, about 0, of
            eigenvalues that add up to d: in units in which the mean image as reconstruction has a loss of 1.
    """

    source: Spectrum
    matrix: np.ndarray
    spectrum: Spectrum

    def apply(self, images: np.ndarray) -> np.ndarray:
        """B (x - mean).

        Args:
            images: [n, h, w, c] like those of the source.

        Returns:
            [n, h, w, c] float32. Cost n d^2.

        Raises:
            InputError: images of another shape.
        """
        parts = [
            (self.source._centred(images[start : start + _ROWS]) @ self.matrix.T).astype(np.float32)
            for start in range(0, len(images), _ROWS)
        ]
        return np.concatenate(parts).reshape(images.shape)


def untouched(spectrum: Spectrum) -> ImageMap:
    """The images themselves, centred and scaled.

    Args:
        spectrum: of the images.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> round(float(untouched(Spectrum.of(Moments.from_arrays(x))).spectrum.values.sum()), 9)
        4.0
    """
    return _scaled(spectrum, np.eye(spectrum.num_pixels), spectrum.vectors, spectrum.values)


def keep_top(spectrum: Spectrum, count: int) -> ImageMap:
    """Projection on the first directions: what :func:`reassign` is to be compared with.

    Args:
        spectrum: of the images. count: m, number of directions that stay.

    Raises:
        InputError: not 1..r directions.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> keep_top(Spectrum.of(Moments.from_arrays(x)), 3).spectrum.rank
        3
    """
    return reassign(spectrum, spectrum.values[: _checked(spectrum, count)])


def whiten(spectrum: Spectrum, count: int) -> ImageMap:
    """The first directions with one variance for all: only their frequency tells them apart.

    Args:
        spectrum: of the images. count: m, number of directions that stay.

    Raises:
        InputError: not 1..r directions.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> whiten(Spectrum.of(Moments.from_arrays(x)), 2).spectrum.values.round(9).tolist()
        [2.0, 2.0]
    """
    return reassign(spectrum, np.ones(_checked(spectrum, count)))


def reverse_spectrum(spectrum: Spectrum, count: int) -> ImageMap:
    """The first directions with their eigenvalues in reverse order: the finest carry most.

    Args:
        spectrum: of the images. count: m, number of directions that stay.

    Raises:
        InputError: not 1..r directions.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> s = Spectrum.of(Moments.from_arrays(x))
        >>> bool(np.allclose(reverse_spectrum(s, 4).spectrum.vectors, s.vectors[:, ::-1]))
        True
    """
    return reassign(spectrum, spectrum.values[: _checked(spectrum, count)][::-1])


def permute_spectrum(spectrum: Spectrum, count: int, seed: int) -> ImageMap:
    """The first directions with their eigenvalues dealt out at random: eigenvalue and frequency are uncorrelated.

    Args:
        spectrum: of the images. count: m, number of directions that stay. seed: of the permutation.

    Raises:
        InputError: not 1..r directions.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> permute_spectrum(Spectrum.of(Moments.from_arrays(x)), 4, seed=0).spectrum.rank
        4
    """
    values = spectrum.values[: _checked(spectrum, count)]
    return reassign(spectrum, np.random.default_rng(seed).permutation(values))


def reassign(spectrum: Spectrum, values: np.ndarray) -> ImageMap:
    """The first m directions with other variances, the rest gone: B = C_m diag(sqrt(s' / s)) C_m^T.

    Args:
        spectrum: of the images. values: [m] > 0, the new variance of each of the first m directions, up to one factor.

    Returns:
        The map; its spectrum is sorted by the new variances, equal ones in the old order.

    Raises:
        InputError: not 1..r values, or values that are no variances.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> reassign(Spectrum.of(Moments.from_arrays(x)), np.array([1.0, 3.0])).spectrum.values.round(9).tolist()
        [3.0, 1.0]
    """
    new = np.asarray(values, np.float64)
    m = _checked(spectrum, len(new))
    if not (np.isfinite(new) & (new > 0)).all():
        raise InputError("a variance is not positive: give finite numbers over 0")
    vectors = spectrum.vectors[:, :m]
    order = np.argsort(-new, kind="stable")
    matrix = (vectors * np.sqrt(new / spectrum.values[:m])) @ vectors.T
    return _scaled(spectrum, matrix, vectors[:, order], new[order])


def rotate_pixels(spectrum: Spectrum, seed: int) -> ImageMap:
    """A random rotation of pixel space: the same eigenvalues, directions of no particular frequency.

    Args:
        spectrum: of the images. seed: of the orthogonal matrix, uniform (Haar). Cost d^3.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> s = Spectrum.of(Moments.from_arrays(x))
        >>> bool(np.allclose(rotate_pixels(s, 0).spectrum.values, untouched(s).spectrum.values))
        True
    """
    d = spectrum.num_pixels
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    # Uniform only with the signs of the triangle taken out (Mezzadri, 2007).
    return _moved(spectrum, q * np.where(np.diag(r) < 0, -1.0, 1.0))


def shuffle_pixels(spectrum: Spectrum, seed: int) -> ImageMap:
    """One permutation of the places for all images, channels staying together: the same eigenvalues, no neighbourhoods.

    Args:
        spectrum: of the images. seed: of the permutation.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> s = Spectrum.of(Moments.from_arrays(x))
        >>> sorted(map(float, np.unique(shuffle_pixels(s, 0).matrix.round(9) > 0)))
        [0.0, 1.0]
    """
    height, width, channels = spectrum.image_shape
    index = np.arange(spectrum.num_pixels).reshape(height * width, channels)
    order = index[np.random.default_rng(seed).permutation(height * width)].reshape(-1)
    return _moved(spectrum, np.eye(spectrum.num_pixels)[order])


def _checked(spectrum: Spectrum, count: int) -> int:
    if not 1 <= count <= spectrum.rank:
        raise InputError(
            f"{count} directions: these images have variance in {spectrum.rank}, give 1 to {spectrum.rank}"
        )
    return count


def _moved(spectrum: Spectrum, orthogonal: np.ndarray) -> ImageMap:
    return _scaled(spectrum, orthogonal, orthogonal @ spectrum.vectors, spectrum.values)


def _scaled(source: Spectrum, matrix: np.ndarray, vectors: np.ndarray, values: np.ndarray) -> ImageMap:
    """The map over the root mean variance of a pixel of what it gives."""
    variance = float(values.sum()) / source.num_pixels
    spectrum = Spectrum(source.image_shape, np.zeros(source.num_pixels), vectors, values / variance)
    return ImageMap(source, matrix / math.sqrt(variance), spectrum)
