"""One factorisation of the moments, and one change of basis per patch size, that every sweep shares.

With S = cov(x) plus the pixel noise floor, S = U diag(s) U^T on its numerical range (rank r) and R = U diag(sqrt s)::

    T0 = R^+ Sxy = diag(s)^-1/2 U^T Sxy                                      [r, q]

A patch mask with drop probability p on top of isotropic pixel noise of variance sigma^2 has, up to a factor that does
not change the encoder, G = (1 - p) S + p D + sigma^2 I, D the part of S within patches. In the coordinates of R::

    P = R^T (D + rho I)^-1 R = E diag(pi) E^T,  rho = sigma^2 / p            [r, r]
    R^T G^-1 R = E diag(w^2) E^T,  w^2 = pi / (p + (1 - p) pi)

so E is computed once per patch size and a mask ratio only changes the diagonal w. See docs/theory.md, section 4.
:mod:`mae_align.dual` makes the same coordinates from samples, without any d x d array.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.devices import solve_context
from mae_align.errors import InputError
from mae_align.memory import check_memory, primal_bytes
from mae_align.moments import Moments
from mae_align.patches import PatchSize, patch_grid, patch_labels
from mae_align.problem import (
    DType,
    Factorized,
    check_options,
    check_variance,
    default_floor,
    default_rtol,
    within_targets,
)
from mae_align.products import gram
from mae_align.targets import TargetOperator, mapped, target_gram


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PrimalProblem(Factorized):
    """The problem factorised from second moments: S = U diag(s) U^T with U at hand.

    Attributes:
        u: [d, r] eigenvectors. sxx: [d, d] S itself, floor included.
    """

    u: np.ndarray
    sxx: np.ndarray

    @property
    def root(self) -> np.ndarray:
        """[d, r] R = U diag(sqrt s)."""
        return self.u * np.sqrt(self.s)

    def precision(self, patch_size: PatchSize, rho: float) -> jax.Array:
        """[r, r] P = R^T (D + rho I)^-1 R. Cost d r^2 + the blocks' eigendecompositions."""
        dtype = np.dtype(self.dtype)
        root = jnp.asarray(self.root, dtype)
        p = jnp.zeros((self.rank, self.rank), dtype)
        for index in patch_blocks(patch_labels(self.image_shape, patch_size)):
            block = np.ascontiguousarray(self.sxx[index[:, :, None], index[:, None, :]], dtype)
            p = _add_precision(p, root, index, block, dtype.type(rho), dtype.type(self.cutoff))
        return p

    def solved_root(self, patch_size: PatchSize, rho: float) -> np.ndarray:
        """[d, r] (D + rho I)^-1 R, inside :func:`mae_align.devices.solve_context`. Cost d c r, c pixels in a patch."""
        dtype = np.dtype(self.dtype)
        out, root = np.empty(self.u.shape, dtype), self.root.astype(dtype)
        for index in patch_blocks(patch_labels(self.image_shape, patch_size)):
            block = np.ascontiguousarray(self.sxx[index[:, :, None], index[:, None, :]], dtype)
            out[index] = _solve_blocks(root, index, block, dtype.type(rho), dtype.type(self.cutoff))
        return out


class PatchBasis(NamedTuple):
    """Coordinates in which every mask ratio of one patch size is diagonal.

    Attributes:
        e: [r, r] eigenvectors of P, by descending pi. pi: [r] eigenvalues, floored at eps * pi_max.
        gram: [r, r] K = E^T diag(s) E (E^T R^T W^T W R E where W x is reconstructed). target: [r, q] T = E^T T0.
    """

    e: jax.Array
    pi: jax.Array
    gram: jax.Array
    target: jax.Array


