"""How precisely and on what everything is solved: floating point types, devices, BLAS threads, workers.

Solves run in float64 unless float32 is asked for, on the default backend where it has float64 and on the host CPU where
it does not (TPU). On a CPU each solve uses one BLAS thread, because LAPACK's symmetric eigensolver hardly scales with
threads; parallelism comes from a pool of one worker per usable core.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import jax.monitoring
import numpy as np
import threadpoolctl
from numpy.typing import DTypeLike

from mae_align.runtime.errors import InputError

# Backends whose arithmetic stops at float32.
_BACKENDS_WITHOUT_FLOAT64 = ("tpu",)
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def check_platforms() -> None:
    """Refuse a JAX_PLATFORMS that this machine has no device for.

    Raises:
        InputError: naming the variable and what to write.

    Example:
        >>> check_platforms()
    """
    try:
        jax.devices()
    except Exception as error:  # of every version and platform another one
        asked = os.environ.get("JAX_PLATFORMS", "")
        if not asked:
            raise
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise InputError(
            f"JAX_PLATFORMS={asked}: JAX has no such device on this machine{reason}: unset it, or write cpu"
        ) from None


def has_float64(device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm]
    """Whether a device computes in float64.

    Example:
        >>> has_float64(jax.devices("cpu")[0])
        True
    """
    return device.platform not in _BACKENDS_WITHOUT_FLOAT64


def solve_dtype(dtype: DTypeLike) -> np.dtype:
    """The floating point type of a solve, checked.

    Args:
        dtype: "float64" or "float32", as a name, a NumPy dtype or a scalar type.

    Returns:
        The NumPy dtype.

    Raises:
        InputError: For any other type.

    Example:
        >>> solve_dtype("float32")
        dtype('float32')
    """
    # np.dtype(None) is float64: a forgotten argument must not pass for a choice.
    if dtype is not None:
        with contextlib.suppress(TypeError):
            found = np.dtype(dtype)
            if found in (np.float32, np.float64):
                return found
    raise InputError(f"dtype={dtype!r} is not a type for solves: use 'float64' or 'float32'")


def is_cpu(device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm]
    """Whether a device is the host processor (where a thread pool beats batches).

    Example:
        >>> is_cpu(jax.devices("cpu")[0])
        True
    """
    return device.platform == "cpu"


def solve_device(dtype: DTypeLike = "float64") -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """The device on which solves of a floating point type run.

    Args:
        dtype: "float64" or "float32".

    Returns:
        The first local device of the default backend; the first local CPU device if that backend
        has no arithmetic of this type.

    Raises:
        InputError: If `dtype` is neither, or if JAX_PLATFORMS leaves out the CPU that is needed.

    Example:
        >>> solve_device("float64")  # on a machine without accelerators
        CpuDevice(id=0)
    """
    backend = jax.default_backend()
    if solve_dtype(dtype) == np.float64 and backend in _BACKENDS_WITHOUT_FLOAT64:
        try:
            return jax.local_devices(backend="cpu")[0]
        except RuntimeError as error:
            raise InputError(
                f"float64 solves run on the host, and JAX_PLATFORMS leaves out its CPU: "
                f"set JAX_PLATFORMS={backend},cpu or ask for dtype='float32'"
            ) from error
    return jax.local_devices(backend=backend)[0]


def worker_count(requested: int | None = None) -> int:
    """How many solves run side by side on a CPU.

    Args:
        requested: Number of workers, at least 1. None: one for each core this process may use.

    Raises:
        InputError: If `requested` is not a whole number of at least 1.

    Example:
        >>> worker_count(3)
        3
    """
    if requested is None:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    with contextlib.suppress(TypeError):
        # A bool is an int to Python, but workers=True is a mistake.
        if not isinstance(requested, bool) and operator.index(requested) >= 1:
            return operator.index(requested)
    raise InputError(f"workers={requested!r}: give a whole number of at least 1, or leave it out")


def _release_blas_control() -> None:
    """Lets any thread change the number of BLAS threads.

    threadpoolctl 3.8 lets only the first thread that set OpenBLAS's limit change it, until that
    thread ends; calls from other threads silently do nothing.
    """
    release = getattr(threadpoolctl.OpenBLASController, "clear_controlling_thread", None)
    if release is not None:
        release(force=True)


class _SingleBlasThread:
    """Limit of one BLAS thread, held by as many threads as want it.

    The limit holds for the whole process. If every thread set and restored it for itself, the first
    to leave would lift it under the others, and a later one would "restore" the limit itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._limits: threadpoolctl.threadpool_limits | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._holders == 0:
                # JAX's CPU solvers call SciPy's LAPACK; the limit reaches only loaded libraries.
                import scipy.linalg  # noqa: F401

                _release_blas_control()
                self._limits = threadpoolctl.threadpool_limits(limits=1, user_api="blas")
                _release_blas_control()
            self._holders += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0 and self._limits is not None:
                _release_blas_control()
                self._limits.restore_original_limits()
                _release_blas_control()


_single_blas_thread = _SingleBlasThread()


@contextlib.contextmanager
def solve_context(dtype: DTypeLike = "float64", *, alone: bool = False) -> Iterator[None]:
    """The surroundings of a solve: precision, device and one BLAS thread.

    JAX's float64 switch belongs to a thread, so every worker enters this itself; the BLAS limit
    belongs to the process and is held until the last worker leaves. Cast inputs with an explicit
    dtype and turn results into NumPy arrays *inside*: outside, JAX takes float64 arrays for
    float32, and what is still being computed loses the BLAS limit. Entering costs about 1 ms.

    Args:
        dtype: "float64" or "float32".
        alone: No other solve runs meanwhile, so BLAS may use the other cores (an eigh of size 3,072 takes 3.1 s instead
            of 4.9 s on two). Has no effect while another thread holds the limit.

    Raises:
        InputError: As `solve_device`.

    Example:
        >>> import jax.numpy as jnp
        >>> with solve_context("float64"):
        ...     third = np.asarray(jnp.ones(()) / 3)
        >>> third.dtype
        dtype('float64')
    """
    device = solve_device(dtype)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(solve_dtype(dtype) == np.float64))
        if device.platform != jax.default_backend():
            # Only where it changes something: JAX compiles anew under another default device.
            stack.enter_context(jax.default_device(device))
        if not alone:
            stack.enter_context(_single_blas_thread)
        yield


@dataclass
class CompileCount:
    """What `compile_counter` saw: a name for each compiled program, and the seconds they took."""

    names: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Number of programs compiled."""
        return len(self.names)


@contextlib.contextmanager
def compile_counter() -> Iterator[CompileCount]:
    """Counts the programs that XLA compiles, in any thread, while the context is open.

    Example:
        >>> double = jax.jit(lambda x: 2 * x)
        >>> with compile_counter() as first:
        ...     _ = double(np.ones(3, np.float32))
        >>> with compile_counter() as second:
        ...     _ = double(np.zeros(3, np.float32))
        >>> first.count, second.count
        (1, 0)
    """
    seen = CompileCount()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT:
            seen.names.append(str(kwargs.get("fun_name", "")))
            seen.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
