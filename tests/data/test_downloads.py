"""Image sets as their authors give them: CIFAR, STL-10 and SVHN, and one line for what is damaged or not theirs."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.io import savemat

import mae_align as ma
from mae_align.runtime.errors import InputError

RNG = np.random.default_rng(0)
TEN = "airplane automobile bird cat deer dog frog horse ship truck".split()


def pictures(n, side=32):
    return RNG.integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def planes(images):
    """Rows of a red, a green and a blue plane, written out as the web page of CIFAR says it."""
    return np.stack([np.concatenate([image[..., c].ravel() for c in range(3)]) for image in images])


def labels_of(n, q):
    return np.arange(n) % q


PICKLER: Any = vars(pickle)["_Pickler"]  # the one in Python, whose way with each type can be changed


class Python2(PICKLER):
    """Writes text and bytes as the one kind of text that Python 2 has, as the authors of CIFAR did."""

    dispatch: ClassVar[dict[type, Any]] = dict(PICKLER.dispatch)

    def save_text(self, text):
        content = text.encode() if isinstance(text, str) else text
        short = len(content) < 256
        self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) if short else pickle.BINSTRING)
        self.write(content if short else struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text


def written_by_python2(content):
    file = io.BytesIO()
    Python2(file, protocol=2).dump(content)
    return file.getvalue()


@pytest.fixture
def ten(tmp_path):
    """Both versions of CIFAR-10, four images a file."""
    parts = {f"data_batch_{i}": (pictures(4), labels_of(4, 10) + i) for i in range(1, 6)}
    parts["test_batch"] = (pictures(5), labels_of(5, 10))
    binary, python = tmp_path / "cifar-10-batches-bin", tmp_path / "x" / "cifar-10-batches-py"
    binary.mkdir()
    python.mkdir(parents=True)
    (binary / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    for name, (images, labels) in parts.items():
        rows = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], 1)
        (binary / f"{name}.bin").write_bytes(rows.tobytes())
        content = {"data": planes(images), "labels": labels.tolist(), "batch_label": "x", "filenames": ["a"] * 4}
        (python / name).write_bytes(written_by_python2(content))
    (python / "batches.meta").write_bytes(written_by_python2({"label_names": TEN, "num_vis": 3072}))
    return tmp_path, parts


@pytest.mark.parametrize("where", ["", "cifar-10-batches-bin", "x", "x/cifar-10-batches-py"])
def test_cifar10_is_read_in_both_versions(ten, where):
    root, parts = ten
    data = ma.load_dataset(f"cifar:{root / where}")
    train = [parts[f"data_batch_{i}"] for i in range(1, 6)]
    np.testing.assert_array_equal(data.train_images, np.concatenate([images for images, _ in train]))
    np.testing.assert_array_equal(data.train_labels, np.concatenate([labels for _, labels in train]))
    np.testing.assert_array_equal(data.test_images, parts["test_batch"][0])
    assert data.class_names == tuple(TEN) and data.name == "cifar10"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_every_protocol_and_order_of_axes_is_read(ten, protocol):
    root, parts = ten
    images, labels = parts["test_batch"]
    rows = np.asfortranarray(planes(images))
    file = root / "x" / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({"data": rows, "labels": labels.tolist()}, protocol=protocol))
    np.testing.assert_array_equal(ma.load_dataset(f"cifar:{root / 'x'}").test_images, images)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("choice", "column", "count"), [("", 1, 100), (":labels=fine", 1, 100), (":labels=coarse", 0, 20)]
)
def test_cifar100_has_fine_and_coarse_labels(tmp_path, binary, choice, column, count):
    names = {"coarse": [f"group{i}" for i in range(20)], "fine": [f"class{i}" for i in range(100)]}
    parts = {}
    for name, n in (("train", 130), ("test", 110)):
        images, labels = pictures(n), np.stack([labels_of(n, 20), labels_of(n, 100)], 1)
        parts[name] = images, labels
        if binary:
            (tmp_path / f"{name}.bin").write_bytes(
                np.concatenate([labels.astype(np.uint8), planes(images)], 1).tobytes()
            )
            continue
        content = {b"data": planes(images)}
        content |= {f"{kind}_labels".encode(): labels[:, i].tolist() for i, kind in enumerate(("coarse", "fine"))}
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    for kind, of_kind in names.items():
        (tmp_path / f"{kind}_label_names.txt").write_text("\n".join(of_kind))
    meta = {f"{kind}_label_names".encode(): of_kind for kind, of_kind in names.items()}
    (tmp_path / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    data = ma.load_dataset(f"cifar:{tmp_path}{choice}")
    for part, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        np.testing.assert_array_equal(images, parts[part][0])
        np.testing.assert_array_equal(labels, parts[part][1][:, column])
    assert data.num_classes == count and data.class_names[3] == names["fine" if column else "coarse"][3]


class Runs:
    """Runs a command where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no file of CIFAR"),
        (b"\x80\x02}q", "damaged or no file of CIFAR"),
        (pickle.dumps([1, 2]), "is no file of CIFAR"),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}), "whose pixels are bytes"),
        (pickle.dumps({b"data": np.zeros((2, 30), np.uint8), b"labels": [0, 1]}), "does not hold images and labels"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}), "does not hold images and labels"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1.5]}), "are not all class numbers"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, None]}), "are not all class numbers"),
        (pickle.dumps({b"data": io.BytesIO(b"x"), b"labels": [0]}), "calls for _io.BytesIO, which is not read"),
    ],
)
def test_damaged_python_files_are_one_line(ten, content, message):
    root, _ = ten
    (root / "x" / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        ma.load_dataset(f"cifar:{root / 'x'}")
    assert "\n" not in str(error.value)


def test_nothing_in_a_file_is_run(ten):
    root, _ = ten
    file, mark = root / "x" / "cifar-10-batches-py" / "data_batch_2", root / "ran"
    file.write_bytes(pickle.dumps({b"data": Runs(f"touch {mark}")}, protocol=2))
    with pytest.raises(InputError, match=r"calls for \w+\.system, which is not read"):
        ma.load_dataset(f"cifar:{root / 'x'}")
    assert not mark.exists()
    pickle.loads(file.read_bytes())  # the file does run where it is unpickled
    assert mark.exists()


def test_what_is_missing_or_cut_off_is_said(ten, tmp_path):
    root, _ = ten
    file = root / "cifar-10-batches-bin" / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"data_batch_3.bin has 12291 bytes, not rows of 3073"):
        ma.load_dataset(f"cifar:{root / 'cifar-10-batches-bin'}")
    file.unlink()
    with pytest.raises(InputError, match=r"no file .*data_batch_3.bin: unpack the download again"):
        ma.load_dataset(f"cifar:{root / 'cifar-10-batches-bin'}")
    (root / "cifar-100-python").mkdir()
    with pytest.raises(InputError, match="holds cifar-10-batches-bin and cifar-100-python: give one of them"):
        ma.load_dataset(f"cifar:{root}")
    with pytest.raises(InputError, match="is CIFAR-10, which has ten classes alone"):
        ma.load_dataset(f"cifar:{root / 'cifar-10-batches-bin'}:labels=coarse")
    with pytest.raises(InputError, match="labels=both: give fine or coarse"):
        ma.load_dataset(f"cifar:{root / 'cifar-10-batches-bin'}:labels=both")
    (tmp_path / "packed").mkdir()
    packed = tmp_path / "packed" / "cifar-10-python.tar.gz"
    packed.touch()
    with pytest.raises(InputError, match=r"is a file: unpack it \(tar xzf\) and give its folder"):
        ma.load_dataset(f"cifar:{packed}")
    (tmp_path / "packed" / "stl10_binary.tar.gz").touch()
    with pytest.raises(InputError, match=r"stl10_binary.tar.gz is not unpacked: unpack it \(tar xzf\)"):
        ma.load_dataset(f"stl10:{packed.parent}")
    with pytest.raises(InputError, match=r"holds no files of CIFAR: unpack cifar-10-python.tar.gz \(tar xzf\)"):
        ma.load_dataset(f"cifar:{tmp_path / 'packed'}")


