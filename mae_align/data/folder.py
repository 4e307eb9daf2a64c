"""Folders of image files, one sub-folder per class."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mae_align.data import source
from mae_align.data.dataset import ImageShape, readable
from mae_align.data.layout import Files, read_layout, read_pictures
from mae_align.data.pictures import Header, read_header, read_picture
from mae_align.data.resize import ImageSize, height_and_width, resize_picture
from mae_align.data.source import ImageSource, Splits, split_off_test
from mae_align.runtime.errors import InputError


def open_folder(root: Path, image_size: ImageSize | None, seed: int, test_fraction: float) -> Splits:
    """The images of a folder with one sub-folder per class, decoded when they are read.

    Either ``root/CLASS/...`` (split at random within each class), or ``root/train/CLASS/...`` with other parts beside
    it, see :func:`mae_align.data.layout.read_layout`. Images are tested on the part for tests, or on that for
    validation where there is no other. Hidden names, those of systems and files that are no images are passed over.

    Pictures are turned as their EXIF orientation says. They keep one channel if all of them are grey (transparency is
    dropped), else they become RGB. Grey pictures of 16 bits become float32 in their own units; other pictures of more
    than 8 bits per channel are refused. Without ``image_size`` all must have one size; with it the middle of
    each is resized, see :func:`mae_align.data.resize.resize_picture`.

    Args:
        root: the folder.
        image_size: side of a square, or (height, width), in pixels, or None to keep the images as they are.
        seed: of the split, where there is no test folder.
        test_fraction: share of the test images, where there is no test folder.

    Returns:
        Sources of images [h, w, c] uint8, or float32 where there are 16 bits, c = 1 or 3. Every file's header has been
        read. The notes say what the folder was read as.

    Raises:
        InputError: missing or empty folders, or such that can be read in two ways, fewer than two classes, classes
            without training images, mixed sizes or depths, colours of more than 8 bits, an unreadable image.

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
    name = readable(root.resolve().name)
    layout = read_layout(root)
    return picture_splits(
        layout.parts,
        tuple(map(readable, layout.classes)),
        name,
        layout.notes,
        image_size=image_size,
        seed=seed,
        test_fraction=test_fraction,
    )


def open_pictures(root: Path, image_size: ImageSize | None, seed: int, test_fraction: float) -> Splits:
    """The images of a folder without labels, decoded when they are read.

    All image files in it and below it, or those of the parts, where every sub-folder is called like a part of the data
    and one is for training. What is said of pictures at :func:`open_folder` holds here.

    Args:
        root: the folder.
        image_size: side of a square, or (height, width), in pixels, or None to keep the images as they are.
        seed: of the split, where there is no test folder.
        test_fraction: share of the test images, where there is no test folder.

    Returns:
        Sources of images whose labels have no columns, [n, 0].

    Raises:
        InputError: as :func:`open_folder`; fewer than two images.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for i in range(4):
        ...     Image.new("L", (6, 4), i).save(root / f"{i}.png")
        >>> splits = open_pictures(root, None, seed=0, test_fraction=0.5)
        >>> len(splits.train), splits.train.num_targets
        (2, 0)
    """
    if not root.is_dir():
        raise InputError(f"no folder {root}: give a folder of pictures, images:DIR")
    parts, notes = read_pictures(root)
    return picture_splits(
        parts,
        (),
        readable(root.resolve().name),
        notes,
        image_size=image_size,
        seed=seed,
        test_fraction=test_fraction,
    )


