"""What the closed form predicted and what probes found: tables, figures and plain sentences, from one tidy table.

The table and its columns: :mod:`experiments.alignment_vs_probe.table`. The statistics:
:mod:`experiments.alignment_vs_probe.agreement`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.alignment_vs_probe.agreement import (
    Statistic,
    mean_unit_correlation,
    patch_correlation,
    pooled_correlation,
    unit_correlations,
)
from experiments.alignment_vs_probe.figures import forest_figure, gain_figure
from experiments.alignment_vs_probe.predictors import OURS, Agreement, compare_predictors, reliability
from experiments.alignment_vs_probe.table import (
    COLUMNS,
    KEYS,
    REQUIRED,
    Column,
    Group,
    Row,
    check_rows,
    closed_form_columns,
    groups_of,
    read_table,
)
from experiments.alignment_vs_probe.tasks import TaskKind
from experiments.harness.folder import RunFolder
from mae_align.runtime.errors import InputError

__all__ = [
    "COLUMNS",
    "KEYS",
    "PRIMARY",
    "REQUIRED",
    "SECONDARY",
    "SUPERVISED",
    "UNTRAINED",
    "Analysis",
    "AnalysisConfig",
    "Column",
    "Group",
    "Row",
    "analyse",
    "baseline_sentences",
    "check_rows",
    "groups_of",
    "read_table",
    "sentences",
    "table_text",
    "write_report",
]
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
        groups: by data set and objective. primary: predictors of each group by the primary statistic.
        table: one row per group, statistic, prediction, score and predictor. units: one row per group, task and patch
            size. ceilings: how well one seed predicts another, by group.
    """

    groups: list[Group]
    primary: dict[str, tuple[Agreement, ...]]
    table: list[Row]
    units: list[Row]
    ceilings: dict[str, float]


