"""Images in Parquet and tar files, written by the libraries that own the formats where these are installed."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mae_align as ma
from mae_align.data import open_splits
from mae_align.runtime.errors import InputError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 5, 7, 3), dtype=np.uint8)
NAMES = ["cat", "dog", "owl"]


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rows_of(images):
    return [int(np.flatnonzero((image == PIXELS).all((1, 2, 3)))[0]) for image in images]


def check(data, parts):
    """Every part holds these of the pictures, in this order, each with its own label."""
    assert {part: rows_of(images) for part, (images, _) in data.parts.items()} == parts
    for images, labels in data.parts.values():
        assert labels.tolist() == [row % 3 for row in rows_of(images)]


def table(rows, *, struct=True, metadata=True, label="label"):
    """Rows in the layout of `datasets`, with its metadata."""
    content = [png(PIXELS[i]) for i in rows]
    images = [{"bytes": each, "path": None} for each in content] if struct else content
    found = pa.table({"image": images, label: [i % 3 for i in rows], "extra": ["x"] * len(rows)})
    features = {"image": {"_type": "Image"}, label: {"_type": "ClassLabel", "names": NAMES}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return found.replace_schema_metadata(about) if metadata else found


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("metadata", [True, False])
def test_parquet_shards_are_read_in_order(tmp_path, struct, metadata):
    parts = {"train": [*range(14)], "validation": [*range(14, 18)], "test": [*range(18, 24)]}
    (tmp_path / "data").mkdir()
    for part, rows in parts.items():
        half = len(rows) // 2
        for i, some in enumerate((rows[:half], rows[half:])):
            file = tmp_path / "data" / f"{part}-0000{i}-of-00002.parquet"
            pq.write_table(table(some, struct=struct, metadata=metadata), file, row_group_size=3)
    data = ma.load_dataset(f"parquet:{tmp_path}")
    check(data, parts)
    assert data.class_names == (tuple(NAMES) if metadata else ("0", "1", "2"))
    assert data.notes == ("column image holds the images, label the labels", "passed over: extra")
    splits = open_splits(f"parquet:{tmp_path}", image_size=(2, 3))
    images, labels = splits.train.take(np.array([13, 0, 7]))
    assert images.shape == (3, 2, 3, 3) and labels.tolist() == [1, 0, 1]
    assert splits.train.fingerprint() != splits.test.fingerprint()


def test_one_parquet_file_is_split_by_class(tmp_path):
    pq.write_table(table(range(24)), tmp_path / "pets.parquet")
    data = ma.load_dataset(f"parquet:{tmp_path / 'pets.parquet'}", test_fraction=0.25)
    assert [len(labels) for _, labels in data.parts.values()] == [18, 6] and data.name == "pets"
    assert sorted(rows_of(data.train_images) + rows_of(data.test_images)) == [*range(24)]


def test_parquet_columns_can_be_said(tmp_path):
    both = table(range(24)).append_column("fine", pa.array([i / 7 for i in range(24)]))
    pq.write_table(both.append_column("thumbnail", both.column("image")), tmp_path / "x.parquet")
    data = ma.load_dataset(f"parquet:{tmp_path / 'x.parquet'}:image=thumbnail:label=fine")
    assert data.class_names == ("fine",) and data.num_classes is None
    for images, labels in data.parts.values():
        assert labels[:, 0].tolist() == [row / 7 for row in rows_of(images)]


@pytest.mark.parametrize(
    ("change", "choice", "message"),
    [
        (lambda t: t.drop_columns(["label"]), "", "of which 0 may be the labels: write parquet:PATH:label=COLUMN"),
        (lambda t: t.rename_columns(["image", "what", "extra"]), "", "of which 0 may be the labels"),
        (
            lambda t: t.append_column("class", t.column("label")).replace_schema_metadata(None),
            "",
            "which 2 may be the lab",
        ),
        (lambda t: t, ":label=kind", "of which 0 may be the labels"),
        (lambda t: t, ":image=extra", "of which 0 may be the images"),
        (lambda t: t, ":colour=extra", "'colour=extra' in .*: write parquet:PATH"),
        (lambda t: t.drop_columns(["image"]), "", "of which 0 may be the images"),
        (lambda t: t.set_column(1, "label", pa.array([None, *range(23)])), "", r"label of .* is empty in 1 row"),
        (
            lambda t: t.set_column(1, "label", pa.array([-1, *[0, 1] * 11, 1])),
            "",
            r"run from -1 to 1 for 3 classes: leave out",
        ),
        (lambda t: t.set_column(1, "label", pa.array([[0] * (i % 3) for i in range(24)])), "", "lists of 0 or 1 or 2"),
        (lambda t: t.set_column(1, "label", pa.array([{"a": 1}] * 24)), "", "are dict: give whole numbers"),
        (lambda t: t.slice(0, 0), "", "the training part holds no image"),
        (
            lambda t: t.set_column(0, "image", pa.array([{"bytes": None, "path": "a.png"}] * 24)),
            "",
            "has no image in it",
        ),
        (
            lambda t: t.set_column(0, "image", pa.array([{"bytes": b"no", "path": None}] * 24)),
            "",
            "cannot read the image row 0",
        ),
    ],
)
def test_parquet_files_that_do_not_serve_are_one_line(tmp_path, change, choice, message):
    pq.write_table(change(table(range(24))), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=message) as error:
        ma.load_dataset(f"parquet:{tmp_path / 'x.parquet'}{choice}")
    assert "\n" not in str(error.value)


def test_damaged_files_and_unclear_parts_are_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"a.parquet is damaged or no Parquet file"):
        ma.load_dataset(f"parquet:{tmp_path}")
    (tmp_path / "train-0.parquet").touch()
    with pytest.raises(InputError, match=r"a.parquet is of no part, beside files of train: name its part"):
        ma.load_dataset(f"parquet:{tmp_path}")
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "train-0.parquet").rename(tmp_path / "test-0.parquet")
    with pytest.raises(InputError, match="files of test but none for training"):
        ma.load_dataset(f"parquet:{tmp_path}")
    with pytest.raises(InputError, match=r"no .parquet file and holds none"):
        ma.load_dataset(f"parquet:{tmp_path / 'nowhere'}")


def test_mixed_sizes_in_a_file_are_named(tmp_path):
    pq.write_table(
        pa.concat_tables(
            [
                table(range(23)).replace_schema_metadata(None),
                pa.table({"image": [{"bytes": png(PIXELS[0, :4]), "path": None}], "label": [0], "extra": ["x"]}),
            ]
        ),
        tmp_path / "x.parquet",
    )
    with pytest.raises(InputError, match=r"row 23 of .* is 7 x 4 pixels but row 0 of .* is 7 x 5: pass image_size"):
        ma.load_dataset(f"parquet:{tmp_path / 'x.parquet'}")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["pets-train-0.parquet", "pets-val-0.parquet", "pets-test-0.parquet"], ["train", "validation", "test"]),
        (["train_0.parquet", "test_0.parquet"], ["train", "test"]),
        (["train0.parquet", "TEST1.parquet"], ["train", "test"]),
        (["data/train-0.parquet", "data/validation-0.parquet"], ["train", "test"]),
        (["train/a/0.parquet", "eval/a/0.parquet", "testing/a/0.parquet"], ["train", "validation", "test"]),
        (["train.parquet/part-0.parquet", "test.parquet/part-0.parquet"], ["train", "test"]),
        (["train-0.parquet", ".cache/val-0.parquet", "._test-0.parquet"], ["train", "test"]),
        (["dataset.parquet"], ["train", "test"]),
    ],
)
def test_parts_are_known_by_a_word_of_a_name(tmp_path, names, parts):
    rows = np.array_split(np.arange(24), len(names))
    for name, some in zip(names, rows, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(some.tolist()), tmp_path / name)
    data = ma.load_dataset(f"parquet:{tmp_path}")
    assert sorted(data.parts) == sorted(parts)
    if len(names) == len(parts):
        found = rows_of(data.train_images), rows_of(data.test_images)
        assert found == (rows[0].tolist(), rows[-1].tolist())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/test-0.parquet"], "says test and train: rename it"),
        (["train-val-0.parquet"], "says train and validation: rename it"),
        (["a/train-0.parquet", "b/train-0.parquet"], "lie in folders that may be two data sets: give one"),
        (["train-0.parquet", "train-1.parquet.gz"], "train-1.parquet.gz is compressed: unpack the files"),
    ],
)
def test_names_that_say_no_one_part_are_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table(range(24)), tmp_path / name)
    with pytest.raises(InputError, match=message):
        ma.load_dataset(f"parquet:{tmp_path}")


@pytest.mark.parametrize("labels", [[-1] * 6, pa.array([None] * 6, pa.int64()), []])
def test_a_held_out_part_without_labels_is_passed_over(tmp_path, labels):
    pq.write_table(table(range(18)), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(table([]).cast(table([0]).schema), tmp_path / "train-00001-of-00002.parquet")  # an empty file
    pq.write_table(
        table(range(len(labels))).cast(table([0]).schema).set_column(1, "label", [labels]), tmp_path / "test-0.parquet"
    )
    data = ma.load_dataset(f"parquet:{tmp_path}")
    assert len(data.train_labels) + len(data.test_labels) == 18
    assert data.notes[-1] == "the test part is passed over: it has no labels"


def test_files_that_do_not_belong_together_are_refused_or_said(tmp_path):
    pq.write_table(table([0, 1, 3, 4, 6, 7]), tmp_path / "train-00000-of-00003.parquet")
    data = ma.load_dataset(f"parquet:{tmp_path}")
    assert data.notes[0] == "train: 1 of 3 files are there"
    assert data.notes[-1] == "there is no image of owl"
    pq.write_table(table(range(6)), tmp_path / "test-0.parquet")
    with pytest.raises(InputError, match="the test part has owl, of which training has no images"):
        ma.load_dataset(f"parquet:{tmp_path}")
    pq.write_table(table(range(6), metadata=False), tmp_path / "test-0.parquet")
    with pytest.raises(InputError, match="name other classes: give files of one data set"):
        ma.load_dataset(f"parquet:{tmp_path}")


@pytest.mark.parametrize("about", [b"not json", b"[1]", b'{"info": null}'])
def test_what_other_programs_wrote_about_columns_is_passed_over(tmp_path, about):
    found = table(range(24)).replace_schema_metadata({b"huggingface": about})
    pq.write_table(found, tmp_path / "x.parquet")
    assert ma.load_dataset(f"parquet:{tmp_path / 'x.parquet'}").class_names == ("0", "1", "2")


def test_damage_inside_of_a_file_is_one_line(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(table(range(24)), file)
    content = bytearray(file.read_bytes())
    offset = pq.ParquetFile(file).metadata.row_group(0).column(0).data_page_offset
    content[offset : offset + 40] = bytes(40)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x.parquet is damaged or no Parquet file") as error:
        ma.load_dataset(f"parquet:{file}")
    assert "\n" not in str(error.value)


def test_a_choice_of_images_changes_the_fingerprint(tmp_path):
    found = table(range(24))
    file = tmp_path / "x.parquet"
    pq.write_table(found.append_column("other", found.column("image")), file)
    one, two = (open_splits(f"parquet:{file}:image={name}").train.fingerprint() for name in ("image", "other"))
    assert one != two


def test_threads_read_a_group_of_rows_once(tmp_path, monkeypatch):
    pq.write_table(table(range(24)), tmp_path / "x.parquet")
    opened, real = [], pq.ParquetFile

    def slow(path):
        opened.append(path)
        time.sleep(0.05)
        return real(path)

    monkeypatch.setattr(pq, "ParquetFile", slow)
    source = open_splits(f"parquet:{tmp_path / 'x.parquet'}").train
    monkeypatch.setattr("mae_align.data.records._common", lambda *arguments: (source.image_shape, source.pixel_dtype))
    source = open_splits(f"parquet:{tmp_path / 'x.parquet'}").train
    before = len(opened)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.read, range(8)))
    assert len(opened) == before + 1 and all(image.shape == (5, 7, 3) for image, _ in found)


def test_pyarrow_that_is_missing_is_one_line(tmp_path, monkeypatch):
    pq.write_table(table(range(24)), tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"needs pyarrow, which is not installed: pip install -e '\.\[parquet\]'"):
        ma.load_dataset(f"parquet:{tmp_path / 'x.parquet'}")


def test_files_of_the_library_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is in the extra formats")
    coarse = datasets.ClassLabel(names=["small", "large"])
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine": datasets.ClassLabel(names=NAMES),
            "coarse": coarse,
            "id": datasets.Value("int64"),
        }
    )
    files = {}
    for part, rows in (("train", range(16)), ("test", range(16, 24))):
        rows = {
            "img": [Image.fromarray(PIXELS[i]) for i in rows],
            "fine": [i % 3 for i in rows],
            "coarse": [i % 2 for i in rows],
            "id": list(rows),
        }
        whole = datasets.Dataset.from_dict(rows, features=features)
        for i in range(2):  # as push_to_hub lays them out
            file = tmp_path / "data" / f"{part}-{i:05}-of-00002.parquet"
            whole.shard(2, i, contiguous=True).to_parquet(file, batch_size=3)
            files.setdefault(part, []).append(str(file))
    with pytest.raises(InputError, match="of which 2 may be the labels: write parquet:PATH:label=COLUMN"):
        ma.load_dataset(f"parquet:{tmp_path}")
    data = ma.load_dataset(f"parquet:{tmp_path}:label=fine")
    check(data, {"train": [*range(16)], "test": [*range(16, 24)]})
    assert data.class_names == tuple(NAMES)
    assert ma.load_dataset(f"parquet:{tmp_path}:label=coarse").class_names == ("small", "large")
    theirs = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    for part, (images, labels) in data.parts.items():
        np.testing.assert_array_equal(images, np.stack([np.asarray(image) for image in theirs[part]["img"]]))
        assert labels.tolist() == list(theirs[part]["fine"])


def write_tar(path, rows, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in rows:
            for suffix, content in (("png", png(PIXELS[i])), label(i), ("txt", b"caption")):
                member = tarfile.TarInfo(f"{i:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    "label",
    [
        lambda i: ("cls", str(i % 3).encode()),
        lambda i: ("cls", f"{NAMES[i % 3]}\n".encode()),
        lambda i: ("json", json.dumps({"label": i % 3, "id": i}).encode()),
    ],
)
def test_tar_shards_are_read_in_order(tmp_path, label):
    for part, rows in (("train", range(14)), ("val", range(14, 18)), ("test", range(18, 24))):
        half = len(rows) // 2
        for i, some in enumerate((rows[:half], rows[half:])):
            write_tar(tmp_path / f"{part}-{i:06}.tar", some, label)
    data = ma.load_dataset(f"webdataset:{tmp_path}")
    check(data, {"train": [*range(14)], "validation": [*range(14, 18)], "test": [*range(18, 24)]})


def test_another_key_of_json_is_read(tmp_path):
    write_tar(tmp_path / "x.tar", range(24), lambda i: ("json", json.dumps({"age": i / 4}).encode()))
    data = ma.load_dataset(f"webdataset:{tmp_path / 'x.tar'}:label=age")
    assert data.class_names == ("age",)
    for images, labels in data.parts.values():
        assert labels[:, 0].tolist() == [row / 4 for row in rows_of(images)]


def test_choices_between_members_are_followed(tmp_path):
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w") as tar:
        for i in range(24):
            about = json.dumps({"age": i / 4}).encode()
            for name, content in (
                ("png", png(PIXELS[i])),
                ("mask.png", png(PIXELS[i][:2])),
                ("cls", str(i % 3).encode()),
                ("json", about),
            ):
                member = tarfile.TarInfo(f"./pets/{i:04}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo("README"))
    with pytest.raises(InputError, match=r"has 2 images .* or choose with webdataset:PATH:image=ENDING"):
        ma.load_dataset(f"webdataset:{file}")
    data = ma.load_dataset(f"webdataset:{file}:image=png", seed=1)
    assert data.notes == (".png hold the images, .cls the labels", "passed over: .json, .mask.png")
    for images, labels in data.parts.values():
        assert labels.tolist() == [row % 3 for row in rows_of(images)]
    ages = ma.load_dataset(f"webdataset:{file}:image=png:label=age")
    for images, labels in ages.parts.values():
        assert labels[:, 0].tolist() == [row / 4 for row in rows_of(images)]
    assert ma.load_dataset(f"webdataset:{file}:image=mask.png").image_shape == (2, 7, 3)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda i: "x" if i == 3 else i % 3, "are int and str: give whole numbers, numbers or text, of one kind"),
        (lambda i: None if i == 3 else i % 3, "are int and nothing: give"),
        (lambda i: [0] * (i % 3 + 1), "are lists of 1 or 2 or 3 values"),
        (lambda i: ["a"], "are lists of 1 values: give one label for each image, or lists of numbers"),
        (lambda i: i % 2 == 0 or 3, "are bool and int"),
    ],
)
def test_labels_of_several_kinds_are_refused(tmp_path, label, message):
    write_tar(tmp_path / "x.tar", range(24), lambda i: ("json", json.dumps({"label": label(i)}).encode()))
    with pytest.raises(InputError, match=message):
        ma.load_dataset(f"webdataset:{tmp_path}")


def test_labels_in_two_ways_are_refused(tmp_path):
    write_tar(tmp_path / "x.tar", range(12), lambda i: ("cls", str(i % 3).encode()))
    write_tar(tmp_path / "y.tar", range(12, 24), lambda i: ("json", json.dumps({"label": i % 3}).encode()))
    with pytest.raises(InputError, match=r"has its label in .json, but .* in .cls: give all labels in one way"):
        ma.load_dataset(f"webdataset:{tmp_path}")


def test_attributes_in_json_are_columns(tmp_path):
    write_tar(tmp_path / "x.tar", range(24), lambda i: ("json", json.dumps({"seen": [i % 2, int(i % 3 > 0)]}).encode()))
    data = ma.load_dataset(f"webdataset:{tmp_path}:label=seen")
    assert data.class_names == ("seen 0", "seen 1")
    for images, labels in data.parts.values():
        assert labels.tolist() == [[row % 2, row % 3 > 0] for row in rows_of(images)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its reader leaves files open
def test_files_of_the_library_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is in the extra formats")
    for part, rows in (("train", range(16)), ("test", range(16, 24))):
        with webdataset.ShardWriter(str(tmp_path / f"pets-{part}-%06d.tar"), maxcount=5, verbose=0) as sink:
            for i in rows:
                sink.write({"__key__": f"sample{i:04}", "png": PIXELS[i], "cls": i % 3, "json": {"id": i}})
    data = ma.load_dataset(f"webdataset:{tmp_path}")
    check(data, {"train": [*range(16)], "test": [*range(16, 24)]})
    for part, (images, labels) in data.parts.items():
        shards = sorted(map(str, tmp_path.glob(f"pets-{part}-*.tar")))
        read = webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
        theirs = list(read)
        np.testing.assert_array_equal(images, np.stack([image for image, _ in theirs]))
        assert labels.tolist() == [label for _, label in theirs]


def test_tar_files_that_do_not_end_where_they_should_are_refused(tmp_path):
    file = tmp_path / "x.tar"
    write_tar(file, range(24), lambda i: ("cls", str(i % 3).encode()))
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        border = next(member.offset for member in tar if member.name == "0006.png")
    damaged = bytearray(whole)
    damaged[border] ^= 1  # the header of a member, whose check sum is then wrong
    for content, message in (
        (whole[:border], "is cut off, for it has no end mark"),
        (whole[: border + 700], "is damaged or no tar file .unexpected end of data."),
        (whole + whole, "is damaged, or several tar files in one, at byte"),
        (bytes(damaged), "is damaged, or several tar files in one, at byte"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            ma.load_dataset(f"webdataset:{tmp_path}")
    write_tar(file, [*range(24), 3], lambda i: ("cls", str(i % 3).encode()))
    with pytest.raises(InputError, match=r"holds 0003.png twice"):
        ma.load_dataset(f"webdataset:{tmp_path}")
    write_tar(file, [], None)
    with pytest.raises(InputError, match="the training part holds no image"):
        ma.load_dataset(f"webdataset:{tmp_path}")


def test_damaged_tar_files_are_one_line(tmp_path):
    write_tar(tmp_path / "a.tar", range(6), lambda i: ("cls", b"1"))
    whole = (tmp_path / "a.tar").read_bytes()
    cases = [
        (b"no tar file at all" * 100, "is damaged or no tar file"),
        (b"\x1f\x8b" + b"x" * 100, "is compressed: unpack it with gunzip"),
    ]
    for content, message in cases:
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(InputError, match=message):
            ma.load_dataset(f"webdataset:{tmp_path}")
    (tmp_path / "a.tar").write_bytes(whole[:700])
    with pytest.raises(InputError):
        ma.load_dataset(f"webdataset:{tmp_path}")
    for label, message in (
        (("lab", b"1"), r"0000 in .* has no label \(\.png, \.lab, \.txt\)"),
        (("json", b"{}"), "the label cannot be read, write JSON with the key 'label', or choose another"),
        (("jpg", b"1"), "has 2 images"),
    ):
        write_tar(tmp_path / "a.tar", range(6), lambda i, label=label: label)
        with pytest.raises(InputError, match=message):
            ma.load_dataset(f"webdataset:{tmp_path}")
