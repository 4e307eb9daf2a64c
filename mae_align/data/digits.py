"""The 8 x 8 handwritten digits that scikit-learn bundles: real images without a download."""

from __future__ import annotations

import numpy as np

from mae_align.data.dataset import ImageDataset
from mae_align.data.split import stratified_split


def load_digits(seed: int, test_fraction: float) -> ImageDataset:
    """The 1,797 digits of 8 x 8 pixels, values 0..16 as uint8, split at random within each class.

    Args:
        seed: of the split.
        test_fraction: share of the test images, inside (0, 1).

    Returns:
        The data set, images [., 8, 8, 1] uint8, 10 classes.

    Raises:
        InputError: a fraction outside (0, 1) or a negative seed.

    Example:
        >>> load_digits(seed=0, test_fraction=0.2)
        ImageDataset('digits', train 1438, test 359, image 8x8x1 uint8, 10 classes)
    """
    # Imported here, for scikit-learn takes longer to import than JAX.
    from sklearn.datasets import load_digits as bundled_digits

    rows, labels = bundled_digits(return_X_y=True)
    images, labels = np.asarray(rows, np.uint8).reshape(-1, 8, 8, 1), np.asarray(labels)
    train, test = stratified_split(labels, test_fraction, seed)
    names = tuple(str(digit) for digit in range(10))
    return ImageDataset(images[train], labels[train], images[test], labels[test], names, name="digits")
