"""The main job, end to end: results, resume, and one clear line for every kind of bad input."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import mae_align as ma
from experiments.masking_sweep import __main__ as masking_sweep
from experiments.masking_sweep.report import at_the_edge
from experiments.masking_sweep.worth import Worth
from mae_align.runtime.devices import compile_counter
from tests.experiments.cases import refusal, run_experiment

SMALL = ["--patch-sizes", "2", "4", "--mask-ratios", "0.5", "1.0", "--ks", "3", "20", "--groups", "5"]


def run(*arguments: object) -> None:
    run_experiment(masking_sweep, *arguments)


def write_npz(path, *, images=None, labels=None) -> str:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 6, 6, 1)).astype(np.uint8) if images is None else images
    labels = np.arange(len(images)) % 3 if labels is None else labels
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return f"npz:{path}"


def test_results_figures_and_summary(tmp_path, capsys):
    out = tmp_path / "run"
    run(*SMALL, "--out", out)
    text = capsys.readouterr().out
    assert "r2, test images" in text
    assert "+-" in text
    assert "Joint embedding" in text
    assert str(out / "relative_change.png") in text
    expected = {"config.json", "curves.nc", "curves.csv", "influence.nc", "summary.csv", "summary.txt", "heat_map.pdf"}
    expected |= {"data.json", "run.json", "columns.md", "differences.csv"}
    assert expected <= {p.name for p in out.iterdir()}
    curves = xr.load_dataset(out / "curves.nc", engine="scipy")
    assert dict(curves.sizes) == {"patch_size": 2, "mask_ratio": 3, "k": 64}
    # The reference is always there, and the same for every patch size.
    none = curves.eval_r2.sel(mask_ratio=0.0)
    np.testing.assert_array_equal(none.sel(patch_size=2), none.sel(patch_size=4))
    np.testing.assert_allclose(curves.alignment_percent, 100 * np.sqrt(curves.alignment))


def test_numbers_are_those_of_real_predictions(tmp_path):
    """The reported cell, recomputed from the images with NumPy: encoder, probe, test images, paired difference."""
    import mae_align as ma

    out = tmp_path / "run"
    run("--patch-sizes", 4, "--mask-ratios", 0.5, "--ks", 10, "--out", out)
    table = np.genfromtxt(out / "summary.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    data = ma.load_dataset("digits")
    moments = ma.Moments.from_arrays(data.train_images, data.train_labels)
    y = np.eye(10)[data.test_labels]
    scale = ((y - moments.mean_y) ** 2).sum()
    r2 = []
    for ratio in (0.0, 0.5):
        network = ma.denoising_autoencoder(moments, ma.PatchMasking(4, ratio), 10)
        r2.append(1 - ((network.predict(data.test_images) - y) ** 2).sum() / scale)
    np.testing.assert_allclose(float(table["r2_no_mask"]), r2[0], rtol=1e-3)
    np.testing.assert_allclose(float(table["best_change"]), 100 * (r2[1] - r2[0]), rtol=2e-2)


def test_sentences_table_and_differences_follow_from_one_rule(tmp_path, capsys):
    run("--patch-sizes", 2, 4, "--mask-ratios", 0.5, 0.99, "--ks", 3, 8, "--out", tmp_path)
    text = capsys.readouterr().out
    rows = np.genfromtxt(tmp_path / "differences.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    masks = rows[rows["features"] == "mask"]
    limit = float(text.partition("worse (by over ")[2].split()[0])
    statistics = masks["eval_change"] / masks["eval_change_se"]
    assert (statistics < -limit - 0.05).any() and (abs(abs(statistics) - limit) > 0.05).all()
    worse = masks["eval_verdict"] == "worse"
    np.testing.assert_array_equal(worse, statistics < -limit)
    assert f"0 of 8 cells (a mask and a k) are better than no mask and {worse.sum()} are worse" in text
    chosen = np.genfromtxt(tmp_path / "summary.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    for row in chosen:
        same = masks[(masks["k"] == row["k"]) & (masks["patch_size"] == row["worst_patch"])]
        (cell,) = same[same["mask_ratio"] == row["worst_ratio"]]
        assert (row["worst_change"], row["worst_verdict"]) == (cell["eval_change"], cell["eval_verdict"])


def test_few_large_images_take_the_dual(tmp_path, capsys):
    """60 images of 18 x 18: 48 fit the validation sweep (rank 47), 60 the test sweep (rank 59)."""
    images = np.random.default_rng(0).integers(0, 256, (60, 18, 18, 1)).astype(np.uint8)
    data, out = write_npz(tmp_path / "few.npz", images=images), tmp_path / "run"
    run(*SMALL[:1], 2, 9, *SMALL[3:6], "--ks", 3, 50, "--groups", 5, "--data", data, "--out", out)
    curves = xr.load_dataset(out / "curves.nc", engine="scipy")
    assert curves.attrs["factorisation"] == "dual" and curves.sizes["k"] == 59
    assert curves.saturated.values.tolist() == [False, True]
    text = capsys.readouterr().out
    assert "Patches of 9x9 have at least as many pixel values as there are training images, 60" in text
    assert "k over the rank 47 of these images are left out." in text


def test_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "run"
    run(*SMALL, "--out", out)
    first = capsys.readouterr().out
    points = sorted((out / "points" / "test").glob("*.npz"))
    kept = {p.name: p.stat().st_mtime_ns for p in points[1:]}
    points[0].unlink()
    (out / "summary.txt").unlink()
    with compile_counter() as compiled:
        run(*SMALL, "--out", out)
    assert capsys.readouterr().out == first
    assert compiled.count == 0
    assert points[0].exists()
    assert {p.name: p.stat().st_mtime_ns for p in points[1:]} == kept


def test_other_settings_need_another_folder(tmp_path, capsys):
    run(*SMALL, "--out", tmp_path)
    with pytest.raises(SystemExit):
        run(*SMALL, "--seed", 1, "--out", tmp_path)
    assert "--out" in capsys.readouterr().err


def test_a_finished_run_prints_its_result_and_computes_nothing(tmp_path, capsys, monkeypatch):
    run(*SMALL, "--out", tmp_path)
    first = capsys.readouterr().out
    monkeypatch.setattr("mae_align.masking_sweep", None)
    run(*SMALL, "--out", tmp_path, "--workers", 1)
    assert capsys.readouterr().out == first


def test_fewer_images_are_those_of_the_split(tmp_path, capsys):
    run(*SMALL, "--max-train", 300, "--max-test", 100, "--out", tmp_path)
    assert "300 training, 287 validation and 100 test images" in capsys.readouterr().out
    curves = xr.load_dataset(tmp_path / "curves.nc", engine="scipy")
    assert curves.attrs["num_train"] == 300


@pytest.mark.parametrize("family", ["fixed_count", "random_ratio"])
def test_other_mask_families(tmp_path, family):
    arguments = ["--masking", family, "--patch-sizes", 2, "--mask-ratios", 0.5, "--ks", 5, "--out", tmp_path]
    run(*arguments)
    curves = xr.load_dataset(tmp_path / "curves.nc", engine="scipy")
    p_eff = float(curves.p_eff.sel(patch_size=2, mask_ratio=0.5))
    assert p_eff == pytest.approx({"fixed_count": 0.5 * 16 / 15, "random_ratio": 1 / 3}[family])


def test_paper_protocol_is_in_sample(tmp_path, capsys):
    run("--preset", "paper", "--ks", 10, "--patch-sizes", 2, "--out", tmp_path)
    assert "in-sample" in capsys.readouterr().out
    curves = xr.load_dataset(tmp_path / "curves.nc", engine="scipy")
    assert curves.attrs["pixel_noise"] == 0.0
    assert "eval_r2" not in curves


BAD = {
    "missing file": (["--data", "npz:{tmp}/none.npz"], "none.npz"),
    "patch over the image": (["--patch-sizes", "9"], "larger than the image"),
    "k over the pixels": (["--ks", "100"], "give k in"),
    "max_k below ks": (["--max-k", "4"], "--max-k 4"),
    "no visible patch": (["--masking", "fixed_count", "--mask-ratios", "0.99"], "visible"),
    "too many groups": (["--groups", "5000"], "leave a group empty"),
    "only no mask": (["--mask-ratios", "0"], "over 0"),
    "bounds": (["--mask-ratios", "1.5"], "--mask-ratios 1.5"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_options_give_one_line(tmp_path, capsys, case):
    arguments, message = BAD[case]
    given = [a.format(tmp=tmp_path) for a in arguments]
    assert message in refusal(capsys, masking_sweep, *given, "--out", tmp_path / "run")
    # Nothing is claimed: the corrected command may use the same folder.
    assert not (tmp_path / "run").exists()


def damaged(path) -> None:
    write_npz(path)
    path.write_bytes(path.read_bytes()[:500])


BAD_DATA = {
    "NaN pixels": (dict(images=np.full((60, 6, 6, 1), np.nan, np.float32)), "NaN"),
    "infinite pixels": (dict(images=np.full((60, 6, 6, 1), np.inf, np.float32)), "infinite"),
    "wrong rank": (dict(images=np.zeros((60, 36), np.uint8)), "x_train"),
    "one class": (dict(labels=np.zeros(60, np.int64)), "at least two"),
    "negative labels": (dict(labels=np.arange(60) - 1), "-1"),
    "labels too short": (dict(labels=np.arange(59) % 3), "59"),
    "constant images": (dict(images=np.full((60, 6, 6, 1), 7, np.uint8)), "constant"),
}


@pytest.mark.parametrize("case", BAD_DATA, ids=str)
def test_bad_data_give_one_line(tmp_path, capsys, case):
    arrays, message = BAD_DATA[case]
    name = write_npz(tmp_path / "bad.npz", **arrays)
    assert message in refusal(capsys, masking_sweep, "--data", name, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_k_over_the_rank_gives_one_line(tmp_path, capsys):
    arguments = ["--pixel-noise", 0, "--ks", 63, "--patch-sizes", 4, "--mask-ratios", 0.5, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert "over the rank" in capsys.readouterr().err


def test_damaged_file_gives_one_line(tmp_path, capsys):
    damaged(tmp_path / "bad.npz")
    assert "bad.npz" in refusal(capsys, masking_sweep, "--data", f"npz:{tmp_path}/bad.npz", "--out", tmp_path / "run")


def test_a_finished_sweep_outlives_an_update_where_that_is_asked_for(tmp_path, capsys, monkeypatch):
    """Its points are those of the library's own store, under an identity of their own."""
    arguments = [*SMALL, "--out", tmp_path / "run"]
    run(*arguments)
    first = capsys.readouterr().out
    monkeypatch.setattr("mae_align.__version__", "9.9.9")
    monkeypatch.setattr("experiments.harness.run.code_of", lambda experiment: "another")
    solved = []
    monkeypatch.setattr("mae_align.runtime.files.PointStore.save", lambda self, key, arrays: solved.append(key))
    with pytest.raises(SystemExit):
        run(*arguments)
    assert "was computed by other code" in capsys.readouterr().err
    run(*arguments, "--reuse")
    again = capsys.readouterr().out
    assert "Some of this was computed by other code" in again and solved == []
    assert [line for line in again.splitlines() if "other code" not in line] == first.splitlines()


