from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image
from tensorflow_datasets.core import constants
from tfds_sets import NO_TENSORFLOW, encoded, pixels, write_pets, write_set

import mae_align as ma
from mae_align.data import load_dataset, open_source
from mae_align.data.resize import resize_images
from mae_align.runtime.errors import InputError

tfds: Any = tensorflow_datasets  # its types are those of TensorFlow
LABEL = tfds.features.ClassLabel(names=["cat", "dog"])


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An empty folder as that of TFDS."""
    monkeypatch.setattr(constants, "DATA_DIR", os.fspath(tmp_path / "tfds"))
    return tmp_path / "tfds"


def refused(name: str, **options) -> str:
    with pytest.raises(InputError) as caught:
        load_dataset(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100), ("svhn_cropped", 10)])
def test_sets_of_the_catalogue_load_through_mock_data(name, classes):
    with tfds.testing.mock_data(num_examples=5):
        data = load_dataset(f"tfds:{name}")
        expected = [tfds.data_source(name, split="train")[i] for i in range(5)]
    assert (data.name, data.image_shape, data.num_classes) == (name, (32, 32, 3), classes)
    np.testing.assert_array_equal(data.train_images, [example["image"] for example in expected])
    assert data.train_labels.tolist() == [example["label"] for example in expected]


def test_configs_and_mixed_sizes_through_mock_data():
    with tfds.testing.mock_data(num_examples=4):
        data = load_dataset("tfds:imagenette/160px", image_size=8)
        raw = tfds.data_source("imagenette/160px", split="train")
        assert len({example["image"].shape for example in raw}) > 1
        np.testing.assert_array_equal(data.train_images[2], resize_images(raw[2]["image"][None], 8)[0])
        assert refused("tfds:imagenette/160px") == (
            "images of 'imagenette/160px' differ in size: pass image_size to resize all images to one size"
        )
    assert data.image_shape == (8, 8, 3) and data.name == "imagenette/160px"


def test_a_real_set_is_read_by_its_name(data_dir):
    """The builder is that of TFDS, the files are ours."""
    features = {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    images = [pixels(i, (28, 28)) for i in range(7)]
    examples = [{"image": encoded(image), "label": i} for i, image in enumerate(images)]
    splits = {"train": examples, "test": examples[5:]}
    write_set(data_dir / "mnist" / "3.0.1", features, splits, name="mnist", version="3.0.1")
    data = load_dataset("tfds:mnist")
    assert data.name == "mnist" and data.class_names == tuple("0123456789")
    np.testing.assert_array_equal(data.train_images[..., 0], images)
    np.testing.assert_array_equal(data.test_images[..., 0], images[5:])
    assert data.train_labels.tolist() == list(range(7)) and data.test_labels.tolist() == [5, 6]
    source = open_source("tfds:mnist:3.0.1", "test", image_size=14)
    np.testing.assert_array_equal(source[1][0], resize_images(images[6][None, ..., None], 14)[0])
    assert source.labels().tolist() == [5, 6]


def test_a_set_without_code_is_read_by_its_name(data_dir):
    write_pets(data_dir / "pets" / "1.0.0", {"train": 4, "test": 2})
    assert load_dataset("tfds:pets").class_names == ("cat", "dog")


def test_no_python_warning_and_no_log_line_reaches_the_user(data_dir, capfd, caplog):
    write_pets(data_dir / "pets" / "1.0.0", {"train": 4, "test": 2})
    load_dataset("tfds:pets")
    refused("tfds:cifar10")
    refused("tfds:nosuchset")
    assert capfd.readouterr().err == "" and not caplog.records


def test_prepared_folder(tmp_path):
    path = write_pets(tmp_path / "a b", {"train": 4, "test": 2})
    data = load_dataset(f"prepared:{path}")
    assert repr(data) == "ImageDataset('pets', train 4, test 2, image 6x5x3 uint8, 2 classes)"
    np.testing.assert_array_equal(data.test_images, [pixels(100), pixels(101)])
    with pytest.raises(InputError, match=f"did you mean 'prepared:{path}'"):
        load_dataset(os.fspath(path))
    assert refused(f"tfds:{path}") == f"'{path}' is a folder, not a name of TFDS: did you mean 'prepared:{path}'?"


def test_the_test_split_goes_before_validation(tmp_path):
    data = load_dataset(f"prepared:{write_pets(tmp_path / 'a', {'train': 6, 'validation': 4, 'test': 2})}")
    assert data.name == "pets" and len(data.test_labels) == 2


@pytest.mark.parametrize("sizes, label", [({"train": 6, "validation": 4}, None)])
def test_validation_stands_in_and_says_so(tmp_path, sizes, label):
    path = write_pets(tmp_path / "a", sizes, label=label)
    data = load_dataset(f"prepared:{path}")
    assert data.name == "pets (test: validation)"
    np.testing.assert_array_equal(data.test_images, [pixels(100 + i) for i in range(4)])
    assert open_source(f"prepared:{path}", "test").name == data.name


def test_withheld_test_labels_are_not_used(tmp_path):
    features = {"image": tfds.features.Image(shape=(6, 5, 3)), "label": LABEL}
    train, test, validation = (
        [{"image": encoded(pixels(k + i)), "label": -1 if k == 10 else i % 2} for i in range(4)] for k in (0, 10, 20)
    )
    path = write_set(tmp_path / "a", features, {"train": train, "test": test, "validation": validation})
    data = load_dataset(f"prepared:{path}")
    assert data.name == "pets (test: validation)"
    np.testing.assert_array_equal(data.test_images[0], pixels(20))
    path = write_set(tmp_path / "b", features, {"train": train, "test": test})
    assert load_dataset(f"prepared:{path}", test_fraction=0.5).name == "pets (test: 50% of train)"


def test_without_a_held_out_split_a_share_of_train_is_split_off(tmp_path):
    path = write_pets(tmp_path / "a", {"train": 20})
    data = load_dataset(f"prepared:{path}", seed=4, test_fraction=0.3)
    assert data.name == "pets (test: 30% of train)"
    assert np.bincount(data.test_labels).tolist() == [3, 3] and len(data.train_labels) == 14
    found = {image.tobytes() for image in (*data.train_images, *data.test_images)}
    assert found == {pixels(i).tobytes() for i in range(20)}
    test = open_source(f"prepared:{path}", "test", seed=4, test_fraction=0.3)
    np.testing.assert_array_equal(test.take(np.arange(6))[0], data.test_images)


def test_no_train_split(tmp_path):
    path = write_pets(tmp_path / "a", {"test": 4, "extra": 4})
    assert refused(f"prepared:{path}") == (
        "'pets' has no split 'train' (it has extra, test): prepare one with that name"
    )


def test_pictures_of_all_modes_become_the_declared_channels(tmp_path):
    """TFDS without TensorFlow returns grey images [h, w], palettes as numbers, and alpha."""
    grey = Image.fromarray(pixels(1, (6, 5)))
    palette = Image.new("P", (5, 6), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    alpha = Image.fromarray(pixels(2, (6, 5, 4)))
    pictures = [Image.fromarray(pixels(0)), grey, palette, alpha]
    features = {"image": tfds.features.Image(shape=(6, 5, 3)), "label": LABEL}
    examples = [{"image": encoded(picture), "label": i % 2} for i, picture in enumerate(pictures)]
    examples.append({"image": encoded(Image.new("CMYK", (5, 6)), "jpeg"), "label": 0})
    path = write_set(tmp_path / "a", features, {"train": examples, "test": examples})
    images = load_dataset(f"prepared:{path}").train_images
    np.testing.assert_array_equal(images[0], pixels(0))
    np.testing.assert_array_equal(images[1], np.repeat(pixels(1, (6, 5))[..., None], 3, axis=2))
    assert (images[2] == [10, 20, 30]).all()
    np.testing.assert_array_equal(images[3], pixels(2, (6, 5, 4))[..., :3])
    assert images.shape[0] == 5


def test_sizes_that_differ_from_the_declared_ones_are_named(tmp_path):
    features = {"image": tfds.features.Image(shape=(6, 5, 3)), "label": LABEL}
    examples = [{"image": encoded(pixels(i, (6, 5 + (i == 2), 3))), "label": i % 2} for i in range(4)]
    path = write_set(tmp_path / "a", features, {"train": examples, "test": examples})
    assert "image 2 of 'pets' has shape [6, 6, 3], not [6, 5, 3]: pass image_size" in refused(f"prepared:{path}")
    assert load_dataset(f"prepared:{path}", image_size=4).image_shape == (4, 4, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_tensors_are_read_bit_for_bit(tmp_path, dtype):
    arrays = [np.random.default_rng(i).normal(100, 9, (4, 3, 2)).astype(dtype) for i in range(4)]
    features = {"x": tfds.features.Tensor(shape=(4, 3, 2), dtype=dtype, encoding="bytes"), "y": LABEL}
    examples = [{"x": array, "y": i % 2} for i, array in enumerate(arrays)]
    data = load_dataset(f"prepared:{write_set(tmp_path / 'a', features, {'train': examples, 'test': examples})}")
    assert data.train_images.dtype == dtype
    np.testing.assert_array_equal(data.train_images, arrays)


def test_which_label_and_which_image(tmp_path):
    image, mask = tfds.features.Image(shape=(6, 5, 3)), tfds.features.Image(shape=(6, 5, 1))
    coarse = tfds.features.ClassLabel(names=["a", "b", "c"])
    features = {"coarse_label": coarse, "label": LABEL, "mask": mask, "photo": image}
    examples = [
        {"photo": encoded(pixels(i)), "mask": b"never decoded", "label": i % 2, "coarse_label": 2 - i % 3}
        for i in range(6)
    ]
    splits = {"train": examples, "test": examples}
    named = write_set(tmp_path / "a", features, splits, supervised_keys=("photo", "coarse_label"))
    data = load_dataset(f"prepared:{named}")
    assert data.class_names == ("a", "b", "c") and data.train_labels.tolist() == [2, 1, 0] * 2
    np.testing.assert_array_equal(data.train_images[1], pixels(1))
    unnamed = write_set(tmp_path / "b", features, splits)
    assert refused(f"prepared:{unnamed}") == (
        "'pets' has several features of kind image (mask, photo): choose another set"
    )
    del features["mask"]
    one = write_set(
        tmp_path / "c", features, {s: [{k: v for k, v in e.items() if k != "mask"} for e in examples] for s in splits}
    )
    assert load_dataset(f"prepared:{one}").class_names == ("cat", "dog")  # the one called label


@pytest.mark.parametrize(
    "features, message",
    [
        ({"image": tfds.features.Image(shape=(6, 5, 3))}, "has no class label"),
        ({"label": LABEL}, "has no image"),
        ({"image": tfds.features.Image(shape=(6, 5, 1), dtype=np.uint16), "label": LABEL}, "are uint16: only uint8"),
        ({"image": tfds.features.Tensor(shape=(6, 5, 3), dtype=np.int64), "label": LABEL}, "are int64: only uint8"),
    ],
)
def test_sets_without_labelled_images_are_refused(tmp_path, features, message):
    everything = {"image": encoded(pixels(0)), "label": 0}
    if isinstance(features.get("image"), tfds.features.Tensor) and not hasattr(features["image"], "encoding_format"):
        everything["image"] = np.zeros((6, 5, 3), np.int64)
    examples = [{key: everything[key] for key in features}]
    path = write_set(tmp_path / "a", features, {"train": examples, "test": examples})
    assert message in refused(f"prepared:{path}")


def test_unprepared_sets_say_how_to_prepare_them(data_dir):
    message = refused("tfds:cifar10")
    assert message.startswith(
        f"'cifar10' is not prepared in {data_dir}/cifar10/3.0.2: on a machine with TensorFlow run "
    )
    command = (
        """python -c "import tensorflow_datasets as tfds; """
        """tfds.builder('cifar10').download_and_prepare(file_format='array_record')" """
    )
    assert command in message and "TFDS_DATA_DIR" in message
    assert "write_prepared(mae_align.data.open_splits('folder:DIR'), 'DIR2'), then prepared:DIR2" in message
    assert "tfds.builder('imagenette/160px')" in refused("tfds:imagenette/160px", image_size=8)


