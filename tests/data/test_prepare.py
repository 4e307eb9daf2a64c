from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image
from tensorflow_datasets.core import constants

import mae_align as ma
from mae_align.data import ArraySource, load_dataset, open_splits
from mae_align.data.prepare import write_prepared
from mae_align.data.source import Splits
from mae_align.runtime.errors import InputError

tfds: Any = tensorflow_datasets  # its types are those of TensorFlow
REPOSITORY = Path(ma.__file__).parents[1]


def random_splits(shape=(6, 5, 3), dtype: Any = np.uint8, sizes=(23, 7), names=("cat", "dog")) -> Splits:
    rng = np.random.default_rng(0)
    parts = []
    for n in sizes:
        images = rng.normal(100, 40, (n, *shape)).clip(0, 255).astype(dtype)
        parts.append(ArraySource(images, np.arange(n) % len(names), tuple(names), "my pets"))
    return Splits(parts[0], parts[1])


def read_plainly(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """With TFDS alone."""
    records = tfds.builder_from_directory(path).as_data_source(split)
    return np.array([r["image"] for r in records]), np.array([r["label"] for r in records])


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((6, 5, 3), np.uint8),
        ((6, 5, 1), np.uint8),
        ((6, 5, 4), np.uint8),
        ((6, 5, 2), np.uint8),
        ((6, 5, 3), np.float32),
        ((6, 5, 1), np.float64),
    ],
)
def test_pixels_and_labels_are_kept_bit_for_bit(tmp_path, shape, dtype):
    splits = random_splits(shape, dtype)
    done = write_prepared(splits, tmp_path / "out", shards=3)
    assert done.shards == {"train": 3, "test": 3} and done.images == {"train": 23, "test": 7} and done.written == 6
    for split, source in (("train", splits.train), ("test", splits.test)):
        assert isinstance(source, ArraySource)
        images, labels = read_plainly(tmp_path / "out", split)
        assert images.dtype == dtype
        np.testing.assert_array_equal(images, source.images)
        np.testing.assert_array_equal(labels, source.label_array)
    data = load_dataset(f"prepared:{tmp_path / 'out'}")
    np.testing.assert_array_equal(data.train_images, splits.train.take(np.arange(23))[0])
    assert (data.name, data.class_names) == ("my_pets", ("cat", "dog"))


def test_tfds_knows_the_set(tmp_path):
    write_prepared(random_splits(names=("a cat", "ä dog\tx")), tmp_path / "out", shards=2)
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert (builder.info.full_name, builder.info.supervised_keys) == ("my_pets/1.0.0", ("image", "label"))
    assert builder.info.features["label"].names == ["a cat", "ä dog\tx"]
    assert builder.info.splits["train"].shard_lengths == [11, 12]
    files = sorted(path.name for path in (tmp_path / "out").glob("*array_record*"))
    assert files == [f"my_pets-{s}.array_record-0000{i}-of-00002" for s in ("test", "train") for i in (0, 1)]
    size = sum((tmp_path / "out" / name).stat().st_size for name in files)
    assert sum(info.num_bytes for info in builder.info.splits.values()) == size
    assert not list(tmp_path.glob("*.incomplete")) and not list((tmp_path / "out").glob("*.tmp"))


def test_any_random_order_and_slices_work(tmp_path):
    splits = random_splits()
    write_prepared(splits, tmp_path / "out", shards=4)
    records = tfds.builder_from_directory(tmp_path / "out").as_data_source("train[10:20]")
    np.testing.assert_array_equal(records[3]["image"], splits.train[13][0])


def test_shard_size_in_megabytes(tmp_path):
    splits = random_splits((16, 16, 3), np.float64, sizes=(40, 5))  # 6,144 bytes an image
    done = write_prepared(splits, tmp_path / "out", shard_mb=0.0615)
    assert done.shards == {"train": 4, "test": 1}
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*-train.*")]
    assert max(sizes) < 2 * 65_536 + 1  # ArrayRecord fills up to blocks of 64 KiB
    assert write_prepared(splits, tmp_path / "small", shard_mb=1e-9).shards == {"train": 40, "test": 5}


def test_a_prepared_set_can_be_prepared_again(tmp_path):
    splits = random_splits()
    write_prepared(splits, tmp_path / "a", shards=2)
    write_prepared(open_splits(f"prepared:{tmp_path / 'a'}"), tmp_path / "b", shards=3)
    np.testing.assert_array_equal(read_plainly(tmp_path / "b", "train")[0], splits.train.take(np.arange(23))[0])


def test_the_same_call_again_finds_its_work_done(tmp_path):
    write_prepared(random_splits(), tmp_path / "out", shards=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert write_prepared(random_splits(), tmp_path / "out", shards=2).written == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    next((tmp_path / "out").glob("*train*-00001-*")).unlink()
    with pytest.raises(InputError, match=r"lacks my_pets-train.array_record-00001-of-00002: delete the folder"):
        write_prepared(random_splits(), tmp_path / "out", shards=2)


def test_other_data_and_settings_are_refused(tmp_path):
    write_prepared(random_splits(), tmp_path / "out", shards=2)
    other = random_splits()
    assert isinstance(other.train, ArraySource)
    other.train.images[5, 0, 0, 0] ^= 1
    for splits, shards, differing in (
        (other, 2, "fingerprint"),
        (random_splits(), 3, "shard_lengths"),
        (random_splits(names=("cat", "eel")), 2, "class_names"),
    ):
        with pytest.raises(InputError, match=rf"made from other data or settings \({differing} differ\)"):
            write_prepared(splits, tmp_path / "out", shards=shards)


def test_folders_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").touch()
    (tmp_path / "x.incomplete").mkdir()
    (tmp_path / "x.incomplete" / "photo.png").touch()
    for name, message in (("file", "exists and is no"), ("full", "exists and is no"), ("x", "files of something else")):
        with pytest.raises(InputError, match=message):
            write_prepared(random_splits(), tmp_path / name, shards=2)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "dataset_info.json").touch()
    with pytest.raises(InputError, match="is not of this command"):
        write_prepared(random_splits(), tmp_path / "foreign", shards=2)
    (tmp_path / "empty").mkdir()
    assert write_prepared(random_splits(), tmp_path / "empty", shards=2).written == 4
    with pytest.raises(InputError, match=r"cannot write .*: choose another --out"):
        write_prepared(random_splits(), tmp_path / "file" / "below", shards=2)


