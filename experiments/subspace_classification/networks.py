"""Networks of the subspace experiment: what is trained, on images of which scale, and how one point is measured."""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_align.data.patches import ImageShape
from mae_align.models import ConvClassifier, MLPClassifier, Pixels, ResNet9, SupervisedNetwork, predicted_classes
from mae_align.models.supervised import linear_widths
from mae_align.runtime.processes import train_mesh
from mae_align.train.augment import CropFlip, augmented
from mae_align.train.ensemble import DeviceData, Training, TrainState, classify
from mae_align.train.loop import Diverged, fit
from mae_align.train.optimizer import OptimizerConfig, adamw
from mae_align.train.step import Program

# Training images on which the fit is reported.
_FITTED = 2000
_STEPS_PER_CALL = 64
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


class Scale(enum.Enum):
    """What projected images are divided by."""

    per_image = "per_image"
    whole_set = "whole_set"
    raw = "raw"


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
class TrainingConfig:
    """How the networks are trained."""

    epochs: int = 8
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a step; what does not fill a batch is left out of a pass."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW: linear growth, then half a cosine down to 0."""
    warmup: float = 0.15
    """Share of the steps in which the learning rate grows."""
    weight_decay: float = 1e-3
    """Weight decay of AdamW, on matrices and kernels."""
    conv_widths: tuple[int, ...] = (24, 48, 96)
    """Channels of the narrow convolutional network."""
    mlp_widths: tuple[int, ...] | None = (512, 256)
    """Hidden widths of the dense network; none for the published ones, evenly spaced from pixels to classes."""
    resnet_widths: tuple[int, ...] = (64, 128, 256, 512, 1028)
    """Channels of ResNet9's stem and stages, as published."""
    crop: int | None = None
    """Training images are moved by up to so many pixels each way, reflected at the border; 0 for none.

    None for an eighth of the side, as published.
    """
    flip: bool | None = None
    """Mirror half of the training images, which changes the class of digits and characters.

    None to go by the data set's name: natural images are mirrored, digits, characters and unknown ones are not.
    """
    bfloat16: bool = False
    """Compute in bfloat16, parameters and losses in float32: for accelerators."""

    @property
    def augmentation(self) -> CropFlip:
        """As the objective takes it, of :func:`settled` settings."""
        assert self.crop is not None and self.flip is not None
        return CropFlip(self.crop, self.flip)


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


def settled(config: TrainingConfig, name: str, image_shape: ImageShape) -> TrainingConfig:
    """The settings with the augmentation that this data set is given; prints where its name does not say.

    Args:
        config: as asked for. name: of the data set. image_shape: [h, w, c].

    Example:
        >>> settled(TrainingConfig(), "tiny-imagenet-200", (64, 64, 3)).augmentation
        CropFlip(pad=8, flip=True)
    """
    flip = mirrors(name) if config.flip is None else config.flip
    if flip is None:
        print(f"Images of {name} are not mirrored: --training.flip True mirrors them.", flush=True)
    crop = min(image_shape[:2]) // 8 if config.crop is None else config.crop
    return dataclasses.replace(config, crop=crop, flip=bool(flip))


