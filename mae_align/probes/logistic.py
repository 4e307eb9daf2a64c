"""The logistic probe: multinomial logistic regression by L-BFGS.

On normalised features z = D (x - mean), for every strength a::

    minimise over W, b   mean_i -log softmax(W^T z_i + b)[y_i] + a/2 |W|^2

The problem is convex; each is solved until the largest entry of the gradient is below ``tolerance``, from the strongest
to the weakest, each starting where the one before ended. In the form of scikit-learn, C = 1 / (n a).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import DTypeLike

from mae_align.probes.inputs import Normalization, Rows, name_of, per_feature
from mae_align.probes.labelled import Labelled, class_parts
from mae_align.probes.result import ProbeResult
from mae_align.runtime.devices import solve_context, solve_dtype
from mae_align.runtime.errors import InputError

LOGISTIC_STRENGTHS: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class _Weights(NamedTuple):
    """W [k, q] and b [q]; with a leading axis S for all strengths."""

    w: jax.Array
    b: jax.Array


class LogisticPath(NamedTuple):
    """Logistic regressions of one training set, strongest first: logits = z weights[i] + bias[i].

    Attributes:
        strengths: [S], descending.
        weights: [S, k, q].
        bias: [S, q], adding up to 0.
        gradient: [S] largest entry of the gradient where the solver ended.
        steps: [S] of L-BFGS.
    """

    strengths: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    gradient: np.ndarray
    steps: np.ndarray


def logistic_path(
    z: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    strengths: Sequence[float] = LOGISTIC_STRENGTHS,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
    dtype: DTypeLike = "float64",
) -> LogisticPath:
    """Logistic regressions for several strengths, each started from the one before.

    Args:
        z: [n, k] normalised features.
        labels: [n] integers in 0..q - 1.
        num_classes: q.
        strengths, tolerance, max_steps, dtype: as in :func:`logistic_probe`.

    Returns:
        The solutions. Cost: about 4 n k q multiply-adds per step.

    Raises:
        InputError: a strength or tolerance that is not positive, no strength, no step.

    Example:
        >>> path = logistic_path(np.array([[-1.0], [1.0]]), np.array([0, 1]), 2, strengths=[0.1, 1.0])
        >>> path.strengths.tolist(), path.weights.shape, bool((path.gradient <= 1e-5).all())
        ([1.0, 0.1], (2, 1, 2), True)
    """
    grid = np.asarray(strengths, np.float64)
    if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all() or grid.min() <= 0:
        raise InputError(f"strengths={list(np.ravel(grid))}: give at least one finite number above 0")
    if not tolerance > 0 or max_steps < 1:
        raise InputError(f"tolerance={tolerance}, max_steps={max_steps}: both must be positive")
    grid = np.sort(grid)[::-1]
    real = solve_dtype(dtype)
    with solve_context(real):
        start = _Weights(jnp.zeros((z.shape[1], num_classes), real), jnp.zeros(num_classes, real))
        limits = (jnp.asarray(grid, real), jnp.asarray(tolerance, real), jnp.asarray(max_steps))
        weights, gradient, steps = _fit(start, jnp.asarray(z, real), jnp.asarray(labels, jnp.int32), *limits)
        return LogisticPath(grid, *(np.asarray(a) for a in (*weights, gradient, steps)))


def logistic_probe(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    test_features: np.ndarray,
    test_targets: np.ndarray,
    *,
    num_classes: int | None = None,
    val: Rows | None = None,
    val_fraction: float = 0.1,
    strengths: Sequence[float] = LOGISTIC_STRENGTHS,
    normalization: Normalization = per_feature,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
    dtype: DTypeLike = "float64",
    seed: int = 0,
    features: str = "features",
) -> ProbeResult:
    """Logistic probe of one task; the strength of largest validation accuracy, of equal ones of least cross-entropy.

    Args:
        train_features: [n, k].
        train_targets: [n] class labels.
        test_features, test_targets: likewise.
        num_classes, val, val_fraction, normalization, seed, features: as in :func:`mae_align.probes.ridge_probe`.
        strengths: [S] a above, positive.
        tolerance: largest entry of the gradient at the end.
        max_steps: L-BFGS steps for each strength; the protocol says how many strengths ended above the tolerance.
        dtype: "float64", or "float32" where speed matters more (its gradients end at about 1e-6).

    Returns:
        Scores (r2 is NaN) and protocol. Cost: about n k q multiply-adds times 4 per step.

    Raises:
        InputError: bad or ill-fitting features, targets that are no class labels, a strength that is not positive.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = rng.integers(0, 2, 200)
        >>> x = rng.normal(size=(200, 5)) + 3.0 * y[:, None]
        >>> logistic_probe(x[:150], y[:150], x[150:], y[150:], strengths=[0.1]).accuracy_test
        1.0
    """
    real = solve_dtype(dtype)
    train, test = Rows(train_features, train_targets), Rows(test_features, test_targets)
    parts = class_parts(train, test, num_classes, val, val_fraction, normalization, seed, real)
    path = logistic_path(
        *parts.train, parts.num_classes, strengths=strengths, tolerance=tolerance, max_steps=max_steps, dtype=real
    )
    accuracy, loss = _scores(path, slice(None), parts.val)
    grid = path.strengths
    best = int(np.lexsort((grid, -loss, accuracy))[-1])
    on_train, on_test = (float(_scores(path, slice(best, best + 1), p)[0][0]) for p in (parts.train, parts.test))
    return parts.result(
        (on_train, float(accuracy[best]), on_test),
        _predicted(path, best, parts.test.x),
        probe="logistic",
        features=features,
        normalization=name_of(normalization),
        seed=seed,
        strength=float(grid[best]),
        selected_by="accuracy, then cross-entropy",
        settings=(
            ("strengths", len(grid)),
            ("smallest_strength", float(grid.min())),
            ("largest_strength", float(grid.max())),
            ("dtype", real.name),
            ("tolerance", tolerance),
            ("unconverged_strengths", int((path.gradient > tolerance).sum())),
            ("gradient", float(path.gradient[best])),
            ("steps", int(path.steps.sum())),
        ),
    )


def _logits(weights: _Weights, z: jax.Array) -> jax.Array:
    return jnp.matmul(z, weights.w, precision=jax.lax.Precision.HIGHEST) + weights.b[None, :]


@jax.jit
def _fit(
    start: _Weights, z: jax.Array, labels: jax.Array, strengths: jax.Array, tolerance: jax.Array, max_steps: jax.Array
) -> tuple[_Weights, jax.Array, jax.Array]:
    """The whole path in one program: solutions, largest gradient entries and numbers of steps, each [S, ...]."""

    def loss(weights: _Weights, strength: jax.Array) -> jax.Array:
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels(_logits(weights, z), labels)
        return entropy.mean() + strength / 2 * (weights.w**2).sum()

    solver = optax.lbfgs()

    def solve(warm: _Weights, strength: jax.Array) -> tuple[_Weights, tuple[_Weights, jax.Array, jax.Array]]:
        def value(weights: _Weights) -> jax.Array:
            return loss(weights, strength)

        again = optax.value_and_grad_from_state(value)

        def step(carry: tuple) -> tuple:
            weights, state, _, count = carry
            at, slope = again(weights, state=state)
            updates, state = solver.update(slope, state, weights, value=at, grad=slope, value_fn=value)
            weights = optax.apply_updates(weights, updates)
            return weights, state, optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf), count + 1

        def goes_on(carry: tuple) -> jax.Array:
            _, _, size, count = carry
            return (size > tolerance) & (count < max_steps)

        first = optax.tree.norm(jax.grad(value)(warm), ord=jnp.inf)
        weights, _, size, count = jax.lax.while_loop(
            goes_on, step, (warm, solver.init(warm), first, jnp.zeros_like(max_steps))
        )
        return weights, (weights, size, count)

    return jax.lax.scan(solve, start, strengths)[1]


def _scores(path: LogisticPath, which: slice, part: Labelled) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and mean cross-entropy of some strengths, both [S]."""
    weights, bias = path.weights[which], path.bias[which]
    with solve_context(weights.dtype):
        arrays = (jnp.asarray(a, weights.dtype) for a in (weights, bias, part.x))
        accuracy, loss = _evaluate(*arrays, jnp.asarray(part.y))
        return np.asarray(accuracy), np.asarray(loss)


def _predicted(path: LogisticPath, at: int, x: np.ndarray) -> np.ndarray:
    """Classes [n] that one strength finds."""
    with solve_context(path.weights.dtype):
        arrays = (jnp.asarray(a, path.weights.dtype) for a in (path.weights[at], path.bias[at], x))
        return np.asarray(_classes(*arrays))


@jax.jit
def _classes(weights: jax.Array, bias: jax.Array, z: jax.Array) -> jax.Array:
    return _logits(_Weights(weights, bias), z).argmax(1)


@jax.jit
def _evaluate(weights: jax.Array, bias: jax.Array, z: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    def one(w: _Weights) -> tuple[jax.Array, jax.Array]:
        logits = _logits(w, z)
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (logits.argmax(1) == labels).mean(), entropy.mean()

    return jax.lax.map(one, _Weights(weights, bias))
