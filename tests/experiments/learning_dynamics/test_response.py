from __future__ import annotations

import numpy as np
import pytest

from experiments.learning_dynamics.response import ResponseFilter
from mae_align import InputError


def test_parts_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    x, h = rng.normal(size=(30, 2, 2, 1)) + 50, rng.normal(size=(30, 3))
    found = ResponseFilter.of(x, [0.3, 1.0])
    flat = x.reshape(30, 4)
    squared = np.array([[((a - b) ** 2).sum() for b in flat] for a in flat])
    median = np.median(squared[np.triu_indices(30, 1)])
    np.testing.assert_allclose(found.widths, np.sqrt(median) * np.array([0.3, 1.0]))
    low, high = found.split(h)
    for w, width in enumerate(found.widths):
        weights = np.exp(-squared / (2 * width**2))
        wanted = np.array([sum(weights[i, j] * h[j] for j in range(30)) / weights[i].sum() for i in range(30)])
        np.testing.assert_allclose(low[w], wanted, atol=1e-10)
    np.testing.assert_allclose(low + high, np.stack([h, h]))
    assert found.low_share(h)[0] > found.low_share(h)[1]


def test_errors_of_what_is_known():
    x = np.linspace(0, 1, 100)[:, None]
    f = ResponseFilter.of(x, [0.3])
    slow, fast = np.sin(2 * np.pi * x), np.sin(2 * np.pi * 20 * x)
    learned_slow = f.errors(slow + fast, slow)
    assert learned_slow.low[0] < 0.02
    assert learned_slow.high[0] > 0.5
    learned_fast = f.errors(slow + fast, fast)
    assert learned_fast.low[0] > 0.9
    # Half the map leaves a quarter of the squared error, in both parts.
    half = f.errors(slow + fast, (slow + fast) / 2)
    np.testing.assert_allclose([half.low[0], half.high[0]], 0.25)


def test_bad_input_is_refused():
    for points, widths in ((np.ones((1, 2)), [1.0]), (np.eye(3), []), (np.eye(3), [0.0])):
        with pytest.raises(InputError, match="give two points and widths over 0"):
            ResponseFilter.of(points, widths)
    with pytest.raises(InputError, match="the same"):
        ResponseFilter.of(np.ones((4, 2)), [1.0])
    with pytest.raises(InputError, match="for each of the 3 points"):
        ResponseFilter.of(np.eye(3), [1.0]).errors(np.eye(2), np.eye(2))
