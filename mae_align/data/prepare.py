"""Any image source as a sharded ArrayRecord data set that TFDS itself opens, written without TensorFlow.

Shards are written one after another beside their place and moved there when complete; the folder gets its name last.
So there is never a data set that opens and is not whole, and a run that was killed goes on at the first missing shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mae_align.data.pictures import MODES
from mae_align.data.source import BATCH, ImageSource, Splits
from mae_align.data.tfds_source import INCOMPLETE, METADATA, import_tfds
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import whole_file

PLAN = "preparation.json"  # what the folder is made from; kept, so that the same command finds its work done

_VERSION = "1.0.0"
_SAMPLE = 64  # encoded images that predict the size of all
_PNG_CHANNELS = (1, 3)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What was written.

    Attributes:
        path: the folder.
        shards: number of files of each split.
        images: number of images of each split.
        size_bytes: of all files.
        written: shards written by this call; 0 where the work was done before.
    """

    path: Path
    shards: dict[str, int]
    images: dict[str, int]
    size_bytes: int
    written: int


def write_prepared(
    splits: Splits, path: str | Path, *, shards: int | None = None, shard_mb: float = 128.0, progress: bool = False
) -> Preparation:
    """Write both parts of a data set as a TFDS data set of ArrayRecord files.

    8-bit images of 1 or 3 channels are stored as PNG (``tfds.features.Image``), others as raw bytes
    (``tfds.features.Tensor``): both without loss. Records keep their order. Shard i of s holds records
    ``floor(i n / s) .. floor((i + 1) n / s) - 1``.

    Args:
        splits: the sources.
        path: folder to make; must not exist, be empty, or hold what this call would write. Until all is written, the
            work lies in ``path`` + ".incomplete"; the same call goes on there.
        shards: files of each split; None: as many as ``shard_mb`` asks for.
        shard_mb: size of a file in 10^6 bytes, about.
        progress: whether to show a bar.

    Returns:
        Where it is and what it holds; ``tfds.builder_from_directory(path).as_data_source("train")`` opens it.

    Raises:
        InputError: TFDS is not installed, a folder of something else or in use, more shards than images, class names
            TFDS cannot hold, an image that cannot be read.

    Example:
        >>> import tempfile
        >>> from mae_align.data import load_dataset, open_splits
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = write_prepared(open_splits("digits"), Path(folder) / "set", shards=2)
        ...     done.shards, load_dataset(f"prepared:{folder}/set")
        ({'train': 2, 'test': 2}, ImageDataset('digits', train 1438, test 359, image 8x8x1 uint8, 10 classes))
    """
    tfds = import_tfds()
    _check(splits, shards, shard_mb)
    path = Path(os.path.abspath(path))
    work = path.with_name(path.name + INCOMPLETE)
    plan = _plan(splits, shards, shard_mb)
    if (path / METADATA).exists() or (path / PLAN).exists():
        _check_same_plan(path, plan, "")
        return _done(path, plan, 0)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is no prepared data set: choose another --out")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _lock(work):
            written = _write_all(tfds, splits, plan, work, progress)
            os.replace(work, path)
    except OSError as error:
        raise InputError(f"cannot write {work} ({error.strerror or error}): choose another --out") from error
    return _done(path, plan, written)


def _check(splits: Splits, shards: int | None, shard_mb: float) -> None:
    """Refuse what cannot be written, before anything is."""
    if shards is not None and not 1 <= shards <= min(map(len, splits.parts.values())):
        raise InputError(
            f"--shards {shards}: give 1 to {min(map(len, splits.parts.values()))}, for no file may be empty "
            f"({len(splits.train)} training and {len(splits.test)} test images)"
        )
    if not (math.isfinite(shard_mb) and shard_mb > 0):
        raise InputError(f"--shard-mb {shard_mb}: give a size over 0")
    if splits.train.num_classes is None:
        raise InputError(
            "a prepared set holds class labels, and these targets are no classes: read the data as they are"
        )
    names = splits.train.class_names
    bad = [name for name in names if not name or name != " ".join(name.splitlines()).strip()]
    if bad or len(set(names)) < len(names):
        raise InputError(
            f"class names {bad or list(names)}: TFDS needs different ones, not empty, of one line, without blanks at "
            "the ends; rename the classes"
        )


def _plan(splits: Splits, shards: int | None, shard_mb: float) -> dict[str, Any]:
    """Everything that decides what is written, as JSON types."""
    train = splits.train
    lengths = {}
    for split, source in splits.parts.items():
        n = len(source)
        count = shards or min(n, math.ceil(n * _record_bytes(source) / (shard_mb * 1e6)))
        lengths[split] = [(i + 1) * n // count - i * n // count for i in range(count)]
    return {
        "name": re.sub(r"\W+", "_", train.name, flags=re.ASCII).strip("_").lower() or "images",
        "source": train.name,
        "image_shape": list(train.image_shape),
        "pixel_dtype": train.pixel_dtype.name,
        "class_names": list(train.class_names),
        "shard_lengths": lengths,
        "fingerprint": hashlib.sha256(" ".join(s.fingerprint() for s in splits.parts.values()).encode()).hexdigest(),
    }


def _record_bytes(source: ImageSource) -> float:
    """Bytes of an encoded image, about: the mean of some at even distances."""
    some = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(np.int64))
    return float(np.mean([len(_encoded(source.read(int(i))[0])) for i in some]))


