"""What lies around a run: the backend of a notebook, devices that are not there, names and paths of any kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import minimal
from mae_align.train.checkpoint import Checkpoints
from tests.experiments.cases import run_experiment

ROOT = Path(__file__).parents[2]


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the experiments in another environment."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_backend_of_a_notebook_ends_no_command():
    found = command("experiments.minimal", "--help", MPLBACKEND="module://matplotlib_inline.backend_nowhere")
    assert found.returncode == 0 and "usage: python -m experiments.minimal" in found.stdout


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(platform, tmp_path):
    found = command("experiments.minimal", "--out", tmp_path / "run", JAX_PLATFORMS=platform)
    (line,) = [line for line in found.stderr.splitlines() if not line.startswith(("WARNING", "INFO"))]
    assert found.returncode == 2 and line.startswith(f"error: JAX_PLATFORMS={platform}: JAX has no such device")
    assert line.endswith("unset it, or write cpu") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run[1]", "project [2024]/run", "a*b", "what?", "{x}"])
def test_checkpoints_are_read_from_a_folder_of_any_name(tmp_path, name):
    with Checkpoints.open(tmp_path / name, identity="a", every=10) as checkpoints:
        checkpoints.save(10, {"x": jnp.arange(3.0)}, {"at": 1}, {})
    with Checkpoints.open(tmp_path / name, identity="a", every=10) as checkpoints:
        found = checkpoints.restore({"x": jnp.zeros(3)})
    assert found.position == {"at": 1} and found.state["x"].tolist() == [0.0, 1.0, 2.0]
    assert {path.name for path in (tmp_path / name).iterdir()} == {"10", "identity.json"}


def test_names_that_are_not_utf8_lose_nothing(tmp_path, capsys):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    rng = np.random.default_rng(0)
    for name in (b"\xe9clair", b"tarte"):
        folder = root / os.fsdecode(name)
        folder.mkdir(parents=True)
        for i in range(150):
            Image.fromarray(rng.integers(0, 256, (4, 4)).astype(np.uint8)).save(folder / f"{i}.png")
    run_experiment(
        minimal, "--data", f"folder:{root}", "--ks", 2, "--out", tmp_path / "run", "--validation-fraction", 0.1
    )
    text = (tmp_path / "run" / "summary.txt").read_text(encoding="utf-8")
    assert text.startswith("caf\ufffd: ") and capsys.readouterr().out == text
