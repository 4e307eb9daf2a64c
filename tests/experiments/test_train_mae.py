"""Masked autoencoders from the command line: report, figures, interruptions, and one clear line for bad input."""

from __future__ import annotations

import csv
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
from experiments.harness import probes as train_probes
from experiments.harness.cli import launch
from experiments.harness.train_common import End, LabelledSplit, Probe
from experiments.harness.train_figures import Column, training_figure
from experiments.train_mae import PRESETS, Config, main
from mae_align.models import Loss, MaskedAutoencoder, Pixels, VitSize
from mae_align.probes import ridge_probe

REPOSITORY = Path(__file__).resolve().parents[2]

TINY = Config(
    max_train=400,
    max_test=150,
    epochs=5,
    warmup_epochs=1.0,
    batch_size=64,
    width=16,
    depth=0,  # a block in the decoder is enough: most of the time is compilation
    heads=2,
    decoder_width=16,
    decoder_heads=2,
    checkpoint_every=10,
    evaluate_every=10,
    online_images=100,
    ends=(End.fine_tuning, End.from_scratch, End.supervised),
    end_epochs=2,
    devices=1,
)
STEPS = 5 * (400 // 64)


def options(config: Config) -> list[str]:
    """A configuration as options of the command line."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(PRESETS["laptop"], field.name):
            values = value if isinstance(value, tuple) else [value]
            found += [f"--{field.name.replace('_', '-')}", *(str(getattr(v, "value", v)) for v in values)]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("mae") / "run"
    main(dataclasses.replace(TINY, out=str(out)))
    return out


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_run_leaves_everything_in_its_folder(run):
    names = {path.name for path in run.iterdir() if not path.name.startswith("events.")}
    figures = {f"{name}.{kind}" for name in ("training", "reconstructions", "accuracy") for kind in ("png", "pdf")}
    files = {"config.json", "metrics.jsonl", "results.csv", "results.nc", "report.csv", "summary.txt"}
    assert names == figures | files | {"checkpoints", "points", "ends"}
    assert any(path.name.startswith("events.") for path in run.iterdir())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
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
    result = xr.load_dataset(run / "results.nc", engine="scipy")
    assert dict(result.accuracy_test.sizes) == {"member": 2, "features": 5, "probe": 2}
    for row in rows(run):
        if row["probe"] != "none":
            member = row["member"] or "seed 0"
            at = result.accuracy_test.sel(member=member, features=row["features"], probe=row["probe"])
            assert float(at) == float(row["accuracy_test"])
    summary = (run / "summary.txt").read_text()
    assert "most frequent class" in summary and "+-" in summary


@pytest.mark.slow
def test_raw_pixels_score_is_that_of_a_plain_ridge_regression(run):
    split = LabelledSplit.load(TINY)
    (row,) = [row for row in rows(run) if (row["features"], row["probe"]) == ("raw pixels", "ridge")]
    flat = [x.reshape(len(x), -1).astype(float) for x in (split.train_images, split.test_images)]
    keep = flat[0].std(0) > 0
    train, test = ((x[:, keep] - flat[0][:, keep].mean(0)) / flat[0][:, keep].std(0) for x in flat)
    y = np.eye(10)[split.train_labels]
    # Constant pixels count in the mean variance of a feature.
    strength = float(row["strength"]) * keep.mean()
    covariance = train.T @ train / len(train) + strength * np.eye(train.shape[1])
    weights = np.linalg.solve(covariance, train.T @ (y - y.mean(0)) / len(train))
    accuracy = ((test @ weights + y.mean(0)).argmax(1) == split.test_labels).mean()
    assert float(row["accuracy_test"]) == pytest.approx(accuracy)


@pytest.mark.slow
def test_a_network_with_labels_that_diverges_does_not_cost_the_report(tmp_path):
    config = dataclasses.replace(TINY, seeds=(0,), probes=(Probe.ridge,), out=str(tmp_path / "run"))
    config = dataclasses.replace(config, ends=(End.supervised,), end_learning_rates=(1e30,))
    with pytest.warns(
        UserWarning, match=r"Left out: networks trained with labels \(from_scratch\): .*--end-learning-rates"
    ):
        main(config)
    assert {row["features"] for row in rows(tmp_path / "run")} == {
        "trained network",
        "untrained network",
        "raw pixels",
        "16 principal components",
    }


def test_parts_of_the_data_are_apart():
    split = LabelledSplit.load(TINY)
    data = ma.load_dataset("digits")
    assert (len(split.train_labels), len(split.test_labels)) == (400, 150)
    train, validation = ({x.tobytes() for x in part} for part in (split.train_images, split.validation_images))
    assert train <= {x.tobytes() for x in data.train_images} and not train & validation
    assert {x.tobytes() for x in split.test_images} <= {x.tobytes() for x in data.test_images}


@pytest.mark.slow
def test_goes_on_with_what_is_missing_on_another_mesh(run, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "points" / "probe-trained-network-1-ridge.npz").unlink()
    (folder / "summary.txt").unlink()
    counted = []

    def ridge(*arguments, **settings):
        counted.append(settings["features"])
        return ridge_probe(*arguments, **settings)

    monkeypatch.setitem(train_probes._PROBES, Probe.ridge, ridge)
    config = dataclasses.replace(
        TINY, out=str(folder), devices=2, ensemble_axis=2, steps_per_call=7, checkpoint_every=5
    )
    main(config)
    assert counted == ["trained network"]
    assert capsys.readouterr().out.splitlines()[3:-3] == (run / "summary.txt").read_text().splitlines()[3:-3]


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_numbers(run, tmp_path):
    folder = tmp_path / "run"
    # As many devices as this process has: the number of threads of each is part of the rounding.
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "experiments.train_mae", *options(TINY), "--out", str(folder)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143, error
    assert "stopped by SIGTERM" in error and "the same command goes on" in error.splitlines()[-1]
    assert "Traceback" not in error
    saved = {int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()}
    assert 0 < max(saved) < STEPS
    # As if it had been killed while it wrote a checkpoint and a line of metrics.
    (folder / "checkpoints" / f"{STEPS - 1}.orbax-checkpoint-tmp").mkdir()
    with metrics.open("a") as file:
        file.write('{"step": 2')
    # Networks with labels do not depend on the one that was killed, apart from fine-tuning.
    for part in [*run.glob("points/*from_scratch*"), *run.glob("points/*supervised*")]:
        shutil.copy(part, folder / "points")
    main(dataclasses.replace(TINY, out=str(folder)))
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
    monkeypatch.setattr(train_mae, "picture_figure", lambda columns, caption: drawn.append((columns, caption)))
    train_mae.pictures(model, images, images, seed=3)
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "digit"], "unknown data set 'digit', did you mean 'digits'?"),
        (["--patch-size", "3"], "patch 3x3 does not divide the image 8x8"),
        (["--mask-ratio", "1"], "mask ratio 1.0: give a number from 0 to below 1"),
        (["--mask-ratio", "0"], "a loss on hidden patches is empty where none is hidden"),
        (["--heads", "5"], "5 heads do not divide the width 64"),
        (["--batch-size", "5000"], "--batch-size 5000: there are 1151 training images, give a smaller batch"),
        (["--ensemble-axis", "3"], "ensemble=3 does not divide 8 devices"),
        (["--devices", "9"], "--devices 9: there are 8, give at most as many"),
        (["--seeds", "1", "1"], "--seeds 1 1 repeats a value"),
        (["--learning-rates", "0"], "--learning-rates 0: give finite numbers over 0"),
        (["--warmup-epochs", "100"], "--warmup-epochs 100: give fewer than the 100 --epochs"),
        (["--probes", "knn"], "--probes: ridge is the probe that choices are made by"),
        (["--validation-fraction", "0"], "split fraction 0.0 must lie between 0 and 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        launch(main, Config, PRESETS, argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_other_settings_need_another_folder(run, capsys):
    with pytest.raises(SystemExit):
        launch(main, Config, PRESETS, [*options(TINY), "--seed", "1", "--out", str(run)])
    assert "belongs to another configuration (seed: 0 there, 1 now)" in capsys.readouterr().err
