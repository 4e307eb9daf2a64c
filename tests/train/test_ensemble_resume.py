"""Training of networks, stopped or killed in the middle and gone on; run as a script, this file is one of the runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mae_align.train.checkpoint import Checkpoints
from mae_align.train.ensemble import Training
from mae_align.train.loop import Preempted, fit
from tests.train.train_cases import examples, leaves, training
from tests.two_processes import ROOT

STEPS, EVERY, STOP = 24, 4, 12
MEMBERS: dict[str, Any] = {"learning_rates": [1.0, 0.7], "guidance": [0.2, 0.0]}


def run(which: Training, folder: Path, evaluate: Any = None) -> Any:
    """The state after all steps; evaluated and saved every few."""
    with Checkpoints.open(folder, identity="networks", every=EVERY) as checkpoints:
        return fit(
            which,
            which.init([1, 2], **MEMBERS),
            which.put(*examples()),
            num_steps=STEPS,
            steps_per_call=EVERY,
            checkpoints=checkpoints,
            evaluate=evaluate,
            evaluate_every=EVERY,
        )


@pytest.mark.slow
@pytest.mark.parametrize("vit", [False, True], ids=["mlp", "vit"])
def test_stopped_on_eight_devices_it_goes_on_on_two(vit, tmp_path):
    """SIGTERM in the middle; the steps after it are made by another mesh."""

    def terminated(state: Any, step: int) -> dict[str, float]:
        if step == STOP:
            signal.raise_signal(signal.SIGTERM)
        return {}

    eight, two = training(2, devices=8, ensemble=2, vit=vit), training(2, devices=2, vit=vit)
    with pytest.raises(Preempted, match=f"step {STOP} is saved"):
        run(eight, tmp_path / "stopped", terminated)
    seen: list[int] = []
    state = run(two, tmp_path / "stopped", lambda state, step: seen.append(step) or {})
    assert seen == list(range(STOP + EVERY, STEPS + 1, EVERY))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)} == {2}
    whole = run(eight, tmp_path / "whole")
    for found, expected in zip(leaves(state), leaves(whole), strict=True):
        # Adam moves parameters without a gradient, such as the bias of keys, by its rounding.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
    # The same batches, masks and parameters: what follows is the same too.
    more = [which.advance(s, which.put(*examples()), 5)[1]["loss"] for which, s in ((two, state), (eight, whole))]
    np.testing.assert_allclose(more[0], more[1], rtol=1e-5)


def work(folder: Path, stand: bool) -> None:
    """A run that stands still in the middle until it is killed; or one that goes on to the end, and a whole one."""

    def still(state: Any, step: int) -> dict[str, float]:
        if step > STOP:
            (folder / "standing").touch()
            time.sleep(600)
        return {}

    which = training(2, devices=2, vit=True)
    if stand:
        run(which, folder / "killed", still)
        return
    steps: list[int] = []
    ends = {
        "killed": run(which, folder / "killed", lambda state, step: steps.append(step) or {}),
        "whole": run(which, folder / "whole"),
    }
    assert steps[0] > EVERY, "it did not go on from a checkpoint"
    for name, state in ends.items():
        np.savez(folder / f"{name}.npz", *leaves(state))


@pytest.mark.slow
def test_killed_in_the_middle_a_masked_autoencoder_ends_with_the_same_bits(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen([sys.executable, __file__, str(tmp_path), "stand"], env=environment) as process:
        try:
            end = time.monotonic() + 120
            while not (tmp_path / "standing").exists():
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "end"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "killed.npz") as killed, np.load(tmp_path / "whole.npz") as whole:
        assert len(whole.files) > 20
        for name in whole.files:
            np.testing.assert_array_equal(killed[name], whole[name], strict=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2] == "stand")
