"""Folders of image files, one sub-folder per class."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mae_align.data import source
from mae_align.data.dataset import ImageShape
from mae_align.data.pictures import is_deep, with_channels
from mae_align.data.resize import resize_picture
from mae_align.data.source import ImageSource, Splits
from mae_align.data.split import stratified_split
from mae_align.runtime.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = tuple(".bmp .gif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())

_GREY_MODES = frozenset({"1", "L"})
_HELD_OUT_NAMES = ("test", "val", "validation")


class _Files(NamedTuple):
    """Image files of one split and their labels."""

    paths: list[Path]
    labels: np.ndarray


def open_folder(root: Path, image_size: int | None, seed: int, test_fraction: float) -> Splits:
    """The images of a folder with one sub-folder per class, decoded when they are read.

    Either ``root/CLASS/...`` (split at random within each class), or ``root/train/CLASS/...`` with
    ``root/test/CLASS/...`` (``val`` or ``validation`` where there is no ``test``). Classes are the
    names of the sub-folders in sorted order; images may lie deeper. Hidden names and files that are
    no images are left out.

    Images keep one channel if all of them are grey, else they become RGB; transparency is dropped.
    Without ``image_size`` all must have one size; with it the centre square of each is resized, see
    :func:`mae_align.data.resize.resize_picture`.

    Args:
        root: the folder.
        image_size: side in pixels, or None to keep the images as they are.
        seed: of the split, where there is no test folder.
        test_fraction: share of the test images, where there is no test folder.

    Returns:
        Sources of images [h, w, c] uint8, c = 1 or 3. Every file's header has been read.

    Raises:
        InputError: missing or empty folders, fewer than two classes, classes that differ between
            train and test, mixed sizes, more than 8 bits per channel, an unreadable image.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for file in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        ...         path = Path(folder) / "pets" / file
        ...         path.parent.mkdir(parents=True, exist_ok=True)
        ...         Image.new("RGB", (6, 4)).save(path)
        ...     splits = open_folder(Path(folder) / "pets", None, seed=0, test_fraction=0.5)
        ...     len(splits.train), splits.train.image_shape
        (2, (4, 6, 3))
    """
    if not root.is_dir():
        raise InputError(f"no folder {root}: give a folder with one sub-folder per class, folder:DIR")
    name = root.resolve().name
    train_root, test_root = _split_roots(root)
    classes = _class_folders(train_root)
    train = _list_files(train_root, classes)
    if test_root is None:
        # Split by the names, so that a message about a class can name it.
        parts = stratified_split(np.array(classes)[train.labels], test_fraction, seed)
        train, test = (_Files([train.paths[i] for i in part], train.labels[part]) for part in parts)
    else:
        _check_same_classes(classes, train_root, test_root)
        test = _list_files(test_root, classes)
    shape = _common_shape([*train.paths, *test.paths], image_size, name)
    pixels = np.dtype(np.uint8)
    return Splits(*(FolderSource(files, shape, image_size, tuple(classes), name, pixels) for files in (train, test)))


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(ImageSource):
    """Image files as a source; made by :func:`open_folder`.

    Attributes:
        files: their paths and labels.
        image_shape: height, width and channels that the pictures are brought to.
        image_size: side to resize to, or None where all have this shape already.
        class_names: one name per class.
        name: short name.
        pixel_dtype: uint8.
    """

    files: _Files
    image_shape: ImageShape
    image_size: int | None
    class_names: tuple[str, ...]
    name: str
    pixel_dtype: np.dtype

    def __len__(self) -> int:
        return len(self.files.paths)

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """Decode one file."""
        image = _read_image(self.files.paths[i], self.image_shape[2], self.image_size)
        if image.shape != self.image_shape:
            raise InputError(f"{self.files.paths[i]} changed its size while it was in use: start again")
        return image, int(self.files.labels[i])

    def labels(self) -> np.ndarray:
        """All labels."""
        return self.files.labels

    def fingerprint(self) -> str:
        """SHA-256 of paths, sizes and times of change."""
        digest = hashlib.sha256()
        for path in self.files.paths:
            stat = path.stat()
            digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def _sub_folders(folder: Path) -> list[str]:
    """Sorted names of the sub-folders, without hidden ones and what macOS adds to archives."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name != "__MACOSX"
    )


