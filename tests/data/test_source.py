from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mae_align.data import load_dataset, open_source, open_splits, source
from mae_align.data.dataset import ImageDataset
from mae_align.data.source import ArraySource, SubsetSource, dataset_splits, in_memory, split_off_test
from mae_align.runtime.errors import InputError

NAMES = ("cat", "dog")


def arrays(n: int = 7) -> ArraySource:
    x = np.random.default_rng(0).integers(0, 256, (n, 4, 3, 2)).astype(np.uint8)
    return ArraySource(x, np.arange(n) % 2, NAMES, "pets")


def test_an_array_source_is_a_sequence_of_its_images():
    pets = arrays()
    assert (len(pets), pets.image_shape, pets.pixel_dtype, pets.num_classes) == (7, (4, 3, 2), np.uint8, 2)
    pairs = list(pets)
    np.testing.assert_array_equal([image for image, _ in pairs], pets.images)
    assert [label for _, label in pairs] == pets.labels().tolist() and type(pairs[0][1]) is int
    images, labels = pets.take(np.array([6, 0, 6]))
    np.testing.assert_array_equal(images, pets.images[[6, 0, 6]])
    assert labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("i", [-1, 7])
def test_positions_outside_are_refused(i):
    subset = SubsetSource(arrays(9), np.arange(7), "some")
    for pets in (arrays(), subset):
        with pytest.raises(IndexError):
            pets[i]
        with pytest.raises(IndexError):
            pets.take(np.array([0, i]))


def test_a_subset_keeps_its_order():
    whole, index = arrays(), np.array([5, 2, 2])
    subset = SubsetSource(whole, index, "some")
    assert (len(subset), subset.image_shape, subset.pixel_dtype) == (3, whole.image_shape, np.uint8)
    assert subset.class_names == NAMES and not subset.in_memory
    images, labels = subset.take(np.array([2, 0]))
    np.testing.assert_array_equal(images, whole.images[[2, 5]])
    assert labels.tolist() == [0, 1] and subset.labels().tolist() == [1, 0, 0]


def test_fingerprints_tell_pixels_labels_and_positions_apart():
    pets = arrays()
    other_pixel, other_label = pets.images.copy(), pets.label_array.copy()
    other_pixel[3, 1, 1, 1] ^= 1
    other_label[6] = 1
    found = {
        pets.fingerprint(),
        ArraySource(other_pixel, pets.label_array, NAMES, "pets").fingerprint(),
        ArraySource(pets.images, other_label, NAMES, "pets").fingerprint(),
        ArraySource(pets.images.reshape(7, 3, 4, 2), pets.label_array, NAMES, "pets").fingerprint(),
        SubsetSource(pets, np.array([0, 1]), "a").fingerprint(),
        SubsetSource(pets, np.array([1, 0]), "a").fingerprint(),
    }
    assert len(found) == 6
    assert arrays().fingerprint() == pets.fingerprint()


def test_split_off_is_stratified_and_whole():
    pets = ArraySource(np.zeros((40, 2, 2, 1), np.uint8), np.repeat([0, 1], [30, 10]), NAMES, "pets")
    train, test = split_off_test(pets, 0.2, 3, "named")[:2]
    assert np.bincount(test.labels()).tolist() == [6, 2] and train.name == test.name == "named"
    assert isinstance(train, SubsetSource) and isinstance(test, SubsetSource)
    assert sorted([*train.index, *test.index]) == list(range(40))
    lone = ArraySource(np.zeros((5, 2, 2, 1), np.uint8), np.array([0, 0, 0, 0, 1]), NAMES, "pets")
    with pytest.raises(InputError, match=r"\['dog'\] have a single sample"):
        split_off_test(lone, 0.2, 0, "pets")


def test_in_memory_reads_in_order_over_many_batches(monkeypatch, capfd):
    pets = arrays(11)
    subset = SubsetSource(pets, np.arange(11)[::-1], "pets")
    monkeypatch.setattr(source, "BATCH", 3)
    data = in_memory(source.Splits(subset, pets))
    np.testing.assert_array_equal(data.train_images, pets.images[::-1])
    np.testing.assert_array_equal(data.train_labels, pets.label_array[::-1])
    np.testing.assert_array_equal(data.test_images, pets.images)
    assert capfd.readouterr().err == ""


def test_dataset_splits_copy_nothing():
    x, y = np.zeros((4, 2, 2, 1), np.float32), np.array([0, 1, 0, 1])
    data = ImageDataset(x, y, x[:2] + 1, y[:2], NAMES, "pets")
    train, test = dataset_splits(data)[:2]
    assert isinstance(train, ArraySource) and train.images is data.train_images and train.in_memory
    assert isinstance(test, ArraySource) and test.images is data.test_images and test.pixel_dtype == np.float32


@pytest.mark.parametrize("image_size", [None, 3])
def test_an_open_folder_reads_what_a_loaded_one_holds(tmp_path, image_size):
    for i in range(12):
        path = tmp_path / "pets" / NAMES[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 5, 3)).astype(np.uint8)).save(path)
    options = {"image_size": image_size, "seed": 3, "test_fraction": 0.25}
    data = load_dataset(f"folder:{tmp_path}/pets", **options)
    for split in ("train", "test"):
        pets = open_source(f"folder:{tmp_path}/pets", split, **options)
        assert not isinstance(pets, ArraySource) and (pets.name, pets.class_names) == ("pets", NAMES)
        images, labels = pets.take(np.arange(len(pets)))
        np.testing.assert_array_equal(images, getattr(data, f"{split}_images"))
        np.testing.assert_array_equal(labels, getattr(data, f"{split}_labels"))
        np.testing.assert_array_equal(labels, pets.labels())
        again = open_source(f"folder:{tmp_path}/pets", split, **options)
        assert again.fingerprint() == pets.fingerprint()


def test_a_file_that_changes_under_way_is_noticed(tmp_path):
    for i in range(4):
        path = tmp_path / NAMES[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(path)
    pets = open_source(f"folder:{tmp_path}", "train")
    before = pets.fingerprint()
    for path in tmp_path.glob("*/*.png"):
        Image.new("L", (5, 4)).save(path)
    assert pets.fingerprint() != before
    with pytest.raises(InputError, match="has another size than its header said"):
        pets[0]


def test_open_source_of_data_in_memory():
    data = load_dataset("digits", seed=5, image_size=4)
    splits = open_splits("digits", seed=5, image_size=4)
    np.testing.assert_array_equal(splits.test.take(np.arange(359))[0], data.test_images)
    np.testing.assert_array_equal(open_source("digits", "train", seed=5).labels(), data.train_labels)


def test_open_source_refuses_other_splits_and_names():
    with pytest.raises(InputError, match=r"split 'val': give train, validation or test"):
        open_source("digits", "val")
    with pytest.raises(InputError, match="unknown data set 'digit', did you mean 'digits'"):
        open_source("digit", "train")
