"""An image set in memory with what is asked about its images, checked once when it is made."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mae_align.runtime.checks import are_class_labels, as_array, check_images
from mae_align.runtime.errors import InputError

ImageShape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """Train and test images with class labels or other targets, as NumPy arrays.

    uint8 images stay uint8 (their moments are exact), float32 and float64 images stay what they
    are. Other integers within 0..255 become uint8 with a warning.

    Targets are one class for each image, or q columns: numbers, or attributes, which are 0 or 1. Without targets there
    are no columns, q = 0. Of whole numbers only one column [n] is taken for classes, and only attributes for columns;
    -1 and 1 become 0 and 1.

    Attributes:
        train_images: [n, h, w, c] pixels, in the units they are stored in.
        train_labels: [n] int64 classes in 0..num_classes - 1, or [n, q] float64 targets.
        test_images: [m, h, w, c], same shape and dtype of an image as in ``train_images``.
        test_labels: [m] int64, or [m, q] float64.
        class_names: one name per class, or per column of the targets.
        name: short name for titles and folders.
        validation_images: [v, h, w, c] to choose on, where the data set has a part for it; else None.
        validation_labels: [v] int64 or [v, q] float64, or None.
        notes: what the data set was read as, where that is not as plain as it could be, in words.

    Raises:
        InputError: shapes, dtypes, labels or names that do not fit together, NaN or infinite
            pixels or targets, an empty split, fewer than two classes, targets that are constant.

    Example:
        >>> x, y = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 0, 1])
        >>> data = ImageDataset(x, y, x[:2], y[:2], ("cat", "dog"), "pets")
        >>> data
        ImageDataset('pets', train 4, test 2, image 8x8x1 uint8, 2 classes)
        >>> data.num_classes, data.image_shape
        (2, (8, 8, 1))
        >>> ages = np.array([[31.5], [8.0], [64.2], [17.0]])
        >>> ImageDataset(x, ages, x[:2], ages[:2], ("age",), "faces")
        ImageDataset('faces', train 4, test 2, image 8x8x1 uint8, 1 target)
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    name: str
    validation_images: np.ndarray | None = None
    validation_labels: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, value in _checked(self).items():
            object.__setattr__(self, field, value)

    def __repr__(self) -> str:
        h, w, c = self.image_shape
        counts = ", ".join(f"{part} {len(labels)}" for part, (_, labels) in self.parts.items())
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"ImageDataset({self.name!r}, {counts}, image {h}x{w}x{c} {self.train_images.dtype}, "
            f"{task_in_words(self.train_labels, self.class_names)}{notes})"
        )

    @property
    def parts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Images and labels of the parts that are there, by name."""
        parts = {"train": (self.train_images, self.train_labels), "test": (self.test_images, self.test_labels)}
        if self.validation_images is not None and self.validation_labels is not None:
            parts["validation"] = self.validation_images, self.validation_labels
        return parts

    def map_parts(
        self, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], **others: Any
    ) -> ImageDataset:
        """The data set with the images and labels of every part changed in one way.

        Args:
            change: gives new images and labels of a part.
            others: further fields to replace.
        """
        fields = {}
        for part, arrays in self.parts.items():
            fields[f"{part}_images"], fields[f"{part}_labels"] = change(*arrays)
        return dataclasses.replace(self, **fields, **others)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None where the targets are no classes."""
        return len(self.class_names) if are_class_labels(self.train_labels) else None

    @property
    def classes(self) -> int:
        """Number of classes, where nothing else will do.

        Raises:
            InputError: targets that are no classes.
        """
        if self.num_classes is None:
            raise InputError(f"the targets of {self.name!r} are no classes: give one class for each image")
        return self.num_classes

    @property
    def image_shape(self) -> ImageShape:
        """Height, width and channels of one image."""
        h, w, c = self.train_images.shape[1:]
        return h, w, c


