"""What a folder of image files means: which sub-folders are parts of the data, which are classes, what is no image."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_align.runtime.errors import InputError

SUFFIXES = tuple(".bmp .gif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
PARTS = ("train", "validation", "test")
# Names of parts, in lower case, without "set" or "data" at their end.
_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validate", "validation", "dev", "development", "eval", "evaluation"), "validation"
    ),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What systems and programs leave in folders; hidden names are passed over, too.
_SYSTEM = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db"})
_SHOWN = 5


class Files(NamedTuple):
    """Image files of one part and their labels.

    Attributes:
        paths: n files.
        labels: [n] int64 class numbers, or [n, q] float64 targets.
    """

    paths: list[Path]
    labels: np.ndarray


class Layout(NamedTuple):
    """What a folder was read as.

    Attributes:
        classes: names of the classes.
        parts: files by train, validation, test; the first is always there.
        notes: in words, what is not as plain as it could be: names that were taken for parts, files passed over.
    """

    classes: tuple[str, ...]
    parts: dict[str, Files]
    notes: tuple[str, ...]


def part_of(name: str) -> str | None:
    """The part of the data that a folder's name stands for: train, validation, test, or None.

    Example:
        >>> [part_of(name) for name in ("Training", "test_set", "dev", "VAL", "cat")]
        ['train', 'test', 'validation', 'validation', None]
    """
    word = re.sub(r"[\s_-]*(set|data|images|imgs)$", "", name.lower())
    return _NAMES.get(word, _NAMES.get(name.lower()))


def read_layout(root: Path) -> Layout:
    """Classes, parts and files of a folder.

    Either ``root/CLASS/...``, or ``root/PART/CLASS/...`` with a part for training and others. A part is known by its
    name, in any case: train, training; test, testing; val, valid, validate, validation, dev, eval; each also with
    "set" at its end. A class may be called like a part, where no class folders lie in it. Files of a part without
    class folders are read if an annotations file says their classes, as in Tiny ImageNet; else they are passed over.

    Args:
        root: the folder.

    Returns:
        The layout; a part is left out where there is none.

    Raises:
        InputError: a folder that can be read in two ways or in none, fewer than two classes, classes without training
            images.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for file in ("Training/cat/1.png", "Training/dog/1.png", "valid/cat/2.png"):
        ...     (root / file).parent.mkdir(parents=True, exist_ok=True)
        ...     (root / file).touch()
        >>> layout = read_layout(root)
        >>> layout.classes, {name: len(files.paths) for name, files in layout.parts.items()}
        (('cat', 'dog'), {'train': 2, 'validation': 1})
    """
    passed = _Passed(root)
    folders = _part_folders(root, passed)
    if folders is None:
        classes = _classes(root)
        parts = {"train": _of_classes(root, classes, passed)}
        return Layout(classes, parts, tuple(passed.notes()))
    train = folders.pop("train")
    classes = _classes(train)
    parts = {"train": _of_classes(train, classes, passed)}
    notes = [f"{train.name}/ is the training set"] if train.name != "train" else []
    for part, folder in folders.items():
        files = _held_out(folder, classes, train, passed)
        if files is None:
            notes.append(
                f"{folder.name}/ is passed over: its images lie in no class folders, so that they have no labels"
            )
            continue
        parts[part] = files
        notes += [f"{folder.name}/ is the {part} set"] if folder.name != part else []
        missing = [name for i, name in enumerate(classes) if i not in files.labels]
        if missing:
            notes.append(f"{folder.name}/ has no image of {_listed(missing)}")
    if not parts.keys() - {"train"} and folders:
        names = " and ".join(f"{folder.name}/" for folder in folders.values())
        raise InputError(
            f"{root}: the images of {names} lie in no class folders, so that they have no labels: sort them into class "
            f"folders, or name {train} alone to split it"
        )
    return Layout(classes, parts, (*notes, *passed.notes()))


def read_pictures(root: Path) -> tuple[dict[str, Files], tuple[str, ...]]:
    """Parts and files of a folder of pictures without labels.

    Args:
        root: the folder.

    Returns:
        Files by part, train among them, with labels [n, 0], and notes in words.

    Raises:
        InputError: fewer than two images.
    """
    passed = _Passed(root)
    folders = _sub_folders(root)
    names = {part: folder for folder in folders if (part := part_of(folder.name)) is not None}
    as_parts = len(names) == len(folders) and "train" in names and not _is_flat(root)
    if names and not as_parts:
        others = _listed([folder.name for folder in folders if part_of(folder.name) is None]) or "no train/"
        raise InputError(
            f"{root} holds {next(iter(names.values())).name}/ and {others}: if its folders are parts of the data, call "
            "them train, validation and test; if not, give each another name"
        )
    names, least = (names, 1) if as_parts else ({"train": root}, 2)
    found = {part: _images_below(folder, passed) for part, folder in names.items()}
    for part, paths in found.items():
        if len(paths) < least:
            raise InputError(f"{names[part]} holds {len(paths)} image file(s) ({' '.join(SUFFIXES)}): add some")
    if as_parts:
        notes = [f"{names[part].name}/ is the {part} set" for part in PARTS if part in names]
    else:
        notes = [f"{_listed([f'{folder.name}/' for folder in folders])}: read together"] * bool(folders)
    return {part: Files(paths, np.zeros((len(paths), 0))) for part, paths in found.items()}, (*notes, *passed.notes())


class _Passed:
    """Files and folders that are passed over, and why."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: dict[str, set[str]] = {}

    def add(self, why: str, path: Path) -> None:
        """Note one."""
        self.found.setdefault(why, set()).add(os.path.relpath(path, self.root))

    def notes(self) -> list[str]:
        """A line for each reason."""
        return [f"passed over, {why}: {_listed(sorted(names))}" for why, names in sorted(self.found.items())]


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def is_system(name: str) -> bool:
    """Whether a name is hidden, or one that systems leave in folders.

    Example:
        >>> [is_system(name) for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "cat")]
        [True, True, True, False]
    """
    return name.startswith(".") or name.lower() in _SYSTEM


