"""Tasks made of the labels: all classes, groups of them, subsets and pairs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.alignment_vs_probe.tasks.task import Task, TaskKind
from mae_align.data.dataset import ImageDataset
from mae_align.runtime.errors import InputError


def _groups(**members: str) -> dict[str, str]:
    return {name: group for group, names in members.items() for name in names.split()}


# Class (letters and digits of its name, lower case) to group. A table serves a data set all of whose classes it has.
CLASS_GROUPS: tuple[Mapping[str, str], ...] = (
    _groups(
        vehicle="airplane aeroplane plane automobile car ship boat truck",
        animal="bird cat deer dog frog horse",
    ),
    _groups(
        top="tshirttop tshirt top pullover coat shirt",
        shoe="sandal sneaker ankleboot boot",
        other="trouser trousers dress bag",
    ),
)


def fine_labels(dataset: ImageDataset) -> Task:
    """The labels as they are.

    Args:
        dataset: any.

    Example:
        >>> x, y = np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1])
        >>> fine_labels(ImageDataset(x, y, x, y, ("cat", "car"), "toy")).num_classes
        2
    """
    return _of_classes(dataset, "fine labels", TaskKind.FINE_LABELS, np.arange(dataset.classes))


def coarse_labels(dataset: ImageDataset) -> Task:
    """Groups of classes: of the first table of ``CLASS_GROUPS`` that has all of them, else the two halves of them.

    Args:
        dataset: any.

    Raises:
        InputError: all classes in one group.

    Example:
        >>> x, y = np.zeros((6, 2, 2, 1), np.uint8), np.array([0, 1, 2, 0, 1, 2])
        >>> coarse_labels(ImageDataset(x, y, x, y, ("cat", "car", "dog"), "toy")).train_targets.tolist()
        [0, 1, 0, 0, 1, 0]
    """
    keys = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in dataset.class_names]
    found = next((table for table in CLASS_GROUPS if all(key in table for key in keys)), None)
    half = (len(keys) + 1) // 2
    group_of = [found[key] if found else str(int(i >= half)) for i, key in enumerate(keys)]
    order = list(dict.fromkeys(group_of))
    if len(order) < 2:
        raise InputError(f"all classes of {dataset.name!r} are in the group {order[0]!r}: there is no task")
    return _of_classes(dataset, "coarse labels", TaskKind.COARSE_LABELS, np.array([order.index(g) for g in group_of]))


def class_subset(dataset: ImageDataset, classes: Sequence[int], *, kind: TaskKind = TaskKind.CLASS_SUBSET) -> Task:
    """Some of the classes, on their images alone, relabelled 0, 1, ... in the order given.

    Args:
        dataset: any.
        classes: at least two different class numbers.
        kind: how tables call it.

    Raises:
        InputError: fewer than two, repeated or unknown classes, or one without images.

    Example:
        >>> x, y = np.zeros((6, 2, 2, 1), np.uint8), np.array([0, 1, 2, 0, 1, 2])
        >>> task = class_subset(ImageDataset(x, y, x, y, ("a", "b", "c"), "toy"), [2, 0])
        >>> task.name, task.train_rows.tolist(), task.train_targets.tolist()
        ('c, a', [0, 2, 3, 5], [1, 0, 1, 0])
    """
    classes = [int(value) for value in classes]
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise InputError(f"classes {classes}: give at least two different ones")
    if min(classes) < 0 or max(classes) >= dataset.classes:
        raise InputError(f"classes {classes} are not all in {dataset.name!r}: choose from 0..{dataset.classes - 1}")
    relabel = np.full(dataset.classes, -1)
    relabel[classes] = np.arange(len(classes))
    return _of_classes(dataset, ", ".join(dataset.class_names[c] for c in classes), kind, relabel)


def class_subsets(dataset: ImageDataset, seed: int) -> tuple[Task, ...]:
    """A random half of the classes, and the other half; halves of a single class are left out.

    Args:
        dataset: any.
        seed: of the choice.

    Example:
        >>> x, y = np.zeros((8, 2, 2, 1), np.uint8), np.arange(8) % 4
        >>> [task.num_classes for task in class_subsets(ImageDataset(x, y, x, y, tuple("abcd"), "toy"), 0)]
        [2, 2]
    """
    q = dataset.classes
    order = np.random.default_rng([seed, 0]).permutation(q)
    halves = [np.sort(part) for part in (order[: (q + 1) // 2], order[(q + 1) // 2 :])]
    return tuple(class_subset(dataset, part.tolist()) for part in halves if 2 <= len(part) < q)


def class_pairs(dataset: ImageDataset, count: int, seed: int) -> tuple[Task, ...]:
    """Pairs of classes drawn at random, first those that share no class.

    Args:
        dataset: any.
        count: at most so many; there are q (q - 1) / 2.
        seed: of the choice.

    Raises:
        InputError: count below 1.

    Example:
        >>> x, y = np.zeros((8, 2, 2, 1), np.uint8), np.arange(8) % 4
        >>> len(class_pairs(ImageDataset(x, y, x, y, tuple("abcd"), "toy"), 3, 0))
        3
    """
    if count < 1:
        raise InputError(f"count={count}: give the number of pairs, at least 1")
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(dataset.classes).tolist()
    apart = [(a, b) for a, b in zip(order[::2], order[1::2], strict=False)]
    rest = list(itertools.combinations(range(dataset.classes), 2))
    rest = [rest[i] for i in rng.permutation(len(rest)) if set(rest[i]) not in map(set, apart)]
    chosen = [sorted(pair) for pair in (apart + rest)[:count]]
    return tuple(class_subset(dataset, pair, kind=TaskKind.CLASS_PAIR) for pair in chosen)


def _of_classes(dataset: ImageDataset, name: str, kind: TaskKind, relabel: np.ndarray) -> Task:
    """A task of classes: ``relabel`` [q] maps old labels to new ones, -1 leaves a class out."""
    train, test = relabel[dataset.train_labels], relabel[dataset.test_labels]
    q = int(relabel.max()) + 1
    for part, labels in (("training", train), ("test", test)):
        if len(np.unique(labels[labels >= 0])) < (q if part == "training" else 1):
            raise InputError(f"{name}: {part} images of {dataset.name!r} lack one of these classes")
    train_rows, test_rows = np.flatnonzero(train >= 0), np.flatnonzero(test >= 0)
    train, test = train[train_rows].astype(np.int64), test[test_rows].astype(np.int64)
    return Task(name, kind, train, test, q, train_rows, test_rows, restricted=bool((relabel < 0).any()))
