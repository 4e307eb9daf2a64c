"""Refusals of two processes; run as a script, this file is one of the processes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from experiments.harness.data import load_together
from experiments.harness.folder import Parts, RunFolder
from experiments.masking_sweep import __main__ as masking_sweep
from mae_align.moments.moments import Moments
from mae_align.moments.streaming import stream_moments
from mae_align.runtime.errors import InputError
from mae_align.runtime.pool import shared_store
from mae_align.runtime.processes import data_mesh, refused_together, start_distributed
from tests.two_processes import run_processes


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
        "parts": refusal(lambda: Parts(folder / "points", "b")),
        "store": refusal(lambda: shared_store(folder / "points", lambda: "b")),
        "stream": stream(0),
        "data": refusal(lambda: load_together("digits" if me == 0 else "npz:none.npz", image_size=None, seed=0)),
        "moments": refusal(lambda: masking_sweep.main(given)),
        "none": refusing(),
        "same folder": refusal(lambda: RunFolder.open("toy", "toy", Config(0, run), run)),
        "whole stream": stream(1),
    }
    (folder / f"{me}.json").write_text(json.dumps(found))


def test_what_one_process_refuses_all_refuse(tmp_path):
    run = str(tmp_path / "run")
    RunFolder.open("toy", "toy", Config(0, run), run)
    Parts(tmp_path / "points", "a")
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), dtype=np.uint8)
    Moments.from_arrays(images, np.arange(20) % 2).save(tmp_path / "moments.npz")
    run_processes(__file__, tmp_path, devices=1)
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1))
    assert first == second
    assert first["first"] == first["both"] == "process 0: ä"
    assert first["second"] == "process 1: " + "ä" * 51
    assert "belongs to another configuration" in first["folder"]
    assert first["parts"] == first["store"] == refusal(lambda: Parts(tmp_path / "points", "b")) != ""
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
