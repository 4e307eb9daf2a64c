"""What masking is worth: the mask that gains the most, and what it gains in r2 and in accuracy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd

import mae_align as ma
from experiments.harness.statistics import WORTH, accuracy_difference
from experiments.masking_sweep.inputs import Images, Inputs, Parts
from mae_align.corruption import PatchMask


@dataclasses.dataclass(frozen=True)
class Worth:
    """The mask and number of features that gain the most on validation images, measured on test images.

    Attributes:
        k: number of features.
        mask: share of masked patches and their size, in words.
        r2_change: r2 of a linear probe minus that without mask [percentage points].
        r2_change_se: its standard error, paired over groups of test images.
        accuracy_no_mask: share of test images that the least-squares classifier on k features gets right, without mask
            [percentage points]; NaN where it is not known.
        accuracy: likewise with the mask.
        accuracy_change: their difference.
        accuracy_change_se: its standard error, paired over test images.
    """

    k: int
    mask: str
    r2_change: float
    r2_change_se: float
    accuracy_no_mask: float = math.nan
    accuracy: float = math.nan
    accuracy_change: float = math.nan
    accuracy_change_se: float = math.nan

    @property
    def sentence(self) -> str:
        """What it means for the user, then the numbers."""
        r2 = f"{self.r2_change:+.2f} +- {self.r2_change_se:.2f} points of r2"
        if math.isnan(self.accuracy):
            change, se, unit, numbers = self.r2_change, self.r2_change_se, "r2", r2
        else:
            change, se, unit = self.accuracy_change, self.accuracy_change_se, "accuracy"
            numbers = (
                f"{change:+.2f} +- {se:.2f} points of accuracy, {self.accuracy_no_mask:.1f} to {self.accuracy:.1f}%, "
                f"and by {r2}"
            )
        if change < WORTH:
            meaning = f"Masking is not worth it here, for it gains less than {WORTH:g} points of {unit}"
        elif change < 2 * se:
            meaning = "Masking may be worth it, but these test images are too few to tell"
        else:
            meaning = f"Masking is worth {change:.1f} points of {unit}"
        return (
            f"{meaning}: the mask that gains the most on validation images ({self.mask}, k = {self.k}) changes test "
            f"images by {numbers}."
        )


def worth(inputs: Inputs, parts: Parts, chosen: pd.DataFrame, family: type[PatchMask], noise: float) -> Worth | None:
    """What masking is worth; None where nothing was chosen on validation images.

    Args:
        inputs: of the sweep.
        parts: its moments.
        chosen: the best mask at every k, see :func:`experiments.masking_sweep.report.chosen_rows`.
        family: of the masks.
        noise: variance of the measurement noise of a pixel.

    Returns:
        The accuracies are known where there are images, classes and more images than pixel values. Cost: two solves.
    """
    if "best_validation_change" not in chosen:
        return None
    row = chosen.loc[chosen.best_validation_change.idxmax()]
    k, size, ratio = int(row.k), int(row.best_patch), float(row.best_ratio)
    found = Worth(k, f"{ratio:g} of {size}x{size} patches", float(row.best_change), float(row.best_se))
    if not isinstance(inputs, Images) or inputs.split.num_classes is None or not isinstance(parts.train, ma.Moments):
        return found
    split = inputs.split
    right = []
    for p in (0.0, ratio):
        model = ma.denoising_autoencoder(
            parts.train, family.from_ratio(size, p, split.image_shape), k, pixel_noise=noise
        )
        right.append(model.predict(split.test_images).argmax(1) == split.test_labels)
    difference = accuracy_difference(right[1][None], right[0][None])
    return dataclasses.replace(
        found,
        accuracy_no_mask=100 * float(np.mean(right[0])),
        accuracy=100 * float(np.mean(right[1])),
        accuracy_change=100 * difference.mean,
        accuracy_change_se=100 * difference.image_se,
    )