def scaled(train: np.ndarray, test: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Projected images as networks are given them; every statistic over images is one of the training images.

    ``per_image`` divides each image by the standard deviation of its values and then subtracts the mean training image,
    as published; ``whole_set`` divides all by one number, ``raw`` by none.

    Args:
        train, test: [n, h, w, c] projections of centred images.

    Returns:
        The same shapes, float32.
    """
    if scale is Scale.raw:
        return train, test
    if scale is Scale.whole_set:
        root = np.sqrt(np.mean(np.square(train), dtype=np.float64))
        return train / np.float32(root), test / np.float32(root)
    train, test = contrast_normalized(train), contrast_normalized(test)
    mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
    return train - mean, test - mean


def contrast_normalized(images: np.ndarray) -> np.ndarray:
    """Each image divided by the standard deviation of its own values; a constant one stays as it is.

    Args:
        images: [n, h, w, c].

    Returns:
        The same shape, float32.
    """
    found = np.empty(images.shape, np.float32)
    for start in range(0, len(images), _FITTED):
        part = images[start : start + _FITTED].astype(np.float64)
        spread = part.std(axis=(1, 2, 3), keepdims=True)
        # What rounding leaves of a constant image is no contrast.
        varies = spread > 1e-12 * np.abs(part).max(axis=(1, 2, 3), keepdims=True)
        found[start : start + _FITTED] = part / np.where(varies, spread, 1.0)
    return found


def make_training(
    network: Network,
    image_shape: ImageShape,
    num_classes: int,
    config: TrainingConfig,
    num_images: int,
    seeds: Sequence[int],
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
) -> Training:
    """The networks of one architecture; one program serves all subspaces and scales.

    As many are trained in one call as there are seeds, or one where they would take turns anyway.

    Raises:
        InputError: sizes that do not fit the images or each other.
    """
    config.augmentation.check(image_shape)
    total = num_steps(config, num_images)
    optimizer = OptimizerConfig(
        total_steps=total,
        learning_rate=config.learning_rate,
        warmup_steps=min(round(config.warmup * total), total - 1),
        weight_decay=config.weight_decay,
        b2=0.999,
    )
    # The images are scaled already.
    pixels = Pixels(np.zeros(image_shape, np.float32), np.ones((), np.float32))
    make = partial(
        Training,
        _maker(network, pixels, num_classes, config),
        augmented(classify, config.augmentation),
        adamw(optimizer),
        batch_size=config.batch_size,
        mesh=train_mesh(devices=devices),
        steps_per_call=_STEPS_PER_CALL,
    )
    one = make(num_members=1)
    return one if one.program is Program.ONE_BY_ONE or len(seeds) == 1 else make(num_members=len(seeds))


def num_steps(config: TrainingConfig, num_images: int) -> int:
    """Steps of a training."""
    return config.epochs * max(num_images // config.batch_size, 1)


def _maker(
    network: Network, pixels: Pixels, num_classes: int, config: TrainingConfig
) -> Callable[[nnx.Rngs], SupervisedNetwork]:
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    hidden = config.mlp_widths or linear_widths(int(np.prod(pixels.image_shape)), num_classes, 4)

    def conv(batch_norm: bool, rngs: nnx.Rngs) -> SupervisedNetwork:
        widths = config.conv_widths
        return ConvClassifier(pixels, num_classes, widths=widths, batch_norm=batch_norm, dtype=dtype, rngs=rngs)

    def mlp(batch_norm: bool, rngs: nnx.Rngs) -> SupervisedNetwork:
        return MLPClassifier(pixels, num_classes, hidden=hidden, batch_norm=batch_norm, dtype=dtype, rngs=rngs)

    return {
        Network.conv: lambda rngs: conv(True, rngs),
        Network.conv_without_norm: lambda rngs: conv(False, rngs),
        Network.mlp: lambda rngs: mlp(True, rngs),
        Network.mlp_without_norm: lambda rngs: mlp(False, rngs),
        Network.resnet9: lambda rngs: ResNet9(pixels, num_classes, widths=config.resnet_widths, dtype=dtype, rngs=rngs),
    }[network]


def measure(
    training: Training,
    seeds: Sequence[int],
    config: TrainingConfig,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> list[dict[str, np.ndarray]]:
    """Train on projected images and classify the test images.

    Args:
        training: of :func:`make_training` for so many seeds. train, test: images [n, h, w, c] and labels [n].

    Returns:
        For each seed: correct [m] (truth values, of the test images), fitted (accuracy on 2000 of the training images,
        not augmented) and seconds (per seed). A network that diverged has NaN for both.
    """
    began = time.monotonic()
    images, labels = train
    state, lost = _trained(training, seeds, training.put(images, labels), num_steps(config, len(images)))
    # The same for all, and not the first, which may be of few classes.
    rows = np.sort(np.random.default_rng(0).permutation(len(images))[:_FITTED])
    found = []
    for member, seed in enumerate(seeds):
        if state is None or seed in lost:
            found.append({"correct": np.full(len(test[1]), np.nan), "fitted": np.float64(np.nan)})
            continue
        model = training.model(state, member)
        correct = predicted_classes(model, test[0]) == test[1]
        fitted = (predicted_classes(model, images[rows]) == labels[rows]).mean()
        found.append({"correct": correct, "fitted": np.float64(fitted)})
    seconds = (time.monotonic() - began) / len(seeds)
    return [row | {"seconds": np.float64(seconds)} for row in found]


def _trained(
    training: Training, seeds: Sequence[int], data: DeviceData, steps: int
) -> tuple[TrainState | None, set[int]]:
    """The trained networks, and the seeds of those that diverged, whose places hold another one.

    A loss that is not finite ends the training of all: the others are trained again, by the same program.
    """
    lost: set[int] = set()
    while kept := [seed for seed in seeds if seed not in lost]:
        taken = [kept[0] if seed in lost else seed for seed in seeds]
        try:
            return fit(training, training.init(taken), data, num_steps=steps), lost
        except Diverged as error:
            lost.add(taken[error.member])
    return None, lost
