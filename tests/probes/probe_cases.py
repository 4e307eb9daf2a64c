"""Classification tasks for probes. Nothing here uses the package that is tested but its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from mae_align import InputError


class Case(NamedTuple):
    """Features [n, k] and labels [n]."""

    features: np.ndarray
    labels: np.ndarray


def blobs(seed: int, n: int, spread: float = 1.0) -> Case:
    """Three overlapping Gaussian classes of six features of very different sizes, about a mean far from zero."""
    fixed, rng = np.random.default_rng(9), np.random.default_rng(seed)
    k, classes = 6, 3
    labels = np.arange(n) % classes
    size = np.geomspace(0.1, 30, k)
    x = (fixed.normal(size=(classes, k))[labels] + spread * rng.normal(size=(n, k)) + 50.0) * size
    return Case(x.astype(np.float32), labels)


def rings(seed: int, n: int) -> Case:
    """Two classes that no hyperplane tells apart: inside and outside of a circle, with a constant third feature."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    x[:, 2] = 0.1
    return Case(x.astype(np.float32), (np.hypot(x[:, 0], x[:, 1]) > 1.2).astype(int))


def standardized(train: np.ndarray, part: np.ndarray) -> np.ndarray:
    """A part centred and scaled by the training features, float64."""
    x = train.astype(np.float64)
    return (part.astype(np.float64) - x.mean(0)) / x.std(0)


def refused(probe: Callable[..., object], train: tuple, test: tuple, change: dict[str, Any], message: str) -> None:
    """With a changed argument a probe ends with one line that says what is wrong."""
    given = dict(
        zip(("train_features", "train_targets", "test_features", "test_targets"), (*train, *test), strict=True)
    )
    with pytest.raises(InputError) as error:
        probe(**(given | change))
    assert message in str(error.value) and "\n" not in str(error.value)
