from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from sklearn.datasets import load_digits

import mae_align as ma
from experiments.diagnose_corruption.__main__ import PRESETS, Config, main

SMALL = Config(patch_sizes=(1, 4), mask_ratios=(0.0, 0.5), noise_levels=(1.0,), ks=(2, 8))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "out"
    main(dataclasses.replace(SMALL, measure=True, out=str(folder)))
    return folder


def test_verdicts_figures_and_sentences_are_left(run):
    found = xr.load_dataset(run / "diagnosis.nc", engine="scipy")
    assert found.corruption.values.tolist() == [
        "mask 0 of 1x1",
        "mask 0.5 of 1x1",
        "mask 0 of 4x4",
        "mask 0.5 of 4x4",
        "noise 1 std",
    ]
    verdicts = found.verdict.sel(k=8).values.tolist()
    assert verdicts == ["inert", "can matter", "inert", "can matter", "inert"]
    with (run / "verdicts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows if row["k"] == "8"] == verdicts
    assert {(run / f"moved_share.{kind}").stat().st_size > 1000 for kind in ("png", "pdf")} == {True}
    summary = (run / "summary.txt").read_text()
    assert "Cannot matter for any task, at every k: mask 0 of 1x1, mask 0 of 4x4, noise 1 std." in summary
    assert "Can matter" in summary and "labels" in summary


def test_measured_changes_are_those_of_the_masking_sweep_and_within_the_bound(run):
    found = xr.load_dataset(run / "diagnosis.nc", engine="scipy")
    data = ma.load_dataset("digits")
    train = ma.Moments.from_arrays(data.train_images, data.train_labels)
    test = ma.Moments.from_arrays(data.test_images, data.test_labels, groups=20)
    result = ma.masking_sweep(train, [4], [0.0, 0.5], eval_moments=test, max_k=8).isel(patch_size=0).sel(k=[2, 8])
    for name in ("r2", "eval_r2"):
        change = 100 * (result[name].sel(mask_ratio=0.5) - result[name].sel(mask_ratio=0.0))
        np.testing.assert_allclose(found[f"{name}_change"].sel(corruption="mask 0.5 of 4x4"), change, atol=1e-9)
    masks = found.sel(corruption=[name for name in found.corruption.values if name.startswith("mask")])
    assert (abs(masks.r2_change) <= 100 * masks.largest_sine + 1e-9).all()
    assert np.isnan(found.r2_change.sel(corruption="noise 1 std")).all()


def test_labels_are_not_looked_at(tmp_path, capsys):
    pixels, target = (np.asarray(a) for a in load_digits(return_X_y=True))
    images = pixels.reshape(-1, 8, 8).astype(np.uint8)
    summaries = []
    for seed in (0, 1):
        labels = np.random.default_rng(seed).permutation(target)
        file = tmp_path / "same.npz"
        np.savez(file, x_train=images[:900], y_train=labels[:900], x_test=images[900:], y_test=labels[900:])
        main(dataclasses.replace(SMALL, data=f"npz:{file}", out=str(tmp_path / f"run{seed}")))
        summaries.append(capsys.readouterr().out.replace(f"run{seed}", "run"))
    assert summaries[0] == summaries[1]


def test_a_second_run_solves_nothing(run, monkeypatch, capsys):
    monkeypatch.setattr("mae_align.closed_form.compare.figures", None)
    monkeypatch.setattr("mae_align.closed_form.sweep.patch_basis", None)
    main(dataclasses.replace(SMALL, measure=True, out=str(run)))
    assert "Can matter" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ks": (0,)}, "--ks 0"),
        ({"ks": (65,)}, "--ks 65"),
        ({"ks": (4, 4)}, "once"),
        ({"patch_sizes": (9,)}, "larger than the image"),
        ({"mask_ratios": (1.5,)}, "mask ratio 1.5"),
        ({"noise_levels": (-1.0,)}, "--noise-levels -1.0"),
        ({"groups": 1}, "--groups 1"),
        ({"data": "digit"}, "did you mean 'digits'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ma.InputError, match=message):
        main(dataclasses.replace(SMALL, out=str(tmp_path / "out"), **options))
    assert not (tmp_path / "out").exists()


def test_presets_have_the_masks_of_the_published_figure_and_the_command_line_explains_itself():
    assert len(PRESETS["paper"].mask_ratios) * len(PRESETS["paper"].patch_sizes) == 30
    command = [sys.executable, "-m", "experiments.diagnose_corruption", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "Can a corruption matter for any task?" in done.stdout and "--measure" in done.stdout
