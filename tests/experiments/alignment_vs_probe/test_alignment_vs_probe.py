"""Trained networks against the closed form, end to end on a few digits."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import experiments.alignment_vs_probe.__main__ as module
from experiments.alignment_vs_probe import cells as alignment_cells
from experiments.alignment_vs_probe.__main__ import PRESETS, Config, main
from experiments.alignment_vs_probe.cells import (
    Cell,
    Loss,
    NetworkConfig,
    closed_form,
    make_training,
    probe_columns,
    probe_tasks,
)
from experiments.alignment_vs_probe.report import SUPERVISED, UNTRAINED, baseline_sentences
from experiments.alignment_vs_probe.table import KEYS, read_table
from experiments.alignment_vs_probe.tasks import Task, TaskKind
from experiments.harness.cli import launch
from experiments.harness.folder import RunFolder
from mae_align import FixedCountPatchMasking, InputError, Moments, denoising_autoencoder, encoder_curves, load_dataset
from mae_align.data import ImageDataset
from mae_align.probes import ProbeResult, Protocol
from mae_align.train.loop import Diverged

TINY = Config(
    max_train=100,
    max_test=120,
    patch_sizes=(4,),
    mask_ratios=(0.25, 0.5, 0.75),
    losses=(Loss.matched,),
    ks=(8, 32),
    # No blocks: their compilation would take most of the time.
    network=NetworkConfig(8, 0, 2, 8, 0, 2, epochs=2, batch_size=25),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("alignment") / "run"
    main(dataclasses.replace(TINY, out=str(out)))
    return out


@pytest.mark.slow
def test_one_row_for_each_task_network_and_mask(run):
    rows = read_table(run / "rows.csv")
    keys = [tuple(row[key] for key in KEYS) for row in rows]
    assert len(set(keys)) == len(keys)
    tasks = {row["task"] for row in rows}
    assert len(tasks) >= 10
    assert len(rows) == len(tasks) * 3 * 2
    for row in rows:
        assert row["realized_ratio"] == row["mask_ratio"]  # four patches
        assert -1.0 < row["closed_eval_r2_logmean"] <= 1.0
        assert row["probe_r2_test"] <= 1.0
        assert 1.0 <= row["rankme"] <= 8.0
        # Of the 120 test images, the probes see one half (a task of some classes: fewer).
        assert row["probe_n_test"] <= 60
    # What there is not is a blank cell: a number as target has no accuracy.
    assert "nan" not in (run / "rows.csv").read_text() + (run / "baselines.csv").read_text()
    summary = (run / "summary.txt").read_text()
    assert "reconstructions-*.png" in summary and "predictors.png" in summary.splitlines()[-1]
    assert "fine labels: networks by loss: matched " in summary and summary.count(f", {SUPERVISED} ") == 2
    with (run / "baselines.csv").open(newline="") as file:
        baselines = [(row["features"], row["seed"], row["task"]) for row in csv.DictReader(file)]
    assert {(name, seed, task) for name in (UNTRAINED, SUPERVISED) for seed in "01" for task in tasks} <= {*baselines}
    assert len(baselines) == (2 + 2 * 2) * len(tasks)
    for cell in (run / "networks").glob("patch*"):
        lines = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
        watched = [line["probe_accuracy"] for line in lines if "probe_accuracy" in line]
        assert len(watched) == 2 and all(0.0 <= each <= 1.0 for pair in watched for each in pair)
        assert (run / f"reconstructions-{cell.name}.png").stat().st_size > 1000
    assert {"agreement.csv", "baselines.csv", "summary.txt", "gains-digits.png"} <= {p.name for p in run.iterdir()}


@pytest.mark.slow
def test_goes_on_with_what_is_finished(run, monkeypatch, capsys):
    (run / "summary.txt").unlink()
    before = (run / "rows.csv").read_bytes()
    monkeypatch.setattr(module, "train", None)
    main(dataclasses.replace(TINY, out=str(run)))
    assert (run / "rows.csv").read_bytes() == before
    assert (run / "summary.txt").exists()


@pytest.mark.slow
def test_the_analysis_alone_of_a_table(run, tmp_path):
    out = tmp_path / "again"
    main(Config(analyse_only=str(run / "rows.csv"), out=str(out)))
    assert (out / "agreement.csv").read_bytes() == (run / "agreement.csv").read_bytes()
    assert "\n\nFigures: " in (out / "summary.txt").read_text()
    assert "\n\nReconstructions of every trained cell: " in (run / "summary.txt").read_text()


def test_closed_form_of_a_task_on_some_images_uses_the_encoder_of_all():
    data = load_dataset("digits")
    data = ImageDataset(
        data.train_images[:300],
        data.train_labels[:300],
        data.test_images[:200],
        data.test_labels[:200],
        data.class_names,
        "few digits",
    )
    train, test = (np.flatnonzero(labels < 2) for labels in (data.train_labels, data.test_labels))
    pair = Task(
        "0, 1", TaskKind.CLASS_PAIR, data.train_labels[train], data.test_labels[test], 2, train, test, restricted=True
    )
    rows = [np.arange(300), np.arange(200)]
    whole = Task(
        "all", TaskKind.FINE_LABELS, data.train_labels, data.test_labels, data.num_classes, *rows, restricted=False
    )
    mask, moments = FixedCountPatchMasking(4, 2), Moments.from_arrays(data.train_images)
    found = closed_form(moments, mask, data, [pair, whole], (5,))
    encoder = denoising_autoencoder(moments, mask, 5).encoder
    for task in (pair, whole):
        fitted = Moments.from_arrays(
            data.train_images[task.train_rows], task.train_targets, num_classes=task.num_classes
        )
        held_out = Moments.from_arrays(
            data.test_images[task.test_rows], task.test_targets, num_classes=task.num_classes, groups=2
        )
        inside, outside = encoder_curves(fitted, encoder, eval_moments=held_out)
        assert outside is not None
        assert found[task.name]["closed_r2_k5"] == pytest.approx(inside.r2[4], abs=1e-9)
        assert found[task.name]["closed_eval_r2_k5"] == pytest.approx(outside.r2[4], abs=1e-9)


def test_a_task_on_some_classes_is_probed_on_its_images_alone():
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = rng.normal(size=(90, 4)) + 5.0 * np.eye(4)[labels]
    some = np.flatnonzero(labels > 0)
    tasks = [
        Task("all", TaskKind.FINE_LABELS, labels, labels, 3, np.arange(90), np.arange(90), restricted=False),
        Task("1, 2", TaskKind.CLASS_PAIR, labels[some] - 1, labels[some] - 1, 2, some, some, restricted=True),
    ]
    found = probe_tasks(features, features, tasks, "made up")
    assert found["1, 2"].protocol.n_test == 60
    assert found["all"].protocol.n_test == 90
    assert found["1, 2"].accuracy_test > 0.9


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The study without networks: in a process whose own folder is not the shared one, where some cells diverge."""
    where, lost, reports = [], set(), []

    def observed(config, run, cell, folder):
        where.append(folder.shared)
        if (cell.mask_ratio, cell.loss) in lost:
            raise Diverged("the loss of member 1 is nan", 17, 1, None)
        for task in ("a", "b"):
            row = {"dataset": "digits", "task": task, "task_kind": "labels", "patch_size": cell.patch_size}
            row |= {"mask_ratio": cell.mask_ratio, "objective": cell.loss.value, "seed": 0}
            yield row | dict.fromkeys(("probe_r2_test", "reconstruction_loss", "rankme"), 0.5)

    def untrained(config, run, patch):
        yield {"features": UNTRAINED, "patch_size": patch, "task": "a", "probe_r2_test": 0.25}

    def supervised(config, run, patch, folder):
        where.append(folder)
        if patch in lost:
            raise Diverged("the loss of member 0 is nan", 3, 0, None)
        yield {"features": SUPERVISED, "patch_size": patch, "task": "a", "probe_r2_test": 0.875}

    folder = RunFolder(tmp_path / "own", resumed=False, shared=tmp_path / "shared")
    folder.path.mkdir()
    monkeypatch.setattr(module, "_observed", observed)
    monkeypatch.setattr(module, "_untrained", untrained)
    monkeypatch.setattr(module, "_supervised", supervised)
    monkeypatch.setattr(
        module, "_baselines", lambda run: [{"features": "raw pixels", "task": "a", "probe_r2_test": 0.75}]
    )
    monkeypatch.setattr(module, "_predictions", lambda *of: defaultdict(lambda: {"closed_eval_r2_logmean": 0.5}))
    monkeypatch.setattr(module, "write_report", lambda *of: reports.append(of))
    monkeypatch.setattr(module.RunFolder, "open", lambda *of: folder)
    config = dataclasses.replace(TINY, patch_sizes=(2, 4), losses=(Loss.matched, Loss.standard))
    return SimpleNamespace(config=config, where=where, lost=lost, reports=reports, folder=folder)


