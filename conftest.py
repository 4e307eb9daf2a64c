"""Configures JAX and BLAS for every test and doctest, before either is imported.

It lies in the root, beside `mae_align`, `experiments` (doctests) and `tests`, so that it is loaded first
whatever file pytest is asked to run.
"""

from __future__ import annotations

import atexit
import builtins
import os
import shutil
import signal
import tempfile

# One BLAS thread: JAX's CPU solvers run in SciPy's OpenBLAS, and two threads under eight virtual
# devices are 10 to 20 times slower. OpenBLAS reads it once, when it is loaded; the subprocesses of
# tests inherit it.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# The tests are written for the CPU; an explicit JAX_PLATFORMS still wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling small programs: XLA's first pass alone makes them a third sooner, and what one
# worker or subprocess has compiled the others of this run read. Anything set outside wins.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="mae_align-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Jobs that a script puts in the background are started with Ctrl-C ignored, and so would be what tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax

# Set through the configuration, not the environment: subprocesses see the machine as a user does.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_teardown() -> None:
    """Forget the last value of a doctest: tyro, when it is first imported, hashes what it finds among the builtins."""
    if hasattr(builtins, "_"):
        del builtins._  # pyright: ignore[reportAttributeAccessIssue]
