"""Bounds of settings: the mechanism of all experiments' refusals, tested once."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.harness.config import (
    ELSEWHERE,
    Bounds,
    Count,
    Counts,
    RunConfig,
    Training,
    check,
    computed,
    settings,
    written_options,
)
from mae_align.runtime.errors import InputError


class Kind(enum.Enum):
    one = "one"
    two = "two"


@dataclasses.dataclass(frozen=True)
class Inner:
    width: Count = 3


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    ks: Counts = (1, 2)
    kinds: Annotated[tuple[Kind, ...] | None, Bounds(unique=True)] = None
    weight: Annotated[float, Bounds(above=0, infinite=True)] = 1.0
    share: Annotated[float | None, Bounds(least=0, below=1)] = None
    inner: Inner = Inner()
    workers: Annotated[int | None, Bounds(least=1), ELSEWHERE] = None
    free: float = 0.0


REFUSED = {
    "below the least": ({"seed": -1}, r"^--seed -1: give a number at least 0$"),
    "one of a tuple": ({"ks": (3, 0)}, r"^--ks 0: give numbers at least 1$"),
    "repeated": ({"ks": (3, 3)}, r"^--ks 3 3 repeats a value: give each once$"),
    "repeated words": ({"kinds": (Kind.one, Kind.one)}, r"^--kinds one one repeats a value"),
    "empty": ({"ks": ()}, r"^--ks has no value"),
    "not over": ({"weight": 0.0}, r"^--weight 0: give a number over 0$"),
    "not below": ({"share": 1.0}, r"^--share 1: give a number at least 0 and below 1$"),
    "NaN": ({"weight": math.nan}, r"^--weight nan: give"),
    "infinite": ({"share": math.inf}, r"^--share inf: give"),
    "nested": ({"inner": Inner(0)}, r"^--inner.width 0: give a number at least 1$"),
    "out of range": ({"validation_fraction": 1.0}, r"^--validation-fraction 1: give a number over 0 and below 1$"),
    "workers": ({"workers": 0}, r"^--workers 0: give"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_out_of_bounds_are_refused_in_one_line(case):
    changed, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as refusal:
        check(Config(**changed))
    assert "\n" not in str(refusal.value)


def test_settings_in_bounds_and_those_left_out_pass():
    check(Config())
    check(Config(weight=math.inf, share=0.0, kinds=(Kind.one, Kind.two), workers=1, free=math.nan))


@given(st.floats(), st.floats(allow_nan=False), st.floats(allow_nan=False), st.booleans())
def test_bounds_are_those_of_comparisons(value, least, below, infinite):
    expected = least <= value < below and (infinite or math.isfinite(value))
    assert Bounds(least=least, below=below, infinite=infinite).allows(value) == expected


def test_what_changes_no_result_is_not_computed_with():
    assert computed(Config(out="there", workers=3)) == computed(Config())
    assert computed(Config(inner=Inner(4))) != computed(Config())
    assert {one.option for one in settings(Config()) if one.elsewhere} == {"--out", "--reuse", "--workers"}


def test_options_written_and_read_again_are_the_settings():
    words = written_options({"ks": [1, 2], "inner": {"width": 4, "fast": True}, "share": None, "weight": math.inf})
    assert words == ["--ks", "1", "2", "--inner.width", "4", "--inner.fast", "--share", "None", "--weight", "inf"]


@pytest.mark.parametrize("n", [128, 129, 1000, 10_000])
def test_steps_and_warm_up_of_a_training(n):
    training = Training(epochs=4, batch_size=128, warmup_epochs=1.5)
    assert training.steps(n) == 4 * (n // 128)
    assert training.warmup_steps(n) == round(1.5 * (n // 128)) <= training.steps(n) - 1


def test_trainings_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"--training.batch-size 101"):
        Training(batch_size=101).steps(100)
    with pytest.raises(InputError, match=r"--training.warmup-epochs 1: give fewer than the 1 of --training.epochs"):
        Training(epochs=1, warmup_epochs=1).check()
