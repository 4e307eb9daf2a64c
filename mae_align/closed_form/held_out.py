"""Held-out curves for every k, from moments or samples of held-out data (docs/theory.md, section 7.1).

With moments about the training means, whitened coordinates f_i of the features, M = f^T Sxx_ev f and B = f^T Sxy_ev::

    error(k) = tr Syy_ev - 2 sum_{i<=k} t_i.B_i + sum_{i,j<=k} (t_i.t_j) M_ij

for every k by one 2-d cumulative sum. Where the held-out images themselves are at hand
(:mod:`mae_align.closed_form.dual`), the same error is a sum over their whitened coordinates.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.data.patches import ImageShape
from mae_align.moments.moments import Moments
from mae_align.moments.samples import Samples
from mae_align.runtime.devices import solve_context
from mae_align.runtime.errors import InputError

_HIGHEST = jax.lax.Precision.HIGHEST


class HeldOut(NamedTuple):
    """Held-out moments in the whitened coordinates of a factorised problem, as parts of one mean over all samples.

    Attributes:
        gram: [r, r] diag(s)^-1/2 U^T Sxx_ev U diag(s)^-1/2.
        cross: [r, q] diag(s)^-1/2 U^T Sxy_ev.
        variance: scalar tr Syy_ev about the training mean.
        group_gram: [g, r, r] float32 parts of ``gram`` (only standard errors use them).
        group_cross: [g, r, q] parts of ``cross``.
        group_variance: [g].
    """

    gram: np.ndarray
    cross: np.ndarray
    variance: np.ndarray | np.floating
    group_gram: np.ndarray
    group_cross: np.ndarray
    group_variance: np.ndarray

    def errors(self, f: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Errors [k] and [g, k], see :func:`held_out_errors`. Cost 2 (g + 1) r^2 k; groups run in float32."""
        c = _couple(f, t)
        linear = jnp.cumsum((t * jnp.dot(f.T, self.cross, precision=_HIGHEST)).sum(1))
        square = jnp.cumsum((f * jnp.dot(self.gram, c, precision=_HIGHEST)).sum(0))
        f_low, c_low = f.astype(jnp.float32), c.astype(jnp.float32)

        def one_group(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            gram, cross, variance = part
            rows = (f_low * jnp.dot(gram, c_low, precision=_HIGHEST)).sum(0).astype(t.dtype)
            return variance + jnp.cumsum(rows - 2 * (t * jnp.dot(f.T, cross, precision=_HIGHEST)).sum(1))

        groups = jax.lax.map(one_group, (self.group_gram, self.group_cross, self.group_variance))
        return jnp.asarray(self.variance) - 2 * linear + square, groups


class HeldOutRows(NamedTuple):
    """Held-out samples in the whitened coordinates of a factorised problem.

    Attributes:
        rows: [n, r] whitened coordinates.
        targets: [n, q] about the training mean.
        share: [g, n] 1 / n where a sample is in a group, else 0.
        group_variance: [g] parts of tr Syy_ev about the training mean.
    """

    rows: np.ndarray
    targets: np.ndarray
    share: np.ndarray
    group_variance: np.ndarray

    def errors(self, f: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Errors [k] and [g, k], see :func:`held_out_errors`. Cost 2 n k (r + k)."""
        features = jnp.dot(self.rows, f, precision=_HIGHEST)
        # Row by row, the square of the prediction grows with feature i by its product with those before it.
        square = features * _couple(features, t)
        linear = features * jnp.dot(self.targets, t.T, precision=_HIGHEST)
        groups = jnp.cumsum(jnp.dot(self.share, square - 2 * linear, precision=_HIGHEST), axis=1)
        groups = groups + self.group_variance[:, None]
        return groups.sum(0), groups


class HeldOutCurves(NamedTuple):
    """Held-out r2 with its standard error, index 0 is k = 1.

    Attributes:
        r2: [k], may be negative.
        se: [k], NaN with fewer than two groups.
        influence: [g, k] share of each group in the estimate's error; ``paired_se`` of a difference of influences is
            the standard error of a difference.
    """

    r2: np.ndarray
    se: np.ndarray
    influence: np.ndarray


def check_held_out(eval_moments: Moments | Samples, moments: Moments | Samples) -> None:
    """Refuse held-out moments that do not fit the training data.

    Args:
        eval_moments: of the held-out data.
        moments: of the training data.

    Raises:
        InputError: another kind (moments or samples), image shape or number of targets, images made differently, or an
            empty group.

    Example:
        >>> m = Moments.from_arrays(np.eye(4).reshape(4, 2, 2, 1), np.eye(4))
        >>> check_held_out(m, m)
    """
    if type(eval_moments) is not type(moments):
        raise InputError(
            f"held-out data are {type(eval_moments).__name__} and training data {type(moments).__name__}: "
            "make both of one kind (summarize(..., like=training))"
        )
    check_projection(eval_moments, moments.image_shape, moments.num_targets)
    for name in ("pixel_dtype", "preprocessing", "center"):
        mine, theirs = getattr(moments, name), getattr(eval_moments, name)
        if mine != theirs:
            raise InputError(
                f"held-out moments were made differently: {name} is {theirs!r}, in training {mine!r}; "
                "prepare both data sets in one way"
            )


def check_projection(eval_moments: Moments | Samples, image_shape: ImageShape, num_targets: int) -> None:
    """Refuse held-out data of another image shape or number of targets, or with an empty group.

    Raises:
        InputError: see above.

    Example:
        >>> check_projection(Moments.from_arrays(np.eye(4).reshape(4, 2, 2, 1), np.eye(4)), (2, 2, 1), 4)
    """
    if eval_moments.image_shape != image_shape:
        raise InputError(
            f"held-out images are {eval_moments.image_shape}, training images {image_shape}: use one shape"
        )
    if eval_moments.num_targets != num_targets:
        raise InputError(
            f"held-out targets have {eval_moments.num_targets} columns, training targets {num_targets}: "
            "pass num_classes"
        )
    if (eval_moments.counts == 0).any():
        raise InputError(
            f"{eval_moments.count} held-out samples leave one of {len(eval_moments.counts)} groups empty: "
            "give more of them, or fewer groups"
        )


def held_out_errors(f: jax.Array, t: jax.Array, held: HeldOut | HeldOutRows) -> tuple[jax.Array, jax.Array]:
    """Mean squared probe error on held-out data for every k, in total and by group (traceable).

    error(k) = tr Syy_ev - 2 sum_{i<=k} t_i.B_i + sum_{i,j<=k} (t_i.t_j) M_ij. Row i of the double sum is f_i^T N c_i, N
    the projected held-out covariance, with c_i = |t_i|^2 f_i + 2 sum_{j<i} (t_i.t_j) f_j.

    Args:
        f: [r, k] orthonormal features in whitened coordinates.
        t: [k, q] their training targets.
        held: the held-out data in the same coordinates.

    Returns:
        total [k] and parts by group [g, k] (they sum to the total), squared target units. With moments the groups run
        in float32, since only standard errors use them.
    """
    return held.errors(f, t)


_compiled_errors = jax.jit(held_out_errors)


def solved_errors(f: np.ndarray, t: np.ndarray, held: HeldOut | HeldOutRows) -> dict[str, np.ndarray]:
    """:func:`held_out_errors` of features that are there already, as ``errors`` [k] and ``group_errors`` [g, k]."""
    with solve_context(t.dtype):
        errors, parts = _compiled_errors(f, t, held)
        return {"errors": np.asarray(errors), "group_errors": np.asarray(parts)}


def _couple(f: jax.Array, t: jax.Array) -> jax.Array:
    """Columns c_i = |t_i|^2 f_i + 2 sum_{j<i} (t_i.t_j) f_j, which serve every group."""
    inner = jnp.dot(t, t.T, precision=_HIGHEST)
    return jnp.dot(f, jnp.triu(2 * inner, 1) + jnp.diag(jnp.diag(inner)), precision=_HIGHEST)


def held_out_curves(errors: np.ndarray, group_errors: np.ndarray, held: HeldOut | HeldOutRows) -> HeldOutCurves:
    """Held-out r2 = 1 - error / tr Syy_ev and its grouped standard error.

    Args:
        errors: [..., k] from :func:`held_out_errors`.
        group_errors: [..., g, k] its parts.
        held: the held-out data.

    Returns:
        r2 [..., k], se [..., k], influence [..., g, k].

    Example:
        >>> held = HeldOut(
        ...     np.eye(1),
        ...     np.ones((1, 1)),
        ...     np.float64(2.0),
        ...     np.ones((2, 1, 1), np.float32),
        ...     np.ones((2, 1, 1)),
        ...     np.ones(2),
        ... )
        >>> held_out_curves(np.array([1.0]), np.array([[0.5], [0.5]]), held).r2.tolist()
        [0.5]
    """
    total = float(held.group_variance.sum())
    r2 = 1.0 - np.asarray(errors, np.float64) / total
    parts = np.asarray(group_errors, np.float64)
    # The parts carry float32 rounding: their own sum is the consistent centre of the influences.
    share = parts.sum(-2, keepdims=True) / total
    influence = -(parts - share * held.group_variance[:, None]) / total
    return HeldOutCurves(r2, paired_se(influence), influence)


def paired_se(influence: np.ndarray) -> np.ndarray:
    """Standard error of an estimate, or of any difference of estimates on the same held-out data.

    SE^2 = G/(G - 1) sum_g psi_g^2, psi the (difference of) influences of the G groups.

    Args:
        influence: [..., g, k].

    Returns:
        [..., k]; NaN with fewer than two groups.

    Example:
        >>> paired_se(np.array([[0.1], [-0.1]])).round(3).tolist()
        [0.2]
    """
    g = influence.shape[-2]
    if g < 2:
        return np.full((*influence.shape[:-2], influence.shape[-1]), np.nan)
    return np.sqrt(g / (g - 1) * (np.asarray(influence, np.float64) ** 2).sum(-2))
