"""What do masks change while a masked autoencoder learns, and what did the closed form say?

Paper: Sec. 5
Time: 2 minutes

The nonlinear side of Sec. 5 of Balestriero & LeCun (2024), arXiv 2402.11337: masks help or hurt by data set, shape and
ratio. For every patch size and mask ratio, masked autoencoders of several seeds are trained side by side; at steps
spaced evenly in the logarithm, a ridge probe of the labels is fitted on features of unmasked images. Beside each curve
stands what Theorem 3 says of a linear masked autoencoder with the same exact-count mask: the label variance r2 that its
best k features explain on held-out images. The report says whether the order that the closed form predicts for the
masks of each patch size is there, and from which step on. What is best is chosen on validation images and reported on
test images.

    python -m experiments.masking_dynamics                                          # digits: a smoke test
    python -m experiments.masking_dynamics --preset fashion_mnist --data idx:DIR
    python -m experiments.masking_dynamics --preset cifar10 --data npz:FILE         # at 16 pixels
    python -m experiments.masking_dynamics --preset paper --data folder:DIR         # accelerators
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

import mae_align as ma
from experiments.harness import columns
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Counts, Ratios, RunConfig, Seeds, Vit
from experiments.harness.config import Training as TrainingConfig
from experiments.harness.data import Split, drawn
from experiments.harness.run import Run
from experiments.harness.train import milestones, optimizer, training_programs
from experiments.masking_dynamics.report import MEASURES, Curve, agreement_over_time, dynamics_figure, sentences, shown
from mae_align.closed_form.predictions import closed_form_row
from mae_align.corruption import FixedCountPatchMasking
from mae_align.metrics import report_table
from mae_align.models import Loss, MaskedAutoencoder, Pixels
from mae_align.probes import Rows, raw_pixels, ridge_probe
from mae_align.train.ensemble import Training, TrainState, reconstruct
from mae_align.train.optimizer import adamw

# Images of one forward pass when features are taken.
_FEATURE_BATCH = 500
# Groups of held-out images, for the standard errors of the prediction.
_GROUPS = 5


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the experiment."""

    probe_images: Annotated[int, Bounds(least=40)] = 4_000
    """Probes are fitted, chosen and tested on at most so many training, validation and test images each."""
    patch_sizes: Counts = (2, 4)
    """Sides of square patches, in pixels; each must divide the image."""
    mask_ratios: Ratios = (0.3, 0.6, 0.9)
    """Shares of patches to mask; numbers are rounded, and at least one patch stays visible."""
    loss: Loss = Loss.standard
    """Hidden patches, normalised as published (standard) or raw (hidden), or all raw pixels (matched)."""
    network: Vit = dataclasses.field(default_factory=Vit)
    """The masked autoencoders."""
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    """Their training."""
    evaluations: Annotated[int, Bounds(least=2)] = 12
    """Steps at which probes are fitted, spaced evenly in the logarithm from 1 to the last; before the first too."""
    ks: Counts = (8, 32)
    """Numbers of features of the closed form, beside the width of the networks and the mean over log k."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the networks."""
    seeds_at_once: Annotated[int | None, Bounds(least=1)] = None
    """Train the networks of so many seeds side by side; none for all. Smaller needs less memory."""

    def check(self) -> None:
        """Refuse seeds that do not fill their groups."""
        super().check()
        if self.seeds_at_once is not None and len(self.seeds) % self.seeds_at_once:
            raise ma.InputError(
                f"--seeds-at-once {self.seeds_at_once}: give a number that divides that of --seeds, {len(self.seeds)}"
            )


