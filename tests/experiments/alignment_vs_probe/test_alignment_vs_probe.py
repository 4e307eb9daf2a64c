"""Trained networks against the closed form, end to end on a few digits."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import experiments.alignment_vs_probe.__main__ as module
from experiments.alignment_vs_probe.__main__ import COLUMNS, Config, load, main
from experiments.alignment_vs_probe.networks import FEATURE_BATCH, Cell, Networks
from experiments.alignment_vs_probe.report import SUPERVISED, UNTRAINED, mean_scores
from experiments.alignment_vs_probe.study import Study, blank, closed_form
from experiments.alignment_vs_probe.table import KEYS, Table
from experiments.alignment_vs_probe.tasks import TaskKind
from experiments.harness.config import Training, Vit
from experiments.harness.data import Split
from experiments.harness.run import execute
from mae_align import FixedCountPatchMasking, InputError, Moments, denoising_autoencoder, encoder_curves
from mae_align.models import Loss
from mae_align.probes import Rows, ridge_probe
from mae_align.train.loop import Diverged
from tests.experiments.cases import refusal, rows_of

TINY = Config(
    max_train=100,
    max_test=120,
    patch_sizes=(4,),
    mask_ratios=(0.25, 0.5, 0.75),
    losses=(Loss.matched,),
    ks=(8, 32),
    # No blocks: their compilation would take most of the time.
    network=Vit(8, 0, 2, 8, 0, 2),
    training=Training(epochs=2, batch_size=25, warmup_epochs=1.0),
)


def go(**settings: Any) -> None:
    execute("alignment_vs_probe", main, dataclasses.replace(TINY, **settings), load, COLUMNS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("alignment") / "run"
    go(out=str(out))
    return out


@functools.cache
def study() -> Study:
    return Study.of(Split.load(TINY), TINY.seed)


@pytest.mark.slow
def test_one_row_for_each_task_network_and_mask(run):
    rows = Table.read(str(run / "rows.csv")).rows
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
    assert "reconstructions-*.png" in summary and "predictors.png" in summary
    assert [row["features"] for row in rows_of(run / "scores.csv")] == [
        "networks, matched loss",
        "raw pixels",
        "first 64 principal components",
        UNTRAINED,
        SUPERVISED,
    ]
    baselines = [(row["features"], row["seed"], row["task"]) for row in rows_of(run / "baselines.csv")]
    assert {(name, seed, task) for name in (UNTRAINED, SUPERVISED) for seed in "01" for task in tasks} <= {*baselines}
    assert len(baselines) == (2 + 2 * 2) * len(tasks)
    for cell in (run / "networks").glob("patch*"):
        lines = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
        watched = [line["probe_accuracy"] for line in lines if "probe_accuracy" in line]
        assert len(watched) == 2 and all(0.0 <= each <= 1.0 for pair in watched for each in pair)
        assert (run / f"reconstructions-{cell.name}.png").stat().st_size > 1000
    assert {"agreement.csv", "groups.csv", "units.csv", "gains-digits.png"} <= {p.name for p in run.iterdir()}


@pytest.mark.slow
def test_goes_on_with_what_is_finished(run, monkeypatch):
    (run / "summary.txt").unlink()
    before = (run / "rows.csv").read_bytes()
    monkeypatch.setattr(Networks, "train", None)
    go(out=str(run))
    assert (run / "rows.csv").read_bytes() == before
    assert (run / "summary.txt").exists()


@pytest.mark.slow
def test_the_analysis_alone_of_a_table(run, tmp_path):
    out = tmp_path / "again"
    go(analyse_only=str(run / "rows.csv"), out=str(out))
    assert (out / "agreement.csv").read_bytes() == (run / "agreement.csv").read_bytes()
    assert "Figures: " in (out / "summary.txt").read_text() and not (out / "networks").exists()


def test_prediction_and_observation_share_no_test_image():
    found, data = study(), Split.load(TINY)
    halves = [found.probed.images, found.predicted.images]
    assert [len(half) for half in halves] == [60, 60]
    both = np.concatenate(halves).reshape(120, -1)
    np.testing.assert_array_equal(np.sort(both, axis=0), np.sort(data.test_images.reshape(120, -1), axis=0))
    np.testing.assert_array_equal(found.chosen.images, data.validation_images)
    for task, half in zip(found.probed.tasks, halves[0][None], strict=False):
        assert task.kind is TaskKind.FINE_LABELS
        for image, label in zip(half, task.test_targets, strict=True):
            at = (data.test_images == image).all((1, 2, 3))
            assert label in data.test_labels[at]


def test_closed_form_of_a_task_on_some_images_uses_the_encoder_of_all():
    found, mask = study(), FixedCountPatchMasking(4, 2)
    rows = closed_form(found, mask, (5,))
    encoder = denoising_autoencoder(found.moments, mask, 5).encoder
    pair = next(task for task in found.predicted.tasks if task.restricted)
    whole = next(task for task in found.predicted.tasks if not task.restricted)
    for task in (pair, whole):
        parts = [
            Moments.from_arrays(images[rows], targets, num_classes=task.num_classes, groups=groups)
            for images, rows, targets, groups in (
                (found.data.train_images, task.train_rows, task.train_targets, 1),
                (found.predicted.images, task.test_rows, task.test_targets, 2),
            )
        ]
        inside, outside = encoder_curves(parts[0], encoder, eval_moments=parts[1])
        assert outside is not None
        assert rows[task.name]["closed_r2_k5"] == pytest.approx(inside.r2[4], abs=1e-9)
        assert rows[task.name]["closed_eval_r2_k5"] == pytest.approx(outside.r2[4], abs=1e-9)


def test_a_task_on_some_classes_is_probed_on_its_images_alone_and_chosen_in_validation():
    found = study()
    encoded = found.encoded(lambda images: images.reshape(1, len(images), -1)[:, :, ::3].astype(np.float32))
    (scores,) = found.probe(encoded, "every third pixel")
    for name in ("fine labels", next(task.name for task in found.probed.tasks if task.restricted)):
        task, chosen = (next(t for t in part.tasks if t.name == name) for part in (found.probed, found.chosen))
        x, x_val, x_test = (part[0] for part in encoded)
        expected = ridge_probe(
            x[task.train_rows],
            task.train_targets,
            x_test[task.test_rows],
            task.test_targets,
            num_classes=task.num_classes,
            val=Rows(x_val[chosen.test_rows], chosen.test_targets),
        )
        assert scores[name]["probe_accuracy_test"] == pytest.approx(expected.accuracy_test)
        assert scores[name]["probe_strength"] == expected.protocol.strength
        assert scores[name]["probe_n_test"] == len(task.test_rows) and scores[name]["probe_n_val"] == len(
            chosen.test_rows
        )
        assert np.isin(found.data.train_labels[task.train_rows], found.data.train_labels).all()
    assert scores["brightness"]["probe_accuracy_test"] is None


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The study without networks, of which some diverge."""
    lost: set[Any] = set()

    def train(networks, run, key, training):
        if key in lost:
            raise Diverged("the loss of member 1 is nan", 17, 1, None)

    def observed(config, run, study, cell, training, state):
        for task in ("a", "b"):
            row = {"dataset": "digits", "task": task, "task_kind": "labels", "patch_size": cell.patch_size}
            row |= {"mask_ratio": cell.mask_ratio, "objective": cell.loss.value, "seed": 0}
            row |= dict.fromkeys(("probe_r2_test", "reconstruction_loss", "rankme"), 0.5)
            yield row | {"probe_accuracy_test": None}

    def labelled(study, seeds, patch, name, training, state):
        score = {UNTRAINED: 0.25, SUPERVISED: 0.875}[name]
        row = {"features": name, "patch_size": patch, "task": "a", "probe_r2_test": score}
        return [row | {"probe_accuracy_test": None}]

    plain = {"features": "raw pixels", "task": "a", "probe_r2_test": 0.75, "probe_accuracy_test": None}
    monkeypatch.setattr(Networks, "train", train)
    monkeypatch.setattr(module, "_observed", lambda *of: list(observed(*of)))
    monkeypatch.setattr(module, "_labelled", labelled)
    monkeypatch.setattr(module, "_plain", lambda study: [plain])
    monkeypatch.setattr(
        module,
        "_predictions",
        lambda config, run, study: {
            (patch, ratio, task): {"closed_eval_r2_logmean": 0.5}
            for patch in config.patch_sizes
            for ratio in config.mask_ratios
            for task in "ab"
        },
    )
    settings = {"patch_sizes": (2, 4), "losses": (Loss.matched, Loss.standard), "out": str(tmp_path / "run")}
    return SimpleNamespace(go=lambda: go(**settings), lost=lost, out=tmp_path / "run")


