"""Sweeps over a mesh of devices, in one process and in two."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray as xr

import mae_align as ma
from mae_align.runtime.devices import compile_counter
from mae_align.runtime.errors import InputError
from mae_align.runtime.pool import grid_mesh
from tests import oracles, two_processes

RATIOS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def moments(sample: oracles.Sample, groups: int = 1) -> ma.Moments:
    return ma.Moments.from_arrays(sample.images, sample.labels, num_classes=oracles.CLASSES, groups=groups)


def assert_same(found: xr.Dataset, expected: xr.Dataset) -> None:
    assert set(found.variables) == set(expected.variables)
    for name, value in expected.variables.items():
        if value.dtype.kind == "f":
            # The groups' parts of the errors are float32 sums.
            loose = "influence" in str(name) or str(name).endswith("_se")
            np.testing.assert_allclose(
                found[name], value, rtol=1e-4 if loose else 1e-12, atol=1e-7 if loose else 1e-12, err_msg=str(name)
            )
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=str(name))


@pytest.fixture(scope="module")
def fit() -> ma.Moments:
    return moments(oracles.train())


@pytest.fixture(scope="module")
def held() -> ma.Moments:
    return moments(oracles.held_out(), groups=3)


@pytest.mark.parametrize("per_device", [None, 2])
def test_a_sweep_over_eight_devices_is_the_sweep_on_one(fit, held, per_device):
    run = ma.RunOptions(mesh=grid_mesh(), batch_size=per_device)
    spread = ma.masking_sweep(fit, [1, (2, 3)], RATIOS, eval_moments=held, run=run)
    assert_same(spread, ma.masking_sweep(fit, [1, (2, 3)], RATIOS, eval_moments=held))


def test_the_joint_grid_over_a_mesh_is_the_joint_grid(fit):
    grid = {"patch_sizes": [2], "mask_ratios": [0.0, 0.5], "noise_levels": [0.0, 0.8], "lambdas": [0.0, 0.1, math.inf]}
    spread = ma.sweep(fit, **grid, run=ma.RunOptions(mesh=grid_mesh(jax.devices()[:3])))
    assert_same(spread, ma.sweep(fit, **grid))


def test_a_second_sweep_over_a_mesh_compiles_nothing(fit, held):
    run = ma.RunOptions(mesh=grid_mesh())
    ma.masking_sweep(fit, [2], [0.3, 0.6], eval_moments=held, run=run)
    with compile_counter() as compiled:
        ma.masking_sweep(fit, [2], [0.1, 0.7, 0.9], eval_moments=held, run=run)
    assert compiled.names == []


def test_samples_are_swept_over_a_mesh_too():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    train, test = (ma.Samples.from_arrays(images[i::2], np.arange(20) % 3, groups=4) for i in (0, 1))
    spread = ma.masking_sweep(train, [2], RATIOS, eval_moments=test, run=ma.RunOptions(mesh=grid_mesh()))
    assert_same(spread, ma.masking_sweep(train, [2], RATIOS, eval_moments=test))


def test_a_mesh_that_lacks_the_precision_is_refused_before_any_work(fit, monkeypatch):
    monkeypatch.setattr("mae_align.runtime.devices._BACKENDS_WITHOUT_FLOAT64", ("cpu",))
    monkeypatch.setattr("mae_align.closed_form.sweep.factorize", None)
    with pytest.raises(InputError, match="a mesh of cpu devices has no float64"):
        ma.masking_sweep(fit, [2], [0.5], run=ma.RunOptions(mesh=grid_mesh()))


def test_two_processes_sweep_as_one_and_the_first_writes_one_result(tmp_path):
    two_processes.run_processes(__file__, tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    with np.load(tmp_path / "process0.npz") as first, np.load(tmp_path / "process1.npz") as second:
        assert first.files == second.files
        for name in first.files:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        assert first["devices"] == 4 and first["points"] > 0
    # Started again, the stored points serve both processes; nothing is solved.
    two_processes.run_processes(__file__, tmp_path)
    with np.load(tmp_path / "process1.npz") as again:
        assert again["points"] == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["experiment"] == "masking_sweep"
    assert (folder / "summary.txt").stat().st_size > 0
    together = xr.load_dataset(folder / "curves.nc", engine="scipy")
    alone = experiment(tmp_path / "alone")
    expected = xr.load_dataset(alone / "curves.nc", engine="scipy")
    assert_same(together, expected)


def experiment(out: Path) -> Path:
    from experiments.harness.run import execute
    from experiments.masking_sweep.__main__ import COLUMNS, Config, load, main

    config = Config(patch_sizes=(2,), mask_ratios=(0.5, 0.75, 1.0), ks=(4,), max_k=8, groups=4, out=str(out))
    execute("masking_sweep", main, config, load, COLUMNS)
    return out


if __name__ == "__main__":
    from mae_align.closed_form import sweep as solver
    from mae_align.runtime.processes import start_distributed

    start_distributed()
    solved = []
    over_mesh = solver.solve_over_mesh

    def counted(function, mesh, shared, points, max_k):
        solved.append(len(points.w))
        return over_mesh(function, mesh, shared, points, max_k)

    solver.solve_over_mesh = counted
    where = Path(sys.argv[1])
    experiment(where / "runs" / "together")
    points = sum(solved)
    curves = ma.masking_sweep(moments(oracles.train()), [2], RATIOS)
    np.savez(
        where / f"process{jax.process_index()}.npz",
        r2=curves.r2.values,
        alignment=curves.alignment.values,
        devices=jax.device_count(),
        points=points,
    )
