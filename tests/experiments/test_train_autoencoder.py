"""Autoencoders from the command line: guidance and learning rates as members, every network, bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mae_align as ma
from experiments import train_autoencoder
from experiments.harness import ensembles
from experiments.harness.autoencoders import Autoencoder, Kind
from experiments.harness.config import Training
from experiments.harness.data import Split
from experiments.harness.ensembles import End, Member, Probe
from experiments.harness.report import Measured, result_rows
from experiments.harness.run import Run, execute
from experiments.train_autoencoder import COLUMNS, Config, Noise, main
from mae_align.models import in_head
from tests.experiments.cases import refusal, rows_of

TINY = Config(
    max_train=300,
    max_test=100,
    seeds=(0,),
    learning_rates=(1e-5, 3e-3),
    guidance=(0.0, 1.0),
    training=Training(epochs=6, warmup_epochs=1.0, batch_size=50),
    latent=6,
    network=Autoencoder(mlp_widths=(16,)),
    probes=(Probe.ridge,),
    probe_images=50,
    devices=1,
)


def go(out: Path, **changes: Any) -> Path:
    config = dataclasses.replace(TINY, **changes, out=str(out))
    execute("train_autoencoder", main, config, Split.load, COLUMNS)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two learning rates by two guidance weights."""
    return go(tmp_path_factory.mktemp("autoencoder") / "run")


def table(folder: Path, name: str) -> list[dict[str, str]]:
    return rows_of(folder / f"{name}.csv")


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
    lines = [json.loads(line) for line in (run / "networks" / "trained" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-6:]  # an epoch
    names = ("loss", "cross_entropy", "reconstruction")
    loss, entropy, error = (np.mean([line[name] for line in last], axis=0) for name in names)
    np.testing.assert_allclose(loss, error + np.array([0, 0, 1, 1]) * entropy, rtol=1e-5)
    # The head learns at weight 0 too.
    assert entropy[1] < np.log(10) - 0.05


@pytest.mark.slow
def test_report_row_is_of_the_networks_reconstructions(run):
    """Error of the closed form's own kind: in units of the variance, of corrupted test images."""
    row = table(run, "report")[0]
    assert row["reconstruction_of"] == "clean images from corrupted ones"
    split = Split.load(TINY)
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
        {"network": Autoencoder(Kind.conv, conv_widths=(4, 4)), "corruption": Noise.gaussian_noise},
        {"network": Autoencoder(Kind.resnet, resnet_blocks=(1, 1), resnet_width=4), "corruption": Noise.patches},
    ],
)
def test_other_networks_and_corruptions(tmp_path, change):
    short = Training(epochs=1, warmup_epochs=0.0, batch_size=50)
    go(tmp_path / "run", learning_rates=(1e-3,), guidance=(0.0,), training=short, pictures=2, **change)
    rows = table(tmp_path / "run", "report")
    assert len(rows) == 1 and float(rows[0]["reconstruction_error"]) > 0
    assert (tmp_path / "run" / "reconstructions.pdf").exists()
    # Batch statistics of training are of corrupted images.
    note = "batch statistics of clean training images" if change["network"].kind is Kind.resnet else ""
    assert rows[0].get("features_note", "") == note
    notes = {row["features"]: row.get("features_note", "") for row in table(tmp_path / "run", "results")}
    assert notes["trained network"] == note and notes["raw pixels"] == notes["untrained network"] == ""


def test_settings_of_a_probe_do_not_stand_in_the_place_of_those_of_its_network():
    members = [Member(3, 0.1), Member(4, 0.1)]
    scores = {"accuracy_test": 0.5, "probe_seed": 0, "probe_learning_rate": 1e-3}
    rows = [{"member": at, "features": "trained network", "probe": "mlp", **scores} for at in (0, 1)]
    found = result_rows(members, rows, [1])
    assert [(row["member"], row["seed"], row["learning_rate"]) for row in found] == [
        ("seed 3", 3, 0.1),
        ("seed 4", 4, 0.1),
    ]
    assert [row["reported"] for row in found] == [False, True]
    assert all(row["probe_seed"] == 0 and row["probe_learning_rate"] == 1e-3 for row in found)


def test_large_images_are_pooled_within_patches():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 24, 24, 1)), np.arange(40) % 2
    split = Split("toy", ("a", "b"), x, y, x, y, x, y, np.repeat([False, True], 40))
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
    made, adamw = [], ensembles.adamw

    class Opened(Exception):
        pass

    def stop(*arguments, **options):
        raise Opened

    monkeypatch.setattr(ensembles, "adamw", lambda *of: made.append(of) or adamw(*of))
    monkeypatch.setattr(Run, "train_to", stop)
    warm = dataclasses.replace(TINY.training, warmup_epochs=4.0)
    with pytest.raises(Opened):
        go(tmp_path / "run", training=warm, ends=(End.from_scratch,), end_epochs=8)
    # Six steps in an epoch. The head that guides is clipped apart.
    assert [(config.warmup_steps, apart) for config, apart in made] == [(24, in_head), (12, None)]
    assert not (tmp_path / "run").exists()


CASES = {
    "guidance": ("--guidance -1", "--guidance -1: give numbers at least 0"),
    "noise": ("--sigma 0", "--sigma 0: give a number over 0"),
    "ratio": ("--mask-ratio 1", "--mask-ratio 1: give a number at least 0 and below 1"),
    "patch": ("--patch-size 9", "patch 9x9 is larger than the image 8x8"),
    "code": ("--latent 0", "--latent 0: give a number at least 1"),
    "mesh": (
        "--ends fine_tuning --end-learning-rates 1e-3 --learning-rates 1e-3 1e-4 --seeds 0 --ensemble-axis 2 "
        "--devices 2",
        "num_members=1 is not divisible by the 2 devices",
    ),
    "widths": ("--network.kind conv --network.conv-widths 0", "--network.conv-widths 0: give numbers at least 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, message = CASES[case]
    assert message in refusal(capsys, train_autoencoder, *arguments.split())
    assert not list(tmp_path.iterdir())
