"""``load_dataset``: from a short name to a data set."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from mae_align.data.cifar import load_cifar
from mae_align.data.dataset import ImageDataset
from mae_align.data.digits import load_digits
from mae_align.data.folder import open_folder, open_pictures
from mae_align.data.idx import load_idx
from mae_align.data.layout import PARTS
from mae_align.data.npz import load_npz
from mae_align.data.parquet import USAGE as PARQUET
from mae_align.data.parquet import open_parquet
from mae_align.data.resize import ImageSize, height_and_width, resize_dataset
from mae_align.data.source import ImageSource, Splits, dataset_splits, in_memory
from mae_align.data.stl10 import load_stl10
from mae_align.data.svhn import load_svhn
from mae_align.data.table import USAGE as TABLE
from mae_align.data.table import open_table
from mae_align.data.tfds_source import METADATA, open_prepared, open_tfds
from mae_align.data.webdataset import USAGE as WEBDATASET
from mae_align.data.webdataset import open_webdataset
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """What a source may need besides its name.

    Attributes:
        image_size: side of a square, or (height, width), in pixels, to resize to, or None.
        seed: of the split, for sources without a test set of their own.
        test_fraction: share of the test images, for the same sources.
    """

    image_size: ImageSize | None
    seed: int
    test_fraction: float


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of data set that a name can ask for.

    Attributes:
        usage: how the name is written: ``scheme`` or ``scheme:ARGUMENT``.
        open: from the argument ("" without one) and the options to the data set, in memory or read image by image.
    """

    usage: str
    open: Callable[[str, LoadOptions], ImageDataset | Splits]


def _path(argument: str) -> Path:
    """A path in which ``~`` stands for the home folder."""
    return Path(os.path.expanduser(argument))


def _folder(argument: str, options: LoadOptions) -> Splits:
    return open_folder(_path(argument), options.image_size, options.seed, options.test_fraction)


def _images(argument: str, options: LoadOptions) -> Splits:
    return open_pictures(_path(argument), options.image_size, options.seed, options.test_fraction)


def _table(argument: str, options: LoadOptions) -> Splits:
    return open_table(argument, options.image_size, options.seed, options.test_fraction)


def _parquet(argument: str, options: LoadOptions) -> Splits:
    return open_parquet(argument, options.image_size, options.seed, options.test_fraction)


def _webdataset(argument: str, options: LoadOptions) -> Splits:
    return open_webdataset(argument, options.image_size, options.seed, options.test_fraction)


def _tfds(argument: str, options: LoadOptions) -> Splits:
    return open_tfds(argument, options.image_size, options.seed, options.test_fraction)


def _prepared(argument: str, options: LoadOptions) -> Splits:
    return open_prepared(_path(argument), options.image_size, options.seed, options.test_fraction)


# A new source is one loader and one line here.
SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "digits": Source("digits", lambda _, options: load_digits(options.seed, options.test_fraction)),
        "idx": Source("idx:DIR", lambda argument, _: load_idx(_path(argument))),
        "npz": Source("npz:FILE", lambda argument, _: load_npz(_path(argument))),
        "folder": Source("folder:DIR", _folder),
        "table": Source(TABLE, _table),
        "images": Source("images:DIR", _images),
        "parquet": Source(PARQUET, _parquet),
        "webdataset": Source(WEBDATASET, _webdataset),
        "cifar": Source("cifar:DIR", lambda argument, _: load_cifar(argument)),
        "stl10": Source("stl10:DIR", lambda argument, _: load_stl10(_path(argument))),
        "svhn": Source("svhn:DIR", lambda argument, _: load_svhn(_path(argument))),
        "tfds": Source("tfds:NAME[/CONFIG]", _tfds),
        "prepared": Source("prepared:DIR", _prepared),
    }
)


def load_dataset(
    name: str, *, image_size: ImageSize | None = None, seed: int = 0, test_fraction: float = 0.2
) -> ImageDataset:
    """Load a labelled image set by name.

    ====================== ===========================================================================
    ``digits``             the 1,797 digits of 8 x 8 pixels that scikit-learn bundles
    ``idx:DIR``            MNIST-style IDX files, plain or gzipped
    ``npz:FILE``           arrays x_train, y_train, x_test, y_test (x_val, y_val, class_names), or MedMNIST's keys
    ``folder:DIR``         one sub-folder of image files per class, in train/, val/ and test/ if there are any
    ``table:FILE.csv``     a row per image: its file, and classes, numbers or attributes
    ``images:DIR``         image files without labels
    ``parquet:PATH``       Parquet files with images, as Hugging Face's ``datasets`` writes them
    ``webdataset:PATH``    tar files of images and labels
    ``cifar:DIR``          CIFAR-10 or CIFAR-100 as downloaded, binary or Python version
    ``stl10:DIR``          STL-10 as downloaded
    ``svhn:DIR``           SVHN, cropped digits, as downloaded
    ``tfds:NAME[/CONFIG]`` a set that TensorFlow Datasets has prepared as ArrayRecord; no TensorFlow needed
    ``prepared:DIR``       the folder of such a set, as ``mae_align.data.prepare`` writes it
    ====================== ===========================================================================

    Args:
        name: one of the above; ``~`` stands for the home folder.
        image_size: resize to squares of this side, or to (height, width), in pixels (the middle of each image,
            antialiased bicubic); None keeps the images as they are.
        seed: integer >= 0 of the stratified split, for sources without a test set of their own.
        test_fraction: share of the test images in that split, inside (0, 1).

    Returns:
        The data set: images [n, h, w, c], 8-bit pixels as uint8; classes [n] int64, or targets [n, q] float64.

    Raises:
        InputError: unknown name, or data that cannot be used; one line that says what to do.

    Example:
        >>> load_dataset("digits")
        ImageDataset('digits', train 1438, test 359, image 8x8x1 uint8, 10 classes)
    """
    found = _open(name, LoadOptions(image_size, seed, test_fraction))
    return found if isinstance(found, ImageDataset) else in_memory(found)