def write_stl10(folder, n=4):
    """Pictures in columns: all of the red plane first, each plane column by column."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    parts = {}
    for part in ("train", "test"):
        images, labels = pictures(n, 96), np.arange(n) % 3 + 1
        rows = [np.concatenate([image[..., c].ravel(order="F") for c in range(3)]) for image in images]
        (folder / f"{part}_X.bin").write_bytes(np.stack(rows).tobytes())
        (folder / f"{part}_y.bin").write_bytes(labels.astype(np.uint8).tobytes())
        parts[part] = images, labels - 1
    (folder / "unlabeled_X.bin").touch()
    return parts


def test_stl10_is_read(tmp_path):
    parts = write_stl10(tmp_path / "stl10_binary")
    for where in (tmp_path, tmp_path / "stl10_binary"):
        data = ma.load_dataset(f"stl10:{where}")
        for part, (images, labels) in parts.items():
            np.testing.assert_array_equal(data.parts[part][0], images)
            np.testing.assert_array_equal(data.parts[part][1], labels)
        assert data.class_names == ("airplane", "bird", "car") and "unlabeled_X.bin is passed over" in repr(data)


def test_damaged_stl10_is_one_line(tmp_path):
    write_stl10(tmp_path)
    (tmp_path / "test_y.bin").write_bytes(bytes([1, 2, 3]))
    with pytest.raises(InputError, match=r"test_X.bin has 110592 bytes for 3 labels: unpack"):
        ma.load_dataset(f"stl10:{tmp_path}")
    (tmp_path / "test_y.bin").write_bytes(bytes([1, 2, 3, 0]))
    with pytest.raises(InputError, match="holds a label 0"):
        ma.load_dataset(f"stl10:{tmp_path}")
    (tmp_path / "test_y.bin").unlink()
    with pytest.raises(InputError, match=r"no file .*test_y.bin: unpack"):
        ma.load_dataset(f"stl10:{tmp_path}")


def test_svhn_is_read(tmp_path):
    parts = {}
    for part, n in (("train", 20), ("test", 10)):
        images, labels = pictures(n), np.arange(n) % 10
        X = np.moveaxis(images, 0, -1)
        savemat(
            tmp_path / f"{part}_32x32.mat", {"X": X, "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
        )
        parts[part] = images, labels
    for where in (tmp_path, tmp_path / "train_32x32.mat"):
        data = ma.load_dataset(f"svhn:{where}")
        for part, (images, labels) in parts.items():
            np.testing.assert_array_equal(data.parts[part][0], images)
            np.testing.assert_array_equal(data.parts[part][1], labels)
    assert ma.load_dataset(f"svhn:{tmp_path}", image_size=(8, 16)).image_shape == (8, 16, 3)


def test_torchvision_reads_the_same(ten, tmp_path, monkeypatch):
    reason = "torchvision comes with the extra parity"
    datasets = pytest.importorskip("torchvision.datasets", reason=reason, exc_type=ImportError)
    # What is made here has other check sums than the downloads.
    for each in (datasets.CIFAR10, datasets.STL10, datasets.SVHN):
        monkeypatch.setattr(each, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    root, _ = ten
    write_stl10(tmp_path / "stl10_binary")
    for part in ("train", "test"):
        y = np.arange(1, 11, dtype=np.uint8)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": np.moveaxis(pictures(10), 0, -1), "y": y[:, None]})
    loaded = {name: ma.load_dataset(f"{name}:{tmp_path}") for name in ("stl10", "svhn")}
    loaded["cifar"] = ma.load_dataset(f"cifar:{root / 'x'}")
    for part in ("train", "test"):
        theirs = datasets.CIFAR10(str(root / "x"), train=part == "train")
        np.testing.assert_array_equal(loaded["cifar"].parts[part][0], theirs.data)
        np.testing.assert_array_equal(loaded["cifar"].parts[part][1], theirs.targets)
        assert loaded["cifar"].class_names == tuple(theirs.classes)
        for name, reader in (("stl10", datasets.STL10), ("svhn", datasets.SVHN)):
            theirs = reader(str(tmp_path), split=part)
            np.testing.assert_array_equal(loaded[name].parts[part][0], theirs.data.transpose(0, 2, 3, 1))
            np.testing.assert_array_equal(loaded[name].parts[part][1], theirs.labels)
    assert loaded["stl10"].class_names == tuple(datasets.STL10(str(tmp_path), split="test").classes)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1.5], [2]])}, "holds 2 float64, not digits"),
        ({"X": np.zeros((32, 32, 3, 0), np.uint8), "y": np.zeros((0, 1))}, "holds 0 float64, not digits"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "lacks X or y: give the cropped digits"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1]]}, r"uint8 \[32, 32, 3, 2\] for 1 labels"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": [[1], [2]]}, r"float64 \[32, 32, 3, 2\]"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[0], [2]]}, "runs from 0 to 2, not from 1 to 10"),
        (None, "cannot read .*train_32x32.mat"),
    ],
)
def test_damaged_svhn_is_one_line(tmp_path, arrays, message):
    file = tmp_path / "train_32x32.mat"
    if arrays is None:
        file.write_bytes(b"no matrix")
    else:
        savemat(file, arrays)
    with pytest.raises(InputError, match=message) as error:
        ma.load_dataset(f"svhn:{file}")
    assert "\n" not in str(error.value) and not re.search("Traceback", str(error.value))