_LAPTOP = Config(
    network=Vit(width=32, decoder_width=32),
    training=TrainingConfig(epochs=20, batch_size=64),
    mask_ratios=(0.25, 0.5, 0.75),
)
_REAL = Config(
    max_train=10_000,
    max_test=10_000,
    training=TrainingConfig(epochs=8, batch_size=64, warmup_epochs=1.0),
    evaluations=9,
)
PRESETS = {
    "laptop": _LAPTOP,
    "fashion_mnist": dataclasses.replace(_REAL, patch_sizes=(4, 7)),
    "cifar10": dataclasses.replace(_REAL, image_size=16),
    "paper": Config(
        probe_images=50_000,
        patch_sizes=(2, 4, 8),
        mask_ratios=(0.15, 0.3, 0.45, 0.6, 0.75, 0.9),
        # Five networks at once, or 1024 images of 256 patches in one step, are more than an accelerator's memory.
        network=Vit(192, 12, 3, 128, 2, 4),
        training=TrainingConfig(epochs=400, batch_size=256, warmup_epochs=20.0, bfloat16=True),
        evaluations=24,
        ks=(8, 32, 128),
        seeds=(0, 1, 2, 3, 4),
        seeds_at_once=1,
    ),
}
_SCORES = {
    "accuracy": "accuracy of the ridge probe on test images [share]",
    "r2": "share of the label variance of test images that the ridge probe explains [share]",
}
COLUMNS = {
    "row": "number of the row",
    "dataset": "name of the data set",
    "patch_size": "side of a patch [pixel]",
    "mask_ratio": "share of the patches to hide, as asked for [share]",
    "hidden_share": "share of the patches that is hidden, in whole patches [share]",
    "step": "steps of training before the probe",
    "seed": "seed of the network",
    "accuracy_validation": "accuracy of the ridge probe on the validation images that it is chosen on [share]",
    "r2_validation": "share of their label variance that it explains [share]",
    **{f"{name}_raw": f"of the same probe on raw pixels: {text}" for name, text in _SCORES.items()},
    **{f"{name}_untrained": f"mean over seeds before training: {text}" for name, text in _SCORES.items()},
    **{f"{name}_last": f"mean over seeds after the last step: {text}" for name, text in _SCORES.items()},
    **{f"{name}_last_sd": f"standard deviation over seeds at the end: {text}" for name, text in _SCORES.items()},
    **{f"{name}_best": f"mean over seeds at {name}_best_step: {text}" for name, text in _SCORES.items()},
    **{f"{name}_best_step": f"step at which {name}_validation is largest, mean over seeds" for name in _SCORES},
    **_SCORES,
    "settled_step": "first step at which r2 is through 90% of its way from the untrained to its largest mean",
    "masks": "number of masks",
    "pearson": "correlation over masks, within patch size, of r2 and the r2 that the closed form predicts",
    "spearman": "the same of ranks within patch size",
    "pearson_p": "one-sided p-value of pearson, masks permuted within patch size",
    "spearman_p": "one-sided p-value of spearman, masks permuted within patch size",
    "best_patch_size": "side of a patch of the mask of the largest accuracy_validation [pixel]",
    "best_mask_ratio": "mask ratio of that mask [share]",
    **columns.CLOSED_FORM,
}


