"""Units do not matter: images of any size have the moments of the same images in other units."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import mae_align as ma
from mae_align.moments.accumulate import check_batch, pivots
from mae_align.probes import ridge_probe

RNG = np.random.default_rng(0)
LABELS = np.arange(300) % 3
# Whole numbers, so that a power of two is the only thing that changes.
IMAGES = (RNG.integers(0, 200, (300, 3, 3, 1)) + 20 * LABELS[:, None, None, None]).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-105, 105), groups=st.sampled_from([1, 3]))
def test_moments_of_float32_images_are_those_in_other_units(exponent, groups):
    """Against direct float64 sums; 2^105 times 255 is inside the range of float32, its square is far outside."""
    unit = 2.0**exponent
    m = ma.Moments.from_arrays((IMAGES * np.float32(unit)).astype(np.float32), LABELS, groups=groups)
    x, y = IMAGES.reshape(300, -1).astype(np.float64), np.eye(3)[LABELS]
    centred = x - x.mean(0)
    np.testing.assert_allclose(m.sxx / unit**2, centred.T @ centred / 300, rtol=1e-6, atol=1e-6 * 3000)
    np.testing.assert_allclose(m.sxy / unit, centred.T @ y / 300, rtol=1e-6, atol=1e-6 * 60)
    np.testing.assert_allclose(m.mean_x / unit, x.mean(0), rtol=1e-6)


@pytest.mark.parametrize("unit", [1e-26, 1e-22, 3.63e-20, 1e-3, 1e12, 1e17])
def test_sweeps_and_probes_do_not_see_the_unit(unit):
    small = (IMAGES * unit).astype(np.float32)
    sweeps = [ma.masking_sweep(ma.Moments.from_arrays(x, LABELS), [2], [0.5]).r2.values for x in (IMAGES, small)]
    np.testing.assert_allclose(sweeps[1], sweeps[0], atol=1e-6)
    assert (sweeps[1] <= 1 + 1e-9).all()
    found = [
        ridge_probe(x[:200], LABELS[:200], x[200:], LABELS[200:]).accuracy_test
        for x in (IMAGES.reshape(300, -1), small.reshape(300, -1))
    ]
    assert found[0] == found[1] > 0.4


def test_streams_in_other_units_are_the_moments_of_arrays():
    small = (IMAGES * 1e-22).astype(np.float32)
    batches = [(small[i : i + 70], LABELS[i : i + 70]) for i in range(0, 300, 70)]
    streamed = ma.stream_moments(batches, num_classes=3)
    whole = ma.Moments.from_arrays(small, LABELS)
    np.testing.assert_allclose(streamed.sxx, whole.sxx, rtol=1e-5, atol=1e-6 * whole.sxx.max())


def test_the_usual_units_are_left_alone():
    """So that their bits are those of every earlier version."""
    for scale in (1.0, 1e-6, 255.0, 1e9):
        assert pivots(check_batch((IMAGES * scale).astype(np.float32), None, None))[2] == 1.0
    assert pivots(check_batch(np.zeros((2, 1, 1, 1), np.float32), None, None))[2] == 1.0
    unit = pivots(check_batch((IMAGES * 1e-20).astype(np.float32), None, None))[2]
    assert np.log2(unit) == round(np.log2(unit)) and 0.1 < 1e-18 / unit < 10


def test_sums_that_overflow_are_refused():
    images = np.ones((40, 2, 2, 1), np.float32)
    images[20:] = 3e38  # the first batch does not show it
    batches = [(images[i : i + 20],) for i in (0, 20)]
    with pytest.raises(ma.InputError, match=r"sums of these float32 images .*overflow: divide them by a power of two"):
        ma.stream_moments((batch, None) for (batch,) in batches)