def _sub_folders(folder: Path) -> list[Path]:
    """Sub-folders in the order of their names, without those of the system."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_system(path.name))


def _part_folders(root: Path, passed: _Passed) -> dict[str, Path] | None:
    """The folder of every part, train among them; None where the sub-folders are classes."""
    folders = _sub_folders(root)
    named = [(part_of(folder.name), folder) for folder in folders]
    like = [(part, folder) for part, folder in named if part is not None]
    others = [folder.name for part, folder in named if part is None]
    if not like:
        return None
    if others:
        # Class folders lie in a part; in a class lie images, however deep. CIFAR-100 has a class "train".
        holding = [folder for _, folder in like if _sub_folders(folder)]
        as_parts = "train" in [part for part, folder in like if folder in holding] and len(holding) > 1
        if not as_parts and not holding:
            return None
        inside = {path.name for folder in holding for path in _sub_folders(folder)}
        if not as_parts and not inside & set(others) and not any(part == "train" for part, _ in like):
            return None
        if not as_parts:
            raise InputError(
                f"{root} holds {holding[0].name}/ with folders in it beside {_listed(others)}: if it is a class, put "
                "no folders into it; if it is a part of the data, put the classes beside it into a folder train/"
            )
    found: dict[str, Path] = {}
    for part, folder in like:
        if part in found:
            raise InputError(
                f"{root} holds {found[part].name}/ and {folder.name}/, which both look like the {part} set: keep one"
            )
        found[part] = folder
    for name in others:
        passed.add("beside the parts", root / name)
    if "train" not in found:
        name = like[0][1].name
        raise InputError(f"{root} holds {name}/ but no train/: add it, or name {root / name} if classes lie in it")
    return found


def _is_flat(folder: Path) -> bool:
    """Whether images lie in a folder itself."""
    return any(_is_image(path.name) for path in folder.iterdir() if path.is_file())


def _is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(SUFFIXES) and not is_system(name)


def _classes(folder: Path) -> tuple[str, ...]:
    """Names of the classes."""
    classes = tuple(path.name for path in _sub_folders(folder))
    if len(classes) < 2:
        raise InputError(f"{folder} holds {len(classes)} sub-folder(s): give one sub-folder per class, at least two")
    return classes


def _of_classes(folder: Path, classes: Sequence[str], passed: _Passed, *, held_out: bool = False) -> Files:
    """All image files of the classes, in sorted order."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images_below(folder / name, passed)
        if not found and not held_out:
            raise InputError(
                f"{folder / name} holds no image file ({' '.join(SUFFIXES)}): add images, or remove the class from "
                "every part"
            )
        paths += found
        labels += [label] * len(found)
    return Files(paths, np.array(labels, np.int64))


def _images_below(folder: Path, passed: _Passed) -> list[Path]:
    """Image files in a folder and below it, sorted; all others are noted."""
    found: list[Path] = []
    for parent, inside, files in os.walk(folder):
        for name in [name for name in inside if is_system(name)]:
            passed.add("hidden or of the system", Path(parent, name))
            inside.remove(name)
        for name in files:
            if _is_image(name):
                found.append(Path(parent, name))
            else:
                passed.add("hidden or of the system" if is_system(name) else "no image file", Path(parent, name))
    return sorted(found)


def _held_out(folder: Path, classes: tuple[str, ...], train: Path, passed: _Passed) -> Files | None:
    """Files of a part that is not trained on; None where nothing says their classes."""
    inside = [path.name for path in _sub_folders(folder)]
    unknown = sorted(set(inside) - set(classes))
    annotated = _annotated(folder, classes, passed)
    if annotated is not None:
        return annotated
    if not set(inside) & set(classes) and (len(unknown) <= 1 or _is_flat(folder)):
        return None  # val/images/..., or images beside each other
    with_images = [name for name in unknown if _images_below(folder / name, passed)]
    if with_images:
        raise InputError(
            f"classes differ: {folder} has {_listed(with_images)}, of which {train} has no images: train on them or "
            "remove them"
        )
    files = _of_classes(folder, classes, passed, held_out=True)
    return files if files.paths else None


def _annotated(folder: Path, classes: tuple[str, ...], passed: _Passed) -> Files | None:
    """Files whose classes stand in an annotations file, a line for each: file, class, and whatever else."""
    lists = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith("_annotations.txt"))
    if not lists:
        return None
    (annotations, *_) = lists
    number = {name: i for i, name in enumerate(classes)}
    below = {path.name: path for path in _images_below(folder, _Passed(folder))}
    paths, labels = [], []
    with annotations.open(newline="", encoding="utf-8") as file:
        for at, row in enumerate(csv.reader(file, delimiter="\t"), 1):
            if len(row) < 2 or row[1] not in number or row[0] not in below:
                what = "no file and class" if len(row) < 2 else row[1] if row[1] not in number else row[0]
                raise InputError(f"line {at} of {annotations} names {what}, which is not there: repair the file")
            paths.append(below.pop(row[0]))
            labels.append(number[row[1]])
    for path in below.values():
        passed.add("not annotated", path)
    order = sorted(range(len(paths)), key=lambda i: (labels[i], paths[i]))
    return Files([paths[i] for i in order], np.array([labels[i] for i in order], np.int64))
