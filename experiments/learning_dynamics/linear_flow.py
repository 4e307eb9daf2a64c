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

from typing import Any

import numpy as np
from scipy.integrate import solve_ivp

from experiments.learning_dynamics.dynamics import half_times
from experiments.learning_dynamics.spectrum import Spectrum
from mae_align.runtime.devices import solve_context
from mae_align.runtime.errors import InputError
from mae_align.train.ensemble import Training, TrainState

# Evaluations of the flow per unit of descent rate and step: the steps of the integrator are bounded by its stability,
# as those of descent are.
_EVALUATIONS = 9.25


def linear_flow(
    times: np.ndarray, values: np.ndarray, encoder: np.ndarray, decoder: np.ndarray, num_pixels: int
) -> np.ndarray:
    """Residuals of all directions along the flow from any start, integrated in eigen-coordinates.

    Args:
        times: [T] ascending from 0, learning rate times steps.
        values: [r] eigenvalues s.
        encoder: [k, r] W1 C at time 0.
        decoder: [r, k] C^T W2 at time 0.
        num_pixels: d, over which the loss is a mean.

    Returns:
        [T, r] float64: E(c_i^T (W2 W1 x - x))^2 / s_i = sum_j (delta_ij - M_ij)^2 s_j / s_i with M = C^T W2 W1 C. Cost:
        8 k^2 r multiply-adds per evaluation, of which there are about 20 s_1 t_T / d. Relative error 1e-6.

    Raises:
        InputError: shapes that do not fit, or times that do not ascend from 0 or later.

    Example:
        >>> start = np.diag([0.1, 0.1])
        >>> flow = linear_flow(np.array([0.0, 3.0]), np.array([2.0, 1.0]), start, start, 4)
        >>> u = 1 / (1 + 99 * np.exp(-4 * np.array([[0.0, 0.0], [6.0, 3.0]]) / 4))
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


def flow_cost(descent_rate: float, steps: int, latent: int, rank: int, members: int) -> float:
    """Multiply-adds of :func:`flow_half_times`, about: 8 k^2 r for each evaluation of the flow.

    Args:
        descent_rate: in units of d / largest eigenvalue.
        steps: of descent.
        latent: k.
        rank: r.
        members: networks.

    Example:
        >>> f"{flow_cost(0.1, 2000, 24, 60, 3):.1e}"
        '1.5e+09'
    """
    return _EVALUATIONS * descent_rate * steps * 8 * latent**2 * rank * members


def flow_half_times(
    training: Training, state: TrainState, spectrum: Spectrum, steps: np.ndarray, rate: float
) -> np.ndarray:
    """Half-times of the gradient flow from each network's own start.

    Args:
        training: of linear networks.
        state: before the first step.
        spectrum: of their images.
        steps: [T], from 0 on, at which residuals are taken.
        rate: of descent.

    Returns:
        [E, r] in steps; NaN beyond the last step. Cost: :func:`flow_cost`.
    """
    found = []
    for member in range(training.num_members):
        model: Any = training.model(state, member)
        encoder, decoder = (np.asarray(layer.kernel[...], np.float64) for layer in (model.down[0], model.up[0]))
        shares = linear_flow(
            rate * steps,
            spectrum.values,
            encoder.T @ spectrum.vectors,
            spectrum.vectors.T @ decoder.T,
            spectrum.num_pixels,
        )
        half = half_times(steps, shares)
        found.append(np.where(half.censored, np.nan, half.time))
    return np.stack(found)


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
