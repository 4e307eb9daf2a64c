from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import numpy as np
import pytest

import mae_align as ma
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import identity


def add(shift, image, key):
    return image + shift


def scale(factor: float):
    return lambda image, key: factor * image


def test_equal_parameters_are_one_identity():
    for make in (
        lambda: ma.PatchMasking(2, 0.5),
        lambda: ma.PatchMasking(2, 0.5, fill=np.ones((2, 2, 1))),
        lambda: ma.GaussianNoise(np.arange(4.0).reshape(2, 2, 1)),
        lambda: ma.Compose(ma.GaussianBlur(1.0), ma.PatchMasking(2, 0.5)),
        lambda: ma.SampledCorruption(scale(2.0), 3),
        lambda: ma.SampledCorruption(functools.partial(add, 1.0), 3),
        lambda: ma.MatrixTarget(np.eye(3)),
    ):
        assert identity(make()) == identity(make())


def test_any_other_parameter_is_another():
    things = [
        ma.PatchMasking(2, 0.5),
        ma.PatchMasking((2, 2), 0.5),
        ma.PatchMasking(2, 0.5 + 1e-16 * 2),
        ma.PatchMasking(2, 0.5, fill=0.0),
        ma.PatchMasking(2, 0.5, fill=1.0),
        ma.FixedCountPatchMasking(2, 1),
        ma.GaussianNoise(1.0),
        ma.GaussianNoise(np.ones((2, 2, 1))),
        ma.GaussianNoise(np.ones((2, 2, 1)) * (1 + 1e-15)),
        ma.Compose(ma.GaussianBlur(1.0), ma.PatchMasking(2, 0.5)),
        ma.Compose(ma.PatchMasking(2, 0.5), ma.GaussianBlur(1.0)),
        ma.SampledCorruption(scale(2.0), 3),
        ma.SampledCorruption(scale(2.5), 3),
        ma.SampledCorruption(lambda image, key: 2.0 * image, 3),
        ma.SampledCorruption(lambda image, key: 3.0 * image, 3),
        ma.SampledCorruption(scale(2.0), 4),
        ma.SampledCorruption(scale(2.0), 3, seed=1),
        ma.SampledCorruption(functools.partial(add, 1.0), 3),
        ma.SampledCorruption(functools.partial(add, 2.0), 3),
        ma.GaussianBlur(1.0),
        ma.HighPass(1.0),
        ma.MatrixTarget(np.eye(3)),
        None,
        (1, 2),
        [1, 2],
        {"a": 1},
    ]
    found = [identity(thing) for thing in things]
    assert len(set(found)) == len(found)


FACTOR = 1.0


def scaled(x):
    return FACTOR * x


def test_a_function_is_known_by_the_globals_it_names(monkeypatch):
    before = identity(scaled)
    assert identity(scaled) == before
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    assert identity(scaled) != before


def recursive(x):
    return x if x <= 0 else recursive(x - 1)


def test_recursive_functions_end():
    assert identity(recursive) == identity(recursive) != identity(scaled)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    value: int


def test_sets_paths_and_slots_are_told_apart_and_what_cannot_be_is_refused():
    assert identity({1}) != identity({2}) and identity({1, 2}) == identity({2, 1})
    assert identity(Path("a")) != identity(Path("b"))
    assert identity(Slotted(1)) != identity(Slotted(2)) != identity(Slotted(1))
    with pytest.raises(InputError, match="cannot be told from another"):
        identity(iter([1]))
