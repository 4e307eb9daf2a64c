"""SIGKILL at random moments, ten times: nothing that was saved is lost, and the moments are the same in the end.

Run as a script, this file starts a stream in a child process again and again, kills it at random moments, and prints
what it found. A child that is to be killed stands still after a share of the batches, so that it cannot end before it
is killed, however late that is.
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
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import mae_align as ma
from mae_align.runtime.files import read_arrays

KILLS, BATCHES, SIZE = 10, 1500, 3
FILE = "moments-0-of-1.npz"


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    n = BATCHES * SIZE
    return rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8), rng.integers(0, 3, n)


def saved_batches(file: Path) -> int:
    return read_arrays(file, "unfinished moments", 1).fields["batches"] if file.exists() else 0


def batches(started: int, done: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All batches; told to ``started`` when one more than ``done`` is saved; no more than ``last`` new ones."""
    images, labels = data()
    for i in range(BATCHES):
        part = slice(SIZE * i, SIZE * (i + 1))
        yield images[part], labels[part]
        if i == done:
            os.write(started, b"1")  # from here on it may be killed
        if i == done + last:
            time.sleep(600)


def child(folder: Path, started: int, last: int) -> None:
    partial = folder / "partial"
    stream = batches(started, saved_batches(partial / FILE), last)
    moments = ma.stream_moments(stream, checkpoint=partial, checkpoint_every=0.0, num_classes=3, groups=2)
    moments.save(folder / "m.npz")


def drive(folder: Path) -> None:
    """Fork, so that each attempt costs no import; JAX has not started in this process and does not start in it."""
    # JAX warns of forks for the sake of its threads; here it has none.
    warnings.simplefilter("ignore", RuntimeWarning)
    chance, saved, seen = random.Random(os.getpid()), [], folder / "partial" / FILE
    kills = 0
    while not (folder / "m.npz").exists():
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                child(folder, writer, (BATCHES - 1) // KILLS - 1 if kills < KILLS else BATCHES)
            finally:
                os._exit(0)
        os.close(writer)
        assert os.read(reader, 1) == b"1", "the child ended before it had saved a batch"
        os.close(reader)
        if kills < KILLS:
            time.sleep(chance.uniform(0.0, 0.25))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        kills += os.WIFSIGNALED(status)
        saved.append(saved_batches(seen))
    print(json.dumps({"kills": kills, "saved": saved}))


def test_ten_kills_at_random_moments_lose_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(ma.__file__).parents[1]), "JAX_NUM_CPU_DEVICES": "1"}
    run = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    saved = report["saved"]
    assert report["kills"] == KILLS and len(saved) == KILLS + 1
    # What was on disk stays: every attempt went on from there.
    assert saved == sorted(set(saved)) and saved[0] > 0 and saved[-1] == BATCHES
    images, labels = data()
    ours, expected = ma.Moments.load(tmp_path / "m.npz"), ma.Moments.from_arrays(images, labels, groups=2)
    for a, b in zip(ours.state, expected.state, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [path.name for path in (tmp_path / "partial").iterdir()] == [FILE]


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
