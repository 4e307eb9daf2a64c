from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from mae_align import InputError, Moments
from mae_align.probes import principal_components, raw_pixels

IMAGES = np.asarray(load_digits(return_X_y=True)[0], np.uint8).reshape(-1, 8, 8, 1)
TRAIN, TEST = slice(0, 600), slice(600, 1000)


def test_components_are_those_of_scikit_learn():
    model = PCA(10, svd_solver="full").fit(IMAGES[TRAIN].reshape(600, -1).astype(np.float64))
    expected = model.transform(IMAGES[TEST].reshape(-1, 64).astype(np.float64))
    found = principal_components(Moments.from_arrays(IMAGES[TRAIN]), IMAGES[TEST], 10)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-4, atol=1e-3)


def test_components_without_variance_are_constant_features():
    # Three of the 64 pixels of a digit are always black.
    moments = Moments.from_arrays(IMAGES[TRAIN])
    rank = np.linalg.matrix_rank(IMAGES[TRAIN].reshape(600, -1) - moments.mean_x)
    found = principal_components(moments, IMAGES[TRAIN], 64)
    assert rank < 64 and (found.std(0) > 1e-3).sum() == rank and (found[:, rank:] == 0).all()


def test_raw_pixels_stay_as_stored():
    found = raw_pixels(IMAGES)
    assert found.dtype == np.uint8 and found[5].tolist() == IMAGES[5].ravel().tolist()


def test_bad_input():
    moments = Moments.from_arrays(IMAGES[TRAIN])
    for call, message in (
        (lambda: principal_components(moments, IMAGES, 65), "from 1 to 64"),
        (lambda: principal_components(moments, IMAGES, 0), "from 1 to 64"),
        (lambda: principal_components(moments, IMAGES[:, :4], 2), "moments of [8, 8, 1]"),
        (lambda: raw_pixels(IMAGES[..., 0]), "[n, h, w, c]"),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