class Probed:
    """The images of the probes, the same for every network and step, and the probe on their features."""

    def __init__(self, data: Split, config: Config) -> None:
        rng = np.random.default_rng([config.seed, 1])
        self._classes, self._parts = data.num_classes, []
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.validation_images, data.validation_labels),
            (data.test_images, data.test_labels),
        ):
            rows = drawn(np.arange(len(labels)), config.probe_images, rng)
            self._parts.append((images[rows], labels[rows]))

    def scores(self, features: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
        """Scores of the ridge probe on features [E, n, k] of images, [E] each; its strength is chosen in validation."""
        (_, train), (_, validation), (_, test) = self._parts
        found = [
            ridge_probe(x, train, x_test, test, num_classes=self._classes, val=Rows(x_val, validation))
            for x, x_val, x_test in zip(*(features(images) for images, _ in self._parts), strict=True)
        ]
        named = {"": "test", "_validation": "val"}
        return {
            f"{name}{end}": np.array([getattr(one, f"{name}_{part}") for one in found])
            for end, part in named.items()
            for name in MEASURES
        }


def main(config: Config, run: Run[Split]) -> None:
    """Train, probe over time, predict, compare."""
    data, groups = run.data, seed_groups(config)
    shape = data.image_shape
    masks = {
        f"patch{size}-ratio{ratio:g}": (size, ratio, FixedCountPatchMasking.from_ratio(size, ratio, shape))
        for size, ratio in itertools.product(config.patch_sizes, config.mask_ratios)
    }
    # Refuses sizes that do not fit before anything is trained.
    trainings = {key: make_training(data, mask, config, len(groups[0])) for key, (*_, mask) in masks.items()}
    steps = milestones(config.training.steps(len(data.train_labels)), config.evaluations)
    probed, ks = Probed(data, config), tuple(dict.fromkeys((*config.ks, config.network.width)))
    moments = functools.cache(lambda: data.moments(groups=_GROUPS))

    def curve(key: str, cell: tuple[int, float, FixedCountPatchMasking]) -> Curve:
        size, ratio, mask = cell
        predicted = run.once(f"{key}-closed_form", lambda: closed_form_row(moments()[0], mask, moments()[1], ks))
        training, parts = trainings[key], []

        def look(state: TrainState, step: int) -> dict[str, np.ndarray]:
            del step
            return probed.scores(lambda images: training.features(state, images, _FEATURE_BATCH))

        for seeds in groups:
            name = key if len(groups) == 1 else f"{key}-seeds{'-'.join(map(str, seeds))}"
            start = functools.partial(training.init, seeds)
            source = functools.partial(training.put, data.train_images)
            parts.append(run.train_at(name, training, start, source, steps, look))
        scores = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
        return Curve(size, ratio, 1.0 - mask.keep_probability(shape), steps, scores, predicted)

    curves = list(run.each(masks, curve, unit="mask").values())
    raw = run.once("raw_pixels", lambda: probed.scores(lambda images: raw_pixels(images)[None]))
    raw = {name: values[0] for name, values in raw.items()}
    named = {"dataset": data.name}
    run.dataset("probes", report_table([named | row for curve in curves for row in curve.rows(config.seeds)]))
    table = pd.DataFrame([named | curve.summary() | {f"{n}_raw": raw[n] for n in MEASURES} for curve in curves])
    run.table("masks", table, show=shown(table, ks))
    agreement = agreement_over_time(curves)
    run.table("agreement", agreement)
    run.figure("masking_dynamics", dynamics_figure(data.name, curves, raw, agreement))
    run.verdict(*sentences(curves, raw, agreement))


def seed_groups(config: Config) -> list[tuple[int, ...]]:
    """Seeds that are trained side by side.

    Example:
        >>> seed_groups(Config(seeds=(3, 4), seeds_at_once=1))
        [(3,), (4,)]
    """
    size = config.seeds_at_once or len(config.seeds)
    return [config.seeds[i : i + size] for i in range(0, len(config.seeds), size)]


def make_training(data: Split, mask: FixedCountPatchMasking, config: Config, members: int) -> Training:
    """The networks of one mask, one for each seed of a group, as an ensemble.

    Raises:
        InputError: sizes that do not fit the images or each other.
    """
    pixels = Pixels.from_images(data.train_images)
    dtype = jnp.bfloat16 if config.training.bfloat16 else jnp.float32

    def make(rngs: nnx.Rngs) -> MaskedAutoencoder:
        sizes = vars(config.network)
        return MaskedAutoencoder(pixels, corruption=mask, objective=config.loss, dtype=dtype, rngs=rngs, **sizes)

    steps = adamw(optimizer(config.training, len(data.train_labels)))
    return training_programs(make, reconstruct, steps, batch_size=config.training.batch_size, num_members=members)


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
