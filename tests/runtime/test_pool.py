from __future__ import annotations

import concurrent.futures
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from mae_align.closed_form.sweep import RunOptions, masking_sweep
from mae_align.moments.moments import Moments
from mae_align.runtime import pool as runner
from mae_align.runtime.files import PointStore
from mae_align.runtime.pool import Arrays, Task, TaskGroup, run_groups

PATIENCE = 10.0


class Grid:
    """Groups of tasks whose results are known, and a count of what was run."""

    def __init__(self, groups: int, tasks: int, batch: int = 1) -> None:
        self.calls: Counter[str] = Counter()
        self.before: Mapping[str, Callable[[], object]] = {}
        self.lock = threading.Lock()
        self.groups = [
            TaskGroup(
                partial(self.make_basis, g),
                [
                    Task(keys, partial(self.solve, keys))
                    for keys in (tuple(f"g{g}t{t}b{b}" for b in range(batch)) for t in range(tasks))
                ],
            )
            for g in range(groups)
        ]
        self.keys = [key for group in self.groups for task in group.tasks for key in task.keys]
        self.expected = {key: {"x": np.array([int(key[1]), hash(key)], np.int64)} for key in self.keys}

    def record(self, name: str) -> None:
        with self.lock:
            self.calls[name] += 1
        self.before.get(name, lambda: None)()

    def make_basis(self, group: int) -> int:
        self.record(f"basis{group}")
        return group

    def solve(self, keys: tuple[str, ...], basis: int) -> list[Arrays]:
        for key in keys:
            self.record(key)
        return [{"x": np.array([basis, hash(key)], np.int64)} for key in keys]

    def run(self, workers: int = 2, store: PointStore | None = None, progress: bool = False) -> dict[str, Arrays]:
        return run_groups(self.groups, workers=workers, store=store, progress=progress)

    def check(self, found: dict[str, Arrays]) -> None:
        assert set(found) == set(self.expected)
        for key, arrays in self.expected.items():
            np.testing.assert_array_equal(found[key]["x"], arrays["x"], err_msg=key)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# Results


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 2), (6, 1, 1), (5, 3, 2)])
def test_every_task_runs_once_in_its_own_basis_whatever_the_number_of_workers(workers, shape):
    grid = Grid(*shape)
    grid.check(grid.run(workers))
    assert grid.calls == dict.fromkeys([*grid.keys, *(f"basis{g}" for g in range(shape[0]))], 1)


def test_nothing_to_do_is_done_at_once():
    assert run_groups([], workers=2) == {}
    assert Grid(2, 0).run() == {}


def test_a_sweep_has_the_same_bits_whatever_the_number_of_workers_and_order_of_finishing():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 4, 5, 1)).astype(np.uint8)
    moments = Moments.from_arrays(images, np.arange(200) % 4)
    one, three = (masking_sweep(moments, [1, 2], [0.0, 0.3, 0.8, 1.0], run=RunOptions(workers=w)) for w in (1, 3))
    for name in one.data_vars:
        np.testing.assert_array_equal(one[name].values, three[name].values, err_msg=str(name))
    batches = masking_sweep(moments, [1, 2], [0.0, 0.3, 0.8, 1.0], run=RunOptions(workers=2, batch_size=2))
    np.testing.assert_allclose(batches.r2, one.r2, atol=1e-12)


def test_a_task_that_answers_for_other_points_than_its_own_is_an_error():
    group = TaskGroup(lambda: 0, [Task(("a", "b"), lambda basis: [{"x": np.zeros(1)}])])
    with pytest.raises(ValueError, match="zip"):
        run_groups([group], workers=1)


# Workers


def test_tasks_run_side_by_side():
    grid = Grid(1, 6)
    barrier = threading.Barrier(3)
    grid.before = dict.fromkeys(grid.keys, partial(barrier.wait, PATIENCE))
    grid.check(grid.run(workers=3))


def test_no_more_tasks_run_than_there_are_workers():
    grid, lock = Grid(4, 5), threading.Lock()
    running, most = 0, 0

    def count() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.003)
        with lock:
            running -= 1

    grid.before = dict.fromkeys([*grid.keys, *(f"basis{g}" for g in range(4))], count)
    grid.check(grid.run(workers=2))
    assert most == 2


