"""The networks of the alignment experiment: masked autoencoders, and the same encoders trained with labels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx

from experiments.harness.config import Training as TrainingConfig
from experiments.harness.config import Vit
from experiments.harness.data import Split
from experiments.harness.probes import OnlineProbe
from experiments.harness.run import Run
from experiments.harness.train import optimizer, training_programs
from mae_align.corruption import FixedCountPatchMasking
from mae_align.data.patches import ImageShape, patch_grid
from mae_align.models import Classifier, Loss, MaskedAutoencoder, Pixels
from mae_align.probes import Rows as Labelled
from mae_align.runtime.errors import InputError
from mae_align.train.ensemble import Objective, Training, TrainState, classify, reconstruct
from mae_align.train.optimizer import adamw

FEATURE_BATCH = 500
"""Images of one forward pass when features are taken."""
# Most training, and most validation images of the online probe.
_WATCHED = 1000


@dataclasses.dataclass(frozen=True)
class Cell:
    """A masked autoencoder's mask and loss."""

    patch_size: int
    mask_ratio: float
    loss: Loss

    @property
    def key(self) -> str:
        """A file name."""
        return f"patch{self.patch_size}-ratio{self.mask_ratio:g}-{self.loss.value}"

    def masking(self, image_shape: ImageShape) -> FixedCountPatchMasking:
        """The mask of images (h, w, c)."""
        return FixedCountPatchMasking.from_ratio(self.patch_size, self.mask_ratio, image_shape)


@dataclasses.dataclass(frozen=True)
class Networks:
    """Masked autoencoders of one size on the same images, one for each seed.

    Attributes:
        data: what they are trained on.
        network: their size.
        training: how they are trained.
        seeds: of the members of an ensemble.
    """

    data: Split
    network: Vit
    training: TrainingConfig
    seeds: tuple[int, ...]

    @functools.cached_property
    def _pixels(self) -> Pixels:
        return Pixels.from_images(self.data.train_images)

    def masked(self, cell: Cell) -> Training:
        """The networks of one cell as an ensemble.

        Raises:
            InputError: sizes that do not fit the images or each other.
        """
        return self._ensemble(lambda rngs: self._autoencoder(cell, rngs), reconstruct)

    def supervised(self, cell: Cell) -> Training:
        """The encoders of a cell's networks with a linear head, to be trained with labels instead.

        No patch is hidden and no decoder used: the cell's mask and loss do not matter.

        Raises:
            InputError: as :meth:`masked`, and fewer than two classes.
        """
        classes = self.data.classes
        return self._ensemble(lambda rngs: Classifier(self._autoencoder(cell, rngs), classes, rngs=rngs), classify)

    def train(self, run: Run, key: str, training: Training) -> TrainState:
        """The ensemble after its training, which goes on from where a run before has stopped.

        Raises:
            Diverged: a loss or a parameter is not finite.
        """
        data, count = self.data, len(self.data.train_labels)
        total, per_epoch = self.training.steps(count), count // self.training.batch_size
        return run.train_to(
            key,
            training,
            functools.partial(training.init, self.seeds),
            functools.partial(training.put, data.train_images, data.train_labels),
            range(per_epoch, total + 1, per_epoch),
            OnlineProbe.of(
                training,
                Labelled(data.train_images, data.train_labels),
                Labelled(data.validation_images, data.validation_labels),
                data.classes,
                most=_WATCHED,
                seed=0,
            ),
        )

    def _ensemble(self, make: Callable[[nnx.Rngs], nnx.Module], objective: Objective) -> Training:
        steps = adamw(optimizer(self.training, len(self.data.train_labels)))
        size, members = self.training.batch_size, len(self.seeds)
        return training_programs(make, objective, steps, batch_size=size, num_members=members)

    def _autoencoder(self, cell: Cell, rngs: nnx.Rngs) -> MaskedAutoencoder:
        mask = cell.masking(self._pixels.image_shape)
        dtype = jnp.bfloat16 if self.training.bfloat16 else jnp.float32
        sizes = vars(self.network)
        return MaskedAutoencoder(self._pixels, corruption=mask, objective=cell.loss, dtype=dtype, rngs=rngs, **sizes)


def check_ratios(image_shape: ImageShape, patch_size: int, mask_ratios: Sequence[float]) -> None:
    """Refuse mask ratios that are too few masks for a correlation over them: two points always lie on a line.

    Args:
        image_shape: (h, w, c).
        patch_size: divides the sides.
        mask_ratios: in [0, 1).

    Raises:
        InputError: fewer than three ratios, or some that hide as many patches.

    Example:
        >>> check_ratios((8, 8, 1), 4, [0.25, 0.5, 0.75])
    """
    patches = math.prod(patch_grid(image_shape, patch_size))
    masks = {FixedCountPatchMasking.from_ratio(patch_size, ratio, image_shape) for ratio in mask_ratios}
    if len(masks) < 3:
        listed = " ".join(f"{ratio:g}" for ratio in mask_ratios)
        raise InputError(
            f"--mask-ratios {listed}: of the {patches} patches of {patch_size}x{patch_size} pixels they leave fewer "
            "than three different numbers visible, and a correlation needs three: give more ratios, further apart, or "
            "a smaller --patch-sizes"
        )
