"""Does the closed form predict what a trained masked autoencoder learns?

Paper: Theorem 3 and Sec. 5
Time: 5 minutes

For every patch size, mask ratio and loss, masked autoencoders of several seeds are trained on the same images, and many
tasks are probed on the same frozen networks: fine and coarse labels, class subsets and pairs, brightness, position,
scores of the top and of the bottom principal components. For each task the closed form (Theorem 3 of Balestriero &
LeCun, 2024, for the same exact-count patch masks) predicts how a linear probe gains over the lowest mask ratio; the
ridge probe on the networks' features measures it. The unit is a pair (task, patch size); the statistic is the
correlation of predicted and observed gain within units, and tasks are permuted for the null. Rival predictors stand
beside ours: the mask ratio alone, the reconstruction loss, RankMe. The baselines are the same probes on raw pixels, on
principal components, on the untrained networks and on the same networks trained with the fine labels instead, for as
many epochs. Cells whose networks diverge are left out, with a warning.

    python -m experiments.alignment_vs_probe                                        # digits
    python -m experiments.alignment_vs_probe --preset fashion_mnist --data idx:DIR
    python -m experiments.alignment_vs_probe --preset cifar10 --data npz:FILE
    python -m experiments.alignment_vs_probe --preset paper --data npz:FILE         # accelerators
    python -m experiments.alignment_vs_probe --analyse-only runs/.../rows.csv       # the analysis alone, of any rows

``rows.csv`` is tidy (one row per task, patch size, mask ratio, loss and seed): append rows of other networks or data
sets and run the last form.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

import mae_align as ma
from experiments.alignment_vs_probe.networks import FEATURE_BATCH, Cell, Networks, check_ratios
from experiments.alignment_vs_probe.report import COLUMNS, SUPERVISED, UNTRAINED, AnalysisConfig, write_report
from experiments.alignment_vs_probe.study import Study, closed_form, masked_loss
from experiments.alignment_vs_probe.table import Table, check_rows, enough_ratios
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Counts, Ratios, RunConfig, Seeds, Training, Vit
from experiments.harness.data import Split
from experiments.harness.folder import silent
from experiments.harness.masked import pictures
from experiments.harness.run import Rows, Run
from mae_align.metrics import rankme
from mae_align.models import Loss
from mae_align.probes import principal_components, raw_pixels
from mae_align.train.ensemble import Training as Programs
from mae_align.train.ensemble import TrainState

# Images in the pictures of reconstructions.
_PICTURES = 4
_NETWORK = "mean patch token"


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the experiment."""

    patch_sizes: Counts = (2, 4)
    """Sides of square patches, in pixels; each must divide the image."""
    mask_ratios: Ratios = (0.25, 0.5, 0.75)
    """Shares of patches to mask, at least three, since two points always lie on a line; gains are over the lowest."""
    losses: Annotated[tuple[Loss, ...], Bounds(unique=True)] = (Loss.matched, Loss.standard)
    """All pixels, what the closed form solves (matched), or hidden patches, raw (hidden) or normalised (standard)."""
    seeds: Seeds = (0, 1)
    """Seeds of the networks; trained together."""
    network: Vit = dataclasses.field(default_factory=Vit)
    """The masked autoencoders."""
    training: Training = dataclasses.field(default_factory=lambda: Training(batch_size=64, warmup_epochs=1.0))
    """Their training."""
    ks: Counts = (8, 32, 128)
    """Numbers of features of the closed form, beside the mean over log k."""
    analyse_only: str | None = None
    """Analyse the rows of this CSV file and train nothing."""


_BOUNDED = Config(max_train=10_000, max_test=10_000, mask_ratios=(0.2, 0.4, 0.6, 0.8))
PRESETS = {
    "laptop": Config(
        network=Vit(width=32, decoder_width=32), training=Training(epochs=20, batch_size=64, warmup_epochs=1.0)
    ),
    "fashion_mnist": dataclasses.replace(_BOUNDED, patch_sizes=(4, 7)),
    "cifar10": dataclasses.replace(_BOUNDED, image_size=16),
    "paper": Config(
        patch_sizes=(2, 4, 8),
        mask_ratios=(0.15, 0.3, 0.45, 0.6, 0.75, 0.9),
        seeds=(0, 1, 2, 3, 4),
        network=Vit(192, 12, 3, 128, 2, 4),
        training=Training(epochs=400, batch_size=1024, warmup_epochs=20.0, bfloat16=True),
    ),
}


def load(config: Config) -> Split | Table:
    """The images, or the rows of a table to be analysed."""
    return Split.load(config) if config.analyse_only is None else Table.read(config.analyse_only)


