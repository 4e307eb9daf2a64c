"""The ridge probe: every strength and every task from one eigendecomposition of the feature covariance.

With centred features z = D (x - mean) (D: the normalisation) and centred targets y, from the training samples::

    W(a) = (C + a t I)^-1 cov(z, y),   C = cov(z) = U diag(s) U^T,   t = tr C / k

so that U, s and U^T cov(z, y) serve all strengths a and all columns of y. a is relative to the mean variance of a
feature and does not depend on the number of samples: alpha = n a t in the sum-of-squares form of scikit-learn. Only
second moments of the training samples enter, which may have been streamed. Per task the strength is chosen on
validation samples: by accuracy, then r2, for classes, by r2 otherwise; equal ones go to the larger strength. There is
no second fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.moments.moments import Moments
from mae_align.probes.inputs import (
    Normalization,
    Rows,
    Task,
    as_images,
    check_features,
    finest_labels,
    layout,
    name_of,
    per_feature,
    precision,
    target_matrix,
    validation_split,
)
from mae_align.probes.result import ProbeResult, Protocol
from mae_align.runtime.checks import are_class_labels, as_targets, check_task
from mae_align.runtime.devices import solve_context
from mae_align.runtime.errors import InputError

# Relative to the mean variance of a feature.
STRENGTHS: tuple[float, ...] = tuple(float(f"{10.0**e:.3g}") for e in np.arange(-6, 3.01, 0.5))
# Rows whose predictions are held at a time.
_ROWS = 4096
# The task of a single probe.
_ONLY = "task"


@dataclasses.dataclass(frozen=True, eq=False)
class RidgePath:
    """Ridge regressions of one training set for several strengths: y = mean_y + (x - mean_x) weights[i].

    Attributes:
        strengths: [S], relative to the mean variance of a normalised feature.
        weights: [S, k, Q] float64, of features as given (the normalisation is in them).
        mean_x: [k].
        mean_y: [Q].
    """

    strengths: np.ndarray
    weights: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray


def ridge_path(
    train: Moments, *, strengths: Sequence[float] = STRENGTHS, normalization: Normalization = per_feature
) -> RidgePath:
    """All ridge regressions on the features of given moments, from one eigendecomposition.

    Directions without variance (constant or dependent features, fewer samples than features) get no weight, so that
    strength 0 is the least-squares solution of least norm.

    Args:
        train: moments of features as images [n, 1, 1, k] (:func:`mae_align.probes.as_images`) and targets.
        strengths: [S], at least 0.
        normalization: :func:`per_feature` or :func:`one_scale`.

    Returns:
        The regressions, float64. Cost: one eigh of size k and S k^2 Q multiply-adds; memory 8 S k Q bytes.

    Raises:
        InputError: moments without targets or not centred, strengths that are negative, infinite or none.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 3))
        >>> path = ridge_path(Moments.from_arrays(as_images(x), x @ np.ones((3, 1))), strengths=[0.0])
        >>> path.weights.round(6).tolist()
        [[[1.0], [1.0], [1.0]]]
    """
    check_task(train.num_targets)
    if not train.center:
        raise InputError("a probe has an intercept: give moments made with center=True")
    grid = np.asarray(strengths, np.float64)
    if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all() or grid.min() < 0:
        raise InputError(f"strengths={list(np.ravel(grid))}: give at least one finite number, none below 0")
    second = train.second_moments()
    eps = precision(train.pixel_dtype)
    scale = normalization(train.mean_x, np.diag(second.sxx), eps)
    # Below this share of the largest variance lies only what rounding left of zero.
    rtol = max(1e-7 if eps > 1e-10 else 0.0, len(scale) * np.finfo(np.float64).eps)
    with solve_context("float64"):
        arrays = (jnp.asarray(a, jnp.float64) for a in (second.sxx, second.sxy, scale, grid, rtol))
        weights = np.asarray(_solve(*arrays))
    return RidgePath(grid, weights, train.mean_x, train.mean_y)


@jax.jit
def _solve(sxx: jax.Array, sxy: jax.Array, scale: jax.Array, strengths: jax.Array, rtol: jax.Array) -> jax.Array:
    """[S, k, Q] weights of unnormalised features."""
    c = scale[:, None] * sxx * scale[None, :]
    s, u = jnp.linalg.eigh((c + c.T) / 2)
    s = jnp.maximum(s, 0.0)
    real = s > rtol * s[-1]
    damped = s[None, :] + strengths[:, None] * s.mean()
    inverse = jnp.where(real[None, :], 1.0 / jnp.where(real[None, :], damped, 1.0), 0.0)
    cross = jnp.matmul(u.T, scale[:, None] * sxy, precision=jax.lax.Precision.HIGHEST)
    w = jax.vmap(lambda d: jnp.matmul(u, d[:, None] * cross, precision=jax.lax.Precision.HIGHEST))(inverse)
    return scale[None, :, None] * w


def ridge_probe(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    test_features: np.ndarray,
    test_targets: np.ndarray,
    *,
    num_classes: int | None = None,
    val: Rows | None = None,
    val_fraction: float = 0.1,
    strengths: Sequence[float] = STRENGTHS,
    normalization: Normalization = per_feature,
    seed: int = 0,
    features: str = "features",
) -> ProbeResult:
    """Ridge probe of one task.

    Args:
        train_features: [n, k] uint8 or floating.
        train_targets: [n] class labels, or numbers [n] or [n, q].
        test_features, test_targets: likewise, never looked at before the strength is chosen.
        num_classes: for class labels; default: largest training label + 1.
        val: samples on which the strength is chosen; None: ``val_fraction`` of the training samples, which then are
            not fitted on (:func:`validation_split` with ``seed``).
        strengths, normalization: as in :func:`ridge_path`.
        features: name of the features for the protocol.

    Returns:
        Scores and protocol. Cost: n k (k + Q) multiply-adds, one eigh of size k, S n_val k Q for the choice.

    Raises:
        InputError: features or targets that are bad or do not fit together, or are all one class.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = rng.integers(0, 2, 200)
        >>> x = rng.normal(size=(200, 5)) + 3.0 * y[:, None]
        >>> ridge_probe(x[:150], y[:150], x[150:], y[150:]).accuracy_test
        1.0
    """
    return ridge_probe_many(
        train_features,
        {_ONLY: train_targets},
        test_features,
        {_ONLY: test_targets},
        num_classes={} if num_classes is None else {_ONLY: num_classes},
        val=None if val is None else (val.features, {_ONLY: val.targets}),
        val_fraction=val_fraction,
        strengths=strengths,
        normalization=normalization,
        seed=seed,
        features=features,
    )[_ONLY]


def ridge_probe_many(
    train_features: np.ndarray,
    train_targets: Mapping[str, np.ndarray],
    test_features: np.ndarray,
    test_targets: Mapping[str, np.ndarray],
    *,
    num_classes: Mapping[str, int] | None = None,
    val: tuple[np.ndarray, Mapping[str, np.ndarray]] | None = None,
    val_fraction: float = 0.1,
    strengths: Sequence[float] = STRENGTHS,
    normalization: Normalization = per_feature,
    seed: int = 0,
    features: str = "features",
) -> dict[str, ProbeResult]:
    """Ridge probes of many tasks on the same samples, from one eigendecomposition; a strength for each task.

    Args:
        train_features: [n, k].
        train_targets: by task, as in :func:`ridge_probe`.
        test_features, test_targets: likewise.
        num_classes: by task, where the largest label is missing in training.
        val: features and targets by task. None: a split of the training samples that keeps the proportions of the task
            with most classes.
        val_fraction, strengths, normalization, seed, features: as in :func:`ridge_probe`.

    Returns:
        Results by task, equal to those of :func:`ridge_probe` with the same split.

    Raises:
        InputError: as :func:`ridge_probe`, or tasks that are missing from one part.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(100, 5))
        >>> tasks = {"sign": (x[:, 0] > 0).astype(int), "size": x[:, 1]}
        >>> found = ridge_probe_many(x, tasks, x, tasks)
        >>> found["size"].r2_test > 0.999, found["size"].accuracy_test
        (True, nan)
    """
    x = check_features(train_features)
    tasks = layout(train_targets, num_classes or {})
    y = target_matrix(train_targets, tasks, len(x))
    x_test = check_features(test_features, x.shape[1])
    test = _Part(x_test, target_matrix(test_targets, tasks, len(x_test)))
    if val is None:
        split = validation_split(len(x), val_fraction, finest_labels(train_targets, tasks), seed)
        x, y, chosen_on = x[split.train], y[split.train], _Part(x[split.val], y[split.val])
    else:
        x_val = check_features(val[0], x.shape[1])
        chosen_on = _Part(x_val, target_matrix(val[1], tasks, len(x_val)))
    path = ridge_path(Moments.from_arrays(as_images(x), y), strengths=strengths, normalization=normalization)
    note = partial(Protocol, features=features, normalization=name_of(normalization), seed=seed)
    return _choose(path, _Part(x, y), chosen_on, test, tasks, note)


def ridge_from_moments(
    train: Moments,
    val: Moments | Rows,
    test: Moments | Rows,
    *,
    strengths: Sequence[float] = STRENGTHS,
    normalization: Normalization = per_feature,
    features: str = "features",
) -> ProbeResult:
    """Ridge probe of one task whose training samples were streamed, and perhaps the others too.

    Moments are enough for r2, not for accuracies: where a part is given as moments, its accuracy is NaN, and where the
    validation samples are, the strength is chosen by r2.

    Args:
        train: moments of features as images [n, 1, 1, k]: of arrays, batch by batch with :meth:`Moments.update`, or by
            :func:`mae_align.stream_moments`.
        val, test: moments made in the same way, or rows.
        strengths, normalization, features: as in :func:`ridge_probe`.

    Returns:
        Scores and protocol, equal to those of :func:`ridge_probe` on the same samples.

    Raises:
        InputError: moments without targets, not centred, or parts that do not fit together.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(90, 3))
        >>> parts = [Moments.from_arrays(as_images(p), p[:, :1]) for p in np.split(x, 3)]
        >>> ridge_from_moments(*parts).r2_test > 0.999
        True
    """
    labelled = any(isinstance(part, Rows) and are_class_labels(as_targets(part.targets)) for part in (val, test))
    tasks = (Task(_ONLY, 0, train.num_targets, labelled),)
    path = ridge_path(train, strengths=strengths, normalization=normalization)
    on_val, on_test = (_checked_part(part, train, tasks) for part in (val, test))
    note = partial(Protocol, features=features, normalization=name_of(normalization), seed=0)
    return _choose(path, train, on_val, on_test, tasks, note)[_ONLY]


class _Part(NamedTuple):
    """Features [n, k] and target rows [n, Q] of all tasks."""

    x: np.ndarray
    y: np.ndarray


def _checked_part(part: Moments | Rows, train: Moments, tasks: tuple[Task, ...]) -> Moments | _Part:
    if isinstance(part, Moments):
        if (part.num_pixels, part.num_targets) != (train.num_pixels, train.num_targets):
            raise InputError(
                f"moments of {part.num_pixels} features and {part.num_targets} target columns, in training of "
                f"{train.num_pixels} and {train.num_targets}: make them alike"
            )
        return part
    x = check_features(part.features, train.num_pixels)
    return _Part(x, target_matrix({_ONLY: part.targets}, tasks, len(x)))


class _Scores(NamedTuple):
    """Accuracy and r2, both [S, T] for S weights and T tasks, and the classes [n] that the first weights find."""

    accuracy: np.ndarray
    r2: np.ndarray
    classes: list[np.ndarray | None]


def _count(part: Moments | _Part) -> int:
    return part.count if isinstance(part, Moments) else len(part.x)


def _choose(
    path: RidgePath,
    train: Moments | _Part,
    val: Moments | _Part,
    test: Moments | _Part,
    tasks: tuple[Task, ...],
    note: partial[Protocol],
) -> dict[str, ProbeResult]:
    """The best strength of each task on ``val``, and its scores on every part."""
    on_val = _score(path, path.weights, val, tasks)
    chosen = []
    for t in range(len(tasks)):
        keys = (path.strengths, *(np.nan_to_num(a[:, t], nan=-np.inf) for a in (on_val.r2, on_val.accuracy)))
        chosen.append(int(np.lexsort(keys)[-1]))
    columns = np.repeat(chosen, [task.stop - task.start for task in tasks])
    weights = path.weights[columns, :, np.arange(len(columns))].T[None]
    on_train, on_test = (_score(path, weights, part, tasks) for part in (train, test))
    results = {}
    for t, (task, best) in enumerate(zip(tasks, chosen, strict=True)):
        by_accuracy = task.labelled and not isinstance(val, Moments)
        protocol = note(
            probe="ridge",
            n_train=_count(train),
            n_val=_count(val),
            n_test=_count(test),
            strength=float(path.strengths[best]),
            selected_by="accuracy, then r2" if by_accuracy else "r2",
            settings=(
                ("strengths", len(path.strengths)),
                ("smallest_strength", float(path.strengths.min())),
                ("largest_strength", float(path.strengths.max())),
            ),
        )
        accuracy = (float(on_train.accuracy[0, t]), float(on_val.accuracy[best, t]), float(on_test.accuracy[0, t]))
        r2 = (float(on_train.r2[0, t]), float(on_val.r2[best, t]), float(on_test.r2[0, t]))
        results[task.name] = ProbeResult(*accuracy, *r2, protocol, on_test.classes[t])
    return results


def _score(path: RidgePath, weights: np.ndarray, part: Moments | _Part, tasks: tuple[Task, ...]) -> _Scores:
    """Scores of S weight arrays [S, k, Q] on one part."""
    if isinstance(part, Moments):
        about = part.about(path.mean_x, path.mean_y)
        error = np.diag(about.syy) - 2 * np.einsum("skq,kq->sq", weights, about.sxy)
        error += np.einsum("skq,skq->sq", weights, about.sxx @ weights)
        accuracy = np.full((len(weights), len(tasks)), np.nan)
        return _Scores(accuracy, _r2(error, np.diag(about.syy), tasks), [None] * len(tasks))
    s, k, q = weights.shape
    flat = weights.transpose(1, 0, 2).reshape(k, s * q)
    correct, error, spread = np.zeros((s, len(tasks))), np.zeros((s, q)), np.zeros(q)
    classes: list[list[np.ndarray]] = [[] for _ in tasks]
    for start in range(0, len(part.x), _ROWS):
        y = part.y[start : start + _ROWS]
        with solve_context("float64"):
            arrays = (jnp.asarray(a, jnp.float64) for a in (part.x[start : start + _ROWS], path.mean_x, flat))
            found = path.mean_y + np.asarray(_predict(*arrays)).reshape(len(y), s, q)
        error += ((found - y[:, None]) ** 2).sum(0)
        spread += ((y - path.mean_y) ** 2).sum(0)
        for t, task in enumerate(tasks):
            if task.labelled:
                named = found[:, :, task.columns].argmax(2)
                correct[:, t] += (named == y[:, task.columns].argmax(1)[:, None]).sum(0)
                classes[t].append(named[:, 0])
    accuracy = np.where([task.labelled for task in tasks], correct / len(part.x), np.nan)
    named_first = [np.concatenate(of_task) if of_task else None for of_task in classes]
    return _Scores(accuracy, _r2(error, spread, tasks), named_first)


@jax.jit
def _predict(x: jax.Array, mean: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.matmul(x - mean[None, :], weights, precision=jax.lax.Precision.HIGHEST)


def _r2(error: np.ndarray, spread: np.ndarray, tasks: tuple[Task, ...]) -> np.ndarray:
    """[S, T] from errors [S, Q] and squared distances [Q] to the training mean."""
    starts = [task.start for task in tasks]
    lost, total = np.add.reduceat(error, starts, axis=1), np.add.reduceat(spread, starts)
    return np.where(total > 0, 1.0 - lost / np.where(total > 0, total, 1.0), np.nan)