def test_cells_that_diverge_are_left_out_and_the_others_reported(study, capsys):
    study.lost |= {(0.5, Loss.standard), 4}
    with pytest.warns(UserWarning, match=r"Left out: .*, the loss of member . is nan at"):
        main(study.config)
    assert set(study.where) == {study.folder.shared} and len(study.where) == 12 + 2
    rows, _, _, notes, drawn = study.reports[0]
    # Two ratios of the standard loss are not enough; the table has them all the same.
    assert {row["objective"] for row in rows} == {"matched"} and len(rows) == 2 * 3 * 2
    assert len(read_table(study.folder.path / "rows.csv")) == len(rows) + 2 * 2 * 2
    assert len([note for note in notes if re.match(r"Left out: patch.-ratio0\.5-standard, the loss of m", note)]) == 2
    assert (
        "matched +0.500; baselines: raw pixels +0.750, untrained network +0.250, supervised network +0.875." in notes[0]
    )
    assert len([note for note in notes if note.startswith("Left out: supervised-patch4, the loss of member 0 is")]) == 1
    assert [line.split(": ")[0] for line in drawn] == ["Reconstructions of every trained cell"]
    baselines = (study.folder.path / "baselines.csv").read_text()
    assert baselines.count(UNTRAINED) == 2 and baselines.count(SUPERVISED) == 1
    # In a file, too: a long run is often watched there.
    assert "networks: 100%" in capsys.readouterr().err


