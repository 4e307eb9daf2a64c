from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.alignment_vs_probe.tasks import (
    CLASS_GROUPS,
    Task,
    TaskKind,
    bottom_components,
    brightness,
    class_pairs,
    class_subset,
    class_subsets,
    coarse_labels,
    contrast,
    fine_labels,
    position,
    standard_tasks,
    top_components,
)
from mae_align import ImageDataset, InputError, Moments

FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()


def toy(names=tuple("abcdefghij"), n=240, m=100, shape=(6, 5, 2), seed=0, dtype=np.uint8) -> ImageDataset:
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=(n + m, 3)) @ rng.normal(size=(3, np.prod(shape)))
    images = 128 + 25 * smooth.reshape(-1, *shape) + rng.normal(size=(n + m, *shape)) * 9
    images = np.clip(np.round(images), 0, 255).astype(dtype)
    labels = np.arange(n + m) % len(names)
    return ImageDataset(images[:n], labels[:n], images[n:], labels[n:], tuple(names), "toy")


@pytest.mark.parametrize(
    "names, expected",
    [
        (FASHION, [0, 1, 0, 1, 0, 2, 0, 2, 1, 2]),
        (CIFAR, [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]),
        ([name.upper() for name in CIFAR], [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]),
        (list("01234"), [0, 0, 0, 1, 1]),
    ],
)
def test_coarse_labels_group_classes_by_name(names, expected):
    data = toy(names)
    task = coarse_labels(data)
    assert task.kind is TaskKind.COARSE_LABELS and task.num_classes == max(expected) + 1 and not task.restricted
    np.testing.assert_array_equal(task.train_targets, np.array(expected)[data.train_labels])
    np.testing.assert_array_equal(task.test_targets, np.array(expected)[data.test_labels])


def test_classes_of_one_group_are_no_task():
    assert all(len(set(table.values())) > 1 for table in CLASS_GROUPS)
    with pytest.raises(InputError, match="are in the group 'animal'"):
        coarse_labels(toy(("cat", "dog", "Deer")))


def check_rows(task: Task, data: ImageDataset, classes: list[int]):
    for rows, targets, labels in (
        (task.train_rows, task.train_targets, data.train_labels),
        (task.test_rows, task.test_targets, data.test_labels),
    ):
        np.testing.assert_array_equal(rows, np.flatnonzero(np.isin(labels, classes)))
        np.testing.assert_array_equal(np.array(classes)[targets], labels[rows])
        assert targets.dtype == np.int64 and rows.dtype == np.int64


def test_subsets_hold_the_rows_of_their_classes():
    data = toy()
    task = class_subset(data, [7, 2, 5])
    assert task.restricted and task.num_classes == 3 and task.name == "h, c, f"
    check_rows(task, data, [7, 2, 5])
    check_rows(fine_labels(data), data, list(range(10)))
    assert not fine_labels(data).restricted
    for classes in ([1], [1, 1], [0, 10], [-1, 2]):
        with pytest.raises(InputError, match="classes"):
            class_subset(data, classes)
    gone = ImageDataset(
        data.train_images, data.train_labels % 9, data.test_images, data.test_labels, tuple("0123456789"), "t"
    )
    with pytest.raises(InputError, match="training images"):
        class_subset(gone, [3, 9])