def test_the_next_basis_is_made_while_tasks_run():
    grid, made = Grid(2, 1), threading.Event()

    def wait_for_next_basis() -> None:
        assert made.wait(PATIENCE)

    grid.before = {"basis1": made.set, "g0t0b0": wait_for_next_basis}
    grid.check(grid.run(workers=2))


class Basis:
    """Something large, of which one keeps count."""


@pytest.mark.parametrize("tasks", [1, 3])
def test_one_worker_keeps_at_most_two_bases(tasks):
    alive: weakref.WeakSet[Basis] = weakref.WeakSet()
    most = 0

    def make() -> Basis:
        nonlocal most
        basis = Basis()
        alive.add(basis)
        most = max(most, len(alive))
        return basis

    def solve(key: str, basis: Basis) -> list[Arrays]:
        assert basis in alive
        time.sleep(0.001)
        return [{"x": np.zeros(1)}]

    groups = [
        TaskGroup(make, [Task((f"{g}-{t}",), partial(solve, f"{g}-{t}")) for t in range(tasks)]) for g in range(30)
    ]
    assert len(run_groups(groups, workers=1)) == 30 * tasks
    assert most <= 2
    assert len(alive) == 0


# Interrupts, errors and going on


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [1, 3])
def test_finished_points_survive_an_error_and_only_the_others_run_again(tmp_path, error, workers):
    first = Grid(3, 4)
    broken = "g1t1b0"

    def fail_once_there_is_something_to_lose() -> None:
        wait_until(lambda: len(list(tmp_path.glob("*.npz"))) >= 4)
        raise error

    first.before = {broken: fail_once_there_is_something_to_lose}
    with pytest.raises(error):
        first.run(workers, PointStore(tmp_path, "a"))
    kept = {path.stem for path in tmp_path.glob("*.npz")}
    assert len(kept) >= 4 and broken not in kept
    for key in kept:
        np.testing.assert_array_equal(np.load(tmp_path / f"{key}.npz")["x"], first.expected[key]["x"])

    second = Grid(3, 4)
    second.check(second.run(workers, PointStore(tmp_path, "a")))
    missing = set(second.keys) - kept
    bases = {f"basis{key[1]}" for key in missing}
    assert second.calls == dict.fromkeys(missing | bases, 1)

    third = Grid(3, 4)
    third.check(third.run(workers, PointStore(tmp_path, "a")))
    assert not third.calls


def test_after_an_error_nothing_new_is_started():
    grid = Grid(4, 10)

    def fail() -> None:
        raise ArithmeticError

    grid.before = {key: partial(time.sleep, 0.05) for key in grid.keys} | {"g0t1b0": fail}
    with pytest.raises(ArithmeticError):
        grid.run(workers=2)
    assert sum(grid.calls[key] for key in grid.keys) <= 6


@pytest.mark.parametrize("attempt", range(8))  # the order of a set of futures is arbitrary
def test_what_finished_beside_an_error_is_stored(tmp_path, monkeypatch, attempt):
    monkeypatch.setattr(runner, "FIRST_COMPLETED", concurrent.futures.ALL_COMPLETED)
    grid = Grid(1, 4)

    def fail() -> None:
        raise ArithmeticError

    grid.before = {"g0t1b0": fail}
    with pytest.raises(ArithmeticError):
        grid.run(workers=4, store=PointStore(tmp_path, "a"))
    assert {path.stem for path in tmp_path.glob("*.npz")} == {"g0t0b0", "g0t2b0", "g0t3b0"}


def test_an_error_in_a_basis_is_raised_and_its_tasks_do_not_run():
    grid = Grid(3, 2)

    def fail() -> None:
        raise ArithmeticError("a singular block")

    grid.before = {"basis1": fail}
    with pytest.raises(ArithmeticError, match="a singular block"):
        grid.run(workers=2)
    assert not any(grid.calls[key] for key in grid.keys if key.startswith("g1"))


