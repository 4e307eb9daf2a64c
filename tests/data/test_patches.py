from __future__ import annotations

import numpy as np
import pytest

from mae_align.data.patches import check_ratio, patch_grid, patch_hw, patch_labels
from mae_align.runtime.errors import InputError

# (image shape, patch size): dividing, ragged below, ragged right, ragged both ways, rectangular, the whole image.
GEOMETRIES = [
    ((4, 6, 1), 2),
    ((5, 4, 2), 2),
    ((4, 5, 3), 2),
    ((7, 5, 2), 3),
    ((6, 9, 2), (2, 3)),
    ((5, 8, 1), (4, 3)),
    ((3, 7, 3), (3, 1)),
    ((3, 4, 2), 1),
    ((4, 3, 2), (4, 3)),
]


def paint(image_shape: tuple[int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Patch index of every pixel value, by painting one patch after another onto a canvas."""
    height, width, _ = image_shape
    canvas = np.full(image_shape, -1)
    count = 0
    for top in range(0, height, size[0]):
        for left in range(0, width, size[1]):
            canvas[top : top + size[0], left : left + size[1], :] = count
            count += 1
    return canvas


@pytest.mark.parametrize(("image_shape", "patch_size"), GEOMETRIES)
def test_labels_and_grid_equal_painting(image_shape, patch_size):
    size = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
    painted = paint(image_shape, size)
    labels = patch_labels(image_shape, patch_size)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels.reshape(image_shape), painted)
    down, across = patch_grid(image_shape, patch_size)
    assert down * across == painted.max() + 1
    assert down == len(np.unique(painted[:, 0, 0]))
    assert across == len(np.unique(painted[0, :, 0]))


@pytest.mark.parametrize("size", [3, np.int64(3), np.uint8(3), (3, 3), [3, 3], (np.int32(3), 3)])
def test_patch_sizes_are_ints_or_pairs(size):
    pair = patch_hw(size)
    assert pair == (3, 3)
    assert [type(v) for v in pair] == [int, int]


def test_a_pair_is_height_and_width():
    assert patch_hw((2, 5)) == (2, 5)
    assert patch_grid((6, 10, 1), (2, 5)) == (3, 2)


@pytest.mark.parametrize("size", [0, -1, (2, 0), (0, 2), (-2, 2), (2,), (2, 2, 2), (2.0, 2), (2, None), "4", "44"])
def test_other_patch_sizes_are_refused(size):
    with pytest.raises(InputError, match=r"patch size .*: give a positive integer or a pair \(height, width\)"):
        patch_hw(size)


@pytest.mark.parametrize("size", [5, (5, 3), (1, 4)])
def test_patches_larger_than_the_image_are_refused(size):
    for function in (patch_grid, patch_labels):
        with pytest.raises(InputError, match=r"patch \dx\d is larger than the image 4x3: choose a smaller patch"):
            function((4, 3, 2), size)


@pytest.mark.parametrize("ratio", [0, 1, 0.0, 1.0, 0.5, 5e-324, np.float32(0.25), np.int64(1)])
def test_ratios_from_0_to_1_pass(ratio):
    check_ratio(ratio)


@pytest.mark.parametrize("ratio", [-1e-9, np.nextafter(1.0, 2.0), 2, np.nan, np.inf, -np.inf, np.float32(1.5)])
def test_other_ratios_are_refused(ratio):
    with pytest.raises(InputError, match=r"mask ratio .*: give a number from 0 to 1"):
        check_ratio(ratio)
