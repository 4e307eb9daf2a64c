"""IDX files, the format of MNIST and its relatives, plain or gzipped.

A file is a magic number (two zero bytes, a type code, the rank), one big-endian uint32 per axis,
and the values in C order. Only unsigned bytes (type code 8) are read: MNIST and the sets made after
it use nothing else.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from mae_align.data.dataset import ImageDataset, encode_labels
from mae_align.runtime.errors import InputError

_UNSIGNED_BYTE = 8


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes; gzip is recognised by content, not by name.

    Args:
        path: the file.
        rank: number of axes it must have: 3 for images, 1 for labels.

    Returns:
        uint8 array of that rank.

    Raises:
        InputError: missing, truncated or damaged file, other type or rank, wrong size.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "train-labels-idx1-ubyte"
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        ...     read_idx(path, rank=1)
        array([7, 8, 9], dtype=uint8)
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise InputError(f"no file {path}: check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path} ({reason}): fetch the file again") from None
    start = 4 + 4 * rank
    if len(content) < 4 or content[:2] != b"\0\0":
        raise InputError(f"{path} is not an IDX file (wrong magic number): fetch the file again")
    if content[2] != _UNSIGNED_BYTE or content[3] != rank:
        raise InputError(
            f"{path} holds type 0x{content[2]:02x} of rank {content[3]}: expected unsigned bytes (0x08) of rank {rank}"
        )
    header = content[4:start].ljust(4 * rank, b"\0")  # a cut header reads as a size of 0
    shape = struct.unpack(f">{rank}I", header)
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise InputError(
            f"{path} is truncated or damaged: {len(content)} bytes where its header asks for "
            f"{expected}; fetch the file again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def load_idx(folder: Path) -> ImageDataset:
    """The data set of an MNIST-style folder.

    The folder holds four files, plain or gzipped: ``train-images*idx3*``, ``train-labels*idx1*``
    and the same for test as ``t10k-...`` or ``test-...``; a prefix such as ``emnist-letters-`` is
    allowed. Labels that leave values out are renumbered, the class names keep the values.

    Args:
        folder: the folder.

    Returns:
        The data set, images [n, h, w, 1] uint8.

    Raises:
        InputError: a missing, ambiguous or damaged file, images and labels of different number.

    Example:
        >>> load_idx(Path("/nowhere"))
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: no folder /nowhere: give the folder of the IDX files, idx:DIR
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: give the folder of the IDX files, idx:DIR")
    train_images, train_labels = _read_split(folder, ("train",))
    test_images, test_labels = _read_split(folder, ("t10k", "test"))
    try:
        (train_labels, test_labels), names = encode_labels(train_labels, test_labels)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    name = folder.resolve().name
    return ImageDataset(train_images, train_labels, test_images, test_labels, names, name)


def _read_split(folder: Path, prefixes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, h, w, 1] and labels [n] of one split."""
    image_file = _find(folder, tuple(f"{prefix}-images*idx3*" for prefix in prefixes))
    label_file = _find(folder, tuple(f"{prefix}-labels*idx1*" for prefix in prefixes))
    images, labels = read_idx(image_file, rank=3), read_idx(label_file, rank=1)
    if len(images) != len(labels):
        raise InputError(
            f"{image_file} holds {len(images)} images but {label_file} {len(labels)} labels: "
            "the files do not belong together"
        )
    return images[..., None], labels.astype(np.int64)


def _find(folder: Path, patterns: tuple[str, ...]) -> Path:
    """The one file of a folder that matches; a plain file goes before its gzipped copy."""
    found = {path for pattern in patterns for path in folder.glob(f"*{pattern}") if path.is_file()}
    found = sorted(path for path in found if not (path.suffix == ".gz" and path.with_suffix("") in found))
    if not found:
        raise InputError(
            f"no file {' or '.join(patterns)} (plain or .gz) in {folder}: "
            "idx:DIR needs images and labels of train and test"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"several files in {folder} fit {patterns[0]}: {names}; keep one set")
    return found[0]
