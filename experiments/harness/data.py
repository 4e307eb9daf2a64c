"""The one split of a data set: images to train on, to choose on and to report on, with their fingerprint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

import mae_align as ma
from experiments.harness.config import TAKE_TARGETS, RunConfig, Task
from mae_align.data.dataset import task_in_words
from mae_align.data.split import validation_rows
from mae_align.moments.moments import group_of
from mae_align.runtime.checks import are_class_labels
from mae_align.runtime.files import fingerprint
from mae_align.runtime.processes import refused_together


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A data set cut up by one rule, the same for every experiment with the same data, sizes, share and seed.

    The validation images are those that the data set has for it, else a share of every class of the training images.
    The training images are drawn from the others. With --max-train alone, validation images are drawn too, no more
    than train. Test images are drawn from the test set, the same however many train.
    Rows stay in the data set's order.

    Targets that are no classes are scaled to mean 0 and variance 1 on the training images, so that all columns weigh
    the same: r2 is then the mean over them.

    Attributes:
        name: of the data set.
        class_names: q names, of classes or of columns of the targets.
        train_images: [n, h, w, c] stored pixels, to fit on.
        train_labels: [n] class numbers, or [n, q] targets.
        validation_images: [v, h, w, c], to choose on.
        validation_labels: [v] or [v, q].
        test_images: [t, h, w, c], to report on.
        test_labels: [t] or [t, q].
        is_validation: [n + v] which of the training and validation images are for validation, in the data set's order.
        limited: whether --max-train was given.
        notes: what the data set was read as, where that is not as plain as it could be.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    is_validation: np.ndarray
    limited: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, config: RunConfig) -> Split:
        """Read a data set in every process and cut it up.

        Args:
            config: which data, their size, how many of them, and the seed of the draw.

        Returns:
            The split.

        Raises:
            InputError: data that cannot be read or split, or constant training images.

        Example:
            >>> split = Split.load(RunConfig(max_train=100, max_test=50))
            >>> len(split.train_labels), len(split.validation_labels), len(split.test_labels)
            (100, 100, 50)
        """
        return cls.of(load_together(config.data, image_size=config.image_size, seed=config.seed), config)

    @classmethod
    def of(cls, data: ma.ImageDataset, config: RunConfig) -> Split:
        """A data set cut up, see :meth:`load`."""
        check_task(data, config.TAKES)
        own = "validation" in data.parts
        if own:
            fitted, chosen = (np.arange(len(data.parts[part][1])) for part in ("train", "validation"))
        else:
            fitted, chosen = validation_rows(data.train_labels, config.validation_fraction, config.seed)
        # Generators of their own: networks of different --max-train are tested on the same images.
        draws = (np.random.default_rng(key) for key in (config.seed, [config.seed, 1], [config.seed, 2]))
        fitted = drawn(fitted, config.max_train, next(draws))
        tested = drawn(np.arange(len(data.test_labels)), config.max_test, next(draws))
        limit = config.max_train and len(fitted) if config.max_validation is None else config.max_validation
        chosen = drawn(chosen, limit, next(draws))
        if (data.train_images[fitted] == data.train_images[fitted[:1]]).all():
            raise ma.InputError("the training images are constant: there is nothing to reconstruct")
        data = of_equal_weight(data, fitted)
        images, labels = data.parts["validation" if own else "train"]
        missing = () if data.num_classes is None else _missing_classes(data, labels[chosen])
        # Validation images of their own come after the training images.
        is_chosen = np.repeat([False, True], [len(fitted), len(chosen)])
        return cls(
            data.name,
            tuple(data.class_names),
            data.train_images[fitted],
            data.train_labels[fitted],
            images[chosen],
            labels[chosen],
            data.test_images[tested],
            data.test_labels[tested],
            is_chosen if own else is_chosen[np.argsort(np.concatenate([fitted, chosen]))],
            config.max_train is not None,
            (*data.notes, *missing),
        )

    @property
    def num_classes(self) -> int | None:
        """Number of classes q; None where the targets are no classes."""
        return len(self.class_names) if are_class_labels(self.train_labels) else None

    @property
    def classes(self) -> int:
        """Number of classes q, for experiments that take nothing else.

        Raises:
            InputError: targets that are no classes.
        """
        if self.num_classes is None:
            raise ma.InputError(f"the targets of {self.name} are no classes")
        return self.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        h, w, c = self.train_images.shape[1:]
        return h, w, c

    @property
    def description(self) -> str:
        """The data and how many images of them, in words."""
        n, v, t = len(self.train_labels), len(self.validation_labels), len(self.test_labels)
        size = "x".join(map(str, self.image_shape))
        lines = [f"{self.name}: {n} training, {v} validation and {t} test images of {size}"]
        if self.num_classes is None:
            asked = task_in_words(self.train_labels, self.class_names)
            lines[0] += f", {asked}" + ", each scaled to variance 1" * (len(self.class_names) > 1)
        return "\n".join(lines + [f"Read so: {'; '.join(self.notes)}."] * bool(self.notes))

    @property
    def chance(self) -> float:
        """Test accuracy of always naming the most frequent training class."""
        most = np.bincount(self.train_labels, minlength=self.classes).argmax()
        return float((self.test_labels == most).mean())

    @property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of the images and labels trained, validated and tested on: what data.json holds."""
        parts = {
            "train": (self.train_images, self.train_labels),
            "validation": (self.validation_images, self.validation_labels),
            "test": (self.test_images, self.test_labels),
        }
        return {name: fingerprint(arrays, {}) for name, arrays in parts.items()}

    def train_and_validation(self) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation images together, [n + v, h, w, c], and their labels, in the order of the data set."""
        images = np.empty((len(self.is_validation), *self.image_shape), self.train_images.dtype)
        labels = np.empty((len(images), *self.train_labels.shape[1:]), self.train_labels.dtype)
        images[~self.is_validation], labels[~self.is_validation] = self.train_images, self.train_labels
        images[self.is_validation], labels[self.is_validation] = self.validation_images, self.validation_labels
        return images, labels

    def refit(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels that are fitted where everything is chosen already.

        All that :meth:`train_and_validation` has; after --max-train the training images alone, so that no more are
        fitted than were asked for.
        """
        return (self.train_images, self.train_labels) if self.limited else self.train_and_validation()

    def moments(self, *, groups: int = 1) -> tuple[ma.Moments, ma.Moments]:
        """Moments of the training images, and of the test images in groups.

        Args:
            groups: of test images; their spread gives standard errors.

        Returns:
            Both with one-hot targets of all classes, or the targets as they are.
        """
        classes = self.num_classes
        train = ma.Moments.from_arrays(self.train_images, self.train_labels, num_classes=classes)
        return train, ma.Moments.from_arrays(self.test_images, self.test_labels, num_classes=classes, groups=groups)


