"""The images that training learns from: checked on the host, then a whole set or batches of a stream on the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.data.patches import ImageShape
from mae_align.data.pipeline import global_batches
from mae_align.data.source import ImageSource
from mae_align.runtime.checks import as_targets, check_images, check_labels
from mae_align.runtime.devices import is_cpu
from mae_align.runtime.errors import InputError
from mae_align.runtime.memory import available_bytes

if TYPE_CHECKING:
    from mae_align.train.ensemble import Training, TrainState

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DeviceData:
    """A whole data set on the devices, one copy on each.

    Attributes:
        images: [n, h, w, c] in stored units, uint8 or float32.
        labels: [n] int32, [n, q] float32, or None.
    """

    images: jax.Array
    labels: jax.Array | None

    def batch(self, rows: jax.Array | None, step: jax.Array, index: jax.Array, size: int) -> tuple[jax.Array, Any]:
        """Images [size, h, w, c] and labels of one member's step of the run; its order of the images is ``rows``."""
        del index
        assert rows is not None
        start = step % (len(self.images) // size) * size
        chosen = jax.lax.dynamic_slice_in_dim(rows, start, size)
        return jax.tree.map(lambda array: jnp.take(array, chosen, axis=0, mode="clip"), (self.images, self.labels))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a stream on the devices, their rows split over the "data" axis.

    Attributes:
        images: [S, B, h, w, c] in stored units.
        labels: [S, B] int32, [S, B, q] float32, or None.
    """

    images: jax.Array
    labels: jax.Array | None

    def batch(self, rows: jax.Array | None, step: jax.Array, index: jax.Array, size: int) -> tuple[jax.Array, Any]:
        """Images [B, h, w, c] and labels of batch ``index`` of this stream, the same for every member."""
        del rows, step, size
        return jax.tree.map(
            lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), (self.images, self.labels)
        )


Source = DeviceData | Batches


def check_examples(
    images: np.ndarray, labels: np.ndarray | None, image_shape: ImageShape, num_classes: int | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images as uint8 or float32 and labels as int32 or float32, checked.

    Args:
        images: [n, h, w, c] uint8 or floating.
        labels: [n] integer classes, numbers [n, q], or None.
        image_shape: the model's (h, w, c).
        num_classes: of its head for labels, None without one.

    Raises:
        InputError: images of another shape, NaN, or labels that do not fit.

    Example:
        >>> images, labels = check_examples(np.zeros((2, 1, 1, 1)), np.array([0, 1]), (1, 1, 1), 2)
        >>> images.dtype.name, labels.dtype.name
        ('float32', 'int32')
    """
    images = check_images(images)
    if images.shape[1:] != tuple(image_shape):
        raise InputError(f"images have shape {list(images.shape[1:])}: the model takes {list(image_shape)}")
    images = images if images.dtype == np.uint8 else images.astype(np.float32)
    if labels is None:
        if num_classes is not None:
            raise InputError("the model has a head for labels: give labels beside the images")
        return images, None
    labels = as_targets(labels)
    if not labels.ndim or len(labels) != len(images):
        raise InputError(f"{len(images)} images but {labels.size} labels: give one label per image")
    if labels.ndim == 1 and labels.dtype.kind in "iub":
        if num_classes is not None:
            check_labels(labels, num_classes)
        return images, labels.astype(np.int32)
    if num_classes is not None or labels.ndim != 2 or labels.dtype.kind not in "fiub":
        wanted = "integer classes [n]" if num_classes is not None else "integer classes [n] or numbers [n, q]"
        raise InputError(f"labels have shape {list(labels.shape)} and dtype {labels.dtype}: give {wanted}")
    if not np.isfinite(labels).all():
        raise InputError("labels hold NaN or infinite values: clean the data first")
    return images, labels.astype(np.float32)


def check_fits(arrays: Sequence[np.ndarray | None], devices: Sequence[jax.Device]) -> None:  # pyright: ignore[reportInvalidTypeForm]
    """Refuse a data set of which one copy on each device does not fit.

    Args:
        arrays: of the set.
        devices: of this process; virtual devices of a CPU share its memory.

    Raises:
        InputError: more than is free.

    Example:
        >>> check_fits([np.zeros(3)], jax.devices()[:1])
    """
    size = sum(array.nbytes for array in arrays if array is not None)
    if is_cpu(devices[0]):
        size, free = size * len(devices), available_bytes()
    else:
        stats = [device.memory_stats() or {} for device in devices]
        known = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if "bytes_limit" in s and "bytes_in_use" in s]
        free = min(known, default=None)
    if free is not None and size > free:
        raise InputError(
            f"the images take {size / 1e9:.3g} GB on the devices and {free / 1e9:.3g} GB are free: "
            "stream them with advance_batches"
        )


@runtime_checkable
class Feed(Protocol):
    """Batches for a training loop, and the place in them."""

    def advance(self, training: Training, state: TrainState, num_steps: int) -> tuple[TrainState, Metrics]:
        """Train on the next batches; the state is donated, the metrics are [num_steps, E] and may still be computed."""
        ...

    def position(self) -> dict[str, Any]:
        """Where the next batch is, as JSON values, equal in all processes."""
        ...

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a position."""
        ...


@dataclasses.dataclass(frozen=True)
class ResidentImages:
    """Images on the device: the batch of a step is a function of member and step, so there is no place to keep.

    Attributes:
        data: as ``Training.put`` returns it.
    """

    data: DeviceData

    def advance(self, training: Training, state: TrainState, num_steps: int) -> tuple[TrainState, Metrics]:
        """See :meth:`Feed.advance`."""
        return training.advance(state, self.data, num_steps)

    def position(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Nothing."""


class StreamedBatches:
    """Images read from disk (or memory) batch by batch; each process reads its rows of every batch.

    Batch s is the same set of images for every number of processes and devices, and for all members. Threads read
    ahead, and the next batches are put together while the device computes, since its results are not waited for.

    Args:
        training: whose batches these are.
        source: images by position.
        seed: of the order, drawn anew every epoch.
        threads: that read ahead, see :func:`mae_align.data.pipeline.global_batches`.

    Raises:
        InputError: fewer images than a batch, a seed out of range.
    """

    def __init__(self, training: Training, source: ImageSource, *, seed: int, threads: int | None = None) -> None:
        rows = training.batch_rows
        stream = global_batches(source, batch_size=training.batch_size, rows=rows, seed=seed, threads=threads)
        self._iterator = iter(stream)

    def take(self, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """This process's rows of the next batches: images [S, b, h, w, c] and labels [S, b] int32."""
        parts = [next(self._iterator) for _ in range(num_steps)]
        return np.stack([part.images for part in parts]), np.stack([part.labels for part in parts]).astype(np.int32)

    def advance(self, training: Training, state: TrainState, num_steps: int) -> tuple[TrainState, Metrics]:
        """See :meth:`Feed.advance`."""
        return training.advance_batches(state, *self.take(num_steps))

    def position(self) -> dict[str, Any]:
        """A count of batches."""
        return dict(self._iterator.get_state())

    def seek(self, position: Mapping[str, Any]) -> None:
        """See :meth:`Feed.seek`."""
        self._iterator.set_state(dict(position))
