"""Numbers that are published, pinned: closed forms on bundled or generated data, each with its place and tolerance.

What the theorems say in general is held by tests/test_acceptance.py; these are the figures that a reader can look up.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

import mae_align as ma
from benchmarks.direct_method import authors_preprocessing, direct_point, patch_labels

# The published grid of Fig. 7: ten ratios from 0% to 99%, patches of 1, 2 and 4 pixels.
RATIOS = np.linspace(0.0, 0.99, 10)
PATCHES = (1, 2, 4)


@cache
def digits() -> tuple[ma.ImageDataset, ma.Moments, ma.Moments]:
    """The bundled digits with the split that the documents use: 1,438 training and 359 test images."""
    data = ma.load_dataset("digits")
    train = ma.Moments.from_arrays(data.train_images, data.train_labels)
    return data, train, ma.Moments.from_arrays(data.test_images, data.test_labels, groups=20)


def test_grid_of_figure_7_is_that_of_the_published_algorithm():
    """Eqs. 4 to 6 and 9 of arXiv 2402.11337 as its authors compute them, their jitter included, at all k.

    docs/results.md ("Speed and agreement") publishes differences below 5e-10 points on Fashion-MNIST.
    """
    data, _, _ = digits()
    x, y = authors_preprocessing(data.train_images, seed=0), np.eye(10)[data.train_labels]
    moments = ma.Moments.from_arrays(x.reshape(-1, 8, 8, 1), data.train_labels)
    ours = ma.masking_sweep(moments, list(PATCHES), RATIOS.tolist(), pixel_noise=0.0).alignment_percent
    for patch in PATCHES:
        for ratio in RATIOS:
            published = direct_point(x, y, patch_labels((8, 8, 1), patch), ratio)
            np.testing.assert_allclose(ours.sel(patch_size=patch, mask_ratio=ratio), published, rtol=0, atol=1e-8)
            assert published[-1] == pytest.approx(100.0, abs=1e-9)  # Fig. 2: every curve ends at 100%


def test_sixteen_components_of_the_digits_explain_as_much_as_published():
    """docs/results.md ("Supervision against reconstruction"): .568 in-sample, .562 on test images, whatever the noise.

    That isotropic noise changes neither is the paper's corollary of Theorem 3.
    """
    _, train, test = digits()
    found = ma.gaussian_sweep(train, [0.0, 0.1, 4.0, 100.0], eval_moments=test).sel(k=16)
    np.testing.assert_allclose(found.r2, 0.568, atol=5e-4)
    np.testing.assert_allclose(found.eval_r2, 0.562, atol=5e-4)
    assert np.ptp(found.r2.values) < 1e-12 and np.ptp(found.eval_r2.values) < 1e-12


def test_one_percent_of_reconstruction_error_buys_what_is_published():
    """docs/results.md: Theorem 1 on the digits at k = 16 gives .597 in-sample and .586 on test images.

    The experiment's grid of 41 lambdas, relative to tr Syy / tr Sxx with the floor of 1/12, straight between two.
    """
    _, train, test = digits()
    unit = np.trace(train.syy) / (np.trace(train.sxx) + train.num_pixels / 12)
    lambdas = [float(f"{x:.3g}") * unit for x in np.geomspace(1e-2, 1e3, 41)]
    found = ma.lambda_sweep(train, [*lambdas, math.inf], eval_moments=test, max_k=16).sel(k=16)
    error = found.reconstruction_mse.values
    assert (np.diff(error) < 0).all()
    bought = [np.interp(1.01 * error[-1], error[::-1], r2.values[::-1]) for r2 in (found.r2, found.eval_r2)]
    np.testing.assert_allclose(bought, (0.597, 0.586), atol=5e-4)


def test_masked_autoencoders_drop_three_quarters_and_act_like_a_little_more():
    """docs/theory.md, (11) and its table, for 49 visible of 196 patches (He et al., 2022: 75% of 14 x 14).

    An exact count acts like independent dropping at (N - n) / (N - 1) = 147 / 195; one ratio per image, uniform from
    0 to 1, like 1/3.
    """
    image = (224, 224, 3)
    mask = ma.FixedCountPatchMasking.from_ratio(16, 0.75, image)
    assert mask.num_visible == 49
    assert mask.p_eff(image) == pytest.approx(147 / 195, abs=1e-15)
    assert ma.RandomRatioMasking(16, 0.0, 1.0).p_eff(image) == pytest.approx(1 / 3, abs=1e-15)
    assert ma.PatchMasking(16, 0.75).p_eff(image) == 0.75


@pytest.mark.parametrize(("variance", "best"), [(1.9, 0), (2.1, 1)])
def test_noise_on_one_of_two_pixels_turns_the_best_feature_at_a_variance_of_two(variance, best):
    """docs/theory.md, 3.2: S = diag(2, 1) with noise of variance g on the first pixel has mu = (4 / (2 + g), 1)."""
    x = np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, math.sqrt(2)], [0.0, -math.sqrt(2)]]).reshape(4, 1, 2, 1)
    moments = ma.Moments.from_arrays(x, np.arange(4) % 2)
    np.testing.assert_allclose(moments.sxx, np.diag([2.0, 1.0]), atol=1e-15)
    noise = ma.GaussianNoise(np.array([math.sqrt(variance), 0.0]).reshape(1, 2, 1))
    model = ma.denoising_autoencoder(moments, noise, 1, pixel_noise=0.0)
    assert np.abs(model.encoder[:, 0]).argmax() == best
    assert np.abs(model.encoder[1 - best, 0]) < 1e-12
    # Loss: tr S less the largest mu.
    assert model.loss == pytest.approx(3.0 - max(4 / (2 + variance), 1.0), abs=1e-12)
