from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mae_align.closed_form.factorize import Factorized, factorize
from mae_align.closed_form.grid import BasisKey, GridPoint, GridSpec
from mae_align.corruption import CleanImages, FixedCountPatchMasking, PatchMask, PatchMasking, RandomRatioMasking
from mae_align.moments.moments import Moments
from mae_align.runtime.errors import InputError

SHAPE = (4, 6, 1)


@pytest.fixture(scope="module")
def problem() -> Factorized:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, *SHAPE)).astype(np.uint8)
    return factorize(Moments.from_arrays(images, np.arange(100) % 3))


def check(
    patch_sizes: object = (1, 2),
    noise_levels: object = (0.0,),
    mask_ratios: object = (0.0, 0.5),
    lambdas: object = (math.inf,),
    masking: type[PatchMask] = PatchMasking,
) -> GridSpec:
    axes = (patch_sizes, noise_levels, mask_ratios, lambdas)
    return GridSpec.checked(SHAPE, *axes, masking)  # pyright: ignore[reportArgumentType]


def same_encoder(a: GridPoint, b: GridPoint) -> bool:
    """Whether two cells are one problem, from what the corruption does to the second moments and from lambda."""
    sxx = np.random.default_rng(1).normal(size=(24, 24))
    sxx = sxx @ sxx.T

    def encoder_moments(point: GridPoint) -> np.ndarray:
        # G / keep; the noise sits on the diagonal, which every mask keeps.
        clean = CleanImages(sxx + point.noise_variance * np.eye(24), np.zeros(24), SHAPE)
        return point.mask.moments(clean).gram

    return a.lam == b.lam and np.allclose(encoder_moments(a), encoder_moments(b), rtol=1e-12)


def test_every_cell_of_the_grid_once_with_its_own_values():
    spec = check([2, (2, 3)], [0.0, 3.0], [0.0, 0.25, 1.0], [0.0, 1.0, math.inf])
    points = spec.points()
    assert [p.index for p in points] == list(itertools.product(range(2), range(2), range(3), range(3)))
    for p in points:
        size, sigma = [2, (2, 3)][p.index[0]], [0.0, 3.0][p.index[1]]
        ratio, lam = [0.0, 0.25, 1.0][p.index[2]], [0.0, 1.0, math.inf][p.index[3]]
        assert p.mask == PatchMasking(size, ratio)
        assert (p.p_eff, p.noise_variance, p.lam) == (ratio, sigma**2, lam)
        # Noise before the mask: G = (1 - p)[(1 - p) S + p D + sigma^2 I], so D is found with sigma^2 / p beside it.
        assert p.basis == (BasisKey(size, sigma**2 / ratio) if ratio else BasisKey(None, sigma**2))


@pytest.mark.parametrize("masking", [PatchMasking, FixedCountPatchMasking, RandomRatioMasking])
def test_cells_share_a_solve_exactly_where_they_are_one_problem(masking):
    """Full-image patches, no mask, and counts that round alike share; nothing else does."""
    ratios = [0.0, 0.2, 0.25, 0.45] if masking is FixedCountPatchMasking else [0.0, 0.2, 0.5, 1.0]
    points = check([1, (2, 3), (4, 6)], [0.0, 2.0], ratios, [0.5, math.inf], masking).points()
    for a, b in itertools.combinations(points, 2):
        assert (a.key == b.key) == same_encoder(a, b), (a, b)
        assert a.key != b.key or (a.basis, a.p_eff, a.lam) == (b.basis, b.p_eff, b.lam)
    assert len({p.key for p in points}) < len(points)


def test_keys_are_file_names_that_differ_where_their_points_differ():
    lambdas, ratios = (
        [0.0, 1e-300, 1e-5, 1.0, np.nextafter(1.0, 2.0), 1e22, math.inf],
        [0.0, 1e-9, 0.1, np.nextafter(0.1, 1), 1.0],
    )
    points = check([1, (1, 2), (2, 1)], [0.0, 1e-8, 3.0], ratios, lambdas).points()
    by_key: dict[str, set[tuple[BasisKey, float, float]]] = {}
    for p in points:
        by_key.setdefault(p.key, set()).add((p.basis, p.p_eff, p.lam))
        assert p.key.startswith(p.basis.name)
        assert not set(p.key) & set('/\\:*?"<>| \0') and len(p.key) < 200
    assert all(len(cells) == 1 for cells in by_key.values())
    assert len({p.basis.name for p in points}) == len({p.basis for p in points})


