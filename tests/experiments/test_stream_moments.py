"""The data pass as a command, and a masking sweep that starts from its files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

import mae_align as ma
from experiments import stream_moments
from experiments.harness.cli import launch
from experiments.masking_sweep import __main__ as masking_sweep
from tests.experiments.cases import run_experiment

SMALL = ["--patch-sizes", "4", "--mask-ratios", "0.5", "--ks", "20", "--groups", "5"]


def stream(*arguments: object) -> None:
    launch(stream_moments.main, stream_moments.Config, stream_moments.PRESETS, [str(a) for a in arguments])


def sweep(*arguments: object) -> None:
    run_experiment(masking_sweep, *arguments)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Moment files of the parts of the digits."""
    folder = tmp_path_factory.mktemp("moments")
    for split, groups in (("train", 1), ("fit", 1), ("validation", 1), ("test", 5)):
        stream("--split", split, "--groups", groups, "--batch-size", 100, "--out", folder / f"{split}.npz")
    return {path.stem: str(path) for path in folder.iterdir()}


def test_the_files_are_the_moments_of_the_parts(files):
    data = ma.load_dataset("digits")
    assert set(files) == {"train", "fit", "validation", "test"}
    train, test = ma.Moments.load(files["train"]), ma.Moments.load(files["test"])
    for ours, images, labels, groups in (
        (train, data.train_images, data.train_labels, 1),
        (test, data.test_images, data.test_labels, 5),
    ):
        for a, b in zip(ours.state, ma.Moments.from_arrays(images, labels, groups=groups).state, strict=True):
            np.testing.assert_array_equal(a, b)
    parts = [ma.Moments.load(files[name]) for name in ("fit", "validation")]
    assert [m.count for m in parts] == [1151, 287]
    np.testing.assert_array_equal(parts[0].merge(parts[1]).sxx, train.sxx)


def test_test_images_have_groups_by_themselves(tmp_path):
    for split, groups in (("test", 20), ("validation", 1)):
        stream("--split", split, "--out", tmp_path / f"{split}.npz")
        assert len(ma.Moments.load(tmp_path / f"{split}.npz").counts) == groups


def test_a_sweep_from_files_is_the_sweep_from_the_data(files, tmp_path, capsys):
    sweep(*SMALL, "--out", tmp_path / "data")
    expected = capsys.readouterr().out
    names = ["--train-moments", files["fit"], "--validation-moments", files["validation"]]
    sweep(*SMALL, *names, "--test-moments", files["test"], "--out", tmp_path / "files")
    found = capsys.readouterr().out
    swap = found.replace(str(tmp_path / "files"), str(tmp_path / "data")).replace("fit.npz", "digits")
    # Accuracies need images: what masking is worth is said in points of r2 alone.
    (with_accuracy,), (without,) = (
        [one for one in text.splitlines() if one.startswith("Masking")] for text in (expected, swap)
    )
    assert "points of accuracy" in with_accuracy and "points of r2" in without and "accuracy" not in without
    assert swap.replace(without, "") == expected.replace(with_accuracy, "")
    a, b = (xr.load_dataset(tmp_path / name / "curves.nc", engine="scipy") for name in ("data", "files"))
    assert a.identical(b)


def test_a_sweep_from_training_moments_alone_is_in_sample(files, tmp_path, capsys):
    sweep(*SMALL, "--train-moments", files["train"], "--out", tmp_path)
    text = capsys.readouterr().out
    assert "1438 training, no validation and no test images" in text and "in-sample" in text
    assert "eval_r2" not in xr.load_dataset(tmp_path / "curves.nc", engine="scipy")


def test_without_validation_moments_nothing_is_chosen_on_the_test_images(files, tmp_path, capsys):
    sweep(*SMALL, "--train-moments", files["train"], "--test-moments", files["test"], "--out", tmp_path)
    text = capsys.readouterr().out
    assert "No validation moments" in text and "test images" not in text.split("\n\n")[1]
    assert "On test images 0 of 1 cells" in text
    table = np.genfromtxt(tmp_path / "summary.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert table["measured"] == "in-sample"
    curves = xr.load_dataset(tmp_path / "curves.nc", engine="scipy")
    assert np.isfinite(curves.eval_r2).all() and np.isfinite(curves.eval_r2_se).all()


def test_moment_files_that_cannot_serve_give_one_line(files, tmp_path, capsys):
    train = ["--train-moments", files["train"]]
    (tmp_path / "text.npz").write_text("pixels")
    other = tmp_path / "other.npz"
    ma.Moments.from_arrays(np.zeros((4, 2, 2, 1), np.uint8), np.arange(4) % 2, groups=1).save(other)
    bare = tmp_path / "bare.npz"
    ma.Moments.from_arrays(ma.load_dataset("digits").train_images).save(bare)
    for arguments, message in (
        (["--train-moments", tmp_path / "text.npz"], "is not a file of moments"),
        (["--train-moments", bare], "made without targets"),
        (["--test-moments", files["test"]], "go with --train-moments"),
        ([*train, "--validation-moments", files["validation"]], "without --test-moments"),
        ([*train, "--test-moments", files["train"]], "at least 2 groups"),
        ([*train, "--test-moments", files["test"], "--validation-moments", other], "do not merge"),
        ([*train, "--jitter", 0.1], "--jitter go with --data"),
    ):
        with pytest.raises(SystemExit) as stop:
            sweep(*SMALL, *arguments, "--out", tmp_path / "run")
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == "" and captured.err.count("\n") == 1
        assert not (tmp_path / "run" / "curves.nc").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digit"], "unknown data set"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--groups", "0"], "groups=0"),
        (["--checkpoint-every", "-1"], "--checkpoint-every -1"),
        (["--num-processes", "2"], "MAE_ALIGN_COORDINATOR and MAE_ALIGN_PROCESS_ID"),
        (["--split", "fit", "--validation-fraction", "2"], "fraction 2.0"),
    ],
)
def test_bad_options_give_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        stream(*arguments, "--out", tmp_path / "m.npz")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_not_overwritten(files, capsys):
    with pytest.raises(SystemExit):
        stream("--out", files["train"])
    assert "exists already: delete it or choose another --out" in capsys.readouterr().err


def test_more_processes_than_images_are_refused():
    config = stream_moments.Config(split=stream_moments.Split.test)
    with pytest.raises(ma.InputError, match="359 images for 400 processes"):
        stream_moments.make_share(config, 0, 400)
    shares = [stream_moments.make_share(config, p, 2) for p in (0, 1)]
    assert [share.count for share in shares] == [179, 180]


def test_validation_images_of_its_own_are_the_validation_split(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"train": 40, "val": 15, "test": 20}
    parts = {part: rng.integers(0, 256, (n, 4, 4), dtype=np.uint8) for part, n in sizes.items()}
    labels = {part: np.arange(len(images)) % 2 for part, images in parts.items()}
    arrays: dict[str, Any] = {f"x_{part}": images for part, images in parts.items()}
    arrays |= {f"y_{part}": y for part, y in labels.items()}
    np.savez(tmp_path / "own.npz", **arrays)
    for split, part in (("fit", "train"), ("validation", "val"), ("test", "test"), ("train", "train")):
        out = tmp_path / f"{split}.npz"
        stream("--data", f"npz:{tmp_path / 'own.npz'}", "--split", split, "--out", out)
        expected = ma.Moments.from_arrays(parts[part][..., None], labels[part], num_classes=2)
        found = ma.Moments.load(out)
        assert (
            found.count == len(parts[part]) and (found.sxx == expected.sxx).all() and (found.sxy == expected.sxy).all()
        )