@pytest.mark.parametrize(
    "splits, options, message",
    [
        (random_splits(), {"shards": 8}, r"--shards 8: give 1 to 7, for no file may be empty \(23 training and 7 test"),
        (random_splits(), {"shards": 0}, "--shards 0: give 1 to 7"),
        (random_splits(), {"shard_mb": 0.0}, "--shard-mb 0.0: give a size over 0"),
        (random_splits(), {"shard_mb": float("nan")}, "--shard-mb nan"),
        (random_splits(names=("a\nb", "c")), {}, "class names .* TFDS needs different ones"),
        (random_splits(names=("a", " c")), {}, "class names"),
        (random_splits(names=("a", "")), {}, "class names"),
        (random_splits(names=("a", "a")), {}, "class names"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, splits, options, message):
    with pytest.raises(InputError, match=message):
        write_prepared(splits, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from mae_align.data.prepare import write_prepared
from tests.data.test_prepare import Killing, random_splits
splits = random_splits()
write_prepared(splits._replace(train=Killing(splits.train, int(sys.argv[2]))), Path(sys.argv[1]), shards=5)
"""


class Killing(ArraySource):
    """Ends the process without a chance to clean up when a record is read for writing."""

    def __init__(self, source: ArraySource, at: int) -> None:
        super().__init__(source.images, source.label_array, source.class_names, source.name)
        vars(self)["at"] = at

    def read(self, i: int) -> tuple[np.ndarray, int | np.ndarray]:
        if i == vars(self)["at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(i)


def test_killed_and_started_again(tmp_path):
    """Record 12 lies in the third of five files of 4 or 5 records."""
    path, work = tmp_path / "out", tmp_path / "out.incomplete"
    out = subprocess.run(
        [sys.executable, "-c", KILLED, path, "12"], capture_output=True, text=True, cwd=REPOSITORY, timeout=60
    )
    assert out.returncode == -signal.SIGKILL, out.stderr
    assert not path.exists() and not (work / "dataset_info.json").exists()
    with pytest.raises(InputError, match="is unfinished, the same command goes on"):
        load_dataset(f"prepared:{path}")
    finished = sorted(file.name for file in work.glob("*-of-00005"))
    assert finished == [f"my_pets-train.array_record-0000{i}-of-00005" for i in (0, 1)]
    with pytest.raises(InputError, match=r"other data or settings \(shard_lengths differ\).* or delete it"):
        write_prepared(random_splits(), path, shards=4)
    done = write_prepared(random_splits(), path, shards=5)
    assert done.written == 8 and not work.exists()
    assert not list(path.glob("*.tmp"))
    for split, source in random_splits().parts.items():
        assert isinstance(source, ArraySource)
        np.testing.assert_array_equal(read_plainly(path, split)[0], source.images)


def test_an_interrupt_between_metadata_and_rename_is_made_good(tmp_path, monkeypatch):
    def interrupted(source, target):
        if Path(target) == tmp_path / "out":
            raise KeyboardInterrupt
        return real(source, target)

    real = os.replace
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_prepared(random_splits(), tmp_path / "out", shards=2)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert write_prepared(random_splits(), tmp_path / "out", shards=2).written == 0
    assert len(read_plainly(tmp_path / "out", "train")[1]) == 23


def test_a_second_process_is_refused(tmp_path):
    import fcntl

    work = tmp_path / "out.incomplete"
    work.mkdir()
    handle = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)  # an exclusive lock is refused where anybody holds one
        with pytest.raises(InputError, match="another process is writing"):
            write_prepared(random_splits(), tmp_path / "out", shards=2)
    finally:
        os.close(handle)
    assert write_prepared(random_splits(), tmp_path / "out", shards=2).written == 4


def test_below_the_folder_of_tfds_it_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", os.fspath(tmp_path))
    write_prepared(random_splits(), tmp_path / "my_pets" / "1.0.0")
    assert len(load_dataset("tfds:my_pets").train_labels) == 23


def test_an_image_that_cannot_be_read_leaves_nothing_that_opens(tmp_path):
    for i in range(8):
        path = tmp_path / "pets" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40)).astype(np.uint8)).save(path)
    broken = tmp_path / "pets" / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:800])
    splits = open_splits(f"folder:{tmp_path}/pets")
    with pytest.raises(InputError, match=r"cannot read the image .*0\.png"):
        write_prepared(splits, tmp_path / "out", shards=2)
    assert not (tmp_path / "out").exists()


def test_the_plan_is_kept_beside_the_data(tmp_path):
    write_prepared(random_splits(), tmp_path / "out", shards=2)
    plan = json.loads((tmp_path / "out" / "preparation.json").read_text())
    assert plan["source"] == "my pets" and plan["shard_lengths"] == {"train": [11, 12], "test": [3, 4]}
