"""Configures JAX and BLAS for every test and doctest, before either is imported.

It lies in the root, beside both `mae_align` (doctests) and `tests`, so that it is loaded first
whatever file pytest is asked to run.
"""

from __future__ import annotations

import os

# One BLAS thread: JAX's CPU solvers run in SciPy's OpenBLAS, and two threads under eight virtual
# devices are 10 to 20 times slower. OpenBLAS reads it once, when it is loaded; the subprocesses of
# tests inherit it.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# The tests are written for the CPU; an explicit JAX_PLATFORMS still wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

# Set through the configuration, not the environment: subprocesses see the machine as a user does.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