@settings(max_examples=20, deadline=None)
@given(q=st.integers(2, 11), count=st.integers(1, 60), seed=st.integers(0, 99))
def test_pairs_and_subsets_are_drawn_by_the_seed(q, count, seed):
    data = toy(tuple(map(str, range(q))), n=2 * q, m=q, shape=(1, 2, 1))
    pairs = class_pairs(data, count, seed)
    classes = [frozenset(data.train_labels[t.train_rows].tolist()) for t in pairs]
    assert len(pairs) == len(set(classes)) == min(count, q * (q - 1) // 2)
    assert all(t.kind is TaskKind.CLASS_PAIR and t.num_classes == 2 for t in pairs)
    # The first ones share no class, as long as there are enough classes.
    assert all(not a & b for a, b in itertools.combinations(classes[: q // 2], 2))
    again = class_pairs(data, count, seed)
    assert [t.name for t in again] == [t.name for t in pairs]
    halves = [set(data.train_labels[t.train_rows].tolist()) for t in class_subsets(data, seed)]
    assert all(2 <= len(h) <= (q + 1) // 2 for h in halves)
    if q >= 4:
        assert len(halves) == 2 and halves[0] | halves[1] == set(range(q)) and not halves[0] & halves[1]


def test_another_seed_draws_other_pairs():
    data = toy()
    drawn = {tuple(t.name for t in class_pairs(data, 4, seed)) for seed in range(5)}
    assert len(drawn) == 5
    with pytest.raises(InputError, match="count"):
        class_pairs(data, 0, 0)


def by_hand(image: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Centre of mass (x, y), pixel by pixel."""
    total = x = y = 0.0
    for i, j, c in np.ndindex(image.shape):
        mass = abs(float(image[i, j, c]) - float(reference[i, j, c]))
        total, x, y = total + mass, x + mass * j, y + mass * i
    return x / total, y / total


def test_numbers_of_an_image_are_what_they_say():
    data = toy()
    mean = data.train_images.mean(0)
    across, down = position(data, mean, "difference")
    mass_across, mass_down = position(data, 0.0, "intensity")
    n = len(data.train_images)
    oracles = {
        brightness(data): [x.mean() for x in data.train_images.astype(float)],
        contrast(data): [x.std() for x in data.train_images.astype(float)],
        across: [by_hand(x, mean)[0] for x in data.train_images],
        down: [by_hand(x, mean)[1] for x in data.train_images],
        mass_across: [by_hand(x, 0 * mean)[0] for x in data.train_images],
        mass_down: [by_hand(x, 0 * mean)[1] for x in data.train_images],
    }
    for task, values in oracles.items():
        values = np.array(values)
        assert task.num_classes is None and task.train_targets.shape == (n, 1) and not task.restricted
        np.testing.assert_allclose(task.train_targets[:, 0], (values - values.mean()) / values.std(), atol=1e-9)
    # Test targets are standardised by the training images.
    values, train = (x.astype(float).mean((1, 2, 3)) for x in (data.test_images, data.train_images))
    np.testing.assert_allclose(brightness(data).test_targets[:, 0], (values - train.mean()) / train.std(), atol=1e-9)
    with pytest.raises(InputError, match="reference"):
        position(data, mean[:2], "x")


def test_an_image_equal_to_the_reference_is_centred():
    x = np.zeros((4, 3, 5, 1), np.uint8)
    x[0, 0, 0], x[1, 2, 4], x[2, 0, 4] = 9, 9, 9  # the last image is black
    y = np.array([0, 1, 0, 1])
    across, down = position(ImageDataset(x, y, x, y, ("a", "b"), "t"), 0.0, "mass")
    for task, centres in ((across, [0, 4, 4, 2]), (down, [0, 2, 0, 1])):
        centres = np.array(centres, float)
        np.testing.assert_allclose(task.train_targets[:, 0], (centres - centres.mean()) / centres.std(), atol=1e-12)


def test_components_are_those_of_the_moments():
    data = toy()
    moments = Moments.from_arrays(data.train_images)
    x = data.train_images.reshape(240, -1).astype(float)
    x = x - x.mean(0)
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    top = top_components(data, moments, 3)
    corr = np.abs(np.corrcoef(top.train_targets.T, (x @ vt[:3].T).T)[:3, 3:])
    np.testing.assert_allclose(corr, np.eye(3), atol=1e-8)
    np.testing.assert_allclose(top.train_targets.std(0), 1.0)

    bottom = bottom_components(data, moments, 4, 0.1, seed=3)
    share = np.cumsum((s**2)[::-1])[::-1] / (s**2).sum()
    scores = x @ vt.T
    corr = np.abs(np.corrcoef(bottom.train_targets.T, scores.T)[:4, 4:])
    chosen = corr.argmax(1)
    np.testing.assert_allclose(corr.max(1), 1.0, atol=1e-8)
    assert bottom.train_targets.shape == (240, 4) and len(set(chosen)) == 4 and (share[chosen] <= 0.1).all()
    other = bottom_components(data, moments, 4, 0.1, seed=4)
    assert not np.allclose(np.abs(other.train_targets), np.abs(bottom.train_targets))
    # All of the subspace, where more are asked for than there are.
    everything = bottom_components(data, moments, 999, 0.1, seed=3).train_targets
    assert everything.shape[1] == (share <= 0.1).sum()
    for bad in ({"count": 0, "share": 0.1}, {"count": 1, "share": 1.0}, {"count": 1, "share": 1e-9}):
        with pytest.raises(InputError, match="share"):
            bottom_components(data, moments, seed=0, **bad)
    with pytest.raises(InputError, match="count"):
        top_components(data, moments, 61)
    with pytest.raises(InputError, match="moments of images"):
        top_components(toy(shape=(3, 3, 1)), moments, 1)


def test_rounding_and_dead_pixels_are_no_components():
    # One pixel never varies, another in one image of 240: less than the rounding of 8-bit values.
    data = toy()
    images = data.train_images.copy()
    images[:, 0, 0] = 7
    images[:, 1, 1, 0] = 100
    images[0, 1, 1, 0] = 101
    dead = ImageDataset(images, data.train_labels, data.test_images, data.test_labels, data.class_names, "dead")
    moments = Moments.from_arrays(images)
    assert top_components(dead, moments, 57).train_targets.shape[1] == 57
    scores = bottom_components(dead, moments, 999, 0.1, seed=0)
    whole = np.linalg.eigvalsh(moments.sxx)[::-1]
    below = np.cumsum(whole[::-1])[::-1] / whole.sum()
    assert scores.train_targets.shape[1] == ((below <= 0.1) & (whole > 1 / 12)).sum() < (below <= 0.1).sum() - 2


@pytest.mark.parametrize("names", [FASHION, CIFAR])
def test_standard_tasks_of_the_two_sets(names):
    data = toy(names, shape=(8, 8, 3 if names is CIFAR else 1))
    moments = Moments.from_arrays(data.train_images)
    tasks = standard_tasks(data, moments, seed=0)
    assert len(tasks) == 17 and len({t.name for t in tasks}) == 17
    assert {t.kind for t in tasks} == set(TaskKind)
    for task in tasks:
        assert len(task.train_rows) == len(task.train_targets) and len(task.test_rows) == len(task.test_targets)
        assert np.isfinite(task.train_targets).all() and np.isfinite(task.test_targets).all()
        assert (task.num_classes is not None) == (task.train_targets.dtype == np.int64)
        if task.num_classes is not None:
            assert set(np.unique(task.train_targets)) == set(range(task.num_classes))
        else:
            np.testing.assert_allclose(task.train_targets.mean(0), 0.0, atol=1e-9)
            np.testing.assert_allclose(task.train_targets.std(0), 1.0)
    again = standard_tasks(data, moments, seed=0)
    for a, b in zip(tasks, again, strict=True):
        assert a.name == b.name
        np.testing.assert_array_equal(a.train_targets, b.train_targets)
        np.testing.assert_array_equal(a.test_rows, b.test_rows)
    assert [t.name for t in standard_tasks(data, moments, seed=1)] != [t.name for t in tasks]
    with pytest.raises(InputError, match="seed"):
        standard_tasks(data, moments, seed=-1)


def test_what_a_data_set_does_not_have_is_left_out_aloud():
    data = toy(("a", "b"))
    flat = data.train_images.astype(np.float64)
    flat -= flat.mean((1, 2, 3), keepdims=True)
    even = ImageDataset(flat, data.train_labels, flat[:50], data.train_labels[:50], ("a", "b"), "even")
    with pytest.warns(UserWarning, match="brightness is the same"):
        tasks = standard_tasks(even, Moments.from_arrays(flat), seed=0)
    kinds = [t.kind for t in tasks]
    assert TaskKind.BRIGHTNESS not in kinds and TaskKind.COARSE_LABELS not in kinds and TaskKind.CONTRAST in kinds
