"""Grids over patch size, pixel noise, mask ratio and supervision, every k at once.

:func:`sweep` is the joint grid; :func:`masking_sweep`, :func:`lambda_sweep` and :func:`gaussian_sweep` are its slices.
Results are labelled ``xarray.Dataset`` objects that hold NumPy arrays and record how they were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr
from jax.sharding import Mesh

from mae_align.closed_form.basis import mask_weights
from mae_align.closed_form.dataset import assemble, identifying, provenance
from mae_align.closed_form.dual import check_patches, factorize_samples
from mae_align.closed_form.factorize import DType, Factorized, factorize
from mae_align.closed_form.grid import BasisKey, GridPoint, GridSpec
from mae_align.closed_form.held_out import HeldOut, HeldOutRows, check_held_out, solved_errors
from mae_align.closed_form.point import (
    PointFunction,
    Shared,
    Weights,
    solve_diagonal,
    solve_features,
    solve_many,
    solve_one,
    solve_point,
)
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
    RunOptions,
    Task,
    TaskGroup,
    check_mesh,
    default_mesh,
    execute,
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
        patch_sizes: ints or (h, w) in pixels.
        mask_ratios: in [0, 1], both ends included.
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
    function = solve_point if eval_moments is None else solve_features
    how = Solve(function, max_k, pixel_noise, rtol, dtype, target, run or RunOptions())
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
        moments: of the training data.
        patch_sizes, mask_ratios, masking: as in :func:`masking_sweep`.
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
    how = Solve(solve_features, max_k, pixel_noise, rtol, dtype, target, run or RunOptions())
    return solve_grid(moments, eval_moments, spec, how)


def lambda_sweep(moments: Moments | Samples, lambdas: Sequence[float], **options: Any) -> xr.Dataset:
    """Supervised + reconstruction trade-off of Theorem 1, every k.

    Args:
        moments: of the training data.
        lambdas: in [0, inf], see :func:`sweep`.
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
        moments: of the training data.
        sigmas: units of the stored pixels.
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


class Solve(NamedTuple):
    """How a grid is solved.

    Attributes:
        function: of a point.
        max_k: number of features; None for the rank.
        pixel_noise: see :func:`mae_align.closed_form.factorize.factorize`, as for the next three.
        rtol: relative cutoff of the spectrum.
        dtype: precision.
        target: W where W x is reconstructed.
        run: workers, batches, progress, store, mesh.
    """

    function: PointFunction
    max_k: int | None
    pixel_noise: float | None
    rtol: float | None
    dtype: DType
    target: TargetOperator | None
    run: RunOptions


def solve_grid(
    moments: Moments | Samples, eval_moments: Moments | Samples | None, spec: GridSpec, how: Solve
) -> xr.Dataset:
    """Solve every point of a checked grid: called by threads on a CPU, vmapped on an accelerator, or over a mesh.

    Args:
        moments: of the training data, or its samples.
        eval_moments: of held-out data, of the same kind.
        spec: the grid.
        how: the function of a point and its options.

    Returns:
        The labelled result.

    Raises:
        InputError: what cannot be solved, before any long work.
    """
    # Everything that can be refused without work is refused first.
    solve_dtype(how.dtype)
    how.run.check()
    if how.max_k is not None and not (isinstance(how.max_k, int | np.integer) and 1 <= how.max_k <= moments.most_rank):
        raise InputError(
            f"k={how.max_k}: {moments.count} images of {moments.num_pixels} pixel values, "
            f"give a whole number up to their rank (at most {moments.most_rank})"
        )
    check_task(moments.num_targets)
    mesh = default_mesh(how.dtype) if how.run.mesh is None else how.run.mesh
    if mesh is not None:
        check_mesh(mesh, how.dtype)
    if eval_moments is not None:
        check_held_out(eval_moments, moments)
    points = spec.points()
    if isinstance(moments, Samples) and how.pixel_noise == 0:
        inert = [p.basis.patch_size for p in points if p.basis.patch_size is not None and p.basis.noise == 0]
        check_patches(moments, list(dict.fromkeys(inert)))
    _check_fits(moments, eval_moments, points, how)
    problem = _factorize(moments, how)
    max_k = problem.rank if how.max_k is None else problem.check_k(how.max_k)
    settings = provenance(problem, moments, eval_moments)
    held = None if eval_moments is None else problem.hold_out(eval_moments)
    with solve_context(problem.dtype):
        on_device = None if held is None else jax.device_put(held)
    device = solve_device(problem.dtype)
    batch = (1 if is_cpu(device) or mesh is not None else 8) if how.run.batch_size is None else how.run.batch_size
    grid = _Grid(problem, eval_moments, on_device, how.function, max_k, batch, mesh)
    by_basis: dict[BasisKey, dict[str, GridPoint]] = {}
    for point in points:
        by_basis.setdefault(point.basis, {}).setdefault(point.key, point)

    def identity() -> str:
        states = [a for m in (moments, eval_moments) if m is not None for a in m.state]
        return fingerprint(states, identifying(settings) | {"k": max_k, "function": how.function.__name__})

    groups = [grid.tasks(basis, list(members.values())) for basis, members in by_basis.items()]
    found = execute(groups, how.run, dtype=how.dtype, identity=identity, mesh=mesh)
    where = {"masking": type(spec.masks[0][0]).__name__, "platform": device.platform}
    return assemble(problem, held, spec, max_k, found, settings | where)