def factorize(
    moments: Moments,
    *,
    pixel_noise: float | None = None,
    rtol: float | None = None,
    dtype: DType = "float64",
    target: TargetOperator | None = None,
) -> PrimalProblem:
    """Eigendecomposition of the pixel covariance with its noise floor.

    S = cov(x) + pixel_noise I = U diag(s) U^T, s > rtol * s_max.

    Args:
        moments: of the training data, [d, d] and [d, q].
        pixel_noise: variance of the measurement noise of one pixel, squared units of the stored pixels. Default:
            quantisation step^2 / 12 for 8-bit images, 1e-9 of the largest eigenvalue for float64
            images (1e-7 for float32). 0 for no floor.
        rtol: relative cutoff of the spectrum; default d * 2.2e-16 in float64, 1e-7 in float32.
        dtype: precision of this and all later solves ("float32" loses rank and accuracy).
        target: W where W x is reconstructed instead of x.

    Returns:
        The factorised problem. Cost: one eigh of size d; memory about 56 d^2 bytes.

    Raises:
        InputError: fewer than 2 samples, constant images, constant targets, a negative floor, not enough memory, a
            target operator that does not fit the images or leaves nothing of them, or samples in place of moments
            (see :func:`mae_align.dual.factorize_samples`).

    Example:
        >>> x = np.random.default_rng(0).integers(0, 256, (50, 3, 3, 1)).astype(np.uint8)
        >>> f = factorize(Moments.from_arrays(x, np.arange(50) % 2))
        >>> f.rank, round(f.pixel_noise, 4)
        (9, 0.0833)
    """
    if not isinstance(moments, Moments):
        raise InputError(
            f"this needs second moments [d, d], not {type(moments).__name__}: make them with Moments.from_arrays"
        )
    if target is not None:
        mapped(target, np.zeros((1, *moments.image_shape)))
    check_options(moments.count, pixel_noise, rtol, dtype)
    d = moments.num_pixels
    check_memory(primal_bytes(d), f"factorising second moments of {d} pixel values ({d} x {d})", "shrink the images")
    second = moments.second_moments()
    check_variance(float(np.trace(second.sxx)), float(np.trace(second.syy)) if second.syy.size else None)
    if rtol is None:
        rtol = default_rtol(d, dtype)
    with solve_context(dtype, alone=True):
        s, u = (np.asarray(a) for a in eigh(np.asarray(second.sxx, dtype)))
    if pixel_noise is None:
        pixel_noise = default_floor(moments.pixel_dtype, moments.quantization_step, float(s[-1]))
    s = s + s.dtype.type(pixel_noise)  # isotropic: the eigenvectors stay
    sxx = second.sxx + pixel_noise * np.eye(d)
    keep = s > rtol * s[-1]
    s, u = s[keep][::-1].copy(), u[:, keep][:, ::-1].copy()
    t0 = (u.T @ second.sxy.astype(u.dtype)) / np.sqrt(s)[:, None]
    return PrimalProblem(
        s=s,
        u=u,
        t0=within_targets(t0, second.syy),
        trace=float(np.trace(sxx)),
        sxx=sxx,
        syy=second.syy,
        yty=moments.yty,
        mean_x=moments.mean_x,
        mean_y=moments.mean_y,
        count=moments.count,
        pixel_noise=float(pixel_noise),
        rtol=rtol,
        image_shape=moments.image_shape,
        dtype=dtype,
        target=target,
        target_gram=None if target is None else target_gram(target, u * np.sqrt(s), moments.image_shape),
    )


def patch_basis(problem: Factorized, patch_size: PatchSize, rho: float = 0.0) -> PatchBasis:
    """Eigenbasis of P = R^T (D + rho I)^-1 R, D the part of S within patches.

    Blocks of one shape are decomposed as a batch; a singular block is inverted on its range (the same cutoff as S).

    Args:
        problem: the factorised problem. patch_size: int or (h, w) in pixels.
        rho: sigma^2 / p for isotropic noise before the mask, squared pixel units.

    Returns:
        e [r, r], pi [r] descending, K [r, r], T [r, q]. Cost: d r^2 + one eigh of size r.

    Raises:
        InputError: a bad patch size.

    Example:
        >>> x = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1)).astype(np.uint8)
        >>> basis = patch_basis(factorize(Moments.from_arrays(x, np.arange(50) % 2)), 4)
        >>> bool(np.allclose(basis.pi, 1.0))  # one patch: D = S, P = I
        True
    """
    patch_grid(problem.image_shape, patch_size)
    with solve_context(problem.dtype):
        # Wait inside: the BLAS limit holds only here.
        return jax.block_until_ready(basis_of(problem, problem.precision(patch_size, rho)))


def basis_of(problem: Factorized, precision: jax.Array) -> PatchBasis:
    """Eigenbasis of a precision matrix P [r, r], inside :func:`mae_align.devices.solve_context`."""
    basis = _basis(precision, np.asarray(problem.s, problem.dtype), np.asarray(problem.t0, problem.dtype))
    if problem.target_gram is not None:
        basis = basis._replace(gram=_congruence(basis.e, np.asarray(problem.target_gram, problem.dtype)))
    return basis


