"""What a probe says, and how it came to say it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a probe was fitted: part of every result, and enough to repeat it.

    Attributes:
        probe: which probe.
        features: what it was fitted on, in the words of the caller.
        normalization: of the features.
        n_train: samples it was fitted on.
        n_val: samples it was chosen on (never refitted on them).
        n_test: samples it was tested on.
        seed: of the split, and of the probe where it draws numbers.
        strength: the chosen one; None where the probe has none.
        selected_by: what was best on the validation samples; empty where nothing was selected.
        settings: what else defines the probe, as (name, value).

    Example:
        >>> Protocol("ridge", "pixels", "per_feature", 80, 10, 10, seed=0, strength=0.1).as_dict()["n_train"]
        80
    """

    probe: str
    features: str
    normalization: str
    n_train: int
    n_val: int
    n_test: int
    seed: int
    strength: float | None = None
    selected_by: str = ""
    settings: tuple[tuple[str, float | int | str], ...] = ()

    def as_dict(self) -> dict[str, float | int | str | None]:
        """All fields in one flat dictionary of plain values, the settings among them.

        Example:
            >>> Protocol("knn", "pixels", "one_scale", 8, 1, 1, seed=0, settings=(("k", 5),)).as_dict()["k"]
            5
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "settings"}
        return fields | dict(self.settings)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Scores of one probe on one task.

    Attributes:
        accuracy_train, accuracy_val, accuracy_test: share of samples whose class is found; NaN where the targets are
            numbers, or where only moments were given.
        r2_train, r2_val, r2_test: 1 - E|y - f(x)|^2 / E|y - m|^2 with m the mean of the training targets (one-hot rows
            for classes); NaN for probes whose outputs are no estimates of y, or where all y equal m.
        protocol: how they came about.
        predicted: [n] int64 class that is found for each test sample; None where the targets are numbers, or where only
            moments were given.

    Example:
        >>> p = Protocol("ridge", "pixels", "per_feature", 80, 10, 10, seed=0, strength=0.1)
        >>> ProbeResult(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, p).strength
        0.1
    """

    accuracy_train: float
    accuracy_val: float
    accuracy_test: float
    r2_train: float
    r2_val: float
    r2_test: float
    protocol: Protocol
    predicted: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def strength(self) -> float:
        """The strength that was chosen, NaN where there is none."""
        return math.nan if self.protocol.strength is None else self.protocol.strength

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Scores and protocol in one flat dictionary of plain values (a row of a table).

        Example:
            >>> p = Protocol("ridge", "pixels", "per_feature", 80, 10, 10, seed=0)
            >>> row = ProbeResult(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, p).as_dict()
            >>> row["accuracy_test"], row["probe"]
            (0.8, 'ridge')
        """
        kept = [f.name for f in dataclasses.fields(self) if f.name not in ("protocol", "predicted")]
        scores = {name: getattr(self, name) for name in kept}
        return scores | self.protocol.as_dict()
