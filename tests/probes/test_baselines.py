from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from mae_align import InputError, Moments
from mae_align.probes import compare_features, knn_probe, principal_components, raw_pixels, ridge_probe

PIXELS, LABELS = (np.asarray(part) for part in load_digits(return_X_y=True))
IMAGES = PIXELS.astype(np.uint8).reshape(-1, 8, 8, 1)
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


@pytest.mark.parametrize("probe", [ridge_probe, partial(knn_probe, neighbors=[5])])
def test_one_probe_on_several_features(probe):
    moments = Moments.from_arrays(IMAGES[TRAIN])
    encoders = {
        "pixels": raw_pixels,
        "2 components": partial(principal_components, moments, count=2),
    }
    found = compare_features(probe, encoders, IMAGES[TRAIN], LABELS[TRAIN], IMAGES[TEST], LABELS[TEST])
    assert list(found) == list(encoders) == [r.protocol.features for r in found.values()]
    assert found["2 components"].accuracy_test < 0.65 < 0.8 < found["pixels"].accuracy_test
    alone = probe(raw_pixels(IMAGES[TRAIN]), LABELS[TRAIN], raw_pixels(IMAGES[TEST]), LABELS[TEST], features="pixels")
    assert alone.as_dict().items() >= {("accuracy_test", found["pixels"].accuracy_test), ("features", "pixels")}
    # One split for all: the same samples are fitted on.
    assert len({(r.protocol.n_train, r.protocol.n_val, r.protocol.seed) for r in found.values()}) == 1


def test_bad_input():
    moments = Moments.from_arrays(IMAGES[TRAIN])
    for call, message in (
        (lambda: principal_components(moments, IMAGES, 65), "from 1 to 64"),
        (lambda: principal_components(moments, IMAGES, 0), "from 1 to 64"),
        (lambda: principal_components(moments, IMAGES[:, :4], 2), "moments of [8, 8, 1]"),
        (lambda: raw_pixels(IMAGES[..., 0]), "[n, h, w, c]"),
        (lambda: compare_features(ridge_probe, {}, IMAGES, LABELS, IMAGES, LABELS), "no encoders"),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
