"""Moments from one pass over an iterator of batches: on many devices, in several processes, resumable."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mae_align.moments.accumulate import Accumulator, Batch, TargetKind, check_batch, pivots
from mae_align.moments.moments import Moments, assemble
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import ArrayFile, fingerprint, read_arrays, remove_unfinished, write_arrays
from mae_align.runtime.processes import gathered, local_mesh, processes, refused_together

_FILE_KIND, _FILE_VERSION = "unfinished moments", 1
RawBatch = np.ndarray | tuple[np.ndarray, np.ndarray | None] | tuple[np.ndarray, np.ndarray | None, np.ndarray]


@runtime_checkable
class ResumableIterator(Protocol):
    """An iterator that can say where it is, as grain's ``DatasetIterator`` can; the state is bytes or JSON-able."""

    def __next__(self) -> RawBatch: ...
    def get_state(self) -> Any: ...  # noqa: D102
    def set_state(self, state: Any) -> None: ...  # noqa: D102


def stream_moments(
    batches: Iterable[RawBatch],
    *,
    num_classes: int | None = None,
    center: bool = True,
    groups: int = 1,
    preprocessing: str = "stored pixels",
    mesh: Mesh | None = None,
    first_index: int = 0,
    index_step: int = 1,
    total: int | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    identity: str = "",
) -> Moments:
    """Moments of all images of a stream, read once.

    8-bit images with class labels (or without targets) give bit-identical moments for every batch size, mesh, number of
    processes, order and interruption. Float images are summed in centred form (Chan, Golub & LeVeque, 1983): equal to
    1e-6 of the Frobenius norm for any split, and bit for bit after an interruption.

    **Several processes** (see :func:`mae_align.runtime.processes.start_distributed`). Give each a stream of its own
    samples and one mesh over all devices; all get the same moments. The group of a sample depends on its index in the
    whole data set. Batches of :func:`mae_align.data.pipeline.batches` bring their indices. Without, sample j of a
    process's stream has index first_index + j index_step: process p of m that reads every m-th sample gives
    ``first_index=p, index_step=m``, and one that reads a contiguous part gives where the part starts.

    **Resume.** With ``checkpoint`` the partial sums are saved every ``checkpoint_every`` seconds and at the end of the
    stream; called again with the same arguments the stream goes on after the last saved batch. An iterator with
    ``get_state`` and ``set_state`` is put there; any other is read again up to there. Processes resume from files of
    their own, each where it was: their partial sums do not depend on each other. The files stay; delete them when the
    moments are saved.

    Args:
        batches: images [b, h, w, c], (images, targets) or (images, targets, indices [b]); b may vary. Targets: [b]
            class labels, numbers [b] or [b, q], or None. Images: as in :meth:`Moments.from_arrays`.
        num_classes: q, for class labels (a stream does not know its largest label beforehand).
        center: as in :meth:`Moments.from_arrays`.
        groups: likewise.
        preprocessing: likewise.
        mesh: devices over which rows are split (:func:`mae_align.runtime.processes.data_mesh`); None for one device
            of this process. A mesh over several processes adds up what all of them read.
        first_index: of the stream's first sample, see above.
        index_step: from one sample of the stream to the next.
        total: number of images of this stream, for the time left.
        progress: show images per second and the time left on standard error (in process 0).
        checkpoint: folder for the partial sums.
        checkpoint_every: seconds; 0 for every batch.
        identity: what the stream is, such as a hash over its files: a checkpoint of another is refused. Without, only
            ``total`` and the first batch tell two streams apart.

    Returns:
        The moments. Cost: n d^2 multiply-adds over all devices. Memory: see
        :class:`mae_align.moments.accumulate.Accumulator`; it does not depend on n.

    Raises:
        InputError: an empty stream, batches that do not fit together or are no images, a checkpoint of other data or
            settings. Up to the first batch in every process; a later one ends its own process, and so the others.

    Example:
        >>> x, y = np.arange(48, dtype=np.uint8).reshape(4, 3, 4, 1), np.array([0, 1, 0, 1])
        >>> m = stream_moments(iter([(x[:3], y[:3]), (x[3:], y[3:])]), num_classes=2)
        >>> bool((m.sxx == Moments.from_arrays(x, y).sxx).all())
        True
    """
    if not checkpoint_every >= 0:
        raise InputError(f"checkpoint_every={checkpoint_every}: give seconds, at least 0")
    if index_step < 1 or first_index < 0:
        raise InputError(f"first_index={first_index}, index_step={index_step}: give at least 0 and at least 1")
    place = _Place(mesh)
    iterator = iter(batches)
    file = None if checkpoint is None else Path(checkpoint) / f"moments-{place.index}-of-{place.count}.npz"
    saved = None
    # Before the first collective: what one process refuses here, all do.
    with refused_together(place.count):
        first, index = _next(iterator, num_classes)
        if first is None:
            raise InputError("the stream has no batches: there is nothing to sum")
        settings = {
            "center": center,
            "groups": groups,
            "preprocessing": preprocessing,
            "first_index": first_index,
            "index_step": index_step,
            "identity": identity,
            "total": total,
            "layout": repr(first.layout),
            "first batch": fingerprint([first.rows, first.labels, first.numbers], {}),
            "devices": place.devices,
            "processes": place.count,
        }
        if file is not None:
            remove_unfinished(file)
            saved = _read_checkpoint(file, settings) if file.exists() else None
    accumulator = Accumulator(first.layout, *_agreed_pivots(first, saved, place), groups, mesh)
    images = number = 0
    batch: Batch | None = first
    if saved is not None:
        accumulator.restore(saved.arrays)
        images, number = saved.fields["images"], saved.fields["batches"]
        _go_to(iterator, saved.fields)
        batch, index = _next(iterator, num_classes)
    bar = tqdm(
        total=total,
        initial=images,
        desc="moments",
        unit="image",
        unit_scale=True,
        disable=not progress or place.index > 0,
        delay=1.0,
    )
    last = time.monotonic()
    unsaved = False
    with bar:
        while batch is not None:
            if batch.layout != first.layout:
                raise InputError(f"batch {number} has {batch.layout}, the ones before {first.layout}: make them alike")
            if index is None:
                index = first_index + index_step * np.arange(images, images + len(batch.rows))
            accumulator.add(batch, index)
            images, number, unsaved = images + len(batch.rows), number + 1, True
            bar.update(len(batch.rows))
            if file is not None and time.monotonic() - last >= checkpoint_every:
                _write_checkpoint(file, settings, accumulator, iterator, images, number)
                last, unsaved = time.monotonic(), False
            batch, index = _next(iterator, num_classes)
    if file is not None and unsaved:
        # In the last step processes wait for each other: what was read is not to be lost with one of them.
        _write_checkpoint(file, settings, accumulator, iterator, images, number)
    return assemble(accumulator.finish(), first.layout, center=center, preprocessing=preprocessing)


