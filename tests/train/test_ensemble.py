"""Steps of an ensemble on one device, against steps made by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mae_align.models import MLPAutoencoder, ModelKind, Pixels
from mae_align.runtime.devices import compile_counter
from mae_align.runtime.processes import train_mesh
from mae_align.train.ensemble import Training, reconstruct
from mae_align.train.optimizer import adamw
from mae_align.train.step import Program, choose_program, step_key, weights_key
from tests.train.train_cases import BATCH, CONFIG, QUICK, N, examples, guided, leaves, same_bits, training

MEMBERS = {"learning_rates": [1.0, 0.5, 2.0], "guidance": [0.0, 0.3, 1.0]}
SEEDS = [5, 2**32 - 1, 5]
TOTAL = 13  # more than two passes over the images


def run(which: Training, seeds=SEEDS, calls=(TOTAL,), **members):
    state = which.init(seeds, **(members or MEMBERS))
    data, found = which.put(*examples()), []
    for count in calls:
        state, metrics = which.advance(state, data, count)
        found.append({name: np.asarray(value) for name, value in metrics.items()})
    return state, {name: np.concatenate([part[name] for part in found]) for name in found[0]}


@pytest.fixture(scope="module")
def ensemble():
    return run(training())


def test_a_member_moves_as_by_hand(ensemble):
    """Member 1: its batches, masks, guidance, learning rate, clipping and decay, without any of the programs."""
    state, metrics = ensemble
    images, labels = examples()
    key = jax.random.key(SEEDS[1])
    graphdef, params, rest = nnx.split(guided(nnx.Rngs(weights_key(key))), nnx.Param, ...)
    per_epoch = N // BATCH
    orders = [np.asarray(training().order(state, epoch, N))[1] for epoch in range(-(-TOTAL // per_epoch))]

    @jax.jit
    def value_and_grad(params, images, labels, key):
        def loss(params):
            return nnx.merge(graphdef, params, rest).loss(images, labels, key, jnp.float32(0.3))

        return jax.value_and_grad(loss, has_aux=True)(params)

    adam = optax.scale_by_adam(CONFIG.b1, CONFIG.b2, CONFIG.eps)
    moments = adam.init(params)
    for step in range(TOTAL):
        rows = orders[step // per_epoch][step % per_epoch * BATCH :][:BATCH]
        (loss, found), grad = value_and_grad(
            params, images[rows].astype(np.float32), labels[rows], step_key(key, jnp.int32(step))
        )
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grad)))
        for name, value in {"loss": loss, "gradient_norm": norm, **found}.items():
            np.testing.assert_allclose(metrics[name][step, 1], value, rtol=1e-5, err_msg=f"{name} of step {step}")
        shrink = min(1.0, CONFIG.clip_norm / norm)
        grad = jax.tree.map(lambda g, by=shrink: g * by, grad)
        scaled, moments = adam.update(grad, moments)
        rate = 0.5 * CONFIG.learning_rate * min((step + 1) / CONFIG.warmup_steps, 1.0)
        if step >= CONFIG.warmup_steps:
            progress = (step - CONFIG.warmup_steps) / (CONFIG.total_steps - CONFIG.warmup_steps)
            rate *= (1 + np.cos(np.pi * progress)) / 2
        params = jax.tree.map(
            lambda p, u, rate=rate: p - rate * (u + (CONFIG.weight_decay * p if p.ndim >= 2 else 0.0)), params, scaled
        )
    assert metrics["gradient_norm"][:, 1].max() > CONFIG.clip_norm > metrics["gradient_norm"][:, 1].min()
    for ours, hand in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours[1], hand, rtol=1e-4, atol=1e-6)
    assert int(state.step) == TOTAL


def test_orders_are_permutations_of_seed_and_epoch(ensemble):
    state, _ = ensemble
    first, second = (np.asarray(training().order(state, epoch, N)) for epoch in (0, 1))
    np.testing.assert_array_equal(np.sort(first), np.tile(np.arange(N), (3, 1)))
    np.testing.assert_array_equal(first[0], first[2])
    assert (first != second).any(1).all() and (first[0] != first[1]).any()


def test_the_same_seed_is_the_same_run_bit_for_bit_however_it_is_cut(ensemble):
    state, metrics = ensemble
    for calls in ((TOTAL,), (1, 5, 7)):
        again, found = run(training(), calls=calls)
        same_bits(state, again)
        assert all(np.array_equal(metrics[name], found[name]) for name in metrics)
    # Calls of more steps than a dispatch has.
    (one, whole), (two, parts) = (run(training(1, steps=4), [3], calls, guidance=[0.5]) for calls in ((TOTAL,), (9, 4)))
    same_bits(one, two)
    assert all(np.array_equal(whole[name], parts[name]) and len(whole[name]) == TOTAL for name in whole)


def test_a_memo_of_one_run_does_not_reach_another(ensemble):
    _, metrics = ensemble
    _, other = run(training(), seeds=[8, 9, 10])
    _, again = run(training())
    assert (metrics["loss"] != other["loss"]).all() and np.array_equal(metrics["loss"], again["loss"])


def test_a_member_is_a_run_of_it_alone(ensemble):
    state, metrics = ensemble
    for i in range(3):
        alone, found = run(
            training(1, steps=4), [SEEDS[i]], **{name: values[i : i + 1] for name, values in MEMBERS.items()}
        )
        for name in metrics:
            np.testing.assert_allclose(found[name][:, 0], metrics[name][:, i], rtol=1e-5, atol=1e-7)
        for one, many in zip(leaves(alone.params), leaves(state.params), strict=True):
            np.testing.assert_allclose(one[0], many[i], rtol=1e-4, atol=1e-6)


def test_members_of_one_seed_differ_in_what_they_are_told_alone(ensemble):
    _, metrics = ensemble
    start = training().init(SEEDS, **MEMBERS)
    for weights in leaves(start.params):
        np.testing.assert_array_equal(weights[0], weights[2])
    # The same weights, batch and mask: the reconstruction is the same until learning rate and guidance part them.
    np.testing.assert_array_equal(metrics["reconstruction"][0, 0], metrics["reconstruction"][0, 2])
    assert metrics["reconstruction"][0, 0] != metrics["reconstruction"][0, 1]
    assert metrics["reconstruction"][1, 0] != metrics["reconstruction"][1, 2]
    # Guidance 0 trains the head alone, and two members that are told the same stay the same.
    _, twins = run(training(), [7, 7, 7], learning_rates=[1, 1, 1], guidance=[0, 0, 0.5])
    np.testing.assert_array_equal(twins["loss"][:, 0], twins["loss"][:, 1])
    assert twins["cross_entropy"][-1, 0] < twins["cross_entropy"][0, 0]


@pytest.mark.parametrize("program", Program)
def test_a_second_call_compiles_nothing_and_no_call_transfers(program):
    which = training(program=program)
    state, data = which.init(SEEDS, **MEMBERS), which.put(*examples())
    with jax.transfer_guard("disallow"):
        state, _ = which.advance(state, data, 3)
        old = state
        with compile_counter() as count:
            state, _ = which.advance(state, data, 3)
            state, _ = which.advance(state, data, 3)
    assert count.names == []
    # Donated: there is one copy of the state.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old)) and int(state.step) == 9
    assert not data.images.is_deleted()


def test_every_step_draws_masks_of_its_own():
    """The same batch again and again, and parameters that stand still: the masks alone change the loss."""
    which, (images, labels) = training(2), examples()
    state = which.init([5, 6], learning_rates=[0.0, 0.0], guidance=[0.0, 0.0])
    before = leaves(state.params)
    state, metrics = which.advance_batches(state, np.stack([images[:BATCH]] * 6), np.stack([labels[:BATCH]] * 6))
    for x, y in zip(leaves(state.params), before, strict=True):
        np.testing.assert_array_equal(x, y)
    loss = np.asarray(metrics["loss"])
    assert len(np.unique(loss[:, 0])) == len(np.unique(loss[:, 1])) == 6


def test_one_by_one_is_the_same_run(ensemble):
    state, metrics = ensemble
    which = training(program=Program.ONE_BY_ONE)
    again, found = run(which)
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5, atol=1e-7)
    for one, many in zip(leaves(again), leaves(state), strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-6)
    twice, _ = run(which, calls=(5, 8))
    same_bits(again, twice)


def test_one_by_one_a_step_costs_the_same_whatever_the_number_of_members():
    """Nothing of the other members is read or copied in it."""

    def cost(members: int) -> list[float]:
        which = training(members, program=Program.ONE_BY_ONE)
        compiled = which.lower(which.init(range(members)), which.put(*examples())).compile()
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        assert memory is not None and cost is not None
        return [cost["bytes accessed"], memory.argument_size_in_bytes, memory.temp_size_in_bytes]

    assert cost(1) == cost(5) and all(value > 0 for value in cost(1))


def test_program_choice():
    slow = (ModelKind.CONVOLUTION, "cpu")
    for kind in ModelKind:
        for platform in ("cpu", "gpu", "tpu"):
            assert (choose_program(kind, platform) is Program.ONE_BY_ONE) == ((kind, platform) == slow)
    assert training().program is Program.VMAPPED_SCAN


def test_metrics_have_a_row_for_each_step(ensemble):
    _, metrics = ensemble
    assert {value.shape for value in metrics.values()} == {(TOTAL, 3)}


@pytest.mark.parametrize("program", Program)
def test_features_are_those_of_the_models(program, ensemble):
    which, images = training(program=program), examples()[0]
    state, _ = ensemble
    found = which.features(state, images, 10)
    assert found.shape == (3, N, 4) and found.dtype == np.float32
    with compile_counter() as count:
        np.testing.assert_array_equal(which.features(state, images[:7], 10), found[:, :7])
    assert count.names == []
    for i in range(3):
        model = which.model(state, i)
        np.testing.assert_allclose(model.features(images), found[i], rtol=1e-5, atol=1e-6)
        for own, stack in zip(jax.tree.leaves(nnx.state(model, nnx.Param)), leaves(state.params), strict=True):
            np.testing.assert_array_equal(own, stack[i])


def test_compute_in_bfloat16_keeps_parameters_in_float32():
    images = examples()[0]

    def make(dtype):
        pixels = Pixels.from_images(images)
        return lambda rngs: MLPAutoencoder(pixels, hidden=(), latent=4, dtype=dtype, rngs=rngs)

    which = Training(
        make(jnp.bfloat16),
        reconstruct,
        adamw(dataclasses.replace(CONFIG, warmup_steps=0)),
        batch_size=BATCH,
        num_members=1,
        mesh=train_mesh(devices=jax.devices()[:1]),
        compiler_options=QUICK,
    )
    state = which.init([0])
    rows = np.asarray(which.order(state, 0, N))[0, :BATCH]
    full = make(jnp.float32)(nnx.Rngs(weights_key(jax.random.key(0)))).loss(images[rows], jax.random.key(0))[0]
    state, metrics = which.advance(state, which.put(images), 40)
    assert {x.dtype.name for x in jax.tree.leaves((state.params, state.opt_state))} == {"float32", "int32"}
    loss = np.asarray(metrics["loss"])[:, 0]
    assert 0 < abs(loss[0] / full - 1) < 0.01 and loss[-5:].mean() < 0.8 * loss[:5].mean()
