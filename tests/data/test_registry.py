from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mae_align.data import load_dataset
from mae_align.runtime.errors import InputError


@pytest.fixture
def archive(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    y = np.array([0, 1, 2] * 2)
    np.savez(tmp_path / "toy.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    return tmp_path / "toy.npz"


def test_options_reach_the_split():
    data = load_dataset("digits", seed=7, test_fraction=0.5)
    assert abs(len(data.test_labels) - 1797 / 2) < 10
    again = load_dataset("digits", seed=7, test_fraction=0.5)
    np.testing.assert_array_equal(data.test_images, again.test_images)
    assert not np.array_equal(
        data.test_images[:800], load_dataset("digits", seed=8, test_fraction=0.5).test_images[:800]
    )


def test_paths_with_colons_and_home(archive, monkeypatch):
    monkeypatch.setenv("HOME", str(archive.parent))
    assert load_dataset("npz:~/toy.npz").name == "toy"
    archive.rename(archive.parent / "a:b.npz")
    assert load_dataset(f"npz:{archive.parent}/a:b.npz").name == "a:b"


def test_images_are_resized_only_on_request(archive):
    assert load_dataset(f"npz:{archive}").image_shape == (8, 8, 3)
    assert load_dataset(f"npz:{archive}", image_size=4).image_shape == (4, 4, 3)
    assert load_dataset("digits", image_size=16).train_images.dtype == np.uint8


def test_folder_gets_all_options(tmp_path):
    for i in range(8):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (5 + i, 6), 10 * i).save(path)
    data = load_dataset(f"folder:{tmp_path}", image_size=3, seed=1, test_fraction=0.5)
    assert data.image_shape == (3, 3, 1) and len(data.test_labels) == 4


@pytest.mark.parametrize(
    "name, message",
    [
        ("digit", "'digit', did you mean 'digits'"),
        ("Digits", "did you mean 'digits'"),
        ("nzp:/a/b.npz", "did you mean 'npz:/a/b.npz'"),
        ("folders:/a", "did you mean 'folder:/a'"),
        ("/a/b.npz", "did you mean 'npz:/a/b.npz'"),
        ("tensorflow:mnist", "unknown data set 'tensorflow:mnist'; give one of"),
        ("tdfs:mnist", "did you mean 'tfds:mnist'"),
        ("tfds:", r"'tfds:' lacks its name: write tfds:NAME\[/CONFIG\]"),
        ("prepared", "'prepared' lacks its path: write prepared:DIR"),
        ("", "unknown data set ''; give one of"),
        ("mnist", "unknown data set 'mnist'; give one of"),
        ("npz", "'npz' lacks its path: write npz:FILE"),
        ("folder:", "'folder:' lacks its path: write folder:DIR"),
        ("digits:8", "digits takes no argument, write digits"),
        ("idx:/nowhere", "no folder /nowhere"),
        ("npz:/nowhere.npz", "no file /nowhere.npz"),
        ("folder:/nowhere", "no folder /nowhere"),
    ],
)
def test_unknown_names_are_helped(name, message):
    with pytest.raises(InputError, match=message):
        load_dataset(name)


def test_unknown_name_lists_all_schemes():
    with pytest.raises(
        InputError,
        match=r"one of: digits, idx:DIR, npz:FILE, folder:DIR, table:FILE.csv, images:DIR, parquet:PATH, "
        r"webdataset:PATH, cifar:DIR, stl10:DIR, svhn:DIR, tfds:NAME\[/CONFIG\], "
        r"prepared:DIR$",
    ):
        load_dataset("mnist")


def test_existing_folders_are_recognised(tmp_path):
    with pytest.raises(InputError, match=f"did you mean 'folder:{tmp_path}'"):
        load_dataset(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    with pytest.raises(InputError, match=f"did you mean 'idx:{tmp_path}'"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 0}, "image_size 0: give one side"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"test_fraction": 1.0}, "fraction 1.0 must lie between"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        load_dataset("digits", **options)
