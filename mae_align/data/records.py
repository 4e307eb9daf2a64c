"""Image files that lie in larger files: found once, decoded when they are read."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mae_align.data import source
from mae_align.data.dataset import ImageShape, check_task, encode_labels, readable
from mae_align.data.layout import PARTS, is_system, part_of
from mae_align.data.pictures import Header, read_header, read_picture
from mae_align.data.resize import ImageSize, height_and_width, resize_picture
from mae_align.data.source import ImageSource, Splits, split_off_test
from mae_align.runtime.errors import InputError

_PACKED = (".gz", ".bz2", ".xz", ".zst")


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Image files of one part.

    Attributes:
        read: gives the content of the file at a position; thread-safe.
        where: says where it lies, for messages.
        labels: [n] int64 classes, or [n, q] float64 targets.
        files: in which they lie.
        chosen: which of the images in the files they are, and which of the labels.
    """

    read: Callable[[int], bytes]
    where: Callable[[int], str]
    labels: np.ndarray
    files: Sequence[Path]
    chosen: tuple[str, ...]


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
        """SHA-256 of labels, of what is read, and of paths, sizes and times of change of the files."""
        digest = hashlib.sha256(self.records.labels.tobytes())
        digest.update(repr(self.records.chosen).encode(errors="surrogateescape"))
        for path in self.records.files:
            stat = path.stat()
            digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def files_by_part(path: Path, suffix: str, usage: str) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """The files of every part: a file, or those of a folder and below it.

    A part is known by a word in the names of files or folders, see :func:`mae_align.data.layout.part_of`:
    ``train-00000-of-00002.parquet``, ``pets-val-000000.tar``, ``test/000000.tar``. Files without the name of a part are
    the training part where no file has one. Hidden files and those of systems are passed over.

    Args:
        path: the file or folder.
        suffix: of the files, such as ``.parquet``.
        usage: how the data set is written, for messages.

    Returns:
        Files by train, validation and test, in the order of their names, and notes in words.

    Raises:
        InputError: no file, compressed files, files with and without a part beside each other, a name that says two
            parts, several data sets in one folder.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        ...     (root / name).touch()
        >>> found, _ = files_by_part(root, ".tar", "webdataset:PATH")
        >>> {part: len(files) for part, files in found.items()}
        {'train': 2, 'validation': 1}
    """
    if path.is_file():
        return {"train": [path]}, ()
    below = sorted(path.rglob("*")) if path.is_dir() else []
    below = [file for file in below if not any(map(is_system, file.relative_to(path).parts)) and file.is_file()]
    packed = [file for file in below if file.name.endswith(tuple(f"{suffix}{each}" for each in _PACKED))]
    if packed:
        raise InputError(f"{packed[0]} is compressed: unpack the files (gunzip or the like) and give their folder")
    files = [file for file in below if file.name.endswith(suffix)]
    if not files:
        raise InputError(f"{path} is no {suffix} file and holds none: check the path, {usage}")
    found: dict[str | None, list[Path]] = {}
    above: dict[tuple[str, ...], Path] = {}
    for file in files:
        names = file.relative_to(path).parts
        parts = [_part_in(name, file) for name in (*names[:-1], file.name.removesuffix(suffix))]
        said = sorted({part for part in parts if part is not None})
        if len(said) > 1:
            raise InputError(f"the name of {file} says {' and '.join(said)}: rename it, so that it says one part")
        found.setdefault(said[0] if said else None, []).append(file)
        if said:  # what lies above the part is the name of a data set
            above.setdefault(names[: parts.index(said[0])], file)
    unnamed = found.pop(None, [])
    if unnamed and found:
        raise InputError(f"{unnamed[0]} is of no part, beside files of {' and '.join(map(str, found))}: name its part")
    if len(above) > 1:
        one, other, *_ = above.values()
        raise InputError(f"{one} and {other} lie in folders that may be two data sets: give one of the folders")
    if unnamed:
        folders = sorted({f"{file.relative_to(path).parts[0]}/" for file in unnamed if file.parent != path})
        return {"train": unnamed}, (f"{', '.join(folders)}: read together",) if len(folders) > 1 else ()
    if "train" not in found:
        raise InputError(f"{path} holds files of {' and '.join(map(str, found))} but none for training: give that, too")
    return {part: found[part] for part in PARTS if part in found}, _missing_files(files)


def _part_in(name: str, file: Path) -> str | None:
    """The part that a name, or a word in it, stands for."""
    whole = part_of(name)
    said = {part for word in re.split(r"[^a-z]+", name.lower()) if (part := part_of(word)) is not None}
    if whole is None and len(said) > 1:
        raise InputError(f"the name of {file} says {' and '.join(sorted(said))}: rename it, so that it says one part")
    return whole or next(iter(said), None)


