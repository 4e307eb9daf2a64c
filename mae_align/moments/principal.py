"""Principal components of images: the eigenvectors of their covariance, and where rounding takes over from variance."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mae_align.moments.moments import Moments


class PrincipalComponents(NamedTuple):
    """Orthonormal directions of images, largest variance first.

    Attributes:
        vectors: [d, m] columns.
        variances: [m] along each, squared pixel units.
    """

    vectors: np.ndarray
    variances: np.ndarray


def principal_components(moments: Moments) -> PrincipalComponents:
    """All eigenvectors of the pixel covariance, also those along which the images do not vary.

    cov(x) = E diag(variances) E^T, without a noise floor.

    Args:
        moments: of the images.

    Returns:
        m = d directions, float64. Cost: one eigh of size d.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> principal_components(Moments.from_arrays(x)).vectors.shape
        (4, 4)
    """
    values, vectors = np.linalg.eigh(moments.sxx)
    return PrincipalComponents(vectors[:, ::-1].copy(), np.maximum(values[::-1], 0.0))


def varying_components(moments: Moments, rtol: float | None = None) -> PrincipalComponents:
    """The principal components along which the images vary by more than rounding.

    Args:
        moments: of the images.
        rtol: variances at or below rtol times the largest count as zero; default :func:`variance_cutoff`.

    Returns:
        m directions, as many as the images have rank (none where all are the same), float64. Cost: one eigh of size d.

    Example:
        >>> vectors, variances = varying_components(Moments.from_arrays(np.arange(6.0).reshape(3, 1, 2, 1)))
        >>> vectors.shape, variances.round(3).tolist()
        ((2, 1), [5.333])
    """
    vectors, variances = principal_components(moments)
    real = variances > (variance_cutoff(moments) if rtol is None else rtol) * variances[0]
    return PrincipalComponents(vectors[:, real], variances[real])


def variance_cutoff(moments: Moments) -> float:
    """Share of the largest variance that rounding may leave in an empty direction: d * 2.2e-16.

    Products of float32 images are rounded more coarsely, at about 1e-7; real directions of less variance are kept
    there, beside some of rounding.

    Args:
        moments: of the images.

    Example:
        >>> variance_cutoff(Moments.from_arrays(np.ones((2, 4, 4, 1))))
        3.552713678800501e-15
    """
    return moments.num_pixels * float(np.finfo(np.float64).eps)


def count_of_share(variances: np.ndarray, share: float) -> int:
    """The fewest of the variances, in order, that make up a share of their sum.

    Args:
        variances: [m], largest first.
        share: in (0, 1].

    Example:
        >>> count_of_share(np.array([6.0, 3.0, 1.0]), 0.8)
        2
    """
    cumulative = np.cumsum(variances) / variances.sum()
    return int(min(np.searchsorted(cumulative, share - 1e-12) + 1, len(variances)))
