from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image
from sklearn.datasets import load_digits

import mae_align as ma
from experiments import diagnose_corruption
from tests.experiments.cases import refusal, rows_of, run_experiment

SMALL = ("--patch-sizes", 1, 4, "--mask-ratios", 0, 0.5, "--noise-levels", 1, "--ks", 2, 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "out"
    run_experiment(diagnose_corruption, *SMALL, "--measure", "--out", folder)
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
    rows = rows_of(run / "verdicts.csv")
    assert [row["verdict"] for row in rows if row["k"] == "8"] == verdicts
    assert {(run / f"sampling_ratio.{kind}").stat().st_size > 1000 for kind in ("png", "pdf")} == {True}
    summary = (run / "summary.txt").read_text()
    assert "Cannot matter for any task, at every k: mask 0 of 1x1, mask 0 of 4x4, noise 1 std." in summary
    counts = {word: [row["verdict"] for row in rows].count(word) for word in ("inert", "can matter")}
    assert f"Of 10 cells (a corruption and a k), {counts['inert']} cannot matter" in summary
    assert f"{counts['can matter']} can matter" in summary and "no labels" in summary


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


def test_labels_are_not_looked_at(tmp_path):
    pixels, target = (np.asarray(a) for a in load_digits(return_X_y=True))
    images = pixels.reshape(-1, 8, 8).astype(np.uint8)
    tables = []
    for seed in (0, 1):
        labels = np.random.default_rng(seed).permutation(target)
        file = tmp_path / "same.npz"
        np.savez(file, x_train=images[:900], y_train=labels[:900], x_test=images[900:], y_test=labels[900:])
        run_experiment(diagnose_corruption, *SMALL, "--data", f"npz:{file}", "--out", tmp_path / f"run{seed}")
        tables.append((tmp_path / f"run{seed}" / "verdicts.csv").read_text())
    assert tables[0] == tables[1]


def test_a_second_run_solves_nothing(run, monkeypatch, capsys):
    monkeypatch.setattr("mae_align.closed_form.compare.figures", None)
    monkeypatch.setattr("mae_align.closed_form.corruption_sweep.corruption_features", None)
    (run / "summary.txt").unlink()
    run_experiment(diagnose_corruption, *SMALL, "--measure", "--out", run)
    assert "can matter" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ks", 65], "--ks 65"),
        (["--patch-sizes", 9], "larger than the image"),
        (["--groups", 720], "--groups 720"),
        (["--groups", 400, "--measure"], "359 test images leave a group empty"),
    ],
)
def test_what_does_not_fit_the_images_is_refused_before_anything_is_written(tmp_path, capsys, arguments, message):
    assert message in refusal(capsys, diagnose_corruption, *SMALL, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_preset_has_the_masks_of_the_published_figure():
    paper = diagnose_corruption.PRESETS["paper"]
    assert len(paper.mask_ratios) * len(paper.patch_sizes) == 30


def test_what_decides_stands_in_the_table_and_pictures_need_no_labels(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(ma.load_dataset("digits").train_images[:200, ..., 0]):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i:03}.png")
    arguments = ["--data", f"images:{tmp_path / 'pictures'}", "--ks", "4", "--patch-sizes", "2", "--groups", "10"]
    out = tmp_path / "out"
    run_experiment(diagnose_corruption, "--out", out, *arguments)
    table = pd.read_csv(out / "verdicts.csv")
    assert (table.verdict[table.sampling_ratio > 1] == "can matter").all() and (table.sampling_ratio > 1).any()
    assert (table.verdict[table.sampling_ratio <= 1].isin(["inert", "within sampling noise"])).all()
    shown = table.loc[table.sampling_ratio.idxmax()]
    assert f"{shown.sampling_ratio:.1f}x can matter" in (out / "summary.txt").read_text()
    with pytest.raises(SystemExit):
        run_experiment(diagnose_corruption, "--out", tmp_path / "b", *arguments, "--measure")
    assert "--measure asks about labels, and pictures has none" in capsys.readouterr().err
