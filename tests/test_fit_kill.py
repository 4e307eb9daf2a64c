"""SIGKILL at random moments: a stream in training goes on each time, and ends with the same numbers bit for bit.

Run as a script, this file trains in child processes, kills them, and trains once undisturbed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import mae_align

KILLS, STEPS = 5, 1200


def child(folder: Path, started: int) -> None:
    # Here, so that forked children begin without JAX's threads.
    import jax

    from tests.test_fit import numbers, run
    from tests.toy_training import ToyTraining

    def tell(state: Any, step: int) -> dict[str, float]:
        os.write(started, b"1")  # from here on it may be killed
        return {"number": float(np.asarray(state.params["w"])[0, 0])}

    assert jax.device_count() == 2
    state = run(
        folder, training=ToyTraining(), streamed=True, num_steps=STEPS, every=6, evaluate=tell, evaluate_every=4
    )
    np.savez(folder / "unfinished.npz", *numbers(state))
    os.replace(folder / "unfinished.npz", folder / "end.npz")


def attempt(folder: Path, kill_after: float | None) -> bool:
    """Train in a child process; whether it was killed."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            child(folder, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    assert os.read(reader, 1) == b"1", "the child ended before its first step"
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    os.close(reader)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])
