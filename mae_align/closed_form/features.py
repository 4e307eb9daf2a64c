"""The general path: Theorem 3 for any corruption with second moments, whatever its form.

With G = cov(x') = L L^T and A = cov(x', x), the top solutions of A A^T v = mu G v are v = L^-T o, with o the left
singular vectors of L^-1 A and mu the *squares* of its singular values. Forming A A^T first would square the spread of
the spectrum. Where G is singular an eigendecomposition on its numerical range takes the place of the Cholesky factor.
See docs/theory.md, section 3.5.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from scipy.linalg import get_lapack_funcs

from mae_align.closed_form.factorize import PrimalProblem
from mae_align.corruption import CleanImages, Corruption, CorruptionMoments
from mae_align.corruption.base import Images
from mae_align.runtime.devices import solve_context
from mae_align.runtime.errors import InputError


class CorruptionFeatures(NamedTuple):
    """Features of a denoising autoencoder, best first: the first k columns are the solution for k.

    Attributes:
        encoder: [d, m] V, scaled to V^T gram V = I with G = keep * gram.
        decoder: [m, d] Z = (V^T G V)^-1 V^T A, one row per feature ([m, p] for a target operator).
        mu: [m] eigenvalues in units of keep, descending, squared pixel units.
        q: [r, m] nested orthonormal sample basis of the features of clean images, in the coordinates of the
            factorised problem; a column is 0 where its feature adds nothing to those before it.
        corrupted: the second moments they were found from.
        start: loss at k = 0, squared pixel units; the loss at k is start - keep * (sum of the first k of mu).
    """

    encoder: np.ndarray
    decoder: np.ndarray
    mu: np.ndarray
    q: np.ndarray
    corrupted: CorruptionMoments
    start: float

    @property
    def keep(self) -> float:
        """Factor of G and A in [0, 1]."""
        return self.corrupted.keep

    @property
    def gap(self) -> np.ndarray:
        """[m] (mu_k - mu_{k+1}) / mu_k; at 0 the first k features are not identified."""
        return 1.0 - np.append(self.mu[1:], 0.0) / self.mu

    def loss(self, k: int) -> float:
        """Minimum of E|Z^T V^T x' - x|^2 over k features."""
        return self.start - self.keep * float(self.mu[:k].sum())


def clean_images(problem: PrimalProblem, *, images: Images | None = None, centered: bool = True) -> CleanImages:
    """What a corruption may ask about the images of a factorised problem.

    Args:
        problem: the factorised problem. images: [n, h, w, c] or a function that starts a pass over batches.
        centered: whether the moments are about the mean.

    Returns:
        The clean moments, floor included.

    Example:
        >>> from mae_align.closed_form.factorize import factorize
        >>> from mae_align.moments.moments import Moments
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> clean_images(factorize(Moments.from_arrays(x, np.arange(50) % 2))).image_shape
        (2, 2, 1)
    """
    return CleanImages(problem.sxx, problem.mean_x, problem.image_shape, problem.pixel_noise, centered, images)


def corruption_features(
    problem: PrimalProblem, corruption: Corruption, *, images: Images | None = None, centered: bool = True
) -> CorruptionFeatures:
    """Theorem 3 for any corruption: V spans the top-k solutions of A A^T v = mu G v, for every k at once.

    Where the problem has a target operator W, A is cov(x', W x) = cov(x', x) W^T.

    Args:
        problem: the factorised problem. corruption: any object with second moments.
        images, centered: as in :func:`clean_images`.

    Returns:
        As many features as carry information through the corruption, at most the rank. float64. Cost: one Cholesky
        factor (one eigh where G is singular), one SVD and one QR of size d.

    Raises:
        InputError: a corruption that does not fit the images, or that leaves nothing of them.

    Example:
        >>> from mae_align.corruption import GaussianNoise
        >>> from mae_align.closed_form.factorize import factorize
        >>> from mae_align.moments.moments import Moments
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> problem = factorize(Moments.from_arrays(x, np.arange(50) % 2))
        >>> corruption_features(problem, GaussianNoise(1.0)).encoder.shape
        (4, 4)
    """
    return moments_features(problem, corruption.moments(clean_images(problem, images=images, centered=centered)))


def moments_features(problem: PrimalProblem, corrupted: CorruptionMoments) -> CorruptionFeatures:
    """The same from the second moments of a corruption; see :func:`corruption_features`.

    Args:
        problem: the factorised problem. corrupted: second moments of x'.

    Returns:
        As :func:`corruption_features`.

    Raises:
        InputError: a corruption that leaves nothing of the images.

    Example:
        >>> from mae_align.closed_form.factorize import factorize
        >>> from mae_align.moments.moments import Moments
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> problem = factorize(Moments.from_arrays(x, np.arange(50) % 2))
        >>> moments_features(problem, CorruptionMoments(problem.sxx, problem.sxx, 1.0)).q.shape
        (4, 4)
    """
    gram, cross = corrupted.gram, corrupted.cross
    if problem.target is not None:
        # Row i of A is cov(x'_i, x), an image: W maps it to cov(x'_i, W x).
        cross = np.asarray(problem.target.apply(cross.reshape(-1, *problem.image_shape)), np.float64)
    with solve_context("float64"):
        lower = _cholesky_factor(gram, problem.rtol)
        if lower is not None:
            encoder, size, right = (np.asarray(a) for a in _from_cholesky(lower, cross))
        else:
            values, vectors = (np.asarray(a) for a in _eigh(gram))
            real = values > problem.rtol * values[-1]
            half = vectors[:, real] / np.sqrt(values[real])
            encoder, size, right = (np.asarray(a) for a in _from_root(half, cross))
        # Directions that the corruption wipes out, or that clean images never take, reconstruct nothing: v^T A, of
        # length ``size``, is rounding. Without a corruption this is the rule for the rank of S.
        told = size > problem.rtol * np.linalg.norm(encoder, axis=0) * _spectral_norm(cross)
        m = min(int(told.cumprod().sum()), problem.rank)
        if m == 0:
            raise InputError("the corruption leaves nothing of these images: there is nothing to reconstruct from")
        encoder, size = encoder[:, :m], size[:m]
        features = problem.root.T @ encoder
        # What clean images show of a feature by rounding alone is none of it, whatever its direction.
        shown = np.linalg.norm(features, axis=0)
        scale = np.sqrt(problem.s[0]) * np.linalg.norm(encoder, axis=0)
        q = nested_basis(np.where(shown > problem.rtol * scale, features, 0.0), problem.rtol)
        return CorruptionFeatures(encoder, size[:, None] * right[:m], size**2, q, corrupted, problem.target_trace)


