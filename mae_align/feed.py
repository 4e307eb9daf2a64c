"""Where a training loop takes its batches from: images that lie on the device, or a stream of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import numpy as np

from mae_align.data.pipeline import global_batches
from mae_align.data.source import ImageSource

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
