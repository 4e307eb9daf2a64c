from __future__ import annotations

import csv
import dataclasses
import math
import re

import numpy as np
import pytest

from experiments.alignment_vs_probe.agreement import mean_unit_correlation
from experiments.alignment_vs_probe.predictors import OURS, OURS_WITHOUT_TASK
from experiments.alignment_vs_probe.report import (
    COLUMNS,
    PRIMARY,
    AnalysisConfig,
    analyse,
    group_rows,
    sentences,
    shown_agreement,
    write_report,
)
from experiments.alignment_vs_probe.table import KEYS, REQUIRED, Table, check_rows, groups_of
from experiments.harness.config import RunConfig
from experiments.harness.run import Run
from mae_align.runtime.errors import InputError
from tests.experiments.cases import rows_of

RATIOS, SIZES, SEEDS, OBJECTIVES = (0.25, 0.5, 0.75, 0.9), (2, 4), (0, 1), ("matched", "standard")
FAST = AnalysisConfig(permutations=200, resamples=60)


def rows(tasks=8) -> list[dict]:
    rng = np.random.default_rng(0)
    predicted = 0.5 + 0.05 * rng.normal(size=(tasks, 2, 4))
    found = []
    for o, objective in enumerate(OBJECTIVES):
        noise = 0.01 * rng.normal(size=(2, 4, 2))
        other = 0.05 * rng.normal(size=predicted.shape)
        for t, s, r, e in np.ndindex(tasks, 2, 4, 2):
            # The standard loss goes its own way.
            score = float(0.4 + noise[s, r, e] + (predicted if o == 0 else other)[t, s, r])
            row = {
                "dataset": "toy",
                "task": f"task {t}",
                "task_kind": "labels" if t % 2 else "numbers",
                "patch_size": SIZES[s],
                "mask_ratio": RATIOS[r],
                "objective": objective,
                "seed": SEEDS[e],
                "probe_r2_test": score,
                "closed_eval_r2_logmean": float(predicted[t, s, r]),
                "closed_eval_r2_k8": float(predicted[t, s, r]) + 0.01 * float(rng.normal()),
                "closed_eval_r2_k100": float(predicted[t, s, r]),
                "reconstruction_loss": 0.3 + RATIOS[r] + float(noise[s, r, e]),
                "rankme": 30.0 + 100 * float(noise[s, r, e]),
                "note": "kept",
            }
            if t % 2:
                row["probe_accuracy_test"] = score
            found.append(row)
    return found


def test_columns_are_described():
    assert set(KEYS) <= set(REQUIRED) <= set(COLUMNS)
    config = AnalysisConfig()
    assert {config.predicted, config.observed, *config.other_observed} <= set(COLUMNS)


