"""A sweep that is killed while it writes a point goes on where it stopped, to the same result.

Run as a script with a folder, this file starts that sweep and stalls in the middle of a file until it is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import xarray as xr

import mae_align as ma
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import PointStore


def sweep(store: Path) -> xr.Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 6, 7, 1)).astype(np.uint8)
    images[:, 2:5] //= 3
    train, held = (ma.Moments.from_arrays(images[i::2], np.arange(200) % 5, groups=4) for i in (0, 1))
    run = ma.RunOptions(store=store, workers=2)
    return ma.masking_sweep(train, [1, 2, (2, 3)], [0.0, 0.4, 0.8, 1.0], eval_moments=held, run=run)


def stall_in_the_sixth_point() -> None:
    savez, count = np.savez, 0

    def stall(file: IO[bytes], **arrays: np.ndarray) -> None:
        nonlocal count
        count += 1
        if count < 6:
            return savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        file.write(b"PK\x03\x04 the first bytes of a point")
        file.flush()
        print("writing", flush=True)
        time.sleep(60)

    np.savez = stall


def test_a_sweep_killed_in_the_middle_of_a_write_goes_on_to_the_same_result(tmp_path, monkeypatch):
    store = tmp_path / "points"
    environment = os.environ | {"PYTHONPATH": str(Path(ma.__file__).parents[1])}
    command = [sys.executable, __file__, str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "writing\n"
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in store.glob("*.npz")}
    assert len(kept) == 5

    saved: list[str] = []
    save = PointStore.save

    def count(self: PointStore, key: str, arrays: dict[str, np.ndarray]) -> None:
        saved.append(key)
        save(self, key, arrays)

    monkeypatch.setattr(PointStore, "save", count)
    resumed = sweep(store)
    computed, stored = set(saved), {path.stem for path in kept}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    saved.clear()
    assert sweep(store).identical(resumed)
    assert not saved

    never_killed = sweep(tmp_path / "others")
    assert stored | computed == set(saved) and not stored & computed
    assert set(resumed.variables) == set(never_killed.variables) and resumed.attrs == never_killed.attrs
    for name, expected in never_killed.variables.items():
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(resumed[name], expected, rtol=1e-9, atol=1e-11, err_msg=str(name))
        else:
            np.testing.assert_array_equal(resumed[name], expected, err_msg=str(name))


def test_the_points_of_a_sweep_are_not_taken_for_those_of_another(tmp_path):
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (100, 3, 3, 1)).astype(np.uint8), np.arange(100) % 3
    moments, held = ma.Moments.from_arrays(images, labels), ma.Moments.from_arrays(images[:60], labels[:60])
    run = ma.RunOptions(store=tmp_path)
    first = ma.masking_sweep(moments, [1], [0.0, 0.5], eval_moments=held, run=run)
    # More of the same grid is the same computation.
    more = ma.masking_sweep(moments, [1, 2], [0.5, 0.7], eval_moments=held, run=run)
    assert (more.eval_r2.sel(patch_size=1, mask_ratio=0.5) == first.eval_r2.sel(patch_size=1, mask_ratio=0.5)).all()
    relabelled = ma.Moments.from_arrays(images, labels[::-1])
    images[0, 0, 0, 0] ^= 1
    changed = ma.Moments.from_arrays(images, labels)
    turned = ma.Moments.from_arrays(images[:60], labels[::-1][:60])
    for other in (
        lambda: ma.masking_sweep(changed, [1], [0.5], eval_moments=held, run=run),
        lambda: ma.masking_sweep(relabelled, [1], [0.5], eval_moments=held, run=run),
        lambda: ma.masking_sweep(moments, [1], [0.5], eval_moments=turned, run=run),
        lambda: ma.masking_sweep(moments, [1], [0.5], run=run),
        lambda: ma.masking_sweep(moments, [1], [0.5], eval_moments=held, max_k=4, run=run),
        lambda: ma.masking_sweep(moments, [1], [0.5], eval_moments=held, pixel_noise=0.0, run=run),
        lambda: ma.masking_sweep(moments, [1], [0.5], eval_moments=held, dtype="float32", run=run),
    ):
        with pytest.raises(InputError, match="points of another computation"):
            other()


if __name__ == "__main__":
    stall_in_the_sixth_point()
    sweep(Path(sys.argv[1]))
