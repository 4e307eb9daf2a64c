"""Grids over patch size, pixel noise, mask ratio and supervision, every k at once.

:func:`sweep` is the joint grid; :func:`masking_sweep`, :func:`lambda_sweep` and :func:`gaussian_sweep` are its slices.
Results are labelled ``xarray.Dataset`` objects that hold NumPy arrays and record how they were made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr
from jax.sharding import Mesh

from mae_align.closed_form import point as grid
from mae_align.closed_form.basis import PatchBasis, mask_weights, patch_basis, pca_basis
from mae_align.closed_form.dataset import assemble, provenance
from mae_align.closed_form.dual import DualProblem, check_patches, factorize_samples, hold_out_samples, masked_basis
from mae_align.closed_form.factorize import DType, Factorized, PrimalProblem, factorize
from mae_align.closed_form.grid import BasisKey, GridPoint, GridSpec
from mae_align.closed_form.held_out import (
    HeldOut,
    HeldOutRows,
    check_held_out,
    held_out_errors_jit,
    hold_out,
    hold_out_masked,
)
from mae_align.closed_form.point import PointProgram
from mae_align.closed_form.targets import TargetOperator
from mae_align.corruption import PatchMask, PatchMasking
from mae_align.data.patches import PatchSize
from mae_align.moments.moments import Moments
from mae_align.moments.samples import Samples
from mae_align.runtime.checks import check_task
from mae_align.runtime.devices import is_cpu, solve_context, solve_device, solve_dtype, worker_count
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import fingerprint
from mae_align.runtime.memory import check_memory, sweep_bytes
from mae_align.runtime.pool import (
    Arrays,
    Task,
    TaskGroup,
    check_mesh,
    default_mesh,
    run_groups,
    shared_store,
    solve_over_mesh,
)


def masking_sweep(
    moments: Moments | Samples,
    patch_sizes: Sequence[PatchSize],
    mask_ratios: Sequence[float],
    *,
    masking: type[PatchMask] = PatchMasking,
    eval_moments: Moments | Samples | None = None,
    max_k: int | None = None,
    pixel_noise: float | None = None,
    rtol: float | None = None,
    dtype: DType = "float64",
    target: TargetOperator | None = None,
    run: RunOptions | None = None,
) -> xr.Dataset:
    """Curves of the masked autoencoder's features for every patch size, mask ratio and k (the paper's Fig. 7).

    V spans the top-k solutions of A A^T v = mu G v with G, A of the mask (Theorem 3); the probe is refitted on clean
    images. ``je_r2`` is linear joint embedding of two masked views: the eigenvectors of P, at any ratio in (0, 1).

    Args:
        moments: of the training data, or its samples where they are fewer than the pixels: then no [d, d] array is
            formed (:func:`mae_align.moments.samples.summarize` makes the cheaper of the two).
        patch_sizes: ints or (h, w) in pixels. mask_ratios: in [0, 1], both ends included.
        masking: family of masks; ``FixedCountPatchMasking`` rounds the ratio to whole patches (see the coordinates
            ``realized_ratio`` and ``num_patches``).
        eval_moments: of held-out data, with groups for standard errors; samples where ``moments`` are samples.
        max_k: number of features; default the rank.
        pixel_noise, rtol, dtype: as in :func:`mae_align.closed_form.factorize.factorize`.
        target: W where W x is reconstructed instead of x (:mod:`mae_align.closed_form.targets`).
        run: workers, batches, progress, resume.

    Returns:
        Dataset over patch_size, mask_ratio, k with r2, alignment, alignment_percent, probe_mse, loss, eigengap, je_r2,
        je_alignment and, with ``eval_moments``, eval_r2, eval_r2_se, eval_influence (over ``group``) and their je_
        counterparts; p_eff, condition as coordinates, and ``saturated``: a patch has at least as many pixel values as
        there are samples. Cost: one eigh and one R-only QR of the rank per point.

    Raises:
        InputError: bad grids, max_k over the rank, held-out data that does not match, a store of another sweep, not
            enough memory, samples on which masking is identically inert.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).integers(0, 256, (90, 4, 4, 1)).astype(np.uint8)
        >>> m = Moments.from_arrays(x, np.arange(90) % 3)
        >>> result = masking_sweep(m, [1, 2], [0.0, 0.5, 1.0])
        >>> dict(result.r2.sizes)
        {'patch_size': 2, 'mask_ratio': 3, 'k': 16}
        >>> bool((result.r2.sel(mask_ratio=0.0, patch_size=1) == result.r2.sel(mask_ratio=0.0, patch_size=2)).all())
        True
    """
    spec = GridSpec.checked(moments.image_shape, patch_sizes, [0.0], mask_ratios, [math.inf], masking)
    program = grid.CURVES if eval_moments is None else grid.HELD_OUT
    how = Solve(program, max_k, pixel_noise, rtol, dtype, target, run or RunOptions())
    result = solve_grid(moments, eval_moments, spec, how)
    result = result.isel(noise_level=0, lam=0, drop=True)
    for name in [name for name in result if str(name).startswith("je_")]:
        # Joint embedding without pixel noise is one curve per patch size; ratios 0 and 1 have none of their own.
        result[name] = result[name].max("mask_ratio", skipna=True)
    return result


def sweep(
    moments: Moments | Samples,
    *,
    patch_sizes: Sequence[PatchSize],
    mask_ratios: Sequence[float],
    noise_levels: Sequence[float] = (0.0,),
    lambdas: Sequence[float] = (math.inf,),
    masking: type[PatchMask] = PatchMasking,
    eval_moments: Moments | Samples | None = None,
    max_k: int | None = None,
    pixel_noise: float | None = None,
    rtol: float | None = None,
    dtype: DType = "float64",
    target: TargetOperator | None = None,
    run: RunOptions | None = None,
) -> xr.Dataset:
    """The joint grid patch size x pixel noise x mask ratio x supervision, every k.

    min over V, W, Z of E|W^T V^T x' - y|^2 + lam E|Z^T V^T x' - x|^2, x' = mask(x + noise): V spans the top-k solutions
    of (lam A A^T + B B^T) v = mu G v, A = E[x' x^T], B = E[x' y^T].

    Args:
        moments: of the training data. patch_sizes, mask_ratios, masking: as in :func:`masking_sweep`.
        noise_levels: sigma of isotropic Gaussian noise added before the mask, units of the stored pixels.
        lambdas: weight of reconstruction against supervision of weight 1, in [0, inf]; 0 is the limit 0+, inf is
            reconstruction alone. It has the units target^2 / pixel^2: see the coordinate ``lam_relative``.
        eval_moments, max_k, pixel_noise, rtol, dtype, target, run: as in :func:`masking_sweep`.

    Returns:
        Dataset over patch_size, noise_level, mask_ratio, lam, k with the variables of :func:`masking_sweep` and
        ``reconstruction_mse``: error of a linear decoder of the clean features, squared pixel units. The joint
        embedding curves have no lam axis. Cost: one eigh and one QR per point; one more eigh per point with noise.

    Raises:
        InputError: as :func:`masking_sweep`; a negative noise level or lambda.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).integers(0, 256, (90, 4, 4, 1)).astype(np.uint8)
        >>> m = Moments.from_arrays(x, np.arange(90) % 3)
        >>> result = sweep(m, patch_sizes=[2], mask_ratios=[0.5], noise_levels=[0.0, 9.0], lambdas=[0.0, 1.0])
        >>> dict(result.r2.sizes)
        {'patch_size': 1, 'noise_level': 2, 'mask_ratio': 1, 'lam': 2, 'k': 16}
    """
    spec = GridSpec.checked(moments.image_shape, patch_sizes, noise_levels, mask_ratios, lambdas, masking)
    program = grid.FEATURES if eval_moments is None else grid.HELD_OUT
    how = Solve(program, max_k, pixel_noise, rtol, dtype, target, run or RunOptions())
    return solve_grid(moments, eval_moments, spec, how)


def lambda_sweep(moments: Moments | Samples, lambdas: Sequence[float], **options: Any) -> xr.Dataset:
    """Supervised + reconstruction trade-off of Theorem 1, every k.

    Args:
        moments: of the training data. lambdas: in [0, inf], see :func:`sweep`.
        **options: eval_moments, max_k, pixel_noise, rtol, dtype, target, run of :func:`sweep`.

    Returns:
        Dataset over lam, k.

    Raises:
        InputError: as :func:`sweep`.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).integers(0, 256, (90, 2, 2, 1)).astype(np.uint8)
        >>> lambda_sweep(Moments.from_arrays(x, np.arange(90) % 3), [0.0, 1e-4, np.inf]).r2.dims
        ('lam', 'k')
    """
    result = sweep(moments, patch_sizes=[moments.image_shape[:2]], mask_ratios=[0.0], lambdas=lambdas, **options)
    result = result.drop_vars([name for name in result if str(name).startswith("je_")])
    return result.isel(patch_size=0, noise_level=0, mask_ratio=0, drop=True)


def gaussian_sweep(moments: Moments | Samples, sigmas: Sequence[float], **options: Any) -> xr.Dataset:
    """Isotropic Gaussian denoising over noise levels, every k: the curves do not move (corollary of Theorem 3).

    Args:
        moments: of the training data. sigmas: units of the stored pixels.
        **options: lambdas, eval_moments, max_k, pixel_noise, rtol, dtype, target, run of :func:`sweep`.

    Returns:
        Dataset over noise_level, k (and lam, if ``lambdas`` is given).

    Raises:
        InputError: as :func:`sweep`.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).integers(0, 256, (90, 2, 2, 1)).astype(np.uint8)
        >>> r2 = gaussian_sweep(Moments.from_arrays(x, np.arange(90) % 3), [0.0, 5.0]).r2
        >>> bool(np.allclose(r2[0], r2[1]))
        True
    """
    result = sweep(moments, patch_sizes=[moments.image_shape[:2]], mask_ratios=[0.0], noise_levels=sigmas, **options)
    drop: dict[str, int] = {"patch_size": 0, "mask_ratio": 0}
    return result.isel(drop if "lambdas" in options else drop | {"lam": 0}, drop=True)


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
        pixel_noise, rtol, dtype, target: see :func:`mae_align.closed_form.factorize.factorize`. run: see
        :class:`RunOptions`.
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
