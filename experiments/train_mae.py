"""What does a masked autoencoder learn, beside what its closed form says?

Sec. 5 of Balestriero & LeCun (2024), arXiv 2402.11337, and He et al. (2022), arXiv 2111.06377. An ensemble of vision
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

The loss is that of the published method: hidden patches only, each normalised (``--objective norm_pix``), or in raw
pixels (``hidden``), or over all raw pixels (``matched``), which is what Theorem 3 solves for linear networks.

The run folder holds config.json, metrics.jsonl, TensorBoard event files, checkpoints, the report as CSV and netCDF, and
figures. Killed at any moment, also by SIGTERM, the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from experiments.harness.cli import launch
from experiments.harness.train_common import LabelledSplit, TrainConfig, check_numbers, members
from experiments.harness.train_loop import Problem
from experiments.harness.train_figures import Column, picture_figure
from experiments.harness.train_main import run
from mae_align.corruption import FixedCountPatchMasking
from mae_align.data.patches import patch_hw
from mae_align.models import AllPixels, MaskedAutoencoder, MaskedPatches, Pixels
from mae_align.train.ensemble import reconstruct


class Objective(enum.Enum):
    """Loss of a masked autoencoder."""

    norm_pix = "norm_pix"
    hidden = "hidden"
    matched = "matched"


_OBJECTIVES = {
    Objective.norm_pix: MaskedPatches(norm_pix=True),
    Objective.hidden: MaskedPatches(norm_pix=False),
    Objective.matched: AllPixels(),
}


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Settings of masked autoencoders."""

    patch_size: int = 2
    """Side of the square patches, in pixels; it divides the image."""
    mask_ratio: float = 0.75
    """Share of the patches to hide; the number is rounded, and at least one stays visible."""
    objective: Objective = Objective.norm_pix
    """Loss on hidden patches, each normalised (norm_pix) or in raw pixels (hidden), or on all raw pixels (matched)."""
    width: int = 64
    """Width of the encoder, the number of features: a multiple of 4."""
    depth: int = 3
    """Blocks of the encoder."""
    heads: int = 4
    """Attention heads of the encoder."""
    decoder_width: int = 64
    """Width of the decoder: a multiple of 4."""
    decoder_depth: int = 1
    """Blocks of the decoder."""
    decoder_heads: int = 4
    """Attention heads of the decoder."""


PRESETS = {
    "laptop": Config(),
    "cifar10": Config(
        data="npz:cifar10.npz",
        validation_fraction=0.1,
        max_train=10_000,
        seeds=(0,),
        learning_rates=(2e-3,),
        batch_size=64,
        epochs=6,
        warmup_epochs=1.0,
        patch_size=4,
        width=128,
        depth=4,
        decoder_width=128,
        end_epochs=10,
        end_learning_rates=(1e-3,),
    ),
    "paper": Config(
        data="folder:imagenette2",
        image_size=224,
        validation_fraction=0.1,
        seeds=(0, 1),
        learning_rates=(3e-4,),
        epochs=800,
        warmup_epochs=40.0,
        batch_size=512,
        bfloat16=True,
        probes=tuple(p for p in TrainConfig.probes),
        patch_size=16,
        width=768,
        depth=12,
        heads=12,
        decoder_width=512,
        decoder_depth=8,
        decoder_heads=16,
        end_epochs=100,
        end_learning_rates=(3e-4,),
    ),
}


