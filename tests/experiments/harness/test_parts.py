from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness.folder import once, shared_points


def test_a_part_is_computed_once(tmp_path):
    found = [
        once(shared_points(tmp_path, "toy"), "a", lambda value=value: {"x": np.float64(value)}) for value in (0.1, 0.2)
    ]
    assert found == [{"x": 0.1}] * 2


def test_all_processes_have_the_part_of_the_first(tmp_path, monkeypatch):
    """Two processes one after the other: what the first sends is what the second gets."""
    sent: list[np.ndarray] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.stack([x, x]))
    for other in ("second", "third"):
        # For the third folder the first process has read its part from disk.
        sent.clear()
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: (sent.append(x), x)[1])
        assert once(shared_points(tmp_path / "first", "toy"), "a", lambda other=other: [other]) == ["second"]
        messages = iter(sent)
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x, messages=messages: next(messages))
        assert once(shared_points(tmp_path / other, "toy"), "a", lambda: ["its own"]) == ["second"]
        assert not list(messages)
