"""What every probe is to be read beside: the same probe on features that needed no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol as Interface
from typing import TypeVar

import numpy as np

from mae_align.corruption import components
from mae_align.moments.moments import Moments
from mae_align.runtime.checks import check_images
from mae_align.runtime.errors import InputError

# Images [n, h, w, c] to features [n, k].
Encoder = Callable[[np.ndarray], np.ndarray]
Result = TypeVar("Result", covariant=True)
# Images encoded at a time.
_ROWS = 4096


class Probe(Interface[Result]):
    """A probe with its settings: :func:`mae_align.probes.ridge_probe`, its like, or a ``functools.partial`` of one."""

    def __call__(  # noqa: D102
        self,
        train_features: np.ndarray,
        train_targets: np.ndarray,
        test_features: np.ndarray,
        test_targets: np.ndarray,
        /,
        *,
        features: str,
    ) -> Result: ...


def raw_pixels(images: np.ndarray) -> np.ndarray:
    """Images as features: flattened, as stored.

    Args:
        images: [n, h, w, c] uint8 or floating.

    Returns:
        [n, h w c], of the same type (8-bit pixels have exact moments).

    Raises:
        InputError: no images.

    Example:
        >>> raw_pixels(np.zeros((2, 3, 4, 1), np.uint8)).shape
        (2, 12)
    """
    images = check_images(images)
    return images.reshape(len(images), -1)


def principal_components(moments: Moments, images: np.ndarray, count: int) -> np.ndarray:
    """Images by their coordinates along the principal components of largest variance: E_k^T (x - mean).

    Args:
        moments: of the training images: mean and components come from them. images: [n, h, w, c].
        count: k, at most the number of pixel values; components without variance are constant features.

    Returns:
        [n, k] float32, pixel units. Cost: one eigh of size d and n d k multiply-adds.

    Raises:
        InputError: images of another size, or a bad count.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> principal_components(Moments.from_arrays(x), x, 3).shape
        (50, 3)
    """
    images = check_images(images)
    if images.shape[1:] != moments.image_shape:
        raise InputError(
            f"images {list(images.shape[1:])}, moments of {list(moments.image_shape)}: give those of these"
        )
    if not isinstance(count, int | np.integer) or not 1 <= count <= moments.num_pixels:
        raise InputError(
            f"count={count}: give a whole number from 1 to {moments.num_pixels}, the number of pixel values"
        )
    vectors, values = components.principal_components(moments)
    # Along directions without variance rounding is no feature.
    vectors = vectors[:, :count] * (values[:count] > len(values) * np.finfo(np.float64).eps * values[0])
    found = np.empty((len(images), count), np.float32)
    for start in range(0, len(images), _ROWS):
        part = images[start : start + _ROWS].reshape(-1, moments.num_pixels)
        found[start : start + _ROWS] = (part - moments.mean_x) @ vectors
    return found


def compare_features(
    probe: Probe[Result],
    encoders: Mapping[str, Encoder],
    train_images: np.ndarray,
    train_targets: np.ndarray,
    test_images: np.ndarray,
    test_targets: np.ndarray,
) -> dict[str, Result]:
    """One probe, with one protocol, on the features of several encoders.

    Args:
        probe: with its settings. encoders: by name: :func:`raw_pixels`, a partial of :func:`principal_components`, an
            untrained, a trained and a supervised network.
        train_images, test_images: [n, h, w, c]. train_targets, test_targets: as the probe takes them.

    Returns:
        Results by name of the encoder, which is in their protocols.

    Raises:
        InputError: no encoder; as the probe and the encoders do.

    Example:
        >>> from mae_align.probes import ridge_probe
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(60, 2, 2, 1)), np.arange(60) % 2
        >>> compare_features(ridge_probe, {"pixels": raw_pixels}, x, y, x, y)["pixels"].protocol.features
        'pixels'
    """
    if not encoders:
        raise InputError("no encoders: give at least one name with a function of images")
    found = {}
    for name, encode in encoders.items():
        found[name] = probe(encode(train_images), train_targets, encode(test_images), test_targets, features=name)
    return found
