from __future__ import annotations

import numpy as np
import pytest

from experiments.learning_dynamics.spectrum import (
    ImageMap,
    Images,
    Spectrum,
    image_map,
    reassign,
    rotate_pixels,
)
from mae_align import InputError, Moments
from mae_align.data.frequency import mean_frequency

SHAPE = (4, 3, 2)


def images(n: int = 200) -> np.ndarray:
    """Bytes with a wide spectrum; one pixel never varies and two are the same."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 24)) @ (rng.normal(size=(24, 24)) * np.geomspace(30, 1, 24)[:, None]) + 128
    x[:, 5], x[:, 7] = 9, x[:, 8]
    return np.clip(x, 0, 255).astype(np.uint8).reshape(n, *SHAPE)


@pytest.fixture(scope="module")
def spectrum() -> Spectrum:
    return Spectrum.of(Moments.from_arrays(images()))


def moved_by(spectrum: Spectrum, kind: Images) -> ImageMap:
    return image_map(kind, spectrum, 6, 3)


def covariance(x: np.ndarray) -> np.ndarray:
    return np.cov(x.reshape(len(x), -1).astype(np.float64), rowvar=False, bias=True)


def test_spectrum_is_that_of_the_covariance(spectrum):
    x = images()
    values = np.linalg.eigvalsh(covariance(x))[::-1]
    # A constant pixel and a doubled one: two directions without variance.
    assert spectrum.rank == 22
    np.testing.assert_allclose(spectrum.values, values[:22], rtol=1e-9)
    coordinates = spectrum.centred(x) @ spectrum.vectors
    np.testing.assert_allclose(coordinates.T @ coordinates / len(x), np.diag(spectrum.values), atol=1e-8)
    np.testing.assert_array_equal(spectrum.first(3).vectors, spectrum.vectors[:, :3])


@pytest.mark.parametrize("kind", Images)
def test_covariance_of_what_a_map_gives_is_the_one_it_states(spectrum, kind):
    moved = moved_by(spectrum, kind)
    x = moved.apply(images())
    assert x.dtype == np.float32
    assert x.shape == (200, *SHAPE)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    v, s = moved.spectrum.vectors, moved.spectrum.values
    np.testing.assert_allclose(covariance(x), (v * s) @ v.T, atol=2e-5)
    np.testing.assert_allclose(v.T @ v, np.eye(len(s)), atol=1e-10)
    assert (np.diff(s) <= 1e-12).all()
    assert s.sum() == pytest.approx(24)


def test_maps_on_the_spectrum_deal_out_the_same_variances_on_the_same_directions(spectrum):
    top = moved_by(spectrum, Images.top).spectrum
    np.testing.assert_allclose(top.vectors, spectrum.vectors[:, :6])
    for kind in (Images.reversed, Images.permuted):
        np.testing.assert_allclose(moved_by(spectrum, kind).spectrum.values, top.values)
    np.testing.assert_allclose(moved_by(spectrum, Images.whitened).spectrum.values, 4.0)
    np.testing.assert_allclose(moved_by(spectrum, Images.reversed).spectrum.vectors, top.vectors[:, ::-1])
    dealt = moved_by(spectrum, Images.permuted).spectrum.vectors
    assert not np.allclose(np.abs(dealt.T @ top.vectors), np.eye(6), atol=0.1)
    np.testing.assert_allclose(np.abs(dealt.T @ top.vectors).sum(0), 1, atol=1e-9)
    assert not np.array_equal(dealt, image_map(Images.permuted, spectrum, 6, 4).spectrum.vectors)


def test_maps_of_pixels_keep_distances_and_a_shuffle_keeps_channels_together(spectrum):
    x, rotated, shuffled = (
        moved_by(spectrum, kind).apply(images()) for kind in (Images.original, Images.rotated, Images.shuffled)
    )
    for y in (rotated, shuffled):
        distances = [((z[0] - z[1:]) ** 2).sum((1, 2, 3)) for z in (x, y)]
        np.testing.assert_allclose(*distances, rtol=1e-4)
        assert not np.allclose(x, y, atol=0.1)
    places = {tuple(p) for p in x[0].reshape(12, 2).round(4).tolist()}
    assert {tuple(p) for p in shuffled[0].reshape(12, 2).round(4).tolist()} == places


def test_rotations_are_uniform():
    """The first entry of a uniform rotation has mean 0 and variance 1 / d; without the signs it is never negative."""
    s = Spectrum((1, 3, 1), np.zeros(3), np.eye(3), np.ones(3))
    entries = np.array([rotate_pixels(s, seed).matrix[0, 0] for seed in range(400)])
    assert abs(entries.mean()) < 4 * np.sqrt(1 / 3 / 400)
    assert entries.var() == pytest.approx(1 / 3, abs=0.08)


def test_bad_input_is_refused(spectrum):
    for count in (0, 23):
        with pytest.raises(InputError, match=f"^{count} directions: these images have variance in 22"):
            image_map(Images.whitened, spectrum, count, 0)
    with pytest.raises(InputError, match="a variance is not positive"):
        reassign(spectrum, np.array([1.0, 0.0]))
    with pytest.raises(InputError, match="images have shape"):
        spectrum.centred(np.zeros((2, 3, 4, 2)))
    with pytest.raises(InputError, match="all images are the same"):
        Spectrum.of(Moments.from_arrays(np.ones((3, 2, 2, 1), np.uint8)))
    with pytest.raises(InputError, match="about zero"):
        Spectrum.of(Moments.from_arrays(images(), center=False))


def test_mean_frequency_of_waves():
    """A wave of f cycles per pixel has frequency f, and a mixture the mean weighted with energy."""
    y, x = np.indices((8, 12))
    waves = np.stack([np.cos(2 * np.pi * 3 * x / 12), np.cos(2 * np.pi * (2 * y / 8 + 3 * x / 12)), 0.0 * x])[..., None]
    np.testing.assert_allclose(mean_frequency(waves), [0.25, np.hypot(0.25, 0.25), np.nan], atol=1e-12)
    two = np.concatenate([waves[0], 2 * waves[1]], axis=-1)
    assert mean_frequency(two) == pytest.approx((0.25 + 4 * np.hypot(0.25, 0.25)) / 5)
    with pytest.raises(InputError, match="images have shape"):
        mean_frequency(np.ones((3, 3)))
