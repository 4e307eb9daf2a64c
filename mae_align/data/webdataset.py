"""Tar files of images and labels, as the library ``webdataset`` writes them."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_align.data.argument import path_and_choices
from mae_align.data.dataset import check_task, encode_labels, readable
from mae_align.data.layout import SUFFIXES
from mae_align.data.records import Records, files_by_part, record_splits
from mae_align.data.resize import ImageSize
from mae_align.data.source import Splits
from mae_align.runtime.errors import InputError

USAGE = "webdataset:PATH"
KEYS = ("label",)
_CLASS = ".cls"


class _Sample(NamedTuple):
    """An image in a tar file, and its label as it stands there."""

    path: Path
    name: str
    offset: int
    size: int
    label: object


def open_webdataset(argument: str, image_size: ImageSize | None, seed: int, test_fraction: float) -> Splits:
    """The images of tar files, decoded when they are read.

    The members of a sample have one name up to the first dot: an image, and a ``.cls`` file with its class, or a
    ``.json`` file with the key ``label`` (another with ``webdataset:DIR:label=KEY``). Parts are known by the names of
    folders or files, such as ``train-000000.tar``.

    Args:
        argument: a file or a folder, and the choice.
        image_size: side of a square, or (height, width), in pixels, or None to keep the images as they are.
        seed: of the split, where no part is for tests.
        test_fraction: share of the test images, likewise.

    Returns:
        Sources of images; they are read at their places in the tar files.

    Raises:
        InputError: a missing, damaged or compressed file, samples without image or label, an unreadable image.

    Example:
        >>> open_webdataset("/nowhere", None, seed=0, test_fraction=0.2)
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: /nowhere is no .tar file and holds none: check the path, webdataset:PATH
    """
    path, choices = path_and_choices(argument, USAGE, KEYS)
    files = files_by_part(path, ".tar", USAGE)
    key = choices.get("label", "label")
    found = {part: [sample for file in of_part for sample in _samples(file, key)] for part, of_part in files.items()}
    values = {
        part: check_task(np.array([sample.label for sample in samples]), f"labels of {path}")
        for part, samples in found.items()
    }
    names: tuple[str, ...] = (key,)
    if next(iter(values.values())).ndim == 1:
        encoded, names = encode_labels(*values.values())
        values = dict(zip(values, encoded, strict=True))
    return record_splits(
        {part: _records(samples, values[part], files[part]) for part, samples in found.items()},
        tuple(map(readable, names)),
        readable(path.stem if path.is_file() else path.resolve().name),
        (),
        image_size=image_size,
        seed=seed,
        test_fraction=test_fraction,
    )


def _records(samples: list[_Sample], labels: np.ndarray, files: list[Path]) -> Records:
    def read(i: int) -> bytes:
        sample = samples[i]
        with sample.path.open("rb") as file:
            content = os.pread(file.fileno(), sample.size, sample.offset)
        if len(content) < sample.size:
            raise InputError(f"{sample.path} is cut off in {sample.name}: write it again")
        return content

    return Records(read, lambda i: f"{samples[i].name} in {samples[i].path}", labels, files)


def _samples(path: Path, key: str) -> list[_Sample]:
    """The samples of a tar file, in its order."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or os.path.basename(member.name).startswith("."):
                    continue
                folder, name = os.path.split(member.name)
                stem, _, suffix = name.partition(".")
                groups.setdefault(os.path.join(folder, stem), {})[f".{suffix.lower()}"] = member
            return [_sample(path, tar, name, parts, key) for name, parts in groups.items()]
    except (tarfile.TarError, EOFError, OSError) as error:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        what = "is compressed: unpack it with gunzip" if packed else f"is damaged or no tar file ({error})"
        raise InputError(f"{path} {what}") from None


def _sample(path: Path, tar: tarfile.TarFile, name: str, parts: dict[str, tarfile.TarInfo], key: str) -> _Sample:
    images = [member for suffix, member in parts.items() if suffix.endswith(SUFFIXES)]
    if len(images) != 1:
        raise InputError(f"{name} in {path} has {len(images)} images ({', '.join(parts)}): give one for each sample")
    return _Sample(path, images[0].name, images[0].offset_data, images[0].size, _label(path, tar, name, parts, key))


def _label(path: Path, tar: tarfile.TarFile, name: str, parts: dict[str, tarfile.TarInfo], key: str) -> object:
    """The label of a sample: a whole number, a number, or text."""
    member = parts.get(_CLASS, parts.get(".json"))
    content = None if member is None else tar.extractfile(member)
    if content is None:
        raise InputError(f"{name} in {path} has no label ({', '.join(parts)}): give a .cls or a .json for each image")
    try:
        text = content.read().decode("utf-8").strip()
        if _CLASS not in parts:
            return json.loads(text)[key]
        return int(text) if text.lstrip("-").isdigit() else text
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{name} in {path}: the label cannot be read, write a class or JSON with the key {key!r}"
        ) from None
