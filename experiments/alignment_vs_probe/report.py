"""What the closed form predicted and what probes found: tables, figures and plain sentences, from one tidy table.

The rows: :mod:`experiments.alignment_vs_probe.table`. The statistics: :mod:`experiments.alignment_vs_probe.agreement`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from experiments.alignment_vs_probe.agreement import (
    Statistic,
    mean_unit_correlation,
    patch_correlation,
    pooled_correlation,
    unit_correlations,
)
from experiments.alignment_vs_probe.figures import forest_figure, gain_figure
from experiments.alignment_vs_probe.predictors import OURS, Agreement, compare_predictors, reliability
from experiments.alignment_vs_probe.table import Group, Row, closed_form_columns, groups_of
from experiments.alignment_vs_probe.tasks import TaskKind
from experiments.harness import columns
from experiments.harness.run import Run
from mae_align.runtime.errors import InputError

UNTRAINED = "untrained network"
"""Name of the features of the networks before their first step."""
SUPERVISED = "supervised network"
"""Name of the features of the same networks trained with the fine labels."""
FINE = TaskKind.FINE_LABELS.value
"""The task that supervised networks are trained for."""
PRIMARY: tuple[str, Statistic] = ("correlation within task and patch", mean_unit_correlation)
"""The statistic that decides; declared before looking."""
SECONDARY: tuple[tuple[str, Statistic], ...] = (
    ("pooled correlation within task and patch", pooled_correlation),
    ("correlation of gains over tasks and ratios within patch", patch_correlation),
)


COLUMNS = {
    "dataset": "name of the data set",
    "task": "name of the task",
    "task_kind": "kind of the task",
    "patch_size": "side of a patch [pixel]",
    "mask_ratio": "share of the patches that is hidden, as asked for [share]",
    "objective": "loss: matched (all raw pixels), hidden (hidden patches, raw) or standard (normalised)",
    "seed": "seed of the network",
    "reconstruction_loss": "training loss on test images, comparable within an objective only",
    "rankme": "effective rank of the features of test images",
    "latent": "number of features of the encoder",
    "realized_ratio": "share of the patches that is hidden, in whole patches [share]",
    **columns.PROBE,
    **columns.CLOSED_FORM,
    "features": "what was probed",
    "r2": "mean of probe_r2_test over tasks and networks [share]",
    "accuracy": "mean of probe_accuracy_test over networks, fine labels [share]",
    "statistic": "how predicted and observed gains are held against each other",
    "predicted": "column of the prediction",
    "observed": "column of the score",
    "predictor": "whose predictions",
    "value": "value of the statistic",
    "low": "lower end of its interval",
    "high": "upper end of its interval",
    "p_tasks": "one-sided p-value, tasks permuted",
    "p_within_kinds": "one-sided p-value, tasks permuted within kinds",
    "p_ratios": "one-sided p-value, mask ratios permuted",
    "difference": "value of the closed form minus that of this predictor",
    "difference_low": "lower end of its interval on the same resamples",
    "difference_high": "upper end of its interval on the same resamples",
    "slope": "observed change per predicted change within units",
    "num_tasks": "number of tasks",
    "num_units": "number of pairs (task, patch size) that have a correlation",
    "constant_predicted": "units without a correlation: the prediction does not move",
    "constant_observed": "units without a correlation: the observation does not move",
    "too_few_ratios": "units without a correlation: fewer than three mask ratios",
    "permutations": "permutations of the test of tasks",
    "resamples": "resamples in which the statistic is defined",
    "left_out": "tasks left out, since they lack scores on some networks",
    "correlation": "correlation of prediction and observation over mask ratios",
    "predicted_at_*": "prediction at this mask ratio",
    "observed_at_*": "observed score at this mask ratio, mean over seeds",
    "patch_sizes": "sides of the patches [pixel]",
    "mask_ratios": "mask ratios",
    "fewest_seeds": "least number of networks of a cell",
    "most_seeds": "largest number of networks of a cell",
    "networks": "number of networks",
    "networks_left_out": "networks left out, since half of the tasks or more lack them",
    "reliability": "the statistic of one seed's scores as predictions of another's",
}


@dataclasses.dataclass(frozen=True)
class AnalysisConfig:
    """What is held against what, and how often it is drawn."""

    predicted: str = "closed_eval_r2_logmean"
    """Column of the prediction that decides."""
    observed: str = "probe_r2_test"
    """Column of the observed score that decides."""
    other_predicted: tuple[str, ...] | None = None
    """Further predictions, by the same statistic; none for all numbers of features that the table has."""
    other_observed: tuple[str, ...] = ("probe_accuracy_test",)
    """Further scores; tasks that lack them are left out."""
    permutations: int = 10_000
    """Permutations of tasks, and of ratios."""
    resamples: int = 4_000
    """Bootstrap samples of tasks and seeds."""
    level: float = 0.95
    """Level of the intervals."""
    seed: int = 0
    """Of permutations and resamples."""


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that the report shows.

    Attributes:
        groups: by data set and objective.
        primary: predictors of each group by the primary statistic.
        table: one row per group, statistic, prediction, score and predictor.
        units: one row per group, task and patch size.
        ceilings: how well one seed predicts another, by group.
    """

    groups: list[Group]
    primary: dict[str, tuple[Agreement, ...]]
    table: list[Row]
    units: list[Row]
    ceilings: dict[str, float]


