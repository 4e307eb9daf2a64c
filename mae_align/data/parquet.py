"""Parquet files with images, as the library ``datasets`` of Hugging Face writes them."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mae_align.data.argument import path_and_choices
from mae_align.data.dataset import readable
from mae_align.data.records import Records, files_by_part, label_array, number_labels, record_splits
from mae_align.data.resize import ImageSize
from mae_align.data.source import Splits
from mae_align.runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

USAGE = "parquet:PATH"
KEYS = ("image", "label")
_LABELS = ("label", "labels", "class", "category", "fine_label")
# Groups of rows that are held at a time.
_HELD = 8


def open_parquet(argument: str, image_size: ImageSize | None, seed: int, test_fraction: float) -> Splits:
    """The images of Parquet files, decoded when they are read.

    A column of images holds the bytes of image files, alone or as {bytes, path}. The columns are known by what the
    library wrote about them (Image, ClassLabel), else by their types and names; where that is not certain, say it:
    ``parquet:DIR:image=COLUMN:label=COLUMN``. Parts are known by the names of folders or files.

    Args:
        argument: a file or a folder, and the choices.
        image_size: side of a square, or (height, width), in pixels, or None to keep the images as they are.
        seed: of the split, where no part is for tests.
        test_fraction: share of the test images, likewise.

    Returns:
        Sources of images. Up to eight groups of rows are in memory. A group, often 100 MB, is read for one image of it:
        to train in random order on more than memory holds, tar files or a folder are faster.

    Raises:
        InputError: pyarrow is not installed, a missing or damaged file, columns that are not certain, labels that are
            missing, an unreadable image.

    Example:
        >>> open_parquet("/nowhere", None, seed=0, test_fraction=0.2)
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: /nowhere is no .parquet file and holds none: check the path, parquet:PATH
    """
    path, choices = path_and_choices(argument, USAGE, KEYS)
    files, notes = files_by_part(path, ".parquet", USAGE)
    tables = {part: [_open(file) for file in of_part] for part, of_part in files.items()}
    first = tables["train"][0]
    for table in itertools.chain.from_iterable(tables.values()):
        if table.columns.keys() != first.columns.keys():
            raise InputError(f"{table.path} and {first.path} have other columns: give files of one data set")
    image = _image_column(first, choices.get("image"))
    label = _label_column(first, image, choices.get("label"))
    names = _class_names(first, label)
    for table in itertools.chain.from_iterable(tables.values()):
        if _class_names(table, label) != names:
            raise InputError(f"{table.path} and {first.path} name other classes: give files of one data set")
    values = {part: _labels(of_part, label, part) for part, of_part in tables.items()}
    labels, names, more = number_labels(values, names, label, f"{label} of {path}")
    passed = [name for name in first.columns if name not in (image, label)]
    notes = (
        *notes,
        f"column {image} holds the images, {label} the labels",
        *[f"passed over: {', '.join(passed)}"] * bool(passed),
        *more,
    )
    return record_splits(
        {part: Records(*_readers(tables[part], image), labels[part], files[part], (image, label)) for part in labels},
        tuple(readable(str(each)) for each in names),
        readable(path.stem if path.is_file() else path.resolve().name),
        notes,
        image_size=image_size,
        seed=seed,
        test_fraction=test_fraction,
    )


class _Table(NamedTuple):
    """What is known of a file: its columns by name, what ``datasets`` says of them, rows of each group."""

    path: Path
    columns: dict[str, pa.DataType]
    features: dict[str, Any]
    groups: tuple[int, ...]

    def said(self, column: str) -> dict[str, Any]:
        """What ``datasets`` says of a column."""
        found = self.features.get(column)
        return found if isinstance(found, dict) else {}


def _open(path: Path) -> _Table:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError("parquet: needs pyarrow, which is not installed: pip install -e '.[parquet]'") from None
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    except Exception as error:  # damage shows as whatever the reader stumbles on
        raise _damaged(path, error) from None
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError):
        features = {}  # not written by `datasets`
    columns = dict(zip(schema.names, schema.types, strict=True))
    return _Table(path, columns, features if isinstance(features, dict) else {}, groups)


def _damaged(path: Path, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"{path} is damaged or no Parquet file ({reason}): fetch it again")


def _class_names(table: _Table, label: str) -> tuple[str, ...] | None:
    """Names of the classes, where ``datasets`` wrote them."""
    names = table.said(label).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else None


def _image_column(table: _Table, chosen: str | None) -> str:
    """The column of images."""
    found = [name for name, kind in table.columns.items() if _holds_bytes(kind)]
    said = [name for name in found if table.said(name).get("_type") == "Image"]
    if chosen is not None:
        found = [name for name in found if name == chosen]
    elif said:
        found = said
    if len(found) != 1:
        raise InputError(
            f"{table.path} has columns {', '.join(table.columns)}, of which {len(found)} may be the images: write "
            f"{USAGE}:image=COLUMN, a column of bytes or of {{bytes, path}}"
        )
    return found[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_column(table: _Table, image: str, chosen: str | None) -> str:
    """The column of labels."""
    others = [name for name in table.columns if name != image]
    said = [name for name in others if table.said(name).get("_type") == "ClassLabel"]
    found = [chosen] if chosen is not None else said or [name for name in others if name.lower() in _LABELS]
    if len(found) != 1 or found[0] not in others:
        count = len(set(found) & set(others))
        raise InputError(
            f"{table.path} has columns {', '.join(table.columns)}, of which {count} may be the labels: write "
            f"{USAGE}:label=COLUMN"
        )
    return found[0]


def _labels(tables: Sequence[_Table], label: str, part: str) -> np.ndarray:
    """Labels of all files of a part, as they stand there; none where every row of a part for tests is empty."""
    import pyarrow.parquet as pq

    found, empty = [], 0
    for table in tables:
        try:
            with pq.ParquetFile(table.path) as file:
                column = file.read(columns=[label]).column(label)
        except Exception as error:  # damage shows as whatever the reader stumbles on
            raise _damaged(table.path, error) from None
        found += column.to_pylist()
        empty += column.null_count
    if empty and empty == len(found) and part != "train":
        return np.zeros(0, np.int64)
    if empty:
        row = found.index(None)
        raise InputError(
            f"{label} of {tables[0].path.parent} is empty in {empty} row(s) of the {part} part, the first is row {row} "
            "counted from 0: leave these images out"
        )
    return label_array(found, f"{label} of {tables[0].path}") if found else np.zeros(0, np.int64)


def _readers(tables: Sequence[_Table], image: str) -> tuple[Any, Any]:
    """Functions of a position: the content of the image, and where it lies."""
    import pyarrow.parquet as pq

    groups: list[tuple[Path, int, int]] = []  # file, group, rows of the file before it
    for table in tables:
        before = itertools.accumulate(table.groups, initial=0)
        groups += [(table.path, group, rows) for group, rows in zip(range(len(table.groups)), before, strict=False)]
    ends = list(itertools.accumulate(rows for table in tables for rows in table.groups))
    one_at_a_time = threading.Lock()

    @functools.lru_cache(maxsize=_HELD)
    def column(at: int) -> Any:
        path, group, _ = groups[at]
        try:
            with pq.ParquetFile(path) as file:
                return file.read_row_group(group, columns=[image]).column(image)
        except Exception as error:  # damage shows as whatever the reader stumbles on
            raise _damaged(path, error) from None

    def place(i: int) -> tuple[int, int]:
        at = bisect.bisect_right(ends, i)
        return at, i - (ends[at - 1] if at else 0)

    def where(i: int) -> str:
        at, row = place(i)
        path, _, before = groups[at]
        return f"row {before + row} of {path}"

    def read(i: int) -> bytes:
        at, row = place(i)
        with one_at_a_time:  # threads that ask for images of one group read it once
            values = column(at)
        value = values[row].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise InputError(f"{where(i)} has no image in it, perhaps a path alone: write the images into the file")
        return content

    return read, where
