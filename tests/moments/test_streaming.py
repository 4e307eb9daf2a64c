"""Streams of batches against arrays in memory (8-bit images, bit for bit) and extended precision (floats)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import mae_align as ma
from mae_align.closed_form.factorize import factorize
from mae_align.data import ArraySource
from mae_align.data.pipeline import batches
from mae_align.moments import streaming
from mae_align.moments.moments import Moments
from mae_align.moments.streaming import stream_moments
from mae_align.runtime import devices
from mae_align.runtime.devices import compile_counter
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import data_mesh

SHAPE, D, Q = (2, 3, 2), 12, 4
N = 2600


def bytes_and_labels(n: int = N, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8)
    images[:, 0, 1, 0] = 255 * rng.integers(0, 2, n)
    images[:, 1, 1, 1] = 9
    return images, rng.integers(0, Q, n)


def cut(images: np.ndarray, targets: np.ndarray | None, size: int) -> Iterator[Any]:
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        yield images[part] if targets is None else (images[part], targets[part])


def assert_same_state(ours: Moments, expected: Moments) -> None:
    """Equal bit for bit."""
    for field in dataclasses.fields(Moments):
        a, b = getattr(ours, field.name), getattr(expected, field.name)
        np.testing.assert_array_equal(a, b, err_msg=field.name)


def two_pass(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Covariances in extended precision."""
    x, y = (np.asarray(a, np.longdouble).reshape(len(x), -1) for a in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return (x.T @ x / len(x)).astype(np.float64), (x.T @ y / len(x)).astype(np.float64)


# Any batches, any devices


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("number", "size"), [(None, 1), (None, 700), (1, N), (3, 999), (8, 64), (8, 1), (8, N)])
def test_8bit_streams_are_bit_identical_for_any_batch_size_and_mesh(number, size, groups):
    images, labels = bytes_and_labels()
    mesh = None if number is None else data_mesh(jax.devices()[:number])
    stream = cut(images, labels, size)
    ours = stream_moments(stream, num_classes=Q, groups=groups, mesh=mesh, center=False, preprocessing="halved")
    expected = Moments.from_arrays(images, labels, num_classes=Q, groups=groups, center=False, preprocessing="halved")
    assert_same_state(ours, expected)
    x = images.reshape(N, D).astype(np.int64) - 128
    np.testing.assert_array_equal(ours.sum_xx.sum(0), x.T @ x)
    np.testing.assert_array_equal(ours.sum_xy.sum(0), x.T @ np.eye(Q, dtype=np.int64)[labels])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("targets", ["classes", "numbers"])
def test_float_streams_agree_in_the_frobenius_norm(dtype, offset, targets):
    """On 8 devices, drifting, with a mean 1,000 times the standard deviation, from a first batch of one image."""
    rng = np.random.default_rng(1)
    x = np.sort(rng.normal(size=(20_000, D)), axis=0) @ rng.normal(size=(D, D))
    images = (x + offset * x.std(0)).astype(dtype).reshape(-1, *SHAPE)
    labels = rng.integers(0, Q, len(x))
    y = labels if targets == "classes" else x[:, :2] + 50.0
    sizes = np.split(np.arange(len(x)), [1, 500, 9000, 9001])
    ours = stream_moments(
        ((images[i], y[i]) for i in sizes),
        num_classes=Q if targets == "classes" else None,
        mesh=data_mesh(),
        groups=2,
    )
    sxx, sxy = two_pass(images, np.eye(Q)[labels] if targets == "classes" else y)
    tolerance = 1e-6 if dtype == np.float32 else 1e-12
    assert np.linalg.norm(ours.sxx - sxx) <= tolerance * np.linalg.norm(sxx)
    # Of unrelated labels the cross moments are next to nothing: their scale is that of x times that of y.
    scale = np.sqrt(np.linalg.norm(sxx) * np.linalg.norm(ours.syy))
    assert np.linalg.norm(ours.sxy - sxy) <= tolerance * scale
    error = ours.mean_x - images.reshape(-1, D).mean(0, dtype=np.longdouble)
    assert (np.abs(error) <= 0.1 * tolerance * x.std(0)).all()
    whole = Moments.from_arrays(images, y, groups=2)
    np.testing.assert_array_equal(ours.counts, whole.counts)
    for mine, theirs in zip(
        ours.groups_about(whole.mean_x, whole.mean_y), whole.groups_about(whole.mean_x, whole.mean_y), strict=True
    ):
        assert np.linalg.norm(mine.sxx - theirs.sxx) <= tolerance * np.linalg.norm(theirs.sxx)
        assert np.linalg.norm(mine.sxy - theirs.sxy) <= tolerance * scale


