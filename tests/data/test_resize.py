from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mae_align.data import ImageDataset
from mae_align.data.resize import resize_dataset, resize_images
from mae_align.runtime.errors import InputError


def bicubic_matrix(n: int, m: int) -> np.ndarray:
    """Antialiased bicubic resampling from n to m samples [m, n], from the kernel's definition."""
    scale = max(n / m, 1.0)
    centre = (np.arange(m) + 0.5) * n / m
    t = np.abs((np.arange(n)[None, :] + 0.5 - centre[:, None]) / scale)
    a = -0.5
    weights = np.where(
        t < 1,
        (a + 2) * t**3 - (a + 3) * t**2 + 1,
        np.where(t < 2, a * (t**3 - 5 * t**2 + 8 * t - 4), 0.0),
    )
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [5, 8, 20])
@pytest.mark.parametrize("dtype, atol", [(np.uint8, 1.0), (np.float32, 1e-3), (np.float64, 1e-3)])
def test_equals_the_kernel(size, dtype, atol):
    # Smooth images stay within 0..255, so that uint8 is not clipped.
    y, x = np.mgrid[:12, :12]
    planes = [128 + 60 * np.sin(0.4 * x + k) + 50 * np.cos(0.3 * y * k) for k in range(1, 7)]
    images = np.stack(planes).reshape(2, 3, 12, 12).transpose(0, 2, 3, 1).astype(dtype)
    matrix = bicubic_matrix(12, size)
    expected = np.einsum("ih,nhwc,jw->nijc", matrix, images.astype(float), matrix)
    out = resize_images(images, size)
    assert out.dtype == dtype and out.shape == (2, size, size, 3)
    np.testing.assert_allclose(out, expected, atol=atol)


def test_shrinking_does_not_alias():
    stripes = np.zeros((1, 64, 64, 1), np.uint8)
    stripes[:, :, ::2] = 200
    inner = resize_images(stripes, 16)[0, :, 2:-2, 0]
    assert abs(inner.astype(int) - 100).max() <= 2
    # The same filter without antialiasing keeps the stripes' own values.
    picture = Image.fromarray(stripes[0, :, :, 0])
    assert np.asarray(picture.resize((16, 16), Image.Resampling.NEAREST)).std() == 0


def test_oblong_images_keep_their_centre_square():
    images = np.zeros((1, 8, 20, 1), np.uint8)
    images[:, :, 6:14] = np.arange(64, dtype=np.uint8).reshape(8, 8)[None, :, :, None]
    np.testing.assert_array_equal(resize_images(images, 8)[0, :, :, 0], images[0, :, 6:14, 0])
    upright = images.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(resize_images(upright, 8)[0, :, :, 0], upright[0, 6:14, :, 0])


def test_dataset_of_that_size_is_left_alone():
    x, y = np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1])
    data = ImageDataset(x, y, x, y, ("a", "b"), "toy")
    assert resize_dataset(data, 8) is data
    assert resize_dataset(data, 3).test_images.shape == (2, 3, 3, 1)
    with pytest.raises(InputError, match="image_size 0: give one side"):
        resize_dataset(data, 0)
