"""Images in Parquet and tar files, written by the libraries that own the formats where these are installed."""

from __future__ import annotations

import io
import json
import tarfile

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
            lambda t: t.set_column(1, "label", pa.array([-1] * 24)),
            "",
            r"run from -1 to -1 for 3 classes: leave out images",
        ),
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


def test_files_of_the_library_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is in the extra formats")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    for part, rows in (("train", range(16)), ("test", range(16, 24))):
        rows = {"image": [Image.fromarray(PIXELS[i]) for i in rows], "label": [i % 3 for i in rows]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{part}-00000-of-00001.parquet")
    data = ma.load_dataset(f"parquet:{tmp_path}")
    check(data, {"train": [*range(16)], "test": [*range(16, 24)]})
    assert data.class_names == tuple(NAMES)


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


def test_files_of_the_library_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is in the extra formats")
    for part, rows in (("train", range(16)), ("test", range(16, 24))):
        with webdataset.TarWriter(str(tmp_path / f"{part}-000000.tar")) as sink:
            for i in rows:
                sink.write({"__key__": f"sample{i:04}", "png": PIXELS[i], "cls": i % 3})
    check(ma.load_dataset(f"webdataset:{tmp_path}"), {"train": [*range(16)], "test": [*range(16, 24)]})


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
