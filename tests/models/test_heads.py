"""Heads on the features: guidance of an autoencoder by labels, and classification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from model_zoo import IMAGES, LABELS, make

from mae_align.models import Classifier, GuidedAutoencoder, classification, in_head
from mae_align.runtime.errors import InputError
from mae_align.train.optimizer import OptimizerConfig, adamw

KEY = jax.random.key(3)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return graph, params, rest


@pytest.fixture(scope="module", params=["mlp", "noisy_mlp"])
def guided(request) -> GuidedAutoencoder:
    """Features from the pass that is decoded, and from a second one."""
    return GuidedAutoencoder(make(request.param), 3, rngs=nnx.Rngs(0))


def test_head_gets_all_of_the_gradient_and_the_autoencoder_its_share(guided):
    graph, params, rest = split(guided)

    def reconstruction(params: nnx.State) -> jax.Array:
        return nnx.merge(graph, params, rest).autoencoder.loss(IMAGES, KEY)[0]

    def entropy(params: nnx.State) -> jax.Array:
        return classification(nnx.merge(graph, params, rest).logits(IMAGES), LABELS)["cross_entropy"]

    def loss(params: nnx.State, weight: jax.Array) -> tuple[jax.Array, dict]:
        return nnx.merge(graph, params, rest).loss(IMAGES, LABELS, KEY, weight)

    (r, r_grad), (c, c_grad) = (jax.jit(jax.value_and_grad(f))(params) for f in (reconstruction, entropy))
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for weight in (0.0, 0.25):
        (value, metrics), grads = step(params, jnp.float32(weight))
        np.testing.assert_allclose(value, r + weight * c, rtol=1e-5)
        np.testing.assert_allclose([metrics["reconstruction"], metrics["cross_entropy"]], [r, c], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads["head"], c_grad["head"])
        jax.tree.map(
            lambda a, b, c, w=weight: np.testing.assert_allclose(a, b + w * c, atol=1e-5),
            *(tree["autoencoder"] for tree in (grads, r_grad, c_grad)),
        )
        assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads["head"]))


def test_at_weight_0_the_autoencoder_steps_as_without_a_head():
    """Also where gradients are clipped."""
    graph, params, rest = split(GuidedAutoencoder(make("noisy_mlp"), 3, rngs=nnx.Rngs(0)))

    def gradient(loss) -> nnx.State:
        return jax.jit(jax.grad(lambda p: loss(nnx.merge(graph, p, rest))))(params)

    with_head = gradient(lambda model: model.loss(IMAGES, LABELS, KEY, jnp.float32(0.0))[0])
    alone = gradient(lambda model: model.autoencoder.loss(IMAGES, KEY)[0])["autoencoder"]
    # Adam would undo a scale but for eps.
    config = OptimizerConfig(total_steps=2, learning_rate=1.0, weight_decay=0.0, eps=1.0, clip_norm=0.01)

    def step(rule: optax.GradientTransformation, grads, params) -> list[np.ndarray]:
        updates = jax.jit(lambda g, p: rule.update(g, rule.init(p), p)[0])(grads, params)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(updates)]

    expected = step(adamw(config), alone, params["autoencoder"])
    found = step(adamw(config, in_head), with_head, params)[: len(expected)]
    together = step(adamw(config), with_head, params)[: len(expected)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)
    assert not np.allclose(together[0], expected[0], rtol=1e-3, atol=0.0)
    # Checkpoints of either can be read by the other.
    plain, apart = (jax.eval_shape(adamw(config, path).init, params) for path in (None, in_head))
    names = [[jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(x)] for x in (plain, apart)]
    assert names[0] == names[1]


def test_a_traced_weight_per_member_under_vmap(guided):
    weights = jnp.array([0.0, 0.5, 2.0])
    many = jax.jit(jax.vmap(lambda w: guided.loss(IMAGES, LABELS, KEY, w)[0]))(weights)
    np.testing.assert_allclose(np.diff(many) / np.diff(weights), (many[2] - many[0]) / 2.0, rtol=1e-4)
    assert many[2] > many[0]


def test_a_guided_model_stands_for_its_autoencoder():
    inner = make("mlp")
    model = GuidedAutoencoder(inner, 3, rngs=nnx.Rngs(0))
    assert (model.kind, model.image_shape) == (inner.kind, inner.image_shape)
    np.testing.assert_array_equal(model.features(IMAGES), inner.encode(IMAGES))
    np.testing.assert_array_equal(model.reconstruct(IMAGES), inner.reconstruct(IMAGES))


def test_classification_follows_the_definition():
    rng = np.random.default_rng(0)
    logits = (5 * rng.normal(size=(6, 3))).astype(np.float32)
    found = classification(jnp.asarray(logits), jnp.asarray(LABELS))
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
    np.testing.assert_allclose(found["cross_entropy"], -np.log(p[np.arange(6), LABELS]).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], (logits.argmax(1) == LABELS).mean())


def test_large_logits_do_not_overflow():
    found = classification(jnp.array([[1e4, 0.0], [0.0, 1e4]]), jnp.array([0, 0]))
    np.testing.assert_allclose([found["cross_entropy"], found["accuracy"]], [5e3, 0.5])


def test_classifier_trains_encoder_and_head_and_nothing_else():
    model = Classifier(make("vit"), 3, rngs=nnx.Rngs(0))
    model.head.bias[...] = jnp.array([0.3, -0.2, 0.1])
    graph, params, rest = split(model)
    loss = jax.value_and_grad(lambda p: nnx.merge(graph, p, rest).loss(IMAGES, LABELS, KEY), has_aux=True)
    (value, metrics), grads = jax.jit(loss)(params)
    logits = np.asarray(jax.jit(model.logits)(IMAGES))
    expected = classification(jnp.asarray(logits), jnp.asarray(LABELS))
    np.testing.assert_allclose(
        [value, metrics["accuracy"]], [expected["cross_entropy"], expected["accuracy"]], rtol=1e-5
    )
    kernel, bias = np.asarray(model.head.kernel[...]), np.asarray(model.head.bias[...])
    np.testing.assert_allclose(
        logits, np.asarray(jax.jit(model.features)(IMAGES)) @ kernel + bias, rtol=1e-3, atol=1e-4
    )
    used = {
        name for name, tree in grads["autoencoder"].items() if any(np.abs(g).max() > 0 for g in jax.tree.leaves(tree))
    }
    assert used == {"embed", "class_token", "blocks", "norm"}


@pytest.mark.parametrize("make_head", [GuidedAutoencoder, Classifier])
def test_a_single_class_is_refused(make_head):
    with pytest.raises(InputError, match="at least two classes"):
        make_head(make("mlp"), 1, rngs=nnx.Rngs(0))
