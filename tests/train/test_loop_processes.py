"""Training in two processes with two devices each: SIGTERM to one ends both at one step, and any number goes on.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from mae_align.runtime.processes import start_distributed
from mae_align.train.loop import Preempted
from tests.train.test_loop import lines, numbers, run
from tests.train.toy_training import ToyTraining
from tests.two_processes import run_processes, started

OPTIONS: dict[str, Any] = {"streamed": True, "num_steps": 120, "every": 100, "evaluate_every": 4, "log_every": 8}


def work(folder: Path, seconds: float) -> None:
    """Train; each evaluation takes some seconds, in process 1 a little more; half-way on, SIGTERM is waited for."""
    assert start_distributed()
    me = jax.process_index()

    def evaluate(state: Any, step: int) -> dict[str, float]:
        (folder / f"at-{me}").write_text(str(step))
        time.sleep(seconds * (1 + 0.5 * me))
        if seconds and step >= OPTIONS["num_steps"] // 2:
            while not (folder / "sent").exists():
                time.sleep(0.01)
            time.sleep(0.3)  # for the notice to come through
        return {}

    try:
        state = run(folder, training=ToyTraining(), evaluate=evaluate, **OPTIONS)
    except Preempted as stopped:
        (folder / f"stopped-{me}.json").write_text(json.dumps([stopped.step, str(stopped)]))
        sys.exit(stopped.status)
    np.savez(folder / f"end-{me}.npz", *numbers(state))


def end(folder: Path, name: str = "end-0") -> list[np.ndarray]:
    with np.load(folder / f"{name}.npz") as file:
        return [file[key] for key in file.files]


def curve(folder: Path) -> np.ndarray:
    return np.array([line["loss"] for line in lines(folder) if "loss" in line])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The folder that a run leaves of which process 1 got SIGTERM."""
    folder = tmp_path_factory.mktemp("stopped")
    with started(__file__, folder, 0.05) as running:
        while not (folder / "at-1").exists() or int((folder / "at-1").read_text() or 0) < 12:
            assert running[1].poll() is None, running[1].communicate()[0]
            time.sleep(0.01)
        running[1].send_signal(signal.SIGTERM)
        (folder / "sent").touch()
        printed = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [143, 143], printed
    return folder


def test_sigterm_to_one_process_ends_both_at_one_saved_step(stopped):
    (step, text), other = (json.loads((stopped / f"stopped-{i}.json").read_text()) for i in (0, 1))
    assert other == [step, text] and text.startswith(f"stopped by SIGTERM: step {step} is saved in ")
    assert 12 < step < OPTIONS["num_steps"] and step % 4 == 0
    assert step % OPTIONS["every"], "not just a regular checkpoint"
    assert [p.name for p in (stopped / "checkpoints").iterdir() if p.name.isdecimal()] == [str(step)]
    assert not list(stopped.glob("end-*"))


def test_two_processes_and_one_go_on_to_the_same_end(stopped, tmp_path):
    for name in ("two", "one"):
        shutil.copytree(stopped, tmp_path / name)
    run_processes(__file__, tmp_path / "two", 0.0)
    # One process that has never been stopped, one that goes on where the two were; four devices each.
    four = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    one = run(tmp_path / "one", training=ToyTraining(mesh=four), **OPTIONS)
    never = run(tmp_path / "never", training=ToyTraining(mesh=four), **OPTIONS)
    for ours in (end(tmp_path / "two"), end(tmp_path / "two", "end-1"), numbers(one)):
        for a, b in zip(ours, numbers(never), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # The loss curves of all three are one, the first 50 steps and more of which no process was alone with.
    curves = [
        np.array([line["loss"] for line in lines(tmp_path / name) if "loss" in line])
        for name in ("never", "one", "two")
    ]
    assert curves[0].shape == (OPTIONS["num_steps"] // 8, 2)
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-5)


if __name__ == "__main__":
    work(Path(sys.argv[1]), float(sys.argv[2]))
