"""Masked autoencoders from the command line: report, figures, interruptions, and one clear line for bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx

import mae_align as ma
from experiments import train_mae
from experiments.harness import masked
from experiments.harness import probes as harness_probes
from experiments.harness.config import Training, Vit, settings
from experiments.harness.data import Split
from experiments.harness.ensembles import End, Probe
from experiments.harness.figures import Column, training_figure
from experiments.harness.run import execute
from experiments.train_mae import COLUMNS, PRESETS, Config, main
from mae_align.models import Loss, MaskedAutoencoder, Pixels, VitSize
from mae_align.probes import ridge_probe
from tests.experiments.cases import refusal, rows_of

REPOSITORY = Path(__file__).resolve().parents[2]

TINY = Config(
    max_train=400,
    max_test=150,
    training=Training(epochs=5, warmup_epochs=1.0, batch_size=64, learning_rate=1e-3),
    # A block in the decoder is enough: most of the time is compilation.
    network=Vit(width=16, depth=0, heads=2, decoder_width=16, decoder_heads=2),
    checkpoint_every=10,
    evaluate_every=10,
    probe_images=100,
    ends=(End.fine_tuning, End.from_scratch, End.supervised),
    end_epochs=2,
    devices=1,
)
STEPS = 5 * (400 // 64)


def go(config: Config, out: Path) -> Path:
    execute("train_mae", main, dataclasses.replace(config, out=str(out)), Split.load, COLUMNS)
    return out


def options(config: Config) -> list[str]:
    """A configuration as options of the command line."""
    usual = {one.option: one.value for one in settings(PRESETS["laptop"])}
    found: list[str] = []
    for one in settings(config):
        if one.value != usual[one.option]:
            values = one.value if isinstance(one.value, tuple) else [one.value]
            found += [one.option, *(str(getattr(v, "value", v)) for v in values)]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    return go(TINY, tmp_path_factory.mktemp("mae") / "run")


def rows(folder: Path) -> list[dict[str, str]]:
    return rows_of(folder / "results.csv")


@pytest.mark.slow
def test_run_leaves_everything_in_its_folder(run):
    names = {path.name for path in run.iterdir()}
    figures = {f"{name}.{kind}" for name in ("training", "reconstructions", "accuracy") for kind in ("png", "pdf")}
    tables = {f"{name}.csv" for name in ("results", "comparisons", "report", "closed_form")}
    assert names == figures | tables | {
        "config.json",
        "data.json",
        "run.json",
        "columns.md",
        "summary.txt",
        "predictions.nc",
        "networks",
        "points",
    }
    trained = run / "networks" / "trained"
    assert list(trained.glob("events.*")) and list((run / "networks" / "from_scratch").glob("events.*"))
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == STEPS
    losses = [record["loss"] for record in records if "loss" in record]
    assert np.less(losses[-1], losses[0]).all()
    probed = [record["step"] for record in records if "probe_accuracy" in record]
    assert probed == [10, 20, 30]


@pytest.mark.slow
def test_every_baseline_stands_beside_the_networks(run):
    table = {(row["features"], row["probe"], row["member"]) for row in rows(run)}
    members = ("seed 0", "seed 1")
    for probe in ("ridge", "knn"):
        for features in ("trained network", "untrained network", "supervised network"):
            assert {(features, probe, member) for member in members} <= table
        assert {("raw pixels", probe, ""), ("16 principal components", probe, "")} <= table
    assert {(name, "none", member) for name in ("fine-tuned", "from scratch") for member in members} <= table
    assert len(table) == len(rows(run)) == 2 * (3 * 2 + 2) + 4
    summary = (run / "summary.txt").read_text()
    assert "most frequent class" in summary and "+-" in summary
    kept = xr.load_dataset(run / "predictions.nc", engine="scipy")
    scores = (kept.predicted == kept.label).mean("image").values
    np.testing.assert_allclose(scores, [float(row["accuracy_test"]) for row in rows(run)], atol=1e-6)


@pytest.mark.slow
def test_raw_pixels_score_is_that_of_a_plain_ridge_regression(run):
    split = Split.load(TINY)
    (row,) = [row for row in rows(run) if (row["features"], row["probe"]) == ("raw pixels", "ridge")]
    flat = [x.reshape(len(x), -1).astype(float) for x in (split.train_images, split.test_images)]
    keep = flat[0].std(0) > 0
    train, test = ((x[:, keep] - flat[0][:, keep].mean(0)) / flat[0][:, keep].std(0) for x in flat)
    y = np.eye(10)[split.train_labels]
    # Constant pixels count in the mean variance of a feature.
    strength = float(row["probe_strength"]) * keep.mean()
    covariance = train.T @ train / len(train) + strength * np.eye(train.shape[1])
    weights = np.linalg.solve(covariance, train.T @ (y - y.mean(0)) / len(train))
    accuracy = ((test @ weights + y.mean(0)).argmax(1) == split.test_labels).mean()
    assert float(row["accuracy_test"]) == pytest.approx(accuracy)


@pytest.mark.slow
def test_a_network_with_labels_that_diverges_does_not_cost_the_report(tmp_path):
    config = dataclasses.replace(TINY, seeds=(0,), probes=(Probe.ridge,))
    config = dataclasses.replace(config, ends=(End.supervised,), end_learning_rates=(1e30,))
    with pytest.warns(
        UserWarning, match=r"Left out: networks trained with labels \(from_scratch\): .*--end-learning-rates"
    ):
        go(config, tmp_path / "run")
    assert {row["features"] for row in rows(tmp_path / "run")} == {
        "trained network",
        "untrained network",
        "raw pixels",
        "16 principal components",
    }


@pytest.mark.slow
def test_goes_on_with_what_is_missing_on_another_mesh(run, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "points" / "probe-trained-network-1-ridge.npz").unlink()
    (folder / "summary.txt").unlink()
    counted = []

    def ridge(*arguments, **given):
        counted.append(given["features"])
        return ridge_probe(*arguments, **given)

    monkeypatch.setitem(harness_probes.PROBES, Probe.ridge, ridge)
    capsys.readouterr()
    go(dataclasses.replace(TINY, devices=2, ensemble_axis=2, checkpoint_every=5), folder)
    assert counted == ["trained network"]
    printed, whole = capsys.readouterr().out.splitlines(), (run / "summary.txt").read_text().splitlines()
    assert [a for a in printed if "Figures" not in a] == [a for a in whole if "Figures" not in a]


@pytest.mark.slow
def test_more_probes_are_added_to_a_finished_run(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    go(dataclasses.replace(TINY, probes=(Probe.ridge, Probe.knn, Probe.mlp)), folder)
    before, after = rows(run), rows(folder)
    assert {row["probe"] for row in after} == {"ridge", "knn", "mlp", "none"}
    assert [row["accuracy_test"] for row in after if row["probe"] != "mlp"] == [row["accuracy_test"] for row in before]


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_numbers(run, tmp_path):
    folder = tmp_path / "run"
    # As many devices as this process has: the number of threads of each is part of the rounding.
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "experiments.train_mae", *options(TINY), "--out", str(folder)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = folder / "networks" / "trained" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143, error
    assert "stopped by SIGTERM" in error and "the same command goes on" in error.splitlines()[-1]
    assert "Traceback" not in error
    checkpoints = metrics.parent / "checkpoints"
    saved = {int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()}
    assert 0 < max(saved) < STEPS
    # As if it had been killed while it wrote a checkpoint and a line of metrics.
    (checkpoints / f"{STEPS - 1}.orbax-checkpoint-tmp").mkdir()
    with metrics.open("a") as file:
        file.write('{"step": 2')
    # Networks with labels do not depend on the one that was killed, apart from fine-tuning.
    for part in [*run.glob("points/*from_scratch*"), *run.glob("points/*supervised*")]:
        shutil.copy(part, folder / "points")
    shutil.copytree(run / "networks" / "from_scratch", folder / "networks" / "from_scratch")
    go(TINY, folder)
    assert (folder / "results.csv").read_text() == (run / "results.csv").read_text()


def test_every_baseline_is_drawn_beside_the_online_probe():
    levels = {"raw pixels": 0.25, "components": 0.375, "untrained": 0.5, "supervised": 0.75}
    records = [{"step": step, "loss": [2.0, 1.0], "probe_accuracy": [0.5, 0.625]} for step in (1, 2)]
    panel = training_figure(records, ["seed 0", "seed 1"], levels, 8).axes[1]
    lines = [line for line in panel.get_lines() if line.get_linestyle() == "--"]
    drawn = {line.get_label(): float(np.asarray(line.get_ydata())[0]) for line in lines}
    assert drawn == {name: 100 * level for name, level in levels.items()}


def network(objective: Loss, images: np.ndarray) -> MaskedAutoencoder:
    sizes: Any = vars(VitSize(8, 1, 2, 8, 1, 2))
    model = MaskedAutoencoder(
        Pixels.from_images(images),
        corruption=ma.FixedCountPatchMasking(2, num_visible=4),
        objective=objective,
        rngs=nnx.Rngs(0),
        **sizes,
    )
    model.eval()
    return model


@pytest.mark.parametrize("objective", list(Loss))
def test_pictures_show_what_the_network_predicts(objective, monkeypatch):
    images = ma.load_dataset("digits").train_images[:5]
    model, drawn = network(objective, images), []
    monkeypatch.setattr(masked, "picture_figure", lambda columns, caption: drawn.append((columns, caption)))
    masked.pictures(model, images, images, seed=3)
    (columns, caption), found = drawn[0], model.predict(jnp.asarray(images), jax.random.key(3))
    shown = {column.title.split("\n")[0]: column.images for column in columns}
    hidden = np.asarray(columns[1].hidden)
    assert hidden.sum(axis=(1, 2)).tolist() == [48] * 5
    np.testing.assert_array_equal(model.patchify(jnp.asarray(hidden[..., None]))[:, :, 0], found.mask)
    if objective is Loss.standard:
        patches = np.asarray(model.patchify(jnp.asarray(shown["target: patches"])))
        np.testing.assert_allclose(patches.mean(2), 0, atol=1e-5)
        pasted = shown["prediction, visible"]
        np.testing.assert_array_equal(pasted[~hidden], shown["target: patches"][~hidden])
        predicted = np.asarray(model.unpatchify(found.prediction))
        np.testing.assert_array_equal(pasted[hidden], predicted[hidden])
        assert "does not predict" in caption
        restored = shown["the same, with"]
    else:
        restored = shown["prediction, visible"]
        predicted = np.asarray(model.pixels.restore(model.unpatchify(found.prediction)))
        np.testing.assert_allclose(restored[hidden], predicted[hidden], rtol=1e-6)
    np.testing.assert_allclose(restored[~hidden], images[~hidden], atol=1e-3)


def test_hidden_pixels_are_painted():
    column = Column.pixels("x", np.full((1, 2, 2, 1), 9), np.array([0, 9]), np.array([[[True, False], [False, False]]]))
    drawn = column.drawn()
    assert drawn[0, 0, 1].tolist() == [1, 1, 1] and len(set(drawn[0, 0, 0])) == 3


CASES = {
    "unknown data": ("--data digit", "unknown data set 'digit', did you mean 'digits'?"),
    "patch": ("--patch-size 3", "patch 3x3 does not divide the image 8x8"),
    "everything hidden": ("--mask-ratio 1", "--mask-ratio 1: give a number at least 0 and below 1"),
    "nothing hidden": ("--mask-ratio 0", "a loss on hidden patches is empty where none is hidden"),
    "heads": ("--network.heads 5", "5 heads do not divide the width 64"),
    "batch": ("--training.batch-size 5000", "--training.batch-size 5000: there are 1151 training images"),
    "mesh": ("--ensemble-axis 3", "ensemble=3 does not divide 8 devices"),
    "devices": ("--devices 9", "--devices 9: there are 8, give at most as many"),
    "warm-up": ("--training.warmup-epochs 100", "--training.warmup-epochs 100: give fewer than the 100"),
    "probes": ("--probes knn", "--probes: ridge is the probe that choices are made by"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, message = CASES[case]
    assert message in refusal(capsys, train_mae, *arguments.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_other_settings_need_another_folder(run, capsys):
    error = refusal(capsys, train_mae, *options(TINY), "--seed", "1", "--out", str(run))
    assert "belongs to another configuration (--seed: 0 there, 1 now)" in error
