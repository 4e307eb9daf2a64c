from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits as reference

from mae_align.data.digits import load_digits
from mae_align.runtime.errors import InputError


def rows(images: np.ndarray, labels: np.ndarray) -> list[tuple[int, ...]]:
    """Every sample as a tuple of pixels and label, sorted."""
    return sorted(map(tuple, np.column_stack([images.reshape(len(images), -1), labels]).astype(int)))


def test_all_digits_with_their_labels():
    data = load_digits(seed=4, test_fraction=0.25)
    x, y = reference(return_X_y=True)
    images = np.concatenate([data.train_images, data.test_images])
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert rows(images, labels) == rows(np.asarray(x), np.asarray(y))
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 1) and images.max() == 16
    assert data.class_names == tuple("0123456789")


def test_split_is_seeded_and_stratified():
    once, again, other = (load_digits(seed, 0.25) for seed in (4, 4, 5))
    np.testing.assert_array_equal(once.test_images, again.test_images)
    assert not np.array_equal(once.test_images, other.test_images)
    shares = np.bincount(once.test_labels) / np.bincount(np.concatenate([once.train_labels, once.test_labels]))
    np.testing.assert_allclose(shares, 0.25, atol=0.5 / 170)


def test_bad_fraction_is_refused():
    with pytest.raises(InputError, match=r"fraction 1.5"):
        load_digits(0, 1.5)
