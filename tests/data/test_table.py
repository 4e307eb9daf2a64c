"""Tables of image files: files, classes, numbers, attributes and parts, or one line that says what to write."""

from __future__ import annotations

import csv
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import mae_align as ma
from mae_align.data import open_splits
from mae_align.runtime.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 4, 6), dtype=np.uint8)


@pytest.fixture
def write(tmp_path):
    """Writes twelve pictures and a table of them with pandas; gives the table's name."""

    def write(columns, *, folder=".", file=lambda i: f"{i:02}.png", name="table.csv"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for i, pixels in enumerate(PIXELS):
            Image.fromarray(pixels).save(tmp_path / folder / f"{i:02}.png")
        frame = pd.DataFrame({"id": [file(i) for i in range(12)], **columns})
        frame.to_csv(tmp_path / name, index=False, sep="\t" if name.endswith(".tsv") else ",")
        return f"table:{tmp_path / name}"

    return write


def rows(images):
    """Which of the pictures images are."""
    return [int(np.flatnonzero((image[..., 0] == PIXELS).all((1, 2)))[0]) for image in images]


PARTS = ["train"] * 6 + ["valid"] * 2 + ["TEST"] * 4


def test_numbers_and_parts_are_read(write):
    ages, heights = np.linspace(1.5, 70, 12), np.linspace(0.4, 2, 12)
    data = ma.load_dataset(write({"age": ages, "height": heights, "split": PARTS}))
    assert data.class_names == ("age", "height") and data.num_classes is None
    assert {part: rows(images) for part, (images, _) in data.parts.items()} == {
        "train": [*range(6)],
        "validation": [6, 7],
        "test": [*range(8, 12)],
    }
    for images, labels in data.parts.values():
        np.testing.assert_allclose(labels, np.stack([ages, heights], 1)[rows(images)], rtol=1e-12)
    assert data.notes == ("column id names the images", "age, height: numbers", "column split says the part")


def test_attributes_in_the_way_of_celeba(write):
    """-1 and 1, several at once, a column of partitions, names of files with their folder elsewhere."""
    signs = np.where(np.random.default_rng(1).random((12, 3)) < 0.5, -1, 1)
    signs[0] = -1, 1, 1
    columns = {name: signs[:, i] for i, name in enumerate(("Bald", "Male", "Young"))}
    label = write({**columns, "partition": [0] * 7 + [1] * 2 + [2] * 3}, folder="img_align_celeba")
    data = ma.load_dataset(f"{label}:images=img_align_celeba")
    assert [len(labels) for _, labels in data.parts.values()] == [7, 3, 2]
    np.testing.assert_array_equal(data.train_labels, (signs[:7] + 1) / 2)
    assert repr(data).startswith(
        "ImageDataset('table', train 7, test 3, validation 2, image 4x6x1 uint8, 3 attributes;"
    )


@pytest.mark.parametrize("name", ["label", "breed"])
def test_classes_in_the_way_of_kaggle(write, name):
    """Identifiers without a suffix, text or numbered classes, tab-separated; the images are split by class."""
    species = ["cat", "dog", "owl"] if name == "breed" else [3, 7, 12]
    values = [species[i % 3] for i in range(12)]
    data = ma.load_dataset(write({name: values}, file=lambda i: f"{i:02}", name="labels.tsv"))
    assert data.class_names == tuple(map(str, species)) and data.num_classes == 3
    assert [len(labels) for _, labels in data.parts.values()] == [9, 3]
    for images, labels in data.parts.values():
        assert labels.tolist() == [i % 3 for i in rows(images)]


def test_what_is_not_certain_can_be_said(write):
    label = write({"age": np.arange(12), "sex": ["f", "m"] * 6, "fold": PARTS, "split": ["a"] * 12})
    data = ma.load_dataset(f"{label}:targets=age:part=fold")
    assert data.class_names == ("age",) and data.train_labels.tolist() == [[i] for i in range(6)]
    assert data.notes[-1] == "passed over: sex, split"
    data = ma.load_dataset(f"{label}:classes=sex:part=fold:image=id", image_size=(2, 3))
    assert data.class_names == ("f", "m") and data.image_shape == (2, 3, 1)
    assert data.train_labels.tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("columns", "choices", "message"),
    [
        (
            {"age": np.arange(12)},
            "",
            "age holds whole numbers, which may be classes or numbers: write table:FILE.csv:cl",
        ),
        ({"age": np.linspace(0, 1, 12), "sex": ["f", "m"] * 6}, "", r"in several ways \(columns age, sex\)"),
        ({"age": [*np.linspace(0.1, 1, 11), np.nan]}, "", r"age is empty in row\(s\) 12: fill it in"),
        ({"age": ["old"] * 11 + [""]}, "", r"age is empty in row\(s\) 12"),
        ({"age": ["old"] * 12}, ":targets=age", "age does not hold numbers alone: write table:FILE.csv:classes=age"),
        ({"age": np.linspace(0, 1, 12)}, ":targets=size", "has no column 'size': it has id, age"),
        ({"age": np.linspace(0, 1, 12)}, ":target=age", "'target=age' in .*: write table:FILE.csv, with image="),
        ({"a": [0, 1] * 6, "b": [0, 1] * 6}, ":classes=a,b", "give classes=COLUMN, or targets=COLUMN,COLUMN"),
        ({"a": [0, 1] * 6, "b": [0, 1] * 6}, ":classes=a:targets=b", "give classes=COLUMN, or targets"),
        ({"age": np.full(12, 0.5)}, "", "the same for all training images: there is nothing to learn"),
        ({"age": np.linspace(0, 1, 12), "split": ["a"] * 12}, "", "row 1 of .*: split is 'a', which names no part"),
        ({"age": np.linspace(0, 1, 12), "split": ["test"] * 12}, "", "column split of .* has no row for training"),
        (
            {"age": np.linspace(0, 1, 12), "set": PARTS, "split": PARTS},
            "",
            "has set and split: write which says the part",
        ),
        ({"label": ["a"] * 12}, "", r"1 class name\(s\), and a task needs"),
        ({"age": [*np.linspace(0, 1, 11), np.inf]}, "", r"age is no number in row\(s\) 12: leave these images out"),
        (
            {"age": [*map(str, np.linspace(0, 1, 11)), "unknown"]},
            "",
            r"age holds 'unknown' among numbers: write an empty",
        ),
        ({"age": ["0,5", "1,5"] * 6}, "", r"age holds '0,5' among numbers: .* a point before decimals"),
        (
            {"label": [0, 1, -1] * 4},
            "",
            "label: train labels hold -1: labels must be >= 0; drop images without a label",
        ),
        ({"label": ["a", "b"] * 5 + ["c", "c"], "split": PARTS}, "", r"hold \['c'\], which no training image has"),
        ({"label": ["a", "b"] * 6, "fold": [0, 1, 2] * 4}, "", r"in several ways \(columns label, fold\)"),
    ],
)
def test_what_cannot_be_read_is_one_line(write, columns, choices, message):
    with pytest.raises(InputError, match=message) as error:
        ma.load_dataset(write(columns) + choices)
    assert "\n" not in str(error.value)


