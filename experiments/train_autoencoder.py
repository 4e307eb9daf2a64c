"""What does an autoencoder learn, beside what its closed form says, and what does a little guidance change?

Paper: Sec. 5
Time: 1 minute

Balestriero & LeCun (2024), arXiv 2402.11337. Dense, convolutional or residual autoencoders with a
bottleneck, plain or denoising (hidden patches, Gaussian noise), trained side by side: one for every seed, learning rate
and guidance weight. With guidance g the loss is reconstruction + g cross-entropy of a linear head on the code; at 0 the
head only watches. At the end, in one report: the closed form for the same corruption (Theorem 3), probes on the trained
networks beside the same probes on raw pixels, on principal components, on the untrained networks and on the same
networks trained with labels, and on request (``--ends``) fine-tuning and training from scratch. Everything that is
chosen is chosen on validation images, everything that is reported is measured on test images.

    python -m experiments.train_autoencoder                                          # bundled digits
    python -m experiments.train_autoencoder --guidance 0 0.1 --data idx:DIR          # Fashion-MNIST, guided or not
    python -m experiments.train_autoencoder --corruption gaussian_noise --sigma 4
    python -m experiments.train_autoencoder --preset paper --data folder:DIR         # ResNet-34 at 224 pixels

Of several ``--learning-rates`` the best on validation images is reported. Tables: results (every probe on everything),
comparisons, report (the networks beside the closed form), closed_form. Checkpoints and metrics lie in ``networks``.
Killed at any moment, also by SIGTERM, the same command goes on where it stopped; with other ``--probes`` or ``--ends``
it adds what is missing.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import mae_align as ma
from experiments.harness.autoencoders import Autoencoder, Kind
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Count, Positive, Training
from experiments.harness.data import Split
from experiments.harness.ensembles import Problem, TrainedConfig, members_of
from experiments.harness.figures import Column, picture_figure
from experiments.harness.report import COLUMNS
from experiments.harness.run import Run
from experiments.harness.training_report import train_and_report
from mae_align.corruption import Corruption
from mae_align.models import GuidedAutoencoder, Pixels, in_head
from mae_align.models.base import BottleneckAutoencoder
from mae_align.train.ensemble import guide, reconstruct


class Noise(enum.Enum):
    """What is done to the input; the target is the clean image."""

    none = "none"
    patches = "patches"
    gaussian_noise = "gaussian_noise"


@dataclasses.dataclass(frozen=True)
class Config(TrainedConfig):
    """Settings of autoencoders."""

    network: Autoencoder = dataclasses.field(default_factory=Autoencoder)
    """The autoencoders."""
    latent: Count = 16
    """Size of the code, the number of features."""
    corruption: Noise = Noise.patches
    """What is done to the input: nothing, independently hidden patches, or Gaussian noise."""
    patch_size: Count = 2
    """Side of the square patches, in pixels. Where it does not divide the image, patches at the border are smaller."""
    mask_ratio: Annotated[float, Bounds(least=0, below=1)] = 0.5
    """Probability with which each patch is hidden: from 0 to below 1."""
    sigma: Positive = 2.0
    """Standard deviation of the noise, in the units of the stored pixels (0 to 255 for most 8-bit images)."""
    guidance: Annotated[tuple[float, ...], Bounds(least=0, unique=True)] = (0.0,)
    """Weights of the cross-entropy of a linear head beside the reconstruction; one network for each."""


PRESETS = {
    "laptop": Config(training=Training(epochs=60, learning_rate=1e-3, warmup_epochs=5.0)),
    "paper": Config(
        data="folder:imagenette2",
        image_size=224,
        validation_fraction=0.1,
        seeds=(0,),
        training=Training(
            epochs=1000, learning_rate=2e-4, warmup_epochs=5.0, weight_decay=0.0, beta2=0.999, bfloat16=True
        ),
        network=Autoencoder(Kind.resnet, resnet_blocks=(3, 4, 6, 3), stem_stride=4),
        latent=512,
        corruption=Noise.none,
        guidance=(0.0, 0.01),
    ),
}


def main(config: Config, run: Run[Split]) -> None:
    """Train, probe, and report.

    Raises:
        InputError: settings that do not fit the data, before any long work.
    """
    pixels = Pixels.from_images(run.data.train_images)
    corruption = _corruption(config)

    def make_autoencoder(rngs: nnx.Rngs) -> BottleneckAutoencoder:
        bfloat16 = config.training.bfloat16
        return config.network.make(pixels, latent=config.latent, bfloat16=bfloat16, rngs=rngs, corruption=corruption)

    def make_guided(rngs: nnx.Rngs) -> GuidedAutoencoder:
        return GuidedAutoencoder(make_autoencoder(rngs), run.data.classes, rngs=rngs)

    def given(images: jax.Array, key: jax.Array) -> jax.Array:
        """Images as the network gets them in training."""
        return images if corruption is None else corruption.sample(key, images, jnp.asarray(pixels.mean))

    def restore(model: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        return model.reconstruct(given(images, key))

    def pictures(model: Any, images: np.ndarray, like: np.ndarray, seed: int) -> Figure:
        shown = given(jnp.asarray(images, jnp.float32), jax.random.key(seed))
        columns = [Column.pixels("input", images, like)]
        if corruption is not None:
            columns.append(Column.pixels("corrupted", np.asarray(shown), like))
        columns.append(Column.pixels("output", np.asarray(jax.jit(lambda m, x: m.reconstruct(x))(model, shown)), like))
        what = "the input itself" if corruption is None else "the corrupted image (hidden patches hold the mean image)"
        return picture_figure(columns, f"The network is given {what}, and was trained to return the clean one.")

    guided, sizes = any(config.guidance), " ".join(map(str, config.network.sizes))
    problem = Problem(
        subject=f"Autoencoder ({config.network.kind.value} {sizes}, code {config.latent}), {_words(config)}",
        members=members_of(config, config.guidance),
        make_autoencoder=make_autoencoder,
        make_model=make_guided if guided else make_autoencoder,
        objective=guide if guided else reconstruct,
        corruption=corruption,
        restore=restore,
        restores="clean images" if corruption is None else "clean images from corrupted ones",
        pictures=pictures,
        inside="autoencoder" if guided else "",
        apart=in_head if guided else None,
    )
    train_and_report(config, run, problem)


def _corruption(config: Config) -> Corruption | None:
    if config.corruption is Noise.patches:
        return ma.PatchMasking(config.patch_size, config.mask_ratio)
    return ma.GaussianNoise(config.sigma) if config.corruption is Noise.gaussian_noise else None


def _words(config: Config) -> str:
    """The corruption in words."""
    if config.corruption is Noise.patches:
        return (
            f"patches of {config.patch_size}x{config.patch_size} pixels hidden with probability {config.mask_ratio:g}"
        )
    return f"noise of {config.sigma:g} pixel units" if config.corruption is Noise.gaussian_noise else "clean inputs"


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
