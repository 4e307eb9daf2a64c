"""The data set of an experiment, loaded by every process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

import mae_align as ma
from mae_align.data import stratified_split, validation_split
from mae_align.data.transforms import jitter
from mae_align.moments.moments import group_of
from mae_align.moments.samples import merged
from mae_align.runtime.processes import refused_together


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
