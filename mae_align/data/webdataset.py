"""Tar files of images and labels, as the library ``webdataset`` writes them."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_align.data.argument import path_and_choices
from mae_align.data.dataset import readable
from mae_align.data.layout import SUFFIXES, is_system
from mae_align.data.records import Records, files_by_part, label_array, number_labels, record_splits
from mae_align.data.resize import ImageSize
from mae_align.data.source import Splits
from mae_align.runtime.errors import InputError

USAGE = "webdataset:PATH"
KEYS = ("image", "label")
_CLASS, _JSON = "cls", "json"


class _Sample(NamedTuple):
    """An image in a tar file, and its label as it stands there."""

    path: Path
    name: str
    offset: int
    size: int
    label: object
    kinds: tuple[str, str]  # of the members of image and label


def open_webdataset(argument: str, image_size: ImageSize | None, seed: int, test_fraction: float) -> Splits:
    """The images of tar files, decoded when they are read.

    The members of a sample have one name up to the first dot: an image, and a ``.cls`` file with its class, or a
    ``.json`` file with the key ``label``. Another key of the JSON, or one of several images, is to be said:
    ``webdataset:DIR:image=mask.png:label=KEY``. Parts are known by the names of folders or files, such as
    ``train-000000.tar``.

    Args:
        argument: a file or a folder, and the choices.
        image_size: side of a square, or (height, width), in pixels, or None to keep the images as they are.
        seed: of the split, where no part is for tests.
        test_fraction: share of the test images, likewise.

    Returns:
        Sources of images; they are read at their places in the tar files.

    Raises:
        InputError: a missing, damaged or compressed file, samples without image or label or of one name, an unreadable
            image.

    Example:
        >>> open_webdataset("/nowhere", None, seed=0, test_fraction=0.2)
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: /nowhere is no .tar file and holds none: check the path, webdataset:PATH
    """
    path, choices = path_and_choices(argument, USAGE, KEYS)
    files, notes = files_by_part(path, ".tar", USAGE)
    found: dict[str, list[_Sample]] = {}
    passed: set[str] = set()
    for part, of_part in files.items():
        found[part] = [sample for file in of_part for sample in _samples(file, choices, passed)]
    samples = list(itertools.chain.from_iterable(found.values()))
    for sample in samples:
        if sample.kinds[1] != samples[0].kinds[1]:
            raise InputError(
                f"{sample.name} in {sample.path} has its label in .{sample.kinds[1]}, but {samples[0].name} in "
                f".{samples[0].kinds[1]}: give all labels in one way"
            )
    values = {
        part: label_array([sample.label for sample in of_part], f"labels of the {part} part of {path}")
        if of_part
        else np.zeros(0, np.int64)
        for part, of_part in found.items()
    }
    key = choices.get("label", "label")
    labels, names, more = number_labels(values, None, key, f"labels of {path}")
    images = sorted({sample.kinds[0] for sample in samples})
    from_json = f"key {key} of .{_JSON}" if samples[0].kinds[1] == _JSON else f".{_CLASS}"
    notes = (
        *notes,
        f".{', .'.join(images)} hold the images, {from_json} the labels",
        *[f"passed over: {', '.join(sorted(passed))}"] * bool(passed),
        *more,
    )
    return record_splits(
        {part: _records(found[part], labels[part], files[part], (*images, from_json)) for part in labels},
        tuple(map(readable, names)),
        readable(path.stem if path.is_file() else path.resolve().name),
        notes,
        image_size=image_size,
        seed=seed,
        test_fraction=test_fraction,
    )


def _records(samples: list[_Sample], labels: np.ndarray, files: list[Path], chosen: tuple[str, ...]) -> Records:
    def read(i: int) -> bytes:
        sample = samples[i]
        with sample.path.open("rb") as file:
            content = os.pread(file.fileno(), sample.size, sample.offset)
        if len(content) < sample.size:
            raise InputError(f"{sample.path} is cut off in {sample.name}: write it again")
        return content

    return Records(read, lambda i: f"{samples[i].name} in {samples[i].path}", labels, files, chosen)


def _samples(path: Path, choices: Mapping[str, str], passed: set[str]) -> list[_Sample]:
    """The samples of a tar file, in its order; kinds of members that are not read are added to ``passed``."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, dot, suffix = name.partition(".")
                system = any(map(is_system, member.name.removeprefix("./").split("/")))
                if not member.isfile() or system or not dot or (stem.startswith("__") and stem.endswith("__")):
                    continue
                parts = groups.setdefault(os.path.join(folder, stem), {})
                if suffix.lower() in parts:
                    raise InputError(f"{path} holds {member.name} twice: give every sample a name of its own")
                parts[suffix.lower()] = member
            _check_end(path, tar.offset)
            return [_sample(path, tar, name, parts, choices, passed) for name, parts in groups.items()]
    except (tarfile.TarError, EOFError, OSError) as error:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        what = (
            "is compressed: unpack it with gunzip" if packed else f"is damaged or no tar file ({error}): fetch it again"
        )
        raise InputError(f"{path} {what}") from None


def _check_end(path: Path, end: int) -> None:
    """Refuse a tar file that does not end where its last member does: cut off, damaged, or several in one."""
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(1 << 16)
    if len(rest) < tarfile.BLOCKSIZE:
        raise InputError(f"{path} is cut off, for it has no end mark: fetch it again")
    if rest.strip(b"\0"):
        raise InputError(f"{path} is damaged, or several tar files in one, at byte {end}: write it again")


def _sample(
    path: Path,
    tar: tarfile.TarFile,
    name: str,
    parts: dict[str, tarfile.TarInfo],
    choices: Mapping[str, str],
    passed: set[str],
) -> _Sample:
    listed = ", ".join(f".{suffix}" for suffix in parts)
    wanted = choices.get("image", "").removeprefix(".").lower()
    images = [suffix for suffix in parts if (suffix == wanted if wanted else f".{suffix}".endswith(SUFFIXES))]
    if len(images) != 1:
        raise InputError(
            f"{name} in {path} has {len(images)} images ({listed}): give one for each sample, or choose with "
            f"{USAGE}:image=ENDING"
        )
    image = parts[images[0]]
    kind = _CLASS if _CLASS in parts and "label" not in choices else _JSON
    if kind not in parts:
        raise InputError(f"{name} in {path} has no label ({listed}): give a .cls or a .json for each image")
    passed.update(f".{suffix}" for suffix in parts if suffix not in (images[0], kind))
    label = _label(f"{name} in {path}", tar, parts[kind], choices.get("label", "label") if kind == _JSON else None)
    return _Sample(path, image.name, image.offset_data, image.size, label, (images[0], kind))


def _label(where: str, tar: tarfile.TarFile, member: tarfile.TarInfo, key: str | None) -> object:
    """A label: what stands in a file, a whole number or text, or at a key of its JSON."""
    file = tar.extractfile(member)
    try:
        text = b"" if file is None else file.read()
        text = text.decode("utf-8").strip()
        if key is not None:
            return json.loads(text)[key]
        if not text:
            raise ValueError
        return int(text) if text.lstrip("-").isdigit() else text
    except (ValueError, KeyError, TypeError):
        what = "a class" if key is None else f"JSON with the key {key!r}, or choose another with {USAGE}:label=KEY"
        raise InputError(f"{where}: the label cannot be read, write {what}") from None
