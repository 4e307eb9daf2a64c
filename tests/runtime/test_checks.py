from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mae_align.runtime.checks import are_class_labels, as_array, as_targets, check_images, check_labels, check_targets
from mae_align.runtime.errors import InputError


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (np.array([0, 2, 1]), True),
        (np.array([0, 2], np.uint8), True),
        (np.array([False, True]), True),
        (np.array([0.0, 2.0]), False),
        (np.array([[0], [2]]), False),
        (np.array(["0", "2"]), False),
        (np.array(3), False),
    ],
)
def test_class_labels_are_integers_in_one_axis(targets, expected):
    assert are_class_labels(targets) is expected


def test_class_labels_may_be_a_list():
    assert are_class_labels([3, 1])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_images_pass_unchanged(dtype):
    images = np.arange(24).reshape(2, 3, 2, 2).astype(dtype)
    assert check_images(images) is images


def test_half_precision_images_become_float32():
    images = np.array([0.1, 65504.0, -6e-8, 1.0], np.float16).reshape(1, 2, 2, 1)
    checked = check_images(images)
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, images.astype(np.float32))


BAD_IMAGES = {
    "no channel axis": (np.zeros((5, 4, 4)), r"shape \[5, 4, 4\].*give \[n, h, w, c\].*channel axis"),
    "flat": (np.zeros((5, 16)), r"shape \[5, 16\]"),
    "no images": (np.zeros((0, 4, 4, 1)), r"shape \[0, 4, 4, 1\]: no axis may be empty"),
    "no pixels": (np.zeros((5, 4, 0, 1)), "no axis may be empty"),
    "no channels": (np.zeros((5, 4, 4, 0), np.uint8), "no axis may be empty"),
    "int64": (np.zeros((5, 4, 4, 1), np.int64), "dtype int64: give uint8 or a floating type"),
    "int8": (np.zeros((5, 4, 4, 1), np.int8), "dtype int8"),
    "bool": (np.zeros((5, 4, 4, 1), bool), "dtype bool"),
    "complex": (np.zeros((5, 4, 4, 1), np.complex64), "dtype complex64"),
    "objects": (np.zeros((5, 4, 4, 1), object), "dtype object"),
    "text": (np.full((5, 4, 4, 1), "a"), "dtype <U1"),
    "channels first": (np.zeros((5, 3, 8, 8), np.uint8), r"looks like \[n, c, h, w\].*np.moveaxis\(images, 1, -1\)"),
    "channels first, not square": (np.zeros((5, 3, 8, 6), np.uint8), r"looks like \[n, c, h, w\]"),
    "grey, channels first": (np.zeros((5, 1, 28, 28)), r"looks like \[n, c, h, w\].*np.swapaxes\(images, 1, 2\)"),
    "masked": (np.ma.masked_less(np.arange(16.0).reshape(1, 4, 4, 1), 3), "masked entries"),
}


@pytest.mark.parametrize(
    "shape", [(5, 3, 3, 3), (5, 1, 1, 64), (5, 1, 9, 3), (5, 8, 8, 12), (5, 3, 4, 9), (5, 28, 1, 5)]
)
def test_low_pictures_and_features_are_no_channels_first(shape):
    assert check_images(np.zeros(shape)).shape == shape


def test_bfloat16_becomes_float32_exactly():
    values = jnp.asarray([0.1, 3e38, -1e-38, 257.0], jnp.bfloat16)
    found = as_array(values, "features")
    assert found.dtype == np.float32 and (found == np.asarray(values.astype(jnp.float32))).all()
    assert check_images(np.asarray(values.reshape(1, 2, 2, 1))).dtype == np.float32


class NotAnArray:
    """Like a tensor with gradients."""

    def __array__(self, *arguments, **options):
        raise RuntimeError("cannot be converted: detach it first\nand so on")


def test_what_cannot_be_read_says_why_in_one_line():
    with pytest.raises(
        InputError, match=r"^images cannot be read as an array \(cannot .*: detach it first\): give"
    ) as refused:
        check_images(NotAnArray())  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([[2], [0]], np.uint8), [2, 0]),
        ([[2], [0]], [2, 0]),
        (np.array([[0.5], [1.0]]), [[0.5], [1.0]]),
        (np.array([[0, 1], [1, 1]]), [[0, 1], [1, 1]]),
        (np.array([[-1, 1], [1, 1]]), [[-1, 1], [1, 1]]),
        (np.array([[True, False]]), [[True, False]]),
    ],
)
def test_a_column_of_whole_numbers_is_class_labels_and_attributes_are_numbers(given, expected):
    assert as_targets(given).tolist() == expected


