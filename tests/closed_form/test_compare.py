from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import mae_align as ma
from mae_align.closed_form import compare
from mae_align.closed_form.compare import principal_angles
from mae_align.closed_form.factorize import factorize
from mae_align.closed_form.features import clean_images, corruption_features
from mae_align.corruption import Corruption
from mae_align.moments.moments import group_of
from mae_align.runtime.errors import InputError
from mae_align.runtime.pool import grid_mesh
from tests import oracles

SHAPE = oracles.SHAPE
KS = [1, 3, 8, 20, 59, 60]
ANISOTROPIC = np.linspace(0.1, 2.0, int(np.prod(SHAPE))).reshape(SHAPE)


@cache
def images() -> ma.Moments:
    return ma.Moments.from_arrays(oracles.train().images, groups=10)


@cache
def components() -> ma.ComponentMasking:
    return ma.ComponentMasking.from_moments(images(), 0.4)


def moving() -> dict[str, Corruption | None]:
    return {
        "single pixels": ma.PatchMasking(1, 0.5),
        "patches": ma.PatchMasking(2, 0.3),
        "anisotropic": ma.GaussianNoise(ANISOTROPIC),
        "noise, then mask": ma.Compose(ma.GaussianNoise(1.0), ma.PatchMasking(2, 0.5)),
        "hardly any": ma.PatchMasking(2, 1e-4),
    }


def still() -> dict[str, Corruption | None]:
    return {
        "nothing": None,
        "little noise": ma.GaussianNoise(0.01),
        "noise": ma.GaussianNoise(2.0),
        "much noise": ma.GaussianNoise(300.0),
        "components": components(),
        "no mask": ma.PatchMasking(2, 0.0),
        "the whole image": ma.PatchMasking(SHAPE[:2], 0.5),
    }


def features(corruption: Corruption, k: int) -> np.ndarray:
    """Orthonormal features [n, k] of the training images, from the definition."""
    x = oracles.train().x - oracles.train().x.mean(0)
    problem = factorize(images())
    moments = corruption.moments(clean_images(problem))
    _, v = oracles.top_directions(moments.cross @ moments.cross.T, moments.gram)
    return np.linalg.qr(x @ v[:, :k])[0]


