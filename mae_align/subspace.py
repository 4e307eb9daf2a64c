"""Subspaces of features: when two encoders see the same thing."""

from __future__ import annotations

import numpy as np

from mae_align.errors import InputError
from mae_align.factorize import PrimalProblem


def feature_basis(problem: PrimalProblem, encoder: np.ndarray) -> np.ndarray:
    """Orthonormal sample basis of the features V^T x, in the coordinates of the factorised problem.

    Q of R^T V = Q B; two encoders with the same span of Q give every linear probe the same features.

    Args:
        problem: factorised from moments (it needs the pixels' eigenvectors). encoder: [d, k] V.

    Returns:
        [r, k] with orthonormal columns, float64. Cost d r k.

    Raises:
        InputError: columns that are linearly dependent on these images.

    Example:
        >>> from mae_align.factorize import factorize
        >>> from mae_align.moments import Moments
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> feature_basis(factorize(Moments.from_arrays(x, np.arange(50) % 2)), np.eye(4)[:, :2]).shape
        (4, 2)
    """
    q, b = np.linalg.qr(problem.root.T @ np.asarray(encoder, np.float64))
    if (np.abs(np.diag(b)) <= problem.rtol * np.linalg.norm(b, axis=0)).any():
        raise InputError("the encoder's columns are linearly dependent on these images: drop the redundant ones")
    return q


def principal_angles(basis_a: np.ndarray, basis_b: np.ndarray) -> np.ndarray:
    """Principal angles between two subspaces, ascending.

    Cosines are the singular values of A^T B and sines those of (I - A A^T) B; each is used where it is accurate.

    Args:
        basis_a: [r, k] with orthonormal columns. basis_b: [r, k] likewise.

    Returns:
        [k] radians in [0, pi/2]. Cost r k^2.

    Raises:
        InputError: shapes that differ.

    Example:
        >>> principal_angles(np.eye(3)[:, :1], np.eye(3)[:, 1:2]).round(4).tolist()
        [1.5708]
    """
    if basis_a.shape != basis_b.shape:
        raise InputError(f"subspaces of shape {basis_a.shape} and {basis_b.shape}: compare the same k")
    inner = basis_a.T @ basis_b
    cosine = np.clip(np.linalg.svd(inner, compute_uv=False), 0.0, 1.0)
    sine = np.clip(np.linalg.svd(basis_b - basis_a @ inner, compute_uv=False)[::-1], 0.0, 1.0)
    return np.where(cosine > np.sqrt(0.5), np.arcsin(sine), np.arccos(cosine))
