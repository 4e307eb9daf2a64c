"""Where a training loop takes its batches from: images that lie on the device, or a stream of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import numpy as np

from mae_align.data.pipeline import global_batches
from mae_align.data.source import ImageSource
from mae_align.errors import InputError

if TYPE_CHECKING:
    from mae_align.train import DeviceData, Training, TrainState

Metrics = dict[str, jax.Array]


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


@dataclass(frozen=True)
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
    """Images read from disk (or memory) batch by batch; each process reads its part of every batch.

    Batch s is the same set of images for every number of processes and devices. Threads read ahead, and the
    next batches are put together while the device computes, since its results are not waited for.

    Args:
        source: images by position.
        batch_size: of all processes together; a multiple of their number.
        seed: of the order, drawn anew every epoch.
        threads: that read ahead, see :func:`mae_align.data.pipeline.global_batches`.

    Raises:
        InputError: fewer images than a batch, a batch that processes cannot share, a seed out of range.

    Example:
        >>> from mae_align.data import open_source
        >>> stream = StreamedBatches(open_source("digits", "train"), batch_size=32, seed=0)
        >>> stream.take(2)[0].shape, stream.position()
        ((2, 32, 8, 8, 1), {'next_index': 2})
    """

    def __init__(self, source: ImageSource, *, batch_size: int, seed: int, threads: int | None = None) -> None:
        self._iterator = iter(
            global_batches(
                source,
                batch_size=batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                seed=seed,
                threads=threads,
            )
        )
        self.batch_size = batch_size

    def take(self, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """This process's part of the next batches: images [S, b, h, w, c] and labels [S, b] int32."""
        parts = [next(self._iterator) for _ in range(num_steps)]
        return np.stack([part.images for part in parts]), np.stack([part.labels for part in parts]).astype(np.int32)

    def advance(self, training: Training, state: TrainState, num_steps: int) -> tuple[TrainState, Metrics]:
        """See :meth:`Feed.advance`."""
        if training.batch_size != self.batch_size:
            raise InputError(f"batches of {self.batch_size} images for a training of {training.batch_size}")
        return training.advance_batches(state, *self.take(num_steps))

    def position(self) -> dict[str, Any]:
        """A count of batches."""
        return dict(self._iterator.get_state())

    def seek(self, position: Mapping[str, Any]) -> None:
        """See :meth:`Feed.seek`."""
        self._iterator.set_state(dict(position))