@pytest.mark.parametrize(
    ("best", "words"),
    [
        ((4, 0.75), ["the largest ratio of the grid: extend it with --mask-ratios ... 0.88", "--patch-sizes ... 8"]),
        ((2, 0.25), ["the smallest ratio of the grid: extend it with --mask-ratios ... 0.125", "--patch-sizes ... 1"]),
        ((3, 0.5), []),
    ],
)
def test_a_best_mask_on_the_edge_of_the_grid_is_said_with_what_would_extend_it(best, words):
    grid = [(size, ratio) for size in (2, 3, 4) for ratio in (0.25, 0.5, 0.75)]
    cells = pd.DataFrame([{"features": "mask", "patch_size": size, "mask_ratio": ratio} for size, ratio in grid])
    chosen = pd.DataFrame({"k": [8], "best_patch": [best[0]], "best_ratio": [best[1]]})
    notes = at_the_edge(chosen, cells, (16, 16, 1))
    assert len(notes) == (2 if words else 0) and all(any(word in note for note in notes) for word in words)
    # Nothing larger than half the image: one patch is all of it.
    assert not any("--patch-sizes ... 8" in note for note in at_the_edge(chosen, cells, (8, 8, 1)))


def test_the_verdict_says_first_what_masking_is_worth(tmp_path, capsys):
    """Against a direct least-squares classifier on the features of the mask that validation images choose."""
    run("--patch-sizes", 2, 4, "--mask-ratios", 0.3, 0.6, "--ks", 4, 16, "--out", tmp_path)
    text = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "worth.csv").iloc[0]
    chosen = pd.read_csv(tmp_path / "summary.csv")
    row = chosen.loc[chosen.best_validation_change.idxmax()]
    assert (table.k, table["mask"]) == (
        row.k,
        f"{row.best_ratio:g} of {row.best_patch:.0f}x{row.best_patch:.0f} patches",
    )
    data = ma.load_dataset("digits")
    moments = ma.Moments.from_arrays(data.train_images, data.train_labels)
    right = []
    for ratio in (0.0, row.best_ratio):
        mask = ma.PatchMasking(int(row.best_patch), float(ratio))
        model = ma.denoising_autoencoder(moments, mask, int(row.k), pixel_noise=1 / 12)
        features, tests = (np.insert(model.encode(x), 0, 1, axis=1) for x in (data.train_images, data.test_images))
        head = np.linalg.lstsq(features, np.eye(10)[data.train_labels])[0]
        right.append((tests @ head).argmax(1) == data.test_labels)
    assert table.accuracy_no_mask == pytest.approx(100 * right[0].mean())
    assert table.accuracy == pytest.approx(100 * right[1].mean())
    paired = np.std(right[1].astype(float) - right[0], ddof=1) / np.sqrt(len(right[0]))
    assert table.accuracy_change_se == pytest.approx(100 * paired)
    assert text.split("\n\n")[-1].startswith("Masking ") and f"{table.accuracy_change:+.2f} +- " in text


@pytest.mark.parametrize(
    ("change", "se", "words"),
    [
        (2.0, 0.5, "Masking is worth 2.0 points of accuracy: the mask"),
        (2.0, 1.5, "Masking may be worth it, but these test images are too few to tell: the mask"),
        (0.4, 0.01, "Masking is not worth it here, for it gains less than 0.5 points of accuracy: the mask"),
    ],
)
def test_worth_has_a_size(change, se, words):
    assert Worth(4, "0.5 of 2x2 patches", 0.1, 0.1, 80.0, 80.0 + change, change, se).sentence.startswith(words)
    assert "r2" in Worth(4, "0.5 of 2x2 patches", change, se).sentence.partition(":")[0] or "few" in words