def nested_basis(features: np.ndarray, rtol: float) -> np.ndarray:
    """Orthonormal columns whose first k span the first k features, for every k.

    Args:
        features: [r, m]. rtol: a column with a relative remainder of this size adds nothing.

    Returns:
        [r, m]; columns that add nothing are 0. Cost: one QR, and one Gram-Schmidt pass where there are such columns.

    Example:
        >>> nested_basis(np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]]), 1e-12).round(6).tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    size = np.linalg.norm(features, axis=0)
    q, b = np.linalg.qr(features)
    if q.shape == features.shape and (np.abs(np.diag(b)) > rtol * size).all():
        return q * np.where(np.diag(b) < 0, -1.0, 1.0)
    # Householder columns of dependent features are arbitrary and would leak into later spans.
    q = np.zeros_like(features)
    for j, column in enumerate(features.T):
        rest = column - q @ (q.T @ column)
        rest = rest - q @ (q.T @ rest)
        if size[j] > 0 and np.linalg.norm(rest) > rtol * size[j]:
            q[:, j] = rest / np.linalg.norm(rest)
    return q


def _spectral_norm(a: np.ndarray) -> float:
    """Largest singular value, from below, by a few steps of the power method."""
    v = a[np.argmax((a**2).sum(1))]
    for _ in range(8):
        if not v.any():
            return 0.0
        v = a.T @ (a @ (v / np.linalg.norm(v)))
    return float(np.sqrt(np.linalg.norm(v)))


def _cholesky_factor(gram: np.ndarray, rtol: float) -> np.ndarray | None:
    """L of G = L L^T, or None where G is singular within ``rtol`` (1-norm estimate, which bounds the 2-norm's)."""
    lower = np.asarray(_cholesky(gram))
    if not np.isfinite(lower).all():
        return None
    (pocon,) = get_lapack_funcs(("pocon",), (lower,))
    rcond, _ = pocon(lower, np.abs(gram).sum(0).max(), uplo="L")
    return lower if rcond > rtol else None


@jax.jit
def _cholesky(gram: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(gram)


@jax.jit
def _eigh(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(gram)
    return values, vectors


@jax.jit
def _from_cholesky(lower: jax.Array, cross: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    left, size, right = jnp.linalg.svd(solve_triangular(lower, cross, lower=True), full_matrices=False)
    return solve_triangular(lower, left, lower=True, trans=1), size, right


@jax.jit
def _from_root(half: jax.Array, cross: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    high = jax.lax.Precision.HIGHEST
    left, size, right = jnp.linalg.svd(jnp.dot(half.T, cross, precision=high), full_matrices=False)
    return jnp.dot(half, left, precision=high), size, right


def feature_basis(problem: PrimalProblem, encoder: np.ndarray) -> np.ndarray:
    """Orthonormal sample basis of the features V^T x, in the coordinates of the factorised problem.

    Q of R^T V = Q B; two encoders with the same span of Q give every linear probe the same features.

    Args:
        problem: factorised from moments (it needs the pixels' eigenvectors). encoder: [d, k] V, k <= r.

    Returns:
        [r, k] with orthonormal columns, float64. Cost d r k.

    Raises:
        InputError: another shape, NaN or infinite values, or columns that are linearly dependent on these images to
            the precision of the eigenvectors (of a float32 problem, some that are dependent pass for independent).

    Example:
        >>> from mae_align.closed_form.factorize import factorize
        >>> from mae_align.moments.moments import Moments
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> feature_basis(factorize(Moments.from_arrays(x, np.arange(50) % 2)), np.eye(4)[:, :2]).shape
        (4, 2)
    """
    v = np.asarray(encoder, np.float64)
    if v.ndim != 2 or len(v) != len(problem.u) or not np.isfinite(v).all():
        raise InputError(f"encoder of shape {list(v.shape)}: give finite numbers [{len(problem.u)}, k]")
    problem.check_k(v.shape[1])
    q, b = np.linalg.qr(problem.root.T @ v)
    independent = (np.abs(np.diag(b)) > problem.rtol * np.linalg.norm(b, axis=0)).all()
    if independent:
        # R^T (V B^-1) = Q. The eigenvectors of R are known to rtol s_max / s, so R^T v to rtol s_max / sqrt(s) |v|.
        unit = np.linalg.solve(b.T, v.T)
        rounding = problem.cutoff / np.sqrt(problem.s[-1])
        independent = (rounding * np.linalg.norm(unit, axis=1) < 1.0).all()
    if not independent:
        raise InputError("the encoder's columns are linearly dependent on these images: drop the redundant ones")
    return q