def open_splits(name: str, *, image_size: ImageSize | None = None, seed: int = 0, test_fraction: float = 0.2) -> Splits:
    """Open a labelled image set for reading by position, without loading it into memory.

    ``digits``, ``idx:``, ``npz:``, ``cifar:``, ``stl10:`` and ``svhn:`` are in memory anyway; of the other kinds each
    image is decoded when it is asked for. The images and their order are those of :func:`load_dataset` with the same
    arguments.

    Args:
        name: as of :func:`load_dataset`.
        image_size: side of a square, or (height, width), in pixels, to resize to, or None.
        seed: of the split, for sources without a test set of their own.
        test_fraction: share of the test images in that split, inside (0, 1).

    Returns:
        Training and test images, both :class:`mae_align.data.ImageSource`.

    Raises:
        InputError: as :func:`load_dataset`; images that cannot be decoded show when they are read.

    Example:
        >>> splits = open_splits("digits")
        >>> len(splits.train), len(splits.test)
        (1438, 359)
    """
    found = _open(name, LoadOptions(image_size, seed, test_fraction))
    return dataset_splits(found) if isinstance(found, ImageDataset) else found


def open_source(
    name: str, split: str, *, image_size: ImageSize | None = None, seed: int = 0, test_fraction: float = 0.2
) -> ImageSource:
    """One part of :func:`open_splits`.

    Args:
        name: as of :func:`load_dataset`.
        split: "train" or "test".
        image_size: side of a square, or (height, width), in pixels, to resize to, or None.
        seed: of the split, for sources without a test set of their own.
        test_fraction: share of the test images in that split, inside (0, 1).

    Returns:
        ``len(source)`` images: ``source[i]`` is (image [h, w, c], label), ``source.take(index)`` many at once;
        ``image_shape``, ``pixel_dtype``, ``num_classes``, ``class_names``, ``name``, ``labels()``.

    Raises:
        InputError: another split, or as :func:`open_splits`.

    Example:
        >>> image, label = open_source("digits", "test", image_size=4)[0]
        >>> image.shape
        (4, 4, 1)
    """
    if split not in PARTS:
        raise InputError(f"split {split!r}: give {', '.join(PARTS[:-1])} or {PARTS[-1]}")
    parts = open_splits(name, image_size=image_size, seed=seed, test_fraction=test_fraction).parts
    if split not in parts:
        raise InputError(f"{name} has no validation set of its own: give train or test")
    return parts[split]


def _open(name: str, options: LoadOptions) -> ImageDataset | Splits:
    """The data set that a name asks for, of the size asked for."""
    scheme, colon, argument = name.partition(":")
    source = SOURCES.get(scheme)
    if source is None:
        known = ", ".join(entry.usage for entry in SOURCES.values())
        raise InputError(f"unknown data set {name!r}{_hint(name)}; give one of: {known}")
    if ":" in source.usage and not argument:
        raise InputError(f"data set {name!r} lacks its {'name' if scheme == 'tfds' else 'path'}: write {source.usage}")
    if ":" not in source.usage and colon:
        raise InputError(f"data set {name!r}: {scheme} takes no argument, write {source.usage}")
    if options.image_size is not None:
        height_and_width(options.image_size)
    found = source.open(argument, options)
    if options.image_size is None or isinstance(found, Splits):
        return found
    return resize_dataset(found, options.image_size)


def _hint(name: str) -> str:
    """What an unknown name may have meant, as ", did you mean ...?" or nothing."""
    scheme, _, argument = name.partition(":")
    close = difflib.get_close_matches(scheme.lower(), SOURCES, n=1)
    if close:
        usage = SOURCES[close[0]].usage
        meant = f"{close[0]}:{argument}" if argument and ":" in usage else usage
    elif name.endswith(".npz"):
        meant = f"npz:{name}"
    elif name.endswith((".csv", ".tsv")):
        meant = f"table:{name}"
    elif name.endswith((".parquet", ".tar")):
        meant = f"{'parquet' if name.endswith('.parquet') else 'webdataset'}:{name}"
    elif name and _path(name).is_dir():
        if (_path(name) / METADATA).is_file():
            kind = "prepared"
        else:
            kind = "idx" if any(_path(name).glob("*train-images*idx3*")) else "folder"
        meant = f"{kind}:{name}"
    else:
        return ""
    return f", did you mean {meant!r}?"
