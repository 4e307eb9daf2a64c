from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mae_align.data import ImageDataset
from mae_align.data.dataset import check_labels, encode_labels
from mae_align.runtime.errors import InputError


def make(**changes: Any) -> ImageDataset:
    fields: dict[str, Any] = {
        "train_images": np.arange(4 * 6 * 5 * 3).reshape(4, 6, 5, 3).astype(np.uint8),
        "train_labels": np.array([0, 1, 2, 1], np.uint8),
        "test_images": np.zeros((2, 6, 5, 3), np.uint8),
        "test_labels": np.array([2, 0]),
        "class_names": ("a", "b", "c"),
        "name": "toy",
    }
    return ImageDataset(**(fields | changes))


def test_types_and_properties():
    data = make(class_names=["a", "b", "c"])
    assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int64
    assert data.class_names == ("a", "b", "c") and data.num_classes == 3
    assert data.image_shape == (6, 5, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"  # pyright: ignore


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_stay_what_they_are(dtype):
    images = np.random.default_rng(0).normal(size=(4, 6, 5, 3)).astype(dtype)
    data = make(train_images=images, test_images=images[:2])
    assert data.train_images is images and data.test_images.dtype == dtype


def test_other_integers_in_range_become_uint8_and_say_so():
    images = np.full((4, 6, 5, 3), 255, np.int64)
    with pytest.warns(UserWarning, match="train_images of 'toy': int64 pixels stored as uint8"):
        data = make(train_images=images)
    assert data.train_images.dtype == np.uint8 and data.train_images.min() == 255


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_images": np.zeros((4, 6, 5), np.uint8)}, r"train_images of 'toy'.*\[4, 6, 5\]"),
        ({"test_images": np.zeros((2, 6, 4, 3), np.uint8)}, r"\[6, 5, 3\] in train.*\[6, 4, 3\]"),
        ({"test_images": np.zeros((2, 6, 5, 3), np.float32)}, "uint8 in train but float32 in test"),
        ({"train_images": np.full((4, 6, 5, 3), 256)}, "int64 from 256 to 256: give uint8"),
        ({"train_images": np.full((4, 6, 5, 3), -1, np.int8)}, "int8 from -1 to -1: give uint8"),
        ({"train_images": np.zeros((4, 6, 5, 3), bool)}, "dtype bool: give uint8"),
        ({"train_images": np.zeros((4, 6, 5, 3), complex)}, "dtype complex128: give plain numbers"),
        ({"train_images": np.zeros((4, 3, 8, 8), np.uint8)}, "move the channels last"),
        (
            {"test_images": np.zeros((0, 6, 5, 3), np.uint8), "test_labels": np.zeros(0, int)},
            "test_images of 'toy'.*no axis may be empty",
        ),
        ({"train_labels": np.array([0, 1, 2])}, "number 4 but train_labels of 'toy' 3"),
        ({"train_labels": np.array([0, 1, 3, 1])}, r"run from 0 to 3 .* lie in 0\.\.2"),
        ({"test_labels": np.array([-1, 0])}, "test_labels of 'toy' run from -1"),
        ({"train_labels": np.array([0.0, 1.0, 2.0, 1.0])}, "classes, store them as integers; if they are numbers"),
        (
            {"train_labels": np.eye(4, dtype=int)},
            r"has a single 1 in every row: .* store y.argmax\(1\); if they are attributes",
        ),
        ({"train_labels": np.ones(4, int)}, "all training images of 'toy' are of one class"),
        ({"class_names": ("a",)}, r"1 class name\(s\).*at least two"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("split, count", [("train", 4), ("test", 2)])
def test_not_finite_pixels_are_refused(value, split, count):
    images = {
        "train_images": np.zeros((4, 6, 5, 3), np.float32),
        "test_images": np.zeros((2, 6, 5, 3), np.float32),
    }
    images[f"{split}_images"][count - 1, 2, 3, 1] = value
    message = f"{split}_images of 'toy': image {count - 1} holds NaN or infinite"
    with pytest.raises(InputError, match=message):
        make(**images)


def test_encoded_labels_keep_the_values_as_names():
    (train, test), names = encode_labels(np.array([1, 26, 5, 1]), np.array([26, 26]))
    assert [names[i] for i in train] == ["1", "26", "5", "1"]
    assert [names[i] for i in test] == ["26", "26"]
    (train, val, test), names = encode_labels(["eel", "cat", "eel"], np.array([["cat"]]), [b"eel"])
    assert [[names[i] for i in part] for part in (train, val, test)] == [["eel", "cat", "eel"], ["cat"], ["eel"]]
    (ids,), names = encode_labels(np.array([2_000_006, 47_219, 2_000_006]))
    assert ids.tolist() == [1, 0, 1] and names == ("47219", "2000006")
    with pytest.raises(InputError, match=r"labels hold \[4\], which no training image has"):
        encode_labels(np.array([1, 2]), np.array([4]))
    with pytest.raises(InputError, match="train labels hold -1: labels must be >= 0"):
        encode_labels(np.array([0, -1]), np.array([0]))
    with pytest.raises(InputError, match=r"labels 2 has dtype float64: give integer class numbers .* or names"):
        encode_labels(np.array([0, 1]), np.array([0.5]))


def test_check_labels_flattens_a_column():
    assert check_labels(np.array([[3], [4]], np.int8), "y").tolist() == [3, 4]
    with pytest.raises(InputError, match=r"y has shape \[2, 2\]"):
        check_labels(np.zeros((2, 2), int), "y")


def test_import_leaves_the_slow_libraries_alone():
    code = "import sys, mae_align.data; print([m for m in ('sklearn', 'PIL') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
