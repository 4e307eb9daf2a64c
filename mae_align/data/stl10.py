"""STL-10 as its authors give it: binary files of 96 x 96 pictures, column by column."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mae_align.data.dataset import ImageDataset
from mae_align.runtime.errors import InputError

_SIDE = 96


def load_stl10(folder: Path) -> ImageDataset:
    """The data set of the unpacked download ``stl10_binary``; the pictures without labels are passed over.

    Args:
        folder: with ``train_X.bin``, ``train_y.bin``, ``test_X.bin``, ``test_y.bin`` and ``class_names.txt``, or the
            one in which ``stl10_binary`` lies.

    Returns:
        5,000 training and 8,000 test images [n, 96, 96, 3] uint8.

    Raises:
        InputError: a missing or damaged file, images and labels of different number.

    Example:
        >>> load_stl10(Path("/nowhere"))
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: no folder /nowhere: give the unpacked folder, stl10:DIR
    """
    folder = folder / "stl10_binary" if (folder / "stl10_binary").is_dir() else folder
    packed = folder if folder.is_file() else folder / "stl10_binary.tar.gz"
    if packed.is_file() and not (folder / "train_X.bin").exists():
        raise InputError(f"{packed} is not unpacked: unpack it (tar xzf) and give its folder, stl10:DIR")
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: give the unpacked folder, stl10:DIR")
    names = _bytes(folder / "class_names.txt").decode("utf-8", "replace").split()
    fields = {}
    for part in ("train", "test"):
        fields[f"{part}_images"], fields[f"{part}_labels"] = _part(folder, part)
    notes = ("unlabeled_X.bin is passed over: it has no labels",) if (folder / "unlabeled_X.bin").exists() else ()
    try:
        return ImageDataset(**fields, class_names=tuple(names), name="stl10", notes=notes)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 96, 96, 3] and labels [n] from 0."""
    pixels, labels = (np.frombuffer(_bytes(folder / f"{part}_{what}.bin"), np.uint8) for what in ("X", "y"))
    if not pixels.size or pixels.size != len(labels) * 3 * _SIDE * _SIDE:
        raise InputError(
            f"{folder / f'{part}_X.bin'} has {pixels.size} bytes for {len(labels)} labels: unpack the download again"
        )
    if labels.min() < 1:
        raise InputError(
            f"{folder / f'{part}_y.bin'} holds a label 0, and labels are from 1: unpack the download again"
        )
    images = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 3, 2, 1)
    return np.ascontiguousarray(images), labels.astype(np.int64) - 1


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no file {path}: unpack the download again, stl10:DIR") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