def check_task(data: ma.ImageDataset, takes: Sequence[Task]) -> None:
    """Refuse data whose labels an experiment has no measure for.

    Args:
        data: the data set.
        takes: what the experiment takes.

    Raises:
        InputError: naming what would do.

    Example:
        >>> check_task(ma.load_dataset("digits"), [Task.classes])
    """
    task = Task.classes if data.num_classes else Task.targets if data.class_names else Task.nothing
    if task in takes:
        return
    asked = task_in_words(data.train_labels, data.class_names)
    if task is Task.nothing:
        other = "give labels, folder:DIR or table:FILE.csv, or run diagnose_corruption or stream_moments"
    else:
        other = f"give one class for each image, or run {', '.join(TAKE_TARGETS[:-1])} or {TAKE_TARGETS[-1]}"
    raise ma.InputError(f"{data.name} has {asked}, which this experiment has no measure for: {other}")


def of_equal_weight(data: ma.ImageDataset, rows: np.ndarray) -> ma.ImageDataset:
    """A data set whose targets have mean 0 and variance 1 on some training images; one of classes as it is.

    A column that is constant there stays at 0.

    Args:
        data: the data set.
        rows: positions of the training images.

    Example:
        >>> of_equal_weight(ma.load_dataset("digits"), np.arange(10)).name
        'digits'
    """
    if data.num_classes is not None or not data.class_names:
        return data
    mean, std = data.train_labels[rows].mean(0), data.train_labels[rows].std(0)
    if not std.any():
        raise ma.InputError(f"the targets of {data.name} are the same for all {len(rows)} training images: take more")
    scale = np.where(std > 0, std, np.inf)
    return data.map_parts(lambda images, labels: (images, (labels - mean) / scale))


def _missing_classes(data: ma.ImageDataset, validation_labels: np.ndarray) -> tuple[str, ...]:
    """Which classes the held-out parts lack, where no note says so yet."""
    if any("has no image of" in note for note in data.notes):
        return ()
    notes, names = [], np.array(data.class_names)
    for part, labels in (("validation", validation_labels), ("test", data.test_labels)):
        if (lone := np.setdiff1d(data.train_labels, labels)).size:
            more = f" and {len(lone) - 5} more classes" if len(lone) > 5 else ""
            notes.append(f"there is no {part} image of {', '.join(names[lone[:5]])}{more}")
    return tuple(notes)


def drawn(rows: np.ndarray, most: int | None, rng: np.random.Generator) -> np.ndarray:
    """At most so many of the rows, drawn without repetition, in their order; None for all.

    Example:
        >>> drawn(np.arange(5), 3, np.random.default_rng(0)).shape
        (3,)
    """
    return rows if most is None or most >= len(rows) else np.sort(rng.choice(rows, most, replace=False))


def check_groups(groups: int, count: int) -> None:
    """Refuse groups of test images of which one would be empty.

    Args:
        groups: as given with --groups.
        count: test images.

    Raises:
        InputError: too many groups.

    Example:
        >>> check_groups(20, 359)
    """
    if len(np.unique(group_of(np.arange(count), groups))) < groups:
        raise ma.InputError(f"--groups {groups}: {count} test images leave a group empty, give fewer groups")


def load_together(label: str, *, image_size: int | tuple[int, int] | None, seed: int) -> ma.ImageDataset:
    """`mae_align.load_dataset` in every process; what one of them cannot load, all refuse.

    Args:
        label, image_size, seed: as for `load_dataset`, the same in every process.

    Returns:
        The data set.

    Raises:
        InputError: of the first process that cannot load it, such as one on a machine without the files.

    Example:
        >>> load_together("digits", image_size=None, seed=0).name
        'digits'
    """
    with refused_together():
        return ma.load_dataset(label, image_size=image_size, seed=seed)