def analyse(rows: Sequence[Row], config: AnalysisConfig) -> Analysis:
    """Hold predictions against observations.

    Args:
        rows: of :func:`experiments.alignment_vs_probe.table.check_rows`.
        config: what to hold against what.

    Returns:
        The analysis. Cost: about a second per group, statistic and column for 17 tasks on 16 networks.

    Raises:
        InputError: as :func:`groups_of`; nothing to compare.
    """
    groups = groups_of(rows, config.predicted, config.observed)
    if not groups:
        raise InputError(f"no task has {config.predicted} and {config.observed} on its networks: nothing to compare")
    draws = {name: getattr(config, name) for name in ("permutations", "resamples", "level", "seed")}
    table: list[Row] = []
    primary: dict[str, tuple[Agreement, ...]] = {}

    def add(group: Group, statistic: tuple[str, Statistic], predicted: str, observed: str, *, rivals: bool) -> None:
        panel = group.panel if rivals else dataclasses.replace(group.panel, rivals={})
        found = compare_predictors(panel, statistic=statistic[1], **draws)
        what = {"dataset": group.dataset, "objective": group.objective, "statistic": statistic[0]}
        what |= {"predicted": predicted, "observed": observed}
        if statistic is PRIMARY and rivals:
            primary[group.name] = found
        for one in found if rivals else found[:1]:
            table.append(what | dataclasses.asdict(one) | {"left_out": "; ".join(group.left_out)})

    for group in groups:
        for statistic in (PRIMARY, *SECONDARY):
            add(group, statistic, config.predicted, config.observed, rivals=True)
    others = closed_form_columns(rows) if config.other_predicted is None else config.other_predicted
    for predicted in others:
        for group in _groups_if_any(rows, predicted, config.observed):
            add(group, PRIMARY, predicted, config.observed, rivals=False)
    for observed in config.other_observed:
        for group in _groups_if_any(rows, config.predicted, observed):
            add(group, PRIMARY, config.predicted, observed, rivals=False)
    units = [row for group in groups for row in _unit_rows(group)]
    ceilings = {group.name: reliability(group.panel) for group in groups}
    return Analysis(groups, primary, table, units, ceilings)


def _groups_if_any(rows: Sequence[Row], predicted: str, observed: str) -> list[Group]:
    """Groups of further columns; those with too few tasks for a panel are not compared."""
    there = [
        row for row in rows if np.isfinite(row.get(predicted, math.nan)) and np.isfinite(row.get(observed, math.nan))
    ]
    enough = []
    for name in dict.fromkeys((row["dataset"], row["objective"]) for row in there):
        part = [row for row in there if (row["dataset"], row["objective"]) == name]
        if len({row["task"] for row in part}) >= 2:
            enough += part
    return groups_of(enough, predicted, observed)


def _unit_rows(group: Group) -> Iterator[Row]:
    panel = group.panel
    scores = panel.scores
    each = unit_correlations(panel.predicted, scores)
    for i, task in enumerate(panel.tasks):
        for j, size in enumerate(panel.patch_sizes):
            row: Row = {"dataset": group.dataset, "objective": group.objective, "task": task}
            row |= {"task_kind": panel.kinds[i], "patch_size": size, "correlation": float(each[i, j])}
            for name, values in (("predicted", panel.predicted), ("observed", scores)):
                row |= {f"{name}_at_{r:g}": float(v) for r, v in zip(panel.mask_ratios, values[i, j], strict=True)}
            yield row


def group_rows(analysis: Analysis) -> list[Row]:
    """A row for each group: what was compared, and what the primary statistic says of our predictions."""
    rows = []
    for group in analysis.groups:
        panel, ours = group.panel, analysis.primary[group.name][0]
        seeds = panel.networks.sum(-1)
        row: Row = {"dataset": group.dataset, "objective": group.objective, "num_tasks": len(panel.tasks)}
        row |= {"patch_sizes": " ".join(map(str, panel.patch_sizes))}
        row |= {"mask_ratios": " ".join(f"{ratio:g}" for ratio in panel.mask_ratios)}
        row |= {"fewest_seeds": int(seeds[seeds > 0].min()), "most_seeds": int(seeds.max())}
        row |= {"networks": int(seeds.sum()), "networks_left_out": group.networks_left_out}
        row |= {"left_out": "; ".join(group.left_out), "reliability": analysis.ceilings[group.name]}
        rows.append(row | {name: getattr(ours, name) for name in ("value", "low", "high", "p_tasks")})
    return rows


