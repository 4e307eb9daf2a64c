"""Split that one experiment still makes itself."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledSplit:
    """Images [n, h, w, c] in stored units and labels [n] for training, choosing and reporting."""

    name: str
    num_classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    description: str
