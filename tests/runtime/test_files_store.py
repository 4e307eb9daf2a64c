from __future__ import annotations

import io
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

from mae_align.runtime.errors import InputError
from mae_align.runtime.files import PointStore, fingerprint


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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
    assert files(Path(folder)) == {"identity.json", "p0.npz", "p1-rho0.0-laminf.npz"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_half_way_leaves_everything_as_it_was(tmp_path, point, monkeypatch, error):
    store = PointStore(tmp_path, "a")
    store.save("old", point)
    before = files(tmp_path)

    def half(file: io.BufferedWriter, **arrays: np.ndarray) -> None:
        file.write(b"PK\x03\x04 the first half")
        file.flush()
        # Until it is whole the file has another name, which no reader takes for a point.
        assert PointStore(tmp_path, "a").load("new") is None
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        for key in ("new", "old"):
            with pytest.raises(error):
                store.save(key, {"t": np.ones(3)})
    assert files(tmp_path) == before
    assert store.load("new") is None
    assert_same(store.load("old"), point)


def test_the_identity_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        with pytest.raises(KeyboardInterrupt):
            PointStore(tmp_path, "a")
    assert files(tmp_path) == set()
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


# NumPy leaves a file open that turns out to be no archive.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_every_length_of_a_cut_file_is_noticed(tmp_path):
    store = PointStore(tmp_path, "a")
    for length in range(0, len(WHOLE), 7):
        (tmp_path / "p.npz").write_bytes(WHOLE[:length])
        with pytest.warns(UserWarning, match="damaged"):
            assert store.load("p") is None


def test_every_byte_of_the_numbers_is_guarded(tmp_path):
    store = PointStore(tmp_path, "a")
    for at in range(PAYLOAD, PAYLOAD + 400, 11):
        (tmp_path / "p.npz").write_bytes(WHOLE[:at] + bytes([WHOLE[at] ^ 0x10]) + WHOLE[at + 1 :])
        with pytest.warns(UserWarning, match="damaged"):
            assert store.load("p") is None


def test_points_of_another_computation_are_refused_and_kept(tmp_path, point):
    PointStore(tmp_path, "a").save("p", point)
    for identity in ("b", "", "A", "a "):
        with pytest.raises(InputError, match=r"points of another computation .*choose another folder or delete it"):
            PointStore(tmp_path, identity)
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fingerprint(*CHANGES[change]) != fingerprint(ARRAYS, SETTINGS)