@pytest.mark.parametrize(("processes", "interleaved"), [(2, True), (3, True), (2, False)])
def test_shards_with_their_global_indices_have_the_groups_of_the_whole(processes, interleaved):
    images, labels = bytes_and_labels()
    whole = Moments.from_arrays(images, labels, groups=5)
    edges = [0, 1000, N]
    shards = []
    for p in range(processes):
        part = slice(p, None, processes) if interleaved else slice(edges[p], edges[p + 1])
        first, step = (p, processes) if interleaved else (edges[p], 1)
        stream = cut(images[part], labels[part], 300)
        shards.append(stream_moments(stream, num_classes=Q, groups=5, first_index=first, index_step=step))
    merged = shards[0]
    for shard in shards[1:]:
        merged = merged.merge(shard)
    assert_same_state(merged, whole)


def test_the_caller_may_use_its_buffer_again():
    images, labels = bytes_and_labels()
    buffer, classes = np.empty((13, *SHAPE), np.uint8), np.empty(13, np.int64)

    def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, N, 13):
            buffer[:], classes[:] = images[start : start + 13], labels[start : start + 13]
            yield buffer, classes

    assert_same_state(stream_moments(stream(), num_classes=Q), Moments.from_arrays(images, labels))


def test_other_batch_sizes_compile_nothing_new():
    images, labels = bytes_and_labels()
    mesh = data_mesh()
    stream_moments(cut(images, labels, 512), num_classes=Q, mesh=mesh)
    stream_moments(cut(images[:5], labels[:5], 512), num_classes=Q, mesh=mesh)
    with compile_counter() as compiled:
        for size in (1000, 77, N):
            stream_moments(cut(images, labels, size), num_classes=Q, mesh=mesh)
    assert compiled.names == []


def test_batches_of_a_pipeline_bring_their_indices():
    """Shuffled, in two shares: the groups are those of the data in order."""
    images, labels = bytes_and_labels(300)
    whole = Moments.from_arrays(images, labels, groups=4)
    source = ArraySource(images, labels, tuple("abcd"), "bytes")
    shares = [
        stream_moments(
            batches(source, batch_size=32, process_index=p, process_count=2, seed=5), num_classes=Q, groups=4
        )
        for p in (0, 1)
    ]
    assert_same_state(shares[0].merge(shares[1]), whole)
    assert_same_state(stream_moments([(images, labels, np.arange(300))], num_classes=Q, groups=4, first_index=9), whole)


# Targets


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_targets_are_optional(dtype):
    images = bytes_and_labels()[0].astype(dtype)
    for m in (Moments.from_arrays(images), stream_moments(cut(images, None, 100)), stream_moments([(images, None)])):
        assert m.sxy.shape == (D, 0) and m.syy.shape == (0, 0) and m.num_targets == 0
        expected = two_pass(images, images)[0]
        assert np.linalg.norm(m.sxx - expected) <= 1e-6 * np.linalg.norm(expected)
    whole = Moments.from_arrays(images)
    np.testing.assert_allclose(whole.update(images).sxx, whole.sxx, rtol=1e-6, atol=1e-3)


def test_moments_without_targets_are_factorised_and_reconstructed_but_explain_no_task():
    images, labels = bytes_and_labels()
    bare, full = Moments.from_arrays(images), Moments.from_arrays(images, labels)
    problem, other = factorize(bare), factorize(full)
    np.testing.assert_array_equal(problem.s, other.s)
    assert problem.t0.shape == (problem.rank, 0)
    corruption = ma.PatchMasking(1, 0.5)
    np.testing.assert_array_equal(
        ma.denoising_autoencoder(bare, corruption, 3).decoder, ma.denoising_autoencoder(full, corruption, 3).decoder
    )
    for ask in (
        lambda: ma.masking_sweep(bare, [1], [0.5]),
        lambda: ma.lambda_sweep(bare, [1.0]),
        lambda: ma.gaussian_sweep(bare, [1.0]),
        lambda: ma.encoder_curves(bare, np.eye(D)[:, :3]),
        lambda: ma.supervised_autoencoder(bare, 1.0, 2),
    ):
        with pytest.raises(InputError, match="made without targets: there is no task"):
            ask()


