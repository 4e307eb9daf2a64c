"""Principal directions of images, and image sets whose spectrum or geometry is changed in closed form.

With the covariance Sxx = C diag(s) C^T of the training images, every set here is the linear image ``x' = B (x - mean)``
of the given one, so that its covariance B Sxx B^T and its directions are known without another pass over the data::

    original           B = I                                       s, C
    top                B = C_m C_m^T                               s_1..s_m, C_m
    whitened           B = C_m diag(1 / sqrt(s)) C_m^T             1, C_m
    reversed           B = C_m diag(sqrt(s' / s)) C_m^T            s_m..s_1, C_m
    permuted           likewise                                    s_1..s_m dealt out at random, C_m
    rotated            B = Q, orthogonal at random                 s, Q C
    shuffled           B = P, a permutation of the places          s, P C

In natural images eigenvalue and spatial frequency go together. Changing s' on the same directions, or moving pixels
under the same eigenvalues, sets the two apart.
"""

from __future__ import annotations

import dataclasses
import enum
import math

import numpy as np

from mae_align.data.patches import ImageShape
from mae_align.moments.moments import Moments
from mae_align.moments.principal import varying_components
from mae_align.runtime.errors import InputError

# Images transformed in float64 at a time.
_ROWS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """Principal directions of centred images, by descending eigenvalue; directions without variance are left out.

    Attributes:
        image_shape: (h, w, c); d = h w c.
        mean: [d].
        vectors: [d, r] orthonormal columns.
        values: [r] > 0, variances in squared pixel units.

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
        vectors, values = varying_components(moments)
        if not len(values):
            raise InputError("all images are the same: there is no variance to learn, give other images")
        return cls(moments.image_shape, moments.mean_x, vectors, values)

    @property
    def num_pixels(self) -> int:
        """d."""
        return len(self.mean)

    @property
    def rank(self) -> int:
        """r, the number of directions with variance."""
        return len(self.values)

    def first(self, count: int) -> Spectrum:
        """The first directions alone; all of them where there are fewer."""
        return dataclasses.replace(self, vectors=self.vectors[:, :count], values=self.values[:count])

    def centred(self, images: np.ndarray) -> np.ndarray:
        """Images as rows about the mean, [n, d] float64.

        Raises:
            InputError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise InputError(
                f"images have shape {list(images.shape)}: give [n, {', '.join(map(str, self.image_shape))}]"
            )
        return images.reshape(len(images), -1).astype(np.float64) - self.mean


@dataclasses.dataclass(frozen=True, eq=False)
class ImageMap:
    """A linear map of centred images, scaled so that the mean variance of a pixel is 1, and the spectrum that it gives.

    Attributes:
        source: spectrum of the images it takes.
        matrix: [d, d].
        spectrum: of the images it gives, about 0, of eigenvalues that add up to d: in units in which the mean image as
            reconstruction has a loss of 1.
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
            (self.source.centred(images[start : start + _ROWS]) @ self.matrix.T).astype(np.float32)
            for start in range(0, len(images), _ROWS)
        ]
        return np.concatenate(parts).reshape(images.shape)


class Images(enum.Enum):
    """What is made of the images before anything is trained on them."""

    original = "original"
    top = "top"
    whitened = "whitened"
    reversed = "reversed"
    permuted = "permuted"
    rotated = "rotated"
    shuffled = "shuffled"


def image_map(kind: Images, spectrum: Spectrum, count: int, seed: int) -> ImageMap:
    """What an intervention makes of images of a spectrum.

    Args:
        kind: which.
        spectrum: of the stored images.
        count: m, directions that interventions on the spectrum keep.
        seed: of those that draw numbers.

    Returns:
        The map; original images are centred and scaled only.

    Raises:
        InputError: more directions than the images vary in.

    Example:
        >>> s = Spectrum.of(Moments.from_arrays(np.random.default_rng(0).normal(size=(50, 2, 2, 1))))
        >>> image_map(Images.whitened, s, 2, seed=0).spectrum.values.round(9).tolist()
        [2.0, 2.0]
    """
    top = spectrum.values[:count]
    match kind:
        case Images.original:
            return _scaled(spectrum, np.eye(spectrum.num_pixels), spectrum.vectors, spectrum.values)
        case Images.top:
            return reassign(spectrum, top)
        case Images.whitened:
            return reassign(spectrum, np.ones(count))
        case Images.reversed:
            return reassign(spectrum, top[::-1])
        case Images.permuted:
            return reassign(spectrum, np.random.default_rng(seed).permutation(top))
        case Images.rotated:
            return rotate_pixels(spectrum, seed)
        case Images.shuffled:
            return shuffle_pixels(spectrum, seed)


def reassign(spectrum: Spectrum, values: np.ndarray) -> ImageMap:
    """The first m directions with other variances, the rest gone: B = C_m diag(sqrt(s' / s)) C_m^T.

    Args:
        spectrum: of the images.
        values: [m] > 0, the new variance of each of the first m directions, up to one factor.

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
    m = len(new)
    if not 1 <= m <= spectrum.rank:
        raise InputError(f"{m} directions: these images have variance in {spectrum.rank}, give 1 to {spectrum.rank}")
    if not (np.isfinite(new) & (new > 0)).all():
        raise InputError("a variance is not positive: give finite numbers over 0")
    vectors = spectrum.vectors[:, :m]
    order = np.argsort(-new, kind="stable")
    matrix = (vectors * np.sqrt(new / spectrum.values[:m])) @ vectors.T
    return _scaled(spectrum, matrix, vectors[:, order], new[order])


def rotate_pixels(spectrum: Spectrum, seed: int) -> ImageMap:
    """A random rotation of pixel space: the same eigenvalues, directions of no particular frequency.

    Args:
        spectrum: of the images.
        seed: of the orthogonal matrix, uniform (Haar).

    Returns:
        The map. Cost d^3.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> s = Spectrum.of(Moments.from_arrays(x))
        >>> bool(np.allclose(rotate_pixels(s, 0).spectrum.values, s.values / s.values.mean()))
        True
    """
    d = spectrum.num_pixels
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    # Uniform only with the signs of the triangle taken out (Mezzadri, 2007).
    return _moved(spectrum, q * np.where(np.diag(r) < 0, -1.0, 1.0))


def shuffle_pixels(spectrum: Spectrum, seed: int) -> ImageMap:
    """One permutation of the places for all images, channels staying together: the same eigenvalues, no neighbourhoods.

    Args:
        spectrum: of the images.
        seed: of the permutation.

    Returns:
        The map.

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


def _moved(spectrum: Spectrum, orthogonal: np.ndarray) -> ImageMap:
    return _scaled(spectrum, orthogonal, orthogonal @ spectrum.vectors, spectrum.values)


def _scaled(source: Spectrum, matrix: np.ndarray, vectors: np.ndarray, values: np.ndarray) -> ImageMap:
    """The map over the root mean variance of a pixel of what it gives."""
    variance = float(values.sum()) / source.num_pixels
    spectrum = Spectrum(source.image_shape, np.zeros(source.num_pixels), vectors, values / variance)
    return ImageMap(source, matrix / math.sqrt(variance), spectrum)