def test_weights_scale_the_loss_without_features_to_one(problem):
    """alpha tr Syy + beta tr S = 1, in the ratio 1 : lam of supervision and reconstruction."""
    trace_s, trace_y = float(np.trace(problem.sxx)), float(np.trace(problem.syy))
    points = check([1], [0.0], [0.5], [0.0, 1e-6, 0.3, 1e4, math.inf]).points()
    for p in points:
        alpha, beta, total = p.weights(problem)
        assert alpha * trace_y + beta * trace_s == pytest.approx(1.0, rel=1e-12)
        if math.isinf(p.lam):
            assert (alpha, total) == (0.0, pytest.approx(trace_s))
        else:
            assert beta == pytest.approx(p.lam * alpha, rel=1e-15)
            assert total == pytest.approx(trace_y + p.lam * trace_s, rel=1e-12)
    assert points[0].weights(problem)[1] == 0.0


def test_a_spec_holds_plain_numbers_and_the_masks_of_its_family():
    spec = check(np.array([1, 2]), np.array([0.0, 1.0]), np.array([0.0, 0.5]), np.array([1, 2]))
    axes = (spec.noise_levels, spec.mask_ratios, spec.lambdas)
    assert axes == ((0.0, 1.0), (0.0, 0.5), (1.0, 2.0))
    assert {type(v) for axis in axes for v in axis} == {float}
    assert (spec.patch_sizes, spec.image_shape) == ((1, 2), SHAPE)
    counts = check([2], mask_ratios=[0.0, 0.5], masking=FixedCountPatchMasking).masks
    assert counts == ((FixedCountPatchMasking(2, 6), FixedCountPatchMasking(2, 3)),)


@pytest.mark.parametrize("axis", ["patch_sizes", "noise_levels", "mask_ratios", "lambdas"])
def test_empty_and_repeating_axes_are_refused(axis):
    with pytest.raises(InputError, match=f"{axis} is empty: give at least one value"):
        check(**{axis: []})  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=f"{axis} .*repeats a value: give each once"):
        check(**{axis: [1, 1]})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"mask_ratios": [0.5, 1.2]}, r"mask ratio 1\.2: give a number from 0 to 1"),
        ({"mask_ratios": [-0.1]}, r"mask ratio -0\.1"),
        ({"mask_ratios": [math.nan]}, "mask ratio nan"),
        ({"noise_levels": [-1.0]}, r"noise level -1\.0: give a standard deviation of at least 0"),
        ({"noise_levels": [math.inf]}, "noise level inf"),
        ({"noise_levels": [math.nan]}, "noise level nan"),
        ({"lambdas": [-1e-9]}, r"lambda -1e-09: give a weight of at least 0 \(inf for reconstruction alone\)"),
        ({"lambdas": [math.nan]}, "lambda nan"),
        ({"patch_sizes": [2, 0]}, r"patch size .*0.*: give a positive integer"),
        ({"patch_sizes": [1.5]}, "positive integer|patch size"),
        ({"patch_sizes": [(2, 2, 2)]}, "pair"),
        ({"patch_sizes": [2, (2, 2)]}, "patch_sizes .* repeats"),
        ({"patch_sizes": [2, 1, 2]}, "patch_sizes .* repeats"),
        ({"patch_sizes": [5]}, "patch 5x5 is larger than the image 4x6"),
        ({"patch_sizes": [(4, 7)]}, "patch 4x7 is larger than the image 4x6"),
        ({"mask_ratios": [0.99], "masking": FixedCountPatchMasking}, "leaves none of the 24 patches"),
    ],
)
def test_values_out_of_range_are_refused(axes, message):
    with pytest.raises(InputError, match=message):
        check(**axes)
