"""Several processes of one run: how they start, the meshes of devices they share, what they tell each other.

Several processes start together only where flags or the environment say so (:func:`start_distributed`). All axes of
meshes are of type Auto; rows are split over one axis, "data" (:func:`data_mesh`), the training of networks over two
(:func:`train_mesh`). What one process refuses, all refuse (:func:`refused_together`). Within one process nothing is
sent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from mae_align.runtime.errors import InputError

# Environment variables of start_distributed.
_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID = (
    f"MAE_ALIGN_{name}" for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")
)
_DISTRIBUTED = "MAE_ALIGN_DISTRIBUTED"


def start_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    environ: Mapping[str, str] | None = None,
) -> bool:
    """Joins the processes of one run (`jax.distributed`), if and only if asked to.

    Call it before any JAX computation. What is not given comes from the environment variables
    MAE_ALIGN_COORDINATOR, MAE_ALIGN_NUM_PROCESSES and MAE_ALIGN_PROCESS_ID. With
    MAE_ALIGN_DISTRIBUTED=auto instead, JAX finds the others itself (TPU pods, Slurm, MPI); on a
    machine that is no part of a cluster nothing is started.

    Args:
        coordinator: HOST:PORT of process 0, which listens there.
        num_processes: How many processes run. 1: nothing is started.
        process_id: Which of them this is, from 0.
        timeout: Seconds to wait for the others.
        environ: Stands in for `os.environ`.

    Returns:
        Whether this process is one of several that were joined, now or before.

    Raises:
        InputError: For settings that are given in part or make no sense. If the others do not come
            within `timeout`, JAX ends the process.

    Example:
        >>> start_distributed(environ={})
        False
    """
    environ = os.environ if environ is None else environ
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    auto = environ.get(_DISTRIBUTED, "")
    if auto not in ("", "0", "auto"):
        raise InputError(f"{_DISTRIBUTED}={auto!r}: write auto, or leave it out")
    given = {
        _COORDINATOR: coordinator or environ.get(_COORDINATOR) or None,
        _NUM_PROCESSES: _whole(num_processes, _NUM_PROCESSES, environ),
        _PROCESS_ID: _whole(process_id, _PROCESS_ID, environ),
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return auto == "auto" and _join_cluster(timeout)
    if missing:
        raise InputError(
            f"several processes need coordinator, number of processes and process id together: "
            f"{' and '.join(missing)} (or the option of that name) is missing"
        )
    address, count, this = given[_COORDINATOR], int(given[_NUM_PROCESSES] or 0), int(given[_PROCESS_ID] or 0)
    if not 0 <= this < count:
        raise InputError(f"process {this} of {count}: number the processes from 0 to their number less 1")
    host, colon, port = str(address).rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise InputError(f"coordinator {address!r}: write HOST:PORT of process 0")
    if count == 1:
        return False
    jax.distributed.initialize(str(address), count, this, initialization_timeout=timeout)
    return True


def _whole(value: int | None, name: str, environ: Mapping[str, str]) -> int | None:
    """A whole number given as an argument or by the environment."""
    text = environ.get(name) or None
    if value is not None or text is None:
        return value
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}={text!r}: give a whole number") from None


def _join_cluster(timeout: int) -> bool:
    """Joins the processes that JAX finds by itself; does nothing where there are none."""
    try:
        jax.distributed.initialize(initialization_timeout=timeout)
    except ValueError as error:
        # What JAX says on a machine that it takes for no part of any cluster.
        if "coordinator_address should be defined" in str(error):
            return False
        raise InputError(f"{_DISTRIBUTED}=auto: {str(error).splitlines()[0]}") from error
    return jax.process_count() > 1


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """A mesh of one axis, "data", over which rows are split.

    Args:
        devices: In this order. None: all devices of all processes.

    Example:
        >>> data_mesh(jax.devices()[:1]).shape
        OrderedDict(...)
    """
    return _mesh(np.array(jax.devices() if devices is None else devices), "data")


def train_mesh(ensemble: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """A mesh of axes "ensemble" x "data": networks are split over the first, the rows of a batch over the second.

    Args:
        ensemble: Length of the first axis; it divides the number of devices.
        devices: In this order, the second axis fastest. None: all devices of all processes.

    Raises:
        InputError: If `ensemble` does not divide the number of devices.

    Example:
        >>> dict(train_mesh(devices=jax.devices()[:1]).shape)
        {'ensemble': 1, 'data': 1}
    """
    found = np.array(jax.devices() if devices is None else devices)
    if ensemble < 1 or len(found) % ensemble:
        raise InputError(f"ensemble={ensemble} does not divide {len(found)} devices: choose a divisor of them")
    return _mesh(found.reshape(ensemble, -1), "ensemble", "data")


def _mesh(devices: np.ndarray, *axes: str) -> Mesh:
    """A mesh of devices laid out in an array, with axes of type Auto."""
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


def local_mesh(mesh: Mesh) -> Mesh:
    """The part of a mesh on the devices of this process, as one axis "data".

    Args:
        mesh: of this process alone or of all processes, with as many devices each; its axes do not matter.

    Raises:
        InputError: a mesh of some processes only, or with different numbers of devices.

    Example:
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
    return data_mesh([d for d in devices if d.process_index == mine])


def processes(mesh: Mesh) -> int:
    """Number of processes with devices in a mesh.

    Example:
        >>> processes(data_mesh(jax.devices()[:1]))
        1
    """
    return len({d.process_index for d in mesh.devices.flat})


def place(shape: tuple[int, ...], sharding: NamedSharding, read: Callable[[Any], np.ndarray]) -> jax.Array:
    """A global array of what each process has on the host; explicit transfers, without a collective.

    ``jax.device_put`` of the whole would compare the arrays of all processes, with a collective.

    Args:
        shape: of the global array.
        sharding: of it.
        read: from a global index (a tuple of slices) to that part of it; asked for the parts on this process's devices
            only.

    Returns:
        The array; its dtype is that of the parts.

    Example:
        >>> everywhere = NamedSharding(train_mesh(devices=jax.devices()[:1]), jax.P())
        >>> place((2,), everywhere, np.arange(2).__getitem__).tolist()
        [0, 1]
    """
    parts = sharding.addressable_devices_indices_map(shape).items()
    arrays = [jax.device_put(read(part), device) for device, part in parts]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def gathered(arrays: Sequence[np.ndarray], mesh: Mesh) -> list[list[np.ndarray]]:
    """The same-shaped arrays of every process of a mesh, bit for bit, in the order of the processes.

    Args:
        arrays: any dtypes; the same shapes and dtypes in every process.
        mesh: as for :func:`local_mesh`.

    Returns:
        For each process its arrays. No collective within one process.

    Example:
        >>> gathered([np.ones(2)], data_mesh(jax.devices()[:1]))
        [[array([1., 1.])]]
    """
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if processes(mesh) == 1:
        return [arrays]
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
        mae_align.runtime.errors.InputError: no such file
    """
    if (jax.process_count() if count is None else count) == 1:
        yield
        return
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
