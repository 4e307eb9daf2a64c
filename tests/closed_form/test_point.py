from __future__ import annotations

import chex
import jax
import numpy as np
import pytest

from mae_align.closed_form import point
from mae_align.closed_form.basis import PatchBasis
from mae_align.closed_form.held_out import HeldOut
from mae_align.closed_form.point import Shared, Solution, Weights
from mae_align.runtime.devices import solve_context
from tests import oracles

R, Q, K = 9, 3, 6


def random_problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """e, gram, target, s, w of a made-up factorised problem."""
    rng = np.random.default_rng(seed)
    e, _ = np.linalg.qr(rng.normal(size=(R, R)))
    s = np.sort(rng.uniform(0.1, 4.0, R))[::-1].copy()
    return e, e.T @ np.diag(s) @ e, rng.normal(size=(R, Q)) / 3, s, rng.uniform(0.2, 2.0, R)


def shared(e, gram, target, s, held: HeldOut | None = None) -> Shared:
    return Shared(PatchBasis(e, np.ones(R), gram, target), s, held)  # pyright: ignore[reportArgumentType]


def at(w, alpha, beta) -> Weights:
    return Weights(*(np.asarray(a, np.float64) for a in (w, alpha, beta)))  # pyright: ignore[reportArgumentType]


def on_host(solution: Solution) -> Solution:
    return jax.tree.map(np.asarray, solution)


def direct(gram, target, w, alpha, beta):
    """Eigenvectors of H by NumPy; targets by the textbook QR of all features."""
    wt = w[:, None] * target
    h = beta * np.diag(w) @ gram @ np.diag(w) + alpha * wt @ wt.T
    mu, b = np.linalg.eigh(h)
    mu, b = mu[::-1], b[:, ::-1]
    q, _ = np.linalg.qr(w[:, None] * b)
    return mu, b, q.T @ target


def vanishing_reconstruction(gram, target, w):
    """Features as beta -> 0+: the range of the targets by singular value, then reconstruction in its complement."""
    left, size, _ = np.linalg.svd(w[:, None] * target, full_matrices=True)
    rest = left[:, Q:]
    values, inner = np.linalg.eigh(rest.T @ np.diag(w) @ gram @ np.diag(w) @ rest)
    b = np.hstack([left[:, :Q], rest @ inner[:, ::-1]])
    q, _ = np.linalg.qr(w[:, None] * b)
    return np.concatenate([size**2, 0 * values]), q.T @ target


