from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mae_align.data.npz import load_npz
from mae_align.runtime.errors import InputError


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (6, 5, 4, 3)).astype(np.uint8),
        "y_train": np.array([2, 0, 1, 2, 0, 1], np.uint8),
        "x_test": rng.integers(0, 256, (3, 5, 4, 3)).astype(np.uint8),
        "y_test": np.array([1, 2, 0], np.uint8),
    } | changes


def save(path: Path, **changes: Any) -> Path:
    kept = {key: value for key, value in arrays(**changes).items() if value is not None}
    np.savez(path, allow_pickle=True, **kept)
    return path


def test_archive_is_read_back(tmp_path):
    names = np.array(["cat", "dog", "été"])
    data = load_npz(save(tmp_path / "pets.npz", class_names=names))
    for field, key in (("train_images", "x_train"), ("test_images", "x_test")):
        np.testing.assert_array_equal(getattr(data, field), arrays()[key])
        assert getattr(data, field).dtype == np.uint8
    assert data.train_labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert data.test_labels.tolist() == [1, 2, 0]
    assert data.class_names == ("cat", "dog", "été") and data.name == "pets"


def test_grey_images_columns_of_labels_and_names_in_bytes(tmp_path):
    full = arrays()
    path = save(
        tmp_path / "grey.npz",
        x_train=full["x_train"][..., 0].astype(np.float64),
        x_test=full["x_test"][..., 0].astype(np.float64),
        y_train=full["y_train"][:, None].astype(np.int32),
        class_names=np.array(["é".encode(), b"b", b"c"]),
    )
    data = load_npz(path)
    assert data.train_images.shape == (6, 5, 4, 1) and data.train_images.dtype == np.float64
    assert data.train_labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert data.class_names == ("é", "b", "c")


