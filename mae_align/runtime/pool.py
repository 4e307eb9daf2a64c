"""How the host runs a grid: groups of tasks that share a basis, on a pool of workers, each result stored at once.

LAPACK hardly scales with threads, so on a CPU one worker per core calls one compiled solve; on an accelerator there is
one worker and a task is a vmapped batch. The next groups' bases are made while the current group's tasks run.
"""

from __future__ import annotations

import functools
import io
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from tqdm import tqdm

from mae_align.runtime.devices import has_float64, is_cpu, solve_device, solve_dtype, worker_count
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import PointStore
from mae_align.runtime.processes import of_first, refused_together

Basis = TypeVar("Basis")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task(Generic[Basis]):
    """Points solved in one call.

    Attributes:
        keys: names of the points.
        solve: basis -> one dictionary of arrays per key, in order.
    """

    keys: tuple[str, ...]
    solve: Callable[[Basis], list[Arrays]]


@dataclass(frozen=True)
class TaskGroup(Generic[Basis]):
    """Tasks that share a basis.

    Attributes:
        make_basis: called once, only if some task is not stored yet.
        tasks: see :class:`Task`.
    """

    make_basis: Callable[[], Basis]
    tasks: Sequence[Task[Basis]]


@dataclass(frozen=True)
class RunOptions:
    """How a sweep is run; none of it changes the numbers beyond rounding.

    Attributes:
        workers: threads on a CPU; default one per core.
        batch_size: grid points per call; default 1 on a CPU, 8 on an accelerator (vmapped).
        progress: show a progress bar.
        store: folder for finished points; the same sweep started again goes on from there. Of several processes the
            first alone reads and writes it.
        mesh: devices over which the points are spread (its axes are taken together, ``batch_size`` counts for each
            device). Default: all devices of all processes where there are several processes or accelerators that have
            the solves' precision; none on the CPU of one process, where a pool of threads is faster than virtual
            devices, and for float64 beside a TPU, where every host solves the whole grid on its CPU.

    Example:
        >>> RunOptions(workers=2).batch_size is None
        True
    """

    workers: int | None = None
    batch_size: int | None = None
    progress: bool = False
    store: str | Path | None = None
    mesh: Mesh | None = None

    def check(self) -> None:
        """Refuse numbers below 1.

        Raises:
            InputError: naming the option.
        """
        worker_count(self.workers)
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: give at least 1")


def execute(
    groups: Sequence[TaskGroup[Basis]],
    run: RunOptions,
    *,
    dtype: str,
    identity: Callable[[], str],
    mesh: Mesh | None = None,
) -> dict[str, Arrays]:
    """Run every task that is not stored yet, on threads of a CPU or one call at a time on an accelerator or a mesh.

    Args:
        groups: what to do.
        run: workers, progress and store.
        dtype: of the solves, which says where they run.
        identity: gives what stored points belong to (:func:`mae_align.runtime.files.fingerprint`).
        mesh: that the tasks spread themselves over, or None.

    Returns:
        As :func:`run_groups`.

    Raises:
        InputError: the store holds points of something else.
    """
    store = shared_store(run.store, identity)
    threads = worker_count(run.workers) if mesh is None and is_cpu(solve_device(dtype)) else 1
    return run_groups(groups, workers=threads, store=store, progress=run.progress)


