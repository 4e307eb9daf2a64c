"""The one split of a data set: images to train on, to choose on and to report on, with their fingerprint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

import mae_align as ma
from experiments.harness.config import RunConfig
from mae_align.data import stratified_split, validation_split
from mae_align.data.transforms import jitter
from mae_align.moments.moments import group_of
from mae_align.moments.samples import merged
from mae_align.runtime.files import fingerprint
from mae_align.runtime.processes import refused_together


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A data set cut up by one rule, the same for every experiment with the same data, sizes, share and seed.

    The validation images are a share of every class of the training images; the training images are drawn from the
    others; test images are drawn from the test set. Rows stay in the order of the data set.

    Attributes:
        name: of the data set.
        class_names: q names.
        train_images: [n, h, w, c] stored pixels, to fit on.
        train_labels: [n] class numbers.
        validation_images: [v, h, w, c], to choose on.
        validation_labels: [v].
        test_images: [t, h, w, c], to report on.
        test_labels: [t].
    """

    name: str
    class_names: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

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
            (100, 287, 50)
        """
        data = load_together(config.data, image_size=config.image_size, seed=config.seed)
        fitted, chosen = stratified_split(data.train_labels, config.validation_fraction, config.seed)
        rng = np.random.default_rng(config.seed)
        fitted = drawn(fitted, config.max_train, rng)
        tested = drawn(np.arange(len(data.test_labels)), config.max_test, rng)
        images = data.train_images[fitted]
        if (images == images[:1]).all():
            raise ma.InputError("the training images are constant: there is nothing to reconstruct")
        return cls(
            data.name,
            tuple(data.class_names),
            images,
            data.train_labels[fitted],
            data.train_images[chosen],
            data.train_labels[chosen],
            data.test_images[tested],
            data.test_labels[tested],
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
        return f"{self.name}: {n} training, {v} validation and {t} test images of {size}"

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


Summary = ma.Moments | ma.Samples


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Moments, or samples where they are fewer than the pixels, for every purpose.

    Attributes:
        name: of the data, for the summary.
        train: what the reported curves are fitted on.
        choice: what the curves for choosing are fitted on, and the validation images; None for no choice.
        test: grouped held-out moments, or None for in-sample curves alone.
    """

    name: str
    train: Summary
    choice: tuple[Summary, Summary] | None
    test: Summary | None


@dataclasses.dataclass(frozen=True)
class MomentFiles:
    """Moment files, as ``python -m experiments.stream_moments`` writes them."""

    train: str
    validation: str | None
    test: str | None

    def load(self) -> Inputs:
        """Read the files; the validation images also belong to the training images of the reported curves.

        Raises:
            InputError: files that cannot be read or do not belong together, test moments without groups.
        """
        if self.validation is not None and self.test is None:
            raise ma.InputError(
                "--validation-moments without --test-moments: give the test images on which the choice is reported"
            )
        train = ma.Moments.load(self.train).ungrouped()
        test = None if self.test is None else ma.Moments.load(self.test)
        if test is not None and (len(test.counts) < 2 or not test.counts.all()):
            raise ma.InputError(
                f"{self.test} has groups of {test.counts.tolist()} images: standard errors need at least 2 groups, "
                "none empty; make it again with other --groups"
            )
        name = Path(self.train).name
        if self.validation is None:
            return Inputs(name, train, None, test)
        validation = ma.Moments.load(self.validation).ungrouped()
        return Inputs(name, train.merge(validation), (train, validation), test)


@dataclasses.dataclass(frozen=True)
class DataChoices:
    """How a data set is cut up: see the fields of the same names of the masking sweep's settings."""

    held_out: bool
    validation_fraction: float
    groups: int
    jitter: float
    seed: int

    def check(self, data: ma.ImageDataset) -> None:
        """Refuse choices that do not fit the data.

        Raises:
            InputError: constant images, classes too small to split, too many groups.
        """
        if (data.train_images == data.train_images[:1]).all():
            raise ma.InputError("the training images are constant: there is nothing to reconstruct")
        if self.held_out:
            stratified_split(data.train_labels, self.validation_fraction, self.seed)
            tests = len(data.test_images)
            if not 2 <= self.groups <= tests or len(set(group_of(np.arange(tests), self.groups))) < self.groups:
                raise ma.InputError(
                    f"--groups {self.groups}: with {tests} test images give fewer groups (at least 2), "
                    "none may be empty"
                )

    def moments(self, data: ma.ImageDataset) -> Inputs:
        """The moments of a checked data set."""
        if self.jitter > 0:
            train = jitter(data.train_images, self.jitter, self.seed)
            data = dataclasses.replace(data, train_images=train, test_images=data.test_images.astype(train.dtype))
        if not self.held_out:
            return Inputs(data.name, self._part(data, data.train_images, data.train_labels), None, None)
        split = validation_split(data, self.validation_fraction, self.seed)
        fit = self._part(data, split.train_images, split.train_labels)
        validation = self._part(data, split.test_images, split.test_labels, like=fit)
        test = self._part(data, data.test_images, data.test_labels, self.groups, like=fit)
        return Inputs(data.name, merged(fit, validation), (fit, validation), test)

    def _part(
        self,
        data: ma.ImageDataset,
        images: np.ndarray,
        labels: np.ndarray,
        groups: int = 1,
        like: Summary | None = None,
    ) -> Summary:
        made = "stored pixels"
        if self.jitter > 0:
            made = f"training images with jitter of {self.jitter:g} std, seed {self.seed}"
        classes = data.num_classes
        return ma.summarize(images, labels, num_classes=classes, groups=groups, preprocessing=made, like=like)
