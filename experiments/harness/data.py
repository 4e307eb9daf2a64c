"""The one split of a data set: images to train on, to choose on and to report on, with their fingerprint."""

from __future__ import annotations

import dataclasses

import numpy as np

import mae_align as ma
from experiments.harness.config import RunConfig
from mae_align.data.split import validation_rows
from mae_align.moments.moments import group_of
from mae_align.runtime.files import fingerprint
from mae_align.runtime.processes import refused_together


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A data set cut up by one rule, the same for every experiment with the same data, sizes, share and seed.

    The validation images are those that the data set has for it, else a share of every class of the training images.
    The training images are drawn from the others. With --max-train alone, validation images are drawn too, no more
    than train. Test images are drawn from the test set, the same however many train.
    Rows stay in the data set's order.

    Attributes:
        name: of the data set.
        class_names: q names.
        train_images: [n, h, w, c] stored pixels, to fit on.
        train_labels: [n] class numbers.
        validation_images: [v, h, w, c], to choose on.
        validation_labels: [v].
        test_images: [t, h, w, c], to report on.
        test_labels: [t].
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
        data = load_together(config.data, image_size=config.image_size, seed=config.seed)
        if data.validation_images is None or data.validation_labels is None:
            fitted, chosen = validation_rows(data.train_labels, config.validation_fraction, config.seed)
            kept_for_choice = data.train_images, data.train_labels
        else:
            fitted, chosen = np.arange(len(data.train_labels)), np.arange(len(data.validation_labels))
            kept_for_choice = data.validation_images, data.validation_labels
        # Generators of their own: networks of different --max-train are tested on the same images.
        draws = (np.random.default_rng(key) for key in (config.seed, [config.seed, 1], [config.seed, 2]))
        fitted = drawn(fitted, config.max_train, next(draws))
        tested = drawn(np.arange(len(data.test_labels)), config.max_test, next(draws))
        most = config.max_validation
        if most is None and config.max_train is not None:
            most = len(fitted)
        chosen = drawn(chosen, most, next(draws))
        choice = kept_for_choice[0][chosen], kept_for_choice[1][chosen]
        images = data.train_images[fitted]
        if (images == images[:1]).all():
            raise ma.InputError("the training images are constant: there is nothing to reconstruct")
        names, notes = np.array(data.class_names), data.notes
        for part, labels in (("validation", choice[1]), ("test", data.test_labels)):
            if (lone := np.setdiff1d(data.train_labels, labels)).size and not any(
                "has no image of" in n for n in notes
            ):
                more = f" and {len(lone) - 5} more classes" if len(lone) > 5 else ""
                notes += (f"there is no {part} image of {', '.join(names[lone[:5]])}{more}",)
        # Validation images of their own come after the training images.
        of_training = chosen if data.validation_labels is None else chosen[:0]
        own = len(chosen) - len(of_training)
        return cls(
            data.name,
            tuple(data.class_names),
            images,
            data.train_labels[fitted],
            *choice,
            data.test_images[tested],
            data.test_labels[tested],
            np.concatenate([np.isin(np.sort(np.concatenate([fitted, of_training])), of_training), np.ones(own, bool)]),
            config.max_train is not None,
            notes,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes q."""
        return len(self.class_names)

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
        return "\n".join(lines + [f"Read so: {'; '.join(self.notes)}."] * bool(self.notes))

    @property
    def chance(self) -> float:
        """Test accuracy of always naming the most frequent training class."""
        most = np.bincount(self.train_labels, minlength=self.num_classes).argmax()
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
        labels = np.empty(len(images), self.train_labels.dtype)
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
            Both with one-hot targets of all classes.
        """
        classes = self.num_classes
        train = ma.Moments.from_arrays(self.train_images, self.train_labels, num_classes=classes)
        return train, ma.Moments.from_arrays(self.test_images, self.test_labels, num_classes=classes, groups=groups)


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


def load_together(label: str, *, image_size: int | None, seed: int) -> ma.ImageDataset:
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