def run_groups(
    groups: Sequence[TaskGroup[Basis]],
    *,
    workers: int,
    store: PointStore | None = None,
    progress: bool = False,
) -> dict[str, Arrays]:
    """Run every task that is not stored yet.

    Args:
        groups: what to do.
        workers: threads, at least 1.
        store: where finished points are kept.
        progress: show a progress bar on standard error.

    Returns:
        The arrays of every point by key. An interrupt or an error cancels what has not started; finished points are in
        the store.

    Example:
        >>> group = TaskGroup(lambda: 2.0, [Task(("a",), lambda two: [{"x": np.array(two)}])])
        >>> float(run_groups([group], workers=1)["a"]["x"])
        2.0
    """
    results: dict[str, Arrays] = {}
    todo: list[TaskGroup[Basis]] = []
    total = sum(len(task.keys) for group in groups for task in group.tasks)
    for group in groups:
        missing = []
        for task in group.tasks:
            found = [store.load(key) if store else None for key in task.keys]
            if any(f is None for f in found):
                missing.append(task)
            else:
                results.update({key: f for key, f in zip(task.keys, found, strict=True) if f is not None})
        if missing:
            todo.append(TaskGroup(group.make_basis, missing))
    bar = tqdm(total=total, initial=len(results), desc="sweep", unit="point", disable=not progress, delay=2.0)
    pool = ThreadPoolExecutor(workers)
    try:
        for keys, found in _solutions(pool, todo, workers):
            for key, arrays in zip(keys, found, strict=True):
                if store:
                    store.save(key, arrays)
                results[key] = arrays
            bar.update(len(keys))
    finally:
        # Running solves cannot be stopped; nothing new is started.
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    return results


def _solutions(
    pool: ThreadPoolExecutor, groups: Sequence[TaskGroup[Basis]], workers: int
) -> Iterator[tuple[tuple[str, ...], list[Arrays]]]:
    """Solutions in the order they finish; bases are made at most ``workers`` groups ahead."""
    bases: deque[Future[Basis]] = deque(pool.submit(group.make_basis) for group in groups[:workers])
    running: dict[Future[list[Arrays]], tuple[str, ...]] = {}
    for i, group in enumerate(groups):
        basis = bases.popleft().result()
        for task in group.tasks:
            running[pool.submit(task.solve, basis)] = task.keys
        if i + workers < len(groups):
            bases.append(pool.submit(groups[i + workers].make_basis))
        # A bounded queue keeps few bases alive; the last group drains it.
        limit = workers if i + 1 < len(groups) else 0
        while len(running) > limit:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            # Those that failed last: what finished beside them is stored before the error ends the run.
            for future in sorted(done, key=lambda future: future.exception() is not None):
                yield running.pop(future), future.result()