def readable(name: str) -> str:
    """A name of a file, with a sign for what is not UTF-8, so that it can be printed, drawn and written.

    Example:
        >>> readable("caf" + chr(0xDCE9)) == "caf" + chr(0xFFFD)
        True
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def encode_labels(train: object, *others: object) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Class numbers 0, 1, ... without gaps of labels that are text, identifiers, or start at 1; their names are kept.

    Args:
        train: [n] or [n, 1] text or whole numbers; the classes are what is found here, in sorted order.
        others: [m] labels of other parts.

    Returns:
        [n] int64 of every part, train first, and the name of each class.

    Raises:
        InputError: labels that are neither text nor whole numbers, negative ones, or a class that training has not.

    Example:
        >>> encode_labels(np.array(["dog", "cat", "dog"]), np.array(["cat"]))
        ([array([1, 0, 1]), array([0])], ('cat', 'dog'))
    """
    parts = [
        check_labels(part, "train labels" if i == 0 else f"labels {i + 1}") for i, part in enumerate((train, *others))
    ]
    classes = np.unique(parts[0])
    if classes.dtype.kind == "i" and classes.size and classes[0] < 0:
        raise InputError(f"train labels hold {classes[0]}: labels must be >= 0; drop images without a label")
    for part in parts[1:]:
        unseen = np.setdiff1d(part, classes)
        if unseen.size:
            raise InputError(
                f"labels hold {unseen[:5].tolist()}, which no training image has: all parts must share their classes"
            )
    return [np.searchsorted(classes, part).astype(np.int64) for part in parts], tuple(map(str, classes.tolist()))


def check_labels(labels: object, where: str) -> np.ndarray:
    """Class labels [n], as int64 or text; a column [n, 1] is flattened.

    Args:
        labels: [n] or [n, 1] integers or text.
        where: what the labels are, for messages.

    Returns:
        [n] int64, or text.

    Raises:
        InputError: other shape or dtype.

    Example:
        >>> check_labels(np.array([[1], [0]], np.uint8), "y_train")
        array([1, 0])
    """
    labels = as_array(labels, where)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise InputError(
            f"{where} has shape {list(labels.shape)}: give one class number per image, [n] "
            "(argmax turns one-hot rows into class numbers)"
        )
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    if labels.dtype.kind not in "biuU":
        raise InputError(f"{where} has dtype {labels.dtype}: give integer class numbers 0, 1, ... or names")
    return labels if labels.dtype.kind == "U" else labels.astype(np.int64)


def check_columns(values: object, where: str) -> np.ndarray:
    """Targets [n, q] as float64: numbers, or attributes as 0 and 1.

    Args:
        values: [n, q] floats, or integers or booleans that are 0 and 1, or -1 and 1. One column of floats may be [n].
        where: what the targets are, for messages.

    Returns:
        [n, q] float64.

    Raises:
        InputError: NaN or infinite values, with their rows; what may be classes as well as numbers.

    Example:
        >>> check_columns(np.array([[-1, 1], [1, 1]]), "y_train").tolist()
        [[0.0, 1.0], [1.0, 1.0]]
    """
    array = as_array(values, where)
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiub":
        raise InputError(
            f"{where} has shape {list(array.shape)} and dtype {array.dtype}: give class numbers [n], or targets [n, q]"
        )
    y = array.astype(np.float64)
    if not np.isfinite(y).all():
        rows = np.flatnonzero(~np.isfinite(y.reshape(len(y), -1)).all(1))
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise InputError(
            f"{where} holds NaN or infinite values in row(s) {', '.join(map(str, rows[:5]))}{more}, counted from 0: "
            "leave these images out or fill them in"
        )
    if array.ndim == 1:
        if (y == np.round(y)).all():
            raise InputError(
                f"{where} holds whole numbers as {array.dtype}: if they are classes, store them as integers; "
                "if they are numbers, store them as one column, y[:, None]"
            )
        return y[:, None]
    signs = np.isin(y, (-1, 1)).all(0) & (y < 0).any(0)
    y[:, signs] = (y[:, signs] + 1) / 2
    if array.dtype.kind in "iub" and y.shape[1]:
        if not np.isin(y, (0, 1)).all():
            raise InputError(
                f"{where} are whole numbers {list(array.shape)}: if they are classes, give one column [n] at a time; "
                "if they are numbers, store them as floats"
            )
        if (y.sum(1) == 1).all():
            raise InputError(
                f"{where} has a single 1 in every row: if the columns are classes, store y.argmax(1); if they are "
                "attributes, store them as floats"
            )
    return y


def check_task(values: object, where: str) -> np.ndarray:
    """What is asked about images in one layout: classes [n] as int64 or text, or targets [n, q] as float64.

    Args:
        values: what :func:`check_labels` or, for floats and several columns, :func:`check_columns` takes.
        where: what it is, for messages.

    Raises:
        InputError: as those.

    Example:
        >>> check_task(np.array([[3], [1]]), "y").tolist(), check_task(np.array([0.5, 2.0]), "y").tolist()
        ([3, 1], [[0.5], [2.0]])
    """
    array = as_array(values, where)
    columns = array.dtype.kind == "f" or (array.ndim == 2 and array.shape[1] != 1)
    return check_columns(array, where) if columns else check_labels(array, where)


