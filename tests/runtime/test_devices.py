from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from threadpoolctl import threadpool_info, threadpool_limits

from mae_align.runtime import devices
from mae_align.runtime.devices import (
    compile_counter,
    is_cpu,
    solve_context,
    solve_device,
    solve_dtype,
    worker_count,
)
from mae_align.runtime.errors import InputError


def blas_threads() -> set[int]:
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    assert pools, "no BLAS library found: scipy.linalg is imported above"
    return {pool["num_threads"] for pool in pools}


def test_suite_runs_with_eight_devices_one_blas_thread_and_no_rank_promotion():
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    assert blas_threads() == {1}
    assert jax.local_device_count("cpu") == 8
    with pytest.raises(ValueError, match="jax_numpy_rank_promotion='raise'"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("float32")])
def test_solve_dtype_takes_names_and_types(dtype):
    assert solve_dtype(dtype) == np.dtype("float32")


@pytest.mark.parametrize("dtype", ["float16", "int64", "double precision", None, bool, 64])
def test_solve_dtype_refuses_anything_else(dtype):
    with pytest.raises(InputError, match="use 'float64' or 'float32'"):
        solve_dtype(dtype)
    with pytest.raises(InputError, match="use 'float64' or 'float32'"), solve_context(dtype):
        pass


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_solve_context_sets_the_precision_of_this_thread_and_restores_it(dtype):
    before = jnp.zeros(()).dtype
    with solve_context(dtype):
        result = np.asarray(jnp.linalg.eigh(jnp.asarray(np.diag([1.0, 2.0])))[0])
    assert result.dtype == np.dtype(dtype)
    assert jnp.zeros(()).dtype == before == np.float32


def test_float32_solves_stay_float32_where_float64_is_on_by_default():
    with jax.enable_x64(True), solve_context("float32"):
        assert jnp.ones(()).dtype == jnp.float32


def test_float64_solve_is_as_accurate_as_scipy():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((30, 30)) * np.logspace(0, -5, 30)
    matrix = root.T @ root
    with solve_context("float64"):
        ours = np.asarray(jnp.linalg.eigh(jnp.asarray(matrix, jnp.float64))[0])
    np.testing.assert_allclose(ours, scipy.linalg.eigvalsh(matrix), atol=1e-14 * matrix.max())


def test_blas_limit_holds_until_the_last_thread_leaves_and_is_then_lifted():
    """A first thread leaves while a second is inside; a third enters and leaves after both."""
    second_inside, first_left, release = threading.Event(), threading.Event(), threading.Event()
    seen: dict[str, set[int]] = {}

    def second() -> None:
        with solve_context():
            second_inside.set()
            assert first_left.wait(10)
            seen["second, after the first left"] = blas_threads()
            assert release.wait(10)

    with threadpool_limits(limits=2, user_api="blas"):
        assert blas_threads() == {2}
        with ThreadPoolExecutor(1) as pool:
            with solve_context():
                seen["first"] = blas_threads()
                running = pool.submit(second)
                assert second_inside.wait(10)
            first_left.set()
            release.set()
            running.result(timeout=10)
        with solve_context():
            seen["third"] = blas_threads()
        assert blas_threads() == {2}
    assert seen == {"first": {1}, "second, after the first left": {1}, "third": {1}}


def test_blas_limit_survives_many_threads_and_errors():
    def work(index: int) -> set[int]:
        with solve_context():
            inside = blas_threads()
            if index % 3 == 0:
                raise ArithmeticError
            return inside

    with threadpool_limits(limits=2, user_api="blas"):
        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(work, index) for index in range(60)]
        for index, future in enumerate(futures):
            if index % 3 == 0:
                assert isinstance(future.exception(), ArithmeticError)
            else:
                assert future.result() == {1}
        assert blas_threads() == {2}


def test_solve_context_nests():
    with threadpool_limits(limits=2, user_api="blas"), solve_context("float64"):
        with solve_context("float32"):
            assert jnp.ones(()).dtype == jnp.float32
        assert jnp.ones(()).dtype == jnp.float64
        assert blas_threads() == {1}


def test_solve_device_is_the_default_backend():
    assert solve_device("float64") == solve_device("float32") == jax.local_devices()[0]
    assert is_cpu(solve_device()) == (jax.default_backend() == "cpu")


def test_float64_goes_to_the_host_where_the_backend_has_none(monkeypatch):
    # No TPU here: the default backend answers "tpu", and the host's devices come in reverse order,
    # so that the one chosen for the host differs from the default device.
    cpu = jax.local_devices(backend="cpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "local_devices", lambda *, backend: {"tpu": ["a TPU"], "cpu": cpu[::-1]}[backend])
    assert solve_device("float64") == cpu[-1]
    assert solve_device("float32") == "a TPU"
    with solve_context("float64"):
        assert jnp.ones(()).dtype == jnp.float64
        assert jnp.ones(()).devices() == {cpu[-1]}
    assert jnp.ones(()).devices() == {cpu[0]}


def test_a_tpu_without_its_host_cpu_is_refused_with_the_cure(monkeypatch):
    def no_cpu(*, backend: str) -> list[object]:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "local_devices", no_cpu)
    with pytest.raises(InputError, match=r"set JAX_PLATFORMS=tpu,cpu or ask for dtype='float32'"):
        solve_device("float64")


def test_worker_count_is_the_number_of_usable_cores():
    assert worker_count() == len(os.sched_getaffinity(0))
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from mae_align.runtime.devices import worker_count; print(worker_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.getcwd())
    assert done.stdout.split() == ["1"]


def test_worker_count_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert worker_count() == 7


def test_worker_count_takes_whole_numbers():
    assert worker_count(1) == 1
    assert worker_count(np.int64(5)) == 5  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("requested", [0, -1, 1.5, True, "2"])
def test_worker_count_refuses_anything_else(requested):
    with pytest.raises(InputError, match="whole number of at least 1"):
        worker_count(requested)


def test_compile_counter_counts_new_programs_only():
    program = jax.jit(lambda x: x + 1)
    one, two = np.ones(3, np.float32), np.ones(4, np.float32)
    with compile_counter() as outer:
        program(one)
        with compile_counter() as inner:
            program(two)
            program(one)
        program(two)
    assert (outer.count, inner.count) == (2, 1)
    assert all("lambda" in name for name in outer.names)
    assert outer.seconds > inner.seconds > 0
    program(np.ones(5, np.float32))
    assert outer.count == 2


def test_compile_counter_sees_other_threads_and_closes_after_an_error():
    program = jax.jit(lambda x: x * 3)

    def fail_inside(counter: list[devices.CompileCount]) -> None:
        with compile_counter() as seen:
            counter.append(seen)
            raise ArithmeticError

    counters: list[devices.CompileCount] = []
    with pytest.raises(ArithmeticError):
        fail_inside(counters)
    with compile_counter() as seen, ThreadPoolExecutor(1) as pool:
        pool.submit(program, np.ones(2, np.float32)).result()
    assert (seen.count, counters[0].count) == (1, 0)


def test_one_program_serves_every_worker_thread():
    program = jax.jit(lambda x: jnp.linalg.eigh(x)[0])
    matrix = np.diag([3.0, 1.0, 2.0])

    def work(_: int) -> np.ndarray:
        with solve_context():
            return np.asarray(program(jnp.asarray(matrix, jnp.float64)))

    first = work(0)
    with compile_counter() as seen, ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(4)))
    assert seen.count == 0
    for result in results:
        np.testing.assert_array_equal(result, first)
    np.testing.assert_allclose(first, [1, 2, 3], rtol=1e-15)
