from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_align import InputError
from mae_align.data.frequency import band_edges, band_energy, error_by_band, radial_bands

SIZES: list[tuple[int, int]] = [(4, 4), (5, 3), (6, 9), (1, 8)]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_every_frequency_lies_in_the_band_of_its_radius(height, width, num_bands):
    masks = radial_bands(height, width, num_bands)
    assert masks.shape == (num_bands, height, width) and (masks.sum(0) == 1).all()
    edges = band_edges(num_bands)
    for u in range(height):
        for v in range(width):
            # Whole numbers of cycles, folded at Nyquist.
            radius = np.hypot(min(u, height - u) / height, min(v, width - v) / width)
            b = masks[:, u, v].argmax()
            assert edges[b] <= radius + 1e-12 and (radius < edges[b + 1] + 1e-12 or b == num_bands - 1)


@pytest.mark.parametrize("size", SIZES)
def test_energies_add_up_to_the_sum_of_squares(size):
    num_bands = 5
    x = np.random.default_rng(0).normal(size=(2, 3, *size, 2)).astype(np.float32)
    energy = np.asarray(band_energy(x, num_bands))
    assert energy.shape == (2, 3, num_bands)
    np.testing.assert_allclose(energy.sum(-1), (x.astype(np.float64) ** 2).sum((-3, -2, -1)), rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_energy_is_that_of_the_explicit_transform(size):
    x = np.random.default_rng(1).normal(size=(*size, 3))
    transforms = [np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) / np.sqrt(n) for n in size]
    spectrum = np.einsum("uh,vw,hwc->uvc", *transforms, x)
    expected = [(np.abs(spectrum[mask]) ** 2).sum() for mask in radial_bands(size[0], size[1], 4)]
    np.testing.assert_allclose(band_energy(x.astype(np.float32), 4), expected, rtol=1e-4, atol=1e-5 * sum(expected))


@pytest.mark.parametrize(("cycles", "band"), [((0, 0), 0), ((1, 0), 0), ((0, 3), 2), ((2, 2), 2), ((4, 4), 4)])
def test_a_wave_has_all_its_energy_in_the_band_of_its_frequency(cycles, band):
    h, w = np.indices((8, 8))
    wave = np.cos(2 * np.pi * (cycles[0] * h + cycles[1] * w) / 8)[..., None]
    energy = np.asarray(band_energy(wave.astype(np.float32), 5))
    # Radii 0, .125, .375, .354 and .707 of a range cut every .141.
    assert energy.argmax() == band and energy[band] == pytest.approx((wave**2).sum(), rel=1e-5)


def part(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What a band of frequencies holds of images."""
    return np.real(np.fft.ifft2(np.fft.fft2(images, axes=(-3, -2)) * mask[..., None], axes=(-3, -2)))


def test_traced_as_outside():
    x = np.random.default_rng(3).normal(size=(2, 6, 5, 1)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(band_energy, static_argnums=1)(x, 3), band_energy(x, 3), rtol=1e-6)


def test_errors_of_a_reconstruction_by_band():
    rng = np.random.default_rng(4)
    x = rng.integers(0, 256, (1030, 6, 7, 2)).astype(np.uint8)
    mean = x.mean(0)
    # Loses a third of the first band, all of the second, nothing of the others.
    first, second = (part(x - mean, m) for m in radial_bands(6, 7, 4)[:2])
    lost = first / 3 + second
    found = error_by_band(x, (x - lost).astype(np.float32), 4)
    np.testing.assert_allclose(found.share, [1 / 9, 1, 0, 0], atol=1e-4)
    centred = x.astype(np.float64) - mean
    assert found.energy.sum() == pytest.approx((centred**2).sum() / len(x), rel=1e-5)
    assert found.error.sum() == pytest.approx((lost.astype(np.float64) ** 2).sum() / len(x), rel=1e-4)
    shifted = error_by_band(x, x, 4, mean_image=mean + 1.0)
    # The constant has 6 * 7 pixels of 1 in 2 channels.
    assert shifted.energy[0] - found.energy[0] == pytest.approx(84, rel=1e-3)
    assert (shifted.error == 0).all() and shifted.error.dtype == np.float64


def test_bands_without_variance_have_no_share():
    x = np.arange(3.0).reshape(3, 1, 1, 1) * np.ones((1, 4, 4, 1))
    found = error_by_band(x, x + 1, 3)
    assert found.share[0] == pytest.approx(1.5) and np.isnan(found.share[1:]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: band_edges(0), "at least 1"),
        (lambda: band_edges(True), "at least 1"),
        (lambda: radial_bands(0, 3, 2), "no frequencies"),
        (lambda: band_energy(np.zeros((4, 4)), 2), "give [..., h, w, c]"),
        (lambda: error_by_band(np.zeros((2, 4, 4, 1)), np.zeros((2, 4, 3, 1)), 2), "one for each"),
        (lambda: error_by_band(np.zeros((2, 4, 4, 1)), np.full((2, 4, 4, 1), np.nan), 2), "NaN"),
        (
            lambda: error_by_band(np.zeros((2, 4, 4, 1)), np.zeros((2, 4, 4, 1)), 2, mean_image=np.zeros(16)),
            "mean_image of shape [16]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
