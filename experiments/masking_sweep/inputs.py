"""What the masking sweep starts from: a data set cut up, or files of moments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import mae_align as ma
from experiments.harness.data import Split
from mae_align.data.patches import ImageShape
from mae_align.data.transforms import jitter
from mae_align.moments.samples import merged
from mae_align.runtime.files import fingerprint

Summary = ma.Moments | ma.Samples


class Parts(NamedTuple):
    """Moments, or samples where they are fewer than the pixels, for every purpose.

    Attributes:
        train: what the reported curves are fitted on.
        choice: what the curves for choosing are fitted on, and the validation images; None for no choice.
        test: grouped held-out moments, or None for in-sample curves alone.
    """

    train: Summary
    choice: tuple[Summary, Summary] | None
    test: Summary | None


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set cut up.

    Attributes:
        split: its images.
        label: the setting ``data``.
        held_out: whether to choose and to report on held-out images.
        groups: of test images.
        jitter: noise added to the training and validation images, in standard deviations of their pixels.
        seed: of the noise.
    """

    split: Split
    label: str
    held_out: bool
    groups: int
    jitter: float
    seed: int

    @property
    def name(self) -> str:
        """Of the data set."""
        return self.split.name

    @property
    def description(self) -> str:
        """The data set in words."""
        if self.held_out:
            return self.split.description
        fitted = "training images alone" if self.split.limited else "training and validation images together"
        return f"{self.split.description}\nIn-sample, on {fitted}."

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Of the images as they are stored; the noise is a setting."""
        return self.split.fingerprint

    @property
    def image_shape(self) -> ImageShape:
        """(h, w, c)."""
        return self.split.image_shape

    def parts(self) -> Parts:
        """Moments of what the choice and what the report are fitted on, of validation images and of test images."""
        images, labels = self.split.train_and_validation()
        if self.jitter > 0:
            images = jitter(images, self.jitter, self.seed)
        chosen = self.split.is_validation
        if not self.held_out:
            used = ~chosen if self.split.limited else slice(None)
            return Parts(self._summary(images[used], labels[used]), None, None)
        fit = self._summary(images[~chosen], labels[~chosen])
        validation = self._summary(images[chosen], labels[chosen], like=fit)
        tests = self.split.test_images.astype(images.dtype, copy=False)
        test = self._summary(tests, self.split.test_labels, self.groups, like=fit)
        return Parts(fit if self.split.limited else merged(fit, validation), (fit, validation), test)

    def _summary(self, images: np.ndarray, labels: np.ndarray, groups: int = 1, like: Summary | None = None) -> Summary:
        made = "stored pixels"
        if self.jitter > 0:
            made = f"training images with jitter of {self.jitter:g} std, seed {self.seed}"
        classes = self.split.num_classes
        return ma.summarize(images, labels, num_classes=classes, groups=groups, preprocessing=made, like=like)


@dataclasses.dataclass(frozen=True)
class Files:
    """Moments from files, as ``python -m experiments.stream_moments`` writes them."""

    name: str
    label: str
    train: ma.Moments
    validation: ma.Moments | None
    test: ma.Moments | None

    @classmethod
    def read(cls, train: str, validation: str | None, test: str | None) -> Files:
        """Read files of moments.

        Args:
            train: path of the training moments.
            validation: of those on which the choice is made, or None.
            test: of the held-out ones, in at least 2 groups, or None.

        Returns:
            The moments.

        Raises:
            InputError: files that cannot be read or do not belong together, test moments without groups.
        """
        if validation is not None and test is None:
            raise ma.InputError(
                "--validation-moments without --test-moments: give the test images on which the choice is reported"
            )
        fitted = ma.Moments.load(train).ungrouped()
        chosen = None if validation is None else ma.Moments.load(validation).ungrouped()
        tested = None if test is None else ma.Moments.load(test)
        if tested is not None and (len(tested.counts) < 2 or not tested.counts.all()):
            raise ma.InputError(
                f"{test} has groups of {tested.counts.tolist()} images: standard errors need at least 2 groups, "
                "none empty; make it again with other --groups"
            )
        if chosen is not None:
            fitted.merge(chosen)  # refuses what does not belong together
        return cls(Path(train).name, f"moments:{train}", fitted, chosen, tested)

    @property
    def description(self) -> str:
        """The files in words."""
        n, v, t = ("no" if part is None else part.count for part in (self.train, self.validation, self.test))
        size = "x".join(map(str, self.image_shape))
        return f"{self.name}: {n} training, {v} validation and {t} test images of {size}"

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Of the moments that are there."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: fingerprint(part.state, {}) for name, part in found.items() if part is not None}

    @property
    def image_shape(self) -> ImageShape:
        """(h, w, c)."""
        return self.train.image_shape

    def parts(self) -> Parts:
        """The moments; validation images also belong to what the reported curves are fitted on."""
        if self.validation is None:
            return Parts(self.train, None, self.test)
        return Parts(self.train.merge(self.validation), (self.train, self.validation), self.test)


Inputs = Images | Files
