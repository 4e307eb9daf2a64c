"""How a grid is solved: from moments or samples to the arrays of every point, on threads, a batch or a mesh.

The host loops over groups of points that share a basis; see :mod:`mae_align.runner`. A point is solved by one compiled
program: called by a pool of workers on a CPU, vmapped over a batch on an accelerator, or spread over a mesh of devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import xarray as xr
from jax.sharding import Mesh

from mae_align.alignment import HeldOut, HeldOutRows, check_held_out, held_out_errors_jit, hold_out, hold_out_masked
from mae_align.assemble import assemble, provenance
from mae_align.checks import check_task
from mae_align.devices import is_cpu, solve_context, solve_device, solve_dtype, worker_count
from mae_align.dual import DualProblem, check_patches, factorize_samples, hold_out_samples, masked_basis
from mae_align.errors import InputError
from mae_align.factorize import PatchBasis, PrimalProblem, factorize, mask_weights, patch_basis, pca_basis
from mae_align.grid import PointProgram
from mae_align.memory import check_memory, sweep_bytes
from mae_align.moments import Moments
from mae_align.points import BasisKey, GridPoint, GridSpec
from mae_align.problem import DType, Factorized
from mae_align.runner import Arrays, Task, TaskGroup, run_groups
from mae_align.samples import Samples
from mae_align.sharded import check_mesh, default_mesh, shared_store, solve_over_mesh
from mae_align.store import fingerprint
from mae_align.targets import TargetOperator


@dataclasses.dataclass(frozen=True)
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


class Solve(NamedTuple):
    """How a grid is solved.

    Attributes:
        program: compiled program of a point. max_k: number of features; None for the rank.
        pixel_noise, rtol, dtype, target: see :func:`mae_align.factorize.factorize`. run: see :class:`RunOptions`.
    """

    program: PointProgram
    max_k: int | None
    pixel_noise: float | None
    rtol: float | None
    dtype: DType
    target: TargetOperator | None
    run: RunOptions


def solve_grid(
    moments: Moments | Samples, eval_moments: Moments | Samples | None, spec: GridSpec, how: Solve
) -> xr.Dataset:
    """Solve every point of a checked grid.

    Args:
        moments: of the training data, or its samples. eval_moments: of held-out data, of the same kind.
        spec: the grid. how: the program and its options.

    Returns:
        The labelled result.

    Raises:
        InputError: what cannot be solved, before any long work.
    """
    # Everything that can be refused without work is refused first.
    solve_dtype(how.dtype)
    workers = worker_count(how.run.workers)
    if how.run.batch_size is not None and how.run.batch_size < 1:
        raise InputError(f"batch_size={how.run.batch_size}: give at least 1")
    most = (
        moments.num_pixels if isinstance(moments, Moments) else min(moments.count - moments.center, moments.num_pixels)
    )
    if how.max_k is not None:
        if not isinstance(how.max_k, int | np.integer) or not 1 <= how.max_k <= most:
            raise InputError(
                f"k={how.max_k}: {moments.count} images of {moments.num_pixels} pixel values, "
                f"give a whole number up to their rank (at most {most})"
            )
    check_task(moments.num_targets)
    mesh = default_mesh(how.dtype) if how.run.mesh is None else how.run.mesh
    if mesh is not None:
        check_mesh(mesh, how.dtype)
    if eval_moments is not None:
        check_held_out(eval_moments, moments)
    if isinstance(moments, Samples) and how.pixel_noise == 0:
        inert = [p.basis.patch_size for p in spec.points() if p.basis.patch_size is not None and p.basis.noise == 0]
        check_patches(moments, list(dict.fromkeys(inert)))
    _check_fits(moments, eval_moments, spec, how, most)
    problem = _factorize(moments, how)
    max_k = problem.rank if how.max_k is None else problem.check_k(how.max_k)
    settings = provenance(problem, moments, eval_moments)
    states = [a for m in (moments, eval_moments) if m is not None for a in m.state]
    about = settings | {"k": max_k, "program": how.program.name}
    store = shared_store(how.run.store, lambda: fingerprint(states, about))
    held = None if eval_moments is None else _hold_out(problem, eval_moments)
    with solve_context(problem.dtype):
        on_device = None if held is None else jax.device_put(held)
    by_basis: dict[BasisKey, dict[str, GridPoint]] = {}
    for point in spec.points():
        by_basis.setdefault(point.basis, {}).setdefault(point.key, point)
    on_cpu = is_cpu(solve_device(problem.dtype))
    batch = (1 if on_cpu or mesh is not None else 8) if how.run.batch_size is None else how.run.batch_size
    if mesh is not None:
        batch *= mesh.devices.size
    groups = []
    for basis, members in by_basis.items():
        tasks = [Task((f"je-{basis.name}",), partial(_joint_embedding, problem, max_k))]
        # Without mask or supervision the principal components are the answer, and they are there.
        known = [p for p in members.values() if _is_diagonal(problem, p)]
        tasks += [Task((p.key,), partial(_solve_diagonal, p, problem, how.program, max_k)) for p in known]
        points = [p for p in members.values() if p not in known]
        for chunk in (points[i : i + batch] for i in range(0, len(points), batch)):
            solve = partial(_solve_batch, chunk, problem, how.program, max_k, batch, mesh)
            tasks.append(Task(tuple(p.key for p in chunk), solve))
        groups.append(TaskGroup(partial(_make_basis, problem, eval_moments, on_device, basis), tasks))
    found = run_groups(
        groups, workers=workers if on_cpu and mesh is None else 1, store=store, progress=how.run.progress
    )
    where = {"masking": type(spec.masks[0][0]).__name__, "platform": solve_device(problem.dtype).platform}
    return assemble(problem, held, spec, max_k, found, settings | where)


class Coordinates(NamedTuple):
    """What the points of one basis share: the basis, and the held-out data in its coordinates."""

    basis: PatchBasis
    held: HeldOut | HeldOutRows | None


def _check_fits(
    moments: Moments | Samples, eval_moments: Moments | Samples | None, spec: GridSpec, how: Solve, rank: int
) -> None:
    """Refuse a sweep on the host that cannot fit into its memory (that of an accelerator is not looked at)."""
    if not is_cpu(solve_device(how.dtype)):
        return
    points = spec.points()
    needed = sweep_bytes(
        rank,
        worker_count(how.run.workers),
        len({p.basis for p in points}),
        len(points),
        how.max_k or rank,
        moments.num_targets,
        0 if eval_moments is None else len(eval_moments.counts),
    )
    check_memory(needed, f"a sweep of rank up to {rank}", "use fewer samples or smaller images, workers=1, or max_k")


def _factorize(moments: Moments | Samples, how: Solve) -> Factorized:
    if isinstance(moments, Samples):
        solve = partial(factorize_samples, moments)
    else:
        solve = partial(factorize, moments)
    return solve(pixel_noise=how.pixel_noise, rtol=how.rtol, dtype=how.dtype, target=how.target)


def _hold_out(problem: Factorized, eval_moments: Moments | Samples) -> HeldOut | HeldOutRows:
    """Held-out data in coordinates without a mask; check_held_out has seen to it that both are of one kind."""
    if isinstance(problem, DualProblem) and isinstance(eval_moments, Samples):
        return hold_out_samples(problem, eval_moments)
    assert isinstance(problem, PrimalProblem) and isinstance(eval_moments, Moments)
    return hold_out(problem, eval_moments)


def _make_basis(
    problem: Factorized, unseen: Moments | Samples | None, held: HeldOut | HeldOutRows | None, key: BasisKey
) -> Coordinates:
    if key.patch_size is None:
        return Coordinates(pca_basis(problem, key.noise), held)
    if isinstance(problem, DualProblem):
        samples = unseen if isinstance(unseen, Samples) else None
        return Coordinates(*masked_basis(problem, key.patch_size, key.noise, samples))
    basis = patch_basis(problem, key.patch_size, key.noise)
    if isinstance(problem, PrimalProblem) and isinstance(unseen, Moments) and problem.rank < unseen.num_pixels:
        with solve_context(problem.dtype):
            held = jax.device_put(hold_out_masked(problem, basis, key.patch_size, key.noise, unseen))
    return Coordinates(basis, held)


def _solve_batch(
    points: Sequence[GridPoint],
    problem: Factorized,
    program: PointProgram,
    max_k: int,
    batch: int,
    mesh: Mesh | None,
    made: Coordinates,
) -> list[Arrays]:
    """Solve some points of one basis in one call of one compiled program."""
    dtype, (basis, held) = np.dtype(problem.dtype), made
    with solve_context(dtype):
        pi = np.asarray(basis.pi, np.float64)
        w = np.stack([mask_weights(pi, p.p_eff, p.noise_variance) for p in points])
        alpha, beta = np.array([p.weights(problem)[:2] for p in points]).T
        shared = program.shared(basis, problem, held)
        if mesh is not None:
            out = solve_over_mesh(program, mesh, shared, tuple(a.astype(dtype) for a in (w, alpha, beta)), max_k)
        elif batch == 1:
            out = program.one(*shared, *(a[0].astype(dtype) for a in (w, alpha, beta)), max_k=max_k)
            out = jax.tree.map(lambda a: np.asarray(a)[None], out)
        else:
            # The last batch is filled up with its last point: one shape, one compilation.
            fill = np.minimum(np.arange(batch), len(points) - 1)
            out = program.many(*shared, *(a[fill].astype(dtype) for a in (w, alpha, beta)), max_k=max_k)
            out = jax.tree.map(np.asarray, out)
    condition = w.max(1) / w.min(1)
    named = program.named(out)
    return [{name: a[i] for name, a in named.items()} | {"condition": condition[i]} for i in range(len(points))]


def _is_diagonal(problem: Factorized, point: GridPoint) -> bool:
    """Whether the eigenvectors of a point are the axes: the image itself, without mask or supervision."""
    return point.basis.patch_size is None and math.isinf(point.lam) and problem.target_gram is None


def _solve_diagonal(
    point: GridPoint, problem: Factorized, program: PointProgram, max_k: int, made: Coordinates
) -> list[Arrays]:
    """Solve a point whose eigenvectors are the axes of the basis."""
    dtype, (basis, held) = np.dtype(problem.dtype), made
    with solve_context(dtype):
        w = mask_weights(np.asarray(basis.pi, np.float64), point.p_eff, point.noise_variance)
        arguments = (problem.s, basis.target, w.astype(dtype), dtype.type(point.weights(problem)[1]))
        before = () if held is None else (held,)
        named = program.named(jax.tree.map(np.asarray, program.diagonal(*before, *arguments, max_k=max_k)))
    return [named | {"condition": w.max() / w.min()}]


def _joint_embedding(problem: Factorized, max_k: int, made: Coordinates) -> list[Arrays]:
    """Linear joint embedding's features are the columns of E as they stand, by descending pi."""
    basis, held = made
    with solve_context(problem.dtype):
        out: Arrays = {"t": np.asarray(basis.target[:max_k])}
        if held is not None:
            errors, parts = held_out_errors_jit(basis.e[:, :max_k], basis.target[:max_k], held)
            out |= {"errors": np.asarray(errors), "group_errors": np.asarray(parts)}
    return [out]
