"""What does a masked autoencoder learn, beside what its closed form says?

Paper: Sec. 5
Time: 2 minutes

Balestriero & LeCun (2024), arXiv 2402.11337, and He et al. (2022), arXiv 2111.06377. An ensemble of vision
transformers that see some patches of an image and predict the others, trained side by side from several seeds and
probed as they learn. At the end, in one report: the linear masked autoencoder in closed form for the same mask
(Theorem 3), probes on the trained networks beside the same probes on raw pixels, on principal components, on the
untrained networks and on the same networks trained with labels, and on request (``--ends``) fine-tuning and training
from scratch. Everything that is chosen is chosen on validation images, everything that is reported is measured on test
images.

    python -m experiments.train_mae                                                  # bundled digits
    python -m experiments.train_mae --preset cifar10 --data npz:FILE                 # 10,000 images of CIFAR-10
    python -m experiments.train_mae --probes ridge logistic knn mlp --ends fine_tuning from_scratch supervised
    python -m experiments.train_mae --preset paper --data folder:DIR                 # ViT-B at 224 pixels: accelerators

The loss is that of the published method: hidden patches only, each normalised (``--loss standard``), or in raw pixels
(``hidden``), or over all raw pixels (``matched``), which is what Theorem 3 solves for linear networks.

Tables: results (every probe on everything), comparisons, report (the networks beside the closed form), closed_form.
Checkpoints and metrics lie in ``networks``. Killed at any moment, also by SIGTERM, the same command goes on where it
stopped; with other ``--probes`` or ``--ends`` it adds what is missing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp
from flax import nnx

from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Count, Training, Vit
from experiments.harness.data import Split
from experiments.harness.ensembles import Probe, Problem, TrainedConfig, members_of
from experiments.harness.masked import pictures, restore
from experiments.harness.report import COLUMNS
from experiments.harness.run import Run
from experiments.harness.training_report import train_and_report
from mae_align.corruption import FixedCountPatchMasking
from mae_align.data.patches import patch_grid
from mae_align.models import Loss, MaskedAutoencoder, Pixels
from mae_align.train.ensemble import reconstruct

_NETWORK = Vit(depth=3)


@dataclasses.dataclass(frozen=True)
class Config(TrainedConfig):
    """Settings of masked autoencoders."""

    patch_size: Count = 2
    """Side of the square patches, in pixels; it divides the image."""
    mask_ratio: Annotated[float, Bounds(least=0, below=1)] = 0.75
    """Share of the patches to hide; the number is rounded, and at least one must stay visible."""
    loss: Loss = Loss.standard
    """Loss on hidden patches, each normalised (standard) or in raw pixels (hidden), or on all raw pixels (matched)."""
    network: Vit = _NETWORK
    """Sizes; widths are multiples of 4."""


PRESETS = {
    "laptop": Config(),
    "cifar10": Config(
        data="npz:cifar10.npz",
        validation_fraction=0.1,
        max_train=10_000,
        seeds=(0,),
        training=Training(epochs=6, batch_size=64, learning_rate=2e-3, warmup_epochs=1.0),
        patch_size=4,
        network=Vit(width=128, depth=4, decoder_width=128),
        end_epochs=10,
        end_learning_rates=(1e-3,),
    ),
    "paper": Config(
        data="folder:imagenette2",
        image_size=224,
        validation_fraction=0.1,
        seeds=(0, 1),
        training=Training(epochs=800, batch_size=512, learning_rate=3e-4, warmup_epochs=40.0, bfloat16=True),
        probes=tuple(Probe),
        patch_size=16,
        network=Vit(width=768, depth=12, heads=12, decoder_width=512, decoder_depth=8, decoder_heads=16),
        end_epochs=100,
        end_learning_rates=(3e-4,),
    ),
}


def main(config: Config, run: Run[Split]) -> None:
    """Train, probe, and report.

    Raises:
        InputError: settings that do not fit the data, before any long work.
    """
    pixels = Pixels.from_images(run.data.train_images)
    masking = FixedCountPatchMasking.from_ratio(config.patch_size, config.mask_ratio, pixels.image_shape)

    def make_model(rngs: nnx.Rngs) -> MaskedAutoencoder:
        return MaskedAutoencoder(
            pixels,
            corruption=masking,
            objective=config.loss,
            dtype=jnp.bfloat16 if config.training.bfloat16 else jnp.float32,
            rngs=rngs,
            **vars(config.network),
        )

    number = math.prod(patch_grid(pixels.image_shape, config.patch_size))
    hidden = f"{number - masking.num_visible} of {number} patches of {config.patch_size}x{config.patch_size} pixels"
    problem = Problem(
        subject=f"Masked autoencoder, {hidden} hidden, loss on {_WORDS[config.loss]}",
        members=members_of(config),
        make_autoencoder=make_model,
        make_model=make_model,
        objective=reconstruct,
        corruption=masking,
        restore=restore,
        restores=_RESTORES[config.loss],
        pictures=pictures,
    )
    train_and_report(config, run, problem)


_WORDS = {
    Loss.standard: "hidden patches, each normalised",
    Loss.hidden: "hidden patches in raw pixels",
    Loss.matched: "all raw pixels",
}


_RESTORES = {
    Loss.standard: "hidden patches, with their true means and contrasts lent, beside visible ones as they are",
    Loss.hidden: "hidden patches beside visible ones as they are",
    Loss.matched: "all patches of masked images",
}


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
