"""The methods that the masking benchmark measures against, in NumPy and SciPy float64.

Ways to get the alignment curve of one corruption, a patch mask of one ratio, without any of the
package's solvers:

* `direct_point` is the published algorithm: it goes back to the samples at every grid point.
  `lean_direct_point` is the same with one product over the samples instead of three and faster LAPACK
  drivers.
* `moments_point` is the strong baseline: it keeps the second moments, so that its cost does not
  depend on the number of samples, and solves one generalised eigenproblem per grid point.

All return ``100 * sqrt(alignment)`` in percent for every number of features k, which is what the
published figures plot. Neither reuses anything from one grid point to the next. BLAS threads are
the caller's choice (``threadpoolctl.threadpool_limits``).

Reference: Balestriero & LeCun (2024), "How Learning by Reconstruction Produces Uninformative
Features For Perception", arXiv 2402.11337, Theorem 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import scipy.linalg

from mae_align.runtime.errors import InputError

JITTER = 1e-3
"""Standard deviation of the published jitter over the standard deviation of all pixels."""


def patch_labels(image_shape: tuple[int, int, int], patch: int | tuple[int, int]) -> np.ndarray:
    """Number the patch that each coordinate of a flattened image belongs to.

    Patches are counted row by row and take all channels together. Where the patch does not divide
    the side, the border patches are smaller patches of their own.

    Args:
        image_shape: height, width and channels (h, w, c), in pixels.
        patch: side of the square patch, or (height, width), in pixels.

    Returns:
        Labels [d], int64, d = h * w * c, in the order of ``images.reshape(n, -1)``; 0 is the top
        left patch.

    Raises:
        InputError: if a side is not a positive whole number.

    Example:
        >>> patch_labels((2, 3, 1), 2).reshape(2, 3)
        array([[0, 0, 1],
               [0, 0, 1]])
    """
    height, width, channels = image_shape
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    if min(height, width, channels, patch_height, patch_width) < 1:
        raise InputError(f"image shape {image_shape} with patch {patch}: every side must be at least 1 pixel")
    across = -(-width // patch_width)
    rows = np.arange(height) // patch_height
    columns = np.arange(width) // patch_width
    labels = rows[:, None] * across + columns[None, :]
    return np.repeat(labels.reshape(-1), channels).astype(np.int64)


def authors_preprocessing(images: np.ndarray, seed: int) -> np.ndarray:
    """Flatten, jitter, centre and scale images as the published scripts do.

    ``x = images + 0.001 * std(images) * noise``; then the mean of every pixel is subtracted and
    everything is divided by one number, the standard deviation of all entries. The jitter makes
    second moments of images with constant pixels invertible; it is drawn with a seed here.

    Args:
        images: [n, ...], any real dtype, in any units; uint8 pixels as a rule.
        seed: seed of the Gaussian jitter.

    Returns:
        x [n, d] float64, d the number of values in one image, flattened in stored order; every
        column has mean 0 and the whole array has standard deviation 1. A few arrays of this size
        are held at the peak.

    Raises:
        InputError: if there are fewer than two images or all their values are equal.

    Example:
        >>> x = authors_preprocessing(np.array([[[0, 255]], [[255, 0]]], np.uint8), seed=0)
        >>> x.shape, round(float(x.std()), 6)
        ((2, 2), 1.0)
    """
    if len(images) < 2:
        raise InputError(f"{len(images)} images have no second moments: give at least 2")
    x = np.asarray(images).reshape(len(images), -1).astype(np.float64)
    scale = JITTER * x.std()
    if scale == 0.0:
        raise InputError("all values of all images are equal: there is nothing to align")
    noise = np.random.default_rng(seed).standard_normal(x.shape)
    noise *= scale
    x += noise
    x -= x.mean(axis=0)
    x /= x.std()
    return x


def numpy_qr(features: np.ndarray) -> np.ndarray:
    """Orthonormalise columns with the routine that the published script calls.

    Args:
        features: [n, d] float64.

    Returns:
        Orthonormal columns [n, min(n, d)] float64 whose leading k columns span those of
        `features`, for every k (Householder QR, about ``4 n d^2`` operations).

    Example:
        >>> q = numpy_qr(np.array([[3.0], [4.0]]))
        >>> np.abs(q).round(2)
        array([[0.6],
               [0.8]])
    """
    return np.linalg.qr(features)[0]


def inplace_qr(features: np.ndarray) -> np.ndarray:
    """Orthonormalise columns as `numpy_qr` does, with fewer copies of the n x d array.

    NumPy copies the features to and fro between row and column order; SciPy factorises one
    column-ordered copy in place. Same columns, about half the time at 60,000 x 784.

    Args:
        features: [n, d] float64.

    Returns:
        Orthonormal columns [n, min(n, d)] float64, leading columns as in `numpy_qr`.

    Example:
        >>> q = inplace_qr(np.array([[3.0], [4.0]]))
        >>> np.abs(q).round(2)
        array([[0.6],
               [0.8]])
    """
    factors = scipy.linalg.qr(np.array(features, order="F"), mode="economic", overwrite_a=True, check_finite=False)
    return np.asarray(factors[0])


def direct_point(x: np.ndarray, y: np.ndarray, labels: np.ndarray, ratio: float) -> np.ndarray:
    """Alignment curve of one patch mask from the samples: the published algorithm.

    With rows as samples, patches dropped independently with probability p, ``E[x'|x] = (1 - p) x``
    and ``M`` equal to ``1 - p`` within a patch and ``(1 - p)^2`` between patches::

        G = (x^T x) * M      A = E[x'|x]^T x
        A A^T v = mu G v, largest mu first      Q = qr(x V)
        curve[k] = 100 sqrt( sum_{i <= k} |y y^T q_i|^2 / sum_{i <= d} |y y^T q_i|^2 )

    As in the published script, G and the two factors of ``A A^T`` are products over the samples of
    their own, the eigenproblem asks LAPACK for a range of eigenvectors (all of them), and nothing
    is kept from one grid point to the next; a ratio of 0 goes through the same steps. The decoder
    that the script computes and drops is left out.

    Args:
        x: centred images [n, d] float64, n > d, such as `authors_preprocessing` returns.
        y: targets [n, q] float64, not centred; one-hot rows in the published figures.
        labels: patch number [d] of each coordinate, such as `patch_labels` returns.
        ratio: probability p in [0, 1) that a patch is dropped.

    Returns:
        Curve [d] float64 in percent, entry k - 1 for k features; the last is 100. Time about
        ``13 n d^2 + O(d^3)`` operations, memory four to six arrays of the size of `x`.

    Raises:
        InputError: if shapes do not fit, the ratio is outside [0, 1), the moments are singular (a
            constant pixel, or fewer samples than pixels), or the targets do not depend on `x`.

    Example:
        >>> x = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * [2.0, 1.0]
        >>> y = np.eye(2)[[0, 0, 1, 1]]  # the sign of the first pixel
        >>> direct_point(x, y, np.array([0, 1]), 0.5).round(6)
        array([100., 100.])
    """
    _check(x, y, labels, ratio)
    expected = (1.0 - ratio) * x
    squared = (expected.T @ x) @ (x.T @ expected)
    del expected
    return _curve(x, y, _directions(squared, _masked(x.T @ x, labels, ratio), "gvx"), numpy_qr)


def lean_direct_point(x: np.ndarray, y: np.ndarray, labels: np.ndarray, ratio: float) -> np.ndarray:
    """The same curve from the samples with every shortcut that stays within one grid point.

    A is a multiple of ``x^T x``, so one product over the samples serves both moments, the
    eigenproblem is solved by divide and conquer, and the QR works in place. The fastest fair
    version of `direct_point` that we know.

    Args:
        x: as in `direct_point`.
        y: as in `direct_point`.
        labels: as in `direct_point`.
        ratio: as in `direct_point`.

    Returns:
        Curve [d], as in `direct_point`. Time about ``7 n d^2 + O(d^3)`` operations.

    Raises:
        InputError: as in `direct_point`.

    Example:
        >>> x = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * [2.0, 1.0]
        >>> lean_direct_point(x, np.eye(2)[[0, 0, 1, 1]], np.array([0, 1]), 0.5).round(6)
        array([100., 100.])
    """
    _check(x, y, labels, ratio)
    gram = x.T @ x
    cross = (1.0 - ratio) * gram
    return _curve(x, y, _directions(cross @ cross.T, _masked(gram, labels, ratio), "gvd"), inplace_qr)


def _check(x: np.ndarray, y: np.ndarray, labels: np.ndarray, ratio: float) -> None:
    _check_labels(labels, x.shape[1])
    if not 0.0 <= ratio < 1.0:
        raise InputError(f"mask ratio {ratio} is outside [0, 1): everything masked has no moments")
    if y.ndim != 2 or len(y) != len(x):
        raise InputError(f"targets of shape {y.shape} do not fit {len(x)} images: give [n, q]")


def _masked(gram: np.ndarray, labels: np.ndarray, ratio: float) -> np.ndarray:
    keep = 1.0 - ratio
    gram *= np.where(labels[:, None] == labels[None, :], keep, keep * keep)
    return gram


def _curve(
    x: np.ndarray,
    y: np.ndarray,
    directions: np.ndarray,
    orthonormalise: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    features = x @ directions
    q = orthonormalise(features)
    del features
    projected = y @ (y.T @ q)
    return _percent(np.einsum("ij,ij->j", projected, projected))


def moments_point(sxx: np.ndarray, sxy: np.ndarray, yty: np.ndarray, labels: np.ndarray, ratio: float) -> np.ndarray:
    """Alignment curve of one patch mask from second moments: the strong baseline.

    The equations of `direct_point` without a pass over the data. ``G`` and ``A`` are divided by
    ``1 - p``, which changes no eigenvector and makes a ratio of 1 the finite limit. With
    ``sxx = L L^T`` the features are orthonormalised in the space of moments, and only the
    triangular factor F of the QR is formed::

        sxx sxx v = mu ((1 - p) sxx + p blocks(sxx)) v, largest mu first
        L^T V = Q F      t = F^-T V^T sxy
        curve[k] = 100 sqrt( sum_{i <= k} t_i yty t_i^T / sum_{i <= d} t_i yty t_i^T )

    Args:
        sxx: covariance of the images [d, d] float64, positive definite.
        sxy: covariance of images and targets [d, q] float64.
        yty: uncentred second moments of the targets [q, q] float64, in any multiple.
        labels: patch number [d] of each coordinate, such as `patch_labels` returns.
        ratio: probability p in [0, 1] that a patch is dropped.

    Returns:
        Curve [d] float64 in percent, entry k - 1 for k features; the last is 100. ``O(d^3)``
        operations, whatever the number of samples.

    Raises:
        InputError: if shapes do not fit, the ratio is outside [0, 1], `sxx` is singular, or `sxy`
            is zero.

    Example:
        >>> sxy = np.array([[0.0, 0.0], [0.5, -0.5]])
        >>> moments_point(np.diag([4.0, 1.0]), sxy, np.eye(2), np.array([0, 1]), 1.0).round(6)
        array([  0., 100.])
    """
    _check_labels(labels, len(sxx))
    if not 0.0 <= ratio <= 1.0:
        raise InputError(f"mask ratio {ratio} is outside [0, 1]: it is a probability")
    if sxy.shape != (len(sxx), len(yty)):
        raise InputError(f"moments do not fit: sxx {sxx.shape}, sxy {sxy.shape}, yty {yty.shape}")
    same_patch = labels[:, None] == labels[None, :]
    metric = np.where(same_patch, sxx, (1.0 - ratio) * sxx)
    directions = _directions(sxx @ sxx, metric, "gvd")
    try:
        factor = scipy.linalg.cholesky(sxx, lower=True, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise InputError(_SINGULAR) from error
    triangle = np.asarray(np.linalg.qr(factor.T @ directions, mode="r"))
    t = scipy.linalg.solve_triangular(triangle.T, directions.T @ sxy, lower=True, check_finite=False)
    return _percent(np.einsum("ka,ab,kb->k", t, yty, t, optimize=True))


_SINGULAR = (
    "the second moments are singular (a constant or duplicated pixel, or fewer samples than "
    "pixels): jitter the images with authors_preprocessing or use more of them"
)


def _check_labels(labels: np.ndarray, dim: int) -> None:
    """Raise `InputError` unless there is one label for each of the `dim` pixels."""
    if labels.shape != (dim,):
        raise InputError(f"patch labels of shape {labels.shape} do not fit {dim} pixels: give one label per pixel")


def _directions(matrix: np.ndarray, metric: np.ndarray, driver: Literal["gvd", "gvx"]) -> np.ndarray:
    """Generalised eigenvectors [d, d] of the pencil (matrix, metric), largest eigenvalue first.

    LAPACK's gvx is what SciPy calls for a range of eigenvectors, gvd (divide and conquer) for all.
    """
    try:
        _, vectors = scipy.linalg.eigh(matrix, metric, driver=driver, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise InputError(_SINGULAR) from error
    return vectors[:, ::-1]


def _percent(numerators: np.ndarray) -> np.ndarray:
    """``100 sqrt(cumulative share)`` [d] of numerators [d]."""
    curve = np.cumsum(numerators)
    if not curve[-1] > 0.0:
        raise InputError("the targets do not covary with the images: there is no alignment to plot")
    return 100.0 * np.sqrt(curve / curve[-1])