def _check_fits(
    moments: Moments | Samples, eval_moments: Moments | Samples | None, points: Sequence[GridPoint], how: Solve
) -> None:
    """Refuse a sweep on the host that cannot fit into its memory (that of an accelerator is not looked at)."""
    if not is_cpu(solve_device(how.dtype)):
        return
    rank = moments.most_rank
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
    """The problem of the kind that the data are."""
    solve = partial(factorize_samples if isinstance(moments, Samples) else factorize, moments)
    return solve(pixel_noise=how.pixel_noise, rtol=how.rtol, dtype=how.dtype, target=how.target)


class _Grid(NamedTuple):
    """What all points of a grid have in common; ``held`` is the held-out data in coordinates without a mask."""

    problem: Factorized
    unseen: Moments | Samples | None
    held: HeldOut | HeldOutRows | None
    function: PointFunction
    max_k: int
    batch: int
    mesh: Mesh | None

    def tasks(self, basis: BasisKey, points: Sequence[GridPoint]) -> TaskGroup[Shared]:
        """The points of one basis as tasks, and joint embedding, which is one for all of them."""
        # Without mask or supervision the principal components are the answer, and they are there.
        known = [p for p in points if basis.patch_size is None and math.isinf(p.lam) and self.problem.target is None]
        rest = [p for p in points if p not in known]
        size = self.batch * (1 if self.mesh is None else self.mesh.devices.size)
        chunks = [rest[i : i + size] for i in range(0, len(rest), size)]
        tasks = [Task((f"je-{basis.name}",), self.joint_embedding)]
        tasks += [Task((p.key,), partial(self.solve_known, p)) for p in known]
        tasks += [Task(tuple(p.key for p in chunk), partial(self.solve, chunk, size)) for chunk in chunks]
        return TaskGroup(partial(self.shared, basis), tasks)

    def shared(self, key: BasisKey) -> Shared:
        """The basis, and the held-out data as its encoders see them."""
        basis, held = self.problem.coordinates(key.patch_size, key.noise, self.unseen, self.held)
        with solve_context(self.problem.dtype):
            return Shared(basis, self.problem.spectrum, held)

    def weights(self, shared: Shared, points: Sequence[GridPoint]) -> tuple[np.ndarray, Weights]:
        """w [n, r] in float64, and the weights of the points in the precision of the solves."""
        pi = np.asarray(shared.basis.pi, np.float64)
        w = np.stack([mask_weights(pi, p.p_eff, p.noise_variance) for p in points])
        alpha, beta = np.array([p.weights(self.problem)[:2] for p in points]).T
        at: list[Any] = [a.astype(self.problem.dtype) for a in (w, alpha, beta)]
        return w, Weights(*at)

    def solve(self, points: Sequence[GridPoint], size: int, shared: Shared) -> list[Arrays]:
        """Some points of one basis in one call of one compiled program."""
        with solve_context(self.problem.dtype):
            w, at = self.weights(shared, points)
            if self.mesh is not None:
                out = solve_over_mesh(self.function, self.mesh, shared, at, self.max_k)
            elif size == 1:
                out = solve_one(self.function, shared, jax.tree.map(lambda a: a[0], at), max_k=self.max_k)
                out = jax.tree.map(lambda a: np.asarray(a)[None], out)
            else:
                # The last batch is filled up with its last point: one shape, one compilation.
                fill = np.minimum(np.arange(size), len(points) - 1)
                out = solve_many(self.function, shared, jax.tree.map(lambda a: a[fill], at), max_k=self.max_k)
            named = out.named()
        condition = w.max(1) / w.min(1)
        return [{name: a[i] for name, a in named.items()} | {"condition": condition[i]} for i in range(len(points))]

    def solve_known(self, point: GridPoint, shared: Shared) -> list[Arrays]:
        """A point whose eigenvectors are the axes of the basis."""
        with solve_context(self.problem.dtype):
            w, at = self.weights(shared, [point])
            out = solve_one(solve_diagonal, shared, jax.tree.map(lambda a: a[0], at), max_k=self.max_k)
            # The same arrays as of every other point.
            named = (out._replace(explained=None) if self.function is solve_point else out).named()
        return [named | {"condition": w.max() / w.min()}]

    def joint_embedding(self, shared: Shared) -> list[Arrays]:
        """Linear joint embedding's features are the columns of E as they stand, by descending pi."""
        e, t = np.asarray(shared.basis.e)[:, : self.max_k], np.asarray(shared.basis.target)[: self.max_k]
        return [{"t": t} | ({} if shared.held is None else solved_errors(e, t, shared.held))]