def test_row_numbers_are_no_file_names_and_no_targets(write):
    """Of pandas, with a name and without; the pictures here are called like them."""
    label = write({"": np.arange(12), "breed": ["cat", "owl"] * 6}, file=lambda i: f"{i:02}.png")
    assert ma.load_dataset(label).class_names == ("cat", "owl")
    data = ma.load_dataset(
        write({"number": [f"{i:02}" for i in range(12)], "age": np.linspace(0.5, 1, 12)}) + ":targets=age"
    )
    assert data.class_names == ("age",) and data.notes[0] == "column id names the images"


def test_missing_and_repeated_images_are_named(write):
    label = write({"age": np.linspace(0, 1, 12)}, file=lambda i: f"{i % 11:02}.png")
    with pytest.raises(InputError, match=r"names 00.png in several rows"):
        open_splits(label)
    with pytest.raises(InputError, match=r"row 12 of .*: no image '12.png'"):
        open_splits(write({"age": np.linspace(0, 1, 12)}, file=lambda i: f"{i + (i == 11):02}.png"))
    with pytest.raises(InputError, match="no column names image files"):
        open_splits(write({"age": np.linspace(0, 1, 12)}, file=lambda i: f"picture {i}"))
    with pytest.raises(InputError, match="several columns name image files"):
        open_splits(write({"age": np.linspace(0, 1, 12), "copy": [f"{i:02}.png" for i in range(12)]}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has 0 row\(s\) and 0 column"),
        ("id;age\n1.png;2\n", "separates its columns by ';': write commas"),
        ("id,age\n", r"has 0 row\(s\) and 2 column"),
        ("id,age,age\n1,2,3\n", "two columns of one name"),
        ("id,age\n1,2,3\n", "row 1 of .* has 3 cells for 2 columns"),
        ("id,age\n\xff,2\n", "cannot be read as a table"),
    ],
)
def test_damaged_tables_are_one_line(tmp_path, text, message):
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        open_splits(f"table:{tmp_path / 'x.csv'}")
    with pytest.raises(InputError, match=re.escape(f"did you mean 'table:{tmp_path / 'x.csv'}'")):
        open_splits(str(tmp_path / "x.csv"))


def test_quoted_cells_and_byte_order_marks_are_read(tmp_path):
    for i, pixels in enumerate(PIXELS[:4]):
        Image.fromarray(pixels).save(tmp_path / f"a, {i}.png")
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["image", "size, cm"], *([f"a, {i}.png", 1.5 * i] for i in range(4))])
    splits = open_splits(f"table:{tmp_path / 'x.csv'}", test_fraction=0.5)
    assert splits.train.class_names == ("size, cm",) and len(splits.train) == len(splits.test) == 2
    image, label = splits.train[1]
    assert isinstance(label, np.ndarray) and label.tolist() == [1.5 * rows([image])[0]]
