"""Small host arrays and refusals across processes; each call is a collective that all processes make together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mae_align.errors import InputError


def local_mesh(mesh: Mesh) -> Mesh:
    """The part of a mesh on the devices of this process, as one axis "data".

    Args:
        mesh: of this process alone or of all processes, with as many devices each; its axes do not matter.

    Raises:
        InputError: a mesh of some processes only, or with different numbers of devices.

    Example:
        >>> from mae_align.devices import data_mesh
        >>> dict(local_mesh(data_mesh(jax.devices()[:1])).shape)
        {'data': 1}
    """
    devices = list(mesh.devices.flat)
    counts = {p: sum(d.process_index == p for d in devices) for p in {d.process_index for d in devices}}
    mine = jax.process_index()
    if set(counts) not in ({mine}, set(range(jax.process_count()))) or len(set(counts.values())) > 1:
        raise InputError(
            f"the mesh has {counts} devices by process, of {jax.process_count()} processes: "
            "give a mesh of this process alone, or of all processes with as many devices each"
        )
    own = np.array([d for d in devices if d.process_index == mine])
    return Mesh(own, ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def processes(mesh: Mesh) -> int:
    """Number of processes with devices in a mesh.

    Example:
        >>> from mae_align.devices import data_mesh
        >>> processes(data_mesh(jax.devices()[:1]))
        1
    """
    return len({d.process_index for d in mesh.devices.flat})


def gathered(arrays: Sequence[np.ndarray], mesh: Mesh) -> list[list[np.ndarray]]:
    """The same-shaped arrays of every process of a mesh, bit for bit, in the order of the processes.

    Args:
        arrays: any dtypes; the same shapes and dtypes in every process.
        mesh: as for :func:`local_mesh`.

    Returns:
        For each process its arrays. No collective within one process.

    Example:
        >>> from mae_align.devices import data_mesh
        >>> gathered([np.ones(2)], data_mesh(jax.devices()[:1]))
        [[array([1., 1.])]]
    """
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if processes(mesh) == 1:
        return [arrays]
    from jax.experimental import multihost_utils

    # As bytes: JAX would round float64 and int64 outside its float64 mode.
    message = np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays])
    received = np.asarray(multihost_utils.process_allgather(message))
    ends = np.cumsum([array.nbytes for array in arrays])[:-1]
    return [
        [part.copy().view(a.dtype).reshape(a.shape) for part, a in zip(np.split(row, ends), arrays, strict=True)]
        for row in received
    ]


def of_first(data: bytes) -> bytes:
    """The bytes that the first process has, in every process.

    Args:
        data: what the first process is to send; of the others it does not matter.

    Example:
        >>> of_first(b"mine")
        b'mine'
    """
    if jax.process_count() == 1:
        return data
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    sent = np.zeros(size, np.uint8)
    sent[: len(data)] = np.frombuffer(data, np.uint8)[:size]
    return np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes()


@contextlib.contextmanager
def refused_together(count: int | None = None) -> Iterator[None]:
    """Input that one process refuses within is refused by all, in the same words, when all have left it.

    Without, the others would wait in their next collective for a process that is gone. For short work only: a process
    that refuses waits for the others. Other errors are not held back, and end the run as they would without.

    Args:
        count: of the processes that call it: 1, or all of them. None: all. Nothing is sent where it is 1.

    Raises:
        InputError: of the first process that refused.

    Example:
        >>> with refused_together():
        ...     raise InputError("no such file")
        Traceback (most recent call last):
        ...
        mae_align.errors.InputError: no such file
    """
    if (jax.process_count() if count is None else count) == 1:
        yield
        return
    from jax.experimental import multihost_utils

    refusal, words = None, b""
    try:
        yield
    except InputError as error:
        # File names may hold bytes that are no text.
        refusal, words = error, str(error).encode(errors="backslashreplace")
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(-1 if refusal is None else len(words))))
    refusing = np.flatnonzero(lengths >= 0)
    if not len(refusing):
        return
    message = np.zeros(max(1, lengths.max()), np.uint8)
    message[: len(words)] = np.frombuffer(words, np.uint8)
    received = np.asarray(multihost_utils.process_allgather(message))[refusing[0]]
    raise InputError(received[: lengths[refusing[0]]].tobytes().decode()) from refusal