def up_to_sign(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return rows * np.sign((rows * reference).sum(1))[:, None]


@pytest.fixture(scope="module")
def solve():
    """solve_point, compiled here under a guard: one trace serves every value of w, alpha and beta."""
    compiled = jax.jit(chex.assert_max_traces(point.solve_point, n=1), static_argnames="max_k")

    def call(gram, target, w, alpha, beta, max_k: int = K):
        with solve_context("float64"):
            together = jax.tree.map(np.float64, shared(np.eye(R), gram, target, np.ones(R)))
            return on_host(compiled(together, at(w, alpha, beta), max_k=max_k))

    return call


@pytest.mark.parametrize("alpha, beta", [(0.0, 1.0), (0.3, 0.7), (1.0, 1e-3), (1.0, 0.2)])
def test_solution_is_the_weighted_eigenproblem_at_every_k(solve, alpha, beta):
    _, gram, target, _, w = random_problem(0)
    found = solve(gram, target, w, alpha, beta)
    mu, _, t = direct(gram, target, w, alpha, beta)
    np.testing.assert_allclose(found.mu, mu[:K], rtol=1e-11)
    np.testing.assert_allclose(found.gap, (mu[:K] - mu[1 : K + 1]) / mu[:K], rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(up_to_sign(found.t, t[:K]), t[:K], atol=1e-11)


def test_zero_weight_of_reconstruction_is_its_limit(solve):
    _, gram, target, _, w = random_problem(1)
    mu, t = vanishing_reconstruction(gram, target, w)
    found = solve(gram, target, w, 0.5, 0.0)
    np.testing.assert_allclose(found.mu, 0.5 * mu[:K], atol=1e-12)
    np.testing.assert_allclose(up_to_sign(found.t, t[:K]), t[:K], atol=1e-10)
    near = solve(gram, target, w, 0.5, 1e-7)
    np.testing.assert_allclose(up_to_sign(near.t, t[:K]), t[:K], atol=1e-5)


@pytest.mark.parametrize("beta", [1e-12, 1e-17, 1e-30, 1e-300])
def test_a_tiny_weight_of_reconstruction_still_orders_the_other_features(solve, beta):
    """Rounding of the supervised term must not choose the features that the targets leave open."""
    _, gram, target, _, w = random_problem(2)
    _, t = vanishing_reconstruction(gram, target, w)
    found = solve(gram, target, w, 1.0, beta)
    np.testing.assert_allclose(up_to_sign(found.t, t[:K]), t[:K], atol=1e-6)


@pytest.mark.parametrize("beta", [1e-5, 1e-9, 1e-13, 1e-17, 1e-25])
def test_targets_of_very_different_strength_each_meet_reconstruction_where_they_are_equal(solve, beta):
    """Singular values 1, 1e-4 and 1e-8: the factor of H, not H, keeps what each of them weighs."""
    e, gram, _, _, w = random_problem(10)
    target = e[:, :Q] * [1.0, 1e-4, 1e-8] @ np.linalg.qr(random_problem(11)[0][:Q, :Q])[0] / w[:, None]
    factor = np.hstack([w[:, None] * target, np.sqrt(beta) * w[:, None] * np.linalg.cholesky(gram)])
    b = oracles.extended_left_vectors(factor)
    mu = np.asarray(((b.T @ factor) ** 2).sum(1), np.float64)
    q, _ = np.linalg.qr(w[:, None] * np.asarray(b, np.float64))
    t = q.T @ target
    found = solve(gram, target, w, 1.0, beta)
    np.testing.assert_allclose(found.mu, mu[:K], rtol=1e-5)
    np.testing.assert_allclose(found.gap, 1 - mu[1 : K + 1] / mu[:K], rtol=1e-4, atol=1e-5)
    # Rounding of the targets turns the direction of singular value 1e-8 by some eps / 1e-8, whatever the algorithm.
    turned = 50 * np.finfo(float).eps / 1e-8
    for row, expected in zip(found.t, t[:K], strict=True):
        size = np.linalg.norm(expected)
        assert abs(abs(row @ expected) - size**2) <= size * (1e-5 * size + turned) + 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_targets_that_no_pixel_explains_give_reconstruction_and_no_nan(solve, beta):
    _, gram, _, _, w = random_problem(3)
    found = solve(gram, np.zeros((R, Q)), w, 0.5, beta)
    assert all(np.isfinite(a).all() for a in found.named().values())
    np.testing.assert_array_equal(found.t, 0.0)


def test_features_of_very_different_weight_stay_orthonormal(solve):
    """Directions that mix weights of 1 and 1e-7: their Gram matrix would have the condition 1e14."""
    b, _, target, _, _ = random_problem(4)
    w = np.logspace(0, -7, R)
    gram = b * np.linspace(2.0, 0.5, R) @ b.T / np.outer(w, w)
    found = solve(gram, target, w, 0.0, 1.0)
    # Modified Gram-Schmidt twice, in extended precision, as a reference of its own.
    columns = (w[:, None] * b).astype(np.longdouble)[:, :K]
    for i in range(K):
        for _ in range(2):
            for j in range(i):
                columns[:, i] -= (columns[:, j] @ columns[:, i]) * columns[:, j]
        columns[:, i] /= np.sqrt(columns[:, i] @ columns[:, i])
    t = np.asarray(columns.T @ target, np.float64)
    np.testing.assert_allclose(up_to_sign(found.t, t), t, atol=1e-8)


def test_features_are_what_the_targets_and_the_explained_variance_are_about(solve):
    e, gram, target, s, w = random_problem(5)
    with solve_context("float64"):
        solve_all = jax.jit(point.features_of, static_argnames="max_k")
        many, f_many = solve_all(shared(e, gram, target, s), at(w, 0.2, 0.8), max_k=R)
        many, f_many = jax.tree.map(np.asarray, (many, f_many))
    few = solve(gram, target, w, 0.2, 0.8)
    for name in ("mu", "gap", "t"):  # fewer features are the leading ones
        leading = getattr(many, name)[:K]
        same = up_to_sign(leading, few.t) if name == "t" else leading
        np.testing.assert_allclose(same, getattr(few, name), atol=1e-11)
    np.testing.assert_allclose(f_many.T @ f_many, np.eye(R), atol=1e-12)
    np.testing.assert_allclose(f_many.T @ (e @ target), many.t, atol=1e-12)
    pixels = [np.trace(f_many[:, :k].T @ np.diag(s) @ f_many[:, :k]) for k in range(1, R + 1)]
    np.testing.assert_allclose(many.explained, pixels, rtol=1e-12)
    assert many.explained[-1] == pytest.approx(s.sum(), rel=1e-12)
    mu, _, t = direct(gram, target, w, 0.2, 0.8)
    np.testing.assert_allclose(up_to_sign(many.t, t), t, atol=1e-11)
    np.testing.assert_allclose(many.mu, mu, rtol=1e-10)


def test_a_batch_of_points_is_the_loop_over_them(solve):
    e, gram, target, s, _ = random_problem(6)
    points = [(random_problem(seed)[4], alpha, beta) for seed, alpha, beta in ((7, 0.0, 1.0), (8, 0.5, 0.5), (9, 1, 0))]
    with solve_context("float64"):
        all_points = at(*(np.stack(column) for column in zip(*points, strict=True)))
        batches = [
            on_host(point.solve_many(function, shared(e, gram, target, s), all_points, max_k=K))
            for function in (point.solve_point, point.solve_features)
        ]
    for i, where in enumerate(points):
        one = solve(gram, target, *where)
        for batch in batches:
            np.testing.assert_allclose(batch.mu[i], one.mu, atol=1e-12)
            np.testing.assert_allclose(batch.gap[i], one.gap, atol=1e-10)
            np.testing.assert_allclose(up_to_sign(np.asarray(batch.t[i]), one.t), one.t, atol=1e-11)


@pytest.mark.parametrize("noise", [0.0, 0.7, 50.0])
@pytest.mark.parametrize("held_out", [False, True])
def test_where_nothing_is_masked_or_supervised_the_axes_are_the_solution(noise, held_out):
    _, _, target, s, _ = random_problem(11)
    w = np.ones(R) if noise == 0 else np.sqrt(s / (s + noise))
    rng = np.random.default_rng(5)
    root = rng.normal(size=(R, R))
    held = HeldOut(root @ root.T, rng.normal(size=(R, Q)), np.float64(9.0), *held_groups(root, rng))
    together = shared(np.eye(R), np.diag(s), target, s, held if held_out else None)
    with solve_context("float64"):
        known = point.solve_one(point.solve_diagonal, together, at(w, 0.0, 0.25), max_k=K).named()
        solved = point.solve_one(point.solve_features, together, at(w, 0.0, 0.25), max_k=K).named()
    assert known.keys() == solved.keys() and ("errors" in known) == held_out
    for name, value in solved.items():
        found = up_to_sign(known[name], value) if name == "t" else known[name]
        np.testing.assert_allclose(found, value, rtol=1e-5 if name == "group_errors" else 1e-9, atol=1e-12)


def held_groups(root: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = np.stack([0.3 * root @ root.T, 0.7 * root @ root.T]).astype(np.float32)
    return parts, rng.normal(size=(2, R, Q)), np.array([4.0, 5.0])