def test_a_table_is_read_back(tmp_path):
    path = tmp_path / "table.csv"
    table = rows()
    columns = list(dict.fromkeys(name for row in table for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns[::-1])
        writer.writeheader()
        writer.writerows(table)
    read = Table.read(str(path))
    found = read.rows
    assert read.name == read.label == "table" and len(read.fingerprint["rows"]) == 64
    assert len(found) == len(table)
    for a, b in zip(found, table, strict=True):
        assert all(a[name] == value and type(a[name]) is type(value) for name, value in b.items())
    assert math.isnan(found[0]["probe_accuracy_test"])
    with pytest.raises(InputError, match=r"cannot read .*nothing.csv \(No such file or directory\): give a CSV"):
        Table.read(str(tmp_path / "nothing.csv"))
    path.write_text("task,seed\n")
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: the table has no rows: give"):
        Table.read(str(path))


def test_bad_tables_are_refused():
    table = rows()
    with pytest.raises(InputError, match="no rows"):
        check_rows([])
    with pytest.raises(InputError, match="row 1 has no rankme"):
        check_rows([{**table[0], "rankme": ""}])
    with pytest.raises(InputError, match="row 2: seed is 'x'"):
        check_rows([table[0], {**table[1], "seed": "x"}])
    with pytest.raises(InputError, match="rows 1 and 3"):
        check_rows([table[0], table[1], {**table[0], "probe_r2_test": 0.0}])
    changed = [dict(row) for row in table]
    changed[20]["rankme"] += 1.0
    with pytest.raises(InputError, match="rankme of one network"):
        groups_of(check_rows(changed), "closed_eval_r2_logmean", "probe_r2_test")


def test_rows_become_panels():
    table = check_rows(rows()[::-1])
    groups = groups_of(table, "closed_eval_r2_logmean", "probe_r2_test")
    assert sorted(group.name for group in groups) == ["toy, matched loss", "toy, standard loss"]
    for group in groups:
        panel = group.panel
        assert panel.patch_sizes == SIZES and panel.mask_ratios == RATIOS and panel.observed.shape == (8, 2, 4, 2)
        for row in (row for row in table if row["objective"] == group.objective):
            at = SIZES.index(row["patch_size"]), RATIOS.index(row["mask_ratio"])
            i, e = panel.tasks.index(row["task"]), row["seed"]
            assert panel.observed[i, at[0], at[1], e] == row["probe_r2_test"] and panel.kinds[i] == row["task_kind"]
            assert panel.predicted[i, at[0], at[1]] == pytest.approx(row["closed_eval_r2_logmean"])
            assert panel.rivals["lower reconstruction loss"][at[0], at[1], e] == -row["reconstruction_loss"]
            assert panel.rivals["RankMe"][at[0], at[1], e] == row["rankme"]
            assert panel.rivals["mask ratio"][at] == row["mask_ratio"]


def test_incomplete_tasks_and_networks_are_left_out_aloud():
    table = rows()
    # Task 3 lacks one network; one network has task 5 alone; one ratio has no network at a patch size.
    short = [r for r in table if not (r["task"] == "task 3" and r["mask_ratio"] == 0.5 and r["seed"] == 1)]
    short = [r for r in short if not (r["patch_size"] == 4 and r["mask_ratio"] == 0.9)]
    where = {"task": "task 5", "patch_size": 2, "mask_ratio": 0.25, "seed": 0}
    extra = [{**row, "seed": 7} for row in short if where.items() <= row.items()]
    analysis = analyse(check_rows(short + extra), dataclasses.replace(FAST, other_predicted=(), other_observed=()))
    group = analysis.groups[0]
    assert group.left_out == ("task 3",) and group.networks_left_out == 1 and len(group.panel.tasks) == 7
    assert np.isnan(group.panel.scores[:, 1, 3]).all()
    row = group_rows(analysis)[0]
    assert row["left_out"] == "task 3" and row["networks_left_out"] == 1 and row["num_tasks"] == 7
    # Two seeds of the others, at eight ratios but one.
    assert (row["fewest_seeds"], row["most_seeds"], row["networks"]) == (2, 2, 14)


def test_the_report_says_what_came_out(tmp_path, capsys):
    table = check_rows(rows())
    run = Run("toy", RunConfig(out=str(tmp_path / "run")), Table("toy", table, "0"), COLUMNS)
    analysis = write_report(run, table, FAST)
    folder = tmp_path / "run"
    for name in ("agreement.csv", "units.csv", "gains-toy.png", "gains-toy.pdf", "predictors.png", "columns.md"):
        assert (folder / name).stat().st_size > 0
    matched, standard = (analysis.primary[f"toy, {objective} loss"] for objective in OBJECTIVES)
    panel = analysis.groups[0].panel
    assert matched[0].value == pytest.approx(float(mean_unit_correlation(panel.predicted, panel.scores)))
    assert matched[0].value > 0.9 and matched[0].p_tasks < 0.05 < standard[0].p_tasks
    names = [OURS, OURS_WITHOUT_TASK, "mask ratio", "lower reconstruction loss", "RankMe"]
    assert [one.predictor for one in matched] == names
    text = (folder / "summary.txt").read_text()
    assert capsys.readouterr().out == text and text.startswith("toy: 256 rows")
    first, second = text.split("toy, standard loss, ")
    assert "which task gains from which ratio is predicted" in first and "no detectable knowledge" in second
    assert "Ours is detectably better than" in text and "mask ratio (toy, matched loss)" in text and PRIMARY[0] in text
    saved = rows_of(folder / "agreement.csv")
    # Three statistics of five predictors, k = 8 and 100, and accuracies (of the tasks that have them).
    assert len(saved) == 2 * (3 * 5 + 2 + 1)
    assert {row["num_tasks"] for row in saved if row["observed"] == "probe_accuracy_test"} == {"4"}
    predicted = list(dict.fromkeys(row["predicted"] for row in saved))
    assert predicted == ["closed_eval_r2_logmean", "closed_eval_r2_k8", "closed_eval_r2_k100"]
    units = rows_of(folder / "units.csv")
    assert len(units) == 2 * 8 * 2 and {"correlation", "predicted_at_0.25", "observed_at_0.9"} <= set(units[0])
    groups = rows_of(folder / "groups.csv")
    assert [float(row["reliability"]) for row in groups] == list(analysis.ceilings.values())
    assert float(groups[0]["value"]) == matched[0].value
    with pytest.raises(InputError, match="nothing to compare"):
        analyse(table, dataclasses.replace(FAST, predicted="closed_eval_r2_k128"))


def test_inert_predictions_are_said_to_be_inert():
    table = [{**row, "closed_eval_r2_logmean": 0.5} for row in rows()]
    analysis = analyse(check_rows(table), dataclasses.replace(FAST, other_predicted=(), other_observed=()))
    assert "no unit has a correlation" in sentences(analysis, FAST)[0]
    shown = shown_agreement(analysis)
    ours = shown[shown.predictor == OURS]
    assert set(ours[PRIMARY[0]]) == set(ours["interval"]) == {"-"} and set(ours.units) == {0}
    assert "nan" not in shown.to_string()
    assert analysis.table[0]["constant_predicted"] == 16
