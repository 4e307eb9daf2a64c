"""Grids over patch size, pixel noise, mask ratio and supervision, every k at once.

:func:`sweep` is the joint grid; :func:`masking_sweep`, :func:`lambda_sweep` and :func:`gaussian_sweep` are its slices.
Results are labelled ``xarray.Dataset`` objects that hold NumPy arrays and record how they were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import xarray as xr

from mae_align import grid
from mae_align.corruption import PatchMask, PatchMasking
from mae_align.moments import Moments
from mae_align.patches import PatchSize
from mae_align.points import GridSpec
from mae_align.problem import DType
from mae_align.samples import Samples
from mae_align.solver import RunOptions, Solve, solve_grid
from mae_align.targets import TargetOperator


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
            formed (:func:`mae_align.samples.summarize` makes the cheaper of the two).
        patch_sizes: ints or (h, w) in pixels. mask_ratios: in [0, 1], both ends included.
        masking: family of masks; ``FixedCountPatchMasking`` rounds the ratio to whole patches (see the coordinates
            ``realized_ratio`` and ``num_patches``).
        eval_moments: of held-out data, with groups for standard errors; samples where ``moments`` are samples.
        max_k: number of features; default the rank.
        pixel_noise, rtol, dtype: as in :func:`mae_align.factorize.factorize`.
        target: W where W x is reconstructed instead of x (:mod:`mae_align.targets`).
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
