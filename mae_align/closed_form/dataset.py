"""From solved points to a labelled result that records how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import xarray as xr

import mae_align
from mae_align.closed_form.curves import curves_from_targets
from mae_align.closed_form.factorize import Factorized
from mae_align.closed_form.grid import BasisKey, GridPoint, GridSpec
from mae_align.closed_form.held_out import HeldOut, HeldOutRows, held_out_curves
from mae_align.data.patches import PatchSize, patch_grid, patch_hw
from mae_align.moments.moments import Moments
from mae_align.moments.samples import Samples
from mae_align.runtime.files import identity

_AXES = ("patch_size", "noise_level", "mask_ratio", "lam")
DESCRIPTIONS = {
    "r2": ("share of the label variance a linear probe explains, in-sample", "1"),
    "alignment": ("the paper's alignment ratio (uncentred Y^T Y, relative to full rank), in-sample", "1"),
    "alignment_percent": ("100 sqrt(alignment), the score of the published figures, in-sample", "%"),
    "probe_mse": ("mean squared error of the linear probe, in-sample", "target^2"),
    "loss": ("attained training loss", "pixel^2 (lam = inf), else target^2"),
    "reconstruction_mse": (
        "error of a linear decoder of the clean features, of W x where that is the target",
        "pixel^2",
    ),
    "eigengap": ("(mu_k - mu_{k+1}) / mu_k; at 0 the k features are not identified", "1"),
    "eval_r2": ("share of the held-out label variance explained", "1"),
    "eval_r2_se": ("standard error of eval_r2 (held-out sampling)", "1"),
    "eval_influence": ("influence of each held-out group on eval_r2, for paired standard errors", "1"),
    "je_r2": ("r2 of linear joint embedding of two masked views", "1"),
    "je_alignment": ("alignment of linear joint embedding", "1"),
    "je_eval_r2": ("held-out r2 of linear joint embedding", "1"),
    "je_eval_r2_se": ("standard error of je_eval_r2", "1"),
    "je_eval_influence": ("influence of each held-out group on je_eval_r2", "1"),
}
_SATURATED = "a patch has as many pixel values as there are samples: it fits them exactly, but for the pixel noise"


def assemble(
    problem: Factorized,
    held: HeldOut | HeldOutRows | None,
    spec: GridSpec,
    max_k: int,
    found: Mapping[str, Mapping[str, np.ndarray]],
    attributes: Mapping[str, Any],
) -> xr.Dataset:
    """Dataset over patch_size, noise_level, mask_ratio, lam, k (and group) from the arrays of the solved points.

    Args:
        problem: what was solved.
        held: held-out data, or None.
        spec: the grid.
        max_k: number of features.
        found: arrays by the key of a point, and by ``je-`` and the name of a basis.
        attributes: provenance.

    Returns:
        The labelled result, float64.
    """
    shape = tuple(len(a) for a in (spec.patch_sizes, spec.noise_levels, spec.mask_ratios, spec.lambdas))
    values: dict[str, np.ndarray] = {}
    joint: dict[BasisKey, dict[str, np.ndarray]] = {}
    for point in spec.points():
        if point.basis not in joint:
            joint[point.basis] = _joint_embedding(point.basis, found[f"je-{point.basis.name}"], problem, held)
        for name, value in (_point_values(point, found[point.key], problem, held) | joint[point.basis]).items():
            axes = len(_axes(name))
            if name not in values:
                values[name] = np.full(shape[:axes] + np.shape(value), np.nan)
            values[name][point.index[:axes]] = value
    data = {name: labelled(name, value, _axes(name)) for name, value in values.items()}
    return xr.Dataset(data, _coordinates(problem, spec, max_k), dict(attributes)).set_coords("condition")


def in_sample(arrays: Mapping[str, np.ndarray], problem: Factorized) -> dict[str, np.ndarray]:
    """r2, alignment, probe_mse and alignment_percent [..., k] from the targets ``t`` [..., k, q]."""
    curves = curves_from_targets(arrays["t"], problem.t0, problem.syy, problem.yty)
    return curves._asdict() | {"alignment_percent": 100.0 * np.sqrt(np.maximum(curves.alignment, 0.0))}


def held_out(arrays: Mapping[str, np.ndarray], held: HeldOut | HeldOutRows | None) -> dict[str, np.ndarray]:
    """eval_r2, eval_r2_se [..., k] and eval_influence [..., g, k]; nothing without held-out data."""
    if held is None:
        return {}
    out = held_out_curves(arrays["errors"], arrays["group_errors"], held)
    return {"eval_r2": out.r2, "eval_r2_se": out.se, "eval_influence": out.influence}


def labelled(name: str, value: np.ndarray, axes: tuple[str, ...]) -> xr.Variable:
    """A variable over some axes, and k or group and k, with its long name and units."""
    extra = {0: (), 1: ("k",), 2: ("group", "k")}[value.ndim - len(axes)]
    long_name, units = DESCRIPTIONS.get(name, (name, "1"))
    return xr.Variable(axes + extra, value, {"long_name": long_name, "units": units})


def _axes(name: str) -> tuple[str, ...]:
    """The grid's axes of a variable: joint embedding knows no supervision."""
    return _AXES[:3] if name.startswith("je_") else _AXES