def pca_basis(problem: Factorized, noise_variance: float = 0.0) -> PatchBasis:
    """The basis without a mask: E = I, and pi = s / sigma^2 for isotropic noise (1 where there is none).

    Args:
        problem: the factorised problem. noise_variance: sigma^2, squared pixel units.

    Returns:
        The basis; no decomposition is needed.

    Example:
        >>> x = np.random.default_rng(0).integers(0, 256, (50, 2, 2, 1)).astype(np.uint8)
        >>> pca_basis(factorize(Moments.from_arrays(x, np.arange(50) % 2))).e.shape
        (4, 4)
    """
    with solve_context(problem.dtype):
        s = jnp.asarray(problem.s, problem.dtype)
        pi = s / noise_variance if noise_variance > 0 else jnp.ones_like(s)  # may overflow to inf: no noise
        gram = jnp.diag(s) if problem.target_gram is None else jnp.asarray(problem.target_gram, problem.dtype)
        return PatchBasis(jnp.eye(problem.rank, dtype=problem.dtype), pi, gram, jnp.asarray(problem.t0, problem.dtype))


def mask_weights(pi: np.ndarray, ratio: float, noise_variance: float = 0.0) -> np.ndarray:
    """Square roots of the eigenvalues of R^T G^-1 R: w = sqrt(pi / (p + (1 - p) pi)).

    Args:
        pi: [r] eigenvalues of the basis. ratio: effective drop probability p in [0, 1].
        noise_variance: sigma^2 of isotropic noise; at p = 0 it makes w = sqrt(pi / (1 + pi)), pi = s / sigma^2.

    Returns:
        [r] w; all ones at p = 0 without noise (PCA), sqrt(pi) at p = 1.

    Example:
        >>> mask_weights(np.array([4.0, 1.0]), 1.0).tolist()
        [2.0, 1.0]
    """
    pi = np.asarray(pi)
    offset = 1.0 if ratio == 0.0 and noise_variance > 0.0 else ratio
    # Divided through by pi, which may be infinite where the noise is negligible.
    return 1.0 / np.sqrt(offset / pi + (1.0 - ratio))


def patch_blocks(labels: np.ndarray) -> list[np.ndarray]:
    """Pixel indices [blocks, pixels] of the patches, one array for each number of pixels (at most four).

    Example:
        >>> [index.tolist() for index in patch_blocks(patch_labels((1, 3, 1), (1, 2)))]
        [[[2]], [[0, 1]]]
    """
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    sizes = sorted({len(m) for m in members})
    return [np.stack([m for m in members if len(m) == size]) for size in sizes]


@jax.jit
def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [n], ascending, and eigenvectors [n, n] of a symmetric matrix, compiled."""
    values, vectors = jnp.linalg.eigh(a, symmetrize_input=False)
    return values, vectors


def _half_solve(
    root: jax.Array, index: jax.Array, block: jax.Array, rho: jax.Array, cutoff: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """W [b, m, m] with W W^T = (D_b + rho I)^-1, on the range of D_b, and W^T R_b [b, m, r]."""
    values, vectors = jnp.linalg.eigh(block)
    # Without noise a null direction of a block carries no variance: it is left out, not inverted.
    inverse = jnp.where(values + rho > cutoff, 1.0 / jnp.where(values + rho > cutoff, values + rho, 1.0), 0.0)
    scaled = vectors * jnp.sqrt(inverse)[:, None, :]
    return scaled, jnp.einsum("bij,bir->bjr", scaled, root[index], precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _add_precision(
    p: jax.Array, root: jax.Array, index: jax.Array, block: jax.Array, rho: jax.Array, cutoff: jax.Array
) -> jax.Array:
    """P + sum over blocks of R_b^T (D_b + rho I)^-1 R_b, in the blocks' own eigenbases."""
    return p + gram(_half_solve(root, index, block, rho, cutoff)[1].reshape(-1, root.shape[1]))


@jax.jit
def _solve_blocks(root: jax.Array, index: jax.Array, block: jax.Array, rho: jax.Array, cutoff: jax.Array) -> jax.Array:
    """[b, m, r] (D_b + rho I)^-1 R_b."""
    scaled, half = _half_solve(root, index, block, rho, cutoff)
    return jnp.einsum("bij,bjr->bir", scaled, half, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _basis(p: jax.Array, s: jax.Array, t0: jax.Array) -> PatchBasis:
    values, vectors = jnp.linalg.eigh(p)
    e, pi = vectors[:, ::-1], values[::-1]
    pi = jnp.maximum(pi, jnp.finfo(pi.dtype).eps * pi[0])
    return PatchBasis(e, pi, gram(jnp.sqrt(s)[:, None] * e), jnp.dot(e.T, t0, precision=jax.lax.Precision.HIGHEST))


@jax.jit
def _congruence(e: jax.Array, gram: jax.Array) -> jax.Array:
    high = jax.lax.Precision.HIGHEST
    inside = jnp.dot(e.T, jnp.dot(gram, e, precision=high), precision=high)
    return (inside + inside.T) / 2