@pytest.mark.parametrize(
    "name, message",
    [
        ("cifar", "TFDS has no data set 'cifar', did you mean 'tfds:cifar10'?"),
        ("zzzzzzzz", "TFDS has no data set 'zzzzzzzz'; from your own files"),
        ("imagenette/huge", "TFDS has no 'huge' of 'imagenette': it has full-size-v2,"),
        ("cifar10/small", "TFDS has no 'small' of 'cifar10': it has none"),
        ("cifar10:9.9.9", "TFDS cannot open 'cifar10:9.9.9'"),
        ("a b", "TFDS has no data set 'a b'"),
    ],
)
def test_unknown_names_are_helped(data_dir, name, message):
    assert message in refused(f"tfds:{name}")


def test_tfrecord_sets_say_how_to_convert_them(tmp_path):
    path = write_pets(tmp_path / "a", {"train": 4, "test": 2})
    info = json.loads((path / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    info["fileFormat"] = "tfrecord"
    (path / "dataset_info.json").write_text(json.dumps(info))
    message = refused(f"prepared:{path}")
    assert "is prepared in" in message and "as tfrecord, which only TensorFlow reads" in message
    assert f"tfds convert_format --dataset_version_dir={path} --out_file_format=array_record" in message


def test_missing_and_unfinished_folders(tmp_path):
    message = refused(f"prepared:{tmp_path}/nowhere")
    assert message.startswith(
        f"no prepared data set in {tmp_path}/nowhere (no dataset_info.json): prepare it with mae_align.data.prepare"
    )
    (tmp_path / "half.incomplete").mkdir()
    assert f"{tmp_path}/half.incomplete is unfinished, the same command goes on" in refused(f"prepared:{tmp_path}/half")
    (tmp_path / "dataset_info.json").write_text("{")
    assert f"cannot open {tmp_path} (" in refused(f"prepared:{tmp_path}")


@pytest.mark.parametrize("damage", ["missing", "cut", "picture"])
def test_damaged_files_are_one_line(tmp_path, damage):
    path = write_pets(tmp_path / "a", {"train": 40, "test": 2})
    file = path / "pets-train.array_record-00000-of-00001"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        features = {"image": tfds.features.Image(shape=(6, 5, 3)), "label": LABEL}
        write_set(tmp_path / "b", features, {"train": [{"image": b"junk", "label": 0}] * 40})
        (tmp_path / "b" / file.name).replace(file)
    assert "prepare the data set again" in refused(f"prepared:{path}")


def test_deep_pictures_are_refused_not_clipped(tmp_path):
    features = {"image": tfds.features.Image(shape=(6, 5, 1)), "label": LABEL}
    deep = encoded(Image.fromarray(np.full((6, 5), 300, np.uint16)))
    path = write_set(tmp_path / "a", features, {"train": [{"image": deep, "label": 0}] * 2})
    assert "has more than 8 bits per channel" in refused(f"prepared:{path}")


def test_sources_know_their_shape_without_reading(tmp_path):
    path = write_pets(tmp_path / "a", {"train": 4, "test": 2}, shape=(None, None, 3))
    source = open_source(f"prepared:{path}", "train", image_size=4)
    assert (source.image_shape, source.pixel_dtype, len(source), source.in_memory) == ((4, 4, 3), np.uint8, 4, False)
    with pytest.raises(IndexError):
        source[4]
    assert len(list(source)) == 4
    other = open_source(f"prepared:{path}", "train", image_size=5)
    assert other.fingerprint() != source.fingerprint()


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tensorflow_datasets":
            raise ModuleNotFoundError("No module named 'tensorflow_datasets'", name=name)
        return real(name, *args, **kwargs)

    path = write_pets(tmp_path / "a", {"train": 2, "test": 2})
    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("tfds:cifar10", f"prepared:{path}"):
        assert refused(name) == (
            "tfds: and prepared: need TensorFlow Datasets (tensorflow_datasets is not installed): "
            "pip install -e '.[tfds]'"
        )


def test_the_environment_says_where_sets_are(tmp_path):
    """In a fresh process without TensorFlow, installed or not."""
    write_pets(tmp_path / "pets" / "1.0.0", {"train": 4, "test": 2})
    code = NO_TENSORFLOW + "import mae_align as ma; print(ma.load_dataset('tfds:pets'))"
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TFDS_DATA_DIR": os.fspath(tmp_path)},
        cwd=Path(ma.__file__).parents[1],
    )
    assert (out.returncode, out.stderr) == (0, "")
    assert out.stdout == "ImageDataset('pets', train 4, test 2, image 6x5x3 uint8, 2 classes)\n"
