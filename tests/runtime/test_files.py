"""Files that are whole or not there, what tells computations apart, and what happens to damaged and foreign files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import mae_align as ma
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import (
    PointStore,
    fingerprint,
    identity,
    read_arrays,
    remove_unfinished,
    whole_file,
    write_arrays,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Whole files


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_half_way_leaves_everything_as_it_was(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            file.flush()
            assert len(names(tmp_path)) == 2 and path.read_text() == "old"
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == {"a.txt"} and path.read_text() == "old"


def test_files_are_for_whom_others_of_their_maker_are(tmp_path):
    (tmp_path / "other").touch()
    with whole_file(tmp_path / "a.txt"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "a.txt")]
    assert modes[0] == modes[1]


def test_leftovers_of_one_file_are_removed_and_nothing_else(tmp_path):
    for name in (".a.npz.1.tmp", ".a.npz.2.tmp", ".b.npz.1.tmp", "a.npz"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path / "a.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.npz.1.tmp", "a.npz"]


# Files of arrays: moments


def moments(**options) -> ma.Moments:
    rng = np.random.default_rng(0)
    return ma.Moments.from_arrays(rng.integers(0, 256, (60, 2, 3, 1), dtype=np.uint8), np.arange(60) % 3, **options)


def saved(path: Path) -> Path:
    moments(groups=3).save(path / "train.npz")
    return path / "train.npz"


def assert_same_moments(a: ma.Moments, b: ma.Moments) -> None:
    for field in dataclasses.fields(ma.Moments):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert type(x) is type(y)
        assert not isinstance(x, np.ndarray) or x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=field.name)


def test_moments_come_back_bit_for_bit_and_go_on(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 2, 2, 1))
    for m in (
        moments(groups=3, center=False, preprocessing="halved, in Zürich"),
        ma.Moments.from_arrays(x.astype(np.float32), x.reshape(50, 4)[:, :2], groups=2),
        ma.Moments.from_arrays(x),
    ):
        m.save(str(tmp_path / "deep" / "er" / "m.npz"))
        again = ma.Moments.load(tmp_path / "deep" / "er" / "m.npz")
        assert_same_moments(again, m)
        assert_same_moments(again.merge(m), m.merge(m))
    assert os.listdir(tmp_path / "deep" / "er") == ["m.npz"]


def test_the_file_is_an_npz_without_pickle_that_numpy_reads(tmp_path):
    with np.load(saved(tmp_path), allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        assert (header["format"], header["kind"], header["version"]) == ("mae_align", "moments", 1)
        np.testing.assert_array_equal(file["sum_xx"], moments(groups=3).sum_xx)


def load_or_message(path: Path) -> str:
    """The error of a file, or nothing: it then holds what it should."""
    try:
        assert_same_moments(ma.Moments.load(path), moments(groups=3))
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
            ma.Moments.load(path)


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
        ma.Moments.load(path)
    other = {"image_shape": [3, 2, 1], "pixel_dtype": "uint8", "center": True, "preprocessing": fields.preprocessing}
    with pytest.raises(InputError, match="damaged or cut off"):
        ma.Moments.load(rewritten(saved(tmp_path), fields=other))
    with pytest.raises(InputError, match="damaged or cut off"):
        ma.Moments.load(rewritten(saved(tmp_path), arrays=["nothing"]))


def test_a_newer_version_says_so(tmp_path):
    with pytest.raises(InputError, match="has version 2 of the format of moments, newer than 1"):
        ma.Moments.load(rewritten(saved(tmp_path), version=2))


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
        ma.Moments.load(foreign(tmp_path)[case])


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*choose another place"):
        moments().save(tmp_path / "file" / "m.npz")
    (tmp_path / "m.npz").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        moments().save(tmp_path / "m.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m.npz"]


def test_version_1_of_the_format_loads(tmp_path):
    """Written down from its description, as every release so far has saved moments."""
    m = moments(groups=3)
    fields = {"image_shape": [2, 3, 1], "pixel_dtype": "uint8", "center": True, "preprocessing": "stored pixels"}
    order = ("pivot_x", "pivot_y", "counts", "sum_x", "sum_y", "sum_xx", "sum_xy", "sum_yy")
    arrays = {name: getattr(m, name) for name in order}
    about = {"kind": "moments", "version": 1, "fields": fields, "arrays": list(order)}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for array in arrays.values():
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    header = json.dumps(about | {"format": "mae_align", "sha256": digest.hexdigest()}).encode()
    np.savez(tmp_path / "m.npz", allow_pickle=False, header=np.frombuffer(header, np.uint8), **arrays)
    assert_same_moments(ma.Moments.load(tmp_path / "m.npz"), m)


def test_fields_and_arrays_come_back(tmp_path):
    write_arrays(
        tmp_path / "x", "numbers", 3, {"a": [1, None], "b": "ä"}, {"x": np.zeros((2, 0)), "y": np.array([7], np.int32)}
    )
    fields, arrays = read_arrays(tmp_path / "x", "numbers", 3)
    assert fields == {"a": [1, None], "b": "ä"}
    assert arrays["x"].shape == (2, 0) and arrays["y"].dtype == np.int32


# Folders of points


@pytest.fixture
def point() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "t": rng.normal(size=(7, 3)),
        "mu": rng.normal(size=5).astype(np.float32),
        "condition": np.array(3.5),
        "nothing": np.zeros((0, 4)),
        "nan": np.array([np.nan, -0.0, np.inf]),
    }


def assert_same(a: dict[str, np.ndarray] | None, b: dict[str, np.ndarray]) -> None:
    assert a is not None and set(a) == set(b)
    for name, array in b.items():
        assert a[name].dtype == array.dtype and a[name].shape == array.shape
        assert a[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("kind", [str, Path])
def test_points_come_back_bit_for_bit(tmp_path, point, kind):
    folder = kind(tmp_path / "new" / "folder")
    store = PointStore(folder, "a")
    assert store.load("p0") is None
    store.save("p0", point)
    other = {"t": np.eye(2)}
    store.save("p1-rho0.0-laminf", other)
    for reader in (store, PointStore(folder, "a")):
        assert_same(reader.load("p0"), point)
        assert_same(reader.load("p1-rho0.0-laminf"), other)
        assert reader.load("p2") is None
    store.save("p0", other)
    assert_same(store.load("p0"), other)
    assert names(Path(folder)) == {"identity.json", "p0.npz", "p1-rho0.0-laminf.npz"}


def test_the_identity_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        with pytest.raises(KeyboardInterrupt):
            PointStore(tmp_path, "a")
    assert names(tmp_path) == set()
    PointStore(tmp_path, "a")


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


WHOLE = npz({"t": np.arange(50.0), "mu": np.eye(3)})
PAYLOAD = WHOLE.index(np.arange(50.0).tobytes())
DAMAGE = {
    "empty": b"",
    "one byte": WHOLE[:1],
    "a third": WHOLE[: len(WHOLE) // 3],
    "all but the directory": WHOLE[: WHOLE.rindex(b"PK\x01\x02")],
    "all but one byte": WHOLE[:-1],
    "zeros": bytes(len(WHOLE)),
    "one bit of the numbers": WHOLE[: PAYLOAD + 60] + bytes([WHOLE[PAYLOAD + 60] ^ 1]) + WHOLE[PAYLOAD + 61 :],
    "text": b"<html>404</html>",
    "pickled objects": pickle.dumps({"t": np.ones(2)}),
    "objects in an array": npz({"t": np.array([None, {}])}),
}


# NumPy leaves a file open that turns out to be no archive.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_point_is_reported_and_can_be_written_again(tmp_path, damage):
    store = PointStore(tmp_path, "a")
    (tmp_path / "p.npz").write_bytes(DAMAGE[damage])
    with pytest.warns(UserWarning, match=r"p\.npz is damaged and is computed again"):
        assert store.load("p") is None
    again = {"t": np.arange(50.0), "mu": np.eye(3)}
    store.save("p", again)
    assert_same(store.load("p"), again)


def test_points_of_another_computation_are_refused_and_kept(tmp_path, point):
    PointStore(tmp_path, "a").save("p", point)
    for other in ("b", "", "A", "a "):
        with pytest.raises(InputError, match=r"points of another computation .*choose another folder or delete it"):
            PointStore(tmp_path, other)
    assert_same(PointStore(tmp_path, "a").load("p"), point)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"a"', b'{"name": "a"}', b"\xff\xfe\x00", b"3"])
def test_a_damaged_identity_is_refused_with_the_cure(tmp_path, content):
    PointStore(tmp_path, "a")
    (tmp_path / "identity.json").write_bytes(content)
    with pytest.raises(InputError, match=r"identity\.json is damaged: delete the folder .* and run again"):
        PointStore(tmp_path, "a")


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot use the folder .*file.* \(.+\): choose another one"):
            PointStore(path, "a")


def test_an_identity_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "identity.json").mkdir()
    with pytest.raises(InputError, match=r"identity\.json is damaged"):
        PointStore(tmp_path, "a")


# Fingerprints

ARRAYS = [np.arange(6.0).reshape(2, 3), np.array([1, 2], np.int64)]
SETTINGS: dict[str, object] = {"max_k": 3, "dtype": "float64", "pixel_noise": 1 / 12, "path": Path("x")}


def test_the_fingerprint_depends_on_nothing_but_values_types_and_shapes():
    expected = fingerprint(ARRAYS, SETTINGS)
    assert len(expected) == 64 and int(expected, 16) >= 0
    backwards = dict(reversed(list(SETTINGS.items())))
    assert fingerprint(iter([np.asfortranarray(ARRAYS[0]), ARRAYS[1]]), backwards) == expected
    assert fingerprint([np.repeat(ARRAYS[0], 2, 0)[::2], ARRAYS[1]], SETTINGS) == expected


CHANGES = {
    "a number": ([ARRAYS[0] + np.eye(2, 3) * 1e-15, ARRAYS[1]], SETTINGS),
    "the sign of zero": ([np.where(ARRAYS[0] == 0, -0.0, ARRAYS[0]), ARRAYS[1]], SETTINGS),
    "the type": ([ARRAYS[0], ARRAYS[1].view(np.uint64)], SETTINGS),
    "the shape": ([ARRAYS[0].reshape(3, 2), ARRAYS[1]], SETTINGS),
    "the order of the arrays": (ARRAYS[::-1], SETTINGS),
    "one array less": (ARRAYS[:1], SETTINGS),
    "where arrays end": ([ARRAYS[0], ARRAYS[1][:1], ARRAYS[1][1:]], SETTINGS),
    "a setting": (ARRAYS, SETTINGS | {"max_k": 4}),
    "a setting in the last digit": (ARRAYS, SETTINGS | {"pixel_noise": np.nextafter(1 / 12, 1)}),
    "one setting more": (ARRAYS, SETTINGS | {"rtol": 0.0}),
    "a setting that is no JSON": (ARRAYS, SETTINGS | {"path": Path("y")}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_changes_with(change):
    assert fingerprint(*CHANGES[change]) != fingerprint(ARRAYS, SETTINGS)


# Identities of objects


def add(shift, image, key):
    return image + shift


def scale(factor: float):
    return lambda image, key: factor * image


def test_equal_parameters_are_one_identity():
    for make in (
        lambda: ma.PatchMasking(2, 0.5),
        lambda: ma.PatchMasking(2, 0.5, fill=np.ones((2, 2, 1))),
        lambda: ma.GaussianNoise(np.arange(4.0).reshape(2, 2, 1)),
        lambda: ma.Compose(ma.GaussianBlur(1.0), ma.PatchMasking(2, 0.5)),
        lambda: ma.SampledCorruption(scale(2.0), 3),
        lambda: ma.SampledCorruption(functools.partial(add, 1.0), 3),
        lambda: ma.MatrixTarget(np.eye(3)),
    ):
        assert identity(make()) == identity(make())


def test_any_other_parameter_is_another():
    things = [
        ma.PatchMasking(2, 0.5),
        ma.PatchMasking((2, 2), 0.5),
        ma.PatchMasking(2, 0.5 + 1e-16 * 2),
        ma.PatchMasking(2, 0.5, fill=0.0),
        ma.PatchMasking(2, 0.5, fill=1.0),
        ma.FixedCountPatchMasking(2, 1),
        ma.GaussianNoise(1.0),
        ma.GaussianNoise(np.ones((2, 2, 1))),
        ma.GaussianNoise(np.ones((2, 2, 1)) * (1 + 1e-15)),
        ma.Compose(ma.GaussianBlur(1.0), ma.PatchMasking(2, 0.5)),
        ma.Compose(ma.PatchMasking(2, 0.5), ma.GaussianBlur(1.0)),
        ma.SampledCorruption(scale(2.0), 3),
        ma.SampledCorruption(scale(2.5), 3),
        ma.SampledCorruption(lambda image, key: 2.0 * image, 3),
        ma.SampledCorruption(lambda image, key: 3.0 * image, 3),
        ma.SampledCorruption(scale(2.0), 4),
        ma.SampledCorruption(scale(2.0), 3, seed=1),
        ma.SampledCorruption(functools.partial(add, 1.0), 3),
        ma.SampledCorruption(functools.partial(add, 2.0), 3),
        ma.GaussianBlur(1.0),
        ma.HighPass(1.0),
        ma.MatrixTarget(np.eye(3)),
        None,
        (1, 2),
        [1, 2],
        {"a": 1},
    ]
    found = [identity(thing) for thing in things]
    assert len(set(found)) == len(found)


FACTOR = 1.0


def scaled(x):
    return FACTOR * x


def test_a_function_is_known_by_the_globals_it_names(monkeypatch):
    before = identity(scaled)
    assert identity(scaled) == before
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    assert identity(scaled) != before


def recursive(x):
    return x if x <= 0 else recursive(x - 1)


def test_recursive_functions_end():
    assert identity(recursive) == identity(recursive) != identity(scaled)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    value: int


def test_sets_paths_and_slots_are_told_apart_and_what_cannot_be_is_refused():
    assert identity({1}) != identity({2}) and identity({1, 2}) == identity({2, 1})
    assert identity(Path("a")) != identity(Path("b"))
    assert identity(Slotted(1)) != identity(Slotted(2)) != identity(Slotted(1))
    with pytest.raises(InputError, match="cannot be told from another"):
        identity(iter([1]))
