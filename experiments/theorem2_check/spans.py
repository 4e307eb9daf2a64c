"""Subspaces of features: when two encoders see the same thing."""

from __future__ import annotations

import numpy as np

from mae_align.closed_form.compare import principal_angles
from mae_align.runtime.errors import InputError


def sample_basis(features: np.ndarray) -> np.ndarray:
    """Orthonormal basis of what a linear probe with an intercept can read out of features, in the space of the samples.

    Left singular vectors of the centred features; directions that are no more than rounding, in the features' own
    precision, are left out.

    Args:
        features: [n, k] floating, finite.

    Returns:
        [n, r] with orthonormal columns, r <= min(n - 1, k), float64; r = 0 for constant features. Cost n k^2.

    Raises:
        InputError: another shape, NaN or infinite values.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2))
        >>> sample_basis(np.concatenate([x, x + 1.0], axis=1)).shape
        (50, 2)
    """
    given = np.asarray(features)
    z = given.astype(np.float64)
    if z.ndim != 2 or 0 in z.shape or not np.isfinite(z).all():
        raise InputError(f"features of shape {list(z.shape)}: give finite numbers [n, k]")
    mean = z.mean(0)
    eps = np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps
    u, s, _ = np.linalg.svd(z - mean, full_matrices=False)
    relative = max(8 * eps, max(z.shape) * np.finfo(np.float64).eps)
    # Subtracting a large mean leaves the rounding of the mean.
    return u[:, s > relative * (s[0] + np.sqrt(len(z)) * np.abs(mean).max())]


def explained_shares(basis: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Share of each target's variance that the features explain linearly, R^2 = |Q^T y|^2 / |y|^2 of centred y.

    Args:
        basis: [n, r] of :func:`sample_basis`.
        targets: [n, m].

    Returns:
        [m] in [0, 1], NaN for targets that do not vary. Cost n r m.

    Raises:
        InputError: another number of samples.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 3))
        >>> explained_shares(sample_basis(x[:, :2]), x[:, :1] + x[:, 1:2]).round(6).tolist()
        [1.0]
    """
    y = np.asarray(targets, np.float64)
    if y.ndim != 2 or len(y) != len(basis):
        raise InputError(f"targets of shape {list(y.shape)}: give [{len(basis)}, m]")
    mean = y.mean(0)
    y = y - mean
    total = (y**2).sum(0)
    varies = total > len(y) * (8 * np.finfo(np.float64).eps * mean) ** 2
    return np.where(varies, ((basis.T @ y) ** 2).sum(0) / np.where(varies, total, 1.0), np.nan)


def span_angles(basis_a: np.ndarray, basis_b: np.ndarray) -> np.ndarray:
    """Principal angles of two spans whose dimensions may differ, ascending; what one lacks is at 90 degrees.

    Args:
        basis_a: [n, r] with orthonormal columns.
        basis_b: [n, k] likewise.

    Returns:
        [max(r, k)] radians in [0, pi/2]. Cost n r k.

    Raises:
        InputError: bases of other samples.

    Example:
        >>> span_angles(np.eye(3)[:, :1], np.eye(3)[:, :2]).round(4).tolist()
        [0.0, 1.5708]
    """
    if basis_a.ndim != 2 or basis_b.ndim != 2 or len(basis_a) != len(basis_b):
        raise InputError(f"bases of shape {basis_a.shape} and {basis_b.shape}: give [n, r] and [n, k]")
    if basis_a.shape == basis_b.shape:
        return principal_angles(basis_a, basis_b)
    small, large = sorted((basis_a, basis_b), key=lambda basis: basis.shape[1])
    missing = np.full(large.shape[1] - small.shape[1], np.pi / 2)
    # Turned so that its first columns are the ones nearest to the smaller span.
    turn = np.linalg.svd(large.T @ small, full_matrices=False)[0]
    return np.concatenate([principal_angles(small, large @ turn), missing])
