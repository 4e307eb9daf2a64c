"""What runs at one grid point: pure functions, compiled for one point or vmapped over a batch of them.

At one point (docs/theory.md, section 4) the weighted problem of Theorems 1 and 3 is an ordinary symmetric eigenproblem
in the patch basis; b are its eigenvectors, largest first::

    H = beta diag(w) K diag(w) + alpha diag(w) T T^T diag(w) = b diag(mu) b^T

The features' orthonormal sample basis is E Q with diag(w) b = Q B. Householder QR gives B without forming the Gram
matrix of diag(w) b, whose condition number would be squared, and one triangular solve gives t = Q^T T.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from mae_align.closed_form.basis import PatchBasis
from mae_align.closed_form.held_out import HeldOut, HeldOutRows, held_out_errors

_HIGHEST = jax.lax.Precision.HIGHEST


class Shared(NamedTuple):
    """What the points of one basis have in common.

    Attributes:
        basis: coordinates in which every mask ratio of a patch size is diagonal.
        spectrum: [r] eigenvalues of S, or [r, r] R^T W^T W R where W x is reconstructed.
        held: projected held-out data; None for in-sample curves alone.
    """

    basis: PatchBasis
    spectrum: jax.Array
    held: HeldOut | HeldOutRows | None = None


class Weights(NamedTuple):
    """What one point has of its own; several points have a leading axis.

    Attributes:
        w: [r] weights of the mask.
        alpha: weight of supervision.
        beta: weight of reconstruction; 0 means its limit 0+.
    """

    w: jax.Array
    alpha: jax.Array
    beta: jax.Array


class Solution(NamedTuple):
    """The solution at one grid point; what was not asked for is None.

    Attributes:
        mu: [k] eigenvalues of H (shares of the loss at k = 0).
        gap: [k] (mu_k - mu_{k+1}) / mu_k of the solved matrix.
        t: [k, q] targets in the features' orthonormal basis.
        explained: [k] variance of the reconstructed image (or of W x) that a linear decoder of clean features 1..k
            explains, squared pixel units.
        errors: [k] mean squared probe error on held-out data.
        group_errors: [g, k] its parts by group.
    """

    mu: jax.Array
    gap: jax.Array
    t: jax.Array
    explained: jax.Array | None = None
    errors: jax.Array | None = None
    group_errors: jax.Array | None = None

    def named(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by name."""
        return {name: np.asarray(value) for name, value in self._asdict().items() if value is not None}


PointFunction = Callable[..., Solution]
"""Pure function ``(shared, weights, *, max_k)`` of one grid point."""