def grid_mesh(devices: list[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """A mesh of one axis, ``grid``, for the points of a sweep.

    Args:
        devices: default all devices of all processes.

    Returns:
        The mesh, its axis in Auto mode.

    Example:
        >>> grid_mesh(jax.devices()[:2]).shape["grid"] <= 2
        True
    """
    found = jax.devices() if devices is None else devices
    return jax.make_mesh((len(found),), ("grid",), devices=found, axis_types=(AxisType.Auto,))


def check_mesh(mesh: Mesh, dtype: str) -> None:
    """Refuse a mesh whose devices cannot solve in this precision.

    Args:
        mesh: any mesh; its axes are taken together.
        dtype: of the solves.

    Raises:
        InputError: float64 solves on devices without float64.

    Example:
        >>> check_mesh(grid_mesh(), "float64")  # CPUs and GPUs have it
    """
    device = mesh.devices.flat[0]
    if solve_dtype(dtype) == np.float64 and not has_float64(device):
        raise InputError(
            f"a mesh of {device.platform} devices has no float64: ask for dtype='float32', or leave mesh out to solve "
            "on the host"
        )


def default_mesh(dtype: str) -> Mesh | None:
    """All devices where points spread by themselves: of several processes, or several accelerators of one.

    Args:
        dtype: of the solves.

    Returns:
        The mesh; None on the CPU of one process, on a single accelerator, and where the devices lack this precision.

    Example:
        >>> default_mesh("float64") is None  # virtual devices of one CPU are slower than its threads
        True
    """
    devices = jax.devices()
    lacks = solve_dtype(dtype) == np.float64 and not has_float64(devices[0])
    if lacks or len(devices) == 1 or (is_cpu(devices[0]) and jax.process_count() == 1):
        return None
    return grid_mesh(devices)


@functools.cache
def over_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A pure function of a point, mapped over points that are spread over a mesh.

    Args:
        function: ``(shared, point, *, max_k)`` on pytrees of arrays.
        mesh: its axes are taken together.

    Returns:
        Jitted ``(shared, points, *, max_k)``, every array of ``points`` with a leading axis whose length is a multiple
        of the number of devices; the results lie where they were computed. No collective.
    """
    spec = jax.P(mesh.axis_names)

    @functools.partial(jax.jit, static_argnames="max_k")
    def call(shared: Any, points: Any, *, max_k: int) -> Any:
        def local(shared: Any, points: Any) -> Any:
            return jax.lax.map(lambda point: function(shared, point, max_k=max_k), points)

        return jax.shard_map(local, mesh=mesh, in_specs=(jax.P(), spec), out_specs=spec)(shared, points)

    return call


def solve_over_mesh(function: Callable[..., Any], mesh: Mesh, shared: Any, points: Any, max_k: int) -> Any:
    """Solve points on every device of a mesh and gather the results on every process.

    Args:
        function: of a point, see :func:`over_mesh`.
        mesh: of devices, also of several processes that all call this in step.
        shared: pytree of arrays, the same on every process.
        points: pytree of NumPy arrays [n, ...]; filled up to a multiple of the number of devices with the last point.
        max_k: number of features.

    Returns:
        Pytree of NumPy arrays [n, ...].
    """
    n, size = len(jax.tree.leaves(points)[0]), mesh.devices.size
    fill = np.minimum(np.arange(-(-n // size) * size), n - 1)
    placed = jax.tree.map(lambda a: _placed(a[fill], mesh, jax.P(mesh.axis_names)), points)
    out = over_mesh(function, mesh)(replicated(shared, mesh), placed, max_k=max_k)
    if jax.process_count() > 1:
        out = multihost_utils.process_allgather(out, tiled=True)
    return jax.tree.map(lambda a: np.asarray(a)[:n], out)


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The same arrays on every device of a mesh.

    Args:
        tree: pytree of arrays, the same on every process.
        mesh: of devices.

    Returns:
        Pytree of global arrays; what lies on the mesh already is not copied.
    """
    return jax.tree.map(lambda a: _placed(a, mesh, jax.P()), tree)


def _placed(array: Any, mesh: Mesh, spec: jax.P) -> jax.Array:
    sharding = NamedSharding(mesh, spec)
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    host = np.asarray(array)
    # Not device_put: between processes it would compare the arrays, with a collective.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


class SharedStore(PointStore):
    """Finished points that the first of several processes reads and writes for all of them.

    Every process asks for the same points in the same order.

    Args:
        store: of the first process; the others have none.
    """

    def __init__(self, store: PointStore | None) -> None:
        self._store = store

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a finished point on every process, or None on every process."""
        found = self._store.load(key) if self._store is not None else None
        file = io.BytesIO()
        if found is not None:
            np.savez(file, allow_pickle=False, **found)
        received = of_first(file.getvalue())
        if not received:
            return None
        with np.load(io.BytesIO(received), allow_pickle=False) as data:
            return {name: data[name] for name in data.files}

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the arrays of a finished point, once."""
        if self._store is not None:
            self._store.save(key, arrays)


def shared_store(folder: str | Path | None, identity: Callable[[], str]) -> PointStore | None:
    """Finished points on disk; of several processes the first has the files, and all of them get its points.

    Args:
        folder: where they are kept; None for nowhere. The first process's counts.
        identity: gives what they belong to (:func:`mae_align.runtime.files.fingerprint`); asked where there is a
        folder.

    Returns:
        The store; None without a folder in a run of one process.

    Raises:
        InputError: in every process: the folder holds points of something else.

    Example:
        >>> shared_store(None, str) is None
        True
    """
    store = None
    with refused_together():
        if folder is not None and jax.process_index() == 0:
            store = PointStore(folder, identity())
    return store if jax.process_count() == 1 else SharedStore(store)
