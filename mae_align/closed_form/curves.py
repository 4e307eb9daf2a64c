"""How much of a task k features explain: three curves over every k, in-sample (docs/theory.md, section 5).

The features V_k^T x have an orthonormal sample basis Q_k; with t_i row i of Q^T Y (scaled by 1/sqrt n)::

    r2(k)        = sum_{i<=k} |t_i|^2 / tr Syy                   share of label variance that a linear probe explains
    alignment(k) = sum_{i<=k} t_i (Y^T Y) t_i^T / (its value at full rank), Y not centred in Y^T Y   the paper's ratio
    probe_mse(k) = tr Syy (1 - r2(k))                            the paper's Eq. (9)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mae_align.closed_form.factorize import factorize
from mae_align.closed_form.features import feature_basis
from mae_align.closed_form.held_out import (
    HeldOutCurves,
    check_held_out,
    held_out_curves,
    solved_errors,
)
from mae_align.moments.moments import Moments
from mae_align.runtime.checks import check_task


class Curves(NamedTuple):
    """Curves over the number of features, index 0 is k = 1.

    Attributes:
        r2: [k] share in [0, 1].
        alignment: [k] share in [0, 1].
        probe_mse: [k] squared target units.
    """

    r2: np.ndarray
    alignment: np.ndarray
    probe_mse: np.ndarray


def curves_from_targets(t: np.ndarray, t0: np.ndarray, syy: np.ndarray, yty: np.ndarray) -> Curves:
    """The three in-sample curves from the targets in an orthonormal basis of the features.

    Args:
        t: [..., k, q] rows of Q^T Y / sqrt n.
        t0: [r, q] the same for a full basis (fixes the alignment's scale).
        syy: [q, q] target covariance.
        yty: [q, q] uncentred target second moment.

    Returns:
        r2, alignment, probe_mse, each [..., k]. Cost k q^2.

    Example:
        >>> t = np.array([[0.6], [0.0]])
        >>> curves_from_targets(t, t, np.eye(1), np.eye(1)).r2.tolist()
        [0.36, 0.36]
    """
    t = np.asarray(t, np.float64)
    t0 = np.asarray(t0, np.float64)
    total = float(np.trace(syy))
    r2 = np.cumsum((t**2).sum(-1), axis=-1) / total
    full = float(np.einsum("iq,qp,ip->", t0, yty, t0))
    alignment = np.cumsum(((t @ yty) * t).sum(-1), axis=-1) / full if full > 0 else np.full_like(r2, np.nan)
    return Curves(r2, alignment, total * (1.0 - r2))


def encoder_curves(
    moments: Moments,
    encoder: np.ndarray,
    *,
    eval_moments: Moments | None = None,
    pixel_noise: float | None = None,
) -> tuple[Curves, HeldOutCurves | None]:
    """The curves of any linear encoder: features V_k^T x with V_k its first k columns.

    Args:
        moments: of the training data (the probe is fitted on them).
        encoder: [d, k] V.
        eval_moments: of held-out data, grouped.
        pixel_noise: as in :func:`mae_align.closed_form.factorize.factorize`.

    Returns:
        In-sample curves [k], and held-out curves or None. Cost: one eigh of size d.

    Raises:
        InputError: wrong encoder shape, NaN, or columns that are linearly dependent on these images.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(60, 2, 2, 1))
        >>> m = Moments.from_arrays(x, x.reshape(60, 4)[:, :1])
        >>> encoder_curves(m, np.eye(4))[0].r2.round(6).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    check_task(moments.num_targets)
    if eval_moments is not None:
        check_held_out(eval_moments, moments)
    problem = factorize(moments, pixel_noise=pixel_noise)
    encoder = np.asarray(encoder, np.float64)
    q = feature_basis(problem, encoder)
    t = q.T @ problem.t0
    inside = curves_from_targets(t, problem.t0, problem.syy, problem.yty)
    if eval_moments is None:
        return inside, None
    held = problem.hold_out_encoder(encoder, q, eval_moments)
    return inside, held_out_curves(**solved_errors(np.eye(len(t)), t, held), held=held)