def picture_splits(
    parts: Mapping[str, Files],
    names: tuple[str, ...],
    name: str,
    notes: tuple[str, ...],
    *,
    image_size: ImageSize | None,
    seed: int,
    test_fraction: float,
) -> Splits:
    """Image files of every part as sources; where there is no part for tests, one is made.

    Args:
        parts: files by train, validation, test; train is there.
        names: of the classes, or of the columns of the labels.
        name: of the data set.
        notes: what it was read as.
        image_size: side of a square, or (height, width), in pixels, or None to keep the images as they are.
        seed: of the split, where train is the only part.
        test_fraction: share of the test images, likewise.

    Raises:
        InputError: as :func:`open_folder`.
    """
    picture = _common(list(itertools.chain.from_iterable(files.paths for files in parts.values())), image_size, name)
    sources: dict[str, ImageSource] = {
        part: FolderSource(files, *picture, image_size, names, name) for part, files in parts.items()
    }
    if len(sources) == 1:
        return split_off_test(sources["train"], test_fraction, seed, name)._replace(notes=notes)
    if "test" not in sources:
        sources["test"] = sources.pop("validation")
        notes += ("there are no other test images: it is tested on the validation set",)
    return Splits(**sources, notes=notes)


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(ImageSource):
    """Image files as a source; made by :func:`open_folder`.

    Attributes:
        files: their paths and labels.
        image_shape: height, width and channels that the pictures are brought to.
        pixel_dtype: uint8, or float32 for pictures of 16 bits.
        image_size: side to resize to, or None where all have this shape already.
        class_names: one name per class.
        name: short name.
    """

    files: Files
    image_shape: ImageShape
    pixel_dtype: np.dtype
    image_size: ImageSize | None
    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.files.paths)

    @property
    def num_targets(self) -> int | None:
        """Number of columns of the targets; None where there are classes."""
        return None if self.files.labels.ndim == 1 else self.files.labels.shape[1]

    def read(self, i: int) -> tuple[np.ndarray, int | np.ndarray]:
        """Decode one file."""
        image = _read_image(self.files.paths[i], self.image_shape[2], self.image_size)
        if image.shape != self.image_shape:
            raise InputError(
                f"{self.files.paths[i]} has another size than its header said: it has changed, or it is a PNG that "
                "says after its pixels how it is to be turned; save it upright and start again"
            )
        label = self.files.labels[i]
        return image, label if label.ndim else int(label)

    def labels(self) -> np.ndarray:
        """All labels."""
        return self.files.labels

    def fingerprint(self) -> str:
        """SHA-256 of labels, paths, sizes and times of change."""
        digest = hashlib.sha256(self.files.labels.tobytes())
        for path in self.files.paths:
            stat = path.stat()
            digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def _common(paths: Sequence[Path], image_size: ImageSize | None, name: str) -> tuple[ImageShape, np.dtype]:
    """Shape and dtype of all images, from their headers, so that mixed sizes show before long reading."""
    from tqdm.auto import tqdm

    first: Header | None = None
    colour = None
    for path in tqdm(paths, desc=f"{name}: headers", unit="file", disable=len(paths) <= source.PROGRESS_FROM):
        header = read_header(path)
        first = first or header
        if header.size != first.size and image_size is None:
            raise InputError(
                f"{path} is {header.size[0]} x {header.size[1]} pixels but {paths[0]} is {first.size[0]} x "
                f"{first.size[1]}: pass image_size to resize all images to one size"
            )
        if header.deep != first.deep:
            one, other = (paths[0], path) if header.deep else (path, paths[0])
            raise InputError(f"{other} has 16 bits per pixel and {one} 8: bring all to one depth")
        colour = colour or (None if header.grey else path)
    assert first is not None  # there is at least one file per class
    if first.deep and colour is not None:
        raise InputError(f"{colour} has colours beside pictures of 16 bits: load the arrays as npz:FILE")
    width, height = first.size if image_size is None else height_and_width(image_size)[::-1]
    return (height, width, 1 if colour is None else 3), np.dtype(np.float32 if first.deep else np.uint8)


def _read_image(path: Path, channels: int, image_size: ImageSize | None) -> np.ndarray:
    """One image [h, w, 1] or [h, w, 3], uint8 or, of 16 bits, float32."""
    picture = read_picture(path, channels)
    if image_size is not None:
        picture = resize_picture(picture, image_size)
    array = np.asarray(picture)
    return array[..., None] if channels == 1 else array
