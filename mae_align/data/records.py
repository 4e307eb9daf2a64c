"""Image files that lie in larger files: found once, decoded when they are read."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mae_align.data import source
from mae_align.data.dataset import ImageShape
from mae_align.data.layout import part_of
from mae_align.data.pictures import Header, read_header, read_picture
from mae_align.data.resize import ImageSize, height_and_width, resize_picture
from mae_align.data.source import ImageSource, Splits, split_off_test
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Image files of one part.

    Attributes:
        read: gives the content of the file at a position; thread-safe.
        where: says where it lies, for messages.
        labels: [n] int64 classes, or [n, q] float64 targets.
        files: in which they lie.
    """

    read: Callable[[int], bytes]
    where: Callable[[int], str]
    labels: np.ndarray
    files: Sequence[Path]


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource(ImageSource):
    """Records as a source; made by :func:`record_splits`."""

    records: Records
    image_shape: ImageShape
    pixel_dtype: np.dtype
    image_size: ImageSize | None
    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.records.labels)

    @property
    def num_targets(self) -> int | None:
        """Number of columns of the targets; None where there are classes."""
        return None if self.records.labels.ndim == 1 else self.records.labels.shape[1]

    def read(self, i: int) -> tuple[np.ndarray, int | np.ndarray]:
        """Decode one record."""
        channels = self.image_shape[2]
        picture = read_picture(io.BytesIO(self.records.read(i)), channels, self.records.where(i))
        if self.image_size is not None:
            picture = resize_picture(picture, self.image_size)
        array = np.asarray(picture)
        array = array[..., None] if channels == 1 else array
        if array.shape != self.image_shape:
            raise InputError(f"{self.records.where(i)} has another size than its header said: save it upright")
        label = self.records.labels[i]
        return array, label if label.ndim else int(label)

    def labels(self) -> np.ndarray:
        """All labels."""
        return self.records.labels

    def fingerprint(self) -> str:
        """SHA-256 of labels, and of paths, sizes and times of change of the files."""
        digest = hashlib.sha256(self.records.labels.tobytes())
        for path in self.records.files:
            stat = path.stat()
            digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def files_by_part(path: Path, suffix: str, usage: str) -> dict[str, list[Path]]:
    """The files of every part: a file, or those of a folder and below it.

    A part is known by the name of a folder, or by what stands before the first - or . of a file's name, see
    :func:`mae_align.data.layout.part_of`: ``train-00000-of-00002.parquet``, ``val/000000.tar``. Files without the name
    of a part are the training part where no file has one.

    Args:
        path: the file or folder.
        suffix: of the files, such as ``.parquet``.
        usage: how the data set is written, for messages.

    Returns:
        Files by train, validation and test, in the order of their names.

    Raises:
        InputError: no file, or files with and without a part beside each other.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        ...     (root / name).touch()
        >>> {part: len(files) for part, files in files_by_part(root, ".tar", "webdataset:PATH").items()}
        {'train': 2, 'validation': 1}
    """
    if path.is_file():
        return {"train": [path]}
    files = sorted(path.rglob(f"*{suffix}")) if path.is_dir() else []
    if not files:
        raise InputError(f"{path} is no {suffix} file and holds none: check the path, {usage}")
    found: dict[str | None, list[Path]] = {}
    for file in files:
        words = [*reversed(file.relative_to(path).parts[:-1]), file.name.replace("-", ".").split(".")[0]]
        parts = [part for word in words if (part := part_of(word)) is not None]
        found.setdefault(parts[-1] if parts else None, []).append(file)
    unnamed = found.pop(None, [])
    if unnamed and found:
        raise InputError(f"{unnamed[0]} is of no part, beside files of {' and '.join(map(str, found))}: name its part")
    if unnamed:
        return {"train": unnamed}
    if "train" not in found:
        raise InputError(f"{path} holds files of {' and '.join(map(str, found))} but none for training: give that, too")
    return {part: found[part] for part in ("train", "validation", "test") if part in found}


def record_splits(
    parts: Mapping[str, Records],
    class_names: tuple[str, ...],
    name: str,
    notes: tuple[str, ...],
    *,
    image_size: ImageSize | None,
    seed: int,
    test_fraction: float,
) -> Splits:
    """Records of every part as sources; where there is no part for tests, one is made.

    Args:
        parts: by train, validation, test; train is there.
        class_names: of the classes, or of the columns of the labels.
        name: of the data set.
        notes: what it was read as.
        image_size: side of a square, or (height, width), in pixels, or None to keep the images as they are.
        seed: of the split, where train is the only part.
        test_fraction: share of the test images, likewise.

    Raises:
        InputError: mixed sizes or depths, an unreadable image.
    """
    shape, dtype = _common(parts, image_size, name)
    sources: dict[str, ImageSource] = {
        part: RecordSource(records, shape, dtype, image_size, class_names, name) for part, records in parts.items()
    }
    if len(sources) == 1:
        return split_off_test(sources["train"], test_fraction, seed, name)._replace(notes=notes)
    if "test" not in sources:
        sources["test"] = sources.pop("validation")
        notes += ("there are no other test images: it is tested on the validation set",)
    return Splits(**sources, notes=notes)


def _common(parts: Mapping[str, Records], image_size: ImageSize | None, name: str) -> tuple[ImageShape, np.dtype]:
    """Shape and dtype of all images, from their headers."""
    from tqdm.auto import tqdm

    first: tuple[Header, str] | None = None
    colour = None
    total = sum(len(records.labels) for records in parts.values())
    with tqdm(total=total, desc=f"{name}: headers", unit="image", disable=total <= source.PROGRESS_FROM) as bar:
        for records in parts.values():
            for i in range(len(records.labels)):
                where = records.where(i)
                header = read_header(io.BytesIO(records.read(i)), where)
                first = first or (header, where)
                if header.size != first[0].size and image_size is None:
                    raise InputError(
                        f"{where} is {header.size[0]} x {header.size[1]} pixels but {first[1]} is {first[0].size[0]} x "
                        f"{first[0].size[1]}: pass image_size to resize all images to one size"
                    )
                if header.deep != first[0].deep:
                    raise InputError(f"{where} and {first[1]} have 8 and 16 bits per pixel: bring all to one depth")
                colour = colour or (None if header.grey else where)
                bar.update()
    if first is None:
        raise InputError(f"{name} holds no image")
    if first[0].deep and colour is not None:
        raise InputError(f"{colour} has colours beside pictures of 16 bits: load the arrays as npz:FILE")
    width, height = first[0].size if image_size is None else height_and_width(image_size)[::-1]
    return (height, width, 1 if colour is None else 3), np.dtype(np.float32 if first[0].deep else np.uint8)
