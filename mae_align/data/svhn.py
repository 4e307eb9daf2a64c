"""SVHN as its authors give it: cropped digits in MATLAB files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mae_align.data.dataset import ImageDataset
from mae_align.runtime.errors import InputError

_FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
_MORE = "extra_32x32.mat"


def load_svhn(path: Path) -> ImageDataset:
    """The data set of ``train_32x32.mat`` and ``test_32x32.mat``; ``extra_32x32.mat`` is passed over.

    Args:
        path: the folder of both files, or one of them.

    Returns:
        73,257 training and 26,032 test images [n, 32, 32, 3] uint8; the label 10 of the files is the digit 0.

    Raises:
        InputError: a missing or damaged file, or one without images and labels.

    Example:
        >>> load_svhn(Path("/nowhere"))
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: no file /nowhere/train_32x32.mat: svhn:DIR needs ... and test_32x32.mat
    """
    folder = path.parent if path.suffix == ".mat" else path
    fields = {}
    for part, name in _FILES.items():
        fields[f"{part}_images"], fields[f"{part}_labels"] = _part(folder / name)
    notes = (f"{_MORE} is passed over",) if (folder / _MORE).exists() else ()
    return ImageDataset(**fields, class_names=tuple("0123456789"), name="svhn", notes=notes)


def _part(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 32, 32, 3] and labels [n]."""
    from scipy.io import loadmat

    if not path.is_file():
        raise InputError(f"no file {path}: svhn:DIR needs {' and '.join(_FILES.values())}")
    try:
        arrays = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # a damaged file raises whatever its reader stumbles on
        raise InputError(f"cannot read {path} ({str(error).splitlines()[0]}): fetch the file again") from None
    if not {"X", "y"} <= arrays.keys():
        raise InputError(f"{path} lacks X or y: give the cropped digits, {' and '.join(_FILES.values())}")
    images, labels = arrays["X"], arrays["y"].ravel()
    if labels.dtype.kind not in "iuf" or not labels.size or (labels != np.round(labels)).any():
        raise InputError(f"y of {path} holds {labels.size} {labels.dtype}, not digits: fetch it again")
    labels = labels.astype(np.int64)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2] != 3 or images.shape[3] != len(labels):
        raise InputError(
            f"X of {path} is {images.dtype} {list(images.shape)} for {len(labels)} labels: give uint8 [32, 32, 3, n]"
        )
    if labels.min() < 1 or labels.max() > 10:
        raise InputError(f"y of {path} runs from {labels.min()} to {labels.max()}, not from 1 to 10: fetch it again")
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels % 10
