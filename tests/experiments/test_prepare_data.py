from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mae_align as ma
from experiments import prepare_data
from experiments.harness.cli import launch
from tests.data.tfds_sets import NO_TENSORFLOW

REPOSITORY = Path(ma.__file__).parents[1]

# Opens a data set with TFDS alone, in a process without TensorFlow, installed or not.
PLAIN = (
    NO_TENSORFLOW
    + """
import numpy as np
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(sys.argv[1])
arrays = {}
for part in ("train", "test"):
    records = builder.as_data_source(part)
    arrays["x_" + part] = np.stack([record["image"] for record in records])
    arrays["y_" + part] = np.array([record["label"] for record in records])
np.savez(sys.argv[2], names=builder.info.features["label"].names, **arrays)
"""
)


def run(*argv: object) -> None:
    launch(prepare_data.main, prepare_data.Config, prepare_data.PRESETS, [str(value) for value in argv])


def test_the_command_writes_what_tfds_opens_without_tensorflow(tmp_path):
    command = [sys.executable, "-m", "experiments.prepare_data", "--out", tmp_path / "out", "--shards", "3"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert out.returncode == 0, out.stderr
    assert "1797/1797" in out.stderr  # the bar
    assert out.stdout.splitlines() == [
        f"Written: {tmp_path}/out",
        "1438 train images in 3 file(s), 359 test images in 3 file(s); 8x8x1 uint8, 10 classes",
        f"1.0 MB. Use it with: --data prepared:{tmp_path}/out",
    ]
    plain = subprocess.run(
        [sys.executable, "-W", "error", "-c", PLAIN, tmp_path / "out", tmp_path / "read.npz"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert plain.returncode == 0, plain.stderr
    read, data = np.load(tmp_path / "read.npz"), ma.load_dataset("digits")
    for part in ("train", "test"):
        np.testing.assert_array_equal(read[f"x_{part}"], getattr(data, f"{part}_images"))
        np.testing.assert_array_equal(read[f"y_{part}"], getattr(data, f"{part}_labels"))
    assert tuple(read["names"].tolist()) == data.class_names


def test_a_folder_of_photos_is_resized_once(tmp_path, capsys):
    for i in range(20):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3)).astype(np.uint8)).save(path)
    source = f"folder:{tmp_path}/photos"
    options = ("--data", source, "--image-size", 8, "--seed", 2, "--test-fraction", 0.4, "--out", tmp_path / "out")
    run(*options)
    data = ma.load_dataset(source, image_size=8, seed=2, test_fraction=0.4)
    again = ma.load_dataset(f"prepared:{tmp_path}/out")
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(again, field), getattr(data, field))
    assert again.class_names == ("cat", "dog")
    capsys.readouterr()
    run(*options)
    assert capsys.readouterr().out.startswith(f"Already complete: {tmp_path}/out\n12 train images in 1 file(s)")


def test_an_archive_of_float_images(tmp_path):
    x = np.random.default_rng(0).standard_normal((9, 5, 4, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(9) % 3, x_test=x[:4], y_test=np.arange(4) % 3)
    run("--data", f"npz:{tmp_path}/a.npz", "--shards", 2, "--out", tmp_path / "out")
    again = ma.load_dataset(f"prepared:{tmp_path}/out")
    assert again.train_images.dtype == np.float32
    np.testing.assert_array_equal(again.train_images, x)


def test_the_default_folder_names_data_and_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--image-size", 4)
    assert json.loads((tmp_path / "runs" / "prepared-digits-4" / "preparation.json").read_text())["name"] == "digits"
    assert capsys.readouterr().out.endswith("Use it with: --data prepared:runs/prepared-digits-4\n")


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--data", "digit"), "error: unknown data set 'digit', did you mean 'digits'"),
        (("--shards", 400), "error: --shards 400: give 1 to 359"),
        (("--image-size", 0), "error: image_size 0"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        run(*argv, "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith(message) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