def main(config: Config) -> None:
    """Train and report on a configuration.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    check_numbers(config)
    split = LabelledSplit.load(config)
    pixels = Pixels.from_images(split.train_images)

    def make_model(rngs: nnx.Rngs) -> MaskedAutoencoder:
        return MaskedAutoencoder(
            pixels,
            patch_size=config.patch_size,
            mask_ratio=config.mask_ratio,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            decoder_width=config.decoder_width,
            decoder_depth=config.decoder_depth,
            decoder_heads=config.decoder_heads,
            objective=_OBJECTIVES[config.objective],
            dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32,
            rngs=rngs,
        )

    problem = Problem(members(config), make_model, make_model, reconstruct, restore, _RESTORES[config.objective])
    masking = nnx.eval_shape(lambda: make_model(nnx.Rngs(0))).masking
    title = (
        f"Masked autoencoder on {split.name}, {_size(config)}: {describe(masking, split)}, loss on "
        f"{_WORDS[config.objective]}"
    )
    run("train_mae", title, config, split, problem, masking, pictures)


_WORDS = {
    Objective.norm_pix: "hidden patches, each normalised",
    Objective.hidden: "hidden patches in raw pixels",
    Objective.matched: "all raw pixels",
}


_RESTORES = {
    Objective.norm_pix: "hidden patches, with their true means and contrasts lent, beside visible ones as they are",
    Objective.hidden: "hidden patches beside visible ones as they are",
    Objective.matched: "all patches of masked images",
}


def restore(model: MaskedAutoencoder, images: jax.Array, key: jax.Array) -> jax.Array:
    """What a network makes of masked images; visible patches as they are, unless the loss is on them too.

    Args:
        images: [b, h, w, c] in stored units. key: of the masks.

    Returns:
        [b, h, w, c] float32 in stored units.
    """
    found = model.predict(images, key)
    own = model.patchify(model.pixels.normalize(images))
    patches = model.objective.pixels_of(found.prediction, own)
    if not isinstance(model.objective, AllPixels):
        patches = jnp.where(found.mask[:, :, None], patches, own)
    return model.pixels.restore(model.unpatchify(patches))


def _size(config: Config) -> str:
    return f"width {config.width}, {config.depth} + {config.decoder_depth} blocks"


def describe(masking: FixedCountPatchMasking, split: LabelledSplit) -> str:
    """The mask in words."""
    (height, width), (ph, pw) = split.train_images.shape[1:3], patch_hw(masking.patch_size)
    number = height // ph * (width // pw)
    return f"{number - masking.num_visible} of {number} patches of {ph}x{pw} pixels hidden"


def pictures(model: MaskedAutoencoder, images: np.ndarray, like: np.ndarray, seed: int) -> Figure:
    """Inputs, what the network sees of them, and what it predicts, in the units in which it does.

    With normalised patches the network says nothing about the mean and the contrast of a hidden patch: its prediction
    is shown beside the normalised target, and once more with the true mean and contrast of each patch lent to it.
    """
    given = jnp.asarray(images, jnp.float32)
    found = model.predict(given, jax.random.key(seed))
    hidden = found.mask[:, :, None]
    target = model.targets(given)
    pasted = jnp.where(hidden, found.prediction, target)
    painted = np.asarray(model.unpatchify(jnp.broadcast_to(hidden, target.shape)))[..., 0]

    def in_pixels(patches: jax.Array) -> np.ndarray:
        """Stored units; where targets are normalised per patch, with the statistics of the true patches."""
        restored = model.objective.pixels_of(patches, model.patchify(model.pixels.normalize(given)))
        return np.asarray(model.pixels.restore(model.unpatchify(restored)))

    columns = [
        Column.pixels("input", images, like),
        Column.pixels("visible patches", images, like, painted),
    ]
    if model.objective == MaskedPatches(norm_pix=True):
        columns += [
            Column.normalised("target: patches\nnormalised", np.asarray(model.unpatchify(target))),
            Column.normalised("prediction, visible\npatches pasted", np.asarray(model.unpatchify(pasted))),
            Column.pixels("the same, with\ntrue contrasts", in_pixels(pasted), like),
        ]
        caption = (
            "The loss normalises each patch: the network predicts patterns of mean 0 and variance 1 in hidden patches; "
            "grey is the mean of a patch. Visible patches are those of the target beside the prediction, those of the "
            "input in the last column. There the mean and the contrast of every hidden patch are those of the input, "
            "too: the network does not predict them."
        )
    else:
        columns += [
            Column.pixels("prediction\nof all patches", in_pixels(found.prediction), like),
            Column.pixels("prediction, visible\npatches pasted", in_pixels(pasted), like),
        ]
        caption = (
            "The loss is on all pixels, of visible patches too."
            if isinstance(model.objective, AllPixels)
            else "The loss is on hidden patches alone: what is predicted for visible ones was never trained."
        )
    return picture_figure(columns, caption)


if __name__ == "__main__":
    launch(main, Config, PRESETS)