def test_columns_of_whole_numbers_that_may_be_classes_or_numbers_are_refused():
    with pytest.raises(
        InputError, match=r"whole numbers \[2, 2\]: if they are class labels, .*if they are numbers, give f"
    ):
        as_targets(np.array([[0, 3], [1, 2]]))


def test_labels_with_large_gaps_are_refused_before_memory_follows_them():
    with pytest.raises(InputError, match=r"labels run up to 2000006, but only 2 are different: .*ma.encode_labels"):
        check_labels(np.array([47_219, 2_000_006]), None)
    assert check_labels(np.arange(12_000), None)[1] == 12_000  # so many people
    assert check_labels(np.array([3, 999]), None)[1] == 1000  # a few of the classes of ImageNet
    assert check_labels(np.array([3, 2_000_006]), 2_000_007)[1] == 2_000_007  # said


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused_with_what_to_do(case):
    images, message = BAD_IMAGES[case]
    with pytest.raises(InputError, match=message):
        check_images(images)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_image_that_is_not_finite_is_named(dtype, value):
    images = np.zeros((6, 3, 2, 2), dtype)
    images[4, 2, 1, 1] = images[5, 0, 0, 0] = value
    with pytest.raises(InputError, match="image 4 holds NaN or infinite pixels"):
        check_images(images)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_labels_become_one_hot_rows(dtype):
    labels = np.array([2, 0, 2, 1], dtype)
    expected = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    rows = check_targets(labels, 4, None)
    assert rows.dtype == np.float64
    assert rows.tolist() == expected
    assert check_targets(labels, 4, 5).tolist() == [row + [0.0, 0.0] for row in expected]


def test_one_class_of_several_is_allowed_where_the_number_of_classes_is_given():
    assert check_targets(np.array([1, 1]), 2, 3).tolist() == [[0.0, 1.0, 0.0]] * 2


def test_numbers_pass_as_float64_rows():
    column = check_targets(np.array([0.5, -2.0, 1e9], np.float32), 3, None)
    assert column.dtype == np.float64
    assert column.tolist() == [[0.5], [-2.0], [1e9]]
    several = check_targets(np.array([[1, 0], [1, 1], [0, 0]]), 3, None)
    assert several.dtype == np.float64
    assert several.tolist() == [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


BAD_TARGETS = {
    "too few": (np.array([0, 1]), None, "3 images but 2 targets: give one target per image"),
    "too many": (np.zeros((4, 2)), None, "3 images but 4 targets"),
    "negative label": (np.array([-1, 0, 1]), None, r"labels run from -1 to 1, outside 0\.\.1: relabel"),
    "label over the number of classes": (np.array([0, 3, 1]), 3, r"from 0 to 3, outside 0\.\.2.*num_classes"),
    "one class": (np.array([0, 0, 0]), None, "all labels are one class: a task needs at least two"),
    "one class by number": (np.array([0, 0, 0]), 1, "one class"),
    "num_classes for floats": (np.array([0.0, 1.0, 2.0]), 3, "num_classes goes with a 1-d integer label array"),
    "num_classes for a matrix": (np.zeros((3, 2)), 2, "num_classes goes with"),
    "three axes": (np.zeros((3, 2, 2)), None, r"shape \[3, 2, 2\] and dtype float64: give integer labels"),
    "text": (np.array(["a", "b", "c"]), None, r"targets are text: .*ma.encode_labels"),
    "complex": (np.zeros((3, 1), complex), None, "dtype complex128"),
    "NaN": (np.array([0.0, np.nan, 1.0]), None, "targets hold NaN or infinite values"),
    "infinite": (np.array([[0.0], [np.inf], [1.0]]), None, "targets hold NaN or infinite values"),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_bad_targets_are_refused_with_what_to_do(case):
    targets, num_classes, message = BAD_TARGETS[case]
    with pytest.raises(InputError, match=message):
        check_targets(targets, 3, num_classes)
