"""SIGKILL at random moments: a stream in training goes on each time, and ends with the same numbers bit for bit.

Run as a script, this file trains in child processes, kills them, and trains once undisturbed. A child that is to be
killed stands still after some evaluations, so that it cannot end before it is killed, however late that is.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tests.train.test_loop import lines, numbers, run
from tests.train.toy_training import ToyTraining
from tests.two_processes import ROOT

KILLS, STEPS, EVERY = 3, 280, 8
# Evaluations of a child that is to be killed: all such children together leave some steps to the last one.
MOST = (STEPS // EVERY - 1) // KILLS


def child(folder: Path, started: int, most: int) -> None:
    evaluations = itertools.count(1)

    def tell(state: Any, step: int) -> dict[str, float]:
        os.write(started, b"1")  # from here on it may be killed
        if next(evaluations) > most:
            time.sleep(600)
        return {"weight": float(np.asarray(state.params["w"])[0, 0])}

    options: dict[str, Any] = {
        "num_steps": STEPS,
        "every": EVERY,
        "steps_per_call": EVERY,
        "log_every": EVERY,
        "evaluate_every": EVERY,
    }
    state = run(folder, training=ToyTraining(), streamed=True, evaluate=tell, **options)
    np.savez(folder / "unfinished.npz", *numbers(state))
    os.replace(folder / "unfinished.npz", folder / "end.npz")


def attempt(folder: Path, chance: random.Random | None) -> bool:
    """Train in a forked process, so that no attempt costs an import; whether it was killed.

    At the third evaluation the save at the first is finished: each attempt gets on.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            child(folder, writer, STEPS if chance is None else MOST)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    assert os.read(reader, 1) == b"1", "the child ended before its first evaluation"
    if chance is not None:
        for _ in range(chance.randint(2, 5)):
            assert os.read(reader, 1) == b"1", "the child ended too early"
        time.sleep(chance.uniform(0.0, 0.06))
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    os.close(reader)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def newest(folder: Path) -> int:
    return max((int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()), default=0)


def drive(folder: Path) -> None:
    """JAX has not started in this process and does not start in it, so it has no threads that a fork would lose."""
    warnings.simplefilter("ignore", RuntimeWarning)
    chance, kills, found, leftovers = random.Random(os.getpid()), 0, [], 0
    while not (folder / "killed" / "end.npz").exists():
        kills += attempt(folder / "killed", chance if kills < KILLS else None)
        found.append(newest(folder / "killed"))
        leftovers += any("tmp" in p.name for p in (folder / "killed" / "checkpoints").iterdir())
    attempt(folder / "whole", None)
    print(json.dumps({"kills": kills, "found": found, "leftovers": leftovers}))


def test_killed_at_random_moments_the_end_is_the_same_bit_for_bit(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == KILLS and report["found"] == sorted(report["found"]) and report["found"][-1] == STEPS
    # They were killed in the middle, and went on from there.
    assert report["found"][KILLS - 1] < STEPS and len(set(report["found"])) == KILLS + 1
    with np.load(tmp_path / "killed" / "end.npz") as killed, np.load(tmp_path / "whole" / "end.npz") as whole:
        assert len(whole.files) > 5
        for name in whole.files:
            np.testing.assert_array_equal(killed[name], whole[name], strict=True)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    # What half-written checkpoints the kills left is gone.
    names = {p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert names == {p.name for p in (tmp_path / "whole" / "checkpoints").iterdir()}


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