def test_cells_that_diverge_are_left_out_and_the_others_reported(fake):
    fake.lost |= {"patch2-ratio0.5-standard", "patch4-ratio0.5-standard", "supervised-patch4"}
    with pytest.warns(UserWarning, match=r"Left out: .*, the loss of member . is nan at"):
        fake.go()
    rows = rows_of(fake.out / "rows.csv")
    # Two ratios of the standard loss are not enough; the table has them all the same.
    assert len(rows) == 2 * 3 * 2 + 2 * 2 * 2
    assert {row["objective"] for row in rows_of(fake.out / "groups.csv")} == {"matched"}
    summary = (fake.out / "summary.txt").read_text()
    assert len(re.findall(r"Left out: patch.-ratio0\.5-standard, the loss of m", summary)) == 2
    assert "Left out: supervised-patch4, the loss of member 1 is" in summary
    assert "no unit has a correlation" in summary
    found = {row["features"]: row["r2"] for row in rows_of(fake.out / "scores.csv")}
    assert found == {
        "networks, matched loss": "0.5",
        "raw pixels": "0.75",
        UNTRAINED: "0.25",
        SUPERVISED: "0.875",
    }
    baselines = (fake.out / "baselines.csv").read_text()
    assert baselines.count(UNTRAINED) == 2 and baselines.count(SUPERVISED) == 1


