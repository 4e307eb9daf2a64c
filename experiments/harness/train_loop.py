"""Online probe of a split that one experiment still makes itself."""

from __future__ import annotations

from experiments.harness import probes
from experiments.harness.train_common import LabelledSplit
from mae_align.probes import Rows
from mae_align.train.ensemble import Training


class OnlineProbe(probes.OnlineProbe):
    """See there."""

    @classmethod
    def of(cls, training: Training, split: LabelledSplit, most: int, seed: int) -> probes.OnlineProbe:  # pyright: ignore
        """A probe that looks at no more than so many training and validation images."""
        train = Rows(split.train_images, split.train_labels)
        validation = Rows(split.validation_images, split.validation_labels)
        return probes.OnlineProbe.of(training, train, validation, split.num_classes, most=most, seed=seed)