def _missing_files(files: Sequence[Path]) -> tuple[str, ...]:
    """What is missing of files called NAME-00000-of-00002, in words."""
    counts: dict[tuple[str, int], int] = {}
    for file in files:
        numbered = re.match(r"(.*)-\d+-of-(\d+)\.", file.name)
        if numbered:
            key = numbered[1], int(numbered[2])
            counts[key] = counts.get(key, 0) + 1
    return tuple(
        f"{readable(name)}: {count} of {total} files are there"
        for (name, total), count in counts.items()
        if count < total
    )


def label_array(values: Sequence[object], where: str) -> np.ndarray:
    """Labels as they stand in files, as an array, if all of them are of one kind.

    Args:
        values: whole numbers, numbers, booleans or text, or lists of numbers of one length.
        where: they stand, for messages.

    Returns:
        [n], or [n, q] of lists.

    Raises:
        InputError: values of several or other kinds, lists of several lengths.

    Example:
        >>> label_array(["cat", "dog"], "labels").tolist(), label_array([[0, 1], [1, 1]], "labels").shape
        (['cat', 'dog'], (2, 2))
    """
    kinds = {type(value) for value in values}
    if kinds == {list}:
        rows = [value for value in values if isinstance(value, list)]
        lengths = sorted({len(row) for row in rows})
        inside = {type(each) for row in rows for each in row}
        if len(lengths) == 1 and (inside <= {int, float} or inside == {bool}):
            return np.array(rows)
        raise InputError(
            f"{where} are lists of {' or '.join(map(str, lengths[:5]))} values: give one label for each image, or "
            "lists of numbers of one length"
        )
    if kinds <= {int, float} or kinds in ({bool}, {str}):
        return np.array(values)
    found = " and ".join(sorted("nothing" if kind is type(None) else kind.__name__ for kind in kinds))
    raise InputError(f"{where} are {found}: give whole numbers, numbers or text, of one kind for all images")


def number_labels(
    parts: Mapping[str, np.ndarray], names: Sequence[str] | None, key: str, where: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...], tuple[str, ...]]:
    """Class numbers and names of the labels of all parts.

    A part for tests or validation whose images have no labels is left out: there is nothing in it, or only -1.

    Args:
        parts: by train, validation, test: [n] whole numbers or text, or numbers, [n] or [n, q].
        names: of the classes 0, 1, ..., or None where the labels are all that is known.
        key: the name under which the labels stand.
        where: the labels stand, for messages.

    Returns:
        Labels of the parts that are left, [n] int64 or [n, q] float64; names of the classes or columns; notes in words.

    Raises:
        InputError: no training image, labels that are not in ``names``, classes without training images.

    Example:
        >>> number_labels({"train": np.array([4, 7]), "test": np.array([-1])}, None, "label", "labels")
        ({'train': array([0, 1])}, ('4', '7'), ('the test part is passed over: it has no labels',))
    """
    if not len(parts["train"]):
        raise InputError(f"{where}: the training part holds no image")
    bare = [
        part
        for part, labels in parts.items()
        if part != "train"
        and (not len(labels) or (labels.ndim == 1 and labels.dtype.kind == "i" and (labels == -1).all()))
    ]
    notes = tuple(f"the {part} part is passed over: it has no labels" for part in bare)
    kept = {part: check_task(labels, where) for part, labels in parts.items() if part not in bare}
    train = kept["train"]
    if train.ndim != 1:
        several = train.shape[1] > 1
        return kept, tuple(f"{key} {i}" if several else key for i in range(train.shape[1])), notes
    if any(labels.ndim != 1 for labels in kept.values()):
        raise InputError(f"{where} are classes in the training part and other targets in another")
    if names is None:
        try:
            encoded, found = encode_labels(*kept.values())
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return dict(zip(kept, encoded, strict=True)), found, notes
    for part, numbers in kept.items():
        if numbers.dtype.kind != "i" or numbers.min() < 0 or numbers.max() >= len(names):
            low, high = numbers.min(), numbers.max()
            raise InputError(
                f"{where}: those of the {part} part run from {low} to {high} for {len(names)} classes: leave out "
                "images that have no label"
            )
        unseen = np.setdiff1d(numbers, train)
        if unseen.size:
            raise InputError(
                f"{where}: the {part} part has {names[unseen[0]]}, of which training has no images: train on it or "
                "leave it out"
            )
    unused = [name for i, name in enumerate(names) if i not in train]
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        notes += (f"there is no image of {', '.join(unused[:5])}{more}",)
    return kept, tuple(names), notes


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
