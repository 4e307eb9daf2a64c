"""Schedules, decay and clipping against their definitions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_align.runtime.errors import InputError
from mae_align.train.optimizer import OptimizerConfig, adamw, momentum, warmup_cosine


def moved(rule: optax.GradientTransformation, params, gradients) -> Any:
    state = rule.init(params)
    for gradient in gradients:
        updates, state = rule.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_warmup_then_cosine_then_nothing():
    rate = warmup_cosine(0.4, 4, 12)
    found = np.array([rate(step) for step in range(14)])
    np.testing.assert_allclose(found[:4], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(found[4:12], 0.2 * (1 + np.cos(np.pi * np.arange(8) / 8)), rtol=1e-5)
    assert (np.abs(found[12:]) < 1e-7).all()
    assert np.asarray(warmup_cosine(0.4, 0, 12)(0)) == pytest.approx(0.4)


def test_decay_leaves_vectors_alone_under_vmap_too():
    rule = adamw(OptimizerConfig(total_steps=10, learning_rate=0.5, weight_decay=0.1))
    params = {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2)), "scale": jnp.ones(3)}
    updates: Any = jax.vmap(lambda p: rule.update(jax.tree.map(jnp.zeros_like, p), rule.init(p), p))(params)[0]
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    assert not updates["bias"].any() and not updates["scale"].any()


def test_norms_are_clipped_per_member():
    rule = momentum(1.0, 0.0, clip_norm=1.0)
    gradients = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    updates: Any = jax.vmap(lambda g: rule.update(g, rule.init(g)))(gradients)[0]
    np.testing.assert_allclose(updates, [[-0.6, -0.8], [-0.3, -0.4]], rtol=1e-6)


def test_adam_is_its_definition():
    config = OptimizerConfig(
        total_steps=5, learning_rate=0.1, weight_decay=0.2, b1=0.8, b2=0.9, eps=1e-2, clip_norm=None
    )
    gradients = np.random.default_rng(0).normal(size=(5, 2, 2)) * 0.1
    p, m, v = np.ones((2, 2)), 0.0, 0.0
    for t, g in enumerate(gradients):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        unbiased = m / (1 - 0.8 ** (t + 1)), v / (1 - 0.9 ** (t + 1))
        rate = 0.05 * (1 + np.cos(np.pi * t / 5))
        p = p - rate * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-2) + 0.2 * p)
    ours = moved(adamw(config), jnp.ones((2, 2)), jnp.asarray(gradients, jnp.float32))
    np.testing.assert_allclose(ours, p, rtol=1e-5)


def test_momentum_is_its_definition():
    gradients = np.array([1.0, 2.0, -1.0])
    v, p = 0.0, 0.0
    for g in gradients:
        v = 0.5 * v + g
        p -= 0.1 * v
    assert float(moved(momentum(0.1, 0.5), jnp.zeros(()), jnp.asarray(gradients, jnp.float32))) == pytest.approx(p)
    assert float(moved(momentum(0.1, 0.0), jnp.zeros(()), jnp.ones(3))) == pytest.approx(-0.3)
    decaying = momentum(warmup_cosine(0.1, 0, 2), 0.0)
    assert float(moved(decaying, jnp.zeros(()), jnp.ones(3))) == pytest.approx(-0.15)


@pytest.mark.parametrize(
    "bad",
    [
        {"total_steps": 0},
        {"warmup_steps": 10},
        {"warmup_steps": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1.0},
        {"b1": 1.0},
        {"b2": -0.1},
        {"eps": 0.0},
        {"clip_norm": 0.0},
    ],
)
def test_values_out_of_range(bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))}|warm-up"):
        OptimizerConfig(**{"total_steps": 10, **bad})


def test_momentum_out_of_range():
    for make in (lambda: momentum(-1.0), lambda: momentum(0.1, 1.0), lambda: momentum(0.1, clip_norm=-1.0)):
        with pytest.raises(InputError):
            make()