def test_a_score_that_a_probe_does_not_have_is_a_blank_cell():
    protocol = Protocol("ridge", "pixels", "per_feature", 80, 10, 10, seed=0, strength=0.1)
    found = probe_columns(ProbeResult(math.nan, math.nan, math.nan, 0.7, 0.6, 0.5, protocol))
    assert [found[f"probe_accuracy_{part}"] for part in ("train", "val", "test")] == [None] * 3
    assert [found[f"probe_r2_{part}"] for part in ("train", "val", "test")] == [0.7, 0.6, 0.5]
    assert (found["probe_name"], found["probe_strength"], found["probe_n_train"]) == ("ridge", 0.1, 80)


def test_the_accuracy_of_the_baselines_is_of_fine_labels_alone():
    scores = {"fine labels": 0.5, "coarse labels": 0.75}
    rows = [{"task": t, "probe_r2_test": a / 2, "probe_accuracy_test": a} for t, a in scores.items()]
    networks = [row | {"objective": "matched"} for row in rows]
    r2, accuracy = baseline_sentences(networks, [row | {"features": "raw pixels"} for row in rows])
    assert r2.endswith("networks by loss: matched +0.312; baselines: raw pixels +0.312.")
    assert accuracy.endswith("fine labels: networks by loss: matched 50.0%; baselines: raw pixels 50.0%.")
    assert len(list(baseline_sentences([networks[1]], []))) == 1


def test_a_study_without_networks_fails_clearly(study):
    study.lost |= {(0.5, loss) for loss in Loss}
    with (
        pytest.warns(UserWarning, match="Left out"),
        pytest.raises(InputError, match=r"4 of 12 cells diverged, .* mask ratios: give a smaller --network.learn"),
    ):
        main(study.config)


