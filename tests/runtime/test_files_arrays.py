"""Moment files: everything comes back bit for bit, and every damage is one clear error."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mae_align.moments.moments import Moments
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import read_arrays, remove_unfinished, write_arrays


def moments(**options) -> Moments:
    rng = np.random.default_rng(0)
    return Moments.from_arrays(rng.integers(0, 256, (60, 2, 3, 1), dtype=np.uint8), np.arange(60) % 3, **options)


def saved(path: Path) -> Path:
    moments(groups=3).save(path / "train.npz")
    return path / "train.npz"


def assert_same(a: Moments, b: Moments) -> None:
    for field in dataclasses.fields(Moments):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert type(x) is type(y)
        assert not isinstance(x, np.ndarray) or x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=field.name)


def test_moments_come_back_bit_for_bit_and_go_on(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 2, 2, 1))
    for m in (
        moments(groups=3, center=False, preprocessing="halved, in Zürich"),
        Moments.from_arrays(x.astype(np.float32), x.reshape(50, 4)[:, :2], groups=2),
        Moments.from_arrays(x),
    ):
        m.save(str(tmp_path / "deep" / "er" / "m.npz"))
        again = Moments.load(tmp_path / "deep" / "er" / "m.npz")
        assert_same(again, m)
        assert_same(again.merge(m), m.merge(m))
    assert os.listdir(tmp_path / "deep" / "er") == ["m.npz"]


def test_the_file_is_an_npz_without_pickle_that_numpy_reads(tmp_path):
    with np.load(saved(tmp_path), allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        assert (header["format"], header["kind"], header["version"]) == ("mae_align", "moments", 1)
        np.testing.assert_array_equal(file["sum_xx"], moments(groups=3).sum_xx)


def load_or_message(path: Path) -> str:
    """The error of a file, or nothing: it then holds what it should."""
    try:
        assert_same(Moments.load(path), moments(groups=3))
    except InputError as error:
        return str(error)
    return ""


def test_every_flipped_bit_is_noticed(tmp_path):
    """The parts of the file that zip ignores aside, which change nothing of what is read."""
    path = saved(tmp_path)
    whole = path.read_bytes()
    noticed = 0
    for at in range(0, len(whole), 41):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        message = load_or_message(path)
        if message:
            assert str(path) in message and "\n" not in message
            noticed += 1
    assert noticed > 0.8 * len(range(0, len(whole), 41))


def test_every_cut_is_noticed(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for size in (0, 3, 4, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="damaged or cut off" if size >= 4 else "is not a file of moments"):
            Moments.load(path)


def rewritten(path: Path, **changes: object) -> Path:
    """The same file with another header and a zip checksum to match."""
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays.pop("header").tobytes()) | changes
    np.savez(path, allow_pickle=False, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    return path


def test_numbers_changed_with_care_are_noticed_too(tmp_path):
    path = saved(tmp_path)
    fields = moments(groups=3)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["sum_xx"][0, 1, 1] += 1
    np.savez(path, allow_pickle=False, **arrays)
    with pytest.raises(InputError, match="damaged or cut off"):
        Moments.load(path)
    other = {"image_shape": [3, 2, 1], "pixel_dtype": "uint8", "center": True, "preprocessing": fields.preprocessing}
    with pytest.raises(InputError, match="damaged or cut off"):
        Moments.load(rewritten(saved(tmp_path), fields=other))
    with pytest.raises(InputError, match="damaged or cut off"):
        Moments.load(rewritten(saved(tmp_path), arrays=["nothing"]))


def test_a_newer_version_says_so(tmp_path):
    with pytest.raises(InputError, match="has version 2 of the format of moments, newer than 1"):
        Moments.load(rewritten(saved(tmp_path), version=2))


def foreign(path: Path) -> dict[str, Path]:
    files = {name: path / name for name in ("text", "arrays", "header", "zip", "folder", "checkpoint", "none")}
    files["text"].write_text("pixels")
    with files["arrays"].open("wb") as file:
        np.savez(file, x=np.ones(3))
    with files["header"].open("wb") as file:
        np.savez(file, header=np.ones(3))
    with zipfile.ZipFile(files["zip"], "w") as archive:
        archive.writestr("a.txt", "pixels")
    files["folder"].mkdir()
    write_arrays(files["checkpoint"], "unfinished moments", 1, {}, {})
    return files


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("text", "is not a file of moments that mae_align wrote"),
        ("arrays", "is not a file of moments"),
        ("header", "is not a file of moments"),
        ("zip", "is not a file of moments"),
        ("folder", "there is no such file"),
        ("none", "there is no such file"),
        ("checkpoint", "holds unfinished moments, not moments"),
    ],
)
def test_foreign_files_are_refused(tmp_path, case, message):
    with pytest.raises(InputError, match=message):
        Moments.load(foreign(tmp_path)[case])


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*choose another place"):
        moments().save(tmp_path / "file" / "m.npz")
    (tmp_path / "m.npz").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        moments().save(tmp_path / "m.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = saved(tmp_path)

    def fail(file, **arrays):
        file.write(b"PK\x03\x04")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        moments().save(path)
    assert os.listdir(tmp_path) == ["train.npz"]
    assert_same(Moments.load(path), moments(groups=3))


def test_leftovers_of_one_file_are_removed_and_nothing_else(tmp_path):
    for name in (".a.npz.1.tmp", ".a.npz.2.tmp", ".b.npz.1.tmp", "a.npz"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path / "a.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.npz.1.tmp", "a.npz"]


def test_fields_and_arrays_come_back(tmp_path):
    write_arrays(
        tmp_path / "x", "numbers", 3, {"a": [1, None], "b": "ä"}, {"x": np.zeros((2, 0)), "y": np.array([7], np.int32)}
    )
    fields, arrays = read_arrays(tmp_path / "x", "numbers", 3)
    assert fields == {"a": [1, None], "b": "ä"}
    assert arrays["x"].shape == (2, 0) and arrays["y"].dtype == np.int32