def test_without_names_the_label_values_are_the_names(tmp_path):
    path = save(tmp_path / "a.npz", y_train=np.array([9, 4, 4, 9, 9, 4]), y_test=np.array([4, 9, 4]))
    data = load_npz(path)
    assert data.class_names == ("4", "9") and data.test_labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"y_test": None, "x_test": None}, r"lacks x_test, y_test \(it holds x_train, y_train\)"),
        ({"x_train": np.array([{}], object)}, "x_train of .* is an object array"),
        ({"class_names": np.array(["a", "b", "c"], object)}, "class_names of .* object array"),
        ({"class_names": np.array([["a"], ["b"], ["c"]])}, r"class_names of .* shape \[3, 1\]"),
        ({"class_names": np.array(["a", "b"])}, r"run from 0 to 2 but there are 2 class names"),
        ({"x_train": np.zeros((6, 60), np.uint8)}, r"x_train of .* \[6, 60\]: give \[n, h, w\]"),
        ({"y_train": np.eye(6)}, "classes in one part and other targets in another"),
        ({"y_test": np.array([0.5, 1, 2])}, "classes in one part and other targets in another"),
        ({"y_test": np.array([0, 1, 7])}, r"bad\.npz: labels hold \[7\]"),
        ({"y_train": np.array([0, 1])}, r"x_train of .* 6 images but y_train 2 labels"),
    ],
)
def test_bad_arrays_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_npz(save(tmp_path / "bad.npz", **changes))


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04", b"PK\x05\x06"])
def test_files_that_are_no_archives(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.npz is damaged or not an \.npz file: write"):
        load_npz(path)


def test_other_files(tmp_path):
    with pytest.raises(InputError, match=r"no file .*gone\.npz: check the path"):
        load_npz(tmp_path / "gone.npz")
    with pytest.raises(InputError, match=r"cannot read .*directory.*needs a file"):
        load_npz(tmp_path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match="holds a single array: save x_train"):
        load_npz(tmp_path / "one.npy")
    path = save(tmp_path / "text.npz", y_test=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y_test", "0 1 2")
    with pytest.raises(InputError, match=r"y_test of .* is not an array"):
        load_npz(path)


def test_zip_of_an_unknown_version(tmp_path):
    path = save(tmp_path / "new.npz")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 200  # version needed to extract: the zip reader knows none above 63
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"new\.npz is damaged"):
        load_npz(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
@pytest.mark.filterwarnings("ignore")  # NumPy warns about some damaged headers before it raises
def test_damage_anywhere_is_an_input_error_or_harmless(tmp_path, position, flip, cut):
    path = save(tmp_path / "fuzzed.npz")
    content = bytearray(path.read_bytes())
    where = int(position * len(content))
    content[where] ^= flip
    path.write_bytes(content[: where + 1] if cut else content)
    try:
        data = load_npz(path)
    except InputError as error:
        message = str(error)
    else:
        message = "fuzzed.npz"
        np.testing.assert_array_equal(data.train_images, arrays()["x_train"])
        np.testing.assert_array_equal(data.test_labels, arrays()["y_test"])
    assert "fuzzed.npz" in message and "\n" not in message


@pytest.mark.parametrize(
    ("values", "expected", "words"),
    [
        (np.array([[0.5], [2.0], [1.0], [4.0]]), [[0.5], [2.0], [1.0], [4.0]], "1 target"),
        (np.array([0.5, 2.0, 1.0, 4.0], np.float32), [[0.5], [2.0], [1.0], [4.0]], "1 target"),
        (np.array([[1, 0], [1, 1], [0, 0], [0, 1]], np.uint8), [[1, 0], [1, 1], [0, 0], [0, 1]], "2 attributes"),
        (np.array([[1, -1], [1, 1], [-1, -1], [-1, 1]]), [[1, 0], [1, 1], [0, 0], [0, 1]], "2 attributes"),
        (np.eye(4)[:, :2] > 0, np.eye(4)[:, :2].tolist(), "2 attributes"),
        (np.array([True, False, True, True]), [1, 0, 1, 1], "2 classes"),
        (np.array([[2], [0], [0], [2]], np.uint8), [1, 0, 0, 1], "2 classes"),
    ],
)
def test_targets_are_what_their_kind_says(tmp_path, values, expected, words):
    """One column of whole numbers is classes, as in MedMNIST; floats are numbers; columns of 0 and 1 are attributes."""
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 5), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=values, x_test=x, y_test=values)
    data = load_npz(tmp_path / "x.npz")
    assert data.train_labels.tolist() == expected and data.test_labels.tolist() == expected
    assert words in repr(data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.array([0.0, 1, 2, 1]),
            r"whole numbers as float64: if they are classes, .*; if they are numbers, .*y\[:, None\]",
        ),
        (
            np.array([[3, 1], [2, 2], [0, 1], [0, 1]]),
            r"whole numbers \[4, 2\]: if they are classes, .*; if they are numbers",
        ),
        (np.eye(4, dtype=int), r"a single 1 in every row: if the columns are classes, .*; if they are attributes"),
        (
            np.array([[0.5, 1], [np.nan, 1], [1, 2], [0, np.inf]]),
            r"NaN or infinite values in row\(s\) 1, 3, counted from 0",
        ),
        (np.full((4, 2), 0.5), "the same for all training images"),
        (np.zeros((4, 2, 2)), r"shape \[4, 2, 2\]"),
    ],
)
def test_targets_that_may_be_two_things_are_refused(tmp_path, values, message):
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 5), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=values, x_test=x, y_test=values)
    with pytest.raises(InputError, match=message):
        load_npz(tmp_path / "x.npz")


def test_a_constant_column_and_one_hot_floats_are_said(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 5), dtype=np.uint8)
    for values, note in (
        (np.array([[0.5, 7], [0.1, 7], [0.3, 7], [0, 7]]), "dose is the same for all training images"),
        (
            np.eye(2)[[0, 1, 0, 1]],
            "every row of the targets has a single 1: if the columns are classes, store y.argmax",
        ),
    ):
        names = np.array(["size", "dose"])
        np.savez(tmp_path / "x.npz", x_train=x, y_train=values, x_test=x, y_test=values, class_names=names)
        assert note in repr(load_npz(tmp_path / "x.npz"))