def test_a_study_without_networks_fails_clearly(fake):
    fake.lost |= {f"patch{patch}-ratio0.5-{loss.value}" for patch in (2, 4) for loss in Loss}
    with (
        pytest.warns(UserWarning, match="Left out"),
        pytest.raises(InputError, match=r"4 of 12 cells diverged, .* mask ratios: give a smaller --training.learn"),
    ):
        fake.go()


def test_a_score_that_a_probe_does_not_have_is_a_blank_cell():
    assert blank({"probe_accuracy_test": math.nan, "probe_r2_test": 0.5, "probe_name": "ridge"}) == {
        "probe_accuracy_test": None,
        "probe_r2_test": 0.5,
        "probe_name": "ridge",
    }


def test_the_accuracy_of_the_baselines_is_of_fine_labels_alone():
    scores = {"fine labels": 0.5, "coarse labels": 0.75}
    rows = [{"task": t, "probe_r2_test": a / 2, "probe_accuracy_test": a} for t, a in scores.items()]
    networks = [row | {"objective": "matched"} for row in rows]
    found = mean_scores(networks, [row | {"features": "raw pixels"} for row in rows])
    assert found.features.tolist() == ["networks, matched loss", "raw pixels"]
    assert found.r2.tolist() == [0.3125, 0.3125] and found.accuracy.tolist() == [0.5, 0.5]
    assert math.isnan(mean_scores([networks[1]], []).accuracy[0])


def of_digits(**training: Any) -> Networks:
    return Networks(Split.load(TINY), TINY.network, dataclasses.replace(TINY.training, **training), TINY.seeds)


def test_untrained_networks_are_probed_as_trained_ones():
    networks, found = of_digits(), study()
    training = networks.masked(Cell(4, 0.5, Loss.matched))
    state = training.init(TINY.seeds)
    rows = module._labelled(found, TINY.seeds, 4, UNTRAINED, training, state)
    names = [task.name for task in found.probed.tasks]
    assert sorted((row["seed"], row["task"]) for row in rows) == [
        (s, name) for s in TINY.seeds for name in sorted(names)
    ]
    model = training.model(state, 1)
    parts = found.encoded(lambda images: np.asarray(model.features(images.astype(np.float32)))[None])
    for name, scores in found.probe(parts, "x")[0].items():
        (row,) = [row for row in rows if (row["task"], row["seed"]) == (name, TINY.seeds[1])]
        assert row["probe_r2_test"] == pytest.approx(scores["probe_r2_test"], abs=1e-4)


@pytest.mark.slow
def test_supervised_networks_learn_the_fine_labels_and_go_on_where_they_stopped(tmp_path):
    settings = dataclasses.replace(TINY.training, epochs=30, learning_rate=0.02)
    networks = of_digits(epochs=30, learning_rate=0.02)
    training, found = networks.supervised(Cell(4, 0.5, Loss.matched)), study()

    def accuracy(state) -> np.ndarray:
        parts = found.encoded(lambda images: training.features(state, images, FEATURE_BATCH))
        return np.array([scores["fine labels"]["probe_accuracy_train"] for scores in found.probe(parts, "x")])

    run = module.Run("toy", dataclasses.replace(TINY, training=settings, out=str(tmp_path / "run")), networks.data, {})
    after = accuracy(networks.train(run, "supervised", training))
    before = accuracy(training.init(TINY.seeds))
    assert (after - before).min() > 0.15, (before, after)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mask-ratios", "0.25", "0.5"], "a correlation needs three"),
        (["--patch-sizes", "3"], "does not divide"),
        (["--mask-ratios", "0.25", "0.5", "1.0"], "mask ratio 1"),
        (["--mask-ratios", "0.25", "0.5", "0.52"], "of the 16 patches of 2x2 pixels they leave fewer than"),
        (["--max-train", "50"], "--training.batch-size 64: there are 50 training images"),
        (["--analyse-only", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(arguments, says, tmp_path, capsys):
    assert says in refusal(capsys, module, *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_constant_images_are_refused_in_one_line(tmp_path, capsys):
    images, labels = np.full((60, 8, 8, 1), 7, np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "flat.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with warnings.catch_warnings(record=True) as caught:
        said = refusal(capsys, module, "--data", f"npz:{tmp_path / 'flat.npz'}", "--out", tmp_path / "run")
    assert not caught and not (tmp_path / "run").exists()
    assert said == "error: the training images are constant: there is nothing to reconstruct\n"


def test_cells_have_names_of_their_own():
    names = {Cell(p, r, loss).key for p in (2, 4) for r in (0.25, 0.5) for loss in Loss}
    assert len(names) == 12
