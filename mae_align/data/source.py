"""Random access to labelled images, in memory or not: what pipelines stream from."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, NamedTuple

import numpy as np

from mae_align.data.dataset import ImageDataset, ImageShape
from mae_align.data.split import stratified_split

PROGRESS_FROM = 2000  # images; fewer are read in a second or two
BATCH = 256  # images handed to the pool at once, so that an interrupt waits for no more than these


class ImageSource(abc.ABC):
    """Images of one shape with their labels by position: ``len(source)``, ``source[i] -> (image, label)``.

    A label is a class number, or a row of targets where :attr:`num_targets` says how many.

    Reading is thread-safe and has no state. Nothing but the images asked for is held in memory.

    Attributes:
        name: short name for titles.
        class_names: one name per class, or per column of the targets.
        num_targets: number of columns of the targets; None where there are classes.
        image_shape: height, width, channels of every image.
        pixel_dtype: uint8, float32 or float64.
        in_memory: whether reading costs no more than a copy, so that threads would not help.

    Example:
        >>> from mae_align.data import open_source
        >>> source = open_source("digits", "train")
        >>> image, label = source[0]
        >>> len(source), image.shape, source.num_classes
        (1438, (8, 8, 1), 10)
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: ImageShape
    pixel_dtype: np.dtype
    in_memory: ClassVar[bool] = False

    @property
    def num_targets(self) -> int | None:
        """Number of columns of the targets; None where there are classes."""
        return None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, i: int) -> tuple[np.ndarray, int | np.ndarray]:
        """Image [h, w, c] and label at a position in 0..len - 1."""

    @abc.abstractmethod
    def labels(self) -> np.ndarray:
        """All labels, [n] int64 or [n, q] float64; reads every record where labels lie beside the images."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A text that changes when the data do: pixels where they are in memory, else files and sizes."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, int | np.ndarray]]:
        return (self.read(i) for i in range(len(self)))

    def __getitem__(self, i: int) -> tuple[np.ndarray, int | np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)} of {self.name!r}")
        return self.read(int(i))

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None where the labels are no classes."""
        return len(self.class_names) if self.num_targets is None else None

    def empty_labels(self, count: int) -> np.ndarray:
        """An array for so many labels: [count] int64 or [count, q] float64."""
        if self.num_targets is None:
            return np.empty(count, np.int64)
        return np.empty((count, self.num_targets))

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images [b, h, w, c] and labels, [b] int64 or [b, q] float64, at positions [b], one after another.

        Raises:
            IndexError: a position outside 0..len - 1.
            InputError: an image that cannot be read.
        """
        images = np.empty((len(index), *self.image_shape), self.pixel_dtype)
        labels = self.empty_labels(len(index))
        for row, i in enumerate(index.tolist()):
            images[row], labels[row] = self[i]
        return images, labels


class Splits(NamedTuple):
    """The parts of a data set.

    Attributes:
        train: to fit on.
        test: to report on.
        validation: to choose on, where the data set has a part for it.
        notes: what it was read as, where that is not as plain as it could be, in words.
    """

    train: ImageSource
    test: ImageSource
    validation: ImageSource | None = None
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, ImageSource]:
        """The parts that are there, by name.

        Example:
            >>> from mae_align.data import open_splits
            >>> list(open_splits("digits").parts)
            ['train', 'test']
        """
        every = {"train": self.train, "test": self.test, "validation": self.validation}
        return {name: source for name, source in every.items() if source is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(ImageSource):
    """Images in memory as a source.

    Attributes:
        images: [n, h, w, c], as :class:`ImageDataset` holds them.
        label_array: [n] int64 classes or [n, q] float64 targets.
        class_names: one name per class, or per column.
        name: short name.

    Example:
        >>> x, y = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 0, 1])
        >>> source = ArraySource(x, y, ("cat", "dog"), "pets")
        >>> source.take(np.array([3, 1]))[1]
        array([1, 1])
    """

    images: np.ndarray
    label_array: np.ndarray
    class_names: tuple[str, ...]
    name: str
    in_memory: ClassVar[bool] = True

    @property
    def image_shape(self) -> ImageShape:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Height, width and channels of one image."""
        h, w, c = self.images.shape[1:]
        return h, w, c

    @property
    def pixel_dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the array."""
        return self.images.dtype

    @property
    def num_targets(self) -> int | None:
        """Number of columns of the targets; None where there are classes."""
        return None if self.label_array.ndim == 1 else self.label_array.shape[1]

    def __len__(self) -> int:
        return len(self.label_array)

    def read(self, i: int) -> tuple[np.ndarray, int | np.ndarray]:
        """Image and label at a position."""
        label = self.label_array[i]
        return self.images[i], label if label.ndim else int(label)

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels at positions [b]."""
        if len(index) and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"positions {index.min()}..{index.max()} of {len(self)} images of {self.name!r}")
        return self.images[index], self.label_array[index]

    def labels(self) -> np.ndarray:
        """All labels."""
        return self.label_array

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels."""
        digest = hashlib.sha256(f"{self.images.shape} {self.images.dtype}".encode())
        for array in (self.images, self.label_array):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class SubsetSource(ImageSource):
    """Some images of another source, in the order given.

    Attributes:
        source: where they are read from.
        index: [m] positions in it.
        name: short name.

    Example:
        >>> x, y = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 0, 1])
        >>> SubsetSource(ArraySource(x, y, ("cat", "dog"), "pets"), np.array([3, 0]), "two").labels()
        array([1, 0])
    """

    source: ImageSource
    index: np.ndarray
    name: str

    @property
    def class_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the whole."""
        return self.source.class_names

    @property
    def image_shape(self) -> ImageShape:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the whole."""
        return self.source.image_shape

    @property
    def pixel_dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the whole."""
        return self.source.pixel_dtype

    @property
    def num_targets(self) -> int | None:
        """Of the whole."""
        return self.source.num_targets

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> tuple[np.ndarray, int | np.ndarray]:
        """Image and label at a position of the subset."""
        return self.source.read(int(self.index[i]))

    def labels(self) -> np.ndarray:
        """All labels of the subset."""
        return self.source.labels()[self.index]

    def fingerprint(self) -> str:
        """Of the whole and the positions."""
        return f"{self.source.fingerprint()} {hashlib.sha256(self.index.astype(np.int64).tobytes()).hexdigest()}"