def main(config: Config, run: Run[Any]) -> None:
    """Train, probe, predict and compare.

    Raises:
        InputError: settings that do not fit the data, before any long work.
    """
    analysis = AnalysisConfig(seed=config.seed)
    if isinstance(run.data, Table):
        write_report(run, run.data.rows, analysis)
        return
    data: Split = run.data
    networks = Networks(data, config.network, config.training, config.seeds)
    for patch in config.patch_sizes:
        check_ratios(data.image_shape, patch, config.mask_ratios)
    cells = [Cell(*of) for of in itertools.product(config.patch_sizes, config.mask_ratios, config.losses)]
    # Mask and loss do not matter to networks that are untrained or trained with labels.
    some = {patch: next(cell for cell in cells if cell.patch_size == patch) for patch in config.patch_sizes}
    # Refuses sizes that do not fit before anything is trained.
    programs = {cell.key: networks.masked(cell) for cell in cells}
    labelled = {f"supervised-patch{patch}": networks.supervised(cell) for patch, cell in some.items()}
    study = Study.of(data, config.seed)
    baselines = run.once("baselines", lambda: _plain(study))
    for patch, cell in some.items():
        start = functools.partial(programs[cell.key].init, config.seeds)
        of = functools.partial(_labelled, study, config.seeds, patch, UNTRAINED, programs[cell.key])
        baselines += run.once(f"untrained-patch{patch}", lambda of=of, start=start: of(start()))
    predicted = _predictions(config, run, study)

    def measure(key: str, cell: Cell | int) -> Rows:
        """Rows of networks of a cell, or of those of a patch size that are trained with labels."""
        training = labelled[key] if isinstance(cell, int) else programs[key]
        state = networks.train(run, key, training)
        if isinstance(cell, int):
            return _labelled(study, config.seeds, cell, SUPERVISED, training, state)
        return _observed(config, run, study, cell, training, state)

    wanted: dict[str, Cell | int] = {f"supervised-patch{patch}": patch for patch in config.patch_sizes}
    wanted |= {cell.key: cell for cell in cells}
    found = run.each(wanted, lambda key, cell: run.once(key, lambda: measure(key, cell)))
    baselines += [row for key in found if key in labelled for row in found[key]]
    rows = [
        row | predicted[row["patch_size"], row["mask_ratio"], row["task"]]
        for key in found
        if key in programs
        for row in found[key]
    ]
    kept = enough_ratios(rows)
    if not kept:
        raise ma.InputError(
            f"{len(set(programs) - set(found))} of {len(cells)} cells diverged, and no loss is left with networks at "
            "three mask ratios: give a smaller --training.learning-rate"
        )
    run.notes.append(f"Reconstructions of every trained cell: {run.folder.shared / 'reconstructions-*.png'}")
    run.table("baselines", baselines)
    run.table("rows", rows)
    write_report(run, check_rows(kept), analysis, baselines)


def _plain(study: Study) -> Rows:
    """The same probes on raw pixels and on as many principal components as there are, by task."""
    moments = study.moments
    k = min(128, moments.num_pixels, moments.count - 1)
    kinds = {
        "raw pixels": raw_pixels,
        f"first {k} principal components": lambda images: principal_components(moments, images, k),
    }
    return [
        {"dataset": study.data.name, "task": task, "features": name, **scores}
        for name, features in kinds.items()
        for task, scores in study.probe(study.encoded(lambda images, of=features: of(images)[None]), name)[0].items()
    ]


def _labelled(
    study: Study, seeds: tuple[int, ...], patch: int, name: str, training: Programs, state: TrainState
) -> Rows:
    """Rows of networks that no mask or loss has changed: before the first step, or trained with the fine labels."""
    features = study.encoded(lambda images: training.features(state, images, FEATURE_BATCH))
    return [
        {"dataset": study.data.name, "features": name, "patch_size": patch, "seed": seed, "task": task, **scores}
        for seed, tasks in zip(seeds, study.probe(features, name), strict=True)
        for task, scores in tasks.items()
    ]


def _predictions(config: Config, run: Run[Any], study: Study) -> Mapping[tuple[int, float, str], dict[str, Any]]:
    """Columns of the closed form by patch size, mask ratio and task."""
    grid = list(itertools.product(config.patch_sizes, config.mask_ratios))
    found = {}
    for patch, ratio in tqdm(grid, desc="closed form", unit="mask", disable=silent()):
        mask = ma.FixedCountPatchMasking.from_ratio(patch, ratio, study.data.image_shape)
        solve = functools.partial(closed_form, study, mask, config.ks)
        for task, row in run.once(f"closed-patch{patch}-ratio{ratio:g}", solve).items():
            found[patch, ratio, task] = row
    return found


def _observed(config: Config, run: Run[Any], study: Study, cell: Cell, training: Programs, state: TrainState) -> Rows:
    """Rows of the trained networks of one cell: all tasks on each; the first one's reconstructions are drawn."""
    data, images = study.data, study.probed.images
    shown = images[np.random.default_rng(config.seed).permutation(len(images))[:_PICTURES]]
    drawn = pictures(training.model(state, 0), shown, data.train_images, config.seed)
    run.folder.save_figure(f"reconstructions-{cell.key}", drawn)
    about = {"patch_size": cell.patch_size, "mask_ratio": cell.mask_ratio, "objective": cell.loss.value}
    hidden = 1 - cell.masking(data.image_shape).keep_probability(data.image_shape)
    features = study.encoded(lambda images: training.features(state, images, FEATURE_BATCH))
    losses, probed = masked_loss(training, state, images), study.probe(features, _NETWORK)
    rows: Rows = []
    for seed, loss, own, scores in zip(config.seeds, losses, features[2], probed, strict=True):
        network = {"seed": seed, "reconstruction_loss": float(loss), "rankme": rankme(own)}
        network |= {"latent": own.shape[1], "realized_ratio": hidden}
        for task in study.probed.tasks:
            name = {"dataset": data.name, "task": task.name, "task_kind": task.kind.value}
            rows.append(name | about | network | scores[task.name])
    return rows


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS, load)
