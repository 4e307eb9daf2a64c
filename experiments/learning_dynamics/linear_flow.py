"""What gradient descent does to a linear autoencoder: the known solution, and the flow from any start.

For the loss L = E|x - W2 W1 x|^2 / d with cov(x) = C diag(s) C^T, gradient descent of rate eta in the limit of small
steps is a flow in the time t = eta steps::

    dW1/dt = (2/d) W2^T (I - W2 W1) S,    dW2/dt = (2/d) (I - W2 W1) S W1^T

It keeps W1 W1^T - W2^T W2. From a *balanced and aligned* start (W1 = R^T diag(sqrt u0) C^T, W2 = W1^T) the directions
are decoupled, and the strength u_i of direction i in W2 W1 is logistic (Saxe, McClelland & Ganguli, 2014)::

    du/dt = (4/d) s u (1 - u),    u(t) = 1 / (1 + (1/u0 - 1) exp(-4 s t / d)),    residual (1 - u)^2

so that half-times are exactly proportional to 1/s. From a small random start W2 = W1^T directions compete for the code:
:func:`linear_flow` integrates that.
"""

from __future__ import annotations

import numpy as np
from scipy.integrate import solve_ivp

from mae_align.runtime.devices import solve_context
from mae_align.runtime.errors import InputError


def logistic_strength(times: np.ndarray, values: np.ndarray, start: np.ndarray | float, num_pixels: int) -> np.ndarray:
    """Strength u_i(t) of each direction from a balanced, aligned start.

    Args:
        times: [T] learning rate times steps. values: [r] eigenvalues s. start: u0 in (0, 1), [r] or one for all.
        num_pixels: d, over which the loss is a mean.

    Returns:
        [T, r] float64 in (0, 1].

    Raises:
        InputError: a start outside (0, 1).

    Example:
        >>> logistic_strength(np.array([0.0, 1e9]), np.ones(1), 0.25, 4).round(6).tolist()
        [[0.25], [1.0]]
    """
    odds = _odds_against(start)
    return 1.0 / (1.0 + odds * np.exp(-4.0 * np.asarray(times)[:, None] * np.asarray(values) / num_pixels))


def logistic_half_time(
    values: np.ndarray, start: np.ndarray | float, num_pixels: int, *, level: float = 0.5
) -> np.ndarray:
    """When the residual (1 - u)^2 of each direction reaches a level.

    d / (4 s) log((1/u0 - 1) v / (1 - v)) with v = 1 - sqrt(level).

    Args:
        values: [r] eigenvalues s. start: u0 in (0, 1), [r] or one for all. num_pixels: d. level: in (0, 1).

    Returns:
        [r] times, learning rate times steps; negative where the start is past it.

    Raises:
        InputError: a start or level outside (0, 1).

    Example:
        >>> t = logistic_half_time(np.array([2.0, 1.0]), 0.01, 4)
        >>> round(float(t[1] / t[0]), 9)
        2.0
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"level={level}: give a residual between 0 and 1")
    reached = 1.0 - np.sqrt(level)
    return num_pixels / (4.0 * np.asarray(values)) * np.log(_odds_against(start) * reached / (1.0 - reached))


def linear_flow(
    times: np.ndarray, values: np.ndarray, encoder: np.ndarray, decoder: np.ndarray, num_pixels: int
) -> np.ndarray:
    """Residuals of all directions along the flow from any start, integrated in eigen-coordinates.

    Args:
        times: [T] ascending from 0, learning rate times steps. values: [r] eigenvalues s.
        encoder: [k, r] W1 C at time 0. decoder: [r, k] C^T W2 at time 0. num_pixels: d.

    Returns:
        [T, r] float64: E(c_i^T (W2 W1 x - x))^2 / s_i = sum_j (delta_ij - M_ij)^2 s_j / s_i with M = C^T W2 W1 C. Cost:
        8 k^2 r multiply-adds per evaluation, of which there are about 20 s_1 t_T / d. Relative error 1e-6.

    Raises:
        InputError: shapes that do not fit, or times that do not ascend from 0 or later.

    Example:
        >>> start = np.diag([0.1, 0.1])
        >>> flow = linear_flow(np.array([0.0, 3.0]), np.array([2.0, 1.0]), start, start, 4)
        >>> u = logistic_strength(np.array([0.0, 3.0]), np.array([2.0, 1.0]), 0.01, 4)
        >>> bool(np.abs(flow - (1 - u) ** 2).max() < 1e-6)
        True
    """
    t, s = np.asarray(times, np.float64), np.asarray(values, np.float64)
    w1, w2 = np.asarray(encoder, np.float64), np.asarray(decoder, np.float64)
    if w1.ndim != 2 or w1.shape != w2.T.shape or w1.shape[1] != len(s):
        raise InputError(
            f"encoder {list(w1.shape)}, decoder {list(w2.shape)}, {len(s)} eigenvalues: give [k, r], [r, k] and [r]"
        )
    if t.ndim != 1 or not len(t) or t[0] < 0 or (np.diff(t) <= 0).any():
        raise InputError("the times do not ascend: give increasing times of at least 0")
    size, shape = w1.size, w1.shape

    def slope(_: float, state: np.ndarray) -> np.ndarray:
        a, b = state[:size].reshape(shape), state[size:].reshape(shape)  # W1 and W2^T
        da = (b - (b @ b.T) @ a) * s
        scaled = a * s
        db = scaled - (scaled @ a.T) @ b
        return np.concatenate([da.ravel(), db.ravel()]) * (2.0 / num_pixels)

    start = np.concatenate([w1.ravel(), w2.T.ravel()])
    states = start[:, None] if t[-1] == 0 else _solved(slope, t, start)
    return np.stack([_residual(x[:size].reshape(shape), x[size:].reshape(shape), s) for x in states.T])


def _solved(slope, times: np.ndarray, start: np.ndarray) -> np.ndarray:
    # One BLAS thread: these products are small.
    with solve_context("float64"):
        found = solve_ivp(slope, (0.0, float(times[-1])), start, "RK45", t_eval=times, rtol=1e-6, atol=1e-9)
    assert found.success, found.message
    return found.y


def _residual(a: np.ndarray, b: np.ndarray, s: np.ndarray) -> np.ndarray:
    """From W1 [k, r] and W2^T [k, r]."""
    missed = np.eye(len(s)) - b.T @ a
    return (missed**2) @ s / s


def _odds_against(start: np.ndarray | float) -> np.ndarray:
    u0 = np.asarray(start, np.float64)
    if not ((u0 > 0) & (u0 < 1)).all():
        raise InputError("a start outside (0, 1): give strengths between 0 and 1")
    return 1.0 / u0 - 1.0
