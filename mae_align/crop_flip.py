"""Random crops and flips of a batch, drawn on the device from the key of the step, in front of any objective."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mae_align.errors import InputError
from mae_align.patches import ImageShape
from mae_align.train_state import Member, Metrics, Objective

# Folded into the key of the step, so that crops never meet what the model draws from it.
_STREAM = 0xC409


@dataclasses.dataclass(frozen=True)
class CropFlip:
    """A window of the image at random, moved by up to ``pad`` pixels each way, and its mirror image half of the time.

    What the window shows beyond the border is the image reflected there (the border itself not repeated).

    Attributes:
        pad: largest move, in pixels; 0 for none. flip: whether to mirror left and right: not for digits and characters,
            whose class it may change.

    Raises:
        InputError: a negative number of pixels.

    Example:
        >>> CropFlip(pad=0, flip=False)(jax.random.key(0), jnp.arange(4.0).reshape(1, 2, 2, 1)).ravel().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """

    pad: int
    flip: bool

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise InputError(f"pad={self.pad}: give a number of pixels, at least 0")

    def check(self, image_shape: ImageShape) -> None:
        """Refuse images too small to be reflected.

        Raises:
            InputError: a side of at most ``pad`` pixels.
        """
        if min(image_shape[:2]) <= self.pad:
            raise InputError(f"pad={self.pad} reaches over images of {image_shape[0]} x {image_shape[1]}: make it less")

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """One draw for each image.

        Args:
            key: PRNG key. images: [b, h, w, c].

        Returns:
            [b, h, w, c] in the same dtype; every value is one of the image.
        """
        self.check((images.shape[1], images.shape[2], images.shape[3]))
        batch, height, width, channels = images.shape
        moves = jax.random.randint(jax.random.fold_in(key, 0), (2, batch, 1), -self.pad, self.pad + 1)
        rows = _reflected(jnp.arange(height)[None] + moves[0], height)
        columns = _reflected(jnp.arange(width)[None] + moves[1], width)
        if self.flip:
            mirrored = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (batch, 1))
            columns = jnp.where(mirrored, columns[:, ::-1], columns)
        # Whole rows first: two gathers of long runs are cheaper than one of pixels.
        lines = jnp.take_along_axis(images.reshape(batch, height, width * channels), rows[:, :, None], axis=1)
        picked = jnp.take_along_axis(lines.reshape(batch, height, width, channels), columns[:, None, :, None], axis=2)
        return picked


def _reflected(index: jax.Array, size: int) -> jax.Array:
    """Indices beyond 0..size - 1 by up to size - 1, reflected at the first and last entry."""
    last = size - 1
    return last - jnp.abs(last - jnp.abs(index))


def augmented(objective: Objective, augmentation: CropFlip) -> Objective:
    """The same objective on augmented images; evaluation is not touched.

    Args:
        objective: as :func:`mae_align.train.classify`. augmentation: of every training batch.

    Returns:
        An objective for :class:`mae_align.train.Training`: the draw depends on the member's seed and the step alone.

    Example:
        >>> from mae_align.train import classify
        >>> callable(augmented(classify, CropFlip(4, True)))
        True
    """

    def loss(model: Any, images: jax.Array, labels: Any, key: jax.Array, member: Member) -> tuple[jax.Array, Metrics]:
        moved = augmentation(jax.random.fold_in(key, _STREAM), images)
        return objective(model, moved, labels, key, member)

    return loss
