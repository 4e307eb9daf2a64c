"""Curves of any list of corruptions side by side, every k at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np
import xarray as xr

from mae_align.closed_form.basis import PatchBasis, patch_basis
from mae_align.closed_form.dataset import held_out, identifying, in_sample, labelled, provenance
from mae_align.closed_form.factorize import PrimalProblem, factorize
from mae_align.closed_form.features import corruption_features, shared_patch
from mae_align.closed_form.held_out import HeldOut, check_held_out, solved_errors
from mae_align.closed_form.targets import TargetOperator
from mae_align.corruption import Corruption, ExactCorruption
from mae_align.corruption.base import Images
from mae_align.moments.moments import Moments
from mae_align.runtime.checks import check_task
from mae_align.runtime.devices import solve_context, solve_device
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import fingerprint, identity
from mae_align.runtime.pool import Arrays, RunOptions, Task, TaskGroup, execute


def corruption_sweep(
    moments: Moments,
    corruptions: Sequence[Corruption] | Mapping[str, Corruption],
    *,
    eval_moments: Moments | None = None,
    max_k: int | None = None,
    pixel_noise: float | None = None,
    rtol: float | None = None,
    target: TargetOperator | None = None,
    images: Images | None = None,
    run: RunOptions | None = None,
) -> xr.Dataset:
    """Curves of the denoising autoencoder's features for every corruption and k.

    V spans the top-k solutions of A A^T v = mu G v with G = cov(x'), A = cov(x', W x) (Theorem 3; W = 1 without a
    target); the probe is refitted on clean images. For grids of patch masks with the mean image as fill
    :func:`mae_align.closed_form.sweep.masking_sweep` gives the same numbers much faster.

    Args:
        moments: of the training data.
        corruptions: a list, named by themselves, or a mapping name -> corruption.
        eval_moments: of held-out data, with groups for standard errors.
        max_k: number of features; default the rank.
        pixel_noise, rtol, target: as in :func:`mae_align.closed_form.factorize.factorize`.
        images: the training images [n, h, w, c], or a function that starts a pass over batches of them; needed by
            corruptions without exact moments only.
        run: workers, progress, resume (``batch_size`` does not apply, a mesh is refused: each corruption is another
            problem). Several processes each solve all of them; the first alone reads and writes the store.

    Returns:
        Dataset over corruption, k with r2, alignment, alignment_percent, probe_mse, loss, eigengap and, with
        ``eval_moments``, eval_r2, eval_r2_se, eval_influence (over ``group``), float64. NaN at a k beyond the features
        that a corruption leaves (``num_features``). Coordinates keep, gram_se, cross_se: see
        :class:`mae_align.corruption.CorruptionMoments`. Cost per corruption: one Cholesky factor and one SVD of size d.

    Raises:
        InputError: nothing to sweep, names that repeat, a corruption that does not fit the images or needs them, max_k
            over the rank, held-out data that does not match, a store of another sweep.

    Example:
        >>> from mae_align.corruption import GaussianBlur, PatchMasking
        >>> x = np.random.default_rng(0).integers(0, 256, (90, 4, 4, 1)).astype(np.uint8)
        >>> m = Moments.from_arrays(x, np.arange(90) % 3)
        >>> corruption_sweep(m, [PatchMasking(2, 0.5, fill=0.0), GaussianBlur(1.0)]).r2.sizes
        Frozen({'corruption': 2, 'k': 16})
    """
    named, run = _named(corruptions), run or RunOptions()
    run.check()
    refuse_mesh(run)
    for name, corruption in named.items():
        corruption.check(moments.image_shape)
        if images is None and not is_exact(corruption):
            raise InputError(f"{name} has no exact moments: pass the training images (images=...)")
    if max_k is not None and not (isinstance(max_k, int | np.integer) and 1 <= max_k <= moments.num_pixels):
        raise InputError(
            f"k={max_k}: the images have {moments.num_pixels} pixel values, give a whole number up to them"
        )
    if eval_moments is not None:
        check_held_out(eval_moments, moments)
    check_task(moments.num_targets)
    problem = factorize(moments, pixel_noise=pixel_noise, rtol=rtol, target=target)
    max_k = problem.rank if max_k is None else problem.check_k(max_k)
    settings = provenance(problem, moments, eval_moments)
    states = [a for m in (moments, eval_moments) if m is not None for a in m.state]
    about = identifying(settings) | {"k": max_k, "program": "corruptions"}
    held = None if eval_moments is None else problem.hold_out(eval_moments)
    keys = {name: f"corruption-{corruption_key(corruption, images)}" for name, corruption in named.items()}
    once = {key: named[name] for name, key in keys.items()}
    with solve_context("float64"):
        on_device = None if held is None else jax.device_put(held)
    # A singular covariance does not hold the features of every corruption: they are projected one by one.
    unseen = eval_moments if problem.rank < moments.num_pixels else None
    solve = partial(_solve, problem, on_device, unseen, images, moments.center, max_k)
    groups = by_patch(problem, once, solve)
    found = execute(groups, run, dtype="float64", identity=lambda: fingerprint(states, about))
    return _assembled(problem, held, {name: found[key] for name, key in keys.items()}, named, max_k, settings)


def by_patch(
    problem: PrimalProblem,
    corruptions: Mapping[str, Corruption | None],
    solve: Callable[[Corruption | None, PatchBasis | None], list[Arrays]],
) -> list[TaskGroup[PatchBasis | None]]:
    """Corruptions as tasks, those of one patch size with the basis that they share.

    Args:
        problem: the factorised problem.
        corruptions: by the key of their result.
        solve: the arrays of a corruption, given the basis of its patch size or None.

    Returns:
        One group for each patch size, and one for all others.
    """
    sizes: dict[tuple[int, int] | None, dict[str, Corruption | None]] = {}
    for key, corruption in corruptions.items():
        size = None if corruption is None else shared_patch(corruption, problem.image_shape)
        sizes.setdefault(size, {})[key] = corruption

    def make(size: tuple[int, int] | None) -> PatchBasis | None:
        return None if size is None else patch_basis(problem, size)

    return [
        TaskGroup(partial(make, size), [Task((key,), partial(solve, one)) for key, one in members.items()])
        for size, members in sizes.items()
    ]


def _named(corruptions: Sequence[Corruption] | Mapping[str, Corruption]) -> dict[str, Corruption]:
    """Corruptions by name; refuses what is none, and names that repeat."""
    if isinstance(corruptions, Mapping):
        named = {str(name): corruption for name, corruption in corruptions.items()}
    else:
        if not isinstance(corruptions, Sequence) or isinstance(corruptions, str):
            raise InputError("corruptions: give a list of corruptions, or a mapping of names to corruptions")
        bad = [c for c in corruptions if not isinstance(c, Corruption)]
        if bad:
            raise InputError(f"{bad[0]!r} is not a corruption: make one, such as PatchMasking(4, 0.75)")
        named = {corruption.name: corruption for corruption in corruptions}
    if not corruptions:
        raise InputError("corruptions is empty: give at least one")
    if len(named) < len(corruptions):
        names = [c.name for c in corruptions if isinstance(c, Corruption)]
        repeated = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two corruptions are called {repeated}: give a mapping name -> corruption")
    for name, corruption in named.items():
        if not isinstance(corruption, Corruption):
            raise InputError(f"{name}: {corruption!r} is not a corruption: make one, such as PatchMasking(4, 0.75)")
    return named


def is_exact(corruption: Corruption) -> bool:
    """Whether the moments of a corruption, or of all its parts, are exact.

    Example:
        >>> from mae_align.corruption import PatchMasking
        >>> is_exact(PatchMasking(2, 0.5))
        True
    """
    return all(isinstance(part, ExactCorruption) for part in getattr(corruption, "parts", (corruption,)))


def refuse_mesh(run: RunOptions) -> None:
    """Refuse a mesh where corruptions are solved one by one on the host's workers.

    Raises:
        InputError: a mesh.

    Example:
        >>> refuse_mesh(RunOptions())
    """
    if run.mesh is not None:
        raise InputError("corruptions of any kind are not spread over a mesh: leave mesh out (masking_sweep takes it)")


def corruption_key(corruption: Corruption | None, images: Images | None) -> str:
    """Identity of a corruption, and of the images where it looks at them.

    Example:
        >>> len(corruption_key(None, None))
        64
    """
    if corruption is None or is_exact(corruption) or images is None:
        return identity(corruption)
    # A pass over the data would cost as much as the estimate: a stream is known by its function and first batch.
    seen = (images, np.asarray(next(iter(images())))) if callable(images) else images
    return identity((corruption, seen))


def _solve(
    problem: PrimalProblem,
    held: HeldOut | None,
    unseen: Moments | None,
    images: Images | None,
    centered: bool,
    max_k: int,
    corruption: Corruption | None,
    basis: PatchBasis | None,
) -> list[Arrays]:
    """Curves' ingredients of one corruption; features that it does not leave are NaN."""
    found = corruption_features(problem, corruption, max_k=max_k, basis=basis, images=images, centered=centered)
    k, t = len(found.mu), found.q.T @ problem.t0
    out: Arrays = {"t": t, "mu": found.mu, "gap": found.gap}
    if held is not None:
        f = found.q
        if unseen is not None:
            held, f = problem.hold_out_encoder(found.encoder, f, unseen), np.eye(k)
        out |= solved_errors(f, t, held)

    def padded(name: str, a: np.ndarray) -> np.ndarray:
        axis = 1 if name == "group_errors" else 0
        return np.pad(a, [(0, max_k - k if i == axis else 0) for i in range(a.ndim)], constant_values=np.nan)

    about = {name: np.array(getattr(found.corrupted, name)) for name in ("keep", "gram_se", "cross_se")}
    return [{name: padded(name, a) for name, a in out.items()} | about | {"num_features": np.array(found.num_features)}]


def _assembled(
    problem: PrimalProblem,
    held: HeldOut | None,
    found: Mapping[str, Arrays],
    named: Mapping[str, Corruption],
    max_k: int,
    settings: Mapping[str, object],
) -> xr.Dataset:
    """Dataset over corruption and k."""
    stacked = {name: np.stack([one[name] for one in found.values()]) for name in next(iter(found.values()))}
    values = in_sample(stacked, problem)
    values["loss"] = problem.target_trace - stacked["keep"][:, None] * np.cumsum(stacked["mu"], axis=1)
    values["eigengap"] = stacked["gap"]
    values |= held_out(stacked, held)
    coordinates = {
        "corruption": list(found),
        "k": np.arange(1, max_k + 1),
        "kind": ("corruption", [type(corruption).__name__ for corruption in named.values()]),
    }
    for name in ("num_features", "keep", "gram_se", "cross_se"):
        coordinates[name] = ("corruption", stacked[name])
    where = {"platform": solve_device("float64").platform}
    data = {name: labelled(name, value, ("corruption",)) for name, value in values.items()}
    return xr.Dataset(data, coordinates, dict(settings) | where)