def test_untrained_networks_are_probed_as_trained_ones(monkeypatch):
    made = []
    monkeypatch.setattr(module, "make_training", lambda *of: made.append(make_training(*of)) or made[-1])
    run = module._Run.of(TINY, load_dataset("digits"))
    run = dataclasses.replace(run, probe_tasks=run.probe_tasks[:2])
    found = list(module._untrained(TINY, run, 4))
    assert [(row["task"], row["seed"]) for row in found] == [(t.name, s) for s in TINY.seeds for t in run.probe_tasks]
    model = made[0].model(made[0].init(TINY.seeds), 1)
    parts = [np.asarray(model.features(jnp.asarray(x))) for x in (run.probed.train_images, run.probed.test_images)]
    for task, result in probe_tasks(parts[0], parts[1], run.probe_tasks, "x").items():
        (row,) = [row for row in found if (row["task"], row["seed"]) == (task, TINY.seeds[1])]
        assert row["probe_r2_test"] == pytest.approx(result.r2_test, abs=1e-4)


def test_supervised_networks_learn_the_fine_labels_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, network=dataclasses.replace(TINY.network, epochs=30, learning_rate=0.02))
    run = module._Run.of(config, load_dataset("digits"))
    run = dataclasses.replace(run, probe_tasks=tuple(t for t in run.probe_tasks if t.kind is TaskKind.FINE_LABELS))
    before = [row["probe_accuracy_train"] for row in module._untrained(config, run, 4)]
    found = list(module._supervised(config, run, 4, tmp_path))
    assert [(row["features"], row["patch_size"], row["seed"]) for row in found] == [(SUPERVISED, 4, s) for s in (0, 1)]
    after = [row["probe_accuracy_train"] for row in found]
    assert np.subtract(after, before).min() > 0.15, (before, after)
    # Finished networks are taken from their checkpoint; those of other labels are not.
    monkeypatch.setattr(alignment_cells.MetricLog, "write", None)
    assert list(module._supervised(config, run, 4, tmp_path)) == found
    other = dataclasses.replace(run, probed=dataclasses.replace(run.probed, train_labels=run.probed.train_labels[::-1]))
    with pytest.raises(InputError, match="another"):
        list(module._supervised(config, other, 4, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mask-ratios", "0.25", "0.5"], "at least three different ones"),
        (["--patch-sizes", "3"], "does not divide"),
        (["--seeds", "1", "1"], "repeats a value"),
        (["--mask-ratios", "0.25", "0.5", "1.0"], "mask ratio 1"),
        (
            ["--mask-ratios", "0.25", "0.5", "0.52"],
            "of the 16 patches of 2x2 pixels they leave fewer than",
        ),
        (["--seeds", "0", "4294967296"], "--seeds 4294967296: give whole numbers below 2^32"),
        (["--max-train", "50"], "--network.batch-size 64: there are 50 training images"),
        (["--analyse-only", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_settings_are_refused_in_one_line(arguments, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        launch(main, Config, PRESETS, [*arguments, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("run/networks")) and not list(tmp_path.glob("run/points"))


def test_constant_images_are_refused_in_one_line(tmp_path, capsys):
    images, labels = np.full((60, 8, 8, 1), 7, np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "flat.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(SystemExit), warnings.catch_warnings(record=True) as caught:
        launch(main, Config, PRESETS, ["--data", f"npz:{tmp_path / 'flat.npz'}", "--out", str(tmp_path / "run")])
    assert not caught and not (tmp_path / "run").exists()
    assert (
        capsys.readouterr().err
        == "error: all images are the same: there is no variance to reconstruct, give other images\n"
    )


def test_the_last_two_checkpoints_of_a_cell_are_kept(tmp_path, monkeypatch):
    kept = []

    def fit(*arguments, checkpoints, **options):
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.zeros(1)}, {}, {"loss": 1.0})
        checkpoints.wait()
        kept.extend(checkpoints.steps())

    monkeypatch.setattr(alignment_cells, "fit", fit)
    programs: Any = SimpleNamespace(init=list, put=lambda *of: of)
    alignment_cells.train(programs, np.zeros(50), TINY.network, (0,), tmp_path, "toy")
    assert kept == [2, 3]


def test_cells_have_names_of_their_own():
    names = {Cell(p, r, loss).key for p in (2, 4) for r in (0.25, 0.5) for loss in Loss}
    assert len(names) == 8


def test_input_error_is_the_packages_own():
    with pytest.raises(InputError):
        main(dataclasses.replace(TINY, max_train=3))
