"""Moments of two processes with two devices each; run as a script, this file is one of the processes."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from mae_align.moments.moments import Moments
from mae_align.moments.streaming import stream_moments
from mae_align.runtime.processes import data_mesh, start_distributed
from tests.moments.test_streaming import SHAPE, Q, assert_same_state, bytes_and_labels, two_pass
from tests.two_processes import run_processes, started

N = 2600


def float_images() -> np.ndarray:
    rng = np.random.default_rng(3)
    x = np.sort(rng.normal(size=(N, 12)), axis=0) @ rng.normal(size=(12, 12))
    return (x + 1000 * x.std(0)).astype(np.float32).reshape(-1, *SHAPE)


def work(folder: Path) -> None:
    """Interleaved and contiguous shards of unequal sizes, bytes and floats, classes, numbers and nothing."""
    assert start_distributed()
    me, mesh = jax.process_index(), data_mesh()
    assert (jax.process_count(), mesh.devices.size) == (2, 4)
    images, labels = bytes_and_labels(N)

    def shard(part: slice, size: int, x: np.ndarray, y: np.ndarray | None, **options) -> Moments:
        x, y = x[part], None if y is None else y[part]
        parts = [slice(i, i + size) for i in range(0, len(x), size)]
        return stream_moments(((x[i], None if y is None else y[i]) for i in parts), mesh=mesh, **options)

    turn = slice(me, None, 2)
    results = {
        "interleaved": shard(turn, 33, images, labels, num_classes=Q, groups=3, first_index=me, index_step=2),
        # Process 0 runs one step, process 1 many.
        "contiguous": shard(
            [slice(0, 5), slice(5, None)][me], 900, images, labels, num_classes=Q, groups=3, first_index=5 * me
        ),
        "bare": shard(turn, 100, images, None),
        "floats": shard(turn, 250, float_images(), labels, num_classes=Q, groups=2, first_index=me, index_step=2),
        # Sorted numbers: the first batches of the two processes are far apart.
        "numbers": shard([slice(0, 900), slice(900, None)][me], 250, float_images(), float_images()[:, 0, 0, 0]),
        # A mesh of this process alone adds up nothing else.
        "alone": stream_moments([(images[turn], labels[turn])], num_classes=Q, mesh=data_mesh(jax.local_devices())),
    }
    for name, moments in results.items():
        moments.save(folder / f"{name}-{me}.npz")


def test_two_processes_have_the_moments_of_one(tmp_path):
    run_processes(__file__, tmp_path)
    ours = {path.stem: Moments.load(path) for path in tmp_path.glob("*.npz")}
    images, labels = bytes_and_labels(N)
    whole = Moments.from_arrays(images, labels, groups=3)
    for me in (0, 1):
        assert_same_state(ours[f"interleaved-{me}"], whole)
        assert_same_state(ours[f"contiguous-{me}"], whole)
        assert_same_state(ours[f"bare-{me}"], Moments.from_arrays(images))
        assert_same_state(ours[f"alone-{me}"], Moments.from_arrays(images[me::2], labels[me::2], num_classes=Q))
        for name, y in (("floats", np.eye(Q)[labels]), ("numbers", float_images()[:, 0, 0, 0])):
            (sxx, sxy), (syy, _) = two_pass(float_images(), y), two_pass(y, y)
            scale = np.sqrt(np.linalg.norm(sxx) * np.linalg.norm(syy))
            m = ours[f"{name}-{me}"]
            assert_same_state(m, ours[f"{name}-0"])
            assert np.linalg.norm(m.sxx - sxx) <= 1e-6 * np.linalg.norm(sxx)
            assert np.linalg.norm(m.sxy - sxy) <= 1e-6 * scale


def write_digits(path: Path) -> str:
    images, labels = bytes_and_labels(N)
    np.savez(path, x_train=images, y_train=labels, x_test=images[:50], y_test=labels[:50])
    return f"npz:{path}"


def test_the_experiment_goes_on_after_one_of_its_processes_is_killed(tmp_path):
    """Both processes stop, one at a time: each goes on from its own file."""
    data, out = write_digits(tmp_path / "data.npz"), tmp_path / "moments.npz"
    command = ["-m experiments.stream_moments", "--data", data, "--out", out, "--batch-size", 1]
    command += ["--groups", 3, "--checkpoint-every", 0]
    files = [tmp_path / "moments.npz.unfinished" / f"moments-{i}-of-2.npz" for i in (0, 1)]
    with started(*command) as running:
        while not all(file.exists() for file in files):
            assert running[0].poll() is None, running[0].communicate()[0]
        running[1].kill()
        running[1].wait()
    assert not out.exists()
    printed = run_processes(*command, "--checkpoint-every", 60, "--batch-size", 1)
    assert "moments of 2600 images of 12 pixel values (uint8), 4 classes, 3 group(s)" in printed[0]
    images, labels = bytes_and_labels(N)
    assert_same_state(Moments.load(out), Moments.from_arrays(images, labels, groups=3))
    assert not files[0].parent.exists()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
