from __future__ import annotations

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mae_align as ma
from mae_align.train.augment import CropFlip, augmented

KEY = jax.random.key(0)


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
    drawn = Counter(
        one.tobytes() for one in np.asarray(CropFlip(pad, flip)(KEY, jnp.asarray(np.stack([image] * 2000))))
    )
    assert drawn.keys() == expected.keys()
    for key, ways in expected.items():
        mean = 2000 * ways / expected.total()
        assert abs(drawn[key] - mean) < 5 * np.sqrt(mean)


def test_nothing_to_do_changes_nothing_and_draws_follow_the_key():
    images = jnp.arange(48.0).reshape(3, 4, 4, 1)
    np.testing.assert_array_equal(CropFlip(0, False)(KEY, images), images)
    move = CropFlip(3, True)
    np.testing.assert_array_equal(move(KEY, images), move(KEY, images))
    assert (move(KEY, images) != move(jax.random.key(1), images)).any()


def test_the_objective_sees_the_moved_images_and_its_own_key():
    images = jnp.arange(48.0).reshape(3, 4, 4, 1)

    def objective(model, images, labels, key, member):
        return images, {"key": jax.random.key_data(key), "labels": labels, "model": model, "member": member}

    seen, rest = augmented(objective, CropFlip(1, False))("m", images, "y", KEY, "member")  # pyright: ignore
    assert (seen != images).any() and set(np.unique(seen)) <= set(np.unique(images))
    np.testing.assert_array_equal(rest.pop("key"), jax.random.key_data(KEY))
    assert rest == {"labels": "y", "model": "m", "member": "member"}


def test_moves_that_do_not_fit_are_refused():
    with pytest.raises(ma.InputError, match="pad=4 reaches over"):
        CropFlip(4, False)(KEY, jnp.zeros((1, 4, 8, 1)))
    with pytest.raises(ma.InputError, match="pad=-1"):
        CropFlip(-1, False)