def directions(
    gram: jax.Array, target: jax.Array, w: jax.Array, alpha: jax.Array, beta: jax.Array, max_k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Directions b [r, k], mu [k], gap [k]; beta = 0 is the limit of a vanishing reconstruction weight."""
    wt = w[:, None] * target
    reconstruct = w[:, None] * gram * w[None, :]
    eps, scale = jnp.finfo(wt.dtype).eps, jnp.trace(reconstruct)

    def weighted() -> jax.Array:
        return beta * reconstruct + alpha * jnp.dot(wt, wt.T, precision=_HIGHEST)

    def graded() -> jax.Array:
        # Targets that outweigh reconstruction by more than 1/sqrt(eps) would drown it in rounding. Their directions
        # come first; the rest is solved in their complement. Shifting the first above 1 and scaling the second below
        # 1 lets one eigendecomposition order both.
        lead, size, _ = jnp.linalg.svd(wt, full_matrices=False)
        top = jnp.maximum(size[0], jnp.finfo(size.dtype).tiny)
        real = size > eps * wt.shape[0] * top
        strong = real & (jnp.sqrt(eps) * alpha * size**2 > beta * scale)
        ratio = jnp.where(beta > 0, alpha / jnp.where(beta > 0, beta, 1.0), 0.0)
        weak = jnp.where(real & ~strong, ratio * size**2, 0.0)
        both = reconstruct + jnp.dot(lead * weak[None, :], lead.T, precision=_HIGHEST)
        lead = jnp.where(strong[None, :], lead, 0.0)
        inner = jnp.dot(lead.T, both, precision=_HIGHEST)
        side = jnp.dot(lead, inner, precision=_HIGHEST)
        corner = jnp.dot(lead, jnp.dot(inner, lead, precision=_HIGHEST), precision=_HIGHEST)
        rest = both - side - side.T + jnp.dot(corner, lead.T, precision=_HIGHEST)
        order = 2.0 + (size / top) ** 2
        return rest / jnp.trace(rest) + jnp.dot(lead * order[None, :], lead.T, precision=_HIGHEST)

    drowned = (beta == 0) | (jnp.sqrt(eps) * alpha * jnp.sum(wt**2) > beta * scale)
    values, vectors = jnp.linalg.eigh(jax.lax.cond(drowned, graded, weighted))
    values, b = values[::-1], vectors[:, ::-1]

    def rayleigh() -> jax.Array:
        supervised = alpha * (jnp.dot(b.T, wt, precision=_HIGHEST) ** 2).sum(1)
        return supervised + beta * (b * jnp.dot(reconstruct, b, precision=_HIGHEST)).sum(0)

    mu = jax.lax.cond(drowned, rayleigh, lambda: values)
    gap = _gap(jnp.where(beta > 0, mu, values))
    return b[:, :max_k], mu[:max_k], gap[:max_k]


def solve_point(shared: Shared, at: Weights, *, max_k: int) -> Solution:
    """In-sample targets in the features' basis for every k at once, without forming the features.

    Args:
        shared: the basis; held-out data and the spectrum are not looked at.
        at: the point.
        max_k: number of features.

    Returns:
        mu [k], gap [k], t [k, q]. Cost: eigh of size r and an R-only QR [r, k]. Pure; vmap it over ``at``.
    """
    basis, w = shared.basis, at.w
    b, mu, gap = directions(basis.gram, basis.target, w, at.alpha, at.beta, max_k)
    triangle = jnp.linalg.qr(w[:, None] * b, mode="r")
    against = jnp.dot(b.T, w[:, None] * basis.target, precision=_HIGHEST)
    return Solution(mu, gap, solve_triangular(triangle, against, trans=1))


def features_of(shared: Shared, at: Weights, *, max_k: int) -> tuple[Solution, jax.Array]:
    """The solution and its features in the coordinates of the factorised problem.

    Args:
        shared: the basis and the spectrum.
        at: the point.
        max_k: number of features.

    Returns:
        The solution in-sample, and f [r, k] = E Q with orthonormal columns. Cost: eigh of size r, QR [r, k], r^2 k.
    """
    basis, s = shared.basis, shared.spectrum
    b, mu, gap = directions(basis.gram, basis.target, at.w, at.alpha, at.beta, max_k)
    q, _ = jnp.linalg.qr(at.w[:, None] * b)
    f = jnp.dot(basis.e, q, precision=_HIGHEST)
    t = jnp.dot(q.T, basis.target, precision=_HIGHEST)
    seen = s[:, None] * f if s.ndim == 1 else jnp.dot(s, f, precision=_HIGHEST)
    return Solution(mu, gap, t, jnp.cumsum((f * seen).sum(0))), f


def solve_features(shared: Shared, at: Weights, *, max_k: int) -> Solution:
    """The solution with its features formed, and its held-out errors where there are held-out data.

    Args:
        shared: the basis, the spectrum, and held-out data or None.
        at: the point.
        max_k: number of features.

    Returns:
        As :func:`features_of`, and errors. Cost: that, and of the errors (:func:`held_out_errors`).
    """
    return _with_errors(*features_of(shared, at, max_k=max_k), shared)


def solve_diagonal(shared: Shared, at: Weights, *, max_k: int) -> Solution:
    """The solution where K = diag(s) and nothing is supervised: the eigenvectors are the axes as they stand.

    Without a mask, with or without isotropic noise, w^2 s falls with s, so the features are the principal components.

    Args:
        shared: the basis without a mask, s [r] descending, and held-out data or None.
        at: w non-increasing, no supervision.
        max_k: number of features.

    Returns:
        As :func:`solve_features`; the features f are the first max_k columns of the identity. Cost r without errors.

    Example:
        >>> one, s = jnp.ones(2), jnp.array([3.0, 1.0])
        >>> basis = PatchBasis(jnp.eye(2), one, jnp.diag(s), one[:, None])
        >>> solve_diagonal(Shared(basis, s), Weights(one, jnp.zeros(()), jnp.asarray(0.25)), max_k=1).mu.tolist()
        [0.75]
    """
    s = shared.spectrum
    values = at.beta * at.w**2 * s
    solution = Solution(values[:max_k], _gap(values)[:max_k], shared.basis.target[:max_k], jnp.cumsum(s)[:max_k])
    return _with_errors(solution, jnp.eye(len(s), max_k, dtype=s.dtype), shared)


def _with_errors(solution: Solution, f: jax.Array, shared: Shared) -> Solution:
    """The solution with the held-out errors of its features f, where there are held-out data."""
    if shared.held is None:
        return solution
    errors, parts = held_out_errors(f, solution.t, shared.held)
    return solution._replace(errors=errors, group_errors=parts)


@partial(jax.jit, static_argnames=("function", "max_k"))
def solve_one(function: PointFunction, shared: Shared, at: Weights, *, max_k: int) -> Solution:
    """One point, compiled."""
    return function(shared, at, max_k=max_k)


@partial(jax.jit, static_argnames=("function", "max_k"))
def solve_many(function: PointFunction, shared: Shared, at: Weights, *, max_k: int) -> Solution:
    """Points along the leading axis of ``at``, compiled and vmapped."""
    return jax.vmap(lambda one: function(shared, one, max_k=max_k))(at)


def _gap(values: jax.Array) -> jax.Array:
    """[r] (mu_k - mu_{k+1}) / mu_k of descending values."""
    following = jnp.concatenate([values[1:], jnp.zeros_like(values[:1])])
    return (values - following) / jnp.maximum(values, jnp.finfo(values.dtype).tiny)
