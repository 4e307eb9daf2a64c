"""A sweep that is killed ten times at random moments loses nothing and ends with the same result.

Run as a script with a folder and a seed, this file starts the sweep in a child, kills it after a random time, and so on
ten times; then one child runs to the end. Only the children start JAX's backend, so that forking them is safe and none
pays for the imports again. A child that is to be killed stands still after a share of the points, so that it cannot end
before it is killed, however late that is.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import mae_align as ma
from mae_align.runtime.files import PointStore

KILLS = 10
RATIOS, PATCHES = 16, 5
POINTS = PATCHES * RATIOS + PATCHES


def sweep(store: Path) -> xr.Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 12, 12, 1)).astype(np.uint8)
    train, held = (ma.Moments.from_arrays(images[i::2], np.arange(150) % 5, groups=3) for i in (0, 1))
    run = ma.RunOptions(store=store, workers=2)
    ratios = [float(p) for p in np.linspace(0.1, 0.9, RATIOS)]
    return ma.masking_sweep(train, [1, 2, 3, 4, 6], ratios, eval_moments=held, run=run)


def stand_still_after(count: int) -> None:
    """Let this process save so many points, and wait at each further one for the kill."""
    save, numbers = PointStore.save, itertools.count()

    def limited(self: PointStore, key: str, arrays: Any) -> None:
        if next(numbers) >= count:
            time.sleep(600)
        save(self, key, arrays)

    PointStore.save = limited


def finished(store: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in store.glob("*.npz")}


def kill_at_random(store: Path, seed: int) -> None:
    """Print after each kill how many points are there; exit with an error if one of them was lost or written anew."""
    chance = random.Random(seed)
    for _ in range(KILLS):
        before = finished(store)
        child = os.fork()
        if child == 0:
            stand_still_after((POINTS - 1) // KILLS)
            sweep(store)
            os._exit(0)
        # Counted from the first new point, so that no kill falls into the start alone.
        limit = time.monotonic() + 60
        while len(finished(store)) <= len(before) and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), "the sweep ended before it was killed"
        after = finished(store)
        assert before.items() <= after.items(), "a finished point was lost or computed again"
        print(len(after), flush=True)


def test_ten_kills_at_random_moments_lose_nothing(tmp_path):
    store = tmp_path / "points"
    store.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(ma.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    seed = random.SystemRandom().randrange(1000)
    command = [sys.executable, __file__, str(store), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    counts = [int(line) for line in done.stdout.split()]
    assert len(counts) == KILLS and counts == sorted(counts)
    assert counts[0] > 0 and counts[-1] < POINTS and len(set(counts)) == KILLS, f"seed {seed}: {counts}"
    kept = finished(store)
    resumed = sweep(store)
    assert kept.items() <= finished(store).items() and len(finished(store)) == POINTS
    whole = sweep(tmp_path / "others")
    assert set(resumed.variables) == set(whole.variables)
    for name, expected in whole.variables.items():
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(resumed[name], expected, rtol=1e-9, atol=1e-11, err_msg=str(name))
        else:
            np.testing.assert_array_equal(resumed[name], expected, err_msg=str(name))


if __name__ == "__main__":
    kill_at_random(Path(sys.argv[1]), int(sys.argv[2]))
