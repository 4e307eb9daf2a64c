"""How processes are started, the meshes they share, what two of them refuse; run as a script this is one of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from experiments.harness.data import load_together
from experiments.harness.folder import RunFolder, shared_points
from experiments.masking_sweep import __main__ as masking_sweep
from mae_align.moments.moments import Moments
from mae_align.moments.streaming import stream_moments
from mae_align.runtime.errors import InputError
from mae_align.runtime.pool import shared_store
from mae_align.runtime.processes import data_mesh, gathered, local_mesh, refused_together, start_distributed
from tests.two_processes import run_processes

HALF_GIVEN = {
    "address alone": ({"coordinator": "a:1"}, {}, "MAE_ALIGN_NUM_PROCESSES and MAE_ALIGN_PROCESS_ID .* is missing"),
    "no address": (
        {},
        {"MAE_ALIGN_NUM_PROCESSES": "2", "MAE_ALIGN_PROCESS_ID": "0"},
        "MAE_ALIGN_COORDINATOR .*missing",
    ),
    "no id": ({"coordinator": "a:1"}, {"MAE_ALIGN_NUM_PROCESSES": "2"}, "MAE_ALIGN_PROCESS_ID .* is missing"),
    "not a number": ({"coordinator": "a:1"}, {"MAE_ALIGN_NUM_PROCESSES": "two"}, "MAE_ALIGN_NUM_PROCESSES='two'"),
    "id over": ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, {}, "process 2 of 2"),
    "negative id": ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, {}, "process -1 of 2"),
    "no processes": ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, {}, "process 0 of 0"),
    "no port": ({"coordinator": "a", "num_processes": 2, "process_id": 0}, {}, "write HOST:PORT"),
    "port of letters": ({"coordinator": "a:b", "num_processes": 2, "process_id": 0}, {}, "write HOST:PORT"),
    "unknown word": ({}, {"MAE_ALIGN_DISTRIBUTED": "yes"}, "MAE_ALIGN_DISTRIBUTED='yes': write auto"),
}


@pytest.mark.parametrize("case", HALF_GIVEN)
def test_settings_given_in_part_are_refused(case, monkeypatch):
    arguments, environ, message = HALF_GIVEN[case]
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(InputError, match=message):
        start_distributed(**arguments, environ=environ)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MAE_ALIGN_COORDINATOR": "", "MAE_ALIGN_DISTRIBUTED": "0"},
        {"MAE_ALIGN_COORDINATOR": "127.0.0.1:1", "MAE_ALIGN_NUM_PROCESSES": "1", "MAE_ALIGN_PROCESS_ID": "0"},
    ],
)
def test_one_process_starts_nothing(environ, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: pytest.fail("started"))
    assert not start_distributed(environ=environ)


@pytest.mark.parametrize("arguments_first", [True, False])
def test_arguments_go_before_the_environment(monkeypatch, arguments_first):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    environ = {"MAE_ALIGN_COORDINATOR": "b:2", "MAE_ALIGN_NUM_PROCESSES": "4", "MAE_ALIGN_PROCESS_ID": "3"}
    arguments = {"coordinator": "a:1", "num_processes": 2, "process_id": 0} if arguments_first else {}
    assert start_distributed(**arguments, timeout=7, environ=environ)
    assert calls == [(("a:1", 2, 0) if arguments_first else ("b:2", 4, 3), {"initialization_timeout": 7})]


def test_finding_others_on_a_lone_machine_starts_nothing():
    """In a fresh process, where JAX has computed nothing."""
    code = (
        "import jax; from mae_align.runtime.processes import start_distributed\n"
        "print(start_distributed(environ={'MAE_ALIGN_DISTRIBUTED': 'auto'}), jax.distributed.is_initialized())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["False", "False"], run.stderr


def test_meshes_have_one_automatic_axis():
    mesh = data_mesh()
    assert mesh.axis_names == ("data",) and mesh.devices.shape == (8,)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
    assert data_mesh(jax.devices()[2:4]).devices.tolist() == jax.devices()[2:4]


def test_host_arrays_cross_processes_as_they_are():
    arrays = [np.array([1 + 2**60]), np.array([0.1, np.pi]), np.zeros((2, 0)), np.array(True)]
    [received] = gathered(arrays, data_mesh())
    for a, b in zip(arrays, received, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_any_axes_of_a_mesh_are_one():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert dict(local_mesh(mesh).shape) == {"data": 8}


# Two processes


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    out: str


def refused(action) -> InputError | None:
    try:
        action()
    except InputError as error:
        return error
    return None


def refusal(action) -> str:
    """The words of a refusal; none if nothing was refused."""
    return str(refused(action) or "")


def work(folder: Path) -> None:
    """Every case but "both" is refused in one process alone, and the last three in none."""
    assert start_distributed()
    me = jax.process_index()

    def refusing(*who: int) -> str:
        def action() -> None:
            with refused_together(2):
                if me in who:
                    raise InputError(f"process {me}: " + "ä" * (1 + 50 * me))

        return refusal(action)

    def wordless() -> None:
        with refused_together(2):
            if me == 0:
                raise InputError

    def unprintable() -> None:
        with refused_together(2):
            if me == 1:
                raise InputError("file \udcff")

    def stream(rows: int) -> str:
        def action() -> None:
            images = [np.zeros((4, 2, 2, 1), np.uint8)] if me or rows else []
            stream_moments(iter(images), mesh=data_mesh())

        return refusal(action)

    run = str(folder / "run")
    # There for the first process alone, as on a machine of its own.
    moments = str(folder / ("moments.npz" if me == 0 else "none.npz"))
    given = masking_sweep.Config(train_moments=moments, out=str(folder / "swept"))
    found = {
        "first": refusing(0),
        "second": refusing(1),
        "both": refusing(0, 1),
        "unprintable": refusal(unprintable),
        "wordless": str(refused(wordless)),
        "folder": refusal(lambda: RunFolder.open("other", "toy", Config(0, run), run)),
        "parts": refusal(lambda: shared_points(folder / "points", "b")),
        "store": refusal(lambda: shared_store(folder / "points", lambda: "b")),
        "stream": stream(0),
        "data": refusal(lambda: load_together("digits" if me == 0 else "npz:none.npz", image_size=None, seed=0)),
        "moments": refusal(lambda: masking_sweep.load(given)),
        "none": refusing(),
        "same folder": refusal(lambda: RunFolder.open("toy", "toy", Config(0, run), run)),
        "whole stream": stream(1),
    }
    (folder / f"{me}.json").write_text(json.dumps(found))


def test_what_one_process_refuses_all_refuse(tmp_path):
    run = str(tmp_path / "run")
    RunFolder.open("toy", "toy", Config(0, run), run)
    shared_points(tmp_path / "points", "a")
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), dtype=np.uint8)
    Moments.from_arrays(images, np.arange(20) % 2).save(tmp_path / "moments.npz")
    run_processes(__file__, tmp_path, devices=1)
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1))
    assert first == second
    assert first["first"] == first["both"] == "process 0: ä"
    assert first["second"] == "process 1: " + "ä" * 51
    assert first["folder"].endswith("is a run of toy: choose another --out")
    assert first["parts"] == first["store"] == refusal(lambda: shared_points(tmp_path / "points", "b")) != ""
    assert "no batches" in first["stream"] and "none.npz" in first["data"]
    assert "none.npz" in first["moments"] and not (tmp_path / "swept").exists()
    assert (first["unprintable"], first["wordless"]) == ("file \\udcff", "")
    assert first["none"] == first["same folder"] == first["whole stream"] == ""


def test_other_errors_of_one_process_are_its_own(monkeypatch):
    monkeypatch.delattr(multihost_utils, "process_allgather")
    with pytest.raises(ZeroDivisionError), refused_together(2):
        raise ZeroDivisionError


def test_within_one_process_nothing_is_sent(monkeypatch):
    monkeypatch.delattr(multihost_utils, "process_allgather")
    with refused_together(1):
        pass
    with pytest.raises(InputError, match=r"^no$"), refused_together(1):
        raise InputError("no")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
