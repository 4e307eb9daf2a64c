"""The two baselines against each other and against an oracle that starts from the definition."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest

from benchmarks import direct_method
from benchmarks.direct_method import (
    authors_preprocessing,
    direct_point,
    inplace_qr,
    lean_direct_point,
    moments_point,
    patch_labels,
)
from mae_align.runtime.errors import InputError

CASES = [
    pytest.param((4, 4, 1), 2, id="grey"),
    pytest.param((3, 4, 2), 2, id="border-and-channels"),
    pytest.param((4, 3, 1), (2, 3), id="oblong"),
]


def _problem(image_shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated images x [n, d] and unbalanced one-hot targets y [n, 3] that depend on them."""
    rng = np.random.default_rng(seed)
    n, d = 150, int(np.prod(image_shape))
    images = rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) * np.linspace(1.0, 0.2, d))
    x = authors_preprocessing(images.reshape(n, *image_shape), seed)
    scores = x @ rng.normal(size=(d, 3)) + 3.0 * rng.normal(size=(n, 3)) + [3.0, 0.0, 0.0]
    return x, np.eye(3)[scores.argmax(axis=1)]


def _enumerated_moments(x: np.ndarray, labels: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """E[x'^T x'] and E[x'^T x] [d, d] as the weighted sum over every one of the 2^patches masks."""
    count = labels.max() + 1
    second = np.zeros((x.shape[1], x.shape[1]))
    cross = np.zeros_like(second)
    for kept in itertools.product([False, True], repeat=count):
        weight = (1 - ratio) ** sum(kept) * ratio ** (count - sum(kept))
        masked = x * np.array(kept)[labels]
        second += weight * masked.T @ masked
        cross += weight * masked.T @ x
    return second, cross


def _best_maps(second: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Maps [k, d, d], k = 1..d, that minimise E|x' B - x|^2 over all B of rank k.

    The loss is |second^1/2 B - second^-1/2 cross|^2 plus a constant, so that the best B of rank k
    comes from the truncated singular value decomposition of the second term (Eckart and Young).
    """
    values, vectors = np.linalg.eigh(second)
    inverse_root = (vectors / np.sqrt(values)) @ vectors.T
    left, singular, right = np.linalg.svd(inverse_root @ cross)
    pieces = [singular[i] * np.outer(inverse_root @ left[:, i], right[i]) for i in range(len(singular))]
    return np.cumsum(pieces, axis=0)


def _oracle(x: np.ndarray, y: np.ndarray, labels: np.ndarray, ratio: float) -> np.ndarray:
    """The curve from its definition: one least-squares fit of y y^T on the features for every k."""
    maps = _best_maps(*_enumerated_moments(x, labels, ratio))
    relations = y @ y.T
    explained = []
    for k, best in enumerate(maps, start=1):
        encoder = np.linalg.svd(best)[0][:, :k]
        features = x @ encoder
        fitted = features @ np.linalg.lstsq(features, relations)[0]
        explained.append(np.sum(fitted**2))
    return 100.0 * np.sqrt(np.array(explained) / explained[-1])


def _moments(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = len(x)
    return x.T @ x / n, x.T @ (y - y.mean(axis=0)) / n, y.T @ y / n


@pytest.mark.parametrize(("image_shape", "patch"), CASES)
@pytest.mark.parametrize("ratio", [0.0, 0.33, 0.99])
def test_both_baselines_equal_the_definition(
    image_shape: tuple[int, int, int], patch: int | tuple[int, int], ratio: float
) -> None:
    x, y = _problem(image_shape)
    labels = patch_labels(image_shape, patch)
    expected = _oracle(x, y, labels, ratio)
    np.testing.assert_allclose(direct_point(x, y, labels, ratio), expected, atol=1e-7)
    np.testing.assert_allclose(moments_point(*_moments(x, y), labels, ratio), expected, atol=1e-7)


def test_the_oracle_map_is_the_minimum() -> None:
    x, _ = _problem((4, 4, 1))
    second, cross = _enumerated_moments(x, patch_labels((4, 4, 1), 2), 0.6)
    rng = np.random.default_rng(1)

    def loss(encoder: np.ndarray) -> float:
        decoder = np.linalg.solve(encoder.T @ second @ encoder, encoder.T @ cross)
        return -np.trace(cross.T @ encoder @ decoder)

    for k in (1, 5):
        encoder = np.linalg.svd(_best_maps(second, cross)[k - 1])[0][:, :k]
        rivals = [encoder + size * rng.normal(size=encoder.shape) for size in (1e-3, 1e-2, 1.0)]
        assert all(loss(encoder) < loss(rival) for rival in rivals)


def test_mask_ratio_changes_the_curve() -> None:
    x, y = _problem((4, 4, 1))
    labels = patch_labels((4, 4, 1), 2)
    change = direct_point(x, y, labels, 0.9) - direct_point(x, y, labels, 0.0)
    assert np.abs(change).max() > 1.0


def test_one_patch_over_the_whole_image_is_pca() -> None:
    x, y = _problem((4, 4, 1))
    components = np.linalg.svd(x, full_matrices=False)[0]
    energy = np.cumsum(np.sum((y @ (y.T @ components)) ** 2, axis=0))
    expected = 100.0 * np.sqrt(energy / energy[-1])
    whole = np.zeros(16, np.int64)
    np.testing.assert_allclose(direct_point(x, y, whole, 0.7), expected, atol=1e-8)
    np.testing.assert_allclose(moments_point(*_moments(x, y), whole, 1.0), expected, atol=1e-8)


def test_ratio_one_is_the_limit() -> None:
    x, y = _problem((4, 4, 1))
    moments, labels = _moments(x, y), patch_labels((4, 4, 1), 2)
    at_one = moments_point(*moments, labels, 1.0)
    np.testing.assert_allclose(moments_point(*moments, labels, 1.0 - 1e-9), at_one, atol=1e-5)
    np.testing.assert_allclose(direct_point(x, y, labels, 1.0 - 1e-9), at_one, atol=1e-5)


def test_both_orthonormalisations_give_one_curve() -> None:
    x, y = _problem((4, 4, 1))
    labels = patch_labels((4, 4, 1), 2)
    published = direct_point(x, y, labels, 0.5)
    faster = lean_direct_point(x, y, labels, 0.5)
    np.testing.assert_allclose(faster, published, atol=1e-10)


def test_inplace_qr_leaves_its_input() -> None:
    features = np.asfortranarray(np.random.default_rng(0).normal(size=(9, 4)))
    before = features.copy()
    q = inplace_qr(features)
    np.testing.assert_array_equal(features, before)
    np.testing.assert_allclose(q.T @ q, np.eye(4), atol=1e-14)
    np.testing.assert_allclose(q[:, :2] @ (q[:, :2].T @ features[:, :2]), features[:, :2], atol=1e-13)


def test_patch_labels_keep_channels_together_and_borders_apart() -> None:
    labels = patch_labels((3, 5, 2), (2, 3)).reshape(3, 5, 2)
    np.testing.assert_array_equal(labels[..., 0], labels[..., 1])
    np.testing.assert_array_equal(labels[..., 0], [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [2, 2, 2, 3, 3]])


def test_authors_preprocessing() -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(50, 4, 4, 3), dtype=np.uint8)
    images[:, 0, 0] = 0  # a constant pixel keeps only the jitter
    x = authors_preprocessing(images, seed=3)
    assert x.shape == (50, 48)
    assert x.dtype == np.float64
    np.testing.assert_allclose(x.mean(axis=0), 0.0, atol=1e-14)
    np.testing.assert_allclose(x.std(), 1.0, rtol=1e-12)
    assert 5e-4 < x[:, 0].std() < 2e-3
    np.testing.assert_array_equal(x, authors_preprocessing(images, seed=3))
    assert np.any(x != authors_preprocessing(images, seed=4))
    flat = images.reshape(50, -1).astype(np.float64)
    plain = (flat - flat.mean(axis=0)) / (flat - flat.mean(axis=0)).std()
    np.testing.assert_allclose(x, plain, atol=0.01)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_direct_point_refuses_a_ratio_outside_the_range(ratio: float) -> None:
    x, y = _problem((4, 4, 1))
    with pytest.raises(InputError, match=r"outside \[0, 1\)"):
        direct_point(x, y, patch_labels((4, 4, 1), 2), ratio)


def test_bad_input_is_named() -> None:
    x, y = _problem((4, 4, 1))
    labels = patch_labels((4, 4, 1), 2)
    with pytest.raises(InputError, match="one label per pixel"):
        direct_point(x, y, labels[:-1], 0.5)
    with pytest.raises(InputError, match=r"give \[n, q\]"):
        direct_point(x, y[:-1], labels, 0.5)
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        moments_point(*_moments(x, y), labels, 1.01)
    with pytest.raises(InputError, match="moments do not fit"):
        moments_point(np.eye(16), np.ones((16, 2)), np.eye(3), labels, 0.5)
    with pytest.raises(InputError, match="do not covary"):
        moments_point(np.eye(16), np.zeros((16, 3)), np.eye(3), labels, 0.5)
    with pytest.raises(InputError, match="singular"):
        direct_point(x * (np.arange(16) > 0), y, labels, 0.5)
    with pytest.raises(InputError, match="singular"):
        moments_point(np.diag(np.arange(16.0)), np.ones((16, 3)), np.eye(3), labels, 0.5)
    with pytest.raises(InputError, match="at least 2"):
        authors_preprocessing(np.zeros((1, 2, 2, 1), np.uint8), 0)
    with pytest.raises(InputError, match="nothing to align"):
        authors_preprocessing(np.zeros((3, 2, 2, 1), np.uint8), 0)
    with pytest.raises(InputError, match="at least 1 pixel"):
        patch_labels((4, 4, 1), 0)


def test_doctests() -> None:
    outcome = doctest.testmod(direct_method)
    assert outcome.attempted > 0
    assert outcome.failed == 0