def _split_roots(root: Path) -> tuple[Path, Path | None]:
    """Where the class folders of train and test are; None if test must be split off.

    A class may itself be called "train" (CIFAR-100 has one), so that name alone does not decide.
    """
    names = _sub_folders(root)
    held_out = next((name for name in _HELD_OUT_NAMES if name in names), None)
    if "train" in names and held_out is not None:
        return root / "train", root / held_out
    if names == ["train"]:
        return root / "train", None
    if held_out is not None and len(names) == 1:
        raise InputError(f"{root} holds {held_out}/ but no train/: add it, or name {root / held_out}")
    return root, None


def _class_folders(folder: Path) -> list[str]:
    """Names of the classes."""
    classes = _sub_folders(folder)
    if len(classes) < 2:
        raise InputError(f"{folder} holds {len(classes)} sub-folder(s): give one sub-folder per class, at least two")
    return classes


def _check_same_classes(classes: Sequence[str], train_root: Path, test_root: Path) -> None:
    """Refuse classes that only one of train and test has."""
    test_classes = _sub_folders(test_root)
    only = {
        train_root: sorted(set(classes) - set(test_classes)),
        test_root: sorted(set(test_classes) - set(classes)),
    }
    for folder, names in only.items():
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise InputError(f"classes differ: only {folder} has {shown}; train and test need the same sub-folders")


def _list_files(folder: Path, classes: Sequence[str]) -> _Files:
    """All image files of the classes, in sorted order."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            Path(parent) / file
            for parent, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )
        if not found:
            raise InputError(
                f"{folder / name} holds no image file ({' '.join(SUFFIXES)}): add images or remove the folder"
            )
        paths += found
        labels += [label] * len(found)
    return _Files(paths, np.array(labels, np.int64))


def _common_shape(paths: Sequence[Path], image_size: int | None, name: str) -> ImageShape:
    """Height, width and channels of all images, from their headers, so that mixed sizes show before long reading."""
    from tqdm.auto import tqdm

    grey, first_size = True, None
    for path in tqdm(paths, desc=f"{name}: headers", unit="file", disable=len(paths) <= source.PROGRESS_FROM):
        mode, size = _header(path)
        grey = grey and mode in _GREY_MODES
        first_size = size if first_size is None else first_size
        if size != first_size and image_size is None:
            raise InputError(
                f"{path} is {size[0]} x {size[1]} pixels but {paths[0]} is {first_size[0]} x "
                f"{first_size[1]}: pass image_size to resize all images to one size"
            )
    assert first_size is not None  # _list_files finds at least one file per class
    width, height = first_size if image_size is None else (image_size, image_size)
    return height, width, 1 if grey else 3


def _open(path: Path) -> Image.Image:
    """Open an image, reading its header only."""
    from PIL import Image

    try:
        return Image.open(path)
    except Exception as error:  # a damaged file raises whatever its decoder stumbles on
        raise _unreadable(path, error) from None


def _header(path: Path) -> tuple[str, tuple[int, int]]:
    """Mode and (width, height) of an image file."""
    with _open(path) as picture:
        if is_deep(picture):
            raise InputError(
                f"{path} has more than 8 bits per channel (mode {picture.mode}): convert it to 8 "
                "bits, or load the arrays as npz:FILE"
            )
        return picture.mode, picture.size


def _read_image(path: Path, channels: int, image_size: int | None) -> np.ndarray:
    """One image, uint8 [h, w, 1] or [h, w, 3]."""
    with _open(path) as picture:
        try:
            pixels = with_channels(picture, channels)
        except Exception as error:
            raise _unreadable(path, error) from None
    if image_size is not None:
        pixels = resize_picture(pixels, image_size)
    array = np.asarray(pixels)
    return array[..., None] if channels == 1 else array


def _unreadable(path: Path, error: Exception) -> InputError:
    """The error for an image that cannot be decoded."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"cannot read the image {path} ({reason}): replace or remove the file")
