"""Table, files and plain sentences of the training experiments."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from experiments.harness.train_common import Run

NETWORK = "trained network"
RAW = "raw pixels"
UNTRAINED = "untrained network"
SUPERVISED = "supervised network"
FINE_TUNED = "fine-tuned"
FROM_SCRATCH = "from scratch"
_SCORES = ("accuracy_train", "accuracy_val", "accuracy_test", "r2_train", "r2_val", "r2_test", "strength")


def components(k: int) -> str:
    """Name of the features that are the first k principal components."""
    return f"{k} principal components"


@dataclasses.dataclass(frozen=True)
class Score:
    """What a probe says about one kind of features, or an end about one network.

    Attributes:
        member: position of the network; -1 for features that no network makes.
        features: what was probed, or the name of the end.
        probe: the probe; empty for an end.
        values: scores by name, and the protocol.
    """

    member: int
    features: str
    probe: str
    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that the report shows.

    Attributes:
        runs: the members. chosen: positions of those that are reported on, the best learning rate of each guidance.
        scores: of the probes, of all members. ends: of whole networks trained with labels.
        measures: one row of the shared report for each chosen member. num_test: test images.
        chance: accuracy of always giving the same answer.
    """

    runs: Sequence[Run]
    chosen: Sequence[int]
    scores: Sequence[Score]
    ends: Sequence[Score]
    measures: Sequence[Mapping[str, Any]]
    num_test: int
    chance: float

    def name(self, score: Score) -> str:
        """What a score is compared as: with several guidance weights, networks that had one have it in their names."""
        several = len({self.runs[i].guidance for i in self.chosen}) > 1
        if several and score.features in (NETWORK, FINE_TUNED):
            return f"{score.features}, guidance {self.runs[score.member].guidance:g}"
        return score.features

    def groups(self) -> dict[str, list[Score]]:
        """Scores by what is compared: the trained networks of each guidance weight, and each baseline."""
        found: dict[str, list[Score]] = {}
        for score in self.scores:
            if score.features != NETWORK or score.member in self.chosen:
                found.setdefault(self.name(score), []).append(score)
        return found

    def accuracies(self) -> dict[str, dict[str, np.ndarray]]:
        """Test accuracies [networks] by what is compared and probe."""
        return {
            name: {
                probe: np.array([s.values["accuracy_test"] for s in scores if s.probe == probe], float)
                for probe in self.probes
            }
            for name, scores in self.groups().items()
        }

    def end_accuracies(self) -> dict[str, np.ndarray]:
        """Test accuracies [networks] of each end."""
        names = dict.fromkeys(map(self.name, self.ends))
        return {
            name: np.array([s.values["accuracy_test"] for s in self.ends if self.name(s) == name]) for name in names
        }

    @property
    def probes(self) -> list[str]:
        """Names of the probes, in their order."""
        return list(dict.fromkeys(score.probe for score in self.scores))

    @property
    def features(self) -> list[str]:
        """Kinds of features, in their order."""
        return list(dict.fromkeys(score.features for score in self.scores))

    def rows(self) -> list[dict[str, Any]]:
        """A tidy table: one row for each member, kind of features and probe, and for each end."""
        names = [run.name(self.runs) for run in self.runs]
        table = []
        for score in [*self.scores, *self.ends]:
            who: dict[str, Any] = {"member": "", "seed": "", "learning_rate": "", "guidance": ""}
            if score.member >= 0:
                who = {"member": names[score.member], **dataclasses.asdict(self.runs[score.member])}
            table.append({**who, "features": score.features, "probe": score.probe or "none", **_flat(score.values)})
        return table

    def dataset(self) -> xr.Dataset:
        """Scores over member, features and probe, ends over member and end, measures over member.

        Features that no network makes stand at every member.
        """
        members, features, probes = range(len(self.runs)), self.features, self.probes
        names = [run.name(self.runs) for run in self.runs]
        arrays = {name: np.full((len(members), len(features), len(probes)), np.nan) for name in _SCORES}
        for score in self.scores:
            at = slice(None) if score.member < 0 else score.member
            i, j = features.index(score.features), probes.index(score.probe)
            for name, array in arrays.items():
                value = score.values.get(name)
                array[at, i, j] = np.nan if value is None else value
        result = xr.Dataset(
            {name: (("member", "features", "probe"), array) for name, array in arrays.items()},
            {
                "member": names,
                "features": features,
                "probe": probes,
                "seed": ("member", [run.seed for run in self.runs]),
                "learning_rate": ("member", [run.learning_rate for run in self.runs]),
                "guidance": ("member", [run.guidance for run in self.runs]),
            },
        )
        for kind in dict.fromkeys(score.features for score in self.ends):
            result = result.assign_coords(end=list(dict.fromkeys(score.features for score in self.ends)))
            for name in ("accuracy_train", "accuracy_val", "accuracy_test"):
                full = result.get(f"end_{name}")
                array = np.full((len(members), result.sizes["end"]), np.nan) if full is None else full.values
                for score in self.ends:
                    if score.features == kind:
                        array[score.member, list(result.end.values).index(kind)] = score.values[name]
                result[f"end_{name}"] = (("member", "end"), array)
        for name in [name for name, value in self.measures[0].items() if _is_number(value)]:
            if name not in result.variables:
                values = np.full(len(members), np.nan)
                values[list(self.chosen)] = [row[name] for row in self.measures]
                result[name] = ("member", values)
        return result.assign_attrs(num_test=self.num_test, chance=self.chance)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as cells of a table; lists and mappings as JSON."""
    return {k: json.dumps(v) if isinstance(v, list | tuple | dict) else v for k, v in values.items()}


def table_text(results: Results) -> str:
    """Test accuracies as a plain-text table: kinds of features down, probes across."""
    lines = [["test accuracy [%]", *results.probes]]
    for name, by_probe in results.accuracies().items():
        lines.append([name, *(_mean(values) for values in by_probe.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    text += [f"{name.ljust(widths[0])}  {_mean(values)}" for name, values in results.end_accuracies().items()]
    several = " (+-: standard deviation between networks)" if len({run.seed for run in results.runs}) > 1 else ""
    text.append(f"{'most frequent class'.ljust(widths[0])}  {100 * results.chance:.1f}{several}")
    return "\n".join(text)


def _mean(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    spread = f" +- {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread}"


def comparisons(results: Results) -> Iterator[str]:
    """Plain sentences: the trained networks against every baseline, by every probe.

    A standard error holds the binomial spread of both accuracies over test images, as if each had images of its own
    (cautious, for they share them), and the spread between networks.
    """
    table = results.accuracies()
    networks = [name for name in table if name.startswith(NETWORK)]
    for probe in results.probes:
        for i, network in enumerate(networks):
            # The first network of several guidance weights stands in for no guidance.
            others = [name for name in table if name not in networks] + networks[: min(i, 1)]
            words = [_against(table[network][probe], table[name][probe], name, results.num_test) for name in others]
            yield f"{probe} probe, {network}: {_mean(table[network][probe])} % right; in points, {'; '.join(words)}."


def _against(network: np.ndarray, other: np.ndarray, name: str, num_test: int) -> str:
    change = 100.0 * (network.mean() - other.mean())
    se = 100.0 * math.sqrt(_variance(network, num_test) + _variance(other, num_test))
    if abs(change) < 2 * se:
        return f"no detectable difference to {name} ({change:+.1f} +- {se:.1f})"
    return f"{'above' if change > 0 else 'BELOW'} {name} by {abs(change):.1f} +- {se:.1f}"


def _variance(values: np.ndarray, num_test: int) -> float:
    """Of a mean over networks: from the test images, which all share, and between networks."""
    mean = values.mean()
    between = values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
    return float(mean * (1 - mean) / num_test + between)
