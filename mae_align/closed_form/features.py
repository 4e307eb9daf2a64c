"""Any corruption to features (Theorem 3), the short way where there is one.

Isotropic noise leaves the principal components; masks of patches are diagonal in a basis that all of one patch size
share (docs/theory.md, section 4). Any other corruption goes the general way. With G = cov(x') = L L^T and
A = cov(x', x), the top solutions of A A^T v = mu G v are v = L^-T o, with o the left singular vectors of L^-1 A and mu
the *squares* of its singular values. Forming A A^T first would square the spread of the spectrum. Where G is singular
an eigendecomposition on its numerical range takes the place of the Cholesky factor (section 3.5).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from scipy.linalg import get_lapack_funcs

from mae_align.closed_form.basis import PatchBasis, mask_weights, patch_basis
from mae_align.closed_form.factorize import PrimalProblem
from mae_align.closed_form.point import Shared, Weights, directions
from mae_align.corruption import CleanImages, Corruption, CorruptionMoments, GaussianNoise, PatchMask, PatchMasking
from mae_align.corruption.base import Images
from mae_align.data.patches import ImageShape, PatchSize, patch_hw
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
        gap: [m] (mu_k - mu_{k+1}) / mu_k; at 0 the first k features are not identified.
        num_features: how many the corruption leaves, at least m.
        corrupted: the second moments they were found from.
        start: loss at k = 0, squared pixel units; the loss at k is start - keep * (sum of the first k of mu).
    """

    encoder: np.ndarray
    decoder: np.ndarray
    mu: np.ndarray
    q: np.ndarray
    gap: np.ndarray
    num_features: int
    corrupted: CorruptionMoments
    start: float

    @property
    def keep(self) -> float:
        """Factor of G and A in [0, 1]."""
        return self.corrupted.keep

    def loss(self, k: int) -> float:
        """Minimum of E|Z^T V^T x' - x|^2 over k features."""
        return self.start - self.keep * float(self.mu[:k].sum())


def clean_images(problem: PrimalProblem, *, images: Images | None = None, centered: bool = True) -> CleanImages:
    """What a corruption may ask about the images of a factorised problem.

    Args:
        problem: the factorised problem.
        images: [n, h, w, c] or a function that starts a pass over batches.
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


def shared_patch(corruption: Corruption, image_shape: ImageShape) -> tuple[int, int] | None:
    """Patch size whose basis makes a corruption cheap; None where it has none, or needs none.

    Corruptions with the same patch size share :func:`mae_align.closed_form.basis.patch_basis`: those that drop patches
    and fill them with the mean image.

    Example:
        >>> from mae_align.corruption import GaussianNoise, PatchMasking
        >>> shared_patch(PatchMasking(2, 0.5), (4, 4, 1)), shared_patch(GaussianNoise(1.0), (4, 4, 1))
        ((2, 2), None)
    """
    if not _is_plain_mask(corruption) or corruption.p_eff(image_shape) == 0.0:
        return None
    return patch_hw(corruption.patch_size)


def corruption_features(
    problem: PrimalProblem,
    corruption: Corruption | None,
    *,
    max_k: int | None = None,
    basis: PatchBasis | None = None,
    images: Images | None = None,
    centered: bool = True,
) -> CorruptionFeatures:
    """Theorem 3 for any corruption: V spans the top-k solutions of A A^T v = mu G v, for every k at once.

    Where the problem has a target operator W, A is cov(x', W x) = cov(x', x) W^T. Without a corruption and with
    isotropic noise the features are the principal components. With a mask of patches they are, in the coordinates of
    the patch basis (docs/theory.md, section 4), V = (D + rho I)^-1 R E diag(w / pi) b, R^T V = E diag(w) b.

    Args:
        problem: the factorised problem.
        corruption: any object with second moments; None for none.
        max_k: most features; None for the rank.
        basis: of the mask's patch size (:func:`shared_patch`), where it is at hand.
        images: as in :func:`clean_images`.
        centered: as in :func:`clean_images`.

    Returns:
        As many features as carry information through the corruption, at most the rank. float64. Cost: r^2 d for
        principal components; two eigh of size r (one with ``basis``), one QR and r^2 d for a mask; else one Cholesky
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
    mask = PatchMasking(1, 0.0) if corruption is None else corruption
    corrupted = mask.moments(clean_images(problem, images=images, centered=centered))
    if problem.target is None:
        ratio = mask.p_eff(problem.image_shape) if _is_plain_mask(mask) else 0.0
        if _is_plain_mask(mask) and ratio > 0.0:
            return _mask_features(problem, mask.patch_size, ratio, corrupted, max_k or problem.rank, basis)
        if (noise := _isotropic_noise(mask)) is not None:
            return _principal_features(problem, noise, corrupted, max_k or problem.rank)
    # A target operator may leave fewer features than the rank: only the general path counts them.
    return moments_features(problem, corrupted, max_k=max_k)


