"""One factorisation of the moments, and one change of basis per patch size, that every sweep shares.

With S = cov(x) plus the pixel noise floor, S = U diag(s) U^T on its numerical range (rank r) and R = U diag(sqrt s)::

    T0 = R^+ Sxy = diag(s)^-1/2 U^T Sxy                                      [r, q]

A patch mask with drop probability p on top of isotropic pixel noise of variance sigma^2 has, up to a factor that does
not change the encoder, G = (1 - p) S + p D + sigma^2 I, D the part of S within patches. In the coordinates of R::

    P = R^T (D + rho I)^-1 R = E diag(pi) E^T,  rho = sigma^2 / p            [r, r]
    R^T G^-1 R = E diag(w^2) E^T,  w^2 = pi / (p + (1 - p) pi)

so E is computed once per patch size and a mask ratio only changes the diagonal w. See docs/theory.md, section 4.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.devices import solve_context
from mae_align.errors import InputError
from mae_align.moments import Moments
from mae_align.patches import ImageShape, PatchSize, patch_grid, patch_labels
from mae_align.products import gram

DType = Literal["float64", "float32"]


@dataclasses.dataclass(frozen=True, eq=False)
class Factorized:
    """The factorised problem: S = U diag(s) U^T and the targets in its whitened coordinates.

    Attributes:
        s: [r] eigenvalues of S above the cutoff, descending, squared pixel units.
        u: [d, r] their eigenvectors.
        t0: [r, q] diag(s)^-1/2 U^T Sxy.
        sxx: [d, d] S itself, floor included.
        syy: [q, q] target covariance. yty: [q, q] uncentred target second moment.
        mean_x: [d]. mean_y: [q].
        pixel_noise: variance added to the diagonal of cov(x), squared pixel units.
        rtol: eigenvalues at or below rtol * s_max count as zero.
        image_shape: (h, w, c).
        dtype: precision of the solves.
    """

    s: np.ndarray
    u: np.ndarray
    t0: np.ndarray
    sxx: np.ndarray
    syy: np.ndarray
    yty: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    pixel_noise: float
    rtol: float
    image_shape: ImageShape
    dtype: DType

    @property
    def rank(self) -> int:
        """Numerical rank r of S; no more than r features can be told apart."""
        return len(self.s)

    @property
    def root(self) -> np.ndarray:
        """[d, r] R = U diag(sqrt s)."""
        return self.u * np.sqrt(self.s)

    def check_k(self, k: int) -> int:
        """Refuse a number of features outside 1..rank.

        Raises:
            InputError: k outside 1..rank.
        """
        if not isinstance(k, int | np.integer) or not 1 <= k <= self.rank:
            raise InputError(
                f"k={k} is not a number of features up to the rank {self.rank} of these images: "
                f"ask for a whole number 1 <= k <= {self.rank}"
            )
        return int(k)


class PatchBasis(NamedTuple):
    """Coordinates in which every mask ratio of one patch size is diagonal.

    Attributes:
        e: [r, r] eigenvectors of P, by descending pi. pi: [r] eigenvalues, floored at eps * pi_max.
        gram: [r, r] K = E^T diag(s) E. target: [r, q] T = E^T T0.
    """

    e: jax.Array
    pi: jax.Array
    gram: jax.Array
    target: jax.Array


def factorize(
    moments: Moments, *, pixel_noise: float | None = None, rtol: float | None = None, dtype: DType = "float64"
) -> Factorized:
    """Eigendecomposition of the pixel covariance with its noise floor.

    S = cov(x) + pixel_noise I = U diag(s) U^T, s > rtol * s_max.

    Args:
        moments: of the training data, [d, d] and [d, q].
        pixel_noise: variance of the measurement noise of one pixel, squared units of the stored pixels. Default:
            quantisation step^2 / 12 for 8-bit images, 1e-9 of the largest eigenvalue for float64
            images (1e-7 for float32). 0 for no floor.
        rtol: relative cutoff of the spectrum; default d * 2.2e-16 in float64, 1e-7 in float32.
        dtype: precision of this and all later solves ("float32" loses rank and accuracy).

    Returns:
        The factorised problem. Cost: one eigh of size d.

    Raises:
        InputError: fewer than 2 samples, constant images, constant targets, a negative floor.

    Example:
        >>> x = np.random.default_rng(0).integers(0, 256, (50, 3, 3, 1)).astype(np.uint8)
        >>> f = factorize(Moments.from_arrays(x, np.arange(50) % 2))
        >>> f.rank, round(f.pixel_noise, 4)
        (9, 0.0833)
    """
    if dtype not in ("float64", "float32"):
        raise InputError(f"dtype={dtype!r}: give 'float64' or 'float32'")
    if moments.count < 2:
        raise InputError(f"moments of {moments.count} samples: at least 2 are needed")
    second = moments.second_moments()
    if second.syy.size and not np.trace(second.syy) > 0:
        raise InputError("the targets are constant (one class?): there is nothing to explain")
    d = len(second.sxx)
    if not np.trace(second.sxx) > 0:
        raise InputError("the images are constant: there is nothing to reconstruct")
    if rtol is None:
        rtol = d * float(np.finfo(np.float64).eps) if dtype == "float64" else 1e-7
    if not 0 <= rtol < 1:
        raise InputError(f"rtol={rtol}: give a relative cutoff from 0 up to, not including, 1")
    if pixel_noise is not None and not (np.isfinite(pixel_noise) and pixel_noise >= 0):
        raise InputError(f"pixel_noise={pixel_noise}: give a variance of at least 0")
    with solve_context(dtype, alone=True):
        s, u = (np.asarray(a) for a in _eigh(np.asarray(second.sxx, dtype)))
    if pixel_noise is None:
        # Moments of float32 images are themselves rounded at about 1e-7 of the largest eigenvalue.
        relative = 1e-7 if moments.pixel_dtype == "float32" else 1e-9
        pixel_noise = moments.quantization_step**2 / 12 or relative * float(s[-1])
    s = s + s.dtype.type(pixel_noise)  # isotropic: the eigenvectors stay
    sxx = second.sxx + pixel_noise * np.eye(d)
    keep = s > rtol * s[-1]
    s, u = s[keep][::-1].copy(), u[:, keep][:, ::-1].copy()
    t0 = (u.T @ second.sxy.astype(u.dtype)) / np.sqrt(s)[:, None]
    # Centred one-hot targets add up to zero; whitening must not blow that rounding up to a target of its own.
    variance, axes = np.linalg.eigh(second.syy)
    largest = variance.max(initial=0.0)  # without targets there is none
    axes = axes[:, variance > len(variance) * np.finfo(np.float64).eps * largest].astype(u.dtype)
    return Factorized(
        s=s,
        u=u,
        t0=t0 @ axes @ axes.T,
        sxx=sxx,
        syy=second.syy,
        yty=moments.yty,
        mean_x=moments.mean_x,
        mean_y=moments.mean_y,
        pixel_noise=float(pixel_noise),
        rtol=rtol,
        image_shape=moments.image_shape,
        dtype=dtype,
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
    blocks = _patch_blocks(patch_labels(problem.image_shape, patch_size))
    with solve_context(problem.dtype):
        dtype = np.dtype(problem.dtype)
        root = jnp.asarray(problem.root, dtype)
        cutoff = dtype.type(problem.rtol * problem.s[0])
        p = jnp.zeros((problem.rank, problem.rank), dtype)
        for index in blocks:
            block = np.ascontiguousarray(problem.sxx[index[:, :, None], index[:, None, :]], dtype)
            p = _add_precision(p, root, index, block, dtype.type(rho), cutoff)
        # Wait inside: the BLAS limit holds only here.
        return jax.block_until_ready(_basis(p, np.asarray(problem.s, dtype), np.asarray(problem.t0, dtype)))


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
        return PatchBasis(
            jnp.eye(problem.rank, dtype=problem.dtype), pi, jnp.diag(s), jnp.asarray(problem.t0, problem.dtype)
        )


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


def _patch_blocks(labels: np.ndarray) -> list[np.ndarray]:
    """Pixel indices [blocks, pixels] of the patches, one array per patch shape (at most four)."""
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    sizes = sorted({len(m) for m in members})
    return [np.stack([m for m in members if len(m) == size]) for size in sizes]


@jax.jit
def _eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(a, symmetrize_input=False)
    return values, vectors


@jax.jit
def _add_precision(
    p: jax.Array, root: jax.Array, index: jax.Array, block: jax.Array, rho: jax.Array, cutoff: jax.Array
) -> jax.Array:
    """P + sum over blocks of R_b^T (D_b + rho I)^-1 R_b, in the blocks' own eigenbases."""
    values, vectors = jnp.linalg.eigh(block)
    # Without noise a null direction of a block carries no variance: it is left out, not inverted.
    inverse = jnp.where(values + rho > cutoff, 1.0 / jnp.where(values + rho > cutoff, values + rho, 1.0), 0.0)
    half = jnp.einsum("bij,bir->bjr", vectors, root[index], precision=jax.lax.Precision.HIGHEST)
    half = (jnp.sqrt(inverse)[:, :, None] * half).reshape(-1, root.shape[1])
    return p + gram(half)


@jax.jit
def _basis(p: jax.Array, s: jax.Array, t0: jax.Array) -> PatchBasis:
    values, vectors = jnp.linalg.eigh(p)
    e, pi = vectors[:, ::-1], values[::-1]
    pi = jnp.maximum(pi, jnp.finfo(pi.dtype).eps * pi[0])
    return PatchBasis(e, pi, gram(jnp.sqrt(s)[:, None] * e), jnp.dot(e.T, t0, precision=jax.lax.Precision.HIGHEST))
