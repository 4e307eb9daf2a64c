"""Autoencoders from the command line: guidance and learning rates as members, every network, bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mae_align as ma
from experiments.harness import train_loop as train_loop
from experiments.harness import train_main
from experiments.harness.cli import launch
from experiments.harness.measures import Measured
from experiments.harness.train_common import End, LabelledSplit, Probe
from experiments.train_autoencoder import PRESETS, Config, Network, Noise, main
from mae_align.models import in_head

TINY = Config(
    max_train=300,
    max_test=100,
    seeds=(0,),
    learning_rates=(1e-5, 3e-3),
    guidance=(0.0, 1.0),
    epochs=6,
    warmup_epochs=1.0,
    batch_size=50,
    latent=6,
    widths=(16,),
    probes=(Probe.ridge,),
    online_images=50,
    devices=1,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two learning rates by two guidance weights."""
    out = tmp_path_factory.mktemp("autoencoder") / "run"
    main(dataclasses.replace(TINY, out=str(out)))
    return out


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_better_learning_rate_of_each_guidance_is_reported(run):
    trained = [row for row in table(run, "results") if row["features"] == "trained network"]
    assert {(row["learning_rate"], row["guidance"]) for row in trained} == {
        (rate, weight) for rate in ("1e-05", "0.003") for weight in ("0.0", "1.0")
    }
    report = table(run, "report")
    assert [row["guidance"] for row in report] == ["0.0", "1.0"]
    for row in report:
        rivals = [float(r["accuracy_val"]) for r in trained if r["guidance"] == row["guidance"]]
        assert float(row["ridge_accuracy_val"]) == max(rivals)
    summary = (run / "summary.txt").read_text()
    assert "trained network, guidance 0 " in summary and "trained network, guidance 1 " in summary
    # Equal seeds start from one and the same network.
    assert len([row for row in table(run, "results") if row["features"] == "untrained network"]) == 1


@pytest.mark.slow
def test_guidance_is_in_the_loss_and_its_head_watches_without(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    loss, entropy, error = (np.array(last[name]) for name in ("loss", "cross_entropy", "reconstruction"))
    np.testing.assert_allclose(loss, error + np.array([0, 0, 1, 1]) * entropy, rtol=1e-5)
    # The head learns at weight 0 too.
    assert entropy[1] < np.log(10) - 0.05


@pytest.mark.slow
def test_report_row_is_of_the_networks_reconstructions(run):
    """Error of the closed form's own kind: in units of the variance, of corrupted test images."""
    row = table(run, "report")[0]
    assert row["reconstruction_of"] == "clean images from corrupted ones"
    split = LabelledSplit.load(TINY)
    x = split.test_images.astype(float)
    energy = ((x - split.train_images.mean(0)) ** 2).mean()
    share = float(row["reconstruction_mse"]) / energy
    assert share == pytest.approx(float(row["reconstruction_error"]), rel=1e-6)
    assert 0.3 < share < 1.1
    moments = ma.Moments.from_arrays(split.train_images, split.train_labels, num_classes=10)
    curves = ma.masking_sweep(moments, [2], [0.5])
    closed = float(curves.r2.sel(patch_size=2, mask_ratio=0.5, k=8))
    assert float(row["closed_r2_k8"]) == pytest.approx(closed, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"network": Network.conv, "widths": (4, 4), "corruption": Noise.gaussian_noise},
        {"network": Network.resnet, "widths": (1, 1), "resnet_width": 4, "corruption": Noise.patches},
    ],
)
def test_other_networks_and_corruptions(tmp_path, change):
    small = {"learning_rates": (1e-3,), "guidance": (0.0,), "epochs": 1, "warmup_epochs": 0.0, "pictures": 2}
    main(dataclasses.replace(TINY, **small, **change, out=str(tmp_path / "run")))
    rows = table(tmp_path / "run", "report")
    assert len(rows) == 1 and float(rows[0]["reconstruction_error"]) > 0
    assert (tmp_path / "run" / "reconstructions.pdf").exists()
    # Batch statistics of training are of corrupted images.
    note = "batch statistics of clean training images" if change["network"] is Network.resnet else ""
    assert rows[0].get("features_note", "") == note
    notes = {row["features"]: row.get("features_note", "") for row in table(tmp_path / "run", "results")}
    assert notes["trained network"] == note and notes["raw pixels"] == notes["untrained network"] == ""


