"""Seeded, class-stratified splits."""

from __future__ import annotations

import dataclasses

import numpy as np

from mae_align.data.dataset import ImageDataset
from mae_align.runtime.errors import InputError


def check_seed(seed: int) -> None:
    """Refuse a negative seed.

    Raises:
        InputError: seed below 0.
    """
    if seed < 0:
        raise InputError(f"seed {seed} is negative: give an integer >= 0")


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into two parts that both hold every class, in the same proportions.

    Of a class with n_c samples, round(fraction n_c) go to the second part, at least 1 and at most
    n_c - 1.

    Args:
        labels: [n] class labels, numbers or names; of targets [n, q] all samples count as one class.
        fraction: share of the second part, inside (0, 1).
        seed: integer >= 0; equal seeds give equal splits.

    Returns:
        Positions of the first and of the second part, int64, each ascending; together 0..n - 1.

    Raises:
        InputError: a class with fewer than two samples, a fraction outside (0, 1), a negative seed.

    Example:
        >>> first, second = stratified_split(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
        >>> len(first), len(second)
        (6, 2)
    """
    if not 0.0 < fraction < 1.0:
        raise InputError(f"split fraction {fraction} must lie between 0 and 1, ends excluded")
    check_seed(seed)
    labels = one_stratum(labels)
    classes, counts = np.unique(labels, return_counts=True)
    single = classes[counts < 2]
    if single.size:
        raise InputError(
            f"cannot split: class(es) {single[:10].tolist()} have a single sample, and each side "
            "needs one; add samples, drop the class, or bring your own test set"
        )
    rng = np.random.default_rng(seed)
    in_second = np.zeros(len(labels), bool)
    for value, count in zip(classes, counts, strict=True):
        take = min(max(round(fraction * int(count)), 1), int(count) - 1)
        in_second[rng.permutation(np.flatnonzero(labels == value))[:take]] = True
    return np.flatnonzero(~in_second), np.flatnonzero(in_second)


def one_stratum(labels: np.ndarray) -> np.ndarray:
    """Class labels as they are; of targets [n, q], which are no classes, all samples as one class.

    Example:
        >>> one_stratum(np.array([0.5, 1.5])[:, None]).tolist()
        [0, 0]
    """
    labels = np.asarray(labels)
    return labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)


def validation_rows(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`stratified_split`, but a class with a single sample stays in the first part, to be trained on.

    Args:
        labels: as of :func:`stratified_split`.
        fraction: share of the second part, inside (0, 1).
        seed: integer >= 0; equal seeds give equal splits.

    Returns:
        Positions of the first and of the second part, int64, each ascending; together 0..n - 1.

    Raises:
        InputError: no class with two samples, a fraction outside (0, 1), a negative seed.

    Example:
        >>> first, second = validation_rows(np.array([0, 0, 0, 0, 1]), 0.25, seed=0)
        >>> 4 in first, len(second)
        (True, 1)
    """
    labels = one_stratum(labels)
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[inverse] > 1)
    if not len(several):
        raise InputError("every class has a single sample: there is none to keep out of training; add samples")
    _, second = stratified_split(labels[several], fraction, seed)
    second = several[second]
    return np.setdiff1d(np.arange(len(labels)), second), second


def validation_split(dataset: ImageDataset, fraction: float, seed: int) -> ImageDataset:
    """A data set whose test part is carved out of the training part, for selections.

    Whatever is chosen on it may then be reported on the untouched test part of ``dataset``.

    Args:
        dataset: its training part is split with :func:`stratified_split`, its test part left out.
        fraction: share of the training images that go to validation, inside (0, 1).
        seed: integer >= 0.

    Returns:
        The data set with n (1 - fraction) training images and n fraction validation images as its
        test part.

    Raises:
        InputError: as :func:`stratified_split`.

    Example:
        >>> x, y = np.zeros((8, 2, 2, 1), np.uint8), np.arange(8) % 2
        >>> validation_split(ImageDataset(x, y, x, y, ("a", "b"), "toy"), 0.25, seed=0)
        ImageDataset('toy', train 6, test 2, image 2x2x1 uint8, 2 classes)
    """
    first, second = validation_rows(dataset.train_labels, fraction, seed)
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[first],
        train_labels=dataset.train_labels[first],
        test_images=dataset.train_images[second],
        test_labels=dataset.train_labels[second],
    )