def test_ctrl_c_stops_the_wait_for_a_task_and_keeps_what_is_finished(tmp_path):
    """The signal arrives while a task runs and another is already stored; the main thread only waits."""
    grid = Grid(1, 8)

    def interrupt() -> None:
        wait_until(lambda: (tmp_path / "g0t1b0.npz").exists())
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.1)

    grid.before = {key: partial(time.sleep, 0.05) for key in grid.keys} | {"g0t2b0": interrupt}
    # A shell has its background jobs ignore the signal, and they hand that on.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            grid.run(workers=1, store=PointStore(tmp_path, "a"))
    finally:
        signal.signal(signal.SIGINT, handler)
    kept = {path.stem for path in tmp_path.glob("*.npz")}
    assert {"g0t0b0", "g0t1b0"} <= kept <= {"g0t0b0", "g0t1b0", "g0t2b0"}
    assert sum(grid.calls[key] for key in grid.keys) <= 4
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())


def test_a_group_that_is_stored_needs_no_basis(tmp_path):
    Grid(3, 2).run(store=PointStore(tmp_path, "a"))
    for key in ("g1t0b0", "g1t1b0"):
        (tmp_path / f"{key}.npz").unlink()
    grid = Grid(3, 2)
    grid.check(grid.run(store=PointStore(tmp_path, "a")))
    assert grid.calls == {"basis1": 1, "g1t0b0": 1, "g1t1b0": 1}


def test_a_batch_with_a_missing_point_runs_as_a_whole_and_the_others_do_not(tmp_path):
    Grid(2, 3, batch=3).run(store=PointStore(tmp_path, "a"))
    (tmp_path / "g1t1b2.npz").unlink()
    grid = Grid(2, 3, batch=3)
    grid.check(grid.run(store=PointStore(tmp_path, "a")))
    assert grid.calls == {"basis1": 1, "g1t1b0": 1, "g1t1b1": 1, "g1t1b2": 1}


# NumPy leaves a file open that turns out to be no archive.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_damaged_point_is_computed_again(tmp_path):
    Grid(2, 2).run(store=PointStore(tmp_path, "a"))
    whole = (tmp_path / "g0t1b0.npz").read_bytes()
    (tmp_path / "g0t1b0.npz").write_bytes(whole[:50])
    grid = Grid(2, 2)
    with pytest.warns(UserWarning, match=r"g0t1b0\.npz is damaged and is computed again"):
        grid.check(grid.run(store=PointStore(tmp_path, "a")))
    assert grid.calls == {"basis0": 1, "g0t1b0": 1}
    np.testing.assert_array_equal(np.load(tmp_path / "g0t1b0.npz")["x"], grid.expected["g0t1b0"]["x"])


def test_each_point_is_stored_before_the_run_ends(tmp_path):
    grid = Grid(2, 3)
    grid.before = {"g1t2b0": lambda: wait_until(lambda: len(list(tmp_path.glob("*.npz"))) == 5)}
    grid.check(grid.run(workers=1, store=PointStore(tmp_path, "a")))
    assert len(list(tmp_path.glob("*.npz"))) == 6


# Progress


@pytest.mark.parametrize("progress", [False, True])
def test_progress_counts_points_from_those_stored_and_only_if_asked_for(tmp_path, capsys, monkeypatch, progress):
    # The bar of a run that takes longer than the delay, which is shown at once.
    def at_once(**options: Any) -> Any:
        shown: dict[str, Any] = {**options, "delay": 0.0, "mininterval": 0.0}
        return tqdm(**shown)

    monkeypatch.setattr(runner, "tqdm", at_once)
    store = PointStore(tmp_path, "a")
    Grid(2, 2, batch=2).run(store=store)
    for key in ("g1t0b0", "g1t1b1"):
        (tmp_path / f"{key}.npz").unlink()
    capsys.readouterr()
    Grid(2, 2, batch=2).run(store=store, progress=progress)
    out = capsys.readouterr()
    assert out.out == ""
    if progress:
        assert [part in out.err for part in ("4/8", "6/8", "8/8", "100%")] == [True] * 4
    else:
        assert out.err == ""
