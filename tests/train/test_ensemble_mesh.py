"""One device, eight virtual ones and two processes train alike; run as a script, this file is one of the processes."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mae_align.runtime.devices import compile_counter
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import start_distributed, train_mesh
from mae_align.train.ensemble import Training
from mae_align.train.step import Program
from tests.train.train_cases import BATCH, SHAPE, N, examples, training
from tests.two_processes import run_processes

STEPS = 50
SEEDS, MEMBERS = [1, 2], {"learning_rates": [1.0, 0.7], "guidance": [0.2, 0.0]}
CASES = {
    "one": {},
    "both": {"devices": 8, "ensemble": 2},
    "vit": {"vit": True},
    "vit both": {"vit": True, "devices": 8, "ensemble": 2},
}


def stream(which: Training) -> tuple[np.ndarray, np.ndarray]:
    """Three batches, the rows of this process."""
    images, labels = examples()
    rows = np.arange(3 * BATCH).reshape(3, BATCH)[:, which.batch_rows]
    return images[rows], labels[rows]


def curve(which: Training, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Loss [steps, E] of a run, and features [E, N, k] at its end."""
    state = which.init(SEEDS, **MEMBERS)
    state, metrics = which.advance(state, which.put(*examples()), steps)
    return np.asarray(metrics["loss"]), which.features(state, examples()[0], 16)


@pytest.fixture(scope="module")
def curves():
    return {name: curve(training(2, **case)) for name, case in CASES.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reference"), [("both", "one"), ("vit both", "vit")])
def test_eight_devices_train_like_one(curves, name, reference):
    (loss, features), (expected, theirs) = curves[name], curves[reference]
    assert loss.shape == (STEPS, 2) and loss[-5:].mean() < 0.9 * loss[0].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(features, theirs, rtol=1e-3, atol=1e-4)


def test_state_is_split_over_the_ensemble_and_copied_over_data():
    which = training(2, devices=8, ensemble=2)
    state, data = which.init(SEEDS, **MEMBERS), which.put(*examples())
    for leaf in jax.tree.leaves((state.params, state.rest, state.opt_state, state.keys, state.member)):
        assert leaf.sharding.is_equivalent_to(which.abstract_state.keys.sharding, leaf.ndim)
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}
    for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(which.abstract_state), strict=True):
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    state, _ = which.advance(state, data, 1)
    for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(which.abstract_state), strict=True):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    assert data.images.sharding.is_fully_replicated and data.images.dtype == np.uint8
    # Each device computes with its own rows: only sums of gradients and scalars go between them.
    text = which.lower(state, data).compile().as_text() or ""
    assert "all-reduce" in text
    for moved in ("all-to-all", "collective-permute", "reduce-scatter"):
        assert moved not in text, moved
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    # The metrics [steps, E] at the end, on every device.
    assert all(f"f32[{which.steps_per_call},2]" in line for line in gathers), gathers
    batch = [line for line in text.splitlines() if f"[1,{BATCH // 4},{','.join(map(str, SHAPE))}]" in line]
    assert batch and not any(f"[1,{BATCH},{','.join(map(str, SHAPE))}]" in line for line in text.splitlines())


def work(folder: Path) -> None:
    assert start_distributed()
    assert (jax.process_count(), jax.device_count()) == (2, 4)
    which = training(2, devices=4)
    loss, features = curve(which)
    vit_loss, vit_features = curve(training(2, devices=4, vit=True))
    images, labels = stream(which)
    assert images.shape == (3, BATCH // 2, *SHAPE)
    _, metrics = which.advance_batches(which.init(SEEDS, **MEMBERS), images, labels)
    streamed = np.asarray(metrics["loss"])
    file = folder / f"{jax.process_index()}.npz"
    np.savez(file, loss=loss, features=features, vit_loss=vit_loss, vit_features=vit_features, streamed=streamed)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, curves):
    run_processes(__file__, tmp_path, timeout=300)
    which = training(2)
    _, metrics = which.advance_batches(which.init(SEEDS, **MEMBERS), *stream(which))
    streamed = np.asarray(metrics["loss"])
    for me in (0, 1):
        theirs = np.load(tmp_path / f"{me}.npz")
        for network, name in (("one", ""), ("vit", "vit_")):
            loss, features = curves[network]
            np.testing.assert_allclose(theirs[f"{name}loss"], loss, rtol=1e-5)
            np.testing.assert_allclose(theirs[f"{name}features"], features, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(theirs["streamed"], streamed, rtol=1e-5)


def test_train_mesh():
    assert dict(train_mesh(4).shape) == {"ensemble": 4, "data": 2}
    assert [d.id for d in train_mesh(2, jax.devices()[:4]).devices[1]] == [2, 3]
    for bad in (3, 0, 16):
        with pytest.raises(InputError, match="does not divide 8 devices"):
            train_mesh(bad)


@pytest.mark.parametrize("program", Program)
def test_a_stream_of_the_batches_of_a_set_is_the_same_run(program):
    """Longer than a dispatch, and across the end of a pass; a second call compiles nothing."""
    which, (images, labels) = training(1, steps=4, program=program), examples()
    state = which.init([3], guidance=[0.5])
    per_epoch = N // BATCH
    rows = [
        np.asarray(which.order(state, step // per_epoch, N))[0, step % per_epoch * BATCH :][:BATCH] for step in range(7)
    ]
    _, expected = which.advance(state, which.put(images, labels), 7)
    batches = images[np.stack(rows)], labels[np.stack(rows)]
    with jax.transfer_guard("disallow"):
        after, found = which.advance_batches(which.init([3], guidance=[0.5]), *batches)
        with compile_counter() as count:
            which.advance_batches(after, *batches)
    assert count.names == [] and all(leaf.is_deleted() for leaf in jax.tree.leaves(after))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