def dataset_splits(dataset: ImageDataset) -> Splits:
    """Both parts of a data set in memory as sources; nothing is copied.

    Example:
        >>> x, y = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 0, 1])
        >>> len(dataset_splits(ImageDataset(x, y, x[:2], y[:2], ("cat", "dog"), "pets")).test)
        2
    """
    names, name = dataset.class_names, dataset.name
    parts = {part: ArraySource(images, labels, names, name) for part, (images, labels) in dataset.parts.items()}
    return Splits(**parts, notes=dataset.notes)


def split_off_test(source: ImageSource, test_fraction: float, seed: int, name: str) -> Splits:
    """A source divided at random within each class, see :func:`stratified_split`.

    Args:
        source: the whole.
        test_fraction: share of the test images, inside (0, 1).
        seed: integer >= 0.
        name: short name of the parts.

    Raises:
        InputError: a class with fewer than two images, a fraction outside (0, 1), a negative seed.

    Example:
        >>> x, y = np.zeros((8, 8, 8, 1), np.uint8), np.arange(8) % 2
        >>> parts = split_off_test(ArraySource(x, y, ("cat", "dog"), "pets"), 0.25, 0, "pets")
        >>> len(parts.train), len(parts.test)
        (6, 2)
    """
    labels = source.labels()
    # Split by the names, so that a message about a class can name it.
    classes = labels.ndim == 1 and labels.min() >= 0
    names = np.array(source.class_names)[labels] if classes else labels
    train, test = stratified_split(names, test_fraction, seed)
    return Splits(SubsetSource(source, train, name), SubsetSource(source, test, name))


def in_memory(splits: Splits) -> ImageDataset:
    """All images of both parts as arrays, read side by side on all cores.

    Args:
        splits: sources of one image shape.

    Returns:
        The data set; needs (n + m) h w c bytes for n + m 8-bit images.

    Raises:
        InputError: an image that cannot be read, or what :class:`ImageDataset` refuses.

    Example:
        >>> x, y = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 0, 1])
        >>> data = ImageDataset(x, y, x[:2], y[:2], ("cat", "dog"), "pets")
        >>> in_memory(dataset_splits(data))
        ImageDataset('pets', train 4, test 2, image 8x8x1 uint8, 2 classes)
    """
    from tqdm.auto import tqdm

    arrays: dict[str, np.ndarray] = {}
    name, total = splits.train.name, sum(map(len, splits.parts.values()))
    bar = tqdm(total=total, desc=f"{name}: images", unit="image", disable=total <= PROGRESS_FROM)
    # Decoding releases the interpreter lock, so threads use all cores.
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for part, source in splits.parts.items():
            images = np.empty((len(source), *source.image_shape), source.pixel_dtype)
            labels = source.empty_labels(len(source))
            for start in range(0, len(source), BATCH):
                batch = range(start, min(start + BATCH, len(source)))
                for i, (image, label) in zip(batch, pool.map(source.read, batch), strict=True):
                    images[i], labels[i] = image, label
                    bar.update()
            arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    return ImageDataset(**arrays, class_names=splits.train.class_names, name=name, notes=splits.notes)
