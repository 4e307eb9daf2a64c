"""How the host runs a grid: groups of tasks that share a basis, on a pool of workers, each result stored at once.

LAPACK hardly scales with threads, so on a CPU one worker per core calls one compiled solve; on an accelerator there is
one worker and a task is a vmapped batch. The next groups' bases are made while the current group's tasks run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from tqdm import tqdm

from mae_align.store import PointStore

Basis = TypeVar("Basis")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task(Generic[Basis]):
    """Points solved in one call.

    Attributes:
        keys: names of the points. solve: basis -> one dictionary of arrays per key, in order.
    """

    keys: tuple[str, ...]
    solve: Callable[[Basis], list[Arrays]]


@dataclass(frozen=True)
class TaskGroup(Generic[Basis]):
    """Tasks that share a basis.

    Attributes:
        make_basis: called once, only if some task is not stored yet. tasks: see :class:`Task`.
    """

    make_basis: Callable[[], Basis]
    tasks: Sequence[Task[Basis]]


def run_groups(
    groups: Sequence[TaskGroup[Basis]],
    *,
    workers: int,
    store: PointStore | None = None,
    progress: bool = False,
) -> dict[str, Arrays]:
    """Run every task that is not stored yet.

    Args:
        groups: what to do. workers: threads, at least 1. store: where finished points are kept.
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
