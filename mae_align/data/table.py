"""A table of image files and what is asked about them: one row per image, as Kaggle and CelebA give them."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mae_align.data.argument import path_and_choices
from mae_align.data.dataset import check_columns, encode_labels, readable
from mae_align.data.folder import picture_splits
from mae_align.data.layout import PARTS, SUFFIXES, Files, part_of
from mae_align.data.resize import ImageSize
from mae_align.data.source import Splits
from mae_align.runtime.errors import InputError

USAGE = "table:FILE.csv"
KEYS = ("image", "images", "classes", "targets", "part")
# Columns that say what they are by their name, in lower case.
_PART_NAMES = frozenset({"split", "partition", "part", "subset", "set"})
_CLASS_NAMES = frozenset({"label", "labels", "class", "classes", "class_id", "category"})
Table = dict[str, np.ndarray]
"""Cells of every column, [n] text, by name."""
# CelebA's list of partitions.
_CELEBA_PARTS = {"0": "train", "1": "validation", "2": "test"}
_SHOWN = 5


def open_table(argument: str, image_size: ImageSize | None, seed: int, test_fraction: float) -> Splits:
    r"""The images that the rows of a CSV or TSV file name, decoded when they are read.

    The columns are found by what they hold. One names image files, relative to the table's folder. One may say the
    part, by a name of :func:`mae_align.data.layout.part_of` (or CelebA's 0, 1, 2 in a column ``partition``). All others
    are what is asked: one column of text, or of whole numbers that is called label, class or category, gives classes;
    columns of decimal numbers, or of 0 and 1 (or -1 and 1), give targets. Where that is not certain, say it behind the
    file's name: ``table:faces.csv:targets=age,male``, ``:classes=species``, ``:image=file``, ``:images=FOLDER``,
    ``:part=fold``; other columns are then passed over.

    Args:
        argument: the file and the choices.
        image_size: side of a square, or (height, width), in pixels, or None to keep the images as they are.
        seed: of the split, where no part is for tests.
        test_fraction: share of the test images, likewise.

    Returns:
        Sources of images as :func:`mae_align.data.folder.open_folder` reads them. Labels are classes [n], or targets
        [n, q] float64. The notes say which column was read as what.

    Raises:
        InputError: a file, column or image that is missing, values that are empty, columns that can be read in two
            ways, an image that is named twice.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for i in range(4):
        ...     Image.new("L", (6, 4), i).save(root / f"{i}.png")
        >>> text = "file,age,part\n0.png,31.5,train\n1.png,8.2,train\n2.png,17.0,test\n3.png,60.5,test\n"
        >>> (root / "faces.csv").write_text(text) > 0
        True
        >>> splits = open_table(str(root / "faces.csv"), None, seed=0, test_fraction=0.5)
        >>> splits.train.class_names, splits.test.labels().tolist()
        (('age',), [[17.0], [60.5]])
    """
    path, choices = path_and_choices(argument, USAGE, KEYS)
    table = _read(path)
    unknown = [name for key in KEYS if key != "images" for name in _names(choices, key) if name not in table]
    if unknown:
        raise InputError(f"{path} has no column {unknown[0]!r}: it has {', '.join(table)}")
    image, files = _image_files(table, path, choices)
    part, parts = _parts({name: cells for name, cells in table.items() if name != image}, path, choices)
    rest = {name: cells for name, cells in table.items() if name not in (image, part)}
    found = {each: np.flatnonzero(parts == each) for each in PARTS if (parts == each).any()}
    if "train" not in found:
        raise InputError(f"column {part} of {path} has no row for training: write train, validation or test in it")
    # Training comes first: the classes are those of its images.
    order = {each: found[each] for each in ("train", *[each for each in found if each != "train"])}
    chosen, labels, names, kind = _asked(rest, path, choices, list(order.values()))
    passed = [name for name in rest if name not in chosen]
    notes = [f"column {image} names the images", f"{_listed(chosen)}: {kind}"]
    notes += [f"column {part} says the part"] if part else []
    notes += [f"passed over: {_listed(passed)}"] if passed else []
    of_parts = zip(order.items(), labels, strict=True)
    return picture_splits(
        {each: Files([files[i] for i in rows], of_part) for (each, rows), of_part in of_parts},
        tuple(map(readable, names)),
        readable(path.stem),
        tuple(notes),
        image_size=image_size,
        seed=seed,
        test_fraction=test_fraction,
    )


def _read(path: Path) -> Table:
    """The table; empty cells are empty text."""
    if not path.is_file():
        raise InputError(f"no file {path}: check the path, {USAGE}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",") if row]
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table ({error}): give CSV or TSV in UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
    if rows and len(rows[0]) == 1 and (other := next((sign for sign in ";\t|" if sign in rows[0][0]), None)):
        raise InputError(
            f"{path} separates its columns by {other!r}: write commas, or tabs in a file that ends in .tsv"
        )
    if len(rows) < 2 or len(rows[0]) < 2:
        raise InputError(
            f"{path} has {max(len(rows) - 1, 0)} row(s) and {len(rows[0]) if rows else 0} column(s): give a line of "
            "names, then a row per image"
        )
    names = [name.strip() for name in rows[0]]
    if len(set(names)) < len(names):
        raise InputError(f"{path} has two columns of one name ({', '.join(names)}): give each a name of its own")
    for at, row in enumerate(rows[1:], 1):
        if len(row) != len(names):
            raise InputError(f"row {at} of {path} has {len(row)} cells for {len(names)} columns: repair the file")
    table = {name: np.array([cell.strip() for cell in cells]) for name, *cells in zip(names, *rows[1:], strict=True)}
    # Row numbers without a name, as pandas writes them.
    if table.get("", np.zeros(0)).tolist() == [str(i) for i in range(len(rows) - 1)]:
        del table[""]
    return table


def _names(choices: Mapping[str, str], key: str) -> list[str]:
    """The columns that a choice names."""
    return [name.strip() for name in choices.get(key, "").split(",") if name.strip()]


def _listed(names: Sequence[object]) -> str:
    """The first of some names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more


def _image_files(table: Table, path: Path, choices: Mapping[str, str]) -> tuple[str, list[Path]]:
    """The column of images and the file of every row."""
    folder = path.parent / choices.get("images", ".")
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: write where the images of {path} lie, {USAGE}:images=FOLDER")
    naming = [name for name in table if _file(folder, table[name][0]) is not None]
    # A number may happen to be the name of a file without its suffix.
    whole = [name for name in naming if table[name][0].lower().endswith(SUFFIXES)]
    candidates = _names(choices, "image") or (whole if len(whole) == 1 else naming)
    if len(candidates) != 1:
        held = "several columns name" if candidates else "no column names"
        raise InputError(
            f"{held} image files in {folder} ({_listed(candidates or list(table))}): write the one that does, "
            f"{USAGE}:image=COLUMN, and where they lie, {USAGE}:images=FOLDER"
        )
    (column,) = candidates
    files: list[Path] = []
    for at, cell in enumerate(table[column], 1):
        file = _file(folder, cell)
        if file is None:
            raise InputError(
                f"row {at} of {path}: no image {str(cell)!r} in {folder}: add the file, or leave the row out"
            )
        files.append(file)
    values, counts = np.unique(table[column], return_counts=True)
    if counts.max() > 1:
        raise InputError(f"{path} names {values[counts.argmax()]} in several rows: give one row per image")
    return column, files


def _file(folder: Path, cell: str) -> Path | None:
    """The image file that a cell names, with its suffix or without."""
    file = folder / str(cell)
    if not cell or cell.lower().endswith(SUFFIXES):
        return file if cell and file.is_file() else None
    found = [each for each in (file.with_name(file.name + suffix) for suffix in SUFFIXES) if each.is_file()]
    return found[0] if len(found) == 1 else None


def _parts(table: Table, path: Path, choices: Mapping[str, str]) -> tuple[str | None, np.ndarray]:
    """The column that says the part, or None, and the part of every row."""
    candidates = _names(choices, "part") or [name for name in table if name.lower() in _PART_NAMES]
    if not candidates:
        return None, np.full(len(next(iter(table.values()))), "train")
    if len(candidates) > 1:
        raise InputError(f"{path} has {' and '.join(candidates)}: write which says the part, {USAGE}:part=COLUMN")
    column, cells = candidates[0], table[candidates[0]]
    celeba = column.lower() == "partition" and set(cells) <= set(_CELEBA_PARTS)
    parts = [_CELEBA_PARTS[cell] if celeba else part_of(cell) for cell in cells.tolist()]
    for at, (part, cell) in enumerate(zip(parts, cells, strict=True), 1):
        if part is None:
            raise InputError(
                f"row {at} of {path}: {column} is {str(cell)!r}, which names no part: write train, validation or test, "
                f"or say which column does, {USAGE}:part=COLUMN"
            )
    return column, np.array(parts)


def _asked(
    table: Table, path: Path, choices: Mapping[str, str], parts: Sequence[np.ndarray]
) -> tuple[list[str], list[np.ndarray], tuple[str, ...], str]:
    """Columns that are asked about, labels of every part, names of classes or columns, and what they are in words."""
    classes, targets = _names(choices, "classes"), _names(choices, "targets")
    if (classes and targets) or len(classes) > 1:
        raise InputError(f"{path}: give classes=COLUMN, or targets=COLUMN,COLUMN")
    chosen, as_classes = (classes or targets, bool(classes)) if classes or targets else _found(table, path)
    for name in chosen:
        if len(empty := np.flatnonzero(table[name] == "") + 1):
            raise InputError(
                f"{path}: {name} is empty in row(s) {_listed(empty.tolist())}: fill it in, or leave these images out"
            )
    if as_classes:
        cells = table[chosen[0]]
        whole = all(re.fullmatch(r"[+-]?\d{1,18}", cell) for cell in cells)
        try:
            labels, names = encode_labels(*((cells.astype(np.int64) if whole else cells)[rows] for rows in parts))
        except InputError as error:
            raise InputError(f"{path}: {chosen[0]}: {error}") from None
        return chosen, labels, names, f"{len(names)} classes"
    columns = []
    for name in chosen:
        numbers = _numbers(table[name])
        if numbers is None:
            raise InputError(f"{path}: {name} does not hold numbers alone: write {USAGE}:classes={name} for classes")
        if len(odd := np.flatnonzero(~np.isfinite(numbers)) + 1):
            raise InputError(f"{path}: {name} is no number in row(s) {_listed(odd.tolist())}: leave these images out")
        columns.append(numbers)
    labels = check_columns(np.stack(columns, 1), f"{_listed(chosen)} of {path}")
    kind = "attributes" if np.isin(labels, (0, 1)).all() else "numbers"
    return chosen, [labels[rows] for rows in parts], tuple(chosen), kind


def _found(table: Table, path: Path) -> tuple[list[str], bool]:
    """The columns that are asked about where none was named, and whether they are classes."""
    numbers = {name: _numbers(cells) for name, cells in table.items()}
    as_classes = [name for name, values in numbers.items() if values is None or name.lower() in _CLASS_NAMES]
    say = f"write {USAGE}:classes=COLUMN for classes, or {USAGE}:targets=COLUMN,COLUMN for numbers and attributes"
    for name, cells in table.items():
        are_numbers = [_numbers(np.array([cell])) is not None for cell in cells if cell]
        odd = [
            cell
            for cell in cells
            if cell and (re.fullmatch(r"[+-]?\d+,\d+", cell) or _numbers(np.array([cell])) is None)
        ]
        if odd and (any(are_numbers) or all(re.fullmatch(r"[+-]?\d+,\d+", cell) for cell in odd)):
            raise InputError(
                f"{path}: {name} holds {str(odd[0])!r} among numbers: write an empty cell where nothing is known and a "
                f"point before decimals, or {USAGE}:classes={name} if these are classes"
            )
    if as_classes and len(table) == 1:
        return as_classes, True
    if as_classes or not table:
        raise InputError(f"{path} can be read in several ways (columns {_listed(list(table))}): {say}")
    for name, values in numbers.items():
        known = np.zeros(0) if values is None else values[~np.isnan(values)]
        if not (np.isin(known, (0, 1)).all() or np.isin(known, (-1, 1)).all()) and (known == np.round(known)).all():
            raise InputError(f"{path}: {name} holds whole numbers, which may be classes or numbers: {say}")
    return list(table), False


def _numbers(cells: np.ndarray) -> np.ndarray | None:
    """A column as float64, NaN where it is empty; None where something in it is no number."""
    try:
        return np.array([float(cell or "nan") for cell in cells])
    except ValueError:
        return None
