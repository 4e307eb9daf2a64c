"""``load_dataset``: from a short name to a data set."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from mae_align.data.dataset import ImageDataset
from mae_align.data.digits import load_digits
from mae_align.data.folder import load_folder
from mae_align.data.idx import load_idx
from mae_align.data.npz import load_npz
from mae_align.data.resize import check_image_size, resize_dataset
from mae_align.errors import InputError


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """What a source may need besides its name.

    Attributes:
        image_size: side in pixels to resize to, or None.
        seed: of the split, for sources without a test set of their own.
        test_fraction: share of the test images, for the same sources.
    """

    image_size: int | None
    seed: int
    test_fraction: float


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of data set that a name can ask for.

    Attributes:
        usage: how the name is written: ``scheme`` or ``scheme:ARGUMENT``.
        load: from the argument ("" without one) and the options to the data set.
    """

    usage: str
    load: Callable[[str, LoadOptions], ImageDataset]


def _path(argument: str) -> Path:
    return Path(os.path.expanduser(argument))


def _digits(argument: str, options: LoadOptions) -> ImageDataset:
    return load_digits(options.seed, options.test_fraction)


def _idx(argument: str, options: LoadOptions) -> ImageDataset:
    return load_idx(_path(argument))


def _npz(argument: str, options: LoadOptions) -> ImageDataset:
    return load_npz(_path(argument))


def _folder(argument: str, options: LoadOptions) -> ImageDataset:
    return load_folder(_path(argument), options.image_size, options.seed, options.test_fraction)


# A new source is one loader and one line here.
SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "digits": Source("digits", _digits),
        "idx": Source("idx:DIR", _idx),
        "npz": Source("npz:FILE", _npz),
        "folder": Source("folder:DIR", _folder),
    }
)


def load_dataset(
    name: str, *, image_size: int | None = None, seed: int = 0, test_fraction: float = 0.2
) -> ImageDataset:
    """Load a labelled image set by name.

    ============== ===========================================================================
    ``digits``      the 1,797 digits of 8 x 8 pixels that scikit-learn bundles
    ``idx:DIR``     MNIST-style IDX files, plain or gzipped
    ``npz:FILE``    arrays x_train, y_train, x_test, y_test, and class_names if there are any
    ``folder:DIR``  one sub-folder of image files per class, with train/ and test/ if there are any
    ============== ===========================================================================

    Args:
        name: one of the above; ``~`` stands for the home folder.
        image_size: resize to squares of this side in pixels (centre square, antialiased bicubic);
            None keeps the images as they are.
        seed: integer >= 0 of the stratified split, for sources without a test set of their own.
        test_fraction: share of the test images in that split, inside (0, 1).

    Returns:
        The data set: images [n, h, w, c], 8-bit pixels as uint8; labels [n] int64.

    Raises:
        InputError: unknown name, or data that cannot be used; one line that says what to do.

    Example:
        >>> load_dataset("digits")
        ImageDataset('digits', train 1438, test 359, image 8x8x1 uint8, 10 classes)
    """
    scheme, colon, argument = name.partition(":")
    source = SOURCES.get(scheme)
    if source is None:
        known = ", ".join(entry.usage for entry in SOURCES.values())
        raise InputError(f"unknown data set {name!r}{_hint(name)}; give one of: {known}")
    if ":" in source.usage and not argument:
        raise InputError(f"data set {name!r} lacks its path: write {source.usage}")
    if ":" not in source.usage and colon:
        raise InputError(f"data set {name!r}: {scheme} takes no argument, write {source.usage}")
    if image_size is not None:
        check_image_size(image_size)
    dataset = source.load(argument, LoadOptions(image_size, seed, test_fraction))
    return dataset if image_size is None else resize_dataset(dataset, image_size)


def _hint(name: str) -> str:
    """What an unknown name may have meant, as ", did you mean ...?" or nothing."""
    scheme, _, argument = name.partition(":")
    close = difflib.get_close_matches(scheme.lower(), SOURCES, n=1)
    if close:
        usage = SOURCES[close[0]].usage
        meant = f"{close[0]}:{argument}" if argument and ":" in usage else usage
    elif name.endswith(".npz"):
        meant = f"npz:{name}"
    elif name and _path(name).is_dir():
        is_idx = any(_path(name).glob("*train-images*idx3*"))
        meant = f"{'idx' if is_idx else 'folder'}:{name}"
    else:
        return ""
    return f", did you mean {meant!r}?"