def orthonormal(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


@pytest.fixture(scope="module")
def compared():
    return compare.compare_many(images(), {**still(), **moving()}, KS)


@pytest.mark.parametrize("name", still())
def test_what_cannot_matter_is_inert_at_every_k_with_a_gap(compared, name):
    found = compared.sel(corruption=name)
    assert (found.verdict == compare.INERT).all()
    # The tolerance is no more than rounding.
    assert (found.rounding < 1e-6).all() and (found.largest_sine < 1e-8).all()


@pytest.mark.parametrize("name", moving())
def test_what_moves_the_span_is_not_inert_below_the_rank(compared, name):
    found = compared.sel(corruption=name)
    assert not (found.verdict.sel(k=KS[:-1]) == compare.INERT).any()
    assert found.verdict.sel(k=60) == compare.INERT  # every feature there is


def test_a_mask_that_hardly_moves_the_span_is_within_sampling_noise_and_a_strong_one_is_not(compared):
    assert (compared.verdict.sel(corruption="hardly any", k=[3, 8]) == compare.WITHIN_NOISE).all()
    strong = compare.compare_many(images(), {"a": ma.PatchMasking(1, 0.99)}, [3, 8])
    assert (strong.verdict == compare.CAN_MATTER).all()
    assert (strong.moved_share > strong.sampling_share).all()
    np.testing.assert_allclose(strong.sampling_share, strong.half_moved_share / 2)


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("name", ["single pixels", "anisotropic", "noise, then mask"])
def test_sines_are_those_of_the_features_of_the_samples(compared, name, k):
    plain, corrupted = features(ma.GaussianNoise(0.0), k), features(moving()[name], k)  # pyright: ignore
    expected = np.sin(scipy.linalg.subspace_angles(plain, corrupted))
    found = compared.sel(corruption=name, k=k)
    # scipy's features come from the samples without the floor of the pixels.
    np.testing.assert_allclose(found.largest_sine, expected.max(), rtol=1e-5)
    np.testing.assert_allclose(found.moved_share, (expected**2).sum() / k, rtol=1e-5)
    np.testing.assert_allclose(found.mean_top_sine, np.sort(expected)[::-1][:9].mean(), rtol=1e-5)


def test_number_of_targets_says_how_many_sines_are_averaged():
    one = ma.compare_corruptions(images(), None, ma.PatchMasking(1, 0.5), [20], num_targets=2)
    assert one.mean_top_sine[0] == one.largest_sine[0]
    labelled = ma.Moments.from_arrays(oracles.train().images, oracles.train().labels, groups=10)
    classes = ma.compare_corruptions(labelled, None, ma.PatchMasking(1, 0.5), [20])
    explicit = ma.compare_corruptions(images(), None, ma.PatchMasking(1, 0.5), [20], num_targets=oracles.CLASSES)
    np.testing.assert_allclose(classes.mean_top_sine, explicit.mean_top_sine, rtol=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.sampled_from([1, 5, 30]), width=st.integers(1, 4))
def test_no_task_gains_or_loses_more_than_the_largest_sine(seed, k, width):
    y = np.random.default_rng(seed).normal(size=(len(oracles.train().labels), width))
    moments = ma.Moments.from_arrays(oracles.train().images, y)
    masks = [ma.PatchMasking(1, 0.6), ma.GaussianNoise(0.0)]
    r2 = ma.corruption_sweep(moments, masks, max_k=k).r2.isel(k=-1).values
    bound = ma.compare_corruptions(images(), masks[1], masks[0], [k]).largest_sine.item()
    assert abs(r2[0] - r2[1]) <= bound + 1e-9


def test_some_task_attains_the_bound():
    k, mask = 5, ma.PatchMasking(2, 0.6)
    plain, corrupted = features(ma.GaussianNoise(0.0), k), features(mask, k)
    values, vectors = np.linalg.eigh(corrupted @ corrupted.T - plain @ plain.T)
    moments = ma.Moments.from_arrays(oracles.train().images, vectors[:, -1:])
    r2 = ma.masking_sweep(moments, [2], [0.0, 0.6], max_k=k).r2.isel(k=-1, patch_size=0).values
    bound = ma.compare_corruptions(images(), None, mask, [k]).largest_sine.item()
    np.testing.assert_allclose([r2[1] - r2[0], bound], values[-1], rtol=1e-5)


def test_rms_change_is_that_of_random_tasks(compared):
    rng = np.random.default_rng(0)
    problem = factorize(images())
    span = corruption_features(problem, ma.PatchMasking(1, 0.5), max_k=20).q
    y = rng.normal(size=(problem.rank, 40_000))
    y /= np.linalg.norm(y, axis=0)
    change = ((span.T @ y) ** 2).sum(0) - (y[:20] ** 2).sum(0)
    found = compared.sel(corruption="single pixels", k=20).rms_change.item()
    np.testing.assert_allclose(found, np.sqrt((change**2).mean()), rtol=0.03)


def test_half_samples_are_the_pca_of_the_even_and_the_odd_groups(compared):
    x, member = oracles.train().x, group_of(np.arange(400), 10)
    bases = []
    for parity in (0, 1):
        part = x[member % 2 == parity]
        _, vectors = np.linalg.eigh(np.cov(part.T))
        bases.append(np.linalg.qr((x - x.mean(0)) @ vectors[:, ::-1][:, :8])[0])
    expected = np.sin(scipy.linalg.subspace_angles(*bases))
    np.testing.assert_allclose(compared.half_moved_share.sel(k=8), (expected**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(compared.half_largest_sine.sel(k=8), expected.max(), rtol=1e-5)


def test_constant_pixels_and_ties_are_told():
    rng = np.random.default_rng(0)
    x = np.zeros((200, 4, 4, 1))
    x[:, 1:3, 1:3] = rng.normal(size=(200, 2, 2, 1)) * np.array([[4.0, 3.0], [2.0, 1.0]])[..., None]
    moments = ma.Moments.from_arrays(x, groups=4)
    found = compare.compare_many(moments, {"n": ma.GaussianNoise(1.0)}, [1, 3, 4, 9])
    assert found.verdict.values[0].tolist() == [compare.INERT] * 3 + [compare.NOT_IDENTIFIED]


def test_equal_corruptions_are_computed_once_and_a_second_run_computes_nothing(tmp_path, monkeypatch):
    run = ma.RunOptions(store=tmp_path)
    named = {"a": ma.PatchMasking(2, 0.5), "b": ma.PatchMasking(2, 0.5), "c": ma.GaussianNoise(1.0)}
    first = compare.compare_many(images(), named, [3], run=run)
    assert len(list(tmp_path.glob("*.npz"))) == 3
    monkeypatch.setattr(compare, "figures", None)
    assert compare.compare_many(images(), named, [3], run=run).identical(first)
    with pytest.raises(InputError, match="another computation"):
        compare.compare_many(images(), named, [4], run=run)


def test_a_lost_leading_feature_is_no_sampling_noise():
    """The spectrum's flat tail moves by more than a feature between samples; its head does not."""
    x = np.random.default_rng(0).normal(size=(400, 6, 6, 1))
    x[:, 0, 0] *= 20
    moments = ma.Moments.from_arrays(x, groups=4)
    faint = {}
    for place in (0, 7):
        keep = np.where(np.arange(36) == place, 1e-4, 0.9)
        faint[str(place)] = ma.ComponentMasking.from_moments(moments, keep)
    found = compare.compare_many(moments, faint, [4, 8, 16])
    # One feature of k is gone: a smaller share than sampling moves.
    np.testing.assert_allclose(found.moved_share.sel(corruption="0"), [1 / 4, 1 / 8, 1 / 16], rtol=1e-9)
    assert (found.moved_share.sel(corruption="0") < found.sampling_share).all()
    assert (found.verdict.sel(corruption="0") == compare.CAN_MATTER).all()
    assert found.verdict.sel(corruption="7", k=16) == compare.WITHIN_NOISE
    task = ma.Moments.from_arrays(x, x[:, 0, 0])
    r2 = ma.corruption_sweep(task, {"none": ma.GaussianNoise(0.0), **faint}, max_k=16).r2.sel(k=16)
    assert r2.sel(corruption="none") - r2.sel(corruption="0") > 0.99
    assert abs(r2.sel(corruption="none") - r2.sel(corruption="7")) < 1e-3


def test_losses_are_those_of_the_first_features_in_order():
    problem = factorize(images())
    a, b = (
        compare.Span(found.q, found.gap)
        for found in (
            corruption_features(problem, c, max_k=12) for c in (ma.PatchMasking(1, 0.5), ma.PatchMasking(2, 0.9))
        )
    )
    found = compare.figures(a, b, [12, 5], 10)
    projection = b.q[:, :5] @ b.q[:, :5].T
    expected = [j - np.trace(a.q[:, :j].T @ projection @ a.q[:, :j]) for j in range(1, 6)]
    np.testing.assert_allclose(found["lost"][1, :5], expected, atol=1e-12)
    assert np.isnan(found["lost"][1, 5:]).all()
    np.testing.assert_allclose(found["lost"][0, -1], 12 * found["moved_share"][0])


def test_rounding_of_a_spread_spectrum_is_no_movement():
    """The components come from their own eigendecomposition: rounding of the largest variance turns the first ones."""
    rng = np.random.default_rng(3)
    turn = np.linalg.qr(rng.normal(size=(36, 36)))[0]
    x = (rng.normal(size=(500, 36)) * np.logspace(5.5, 0, 36) @ turn).reshape(-1, 6, 6, 1)
    moments = ma.Moments.from_arrays(x, groups=2)
    masks = {str(keep): ma.ComponentMasking.from_moments(moments, keep) for keep in (0.3, 0.9)}
    found = compare.compare_many(moments, masks, [1, 2, 3, 8, 20, 35], pixel_noise=0.0)
    assert (found.verdict == compare.INERT).all()
    assert (found.rounding < 1e-2).all()


@pytest.mark.parametrize("swap", [False, True])
def test_a_feature_that_adds_nothing_on_clean_images_is_a_lost_one(swap):
    full, less = np.eye(5)[:, :3], np.eye(5)[:, :3] * np.array([1.0, 0.0, 1.0])
    found = compare.sines(less, full) if swap else compare.sines(full, less)
    np.testing.assert_allclose(found, [1.0, 0.0, 0.0], atol=1e-15)


def test_where_half_of_the_images_has_too_few_features_sampling_is_not_judged():
    x = np.random.default_rng(0).normal(size=(20, 6, 6, 1))
    moments = ma.Moments.from_arrays(x, groups=4)
    found = ma.compare_corruptions(moments, None, ma.PatchMasking(2, 0.5), [3, 15], pixel_noise=1e-3)
    assert np.isnan(found.sampling_share.values[1]) and not np.isnan(found.sampling_share.values[0])
    assert found.verdict.values[1] == compare.TOO_FEW_IMAGES


@pytest.mark.parametrize("swapped", [False, True])
def test_a_corruption_that_leaves_fewer_features_is_told_on_either_side(swapped):
    pair = [ma.AveragePool(2), None]
    a, b = reversed(pair) if swapped else pair
    x = np.random.default_rng(0).normal(size=(200, 4, 4, 1))
    found = ma.compare_corruptions(ma.Moments.from_arrays(x, groups=4), a, b, [2, 8])
    assert found.verdict.values.tolist()[1] == compare.NOT_IDENTIFIED


@pytest.mark.parametrize("k", [1, 4, 7, 11])
def test_angles_are_those_of_scipy_in_ascending_order(k):
    a, b = orthonormal(0, 24, k), orthonormal(1, 24, k)
    found = principal_angles(a, b)
    np.testing.assert_allclose(found, scipy.linalg.subspace_angles(a, b)[::-1], atol=1e-14)
    assert (np.diff(found) >= 0).all()
    np.testing.assert_allclose(principal_angles(b, a), found, atol=1e-14)
    np.testing.assert_allclose(principal_angles(a @ orthonormal(2, k, k), b @ orthonormal(3, k, k)), found, atol=1e-13)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-5, 0.3, np.pi / 4, 1.2, np.pi / 2 - 1e-9, np.pi / 2])
def test_small_and_large_angles_are_accurate(angle):
    """A cosine alone would lose every angle below 1e-8, a sine alone those near a right angle."""
    q = orthonormal(4, 9, 9)
    turned = np.cos(angle) * q[:, 0] + np.sin(angle) * q[:, 5]
    found = principal_angles(q[:, :3], np.stack([q[:, 2], turned, q[:, 1]], 1))
    np.testing.assert_allclose(found, [0.0, 0.0, angle], atol=3e-15, rtol=0)


def test_directions_in_common_have_no_angle():
    """Two subspaces of 7 in 12 dimensions share at least 2."""
    found = principal_angles(orthonormal(0, 12, 7), orthonormal(1, 12, 7))
    assert found[1] < 1e-14 and found[2] > 0.1


MASK = ma.PatchMasking(2, 0.5)
SAMPLES = ma.Samples.from_arrays(oracles.train().images, oracles.train().labels)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"corruptions": {}}, "corruptions is empty"),
        ({"corruptions": {"a": ma.PatchMasking(9, 0.5)}}, "larger than the image"),
        ({"corruptions": {"a": ma.SampledCorruption(lambda image, key: image, 1)}}, "pass the images"),
        ({"reference": ma.SampledCorruption(lambda image, key: image, 1)}, "pass the images"),
        ({"ks": []}, r"ks=\[\]"),
        ({"ks": [0]}, r"ks=\[0\]"),
        ({"ks": [61]}, r"ks=\[61\]"),
        ({"num_targets": 0}, "num_targets=0"),
        ({"moments": images().ungrouped()}, "build them with groups=20"),
        ({"moments": SAMPLES}, r"not Samples: use Moments\.from_arrays"),
        ({"run": ma.RunOptions(mesh=grid_mesh())}, "leave mesh out"),
    ],
)
def test_bad_input_is_refused_before_any_work(monkeypatch, options, message):
    monkeypatch.setattr(compare, "factorize", None)
    with pytest.raises(InputError, match=message):
        compare.compare_many(**({"moments": images(), "corruptions": {"a": MASK}, "ks": [3]} | options))


def test_subspaces_of_different_size_are_refused():
    with pytest.raises(InputError, match=r"\(5, 2\) and \(5, 3\): compare the same k"):
        principal_angles(orthonormal(0, 5, 2), orthonormal(0, 5, 3))
