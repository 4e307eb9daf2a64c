"""One factorisation of the moments, and one change of basis per patch size, that every sweep shares.

With S = cov(x) plus the pixel noise floor, S = U diag(s) U^T on its numerical range (rank r) and R = U diag(sqrt s)::

    T0 = R^+ Sxy = diag(s)^-1/2 U^T Sxy                                      [r, q]

A patch mask with drop probability p on top of isotropic pixel noise of variance sigma^2 has, up to a factor that does
not change the encoder, G = (1 - p) S + p D + sigma^2 I, D the part of S within patches. In the coordinates of R::

    P = R^T (D + rho I)^-1 R = E diag(pi) E^T,  rho = sigma^2 / p            [r, r]
    R^T G^-1 R = E diag(w^2) E^T,  w^2 = pi / (p + (1 - p) pi)

so E is computed once per patch size and a mask ratio only changes the diagonal w. See docs/theory.md, section 4.
:mod:`mae_align.closed_form.dual` makes the same coordinates from samples, without any d x d array.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.data.patches import PatchSize, patch_grid
from mae_align.moments.sums import gram
from mae_align.runtime.devices import solve_context

if TYPE_CHECKING:
    from mae_align.closed_form.factorize import Factorized


class PatchBasis(NamedTuple):
    """Coordinates in which every mask ratio of one patch size is diagonal.

    Attributes:
        e: [r, r] eigenvectors of P, by descending pi.
        pi: [r] eigenvalues, floored at eps * pi_max.
        gram: [r, r] K = E^T diag(s) E (E^T R^T W^T W R E where W x is reconstructed).
        target: [r, q] T = E^T T0.
    """

    e: jax.Array
    pi: jax.Array
    gram: jax.Array
    target: jax.Array


def patch_basis(problem: Factorized, patch_size: PatchSize, rho: float = 0.0) -> PatchBasis:
    """Eigenbasis of P = R^T (D + rho I)^-1 R, D the part of S within patches.

    Blocks of one shape are decomposed as a batch; a singular block is inverted on its range (the same cutoff as S).

    Args:
        problem: the factorised problem.
        patch_size: int or (h, w) in pixels.
        rho: sigma^2 / p for isotropic noise before the mask, squared pixel units.

    Returns:
        e [r, r], pi [r] descending, K [r, r], T [r, q]. Cost: d r^2 + one eigh of size r.

    Raises:
        InputError: a bad patch size.

    Example:
        >>> from mae_align.moments.moments import Moments
        >>> from mae_align.closed_form.factorize import factorize
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
    """Eigenbasis of a precision matrix P [r, r], inside :func:`mae_align.runtime.devices.solve_context`."""
    basis = _basis(precision, np.asarray(problem.s, problem.dtype), np.asarray(problem.t0, problem.dtype))
    if problem.target_gram is not None:
        basis = basis._replace(gram=_congruence(basis.e, np.asarray(problem.target_gram, problem.dtype)))
    return basis


def pca_basis(problem: Factorized, noise_variance: float = 0.0) -> PatchBasis:
    """The basis without a mask: E = I, and pi = s / sigma^2 for isotropic noise (1 where there is none).

    Args:
        problem: the factorised problem.
        noise_variance: sigma^2, squared pixel units.

    Returns:
        The basis; no decomposition is needed.

    Example:
        >>> from mae_align.moments.moments import Moments
        >>> from mae_align.closed_form.factorize import factorize
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
        pi: [r] eigenvalues of the basis.
        ratio: effective drop probability p in [0, 1].
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
