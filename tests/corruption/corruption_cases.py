"""What tests of corruptions share."""

from __future__ import annotations

import numpy as np

from mae_align.corruption import CleanImages
from mae_align.data.patches import ImageShape
from tests import oracles
from tests.oracles import SHAPE

X = oracles.draw(9, 80).x
MEAN = X.mean(0)
SXX = (X - MEAN).T @ (X - MEAN) / len(X)
IMAGES = X.reshape(-1, *SHAPE)
CLEAN = CleanImages(SXX, MEAN, SHAPE, images=IMAGES)
# With the fixed seeds below the largest of some thousand standard scores stays under this: P < 1e-6 each.
LIMIT = 5.0


def spd(d: int, seed: int = 0) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(d, d))
    return root @ root.T + 0.1 * np.eye(d)


def about_zero(sxx: np.ndarray, shape: ImageShape) -> CleanImages:
    """Clean images of this covariance and mean 0."""
    return CleanImages(sxx, np.zeros(len(sxx)), shape)


def assert_within_error(estimate: np.ndarray, expected: np.ndarray, standard_error: np.ndarray) -> None:
    """Standard scores under the limit, and equality where there is nothing random."""
    scale = np.abs(expected).max() + 1e-30
    fixed = standard_error <= 1e-12 * scale
    np.testing.assert_allclose(estimate[fixed], expected[fixed], atol=1e-11 * scale)
    scores = (estimate - expected)[~fixed] / standard_error[~fixed]
    assert np.abs(scores).max(initial=0.0) < LIMIT
