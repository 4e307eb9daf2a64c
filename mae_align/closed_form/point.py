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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from mae_align.closed_form.basis import PatchBasis
from mae_align.closed_form.factorize import Factorized
from mae_align.closed_form.held_out import HeldOut, HeldOutRows, held_out_errors

_HIGHEST = jax.lax.Precision.HIGHEST


class PointSolution(NamedTuple):
    """The solution at one grid point.

    Attributes:
        mu: [k] eigenvalues of H (shares of the loss at k = 0). gap: [k] (mu_k - mu_{k+1}) / mu_k of the solved matrix.
        t: [k, q] targets in the features' orthonormal basis.
    """

    mu: jax.Array
    gap: jax.Array
    t: jax.Array


class FeatureSolution(NamedTuple):
    """The solution with its features formed.

    Attributes:
        mu, gap, t: as in :class:`PointSolution`.
        explained: [k] variance of the reconstructed image (or of W x) that a linear decoder of clean features 1..k
            explains, squared pixel units.
    """

    mu: jax.Array
    gap: jax.Array
    t: jax.Array
    explained: jax.Array


def _directions(
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


def solve_point(
    gram: jax.Array, target: jax.Array, w: jax.Array, alpha: jax.Array, beta: jax.Array, *, max_k: int
) -> PointSolution:
    """Targets in the features' basis for every k at once, without forming the features.

    Args:
        gram: [r, r] K. target: [r, q] T. w: [r] mask weights. alpha: weight of supervision. beta: of reconstruction;
            0 means its limit 0+. max_k: number of features.

    Returns:
        mu [k], gap [k], t [k, q]. Cost: eigh of size r and an R-only QR [r, k]. Pure; vmap it over w, alpha, beta.
    """
    b, mu, gap = _directions(gram, target, w, alpha, beta, max_k)
    triangle = jnp.linalg.qr(w[:, None] * b, mode="r")
    against = jnp.dot(b.T, w[:, None] * target, precision=_HIGHEST)
    return PointSolution(mu, gap, solve_triangular(triangle, against, trans=1))


def solve_features(
    e: jax.Array,
    gram: jax.Array,
    target: jax.Array,
    s: jax.Array,
    w: jax.Array,
    alpha: jax.Array,
    beta: jax.Array,
    *,
    max_k: int,
) -> tuple[FeatureSolution, jax.Array]:
    """The solution and its features in the coordinates of the factorised problem.

    Args:
        e: [r, r] patch basis. s: [r] eigenvalues of S, or [r, r] R^T W^T W R where W x is reconstructed. Others as in
            :func:`solve_point`.

    Returns:
        The solution, and f [r, k] = E Q with orthonormal columns. Cost: eigh of size r, QR [r, k], r^2 k.
    """
    b, mu, gap = _directions(gram, target, w, alpha, beta, max_k)
    q, _ = jnp.linalg.qr(w[:, None] * b)
    f = jnp.dot(e, q, precision=_HIGHEST)
    t = jnp.dot(q.T, target, precision=_HIGHEST)
    seen = s[:, None] * f if s.ndim == 1 else jnp.dot(s, f, precision=_HIGHEST)
    return FeatureSolution(mu, gap, t, jnp.cumsum((f * seen).sum(0))), f


def diagonal_solution(s: jax.Array, target: jax.Array, w: jax.Array, beta: jax.Array, *, max_k: int) -> FeatureSolution:
    """The solution where K = diag(s) and nothing is supervised: the eigenvectors are the axes as they stand.

    Without a mask, with or without isotropic noise, w^2 s falls with s, so the features are the principal components.

    Args:
        s: [r] descending. target: [r, q] T. w: [r] weights, non-increasing. beta: weight of reconstruction.
        max_k: number of features.

    Returns:
        The solution; its features f are the first max_k columns of the identity. Cost r.

    Example:
        >>> one = jnp.ones(2)
        >>> diagonal_solution(jnp.array([3.0, 1.0]), one[:, None], one, jnp.asarray(0.25), max_k=1).mu.tolist()
        [0.75]
    """
    values = beta * w**2 * s
    return FeatureSolution(values[:max_k], _gap(values)[:max_k], target[:max_k], jnp.cumsum(s)[:max_k])


def _gap(values: jax.Array) -> jax.Array:
    """[r] (mu_k - mu_{k+1}) / mu_k of descending values."""
    following = jnp.concatenate([values[1:], jnp.zeros_like(values[:1])])
    return (values - following) / jnp.maximum(values, jnp.finfo(values.dtype).tiny)


def _features_and_errors(
    e: jax.Array,
    gram: jax.Array,
    target: jax.Array,
    s: jax.Array,
    held: HeldOut | HeldOutRows,
    w: jax.Array,
    alpha: jax.Array,
    beta: jax.Array,
    *,
    max_k: int,
) -> tuple[FeatureSolution, jax.Array, jax.Array]:
    solution, f = solve_features(e, gram, target, s, w, alpha, beta, max_k=max_k)
    return solution, *held_out_errors(f, solution.t, held)


def _diagonal_curves(*args: jax.Array, max_k: int) -> PointSolution:
    return PointSolution(*diagonal_solution(*args, max_k=max_k)[:3])


def _diagonal_errors(
    held: HeldOut, s: jax.Array, target: jax.Array, w: jax.Array, beta: jax.Array, *, max_k: int
) -> tuple[FeatureSolution, jax.Array, jax.Array]:
    solution = diagonal_solution(s, target, w, beta, max_k=max_k)
    return solution, *held_out_errors(jnp.eye(len(s), max_k, dtype=s.dtype), solution.t, held)


def _only_solution(*args: jax.Array, max_k: int) -> FeatureSolution:
    return solve_features(*args, max_k=max_k)[0]


def _one(function: Callable[..., Any]) -> Callable[..., Any]:
    return partial(jax.jit, static_argnames="max_k")(function)


def _many(function: Callable[..., Any], shared: int) -> Callable[..., Any]:
    """The same function mapped over its last three arguments (w, alpha, beta); the first ``shared`` are common."""

    @partial(jax.jit, static_argnames="max_k")
    def call(*args: Any, max_k: int) -> Any:
        return jax.vmap(partial(function, max_k=max_k), in_axes=(None,) * shared + (0, 0, 0))(*args)

    return call


class PointProgram(NamedTuple):
    """One compiled program of a grid: for a single point (CPU workers) and for a batch of points (accelerators).

    Attributes:
        name: part of a sweep's identity. point: pure function of a point. one: the same, jitted. many: jitted and
            vmapped over the last three arguments w, alpha, beta. shared: the arguments before those.
        named: the solution's arrays by name.
        diagonal: jitted function of (problem's s, T, w, beta), after ``held`` where there is one: the same solution
        where it needs no eigenvectors.
    """

    name: str
    point: Callable[..., Any]
    one: Callable[..., Any]
    many: Callable[..., Any]
    shared: Callable[[PatchBasis, Factorized, HeldOut | HeldOutRows | None], tuple[Any, ...]]
    named: Callable[[Any], dict[str, Any]]
    diagonal: Callable[..., Any]


def _spectrum(problem: Factorized) -> jax.Array:
    return jnp.asarray(problem.s if problem.target_gram is None else problem.target_gram, problem.dtype)


CURVES = PointProgram(
    "curves",
    solve_point,
    _one(solve_point),
    _many(solve_point, 2),
    lambda basis, problem, held: (basis.gram, basis.target),
    lambda out: out._asdict(),
    _one(_diagonal_curves),
)
FEATURES = PointProgram(
    "features",
    _only_solution,
    _one(_only_solution),
    _many(_only_solution, 4),
    lambda basis, problem, held: (basis.e, basis.gram, basis.target, _spectrum(problem)),
    lambda out: out._asdict(),
    _one(diagonal_solution),
)
HELD_OUT = PointProgram(
    "held out",
    _features_and_errors,
    _one(_features_and_errors),
    _many(_features_and_errors, 5),
    lambda basis, problem, held: (basis.e, basis.gram, basis.target, _spectrum(problem), held),
    lambda out: out[0]._asdict() | {"errors": out[1], "group_errors": out[2]},
    _one(_diagonal_errors),
)
