"""The gradient flow that descent on a linear autoencoder is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.learning_dynamics.dynamics import half_times
from experiments.learning_dynamics.linear_flow import linear_flow
from experiments.learning_dynamics.spectrum import Spectrum
from mae_align.train.ensemble import Training, TrainState

# Evaluations of the flow per unit of descent rate and step: the steps of the integrator are bounded by its stability,
# as those of descent are.
_EVALUATIONS = 9.25


def flow_cost(descent_rate: float, steps: int, latent: int, rank: int, members: int) -> float:
    """Multiply-adds of :func:`flow_half_times`, about: 8 k^2 r for each evaluation of the flow.

    Args:
        descent_rate: in units of d / largest eigenvalue. steps: of descent. latent: k. rank: r. members: networks.

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
        training, state: linear networks before their first step. spectrum: of their images. steps: [T], from 0 on, at
            which residuals are taken. rate: of descent.

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
