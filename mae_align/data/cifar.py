"""CIFAR-10 and CIFAR-100 as their authors give them, in the binary and in the Python version."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mae_align.data.argument import path_and_choices
from mae_align.data.dataset import ImageDataset
from mae_align.runtime.errors import InputError

USAGE = "cifar:DIR"
KEYS = ("labels",)
_PIXELS = 3 * 32 * 32
_UNPACKED = ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary", "cifar-100-python")
_TEN = tuple(f"data_batch_{i}" for i in range(1, 6))


def load_cifar(argument: str) -> ImageDataset:
    """The data set of an unpacked download: ``cifar-10-batches-bin``, ``cifar-10-batches-py``, ``cifar-100-...``.

    The Python version is read without making any object that a file names: only arrays of bytes, lists and text.

    Args:
        argument: the folder, or the one in which it lies; behind it ``:labels=coarse`` for the 20 groups of CIFAR-100
            in place of its 100 classes.

    Returns:
        50,000 training and 10,000 test images [n, 32, 32, 3] uint8.

    Raises:
        InputError: a missing, damaged or foreign file, or one that holds more than arrays, lists and text.

    Example:
        >>> load_cifar("/nowhere")
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: no folder /nowhere: give the unpacked folder, cifar:DIR
    """
    folder, choices = path_and_choices(argument, USAGE, KEYS)
    if folder.is_file():
        raise InputError(f"{folder} is a file: unpack it (tar xzf) and give its folder, {USAGE}")
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: give the unpacked folder, {USAGE}")
    inside = [folder / name for name in _UNPACKED if (folder / name).is_dir()]
    if len(inside) > 1:
        raise InputError(f"{folder} holds {' and '.join(path.name for path in inside)}: give one of them")
    folder = inside[0] if inside else folder
    kind = choices.get("labels", "fine")
    if kind not in ("fine", "coarse"):
        raise InputError(f"labels={kind}: give fine or coarse")
    if (folder / "data_batch_1").is_file() or (folder / "data_batch_1.bin").is_file():
        if kind == "coarse":
            raise InputError(f"labels=coarse: {folder} is CIFAR-10, which has ten classes alone")
        return _ten(folder)
    if (folder / "train").is_file() or (folder / "train.bin").is_file():
        return _hundred(folder, kind)
    packed = sorted(path.name for path in folder.glob("cifar*.tar.gz"))
    what = f"unpack {packed[0]} (tar xzf)" if packed else "give the folder of data_batch_1.bin, train.bin or the like"
    raise InputError(f"{folder} holds no files of CIFAR: {what}, {USAGE}")


def _ten(folder: Path) -> ImageDataset:
    binary = (folder / "data_batch_1.bin").is_file()
    if binary:
        read = [_binary(folder / f"{name}.bin", 1) for name in (*_TEN, "test_batch")]
        parts = [(images, labels[:, 0]) for images, labels in read]
        names = _lines(folder / "batches.meta.txt", 10)
    else:
        parts = [_python(folder / name, b"labels") for name in (*_TEN, "test_batch")]
        names = _meta(folder / "batches.meta", b"label_names", 10)
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return _data_set(folder, images, labels, *parts[-1], names, "cifar10")


def _hundred(folder: Path, kind: str) -> ImageDataset:
    if (folder / "train.bin").is_file():
        read = [_binary(folder / f"{name}.bin", 2) for name in ("train", "test")]
        parts = [(images, labels[:, 1 if kind == "fine" else 0]) for images, labels in read]
        names = _lines(folder / f"{kind}_label_names.txt", 100 if kind == "fine" else 20)
    else:
        parts = [_python(folder / name, f"{kind}_labels".encode()) for name in ("train", "test")]
        names = _meta(folder / "meta", f"{kind}_label_names".encode(), 100 if kind == "fine" else 20)
    return _data_set(folder, *parts[0], *parts[1], names, "cifar100" if kind == "fine" else "cifar100-coarse")


def _data_set(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    names: tuple[str, ...],
    name: str,
) -> ImageDataset:
    try:
        return ImageDataset(images, labels.astype(np.int64), test_images, test_labels.astype(np.int64), names, name)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no file {path}: unpack the download again") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None


def _binary(path: Path, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 32, 32, 3] and labels [n, num_labels] of rows of labels and pixels."""
    content, row = _read(path), num_labels + _PIXELS
    if not content or len(content) % row:
        raise InputError(f"{path} has {len(content)} bytes, not rows of {row}: unpack the download again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, row)
    return _images(rows[:, num_labels:]), rows[:, :num_labels]


def _images(rows: np.ndarray) -> np.ndarray:
    """Images [n, 32, 32, 3] of rows of a red, a green and a blue plane."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _lines(path: Path, count: int) -> tuple[str, ...]:
    """Names of classes, one a line."""
    try:
        names = tuple(_read(path).decode("utf-8").split())
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text: unpack the download again") from None
    if len(names) != count:
        raise InputError(f"{path} has {len(names)} names for {count} classes: unpack the download again")
    return names


def _python(path: Path, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 32, 32, 3] and labels [n] of a file of the Python version."""
    content = _plain(path)
    found, labels = content.get(b"data"), content.get(key)
    rows = found.values if isinstance(found, _Array) else None
    if rows is None or rows.shape[1:] != (_PIXELS,) or not isinstance(labels, list) or len(labels) != len(rows):
        raise InputError(f"{path} does not hold images and {key.decode()}: unpack the download again")
    if not all(type(label) is int and 0 <= label < 100 for label in labels):
        raise InputError(f"{key.decode()} of {path} are not all class numbers: unpack the download again")
    return _images(rows), np.array(labels, np.int64)


def _meta(path: Path, key: bytes, count: int) -> tuple[str, ...]:
    """Names of classes of the Python version."""
    names = _plain(path).get(key)
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, bytes | str) for name in names):
        raise InputError(f"{path} does not hold {count} {key.decode()}: unpack the download again")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)


def _plain(path: Path) -> dict[bytes, Any]:
    """What a file of the Python version holds, with :class:`_Array` in the place of arrays; keys as bytes."""
    with path.open("rb") if path.is_file() else _missing(path) as file:
        try:
            found = _Plain(file, encoding="bytes").load()
        except InputError:
            raise
        except Exception:  # a damaged file raises whatever its reader stumbles on
            raise InputError(f"{path} is damaged or no file of CIFAR: unpack the download again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is no file of CIFAR: unpack the download again")
    return {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}


def _missing(path: Path) -> Any:
    raise InputError(f"no file {path}: unpack the download again")


class _Kind:
    """Stands for the type and the number format of an array; only bytes are taken."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        """Nothing of it is needed."""


class _Array:
    """Stands for an array of bytes while a file is read."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Kind, bool, bytes]) -> None:
        _, shape, kind, by_column, content = state
        if kind.arguments[:1] not in ((b"u1",), ("u1",)):
            raise InputError(f"an array of {kind.arguments[:1]} is no array of CIFAR, whose pixels are bytes")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_column else "C")


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 writes them for Python 2."""
    return text.encode(encoding)


# All that a file may call for, and what is made in its place.
_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy", "ndarray"): _Kind,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encoded,
}


class _Plain(pickle.Unpickler):
    """Reads numbers, text, lists, dictionaries and arrays of bytes; what else a file calls for is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the file."""
        if (module, name) not in _KNOWN:
            raise InputError(f"a file of CIFAR calls for {module}.{name}, which is not read: fetch it again")
        return _KNOWN[module, name]