class _Place:
    """Where this process stands among those of a mesh."""

    def __init__(self, mesh: Mesh | None) -> None:
        self.mesh = mesh
        self.devices = 1 if mesh is None else local_mesh(mesh).devices.size
        self.count = 1 if mesh is None else processes(mesh)
        self.index = jax.process_index() if self.count > 1 else 0


def _next(iterator: Iterator[RawBatch], num_classes: int | None) -> tuple[Batch | None, np.ndarray | None]:
    """The next batch, checked, and its indices if it brings them; None at the end."""
    raw = next(iterator, None)
    if raw is None:
        return None, None
    images, *rest = raw if isinstance(raw, tuple | list) else (raw,)
    targets, index = (*rest, None, None)[:2]
    batch = check_batch(images, targets, num_classes if targets is not None else None)
    if batch.layout.kind is TargetKind.classes and num_classes is None:
        raise InputError("a stream does not know its largest class label beforehand: give num_classes")
    if index is not None:
        index = np.asarray(index)
        if index.shape != (len(batch.rows),) or index.dtype.kind not in "iu":
            raise InputError(
                f"{len(batch.rows)} images with indices {list(index.shape)} of type {index.dtype}: give one number each"
            )
    return batch, index


def _agreed_pivots(first: Batch, saved: ArrayFile | None, place: _Place) -> tuple[np.ndarray, np.ndarray, float]:
    """The same pivots and unit in every process: those of a checkpoint if any has one, else those of process 0."""
    mine = pivots(first)
    if saved is not None:
        mine = saved.arrays["pivot_x"], saved.arrays["pivot_y"], float(saved.arrays["unit"])
    if place.mesh is None:
        return mine
    offers = gathered([np.array(saved is not None), *map(np.asarray, mine)], place.mesh)
    _, pivot_x, pivot_y, unit = next((offer for offer in offers if offer[0]), offers[0])
    return pivot_x, pivot_y, float(np.ravel(unit)[0])


def _go_to(iterator: Iterator[RawBatch], fields: dict[str, Any]) -> None:
    """Put an iterator, of which one batch was read, behind the last batch of a checkpoint."""
    state = fields["source"]
    if isinstance(iterator, ResumableIterator) and state is not None:
        iterator.set_state(base64.b64decode(state["bytes"]) if "bytes" in state else state["json"])
        return
    for _ in range(fields["batches"] - 1):
        if next(iterator, None) is None:
            raise InputError("the stream ends before the batch of its checkpoint: it is another stream")


def _source_state(iterator: Iterator[RawBatch]) -> dict[str, Any] | None:
    """Where an iterator is, as JSON values, if it can say so."""
    if not isinstance(iterator, ResumableIterator):
        return None
    state = iterator.get_state()
    return {"bytes": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"json": state}


def _write_checkpoint(
    file: Path,
    settings: dict[str, Any],
    accumulator: Accumulator,
    iterator: Iterator[RawBatch],
    images: int,
    number: int,
) -> None:
    """Everything that is needed to go on behind batch ``number``."""
    fields = {"settings": settings, "images": images, "batches": number, "source": _source_state(iterator)}
    kept = {
        "pivot_x": accumulator.pivot_x,
        "pivot_y": accumulator.pivot_y,
        "unit": np.array(accumulator.unit),
    }
    write_arrays(file, _FILE_KIND, _FILE_VERSION, fields, accumulator.state() | kept)


def _read_checkpoint(file: Path, settings: dict[str, Any]) -> ArrayFile:
    """What :func:`_write_checkpoint` wrote; that of another stream is refused."""
    saved = read_arrays(file, _FILE_KIND, _FILE_VERSION)
    theirs = saved.fields["settings"]
    other = [name for name in settings if settings[name] != theirs.get(name)]
    if other:
        raise InputError(
            f"{file} belongs to other data or settings ({', '.join(other)} differ): "
            "choose another checkpoint folder or delete it"
        )
    return saved
