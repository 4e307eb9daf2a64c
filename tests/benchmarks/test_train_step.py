"""The benchmark runs, counts what it says it counts, and says in one line what is missing."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import train_step
from benchmarks.flops import count_flops
from benchmarks.train_step import Config, JaxRun, Network
from mae_align.models import Pixels
from mae_align.runtime.devices import compile_counter
from mae_align.runtime.errors import InputError
from mae_align.train.step import Program

IMAGES = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
PIXELS = Pixels.from_images(IMAGES)
TINY = Config(repeats=2, images=32, members=2, matmul_sizes=(64,), tiny=True)


@pytest.mark.slow
def test_networks(capsys: pytest.CaptureFixture[str]) -> None:
    """Shares follow from what is printed beside them."""
    rows = train_step.measure_networks(Config(**{**vars(TINY), "networks": (Network.MLP,)}), IMAGES)
    assert [(row.network.name, row.dtype) for row in rows] == [("MLP", "float32"), ("MLP", "bf16")]
    for row in rows:
        case = train_step.cases(tiny=True)[row.network]
        assert row.images_per_second == pytest.approx(case.batch / row.seconds)
        assert 0.0 < row.share < 1.5
        assert row.compile_seconds > 0.0
    # 2 m n a layer and image, three times, without the gradient by the images; biases are products with ones.
    widths = (3072, 16, 4, 16, 3072)
    layers = [a * b for a, b in itertools.pairwise(widths)]
    expected = 2 * 16 * (3 * sum(layers) - layers[0]) + 2 * 16 * sum(widths[1:])
    assert rows[0].flops == rows[1].flops == expected
    printed = capsys.readouterr().out
    assert "matmul, bf16" in printed
    assert f"{100 * rows[1].share:5.1f}% of matmul" in printed


@pytest.mark.slow
def test_ensembles(capsys: pytest.CaptureFixture[str]) -> None:
    found = train_step.measure_ensembles(Config(**{**vars(TINY), "networks": (Network.MLP,)}), IMAGES)
    assert set(found) == {(Network.MLP, members, program) for members in (1, 2) for program in Program}
    assert all(seconds > 0.0 for seconds in found.values())
    assert "2 in one call, VMAPPED_SCAN" in capsys.readouterr().out


def test_steps_train() -> None:
    """What is timed is training: parameters move, and the next call compiles nothing."""
    run = JaxRun(train_step.cases(tiny=True)[Network.MLP], IMAGES, jnp.float32)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(run.state.params)]
    with compile_counter() as compiled:
        params, _ = run()
    assert compiled.count == 0
    pairs = zip(before, jax.tree.leaves(params), strict=True)
    assert all(np.any(a != np.asarray(b)) for a, b in pairs)


@pytest.mark.parametrize("network", list(Network))
def test_operations_of_the_cases(network: Network) -> None:
    """The gradient costs two forward passes more, less where only images would get it; biases add a little."""
    case = train_step.cases(tiny=True)[network]
    counted = train_step.step_flops(case, PIXELS)
    assert counted == train_step.step_flops(dataclasses.replace(case, batch=2 * case.batch), PIXELS) / 2
    model = nnx.eval_shape(lambda: case.make(PIXELS, jnp.float32)(nnx.Rngs(0)))
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((case.batch, 32, 32, 3), jnp.float32)
    forward = count_flops(lambda s, x: nnx.merge(graph, s).loss(x, jax.random.key(0))[0], state, images)
    assert 2.0 * forward < counted < 3.05 * forward


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "benchmarks.torch_models", raising=False)
    monkeypatch.delattr("benchmarks.torch_models", raising=False)
    with pytest.raises(InputError, match="PyTorch is not installed"):
        train_step.main(Config(torch=True))


def test_the_command_says_so_in_one_line(tmp_path) -> None:
    """A module named torch that is not there for import."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", "--torch"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --torch: PyTorch is not installed here; pip install torch, or leave --torch out"
    ]


def test_beside_torch(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    found = train_step.measure_torch(TINY, IMAGES)
    assert set(found) == {(network, dtype) for network in (Network.MLP, Network.VIT) for dtype in ("float32", "bf16")}
    assert all(ratio > 0.0 for ratio in found.values())
    assert "times as fast" in capsys.readouterr().out