def _check_same_plan(folder: Path, plan: dict[str, Any], also: str) -> None:
    """Refuse to go on with, or to take for done, what was made from something else."""
    try:
        stored = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{folder} is not of this command: choose another --out{also}") from None
    differing = [key for key in plan if stored.get(key) != plan[key]]
    if differing:
        raise InputError(
            f"{folder} was made from other data or settings ({', '.join(differing)} differ): choose another --out"
            f"{also or ' or delete the folder'}"
        )


@contextlib.contextmanager
def _lock(work: Path) -> Iterator[None]:
    """Alone in the folder; the lock goes with the process, however it ends."""
    import fcntl

    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is writing {work}: wait for it") from None
        yield
    finally:
        os.close(handle)


def _write_all(tfds: Any, splits: Splits, plan: dict[str, Any], work: Path, progress: bool) -> int:
    """All missing shards, then the metadata. Returns how many shards were written."""
    from tqdm.auto import tqdm

    if (work / PLAN).exists():
        _check_same_plan(work, plan, " or delete it")
    elif any(not entry.name.endswith(".tmp") for entry in work.iterdir()):
        raise InputError(f"{work} holds files of something else: choose another --out or delete it")
    else:
        with whole_file(work / PLAN) as file:
            file.write((json.dumps(plan, indent=2) + "\n").encode())
    features = _features(tfds, plan)
    written = 0
    bar = tqdm(total=sum(map(len, splits.parts.values())), desc=plan["source"], unit="image", disable=not progress)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for split, source in splits.parts.items():
            start = 0
            for file, length in zip(_files(work, plan, split), plan["shard_lengths"][split], strict=True):
                if not file.exists():
                    _write_shard(features, source, range(start, start + length), file, pool, bar)
                    written += 1
                else:
                    bar.update(length)
                start += length
    _write_metadata(tfds, features, plan, work)
    for entry in work.glob("*.tmp"):
        entry.unlink()
    return written


def _files(folder: Path, plan: dict[str, Any], split: str) -> list[Path]:
    """The shards of a split, named as TFDS names them."""
    count = len(plan["shard_lengths"][split])
    return [folder / f"{plan['name']}-{split}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]


def _write_shard(
    features: Any, source: ImageSource, records: range, file: Path, pool: ThreadPoolExecutor, bar: Any
) -> None:
    """One file, moved to its place when it is complete."""
    import array_record.python.array_record_module as array_record_module

    def serialised(i: int) -> bytes:
        image, label = source.read(i)
        return features.serialize_example({"image": _example(image), "label": label})

    unfinished = file.with_name(file.name + ".tmp")
    writer = array_record_module.ArrayRecordWriter(os.fspath(unfinished), "group_size:1")
    try:
        for start in range(records.start, records.stop, BATCH):
            for record in pool.map(serialised, range(start, min(start + BATCH, records.stop))):
                writer.write(record)
                bar.update()
    finally:
        writer.close()
    os.replace(unfinished, file)


def _is_picture(shape: list[int] | tuple[int, ...], dtype: np.dtype) -> bool:
    return dtype == np.uint8 and shape[2] in _PNG_CHANNELS


def _features(tfds: Any, plan: dict[str, Any]) -> Any:
    shape, dtype = tuple(plan["image_shape"]), np.dtype(plan["pixel_dtype"])
    if _is_picture(shape, dtype):
        image = tfds.features.Image(shape=shape, encoding_format="png")
    else:
        image = tfds.features.Tensor(shape=shape, dtype=dtype.type, encoding="bytes")
    return tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(names=plan["class_names"])})


def _example(image: np.ndarray) -> bytes | np.ndarray:
    """What the image feature is given."""
    return _encoded(image) if _is_picture(image.shape, image.dtype) else image


def _encoded(image: np.ndarray) -> bytes:
    """An image as it is stored."""
    from PIL import Image

    if not _is_picture(image.shape, image.dtype):
        return image.tobytes()
    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))
    assert picture.mode == MODES[image.shape[2]]
    picture.save(buffer, format="png")
    return buffer.getvalue()


def _write_metadata(tfds: Any, features: Any, plan: dict[str, Any], work: Path) -> None:
    """What TFDS opens a folder by."""
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=lengths,
            num_bytes=sum(file.stat().st_size for file in _files(work, plan, split)),
        )
        for split, lengths in plan["shard_lengths"].items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=work,
        features=features,
        split_infos=infos,
        version=_VERSION,
        check_data=False,  # it would need TensorFlow
        supervised_keys=("image", "label"),
        description=f"Labelled images of {plan['source']}.",
    )


def _done(path: Path, plan: dict[str, Any], written: int) -> Preparation:
    files = [file for split in plan["shard_lengths"] for file in _files(path, plan, split)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise InputError(f"{path} lacks {missing[0]}: delete the folder and prepare it again")
    return Preparation(
        path=path,
        shards={split: len(lengths) for split, lengths in plan["shard_lengths"].items()},
        images={split: sum(lengths) for split, lengths in plan["shard_lengths"].items()},
        size_bytes=sum(file.stat().st_size for file in files),
        written=written,
    )
