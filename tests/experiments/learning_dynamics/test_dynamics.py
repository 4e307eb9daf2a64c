from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.learning_dynamics.dynamics import (
    direction_energy,
    group_shares,
    half_times,
    shares,
    variance_groups,
)
from experiments.learning_dynamics.spectrum import Spectrum
from mae_align import InputError, Moments


def test_a_projection_leaves_the_directions_it_drops_and_the_sum_is_the_error():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (300, 3, 3, 1), dtype=np.uint8)
    s = Spectrum.of(Moments.from_arrays(x))
    kept = s.vectors[:, :4]
    flat = x.reshape(300, 9) - s.mean
    missed = (flat @ kept @ kept.T + s.mean).reshape(x.shape) - x
    energy = direction_energy(x - s.mean.reshape(3, 3, 1), s)
    np.testing.assert_allclose(shares(direction_energy(missed, s), energy), [0] * 4 + [1] * 5, atol=1e-12)
    np.testing.assert_allclose(energy, s.values)
    noise = rng.normal(size=x.shape)
    assert direction_energy(noise, s).sum() == pytest.approx((noise**2).sum() / 300)
    # As they are, whatever their mean; in batches.
    assert direction_energy(np.ones((2100, 3, 3, 1)), s) == pytest.approx(s.vectors.sum(0) ** 2)


def test_groups_hold_equal_shares_of_the_variance():
    values = np.geomspace(1, 1e-3, 4000)
    groups = variance_groups(values)
    share = np.bincount(groups, values) / values.sum()
    np.testing.assert_allclose(share, 0.1, atol=2e-3)
    assert (np.diff(groups) >= 0).all()
    # One direction with two thirds leaves the groups beside its own empty.
    assert variance_groups(np.array([2.0, 1.0]), 6).tolist() == [2, 5]
    found = group_shares(np.array([1.0, 0.5]), np.array([2.0, 1.0]), np.array([2, 5]), 6)
    np.testing.assert_array_equal(found, [np.nan, np.nan, 0.5, np.nan, np.nan, 0.5])


@settings(max_examples=40, deadline=None)
@given(st.floats(0.3, 3.0), st.floats(1.5, 900.0))
def test_half_times_of_residuals_linear_in_log_step_are_exact(slope, half):
    """Between records the residual is interpolated over log t, so that such residuals have exact half-times."""
    steps = np.array([0, 1, 2, 6, 13, 32, 75, 178, 422, 1000])
    curve = 0.5 - slope * np.log(np.maximum(steps, 1e-9) / half)
    curve[0] = 0.5 - slope * np.log(1 / half) + 1
    found = half_times(steps, curve[:, None])
    assert found.time[0] == pytest.approx(half)
    assert not found.censored[0]


def test_half_times_at_the_ends():
    steps = np.array([0, 1, 10])
    curves = np.array(
        [
            [1.0, 1.0, 1.0],  # never
            [1.0, 0.0, 0.0],  # within the first step: linear in t
            [0.4, 0.3, 0.2],  # from the first
            [1.0, 0.5, 0.5],  # at a record
            [3.0, 0.4, 0.9],  # first crossing counts
            [1.0, np.nan, np.nan],  # diverged before
            [1.0, 0.0, np.nan],  # diverged after
            [1.0, 0.6, np.nan],
        ]
    )
    found = half_times(steps, np.stack([curves.T, curves.T]))
    assert found.time.shape == (2, 8)
    np.testing.assert_allclose(found.time[1], [10, 0.5, 0, 1, 2.5 / 2.6, np.nan, 0.5, np.nan])
    assert found.censored[0].tolist() == [True] + [False] * 7


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="0 groups"):
        variance_groups(np.ones(2), 0)
    with pytest.raises(InputError, match="give ascending"):
        half_times(np.array([0, 2, 1]), np.ones((3, 1)))
    with pytest.raises(InputError, match="give ascending"):
        half_times(np.array([0, 1]), np.ones((3, 1)))
    s = Spectrum((1, 2, 1), np.zeros(2), np.eye(2), np.ones(2))
    with pytest.raises(InputError, match="images have shape"):
        direction_energy(np.ones((1, 2, 1, 1)), s)
