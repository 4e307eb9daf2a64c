from __future__ import annotations

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_align.runtime.errors import InputError
from mae_align.train.augment import Augmentation, augmented, random_crops

KEY = jax.random.key(0)


def test_nothing_is_done_by_default():
    images = jnp.ones((2, 3, 4, 1))
    assert Augmentation()(KEY, images) is images


def test_crops_are_windows_of_the_stated_area_and_aspect():
    """On an image of coordinates a crop is affine: its slopes are the sides of the window, its values the place."""
    size, count, smallest = 32, 200, 0.25
    ramp = jnp.arange(size, dtype=jnp.float32)
    one = jnp.stack(jnp.meshgrid(ramp, ramp, indexing="ij"), axis=-1)
    found = np.asarray(jax.jit(lambda key: random_crops(key, jnp.stack([one] * count), smallest))(KEY))
    rows, columns = found[:, :, size // 2, 0], found[:, size // 2, :, 1]
    # Away from the border, where there is nothing to interpolate with.
    inside = slice(4, -4)
    slopes = []
    for values in (rows, columns):
        steps = np.diff(values[:, inside], axis=1)
        np.testing.assert_allclose(steps, np.broadcast_to(steps[:, :1], steps.shape), atol=1e-3)
        slopes.append(steps.mean(1))
        assert values.min() > -1e-3 and values.max() < size - 1 + 1e-3
    area, aspect = slopes[0] * slopes[1], slopes[0] / slopes[1]
    # A side that would leave the image is cut off, which only makes the window smaller.
    assert area.min() > smallest * 0.86 and area.max() < 1 + 1e-3
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert area.std() > 0.1 and aspect.std() > 0.1
    first = rows[:, size // 2] - slopes[0] * (size // 2 + 0.5) + 0.5
    assert first.std() > 1.0 and first.min() > -1e-2  # crops lie at different places, inside the image
    # Other images in the batch change nothing.
    assert not np.allclose(found[0], found[1])


def test_images_are_mirrored_and_greyed_with_the_stated_probabilities():
    images = jax.random.uniform(KEY, (400, 2, 3, 3))
    found = np.asarray(jax.jit(Augmentation(flip=0.5, grey=0.2))(jax.random.key(1), images))
    plain = np.asarray(images)
    luma = plain @ np.array([0.299, 0.587, 0.114])
    grey = np.repeat(luma[..., None], 3, axis=-1)
    kinds = [plain, plain[:, :, ::-1], grey, grey[:, :, ::-1]]
    which = np.array([np.abs(found - kind).max(axis=(1, 2, 3)) < 1e-5 for kind in kinds])
    assert (which.sum(0) == 1).all()
    shares = which.mean(1)
    np.testing.assert_allclose(shares, [0.4, 0.4, 0.1, 0.1], atol=0.1)


def windows(image: np.ndarray, pad: int, flip: bool) -> Counter[bytes]:
    """The definition: every window of the reflected image, and its mirror images; some of them look the same."""
    h, w, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    found = Counter()
    for i, j, mirrored in itertools.product(range(2 * pad + 1), range(2 * pad + 1), (False, True)[: 1 + flip]):
        window = padded[i : i + h, j : j + w]
        found[(window[:, ::-1] if mirrored else window).tobytes()] += 1
    return found


@pytest.mark.parametrize("pad,flip", [(0, True), (2, False), (2, True)])
def test_every_draw_is_a_window_and_every_window_is_drawn_as_often_as_it_is_there(pad, flip):
    image = np.random.default_rng(0).normal(size=(4, 5, 2)).astype(np.float32)
    expected = windows(image, pad, flip)
    images = jnp.asarray(np.stack([image] * 2000))
    drawn = Counter(one.tobytes() for one in np.asarray(Augmentation(shift=pad, flip=0.5 * flip)(KEY, images)))
    assert drawn.keys() == expected.keys()
    for key, ways in expected.items():
        mean = 2000 * ways / expected.total()
        assert abs(drawn[key] - mean) < 5 * np.sqrt(mean)


def test_draws_follow_the_key():
    images, move = jnp.arange(48.0).reshape(3, 4, 4, 1), Augmentation(shift=3, flip=0.5)
    np.testing.assert_array_equal(move(KEY, images), move(KEY, images))
    assert (move(KEY, images) != move(jax.random.key(1), images)).any()


def test_the_objective_sees_the_moved_images_and_its_own_key():
    images = jnp.arange(48.0).reshape(3, 4, 4, 1)

    def objective(model, images, labels, key, member):
        return images, {"key": jax.random.key_data(key), "labels": labels, "model": model, "member": member}

    seen, rest = augmented(objective, Augmentation(shift=1))("m", images, "y", KEY, "member")  # pyright: ignore
    assert (seen != images).any() and set(np.unique(seen)) <= set(np.unique(images))
    np.testing.assert_array_equal(rest.pop("key"), jax.random.key_data(KEY))
    assert rest == {"labels": "y", "model": "m", "member": "member"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smallest_crop": 0.0}, "smallest_crop=0.0: give a share"),
        ({"smallest_crop": 1.5}, "smallest_crop=1.5: give a share"),
        ({"flip": -0.1}, "flip=-0.1: give a probability"),
        ({"grey": 2.0}, "grey=2.0: give a probability"),
        ({"shift": -1}, "shift=-1: give a number of pixels"),
        ({"shift": 1, "smallest_crop": 0.5}, "both move images: give one"),
        ({"shift": 4}, "shift=4 reaches over images of 4 x 8"),
        ({"grey": 0.5}, "images of 1 channels: only colour"),
    ],
)
def test_settings_and_images_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Augmentation(**settings)(KEY, jnp.zeros((1, 4, 8, 1)))
