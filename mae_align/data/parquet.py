"""Parquet files with images, as the library ``datasets`` of Hugging Face writes them."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mae_align.data.argument import path_and_choices
from mae_align.data.dataset import check_task, encode_labels, readable
from mae_align.data.records import Records, files_by_part, record_splits
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
        Sources of images. Up to eight groups of rows are in memory.

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
    files = files_by_part(path, ".parquet", USAGE)
    tables = {part: [_open(file) for file in of_part] for part, of_part in files.items()}
    first = next(itertools.chain.from_iterable(tables.values()))
    for table in itertools.chain.from_iterable(tables.values()):
        if table.columns.keys() != first.columns.keys():
            raise InputError(f"{table.path} and {first.path} have other columns: give files of one data set")
    image = _image_column(first, choices.get("image"))
    label = _label_column(first, image, choices.get("label"))
    values = {part: _labels(of_part, label) for part, of_part in tables.items()}
    names = first.features.get(label, {}).get("names")
    if names is not None:
        for part, numbers in values.items():
            if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(names)):
                raise InputError(
                    f"{label} of the {part} part of {path} holds {numbers.min()}: leave out what has no label"
                )
    elif next(iter(values.values())).ndim == 1:
        encoded, names = encode_labels(*values.values())
        values = dict(zip(values, encoded, strict=True))
    passed = [name for name in first.columns if name not in (image, label)]
    notes = (
        f"column {image} holds the images, {label} the labels",
        *[f"passed over: {', '.join(passed)}"] * bool(passed),
    )
    records = {part: Records(*_readers(of_part, image), values[part], files[part]) for part, of_part in tables.items()}
    return record_splits(
        records,
        tuple(readable(str(each)) for each in names or (label,)),
        readable(path.stem if path.is_file() else path.resolve().name),
        notes,
        image_size=image_size,
        seed=seed,
        test_fraction=test_fraction,
    )


class _Table(NamedTuple):
    """What is known of a file: its reader, its columns by name, what ``datasets`` says of them."""

    path: Path
    file: Any
    columns: dict[str, pa.DataType]
    features: dict[str, dict[str, Any]]


def _open(path: Path) -> _Table:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError("reading Parquet files needs pyarrow: pip install pyarrow") from None
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except Exception as error:  # damage shows as whatever the reader stumbles on
        raise InputError(f"{path} is damaged or no Parquet file ({str(error).splitlines()[0]})") from None
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    return _Table(path, file, dict(zip(schema.names, schema.types, strict=True)), features)


def _image_column(table: _Table, chosen: str | None) -> str:
    """The column of images."""
    import pyarrow as pa

    found = [name for name, kind in table.columns.items() if _holds_bytes(kind)]
    said = [name for name in found if table.features.get(name, {}).get("_type") == "Image"]
    if chosen is not None:
        found = [name for name in found if name == chosen]
    elif said:
        found = said
    if len(found) != 1:
        raise InputError(
            f"{table.path} has columns {', '.join(table.columns)}, of which {len(found)} may be the images: write "
            f"{USAGE}:image=COLUMN, a column of bytes or of {{bytes, path}}"
        )
    assert isinstance(table.columns[found[0]], pa.DataType)
    return found[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_column(table: _Table, image: str, chosen: str | None) -> str:
    """The column of labels."""
    others = [name for name in table.columns if name != image]
    said = [name for name in others if table.features.get(name, {}).get("_type") == "ClassLabel"]
    found = [chosen] if chosen is not None else said or [name for name in others if name.lower() in _LABELS]
    if len(found) != 1 or found[0] not in others:
        count = len(set(found) & set(others))
        raise InputError(
            f"{table.path} has columns {', '.join(table.columns)}, of which {count} may be the labels: write "
            f"{USAGE}:label=COLUMN"
        )
    return found[0]


def _labels(tables: Sequence[_Table], label: str) -> np.ndarray:
    """Labels of all files: classes [n] as int64 or text, or targets [n, q] as float64."""
    found = []
    for table in tables:
        column = table.file.read(columns=[label]).column(label)
        if column.null_count:
            raise InputError(f"{label} of {table.path} is empty in {column.null_count} row(s): leave these images out")
        found.append(np.array(column.to_pylist()))
    return check_task(np.concatenate(found), f"{label} of {tables[0].path}")


def _readers(tables: Sequence[_Table], image: str) -> tuple[Any, Any]:
    """Functions of a position: the content of the image, and where it lies."""
    groups = [
        (table, group, table.file.metadata.row_group(group).num_rows)
        for table in tables
        for group in range(table.file.metadata.num_row_groups)
    ]
    ends = list(itertools.accumulate(rows for _, _, rows in groups))

    @functools.lru_cache(maxsize=_HELD)
    def column(at: int) -> Any:
        import pyarrow.parquet as pq

        table, group, _ = groups[at]
        # A reader of its own: one is not to be used by several threads.
        found = pq.ParquetFile(table.path).read_row_group(group, columns=[image]).column(image)
        return found.combine_chunks()

    def place(i: int) -> tuple[int, int]:
        at = bisect.bisect_right(ends, i)
        return at, i - (ends[at - 1] if at else 0)

    def where(i: int) -> str:
        at, row = place(i)
        table, group, _ = groups[at]
        before = sum(table.file.metadata.row_group(g).num_rows for g in range(group))
        return f"row {before + row} of {table.path}"

    def read(i: int) -> bytes:
        at, row = place(i)
        value = column(at)[row].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise InputError(f"{where(i)} has no image in it, perhaps a path alone: write the images into the file")
        return content

    return read, where
