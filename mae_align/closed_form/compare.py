"""Can a corruption matter? Answered from the images alone, for every task at once, at each number of features k.

With Q_a, Q_b [r, k] the orthonormal sample bases of two encoders' features, the in-sample r2 of a target y changes by
y^T (Q_b Q_b^T - Q_a Q_a^T) y / y^T y. The eigenvalues of that difference are +-sin(theta_i) of the principal angles:
no task gains or loses more than the largest sine, and some task does. The bound is nearly always close to 1; beside it
stand how much of the span moves, what a random task would notice, and how far apart two samples of images are without
any corruption. See docs/theory.md, section 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from mae_align.closed_form.basis import PatchBasis
from mae_align.closed_form.corruption_sweep import by_patch, corruption_key, is_exact, refuse_mesh
from mae_align.closed_form.dataset import identifying, provenance
from mae_align.closed_form.factorize import PrimalProblem, factorize
from mae_align.closed_form.features import corruption_features, feature_basis
from mae_align.corruption import Corruption
from mae_align.corruption.base import Images
from mae_align.moments.moments import Moments
from mae_align.moments.principal import varying_components
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import fingerprint, identity
from mae_align.runtime.pool import Arrays, RunOptions, Task, TaskGroup, execute

INERT = "inert"
WITHIN_NOISE = "within sampling noise"
CAN_MATTER = "can matter"
NOT_IDENTIFIED = "not identified"
TOO_FEW_IMAGES = "too few images"
_FIGURES = {
    "largest_sine": "bound on the change of in-sample r2 of any task; some task attains it",
    "mean_top_sine": "mean of the q - 1 largest sines, a bound for q classes",
    "moved_share": "sum of squared sines over k: the share of the span that moves",
    "rms_change": "root mean square change of r2 of a random task",
}
# Where rounding alone may turn the span by more than this, nothing is said about it.
_LEAST_SURE = 1e-2


class Span(NamedTuple):
    """Nested features of an encoder.

    Attributes:
        q: [r, m] orthonormal sample basis of the features, in the coordinates of the factorised problem; the first k
            columns span the first k features.
        gap: [m] (mu_k - mu_{k+1}) / mu_k; at 0 the span of k is not identified.
    """

    q: np.ndarray
    gap: np.ndarray


def sines(qa: np.ndarray, qb: np.ndarray) -> np.ndarray:
    """Sines of the principal angles between two spans, descending.

    The singular values of Q_b - Q_a Q_a^T Q_b: accurate for small angles, where cosines are all 1.

    Args:
        qa, qb: [r, k], each with orthonormal columns, or columns of 0 where a feature adds nothing on clean images.

    Returns:
        [k] in [0, 1]. A direction that the other span has no partner for has a sine of 1. Cost r k^2.

    Example:
        >>> sines(np.eye(3)[:, :1], np.eye(3)[:, 1:2]).tolist()
        [1.0]
    """
    small, large = sorted((qa, qb), key=lambda q: int(q.any(0).sum()))  # stable: (qa, qb) where both are full
    return np.clip(np.linalg.svd(large - small @ (small.T @ large), compute_uv=False), 0.0, 1.0)


def half_samples(moments: Moments, problem: PrimalProblem, max_k: int) -> tuple[Span, Span]:
    """Principal components of the even and of the odd groups, in the coordinates of all samples.

    Args:
        moments: in at least two groups.
        problem: factorised from all of them.
        max_k: number of features.

    Returns:
        Two spans, of as many features as both halves have. Cost: two eigh of size d and two QR.

    Raises:
        InputError: moments in one group.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> m = Moments.from_arrays(x, groups=4)
        >>> half_samples(m, factorize(m), 2)[1].q.shape
        (4, 2)
    """
    if len(moments.counts) < 2:
        raise InputError("two half-samples need moments in groups: build them with groups=20")
    made = [moments.select_groups(np.arange(start, len(moments.counts), 2)) for start in (0, 1)]
    spans = []
    for half in made:
        if half.count < 2:
            raise InputError(f"a half of {moments.count} samples has {half.count}: use more samples or fewer groups")
        vectors, variances = varying_components(half, problem.rtol)
        gap = 1.0 - np.append(variances[1:], 0.0) / variances
        spans.append(Span(feature_basis(problem, vectors[:, :max_k]), gap[:max_k]))
    k = min(len(span.gap) for span in spans)
    return Span(spans[0].q[:, :k], spans[0].gap[:k]), Span(spans[1].q[:, :k], spans[1].gap[:k])


def figures(a: Span, b: Span, ks: Sequence[int], num_targets: int) -> dict[str, np.ndarray]:
    """How far two spans are apart at each k.

    Args:
        a, b: two spans.
        ks: numbers of features.
        num_targets: q of :data:`mean_top_sine`.

    Returns:
        ``largest_sine``, ``mean_top_sine``, ``moved_share``, ``rms_change``, each [len(ks)]; NaN where one of the two
        has fewer features. ``lost`` [len(ks), largest k]: how many of the first j = 1, 2, ... features of a the span
        of k features of b lacks, sum over i <= j of 1 - |P_b a_i|^2; at j = k it is the sum of sin^2. A random task is
        a unit vector in the r whitened coordinates: E[change^2] = 2 tr((P_b - P_a)^2) / (r (r + 2))
        = 4 sum sin^2 / (r (r + 2)).

    Example:
        >>> same = Span(np.eye(3), np.ones(3))
        >>> figures(same, same, [1, 2], 10)["moved_share"].tolist()
        [0.0, 0.0]
    """
    r, most = len(a.q), min(a.q.shape[1], b.q.shape[1])
    out = {name: np.full(len(ks), np.nan) for name in _FIGURES} | {"lost": np.full((len(ks), max(ks)), np.nan)}
    for i, k in enumerate(ks):
        if k > most:
            continue
        qa, qb = a.q[:, :k], b.q[:, :k]
        sine = sines(qa, qb)
        out["lost"][i, :k] = np.cumsum(((qa - qb @ (qb.T @ qa)) ** 2).sum(0))
        total = float((sine**2).sum())
        values = (sine[0], sine[: max(1, num_targets - 1)].mean(), total / k, np.sqrt(4 * total / (r * (r + 2))))
        for name, value in zip(_FIGURES, values, strict=True):
            out[name][i] = value
    return out


def compare_corruptions(
    moments: Moments,
    a: Corruption | None,
    b: Corruption | None,
    ks: Sequence[int],
    *,
    num_targets: int | None = None,
    pixel_noise: float | None = None,
    rtol: float | None = None,
    images: Images | None = None,
) -> xr.Dataset:
    """How much it can matter for any task whether images are corrupted by b instead of a. Needs no labels.

    Args:
        moments: of the images, in groups (20 is a good number); targets are not looked at.
        a, b: two corruptions; None for none.
        ks: numbers of features.
        num_targets: q for ``mean_top_sine``; default the moments' own number, 10 without targets.
        pixel_noise, rtol: as in :func:`mae_align.closed_form.factorize.factorize`.
        images: the images themselves, for corruptions without exact moments.

    Returns:
        Dataset over k: see :func:`compare_many`. Cost: three eigh of size d and the two corruptions.

    Raises:
        InputError: as :func:`compare_many`.

    Example:
        >>> from mae_align.corruption import GaussianNoise
        >>> x = np.random.default_rng(0).normal(size=(90, 3, 3, 1)) * np.arange(1, 10).reshape(3, 3, 1)
        >>> found = compare_corruptions(Moments.from_arrays(x, groups=20), None, GaussianNoise(1.0), [1, 4])
        >>> found.verdict.values.tolist()
        ['inert', 'inert']
    """
    name = "no corruption" if b is None else b.name
    found = compare_many(
        moments,
        {name: b},
        ks,
        reference=a,
        num_targets=num_targets,
        pixel_noise=pixel_noise,
        rtol=rtol,
        images=images,
    )
    return found.isel(corruption=0)


def compare_many(
    moments: Moments,
    corruptions: Mapping[str, Corruption | None],
    ks: Sequence[int],
    *,
    reference: Corruption | None = None,
    num_targets: int | None = None,
    pixel_noise: float | None = None,
    rtol: float | None = None,
    images: Images | None = None,
    run: RunOptions | None = None,
) -> xr.Dataset:
    """Every corruption against one reference: bounds for any task, figures, and a verdict per k.

    The verdict: ``inert`` where the spans agree to rounding (no task can gain or lose), ``within sampling noise`` where
    they are no further apart than the principal components of two samples of this size would be, ``can matter``
    otherwise; ``not identified`` where an eigenvalue ties with the next or one of the two has fewer than k features;
    ``too few images`` where a half-sample has fewer than k features, so that sampling noise is not known. Two
    halves differ by 4 c / n where an estimate from n samples is c / n from the truth and two of them 2 c / n apart:
    ``sampling_share`` is half of ``half_moved_share``. Sampling moves features of neighbouring eigenvalues among each
    other and leaves the leading ones. So not only all k features, the first j for every j <= k too must lose no more
    than they would to another sample: ``sampling_ratio``, the largest ratio of the two losses over j, is at most 1.

    Args:
        moments, ks, num_targets, pixel_noise, rtol, images: as in :func:`compare_corruptions`.
        corruptions: by name.
        reference: None for no corruption.
        run: workers, progress, store.

    Returns:
        Dataset over corruption and k: ``largest_sine`` (exact bound), ``mean_top_sine``, ``moved_share``,
        ``rms_change``, ``eigengap``, ``rounding``, ``sampling_ratio``, ``verdict``; over k alone ``half_`` of the first
        four, ``sampling_share`` and ``reference_eigengap``.

    Raises:
        InputError: moments in one group, k outside 1..rank, a corruption that does not fit.

    Example:
        >>> from mae_align.corruption import PatchMasking
        >>> x = np.random.default_rng(0).normal(size=(90, 4, 4, 1)) * np.arange(1, 17).reshape(4, 4, 1)
        >>> compare_many(Moments.from_arrays(x, groups=20), {"mask": PatchMasking(2, 0.5)}, [2]).verdict.dims
        ('corruption', 'k')
    """
    run = run or RunOptions()
    run.check()
    refuse_mesh(run)
    if not isinstance(moments, Moments):
        raise InputError(f"this needs second moments [d, d], not {type(moments).__name__}: use Moments.from_arrays")
    if not corruptions:
        raise InputError("corruptions is empty: give at least one")
    if len(moments.counts) < 2:
        raise InputError("two half-samples need moments in groups: build them with groups=20")
    if not len(ks) or any(not isinstance(k, int | np.integer) or not 1 <= k <= moments.num_pixels for k in ks):
        raise InputError(f"ks={list(ks)}: give whole numbers of features from 1 to the rank of the images")
    for corruption in (*corruptions.values(), reference):
        if corruption is not None:
            corruption.check(moments.image_shape)
            if images is None and not is_exact(corruption):
                raise InputError(f"{corruption.name} has no exact moments: pass the images (images=...)")
    q = num_targets if num_targets is not None else (moments.num_targets or 10)
    if q < 1:
        raise InputError(f"num_targets={q}: give a whole number of at least 1")
    problem = factorize(moments.ungrouped(), pixel_noise=pixel_noise, rtol=rtol)
    max_k = problem.check_k(max(ks))
    settings = provenance(problem, moments, None) | {"reference": "none" if reference is None else reference.name}

    def about() -> str:
        settled = {"ks": list(map(int, ks)), "q": q, "program": "losses", "reference": identity(reference)}
        return fingerprint(moments.state, identifying(settings) | settled)

    def span(corruption: Corruption | None, basis: PatchBasis | None = None) -> Span:
        found = corruption_features(
            problem, corruption, max_k=max_k, basis=basis, images=images, centered=moments.center
        )
        return Span(found.q, found.gap)

    start = span(reference)

    def solve(corruption: Corruption | None, basis: PatchBasis | None) -> list[Arrays]:
        found = span(corruption, basis)
        gaps = np.full(len(ks), np.nan)
        for i, k in enumerate(ks):
            gaps[i] = found.gap[k - 1] if k <= len(found.gap) else np.nan
        return [figures(start, found, ks, q) | {"eigengap": gaps}]

    def halves(basis: PatchBasis | None) -> list[Arrays]:
        even, odd = half_samples(moments, problem, max_k)
        there, back = figures(even, odd, ks, q), figures(odd, even, ks, q)
        return [there | {"lost": (there["lost"] + back["lost"]) / 2}]

    keys = {name: f"compare-{corruption_key(corruption, images)}" for name, corruption in corruptions.items()}
    members = {keys[name]: corruption for name, corruption in corruptions.items()}
    groups = [TaskGroup[PatchBasis | None](lambda: None, [Task(("half-samples",), halves)])]
    solved = execute([*groups, *by_patch(problem, members, solve)], run, dtype="float64", identity=about)
    found = {name: solved[key] for name, key in keys.items()}
    return _assembled(problem, start, found, solved["half-samples"], [int(k) for k in ks], settings)


def _assembled(
    problem: PrimalProblem,
    start: Span,
    found: Mapping[str, Arrays],
    half: Arrays,
    ks: list[int],
    settings: Mapping[str, object],
) -> xr.Dataset:
    data: dict[str, xr.Variable] = {}
    for name, text in _FIGURES.items():
        about = {"long_name": text, "units": "1"}
        data[name] = xr.Variable(("corruption", "k"), np.stack([arrays[name] for arrays in found.values()]), about)
        data[f"half_{name}"] = xr.Variable("k", half[name], {"long_name": f"{text}; two half-samples", "units": "1"})
    gap = np.stack([arrays["eigengap"] for arrays in found.values()])
    first = np.append(start.gap, np.full(max(ks), np.nan))[np.array(ks) - 1]
    data["eigengap"] = xr.Variable(("corruption", "k"), gap)
    data["reference_eigengap"] = xr.Variable("k", first)
    data["sampling_share"] = xr.Variable("k", half["moved_share"] / 2)
    # S is rounded by e = r eps s_1, its root R by R (I + D) with |D_ij| <= e / sqrt(s_i s_j); by the relative sin-theta
    # theorem (Li, 1998) the first k features turn by at most |D| over the relative gap, i > k >= j.
    spread = problem.s[0] / np.sqrt(problem.s[np.array(ks) - 1] * problem.s[-1])
    with np.errstate(divide="ignore"):
        rounding = problem.rank * np.finfo(np.float64).eps * spread / np.minimum(gap, first)
    lost = np.stack([arrays["lost"] for arrays in found.values()])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = lost / (half["lost"] / 2)
    # Beyond k there is no entry; beyond the features of a half there is nothing to compare with, and NaN says so.
    within = np.arange(1, max(ks) + 1) <= np.array(ks)[:, None]
    ratio = np.where(within, ratio, -np.inf).max(-1)
    largest = data["largest_sine"].values
    verdict = np.where(ratio <= 1, WITHIN_NOISE, CAN_MATTER)
    verdict = np.where(np.isnan(data["sampling_share"].values), TOO_FEW_IMAGES, verdict)
    verdict = np.where(largest <= rounding, INERT, verdict)
    verdict = np.where((rounding > _LEAST_SURE) | np.isnan(gap) | np.isnan(first), NOT_IDENTIFIED, verdict)
    about = {"long_name": "largest loss of the first j features, relative to that between samples", "units": "1"}
    data["sampling_ratio"] = xr.Variable(("corruption", "k"), ratio, about)
    data["rounding"] = xr.Variable(
        ("corruption", "k"), rounding, {"long_name": "sine that rounding alone may cause", "units": "1"}
    )
    data["verdict"] = xr.Variable(("corruption", "k"), verdict.astype(str))
    return xr.Dataset(data, {"corruption": list(found), "k": ks}, dict(settings))


def principal_angles(basis_a: np.ndarray, basis_b: np.ndarray) -> np.ndarray:
    """Principal angles between two subspaces, ascending.

    Cosines are the singular values of A^T B and sines those of (I - A A^T) B; each is used where it is accurate.

    Args:
        basis_a: [r, k] with orthonormal columns.
        basis_b: [r, k] likewise.

    Returns:
        [k] radians in [0, pi/2]. Cost r k^2.

    Raises:
        InputError: shapes that differ.

    Example:
        >>> principal_angles(np.eye(3)[:, :1], np.eye(3)[:, 1:2]).round(4).tolist()
        [1.5708]
    """
    if basis_a.shape != basis_b.shape:
        raise InputError(f"subspaces of shape {basis_a.shape} and {basis_b.shape}: compare the same k")
    inner = basis_a.T @ basis_b
    cosine = np.clip(np.linalg.svd(inner, compute_uv=False), 0.0, 1.0)
    sine = np.clip(np.linalg.svd(basis_b - basis_a @ inner, compute_uv=False)[::-1], 0.0, 1.0)
    return np.where(cosine > np.sqrt(0.5), np.arcsin(sine), np.arccos(cosine))