def task_in_words(labels: np.ndarray, names: Sequence[str]) -> str:
    """What is asked about images, in words.

    Args:
        labels: [n] class numbers or [n, q] targets.
        names: of the classes or columns.

    Example:
        >>> task_in_words(np.zeros((4, 0)), ()), task_in_words(np.array([0, 1]), ("cat", "dog"))
        ('no targets', '2 classes')
    """
    count = len(names)
    if labels.ndim == 1:
        return f"{count} classes"
    if not count:
        return "no targets"
    word = "attribute" if np.isin(labels, (0, 1)).all() else "target"
    return f"{count} {word}{'s' * (count > 1)}"


def _checked(data: ImageDataset) -> dict[str, object]:
    """The fields of a data set, checked and converted to their documented types."""
    name = readable(data.name)
    names = tuple(readable(str(value)) for value in data.class_names)
    if (data.validation_images is None) != (data.validation_labels is None):
        raise InputError(f"{name!r} has validation images or labels alone: give both or none")
    fields: dict[str, object] = {"name": name, "class_names": names}
    first: tuple[np.ndarray, np.ndarray] | None = None
    for part, arrays in data.parts.items():
        images, labels = _checked_split(*arrays, names, f"{part}_{{}} of {name!r}")
        first = (images, labels) if first is None else first
        train, targets = first
        if train.shape[1:] != images.shape[1:]:
            raise InputError(
                f"images of {name!r} are {list(train.shape[1:])} in train but {list(images.shape[1:])} "
                f"in {part}: bring both to one height, width and number of channels"
            )
        if train.dtype != images.dtype:
            raise InputError(
                f"images of {name!r} are {train.dtype} in train but {images.dtype} in {part}: use one dtype"
            )
        if targets.ndim != labels.ndim:
            raise InputError(f"{name!r} has classes in one of train and {part} and other targets in the other")
        fields |= {f"{part}_images": images, f"{part}_labels": labels}
    assert first is not None  # there is a training part
    fields["notes"] = tuple(map(readable, [*data.notes, *_task_notes(first[1], names, name)]))
    return fields


def _task_notes(labels: np.ndarray, names: tuple[str, ...], name: str) -> list[str]:
    """What is to be said of training targets; those that ask nothing are refused."""
    if labels.ndim == 1 and np.all(labels == labels[0]):
        raise InputError(f"all training images of {name!r} are of one class: give at least two")
    if labels.ndim == 1 or not names:
        return []
    notes = []
    if len(names) > 1 and (np.isin(labels, (0, 1)).all(1) & (labels.sum(1) == 1)).all():
        notes = ["every row of the targets has a single 1: if the columns are classes, store y.argmax(1)"]
    constant = [each for each, same in zip(names, (labels == labels[0]).all(0), strict=True) if same]
    if len(constant) == len(names):
        raise InputError(f"the targets of {name!r} are the same for all training images: there is nothing to learn")
    return notes + [f"{each} is the same for all training images" for each in constant]


def _checked_split(
    images: np.ndarray, labels: np.ndarray, names: tuple[str, ...], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one split; ``where`` names them with a {} for which of the two."""
    images = _checked_images(images, where.format("images"))
    labels = check_task(labels, where.format("labels"))
    if labels.dtype.kind == "U":
        raise InputError(f"{where.format('labels')} are text: numbers, names = ma.encode_labels(train, test, ...)")
    if len(images) != len(labels):
        raise InputError(
            f"{where.format('images')} number {len(images)} but {where.format('labels')} "
            f"{len(labels)}: give one label per image"
        )
    if labels.ndim == 2:
        if labels.shape[1] != len(names):
            raise InputError(
                f"{where.format('labels')} have {labels.shape[1]} columns but there are {len(names)} names: give one "
                "name per column"
            )
        return images, labels
    if len(names) < 2:
        raise InputError(f"{where.format('labels')}: {len(names)} class name(s), and a task needs at least two")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(names):
        raise InputError(
            f"{where.format('labels')} run from {low} to {high} but there are {len(names)} class "
            f"names: labels must lie in 0..{len(names) - 1}"
        )
    return images, labels


def _checked_images(images: np.ndarray, where: str) -> np.ndarray:
    """Images [n, h, w, c] as uint8 or floats, finite."""
    images = as_array(images, where)
    if images.dtype.kind in "iu" and images.dtype != np.uint8 and images.size:
        low, high = int(images.min()), int(images.max())
        if low < 0 or high > 255:
            raise InputError(
                f"{where} are {images.dtype} from {low} to {high}: give uint8 pixels 0..255, or floats for other ranges"
            )
        warnings.warn(f"{where}: {images.dtype} pixels stored as uint8", stacklevel=6)
        images = images.astype(np.uint8)
    try:
        return check_images(images)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
