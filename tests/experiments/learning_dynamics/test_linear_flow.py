from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.learning_dynamics.dynamics import direction_energy, half_times, shares
from experiments.learning_dynamics.linear_flow import linear_flow
from experiments.learning_dynamics.spectrum import Images, Spectrum, image_map
from mae_align import InputError, Moments
from mae_align.models import MLPAutoencoder, Pixels
from mae_align.train.ensemble import Training, reconstruct
from mae_align.train.optimizer import momentum

VALUES = np.array([4.0, 2.0, 1.0, 0.5, 0.25])


def plain_descent(values, encoder, decoder, rate, steps, num_pixels):
    """Gradient descent on E|x - W2 W1 x|^2 / d with the full matrices, residuals after each step."""
    s, a, b, found = np.diag(values), encoder.copy(), decoder.copy(), []
    eye = np.eye(len(values))
    for _ in range(steps + 1):
        missed = eye - b @ a
        found.append(np.diag(missed @ s @ missed.T) / values)
        ga, gb = -2 / num_pixels * b.T @ missed @ s, -2 / num_pixels * missed @ s @ a.T
        a, b = a - rate * ga, b - rate * gb
    return np.array(found)


def test_flow_is_the_limit_of_gradient_descent_from_any_start():
    rng = np.random.default_rng(0)
    encoder, decoder = 0.1 * rng.normal(size=(3, 5)), 0.2 * rng.normal(size=(5, 3))
    descent = plain_descent(VALUES, encoder, decoder, 1e-3, 12_000, 7)
    times = np.array([0.0, 1.0, 3.0, 6.0, 12.0])
    flow = linear_flow(times, VALUES, encoder, decoder, 7)
    np.testing.assert_allclose(flow, descent[(times / 1e-3).astype(int)], atol=5e-4)
    # Three numbers for five directions: the last ones are left.
    late = linear_flow(np.array([0.0, 300.0]), VALUES, encoder, decoder, 7)[1]
    assert (late[:3] < 0.05).all()
    assert (late[3:] > 0.9).all()


def test_aligned_balanced_start_follows_the_logistic_curve_in_any_basis_of_the_code():
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    start = np.array([0.01, 0.02, 0.01, 0.05, 0.01])
    encoder = rotation * np.sqrt(start)
    times = np.linspace(0, 40, 9)
    # Saxe, McClelland & Ganguli (2014).
    u = 1 / (1 + (1 / start - 1) * np.exp(-4 * times[:, None] * VALUES / 6))
    np.testing.assert_allclose(linear_flow(times, VALUES, encoder, encoder.T, 6), (1 - u) ** 2, atol=1e-5)


def test_a_trained_network_follows_the_flow_from_its_own_start():
    """The whole way of the experiment: images, normalisation, network, optimiser, residuals."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(32, 6)) * [5.0, 3.0, 2.0, 1.0, 0.5, 0.2]) @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    moved = image_map(Images.original, Spectrum.of(Moments.from_arrays(x.reshape(32, 2, 3, 1))), 6, 0)
    images, s = moved.apply(x.reshape(32, 2, 3, 1)), moved.spectrum
    pixels = Pixels(np.zeros((2, 3, 1), np.float32), np.array(1.0, np.float32))
    drawn = np.random.default_rng(3).normal(size=(6, 3)) * 0.05

    def make(rngs: nnx.Rngs) -> MLPAutoencoder:
        model = MLPAutoencoder(pixels, hidden=(), activation=None, latent=3, rngs=rngs)
        model.down[0].kernel[...], model.up[0].kernel[...] = (jnp.asarray(a, jnp.float32) for a in (drawn, drawn.T))
        return model

    rate = 0.01
    training = Training(make, reconstruct, momentum(rate, 0.0), batch_size=32, num_members=1)
    state, data = training.init([0]), training.put(images)
    steps, share = [0, 100, 300, 900], np.ones(6)
    for before, step in itertools.pairwise(steps):
        state, _ = training.advance(state, data, step - before)
        model = training.model(state, 0)
        assert isinstance(model, MLPAutoencoder)
        missed = np.asarray(model.reconstruct(images)) - images
        share = shares(direction_energy(missed, s), direction_energy(images, s))
        flow = linear_flow(
            np.array([0.0, rate * step]), s.values, drawn.T @ s.vectors, s.vectors.T @ drawn, s.num_pixels
        )[1]
        np.testing.assert_allclose(share, flow, atol=0.02)
    assert share[0] < 0.01
    assert share[3] > 0.5


def test_half_times_from_a_small_random_start_are_near_the_known_ones():
    """|W1 c_i|^2 is the start of a direction; what the directions take from each other changes little at first."""
    values = np.geomspace(8, 0.5, 5)
    encoder = 0.03 * np.random.default_rng(0).normal(size=(40, 5)) / np.sqrt(40)
    steps = np.unique(np.geomspace(1, 30_000, 80).round())
    flow = linear_flow(np.concatenate([[0.0], steps]) * 1e-2, values, encoder, encoder.T, 9)
    found = half_times(np.concatenate([[0.0], steps]), flow).time * 1e-2
    # The residual (1 - u)^2 of the logistic curve is 1/2 where u is v.
    start, v = (encoder**2).sum(0), 1 - np.sqrt(0.5)
    known = 9 / (4 * values) * np.log((1 / start - 1) * v / (1 - v))
    np.testing.assert_allclose(found, known, rtol=0.05)


def test_bad_input_is_refused():
    with pytest.raises(InputError, match=r"encoder \[2, 4\]"):
        linear_flow(np.array([0.0, 1.0]), VALUES, np.ones((2, 4)), np.ones((5, 2)), 4)
    with pytest.raises(InputError, match="do not ascend"):
        linear_flow(np.array([1.0, 1.0]), VALUES, np.ones((2, 5)), np.ones((5, 2)), 4)