def shown_agreement(analysis: Analysis) -> pd.DataFrame:
    """What the summary shows: the primary statistic of all predictors."""
    return pd.DataFrame(
        {
            "": group,
            "predictor": one.predictor,
            PRIMARY[0]: _number(one.value),
            "interval": _ends(one.value, one.low, one.high),
            "p tasks": _p(one.p_tasks),
            "p in kinds": _p(one.p_within_kinds),
            "p ratios": _p(one.p_ratios),
            "ours minus it": "-" if one.predictor == OURS else _number(one.difference),
            "its interval": "-"
            if one.predictor == OURS
            else _ends(one.difference, one.difference_low, one.difference_high),
            "units": one.num_units,
        }
        for group, found in analysis.primary.items()
        for one in found
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"


def _ends(value: float, low: float, high: float) -> str:
    """Without a value there is nothing to give an interval of."""
    return "-" if math.isnan(value) else f"({low:+.2f}, {high:+.2f})"


def _p(p: float) -> str:
    return "-" if math.isnan(p) else f"{p:.2g}"


def sentences(analysis: Analysis, config: AnalysisConfig) -> list[str]:
    """What came out, in plain words, whatever it is."""
    outcomes, better, worse = [], [], []
    for name, (ours, *rivals) in analysis.primary.items():
        if math.isnan(ours.value):
            outcomes.append(f"{name}, no unit has a correlation: the predictions or the observations do not move")
            continue
        known = ours.p_tasks <= 1 - config.level
        verdict = "which task gains from which ratio is predicted" if known else "no detectable knowledge of the task"
        outcomes.append(
            f"{name}, {ours.value:+.2f} ({100 * config.level:g}% interval {ours.low:+.2f} to {ours.high:+.2f}, p = "
            f"{_p(ours.p_tasks)} with tasks permuted): {verdict}"
        )
        better += [f"{one.predictor} ({name})" for one in rivals if one.difference_low > 0]
        worse += [f"{one.predictor} ({name})" for one in rivals if one.difference_high < 0]
    return [
        f"Mean {PRIMARY[0]}, {config.predicted} against {config.observed}: {'; '.join(outcomes)}.",
        f"Ours is detectably better than {', '.join(better) or 'no rival'}, worse than {', '.join(worse) or 'none'}.",
        "This statistic decides; all others in the tables are secondary, and none is corrected for their number.",
    ]


def mean_scores(rows: Sequence[Row], baselines: Sequence[Row]) -> pd.DataFrame:
    """Mean scores of the probe, of the networks of each loss and of what they are to be read beside.

    Args:
        rows: of networks.
        baselines: with features, task, probe_r2_test and probe_accuracy_test each.

    Returns:
        By features: r2, the mean over all tasks, and accuracy, that of fine labels; NaN where nothing has such a score.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    networks: list[Row] = [row | {"features": f"networks, {row['objective']} loss"} for row in rows]
    for row in [*networks, *baselines]:
        r2, accuracy = found.setdefault(row["features"], ([], []))
        r2.append(row["probe_r2_test"])
        if row["task"] == FINE:
            accuracy.append(row["probe_accuracy_test"])
    names, scores = list(found), found.values()
    r2, accuracy = ([float(np.mean(each or math.nan)) for each in several] for several in zip(*scores, strict=True))
    return pd.DataFrame({"features": names, "r2": r2, "accuracy": accuracy})


def write_report(run: Run, rows: Sequence[Row], config: AnalysisConfig, baselines: Sequence[Row] = ()) -> Analysis:
    """Analyse rows, write tables and figures, and end the run.

    Args:
        run: where to.
        rows: of :func:`experiments.alignment_vs_probe.table.check_rows`.
        config: what is held against what.
        baselines: rows of features that the networks are to be read beside; none for no such table.

    Returns:
        The analysis. Files: agreement.csv, units.csv, groups.csv, scores.csv, gains-DATASET.png and .pdf,
        predictors.png and .pdf, summary.txt.

    Raises:
        InputError: as :func:`analyse`.
    """
    analysis = analyse(rows, config)
    run.table("agreement", analysis.table, show=shown_agreement(analysis))
    run.table("units", analysis.units)
    run.table("groups", group_rows(analysis))
    if baselines:
        scores = mean_scores(rows, baselines)
        run.table("scores", scores, show=scores.round(3))
    for dataset in dict.fromkeys(group.dataset for group in analysis.groups):
        panels = {group.objective: group.panel for group in analysis.groups if group.dataset == dataset}
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in dataset)
        run.figure(f"gains-{name}", gain_figure(panels, title=dataset))
    run.figure("predictors", forest_figure(analysis.primary, label=PRIMARY[0], level=config.level))
    run.verdict(*sentences(analysis, config))
    return analysis