def _point_values(
    point: GridPoint, arrays: Mapping[str, np.ndarray], problem: Factorized, held: HeldOut | HeldOutRows | None
) -> dict[str, np.ndarray]:
    """Everything that is reported of one cell."""
    keep, start = point.mask.keep_probability(problem.image_shape), point.weights(problem)[2]
    values = in_sample(arrays, problem)
    values["loss"] = start * (1.0 - keep * np.cumsum(np.asarray(arrays["mu"], np.float64)))
    values |= {"eigengap": arrays["gap"], "condition": arrays["condition"]}
    if "explained" in arrays:
        values["reconstruction_mse"] = problem.target_trace - np.asarray(arrays["explained"], np.float64)
    return values | held_out(arrays, held)


def _joint_embedding(
    key: BasisKey, arrays: Mapping[str, np.ndarray], problem: Factorized, held: HeldOut | HeldOutRows | None
) -> dict[str, np.ndarray]:
    """What is reported of joint embedding in one basis."""
    # Without mask or noise two views are equal and every direction ties: joint embedding is not defined.
    blank = 1.0 if key.patch_size is not None or key.noise > 0 else np.nan
    values = in_sample(arrays, problem) | held_out(arrays, held)
    return {f"je_{name}": blank * value for name, value in values.items() if f"je_{name}" in DESCRIPTIONS}


def patch_size_labels(patch_sizes: tuple[PatchSize, ...]) -> list[int] | list[str]:
    """Coordinate of the patch axis: numbers where all patches are square ints, else 'HxW'.

    Example:
        >>> patch_size_labels((1, 4)), patch_size_labels((1, (2, 4)))
        ([1, 4], ['1x1', '2x4'])
    """
    if all(not isinstance(size, tuple) for size in patch_sizes):
        return [patch_hw(size)[0] for size in patch_sizes]
    return ["{}x{}".format(*patch_hw(size)) for size in patch_sizes]


def _coordinates(problem: Factorized, spec: GridSpec, max_k: int) -> dict[str, Any]:
    shape = problem.image_shape
    masks = spec.masks
    relative = [lam * problem.target_trace / float(np.trace(problem.syy)) for lam in spec.lambdas]
    patches = [math.prod(patch_grid(shape, size)) for size in spec.patch_sizes]
    pixels = [math.prod(patch_hw(size)) * shape[2] for size in spec.patch_sizes]
    two = ("patch_size", "mask_ratio")
    return {
        "patch_size": patch_size_labels(spec.patch_sizes),
        "noise_level": list(spec.noise_levels),
        "mask_ratio": list(spec.mask_ratios),
        "lam": list(spec.lambdas),
        "k": np.arange(1, max_k + 1),
        "num_patches": ("patch_size", patches),
        "saturated": ("patch_size", [size >= problem.count for size in pixels], {"long_name": _SATURATED}),
        "lam_relative": ("lam", relative, {"long_name": "lam tr W Sxx W^T / tr Syy (W = 1: the image)", "units": "1"}),
        "p_eff": (two, [[mask.p_eff(shape) for mask in row] for row in masks]),
        "realized_ratio": (two, [[1.0 - mask.keep_probability(shape) for mask in row] for row in masks]),
    }


def _versions() -> dict[str, str]:
    return {"mae_align_version": mae_align.__version__, "jax_version": jax.__version__}


def identifying(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What finished points depend on, of what a result records: all but the versions, so that they outlive an update.

    Example:
        >>> identifying({"jax_version": "0.10.2", "rank": 3})
        {'rank': 3}
    """
    return {name: value for name, value in settings.items() if name not in _versions()}


def provenance(
    problem: Factorized, moments: Moments | Samples, eval_moments: Moments | Samples | None
) -> dict[str, Any]:
    """What a result records about how it was made (JSON-able).

    Example:
        >>> from mae_align.closed_form.factorize import factorize
        >>> m = Moments.from_arrays(np.eye(4).reshape(4, 2, 2, 1), np.array([0, 1, 0, 1]))
        >>> provenance(factorize(m), m, None)["image_shape"]
        '[2, 2, 1]'
    """
    return {
        **_versions(),
        "dtype": problem.dtype,
        "rank": problem.rank,
        "pixel_noise": problem.pixel_noise,
        "rtol": problem.rtol,
        "num_train": moments.count,
        "num_eval": 0 if eval_moments is None else eval_moments.count,
        "num_groups": 0 if eval_moments is None else len(eval_moments.counts),
        "image_shape": json.dumps(moments.image_shape),
        "pixel_dtype": moments.pixel_dtype,
        "centered": str(moments.center),
        "preprocessing": moments.preprocessing,
        "fill": "mean image" if moments.center else "zero",
        "factorisation": problem.kind,
        "target": "image" if problem.target is None else problem.target.name,
        "target_identity": "" if problem.target is None else identity(problem.target),
        "trace_sxx": problem.trace,
        "trace_syy": float(np.trace(problem.syy)),
    }