def analyse(rows: Sequence[Row], config: AnalysisConfig) -> Analysis:
    """Hold predictions against observations.

    Args:
        rows: of :func:`check_rows`. config: what to hold against what.

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


def table_text(analysis: Analysis) -> str:
    """The primary statistic of all predictors as a plain-text table."""
    lines = [["", PRIMARY[0], "interval", "p tasks", "p in kinds", "p ratios", "ours minus it", "units"]]
    for name, found in analysis.primary.items():
        lines.append([name, *[""] * 7])
        for one in found:
            ours = one.predictor == OURS
            difference = ""
            if not ours and not math.isnan(one.difference):
                difference = f"{one.difference:+.2f} ({one.difference_low:+.2f}, {one.difference_high:+.2f})"
            # Without a unit that has a correlation there is nothing to give an interval of.
            none = math.isnan(one.value)
            cells = ["-", "-"] if none else [f"{one.value:+.2f}", f"({one.low:+.2f}, {one.high:+.2f})"]
            cells += [_p(p) for p in (one.p_tasks, one.p_within_kinds, one.p_ratios)]
            lines.append([f"  {one.predictor}", *cells, difference, str(one.num_units)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def _p(p: float) -> str:
    return "-" if math.isnan(p) else f"{p:.2g}"


def sentences(analysis: Analysis, config: AnalysisConfig) -> Iterator[str]:
    """What came out, in plain words, whatever it is."""
    percent = f"{100 * config.level:g}%"
    for group in analysis.groups:
        panel, found = group.panel, analysis.primary[group.name]
        ours, rivals = found[0], found[1:]
        seeds = panel.networks.sum(-1)
        fewest, most = seeds[seeds > 0].min(), seeds.max()
        count = f"{most} seed{'s' * bool(most > 1)}" if fewest == most else f"{fewest} to {most} seeds"
        sizes, ratios = ", ".join(map(str, panel.patch_sizes)), ", ".join(f"{r:g}" for r in panel.mask_ratios)
        yield (
            f"{group.name}: {len(panel.tasks)} tasks, patch sizes {sizes}, mask ratios {ratios}, "
            f"{count}, {seeds.sum()} networks."
        )
        if math.isnan(ours.value):
            yield "  No unit has a correlation: the predictions or the observations do not move."
            continue
        known = ours.p_tasks <= 1 - config.level
        verdict = "which task gains from which ratio is predicted" if known else "no detectable knowledge of the task"
        yield (
            f"  {PRIMARY[0]}: {ours.value:+.2f} ({percent} interval {ours.low:+.2f} to {ours.high:+.2f}), "
            f"p = {_p(ours.p_tasks)} with tasks permuted, {_p(ours.p_within_kinds)} within kinds of tasks: {verdict}."
        )
        ceiling = analysis.ceilings[group.name]
        if not math.isnan(ceiling):
            yield f"  One seed's scores predict another's at {ceiling:+.2f}."
        for one in rivals:
            if math.isnan(one.value):
                yield f"  {one.predictor}: not defined, it does not move."
                continue
            sure = one.difference_low > 0 or one.difference_high < 0
            how = "ours is better" if one.difference > 0 else "ours is worse"
            ends = f"{one.difference_low:+.2f} to {one.difference_high:+.2f}"
            yield (
                f"  {one.predictor}: {one.value:+.2f}; ours minus it {one.difference:+.2f} ({ends}): "
                f"{how if sure else 'no detectable difference'}."
            )
        without = {
            "the prediction does not move": ours.constant_predicted,
            "the observation does not move": ours.constant_observed,
            "fewer than three ratios": ours.too_few_ratios,
        }
        for why, count in without.items():
            if count:
                yield f"  {count} of {len(panel.tasks) * len(panel.patch_sizes)} units have no correlation: {why}."
        if group.left_out:
            yield f"  Tasks left out, since they lack scores on some networks: {'; '.join(group.left_out)}."
        if group.networks_left_out:
            yield f"  {group.networks_left_out} networks left out, since half of the tasks or more lack them."
    yield (
        f"The statistic that decides is the mean of the {PRIMARY[0]} ({config.predicted} against {config.observed}); "
        "all others in the tables are secondary, and none is corrected for their number."
    )


def baseline_sentences(rows: Sequence[Row], baselines: Sequence[Row]) -> Iterator[str]:
    """Mean scores over tasks and networks, the trained networks beside what they are to be read beside.

    Args:
        rows: of networks. baselines: with features, task and probe_r2_test each, on fine labels probe_accuracy_test.
    """

    def means(score: str, spec: str, task: str | None = None) -> str:
        def mean(of: Sequence[Row], name: str, value: str) -> str:
            scores = [row[score] for row in of if row[name] == value and task in (None, row["task"])]
            scores = [score for score in scores if score is not None]
            return f"{value} {np.mean(scores):{spec}}" if scores else f"{value} not defined"

        networks = ", ".join(mean(rows, "objective", loss) for loss in dict.fromkeys(row["objective"] for row in rows))
        kinds = dict.fromkeys(row["features"] for row in baselines)
        return f"networks by loss: {networks}; baselines: {', '.join(mean(baselines, 'features', k) for k in kinds)}."

    yield f"Mean r2 of the probe on test images over all tasks: {means('probe_r2_test', '+.3f')}"
    if any(row["task"] == FINE for row in rows):
        yield f"Mean accuracy of the probe on test images, fine labels: {means('probe_accuracy_test', '.1%', FINE)}"


def write_report(
    rows: Sequence[Row],
    folder: RunFolder,
    config: AnalysisConfig | None = None,
    notes: Sequence[str] = (),
    drawn: Sequence[str] = (),
) -> Analysis:
    """Analyse rows and write tables, figures and a summary.

    Args:
        rows: of :func:`read_table` or :func:`check_rows`. folder: where to. config: None for the defaults.
        notes: further lines of the summary. drawn: lines that name other figures.

    Returns:
        The analysis. Files: agreement.csv, units.csv, gains-DATASET.png and .pdf, predictors.png and .pdf, summary.txt.

    Raises:
        InputError: as :func:`analyse`.
    """
    config = config or AnalysisConfig()
    analysis = analyse(rows, config)
    figures = []
    folder.save_table("agreement", analysis.table)
    folder.save_table("units", analysis.units)
    for dataset in dict.fromkeys(group.dataset for group in analysis.groups):
        panels = {group.objective: group.panel for group in analysis.groups if group.dataset == dataset}
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in dataset)
        figures.append(folder.save_figure(f"gains-{name}", gain_figure(panels, title=dataset)))
    figures.append(
        folder.save_figure("predictors", forest_figure(analysis.primary, label=PRIMARY[0], level=config.level))
    )
    # Of several processes each has a folder; the one that counts is that of the first.
    listed = "Figures: " + "  ".join(str(folder.shared / path.name) for path in figures)
    folder.summary("\n".join([table_text(analysis), "", *sentences(analysis, config), *notes, "", *drawn, listed]))
    return analysis
