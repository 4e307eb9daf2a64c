"""NumPy archives with x_train, y_train, x_test, y_test; never unpickled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mae_align.data.dataset import ImageDataset, check_task, encode_labels
from mae_align.runtime.errors import InputError

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_MORE = ("x_val", "y_val", "class_names")
# What a part is called in the file, and here; what images and labels are called by MedMNIST, and in our keys.
_PARTS = {"train": "train", "val": "validation", "test": "test"}
_SHORT = {"images": "x", "labels": "y"}


def load_npz(path: Path) -> ImageDataset:
    """The data set of one ``.npz`` file.

    Arrays: ``x_train``, ``x_test`` [n, h, w] or [n, h, w, c]; ``y_train``, ``y_test`` classes, as whole numbers or
    text [n] or [n, 1], or targets [n, q]: floats, or attributes that are 0 and 1; ``x_val`` and ``y_val`` where there
    are validation images; optional ``class_names`` [q], else the label values are the names of classes.

    Or the same under the names that MedMNIST gives them: ``train_images``, ``train_labels``,
    ``val_images`` and so on. Object arrays are refused, for reading them would run code from the file.

    Args:
        path: the file, as written by ``numpy.savez`` or ``numpy.savez_compressed``.

    Returns:
        The data set; grey images get a channel axis.

    Raises:
        InputError: missing or damaged file, missing keys, object arrays, arrays that do not fit
            together.

    Example:
        >>> import tempfile
        >>> x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "toy.npz"
        ...     np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
        ...     load_npz(path)
        ImageDataset('toy', train 4, test 4, image 8x8x1 uint8, 2 classes)
    """
    arrays = _read(path)
    parts = {part: _split(arrays, part, path) for part in _PARTS if f"x_{part}" in arrays}
    labels = [labels for _, labels in parts.values()]
    given = _class_names(arrays["class_names"], path) if "class_names" in arrays else None
    if any(part.ndim != labels[0].ndim for part in labels):
        raise InputError(f"{path} has classes in one part and other targets in another: write all in one way")
    if labels[0].ndim == 2:
        names = given or tuple(f"target {i}" for i in range(labels[0].shape[1]))
    elif given is not None and labels[0].dtype.kind != "U":
        names = given
    else:
        try:
            labels, names = encode_labels(*labels)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    fields = {}
    for (part, (images, _)), numbers in zip(parts.items(), labels, strict=True):
        fields |= {f"{_PARTS[part]}_images": images, f"{_PARTS[part]}_labels": numbers}
    return ImageDataset(**fields, class_names=names, name=path.stem)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the archive that a data set is made of."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"no file {path}: check the path, npz:FILE") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): npz:FILE needs a file") from None
    with file:
        try:
            archive = np.load(file, allow_pickle=False)
        except MemoryError:
            raise
        except Exception:
            # Damage shows as whatever the zip reader stumbles on, and NumPy takes whatever is neither .npy nor a
            # zip for a pickle: its words would mislead.
            raise InputError(f"{path} is damaged or not an .npz file: write it again with numpy.savez") from None
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path} holds a single array: save {', '.join(_KEYS)} with numpy.savez")
        stored = {key: key for key in (*_KEYS, *_MORE)}
        if not set(_KEYS) & set(archive.files):
            stored |= {f"{_SHORT[word]}_{part}": f"{part}_{word}" for word in _SHORT for part in _PARTS}
        missing = [stored[key] for key in _KEYS if stored[key] not in archive.files]
        if "x_val" in stored and (stored["x_val"] in archive.files) != (stored["y_val"] in archive.files):
            missing.append(stored["y_val"] if stored["x_val"] in archive.files else stored["x_val"])
        if missing:
            present = ", ".join(archive.files) or "nothing"
            raise InputError(
                f"{path} lacks {', '.join(missing)} (it holds {present}): save {', '.join(_KEYS)} with numpy.savez"
            )
        return {key: _read_array(archive, name, path) for key, name in stored.items() if name in archive.files}


def _read_array(archive: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    """One array of the archive."""
    try:
        array = archive[key]
    except MemoryError:
        raise
    except Exception as error:  # damage shows as whatever the zip, zlib or header parser raises
        if "allow_pickle" in str(error):
            raise InputError(
                f"{key} of {path} is an object array, which is not read: save a plain array "
                "(for names, np.array(names))"
            ) from None
        raise InputError(f"{key} of {path} is damaged ({error}): write the file again with numpy.savez") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{key} of {path} is not an array: write the file with numpy.savez")
    return array


def _class_names(names: np.ndarray, path: Path) -> tuple[str, ...]:
    """Class names [q] as strings; bytes are read as UTF-8."""
    if names.ndim != 1:
        raise InputError(f"class_names of {path} has shape {list(names.shape)}: give one name per class, [q]")
    if names.dtype.kind == "S":
        names = np.char.decode(names, "utf-8", "replace")
    return tuple(str(name) for name in names.tolist())


def _split(arrays: dict[str, np.ndarray], split: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, h, w, c] (a channel axis is added to [n, h, w]) and labels [n] of one split."""
    images = arrays[f"x_{split}"]
    labels = check_task(arrays[f"y_{split}"], f"y_{split} of {path}")
    if images.ndim not in (3, 4):
        raise InputError(f"x_{split} of {path} has shape {list(images.shape)}: give [n, h, w] or [n, h, w, c]")
    if len(images) != len(labels):
        raise InputError(
            f"x_{split} of {path} holds {len(images)} images but y_{split} {len(labels)} labels: "
            "give one label per image"
        )
    return (images[..., None] if images.ndim == 3 else images), labels
