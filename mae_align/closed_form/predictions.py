"""What the closed form says of a corruption and a task, as cells of a table: curves at fixed k, and one number.

The one number is the mean over log k from 1 to the rank, for a curve c piecewise linear in log k::

    logmean(c) = (1 / log K) integral_0^log K c d(log k),   K = number of features

so that 1 to 10 features weigh as much as 10 to 100. At k = K the features span all that the images show: in-sample r2
is then the same for every corruption, and a latent that wide says nothing. A k over K is answered at K and named in
``closed_clipped``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mae_align.closed_form.curves import (
    curves_from_targets,
)
from mae_align.closed_form.factorize import factorize
from mae_align.closed_form.features import corruption_features, nested_basis
from mae_align.closed_form.held_out import (
    HeldOut,
    check_held_out,
    held_out_curves,
    paired_se,
    solved_errors,
)
from mae_align.corruption import Corruption, PatchMasking
from mae_align.corruption.base import Images
from mae_align.moments.moments import Moments
from mae_align.runtime.checks import check_task
from mae_align.runtime.errors import InputError

KS = (8, 32, 128)
"""Numbers of features that tables report."""
Row = dict[str, float | int | str]


def closed_form_row(
    moments: Moments,
    corruption: Corruption | None,
    eval_moments: Moments | None = None,
    ks: Sequence[int] = KS,
    *,
    encoder: np.ndarray | None = None,
    pixel_noise: float | None = None,
    images: Images | None = None,
) -> Row:
    """r2 and alignment of one task under one corruption (Theorem 3), in-sample and held-out, as a row.

    Args:
        moments: of the images and targets that the probe is fitted on.
        corruption: of the autoencoder, such as ``PatchMasking(4, 0.75)``; None for none (PCA).
        eval_moments: of held-out data, in groups for standard errors.
        ks: numbers of features.
        encoder: [d, m] of :func:`denoising_encoder`, where it was trained on other images than the task has (a task
            of some of the classes); None: trained on these.
        pixel_noise, images: as in :func:`mae_align.closed_form.autoencoder.denoising_autoencoder`.

    Returns:
        ``closed_rank`` (number of features), ``closed_clipped`` (the ks over it, separated by spaces), and for r2 and
        alignment, with ``eval_moments`` also eval_r2 and its standard error eval_r2_se, ``closed_NAME_kK`` and
        ``closed_NAME_logmean``. Cost: two eigh of size d (an eigh and an SVD for corruptions other
        than patch masks and isotropic noise), and those of :func:`mae_align.encoder_curves`.

    Raises:
        InputError: moments without targets, held-out ones that do not fit, a bad k, encoder or corruption.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(90, 4, 4, 1))
        >>> row = closed_form_row(Moments.from_arrays(x, x[:, 0, 0]), PatchMasking(2, 0.5), ks=(4, 32))
        >>> row["closed_rank"], row["closed_clipped"], round(row["closed_r2_k32"], 6)
        (16, '32', 1.0)
    """
    columns = {"task": slice(0, moments.num_targets)}
    found = closed_form_rows(
        moments, corruption, columns, eval_moments, ks, encoder=encoder, pixel_noise=pixel_noise, images=images
    )
    return found["task"]


def closed_form_rows(
    moments: Moments,
    corruption: Corruption | None,
    columns: Mapping[str, slice],
    eval_moments: Moments | None = None,
    ks: Sequence[int] = KS,
    *,
    encoder: np.ndarray | None = None,
    pixel_noise: float | None = None,
    images: Images | None = None,
) -> dict[str, Row]:
    """:func:`closed_form_row` of many tasks on the same images, from one factorisation and one encoder.

    Args:
        moments: with the target columns of all tasks side by side.
        corruption, ks, encoder, pixel_noise, images: as there.
        columns: by task, its target columns.
        eval_moments: with the same columns.

    Returns:
        Rows by task, equal to those of each task alone.

    Raises:
        InputError: as :func:`closed_form_row`; no columns, or columns that do not exist.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(90, 4, 4, 1))
        >>> m = Moments.from_arrays(x, x[:, 0, :2, 0])
        >>> sorted(closed_form_rows(m, None, {"a": slice(0, 1), "b": slice(1, 2)}, ks=(4,)))
        ['a', 'b']
    """
    check_task(moments.num_targets)
    if not ks or any(isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1 for k in ks):
        raise InputError(f"ks={list(ks)}: give whole numbers of features, at least 1")
    if not columns or any(not len(range(*c.indices(moments.num_targets))) for c in columns.values()):
        raise InputError(f"columns={dict(columns)}: give every task at least one of the {moments.num_targets} columns")
    if eval_moments is not None:
        check_held_out(eval_moments, moments)
    problem = factorize(moments, pixel_noise=pixel_noise)
    if encoder is None:
        mask = _or_none(corruption)
        mask.check(moments.image_shape)
        found = corruption_features(problem, mask, images=images, centered=moments.center)
        encoder, q = found.encoder, found.q
    else:
        encoder = np.asarray(encoder, np.float64)
        if encoder.ndim != 2 or len(encoder) != moments.num_pixels or not np.isfinite(encoder).all():
            raise InputError(f"encoder of shape {list(encoder.shape)}: give finite numbers [{moments.num_pixels}, k]")
        # More features than the images of this task have variance along add nothing.
        encoder = encoder[:, : problem.rank]
        q = nested_basis(problem.root.T @ encoder, problem.rtol)
    t = q.T @ problem.t0
    at = _Points(ks, len(t))
    held = None if eval_moments is None else problem.hold_out_encoder(encoder, q, eval_moments)
    spread = None if eval_moments is None else _target_spread(eval_moments, problem.mean_y)
    rows: dict[str, Row] = {}
    for name, c in columns.items():
        curves = curves_from_targets(t[:, c], problem.t0[:, c], problem.syy[c, c], problem.yty[c, c])
        row: Row = {"closed_rank": len(t), "closed_clipped": at.clipped}
        row |= at.cells("r2", curves.r2) | at.cells("alignment", curves.alignment)
        if held is not None and spread is not None:
            part = _of_columns(held, spread, c)
            out = held_out_curves(**solved_errors(np.eye(len(t)), t[:, c], part), held=part)
            row |= at.cells("eval_r2", out.r2) | at.errors("eval_r2_se", out.influence)
        rows[name] = row
    return rows


def denoising_encoder(
    moments: Moments,
    corruption: Corruption | None,
    *,
    pixel_noise: float | None = None,
    images: Images | None = None,
) -> np.ndarray:
    """All features of the denoising autoencoder of a corruption, best first (Theorem 3).

    Args:
        moments: of the images it is trained on; targets are not looked at.
        corruption: None for none (PCA).
        pixel_noise, images: as in :func:`mae_align.closed_form.autoencoder.denoising_autoencoder`.

    Returns:
        [d, m] V, float64; the first k columns are the solution for k. Cost: two eigh of size d; an eigh and an
        SVD for corruptions other than patch masks and isotropic noise.

    Raises:
        InputError: a corruption that does not fit the images.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(90, 4, 4, 1))
        >>> denoising_encoder(Moments.from_arrays(x), PatchMasking(2, 0.5)).shape
        (16, 16)
    """
    mask = _or_none(corruption)
    mask.check(moments.image_shape)
    problem = factorize(moments, pixel_noise=pixel_noise)
    return corruption_features(problem, mask, images=images, centered=moments.center).encoder


def _or_none(corruption: Corruption | None) -> Corruption:
    return PatchMasking(1, 0.0) if corruption is None else corruption


def log_mean_weights(count: int) -> np.ndarray:
    """Weights of the mean over log k of a curve at k = 1..count, piecewise linear in log k.

    Args:
        count: K.

    Returns:
        [K], they add up to 1.

    Example:
        >>> log_mean_weights(2).tolist(), log_mean_weights(1).tolist()
        ([0.5, 0.5], [1.0])
    """
    if count == 1:
        return np.ones(1)
    steps = np.diff(np.log(np.arange(1, count + 1)))
    return (np.append(steps, 0.0) + np.append(0.0, steps)) / 2 / np.log(count)


@dataclasses.dataclass(frozen=True)
class _Points:
    """Where a curve of ``count`` features is read off."""

    ks: Sequence[int]
    count: int

    @property
    def clipped(self) -> str:
        return " ".join(str(k) for k in self.ks if k > self.count)

    def cells(self, name: str, curve: np.ndarray) -> Row:
        """Values of a curve [count]."""
        row: Row = {f"closed_{name}_k{k}": float(curve[min(k, self.count) - 1]) for k in self.ks}
        return row | {f"closed_{name}_logmean": float(curve @ log_mean_weights(self.count))}

    def errors(self, name: str, influence: np.ndarray) -> Row:
        """Standard errors of a curve from influences [g, count]; the mean over log k is linear in them."""
        both = np.concatenate([influence, (influence @ log_mean_weights(self.count))[:, None]], axis=1)
        se = paired_se(both)
        row: Row = {f"closed_{name}_k{k}": float(se[min(k, self.count) - 1]) for k in self.ks}
        return row | {f"closed_{name}_logmean": float(se[-1])}


def _target_spread(eval_moments: Moments, mean_y: np.ndarray) -> np.ndarray:
    """[g, q] parts of the variance of every target column about the training mean."""
    # One pixel is enough to look at the targets.
    targets = dataclasses.replace(
        eval_moments,
        pivot_x=eval_moments.pivot_x[:1],
        sum_x=eval_moments.sum_x[:, :1],
        sum_xx=eval_moments.sum_xx[:, :1, :1],
        sum_xy=eval_moments.sum_xy[:, :1],
    )
    parts = targets.groups_about(targets.pivot_x, mean_y)
    return np.stack([part.count / eval_moments.count * np.diag(part.syy) for part in parts])


def _of_columns(held: HeldOut, spread: np.ndarray, c: slice) -> HeldOut:
    """The projection for some target columns."""
    group_variance = spread[:, c].sum(1)
    return held._replace(
        cross=held.cross[:, c],
        variance=group_variance.sum(),
        group_cross=held.group_cross[:, :, c],
        group_variance=group_variance,
    )
