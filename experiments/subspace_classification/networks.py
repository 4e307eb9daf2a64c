"""Networks of the subspace experiment: what is trained, on images of which scale, and how one ensemble is measured."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.harness.config import Bounds, Widths
from experiments.harness.config import Training as TrainingSettings
from experiments.harness.data import Split
from experiments.harness.run import Run
from experiments.harness.train import optimizer, training_programs
from experiments.subspace_classification.images import Scale
from mae_align.data.patches import ImageShape
from mae_align.models import ConvClassifier, MLPClassifier, Pixels, ResNet9, SupervisedNetwork, predicted_classes
from mae_align.models.supervised import linear_widths
from mae_align.train.augment import Augmentation, augmented
from mae_align.train.ensemble import Training, TrainState, classify
from mae_align.train.optimizer import adamw

# Training images on which the fit is reported.
_FITTED = 2000
# Parts of names of data sets: what is in a mirror another character or none, and what is the same thing.
_CHARACTERS = ("digit", "mnist", "kuzushiji", "arabic", "character", "letter", "omniglot", "svhn", "usps")
_NATURAL = ("cifar", "imagenet", "imagewoof", "stl10", "caltech", "places", "celeb", "flowers", "food101", "pets")


class Network(enum.Enum):
    """What classifies."""

    conv = "conv"
    conv_without_norm = "conv_without_norm"
    mlp = "mlp"
    mlp_without_norm = "mlp_without_norm"
    resnet9 = "resnet9"


NETWORK_WORDS = {
    Network.conv: "convolutional",
    Network.conv_without_norm: "convolutional without batch norm",
    Network.mlp: "MLP",
    Network.mlp_without_norm: "MLP without batch norm",
    Network.resnet9: "ResNet9",
}
SCALE_WORDS = {
    Scale.per_image: "each image rescaled",
    Scale.whole_set: "one scale per subspace",
    Scale.raw: "raw scale",
}


@dataclasses.dataclass(frozen=True)
class Study:
    """One network on images of one scale."""

    network: Network
    scale: Scale

    @property
    def key(self) -> str:
        """A file name."""
        return f"{self.network.value}-{self.scale.value}"

    @property
    def label(self) -> str:
        """In words."""
        return f"{NETWORK_WORDS[self.network]}, {SCALE_WORDS[self.scale]}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Widths of the networks."""

    conv_widths: Widths = (24, 48, 96)
    """Channels of the narrow convolutional network."""
    mlp_widths: Widths | None = (512, 256)
    """Hidden widths of the dense network; none for the published ones, evenly spaced from pixels to classes."""
    resnet_widths: Widths = (64, 128, 256, 512, 1028)
    """Channels of ResNet9's stem and stages, as published."""


@dataclasses.dataclass(frozen=True)
class Views:
    """How training images are moved and mirrored."""

    shift: Annotated[int | None, Bounds(least=0)] = None
    """Training images are moved by up to so many pixels each way, reflected at the border; 0 for none.

    None for an eighth of the side, as published.
    """
    flip: Annotated[float | None, Bounds(least=0, most=1)] = None
    """Share of the training images that are mirrored, which changes the class of digits and characters.

    None to go by the data set's name: half of natural images, none of digits, characters and unknown ones.
    """

    def of(self, name: str, image_shape: ImageShape) -> Augmentation:
        """What is done to the training images of a data set.

        Args:
            name: of the data set.
            image_shape: (h, w, c).

        Example:
            >>> found = Views().of("tiny-imagenet-200", (64, 64, 3))
            >>> found.shift, found.flip
            (8, 0.5)
        """
        shift = min(image_shape[:2]) // 8 if self.shift is None else self.shift
        flip = 0.5 * bool(mirrors(name)) if self.flip is None else self.flip
        return Augmentation(shift=shift, flip=flip)


@dataclasses.dataclass(frozen=True)
class SubspaceTraining(TrainingSettings):
    """How the networks are trained, on moved and mirrored images."""

    # Of one image a batch has no statistics.
    batch_size: Annotated[int, Bounds(least=2)] = 64
    """Images in a step."""
    augmentation: Views = dataclasses.field(default_factory=Views)
    """What is done to each training image."""


