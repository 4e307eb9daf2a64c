from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from mae_align.data.idx import load_idx, read_idx
from mae_align.runtime.errors import InputError

TRAIN_LABELS = [3, 0, 1, 3, 1, 0]
TEST_LABELS = [1, 3, 0]


def idx_bytes(array: np.ndarray) -> bytes:
    """The file format, written down from its description."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + bytes(array.ravel().tolist())


def images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 5, 4)).astype(np.uint8)


def write_set(folder: Path, *, test: str = "t10k", prefix: str = "", gz: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for part, labels, seed in (("train", TRAIN_LABELS, 0), (test, TEST_LABELS, 1)):
        for kind, array in (
            ("images-idx3", images(len(labels), seed)),
            ("labels-idx1", np.array(labels)),
        ):
            path = folder / f"{prefix}{part}-{kind}-ubyte{'.gz' if gz else ''}"
            content = idx_bytes(array)
            path.write_bytes(gzip.compress(content, mtime=0) if gz else content)
    return folder


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("test, prefix", [("t10k", ""), ("test", "emnist-letters-")])
def test_folder_is_read_back(tmp_path, gz, test, prefix):
    data = load_idx(write_set(tmp_path / "letters", test=test, prefix=prefix, gz=gz))
    np.testing.assert_array_equal(data.train_images[..., 0], images(6, 0))
    np.testing.assert_array_equal(data.test_images[..., 0], images(3, 1))
    assert data.train_images.dtype == np.uint8 and data.image_shape == (5, 4, 1)
    # Label 2 does not occur: labels are numbered without the gap, names keep the values.
    assert data.class_names == ("0", "1", "3")
    assert [int(data.class_names[i]) for i in data.train_labels] == TRAIN_LABELS
    assert [int(data.class_names[i]) for i in data.test_labels] == TEST_LABELS
    assert data.name == "letters"


def test_dotted_names_and_gzip_without_suffix(tmp_path):
    write_set(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.stem.replace("-idx", ".idx"))
    assert len(load_idx(tmp_path).train_labels) == 6


def test_plain_file_goes_before_its_gzipped_copy(tmp_path):
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([1, 0, 3, 1, 0, 3])))
    assert load_idx(tmp_path).train_labels.tolist() == [1, 0, 2, 1, 0, 2]


GOOD = idx_bytes(images(3, 2))


@pytest.mark.parametrize(
    "content, message",
    [
        (GOOD[:-1], "truncated or damaged: 75 bytes where its header asks for 76"),
        (GOOD + b"!", "truncated or damaged: 77 bytes"),
        (GOOD[:9], "truncated or damaged: 9 bytes"),
        (GOOD[:3], "is not an IDX file"),
        (b"", "is not an IDX file"),
        (b"<html>not found</html>", "is not an IDX file"),
        (GOOD[:2] + b"\x0d" + GOOD[3:], "holds type 0x0d of rank 3: expected unsigned bytes"),
        (idx_bytes(np.array([1, 2])), "type 0x08 of rank 1: expected .* rank 3"),
        (GOOD[:4] + b"\xff" * 4 + GOOD[8:], "truncated or damaged"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cannot read .*images"),
        (gzip.compress(GOOD, mtime=0)[:-8] + b"\0" * 8, "cannot read .*images.*CRC"),
        (gzip.compress(GOOD, mtime=0) + b"!", "cannot read .*images"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 40, "cannot read .*images"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_idx(path, rank=3)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*nowhere: give the folder"):
        load_idx(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no file .*gone"):
        read_idx(tmp_path / "gone", rank=1)
    with pytest.raises(InputError, match=r"cannot read .*directory"):
        read_idx(tmp_path, rank=1)
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"no file t10k-labels\*idx1\* or test-labels\*idx1\*"):
        load_idx(tmp_path)


def test_two_sets_in_one_folder_are_refused(tmp_path):
    write_set(tmp_path, prefix="emnist-letters-")
    write_set(tmp_path, prefix="emnist-digits-")
    with pytest.raises(InputError, match=r"several files .*emnist-digits-train-images.*keep one"):
        load_idx(tmp_path)


def test_images_and_labels_must_belong_together(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.array([0, 1]))))
    with pytest.raises(InputError, match=r"holds 6 images but .*train-labels.* 2 labels"):
        load_idx(tmp_path)


def test_unseen_test_label_names_the_folder(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.array([9, 0, 1]))))
    with pytest.raises(InputError, match=rf"{tmp_path.name}: labels hold \[9\]"):
        load_idx(tmp_path)
