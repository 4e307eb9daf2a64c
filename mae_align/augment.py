"""Random views of training images, on the device: crops that are resized back, mirror images, grey images."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mae_align.errors import InputError

# Weights of red, green and blue in a grey image (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)
# Sides of a crop are in proportions from 3:4 to 4:3.
_LARGEST_ASPECT = 4 / 3


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to each training image, independently; nothing by default.

    Attributes:
        smallest_crop: smallest share of the image's area that a crop keeps; a crop of a share drawn from
            [smallest_crop, 1], sides in a proportion from 3:4 to 4:3, is resized to the whole image. 1 for no crops.
        flip: probability of a mirror image, left to right: 0 for digits and characters.
        grey: probability that an image of three channels becomes grey.

    Raises:
        InputError: a share outside (0, 1] or a probability outside [0, 1].

    Example:
        >>> x = jnp.arange(4.0).reshape(1, 1, 4, 1)
        >>> Augmentation(flip=1.0)(jax.random.key(0), x).ravel().tolist()
        [3.0, 2.0, 1.0, 0.0]
    """

    smallest_crop: float = 1.0
    flip: float = 0.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.smallest_crop <= 1:
            raise InputError(f"smallest_crop={self.smallest_crop}: give a share over 0 and at most 1")
        for name in ("flip", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: give a probability from 0 to 1")

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Random views; each image has its own.

        Args:
            key: PRNG key. images: [b, h, w, c] floating.

        Returns:
            [b, h, w, c], the same dtype. Traceable. Cost of a crop: b h w (h + w) c.

        Raises:
            InputError: grey images of another number of channels than 3.
        """
        crop, flip, grey = jax.random.split(key, 3)
        if self.smallest_crop < 1:
            images = random_crops(crop, images, self.smallest_crop)
        if self.flip > 0:
            images = _sometimes(flip, self.flip, images[:, :, ::-1], images)
        if self.grey > 0:
            if images.shape[3] != 3:
                raise InputError(f"images of {images.shape[3]} channels: only colour images of 3 can become grey")
            luma = (images * jnp.asarray(_LUMA, images.dtype)[None, None, None]).sum(-1, keepdims=True)
            images = _sometimes(grey, self.grey, jnp.broadcast_to(luma, images.shape), images)
        return images


def random_crops(key: jax.Array, images: jax.Array, smallest: float) -> jax.Array:
    """Crops resized to the size of the image, linearly between pixels and without aliasing.

    Area uniform in [smallest, 1] of the image, aspect log-uniform in [3/4, 4/3] times the image's own, cut off at the
    image's sides; position uniform.

    Args:
        key: PRNG key. images: [b, h, w, c] floating. smallest: share of the area in (0, 1].

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
    chosen = jax.random.bernoulli(key, probability, (len(images),))
    return jnp.where(chosen[:, None, None, None], changed, images)
