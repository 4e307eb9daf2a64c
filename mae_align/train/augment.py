"""Random views of training images, on the device: shifts, crops that are resized back, mirror images, grey images."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mae_align.data.patches import ImageShape
from mae_align.runtime.errors import InputError
from mae_align.train.step import Member, Metrics, Objective

# Weights of red, green and blue in a grey image (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)
# Sides of a crop are in proportions from 3:4 to 4:3.
_LARGEST_ASPECT = 4 / 3


# Folded into the key of the step, so that views never meet what the model draws from it.
_STREAM = 0xC409


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to each training image, independently; nothing by default.

    Attributes:
        shift: most pixels that the image is moved by each way. What comes in over the border is the image reflected
            there, the border itself not repeated.
        smallest_crop: smallest share of the image's area that a crop keeps. A crop of a share drawn from
            [smallest_crop, 1], sides in a proportion from 3:4 to 4:3, is resized to the whole image. 1 for no crops.
        flip: probability of a mirror image, left to right: 0 for digits and characters, whose class it may change.
        grey: probability that an image of three channels becomes grey.

    Raises:
        InputError: a negative shift, a share outside (0, 1], a probability outside [0, 1], or a shift beside crops.

    Example:
        >>> x = jnp.arange(4.0).reshape(1, 1, 4, 1)
        >>> Augmentation(flip=1.0)(jax.random.key(0), x).ravel().tolist()
        [3.0, 2.0, 1.0, 0.0]
    """

    shift: int = 0
    smallest_crop: float = 1.0
    flip: float = 0.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise InputError(f"shift={self.shift}: give a number of pixels, at least 0")
        if not 0 < self.smallest_crop <= 1:
            raise InputError(f"smallest_crop={self.smallest_crop}: give a share over 0 and at most 1")
        if self.shift and self.smallest_crop < 1:
            raise InputError(f"shift={self.shift} and smallest_crop={self.smallest_crop} both move images: give one")
        for name in ("flip", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: give a probability from 0 to 1")

    def check(self, image_shape: ImageShape) -> None:
        """Refuse images (h, w, c) that ``shift`` reaches over, and grey ones of another number of channels than 3."""
        height, width, channels = image_shape
        if min(height, width) <= self.shift:
            raise InputError(f"shift={self.shift} reaches over images of {height} x {width}: make it less")
        if self.grey > 0 and channels != 3:
            raise InputError(f"images of {channels} channels: only colour images of 3 can become grey")

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Random views; each image has its own.

        Args:
            key: PRNG key.
            images: [b, h, w, c] floating.

        Returns:
            [b, h, w, c], the same dtype. Traceable. Cost of a crop: b h w (h + w) c.

        Raises:
            InputError: as :meth:`check`.
        """
        self.check((images.shape[1], images.shape[2], images.shape[3]))
        place, flip, grey = jax.random.split(key, 3)
        if self.shift > 0:
            images = random_shifts(place, images, self.shift)
        if self.smallest_crop < 1:
            images = random_crops(place, images, self.smallest_crop)
        if self.flip > 0:
            images = _sometimes(flip, self.flip, images[:, :, ::-1], images)
        if self.grey > 0:
            luma = (images * jnp.asarray(_LUMA, images.dtype)[None, None, None]).sum(-1, keepdims=True)
            images = _sometimes(grey, self.grey, jnp.broadcast_to(luma, images.shape), images)
        return images


def random_shifts(key: jax.Array, images: jax.Array, most: int) -> jax.Array:
    """Images moved by whole pixels, uniform in [-most, most] each way, reflected at the border.

    Args:
        key: PRNG key.
        images: [b, h, w, c].
        most: pixels, below both sides.

    Returns:
        [b, h, w, c], the same dtype; every value is one of the image.

    Example:
        >>> random_shifts(jax.random.key(0), jnp.arange(3.0).reshape(1, 1, 3, 1), 0).ravel().tolist()
        [0.0, 1.0, 2.0]
    """
    batch, height, width, channels = images.shape
    moves = jax.random.randint(key, (2, batch, 1), -most, most + 1)
    rows = _reflected(jnp.arange(height)[None] + moves[0], height)
    columns = _reflected(jnp.arange(width)[None] + moves[1], width)
    # Whole rows first: two gathers of long runs are cheaper than one of pixels.
    lines = jnp.take_along_axis(images.reshape(batch, height, width * channels), rows[:, :, None], axis=1)
    return jnp.take_along_axis(lines.reshape(batch, height, width, channels), columns[:, None, :, None], axis=2)


def random_crops(key: jax.Array, images: jax.Array, smallest: float) -> jax.Array:
    """Crops resized to the size of the image, linearly between pixels and without aliasing.

    Area uniform in [smallest, 1] of the image, aspect log-uniform in [3/4, 4/3] times the image's own, cut off at the
    image's sides; position uniform.

    Args:
        key: PRNG key.
        images: [b, h, w, c] floating.
        smallest: share of the area in (0, 1].

    Returns:
        [b, h, w, c].

    Example:
        >>> random_crops(jax.random.key(0), jnp.ones((2, 4, 4, 1)), 0.5).shape
        (2, 4, 4, 1)
    """
    count, height, width, _ = images.shape
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (count,), minval=smallest, maxval=1.0)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (count,), minval=-1.0, maxval=1.0) * jnp.log(_LARGEST_ASPECT))
    # Shares of the image's sides.
    sides = jnp.minimum(jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], axis=1), 1.0)
    corner = jax.random.uniform(place_key, (count, 2)) * (1 - sides)

    def one(image: jax.Array, sides: jax.Array, corner: jax.Array) -> jax.Array:
        size = jnp.asarray([height, width], jnp.float32)
        scale = 1 / sides
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -corner * size * scale, method="linear", antialias=True
        )

    return jax.vmap(one)(images, sides, corner).astype(images.dtype)


def _sometimes(key: jax.Array, probability: float, changed: jax.Array, images: jax.Array) -> jax.Array:
    """Each image changed with this probability."""
    chosen = jax.random.bernoulli(key, probability, (len(images),))
    return jnp.where(chosen[:, None, None, None], changed, images)


def _reflected(index: jax.Array, size: int) -> jax.Array:
    """Indices beyond 0..size - 1 by up to size - 1, reflected at the first and last entry."""
    last = size - 1
    return last - jnp.abs(last - jnp.abs(index))


def augmented(objective: Objective, augmentation: Augmentation) -> Objective:
    """The same objective on augmented images; evaluation is not touched.

    Args:
        objective: as :func:`mae_align.train.ensemble.classify`.
        augmentation: of every training batch.

    Returns:
        An objective for :class:`mae_align.train.ensemble.Training`: the draw depends on the member's seed and the
        step alone.

    Example:
        >>> from mae_align.train.ensemble import classify
        >>> callable(augmented(classify, Augmentation(shift=4, flip=0.5)))
        True
    """

    def loss(model: Any, images: jax.Array, labels: Any, key: jax.Array, member: Member) -> tuple[jax.Array, Metrics]:
        moved = augmentation(jax.random.fold_in(key, _STREAM), images)
        return objective(model, moved, labels, key, member)

    return loss
