"""Images by spatial frequency: radial bands of the discrete Fourier transform.

With the orthonormal transform F over height and width (|F x| = |x|, Parseval), every pair of frequencies (u, v) in
cycles per pixel, each in [-1/2, 1/2], belongs to one of B rings of equal width in the radius sqrt(u^2 + v^2)::

    edges = linspace(0, sqrt(1/2), B + 1),   energy_b(x) = sum over ring b and channels of |F x|^2

so that the energies of all bands add up to the sum of squared pixels. The constant belongs to band 0, the corner of the
Nyquist square (a checkerboard) to the last one; a radius on an edge belongs to the ring above it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.runtime.checks import check_images
from mae_align.runtime.errors import InputError

# Images transformed at a time.
_IMAGES = 1024


class BandErrors(NamedTuple):
    """Reconstruction error and centred energy by band, as sums over the pixels of one image, mean over images.

    Attributes:
        error: [B] of x_hat - x, squared pixel units.
        energy: [B] of x - mean.
        share: [B] error / energy, NaN for bands in which the images do not vary.
    """

    error: np.ndarray
    energy: np.ndarray
    share: np.ndarray


def band_edges(num_bands: int) -> np.ndarray:
    """Radii between which the bands lie, cycles per pixel.

    Args:
        num_bands: B, at least 1.

    Returns:
        [B + 1] from 0 to sqrt(1/2), the corner of the Nyquist square.

    Raises:
        InputError: fewer than one band.

    Example:
        >>> band_edges(2).round(3).tolist()
        [0.0, 0.354, 0.707]
    """
    if isinstance(num_bands, bool) or not isinstance(num_bands, int | np.integer) or num_bands < 1:
        raise InputError(f"num_bands={num_bands!r}: give a whole number of at least 1")
    return np.linspace(0.0, np.sqrt(0.5), int(num_bands) + 1)


def radial_bands(height: int, width: int, num_bands: int) -> np.ndarray:
    """Masks of the bands over the frequencies of an image, in the order of ``fft2``.

    Small images have no frequency in some of many bands: such masks are empty.

    Args:
        height: in pixels, any parity.
        width: likewise.
        num_bands: B.

    Returns:
        [B, h, w] bool; every frequency lies in exactly one band.

    Raises:
        InputError: a size or number below 1.

    Example:
        >>> radial_bands(2, 2, 2).astype(int).tolist()
        [[[1, 0], [0, 0]], [[0, 1], [1, 1]]]
    """
    edges = band_edges(num_bands)
    if min(height, width) < 1:
        raise InputError(f"an image of {height} x {width} pixels has no frequencies")
    radius = _radii(height, width)
    band = np.clip(np.searchsorted(edges, radius, side="right") - 1, 0, num_bands - 1)
    return band[None] == np.arange(num_bands)[:, None, None]


def band_energy(images: jax.Array | np.ndarray, num_bands: int) -> jax.Array:
    """Energy of every band; can be traced, with ``num_bands`` static.

    Args:
        images: [..., h, w, c], pixel units; computed in float32 (float64 where it is enabled and given).
        num_bands: B.

    Returns:
        [..., B], squared pixel units, summed over channels; over bands they add up to the sum of squares. Cost: one
        transform per channel.

    Raises:
        InputError: fewer than three axes, or a bad number of bands.

    Example:
        >>> band_energy(np.ones((5, 4, 4, 3), np.float32), 3)[0].tolist()
        [48.0, 0.0, 0.0]
    """
    _check_axes(images)
    x = jnp.asarray(images)
    x = x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)
    masks = jnp.asarray(radial_bands(x.shape[-3], x.shape[-2], num_bands), x.dtype)
    spectrum = jnp.fft.fft2(x, axes=(-3, -2), norm="ortho")
    power = (spectrum.real**2 + spectrum.imag**2).sum(-1)
    return jnp.einsum("...hw,bhw->...b", power, masks, precision=jax.lax.Precision.HIGHEST)


def mean_frequency(images: np.ndarray) -> np.ndarray:
    """Mean radial spatial frequency of images, weighted with their energy.

    sum over frequencies and channels of |F x|^2 sqrt(u^2 + v^2) / sum of |F x|^2: 0 for a constant, sqrt(1/2) for a
    checkerboard.

    Args:
        images: [..., h, w, c], not centred; eigenvectors reshaped to images, for example.

    Returns:
        [...] float64, cycles per pixel; NaN for images of zeros. Cost: one transform per channel.

    Raises:
        InputError: fewer than three axes.

    Example:
        >>> board = np.indices((4, 4)).sum(0)[:, :, None] % 2 * 2.0 - 1.0
        >>> mean_frequency(np.stack([np.ones((4, 4, 1)), board])).round(4).tolist()
        [0.0, 0.7071]
    """
    x = np.asarray(images, np.float64)
    _check_axes(x)
    radius = _radii(x.shape[-3], x.shape[-2])
    power = (np.abs(np.fft.fft2(x, axes=(-3, -2))) ** 2).sum(-1)
    total = power.sum((-2, -1))
    return np.where(total > 0, (power * radius).sum((-2, -1)) / np.where(total > 0, total, 1.0), np.nan)


def error_by_band(
    images: np.ndarray, reconstructed: np.ndarray, num_bands: int, *, mean_image: np.ndarray | None = None
) -> BandErrors:
    """How much of each band a reconstruction misses.

    Args:
        images: x [n, h, w, c] uint8 or floating.
        reconstructed: x_hat [n, h, w, c] in the same units.
        num_bands: B.
        mean_image: [h, w, c] about which the energy is taken (that of the training images); None: mean of ``images``.

    Returns:
        Error, energy and their ratio: 1 for the mean image as reconstruction, 0 for a perfect one. The errors add up to
        the mean of |x_hat - x|^2. Cost: two transforms per image and channel; memory of 1,024 images at a time.

    Raises:
        InputError: shapes that differ, NaN or infinite pixels.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(8, 6, 5, 3))
        >>> error_by_band(x, np.broadcast_to(x.mean(0), x.shape), 2).share.round(4).tolist()
        [1.0, 1.0]
    """
    x, x_hat = check_images(images), check_images(reconstructed)
    if x.shape != x_hat.shape:
        raise InputError(f"images {list(x.shape)} and reconstructions {list(x_hat.shape)}: give one for each")
    mean = x.mean(0, dtype=np.float64) if mean_image is None else np.asarray(mean_image, np.float64)
    if mean.shape != x.shape[1:] or not np.isfinite(mean).all():
        raise InputError(f"mean_image of shape {list(mean.shape)}: give finite pixels {list(x.shape[1:])}")
    band_edges(num_bands)
    error, energy = np.zeros(num_bands), np.zeros(num_bands)
    for start in range(0, len(x), _IMAGES):
        part = x[start : start + _IMAGES].astype(np.float64)
        # Subtracted in float64: what is left of large pixel values is small.
        error += _summed(x_hat[start : start + _IMAGES] - part, num_bands)
        energy += _summed(part - mean, num_bands)
    share = np.where(energy > 0, error / np.where(energy > 0, energy, 1.0), np.nan)
    return BandErrors(error / len(x), energy / len(x), share)


def _summed(images: np.ndarray, num_bands: int) -> np.ndarray:
    """[B] float64 sums over images [n, h, w, c]."""
    return np.asarray(_band_energy(images.astype(np.float32), num_bands)).astype(np.float64).sum(0)


_band_energy = partial(jax.jit, static_argnums=1)(band_energy)


def _radii(height: int, width: int) -> np.ndarray:
    """[h, w] radial frequency in cycles per pixel, in the order of ``fft2``."""
    return np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])


def _check_axes(images: jax.Array | np.ndarray) -> None:
    """Refuse what is no [..., h, w, c]."""
    if images.ndim < 3 or 0 in images.shape[-3:]:
        raise InputError(f"images have shape {list(images.shape)}: give [..., h, w, c]")