# Resume


class Killed(Exception):
    """Stands in for the end of a process."""


class Source:
    """Batches that can be told where to go on, and that fail once after some of them."""

    def __init__(self, parts: list[Any], fail_after: int | None = None, binary: bool = False) -> None:
        self.parts, self.fail_after, self.binary = parts, fail_after, binary
        self.at, self.read = 0, []

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Any:
        if self.fail_after is not None and self.at >= self.fail_after:
            raise Killed
        if self.at == len(self.parts):
            raise StopIteration
        self.read.append(self.at)
        self.at += 1
        return self.parts[self.at - 1]

    def get_state(self) -> Any:
        return json.dumps({"at": self.at}).encode() if self.binary else {"at": self.at}

    def set_state(self, state: Any) -> None:
        assert isinstance(state, bytes) == self.binary
        self.at = (json.loads(state) if self.binary else state)["at"]


def plain(source: Source) -> Iterator[Any]:
    yield from source


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("binary", [True, False, None])
@pytest.mark.parametrize(("fail_after", "groups"), [(1, 1), (17, 3), (52, 1)])
def test_a_killed_stream_goes_on_to_the_same_bits(tmp_path, dtype, binary, fail_after, groups):
    images, labels = bytes_and_labels()
    parts = list(cut(images.astype(dtype), labels, 50))
    options: dict[str, Any] = dict(num_classes=Q, groups=groups, mesh=data_mesh(jax.devices()[:2]))
    expected = stream_moments(parts, **options)
    options |= {"checkpoint": tmp_path, "checkpoint_every": 0.0}

    def go(source: Source) -> Moments:
        return stream_moments(source if binary is not None else plain(source), **options)

    with pytest.raises(Killed):
        go(Source(parts, fail_after, bool(binary)))
    rest = Source(parts, None, bool(binary))
    assert_same_state(go(rest), expected)
    # The first batch tells whether it is the same stream; an iterator without a state is read again.
    skipped = [] if binary is not None else list(range(1, fail_after))
    assert rest.read == [0, *skipped, *range(fail_after, len(parts))]
    # Finished, it is all there.
    done = Source(parts, None, bool(binary))
    assert_same_state(go(done), expected)
    assert binary is None or done.read == [0]
    assert [p.name for p in tmp_path.iterdir()] == ["moments-0-of-1.npz"]