def test_large_images_are_pooled_within_patches():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 24, 24, 1)), np.arange(40) % 2
    split = LabelledSplit("toy", 2, x, y, x, y, x, y, "")
    measured = Measured.of(split, ma.PatchMasking(6, 0.5), most=100)
    assert measured.factor == 3 and measured.corruption == ma.PatchMasking((2, 2), 0.5)
    # Masked and pooled is pooled and masked.
    kept = np.repeat(np.repeat(rng.integers(0, 2, (1, 4, 4, 1)), 6, axis=1), 6, axis=2)
    small = np.repeat(np.repeat(kept[:, ::6, ::6], 2, axis=1), 2, axis=2)
    np.testing.assert_allclose(measured.pool(x * kept), measured.pool(x) * small, atol=1e-12)
    noise = Measured.of(split, ma.GaussianNoise(4.0), most=100)
    assert noise.factor == 3 and isinstance(noise.corruption, ma.GaussianNoise)
    assert noise.corruption.sigma == pytest.approx(4.0 / 3)
    draws = np.random.default_rng(1).normal(scale=4.0, size=(200, 24, 24, 1))
    assert noise.pool(draws).std() == pytest.approx(4.0 / 3, rel=0.02)
    assert Measured.of(split, None).factor == 1


def test_warm_up_is_as_given_and_a_quarter_at_most_with_labels(monkeypatch, tmp_path):
    """Both trainings are there before there is a run folder."""
    made, adamw = [], train_loop.adamw

    class Opened(Exception):
        pass

    def stop(*arguments, **options):
        raise Opened

    monkeypatch.setattr(train_loop, "adamw", lambda *of: made.append(of) or adamw(*of))
    monkeypatch.setattr(train_main.RunFolder, "open", stop)
    with pytest.raises(Opened):
        main(dataclasses.replace(TINY, warmup_epochs=4.0, ends=(End.from_scratch,), end_epochs=8))
    # Six steps in an epoch. The head that guides is clipped apart.
    assert [(config.warmup_steps, apart) for config, apart in made] == [(24, in_head), (12, None)]


def test_the_checkpoint_of_least_loss_is_kept_beside_the_last_two(monkeypatch, tmp_path):
    kept = []

    def fit(*arguments, checkpoints, **options):
        for step, loss in enumerate((0.1, 0.4, 0.2, 0.3), start=1):
            checkpoints.save(step, {"x": jnp.zeros(1)}, {}, {"loss": loss})
        checkpoints.wait()
        kept.extend(checkpoints.steps())

    monkeypatch.setattr(train_loop, "fit", fit)
    programs: Any = SimpleNamespace(put=lambda *arrays: arrays)
    train_loop.train(TINY, LabelledSplit.load(TINY), programs, programs, 6, tmp_path, "toy")
    assert kept == [1, 3, 4]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--guidance", "-1"], "--guidance -1: give finite weights of at least 0"),
        (["--sigma", "0"], "--sigma 0: give a number over 0"),
        (["--mask-ratio", "1"], "--mask-ratio 1: give a number from 0 to below 1"),
        (["--patch-size", "9"], "patch 9x9 is larger than the image 8x8"),
        (["--latent", "0"], "latent=0: give at least one feature"),
        (
            ["--ends", "fine_tuning", "--end-learning-rates", "1e-3", "--learning-rates", "1e-3", "1e-4"]
            + ["--seeds", "0", "--ensemble-axis", "2", "--devices", "2"],
            "num_members=1 is not divisible by the 2 devices",
        ),
        (["--network", "resnet", "--widths", "0"], "blocks (0,): give at least one number"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        launch(main, Config, PRESETS, argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}"), error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