def _is_plain_mask(corruption: Corruption) -> TypeGuard[PatchMask]:
    """Whether a corruption drops patches and fills them with the mean image."""
    return isinstance(corruption, PatchMask) and getattr(corruption, "fill", None) is None


def _isotropic_noise(corruption: Corruption) -> float | None:
    """Variance of noise that is the same for all pixels; 0 for a mask that keeps everything, else None."""
    if isinstance(corruption, GaussianNoise):
        sigma = np.unique(np.asarray(corruption.sigma, np.float64))
        return float(sigma[0]) ** 2 if len(sigma) == 1 else None
    return 0.0 if _is_plain_mask(corruption) else None


def _principal_features(
    problem: PrimalProblem, noise: float, corrupted: CorruptionMoments, max_k: int
) -> CorruptionFeatures:
    """Principal components, which isotropic noise only shrinks: V = U diag(s + sigma^2)^-1/2."""
    size, u, s = 1.0 / np.sqrt(problem.s + noise), problem.u[:, :max_k], problem.s[:max_k]
    mu = (problem.s * size) ** 2
    encoder, decoder = u * size[:max_k], (u * (size[:max_k] * s)).T
    q = np.eye(problem.rank, max_k)
    gap = 1.0 - np.append(mu[1:], 0.0) / mu
    start = problem.target_trace
    return CorruptionFeatures(encoder, decoder, mu[:max_k], q, gap[:max_k], problem.rank, corrupted, start)


def _mask_features(
    problem: PrimalProblem,
    patch_size: PatchSize,
    ratio: float,
    corrupted: CorruptionMoments,
    max_k: int,
    basis: PatchBasis | None,
) -> CorruptionFeatures:
    """Features of a mask of patches in its patch basis."""
    basis = patch_basis(problem, patch_size) if basis is None else basis
    with solve_context(problem.dtype):
        w = mask_weights(np.asarray(basis.pi, np.float64), ratio)
        unsupervised = basis._replace(target=jnp.zeros((problem.rank, 1), basis.e.dtype))  # no target has a say
        at = Weights(jnp.asarray(w), jnp.zeros(()), jnp.asarray(1.0 / problem.target_trace))
        b, mu, gap, q = (
            np.asarray(a) for a in _directions_and_features(Shared(unsupervised, problem.spectrum), at, max_k)
        )
        solved = problem.solved_root(patch_size, 0.0)
        encoder = solved @ (np.asarray(basis.e) @ ((w / np.asarray(basis.pi))[:, None] * b))
    decoder, start = encoder.T @ corrupted.cross, problem.target_trace
    return CorruptionFeatures(encoder, decoder, mu * start, q, gap, problem.rank, corrupted, start)


def moments_features(
    problem: PrimalProblem, corrupted: CorruptionMoments, *, max_k: int | None = None
) -> CorruptionFeatures:
    """The same from the second moments of a corruption; see :func:`corruption_features`.

    Args:
        problem: the factorised problem.
        corrupted: second moments of x'.
        max_k: most features; None for the rank.

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
        gap = 1.0 - np.append(size[1:m] ** 2, 0.0) / size[:m] ** 2
        num_features, m = m, min(m, max_k or m)
        encoder, size = encoder[:, :m], size[:m]
        features = problem.root.T @ encoder
        # What clean images show of a feature by rounding alone is none of it, whatever its direction.
        shown = np.linalg.norm(features, axis=0)
        scale = np.sqrt(problem.s[0]) * np.linalg.norm(encoder, axis=0)
        q = nested_basis(np.where(shown > problem.rtol * scale, features, 0.0), problem.rtol)
        decoder, start = size[:, None] * right[:m], problem.target_trace
        return CorruptionFeatures(encoder, decoder, size**2, q, gap[:m], num_features, corrupted, start)


def nested_basis(features: np.ndarray, rtol: float) -> np.ndarray:
    """Orthonormal columns whose first k span the first k features, for every k.

    Args:
        features: [r, m].
        rtol: a column with a relative remainder of this size adds nothing.

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


@partial(jax.jit, static_argnames="max_k")
def _directions_and_features(
    shared: Shared, at: Weights, max_k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """b [r, k], mu [k], gap [k] and the features E Q [r, k] of a point."""
    b, mu, gap = directions(shared.basis.gram, shared.basis.target, at.w, at.alpha, at.beta, max_k)
    q, _ = jnp.linalg.qr(at.w[:, None] * b)
    return b, mu, gap, jnp.dot(shared.basis.e, q, precision=jax.lax.Precision.HIGHEST)


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
        problem: factorised from moments (it needs the pixels' eigenvectors).
        encoder: [d, k] V, k <= r.

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