def mirrors(name: str) -> bool | None:
    """Whether a data set's images may be mirrored, by its name; None where that says nothing.

    Example:
        >>> mirrors("CIFAR10"), mirrors("fashion-mnist"), mirrors("mnist"), mirrors("photos")
        (True, True, False, None)
    """
    name = name.lower()
    if "fashion" in name:
        return True
    if any(part in name for part in _CHARACTERS):
        return False
    return True if any(part in name for part in _NATURAL) else None


def make_training(
    network: Network, data: Split, sizes: Sizes, settings: SubspaceTraining, num_members: int
) -> Training:
    """The programs of one network, which serve all subspaces and scales.

    Args:
        network: which.
        data: their shape, classes, number and name matter.
        sizes: of the network.
        settings: of the training.
        num_members: seeds that train together.

    Raises:
        InputError: sizes that do not fit the images or each other.
    """
    augmentation = settings.augmentation.of(data.name, data.image_shape)
    augmentation.check(data.image_shape)
    return training_programs(
        _maker(network, data.image_shape, data.classes, sizes, settings.bfloat16),
        augmented(classify, augmentation),
        adamw(optimizer(settings, len(data.train_labels))),
        batch_size=settings.batch_size,
        num_members=num_members,
    )


def _maker(
    network: Network, image_shape: ImageShape, num_classes: int, sizes: Sizes, bfloat16: bool
) -> Callable[[nnx.Rngs], SupervisedNetwork]:
    dtype = jnp.bfloat16 if bfloat16 else jnp.float32
    # The images are scaled already.
    pixels = Pixels(np.zeros(image_shape, np.float32), np.ones((), np.float32))
    hidden = sizes.mlp_widths or linear_widths(int(np.prod(image_shape)), num_classes, 4)

    def conv(batch_norm: bool, rngs: nnx.Rngs) -> SupervisedNetwork:
        return ConvClassifier(
            pixels, num_classes, widths=sizes.conv_widths, batch_norm=batch_norm, dtype=dtype, rngs=rngs
        )

    def mlp(batch_norm: bool, rngs: nnx.Rngs) -> SupervisedNetwork:
        return MLPClassifier(pixels, num_classes, hidden=hidden, batch_norm=batch_norm, dtype=dtype, rngs=rngs)

    return {
        Network.conv: lambda rngs: conv(True, rngs),
        Network.conv_without_norm: lambda rngs: conv(False, rngs),
        Network.mlp: lambda rngs: mlp(True, rngs),
        Network.mlp_without_norm: lambda rngs: mlp(False, rngs),
        Network.resnet9: lambda rngs: ResNet9(pixels, num_classes, widths=sizes.resnet_widths, dtype=dtype, rngs=rngs),
    }[network]


def trained(
    run: Run[Split],
    key: str,
    training: Training,
    seeds: Sequence[int],
    steps: int,
    images: Callable[[], tuple[np.ndarray, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Train one network for each seed on projected training images, and classify the test images.

    Args:
        run: keeps networks and results; its labels are learned.
        key: of the ensemble, part of file names.
        training: of :func:`make_training`.
        seeds: E of them.
        steps: of the training.
        images: gives the training and the test images [n, h, w, c]; called where something is left to do.

    Returns:
        correct [E, m], whether each test image is classified rightly; fitted [E], accuracy on 2000 of the training
        images, not augmented.

    Raises:
        Diverged: a network diverged.
    """
    data = run.data
    # The same for all, and not the first, which may be of few classes.
    rows = np.sort(np.random.default_rng(0).permutation(len(data.train_labels))[:_FITTED])

    def look(state: TrainState, step: int) -> dict[str, np.ndarray]:
        del step
        train, test = images()
        models = [training.model(state, member) for member in range(len(seeds))]
        correct = [predicted_classes(model, test) == data.test_labels for model in models]
        fitted = [(predicted_classes(model, train[rows]) == data.train_labels[rows]).mean() for model in models]
        return {"correct": np.stack(correct), "fitted": np.array(fitted)}

    found = run.train_at(
        key,
        training,
        lambda: training.init(seeds),
        lambda: training.put(images()[0], data.train_labels),
        [steps],
        look,
    )
    return {name: values[-1] for name, values in found.items()}
