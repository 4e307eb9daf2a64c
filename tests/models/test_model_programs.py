"""Every network in the programs that training runs: jit, split and merge, ensembles by vmap, bfloat16."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_zoo import IMAGES, ZOO, make

from mae_align.models import Autoencoder, ModelKind

KEY = jax.random.key(3)
PRODUCT = re.compile(r"stablehlo\.(dot_general|convolution)")


@pytest.mark.parametrize("name", ["noisy_mlp", "resnet", "vit"])
def test_an_ensemble_by_vmap_equals_its_members(name):
    """Losses, gradients and batch statistics of three members with their own parameters and keys."""
    members = [make(name, seed) for seed in range(3)]
    for member in members:
        member.train()
    graph = nnx.graphdef(members[0])
    states = [nnx.split(member, nnx.Param, ...)[1:] for member in members]
    keys = jax.random.split(KEY, 3)

    def step(params: nnx.State, rest: nnx.State, key: jax.Array) -> tuple:
        def loss(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            model = nnx.merge(graph, params, rest, copy=True)
            return model.loss(IMAGES, key)[0], nnx.state(model, nnx.BatchStat)

        return jax.value_and_grad(loss, has_aux=True)(params)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together = jax.jit(jax.vmap(step))(*stacked, keys)
    one = jax.jit(step)
    alone = [one(*state, key) for state, key in zip(states, keys, strict=True)]
    chex.assert_trees_all_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), atol=2e-5, rtol=2e-4)
    losses = np.asarray(together[0][0])
    assert len(np.unique(losses)) == 3 and np.isfinite(losses).all()


def test_construction_under_vmap_gives_every_member_its_own_parameters():
    def start(key: jax.Array) -> nnx.State:
        return nnx.state(ZOO["noisy_mlp"](nnx.Rngs(key), jnp.float32), nnx.Param)

    keys = jax.random.split(KEY, 2)
    together, first = jax.jit(jax.vmap(start))(keys), jax.jit(start)(keys[0])
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], together), first, rtol=1e-6)
    kernels = [leaf for leaf in jax.tree.leaves(together) if leaf.ndim == 3]
    assert len(kernels) == 4 and all(np.abs(leaf[0] - leaf[1]).max() > 0.1 for leaf in kernels)


@pytest.mark.parametrize("name", list(ZOO))
def test_every_network_is_constructed_under_vmap(name):
    """Shapes: every leaf, constants too, with the members in front."""
    keys = jax.random.split(KEY, 2)
    found = jax.eval_shape(jax.vmap(lambda key: nnx.state(ZOO[name](nnx.Rngs(key), jnp.float32))), keys)
    chex.assert_trees_all_equal_shapes(found, jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), nnx.state(make(name))))


@pytest.mark.parametrize("name", ["noisy_mlp", "resnet", "vit"])
def test_bfloat16_computes_with_float32_parameters_losses_and_features(name):
    exact, model = make(name), make(name, dtype=jnp.bfloat16)
    for net in (exact, model):
        net.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params: nnx.State) -> tuple[jax.Array, nnx.State]:
        return jax.value_and_grad(lambda p: nnx.merge(graph, p, rest).loss(IMAGES, KEY)[0])(params)

    assert {leaf.dtype for leaf in jax.tree.leaves((params, jax.eval_shape(step, params)))} == {jnp.dtype("float32")}
    text = jax.jit(step).lower(params).as_text()
    operands = [line.split(" : ")[-1].split(" -> ")[0] for line in text.splitlines() if PRODUCT.search(line)]
    assert len(operands) > 5 and all(re.fullmatch(r"\(tensor<\S*bf16>, tensor<\S*bf16>\)", types) for types in operands)

    def run(net: Autoencoder) -> tuple[jax.Array, jax.Array, jax.Array]:
        return net.encode(IMAGES), net.reconstruct(IMAGES), net.loss(IMAGES, KEY)[0]

    for found, expected in zip(*(jax.jit(lambda net=net: run(net))() for net in (model, exact)), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())
        assert np.abs(found - expected).max() > 0


@pytest.mark.parametrize("name", list(ZOO))
def test_no_variable_is_shared_and_nothing_random_is_kept(name):
    """State is a plain tree: what goes through split comes back, and no generator hides in the model."""
    model = make(name)
    variables = [v for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]
    assert len(variables) == len(jax.tree.leaves(nnx.state(model)))
    assert not any(isinstance(v, nnx.RngState) for v in variables)


def test_kinds_say_what_a_step_is_made_of():
    kinds = {name: make(name).kind for name in ZOO}
    convolutions = {name for name, kind in kinds.items() if kind is ModelKind.CONVOLUTION}
    assert convolutions == {"conv", "resnet"}