def test_a_stream_is_saved_every_so_many_seconds_and_at_the_end(tmp_path, monkeypatch):
    images, labels = bytes_and_labels(100)
    clock = iter(np.arange(0.0, 1000.0, 1.0))
    monkeypatch.setattr("mae_align.moments.streaming.time.monotonic", lambda: next(clock))
    saved = []
    write = streaming._write_checkpoint
    monkeypatch.setattr(streaming, "_write_checkpoint", lambda *a: (saved.append(a[-1]), write(*a)))
    stream_moments(cut(images, labels, 10), num_classes=Q, checkpoint=tmp_path, checkpoint_every=3.0)
    # The clock is read once before, once after each batch and once after each save.
    assert saved == [3, 6, 9, 10]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".moments-0-of-1.npz.x7.tmp").write_bytes(b"PK\x03\x04")
    images, labels = bytes_and_labels(20)
    stream_moments(cut(images, labels, 10), num_classes=Q, checkpoint=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["moments-0-of-1.npz"]


OTHERS: dict[str, dict[str, Any]] = {
    "first batch": {},  # other data
    "center": {"center": False},
    "groups": {"groups": 2},
    "identity": {"identity": "another folder"},
    "total": {"total": 50},
    "preprocessing": {"preprocessing": "halved"},
    "first_index": {"first_index": 7},
    "index_step": {"index_step": 2},
    "layout": {"num_classes": 5},
    "devices": {},  # another mesh
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_other_data_or_settings_is_refused(tmp_path, what):
    images, labels = bytes_and_labels(40)
    options: dict[str, Any] = {"num_classes": Q, "checkpoint": tmp_path}
    stream_moments(cut(images, labels, 10), **options)
    options |= OTHERS[what] | ({"mesh": data_mesh()} if what == "devices" else {})
    order = slice(None, None, -1 if what == "first batch" else None)
    with pytest.raises(InputError, match=rf"belongs to other data or settings \(.*{what}.* differ\)"):
        stream_moments(cut(images[order], labels[order], 10), **options)


def test_a_damaged_checkpoint_and_a_shorter_stream_are_refused(tmp_path):
    images, labels = bytes_and_labels(40)
    options: dict[str, Any] = {"num_classes": Q, "checkpoint": tmp_path}
    stream_moments(cut(images, labels, 10), **options)
    with pytest.raises(InputError, match="the stream ends before the batch of its checkpoint"):
        stream_moments(cut(images[:20], labels[:20], 10), **options)
    file = tmp_path / "moments-0-of-1.npz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged or cut off: make the unfinished moments again"):
        stream_moments(cut(images, labels, 10), **options)


# What is refused, and what is shown


def bad_streams(x: np.ndarray, y: np.ndarray) -> dict[str, tuple[Iterator[Any], dict[str, Any], str]]:
    float_x = x.astype(np.float32)
    nan = float_x.copy()
    nan[25, 0, 0, 0] = np.nan
    return {
        "empty": (iter([]), {}, "no batches"),
        "no classes": (cut(x, y, 10), {}, "give num_classes"),
        "labels over": (cut(x, y, 10), {"num_classes": 3}, "outside 0..2"),
        "classes without targets": (iter([x, (x, y)]), {"num_classes": Q}, "batch 1 has"),
        "other shape": (iter([(x, y), (x[:, :1], y)]), {"num_classes": Q}, "batch 1 has"),
        "other dtype": (iter([(x, y), (float_x, y)]), {"num_classes": Q}, "batch 1 has"),
        "other targets": (iter([(x, y), (x, y * 0.5)]), {"num_classes": Q}, "num_classes goes with|batch 1 has"),
        "NaN": (cut(nan, None, 10), {}, "NaN"),
        "rank": (iter([x[0]]), {}, "images have shape"),
        "lengths": (iter([(x, y[:-1])]), {"num_classes": Q}, "40 images but 39 targets"),
        "indices": (iter([(x, y, np.arange(39))]), {"num_classes": Q}, r"40 images with indices \[39\]"),
        "groups": (cut(x, None, 10), {"groups": 0}, "groups=0"),
        "step": (cut(x, None, 10), {"index_step": 0}, "index_step=0"),
        "seconds": (cut(x, None, 10), {"checkpoint_every": -1.0}, "checkpoint_every=-1.0"),
    }


@pytest.mark.parametrize("case", bad_streams(*bytes_and_labels(40)))
def test_bad_streams_are_refused(case):
    stream, options, message = bad_streams(*bytes_and_labels(40))[case]
    with pytest.raises(InputError, match=message):
        stream_moments(stream, **options)


def test_float64_images_on_devices_without_float64_are_refused(monkeypatch):
    monkeypatch.setattr(devices, "_BACKENDS_WITHOUT_FLOAT64", ("cpu",))
    with pytest.raises(InputError, match="have no float64: give float32 images"):
        stream_moments([np.ones((2, 1, 1, 1))], mesh=data_mesh())


def test_the_bar_shows_images_per_second_and_the_time_left(capsys, monkeypatch, tmp_path):
    images, labels = bytes_and_labels(40)
    seen: list[dict[str, Any]] = []
    tqdm = streaming.tqdm

    def spy(**options: Any) -> Any:
        seen.append(options)
        now: dict[str, Any] = options | {"delay": 0.0, "mininterval": 0.0}
        bar = tqdm(**now)
        bar.update(0)
        return bar

    monkeypatch.setattr(streaming, "tqdm", spy)
    options: dict[str, Any] = {"num_classes": Q, "total": 40, "checkpoint": tmp_path, "checkpoint_every": 0.0}
    with pytest.raises(Killed):
        stream_moments(Source(list(cut(images, labels, 10)), 2), **options)
    assert capsys.readouterr().err == ""
    stream_moments(Source(list(cut(images, labels, 10))), progress=True, **options)
    shown = capsys.readouterr().err
    assert seen[-1]["initial"] == 20 and seen[-1]["total"] == 40
    assert "moments:" in shown and "40.0/40.0" in shown and "image/s" in shown and "<" in shown
