"""Does the closed form predict what a trained masked autoencoder learns?

For every patch size, mask ratio and loss, masked autoencoders of several seeds are trained on the same images, and many
tasks are probed on the same frozen networks: fine and coarse labels, class subsets and pairs, brightness, position,
scores of the top and of the bottom principal components. For each task the closed form (Theorem 3 of Balestriero &
LeCun, 2024, for the same exact-count patch masks) predicts how a linear probe gains over the lowest mask ratio; the
ridge probe on the networks' features measures it. The unit is a pair (task, patch size); the statistic is the
correlation of predicted and observed gain within units, and tasks are permuted for the null. Rival predictors stand
beside ours: the mask ratio alone, the reconstruction loss, RankMe. The baselines are the same probes on raw pixels, on
principal components, on the untrained networks and on the same networks trained with the fine labels instead, for as
many epochs. Cells whose networks diverge are left out, with a warning.

    python -m experiments.alignment_vs_probe                                        # digits: three minutes
    python -m experiments.alignment_vs_probe --preset fashion_mnist --data idx:DIR
    python -m experiments.alignment_vs_probe --preset cifar10 --data npz:FILE
    python -m experiments.alignment_vs_probe --preset paper --data npz:FILE         # accelerators
    python -m experiments.alignment_vs_probe --analyse-only runs/.../rows.csv       # the analysis alone, of any rows

Every trained cell (patch size, ratio, loss) is written and drawn when it is done, and every network is checkpointed and
probed online while it trains: interrupted, the same command goes on where it stopped. ``rows.csv`` is tidy (one row per
task, patch size, mask ratio, loss and seed): append rows of other networks or data sets and run the last form.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import mae_align as ma
from experiments.alignment_vs_probe.cells import (
    Cell,
    Loss,
    NetworkConfig,
    check_ratios,
    closed_form,
    make_supervised,
    make_training,
    masked_loss,
    probe_columns,
    probe_tasks,
    train,
)
from experiments.alignment_vs_probe.report import (
    SUPERVISED,
    UNTRAINED,
    AnalysisConfig,
    baseline_sentences,
    write_report,
)
from experiments.alignment_vs_probe.table import check_rows, read_table
from experiments.alignment_vs_probe.tasks import Task, standard_tasks
from experiments.harness.cli import launch
from experiments.harness.train_common import LabelledSplit
from experiments.harness.data import load_together
from experiments.harness.folder import Parts, RunFolder, silent
from experiments.harness.train_loop import OnlineProbe
from experiments.train_mae import pictures
from mae_align.metrics import rankme
from mae_align.models import Pixels
from mae_align.moments.moments import Moments
from mae_align.probes import principal_components, raw_pixels
from mae_align.runtime.files import fingerprint
from mae_align.runtime.processes import refused_together
from mae_align.train.ensemble import Training, TrainState
from mae_align.train.loop import Diverged

_FEATURE_BATCH = 500
# Images in the pictures of reconstructions, and most images in each half of the online probe.
_PICTURES = 4
_WATCHED = 1000


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or prepared:DIR."""
    image_size: int | None = None
    """Resize images to squares of this side, in pixels; none keeps them."""
    max_train: int | None = None
    """Use at most so many training images, drawn at random; none for all."""
    max_test: int | None = None
    """Use at most so many test images: half of them test the probes, half the closed form; none for all."""
    patch_sizes: tuple[int, ...] = (2, 4)
    """Sides of square patches, in pixels; each must divide the image."""
    mask_ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of patches to mask, at least three, since two points always lie on a line; gains are over the lowest."""
    losses: tuple[Loss, ...] = (Loss.matched, Loss.standard)
    """matched: all pixels, what the closed form solves; standard: hidden patches, normalised, as published."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the networks; trained together."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """The masked autoencoders."""
    ks: tuple[int, ...] = (8, 32, 128)
    """Numbers of features of the closed form, beside the mean over log k."""
    seed: int = 0
    """Of the subsets, and of the tasks that are drawn."""
    analyse_only: str | None = None
    """Analyse the rows of this CSV file and train nothing."""
    out: str | None = None
    """Run folder; none for runs/alignment_vs_probe-DATA-HASH."""


_LAPTOP = Config(network=NetworkConfig(width=32, depth=2, decoder_width=32, epochs=20, batch_size=64))
_BOUNDED = dataclasses.replace(
    _LAPTOP, max_train=10_000, max_test=10_000, mask_ratios=(0.2, 0.4, 0.6, 0.8), network=NetworkConfig()
)
PRESETS = {
    "laptop": _LAPTOP,
    "fashion_mnist": dataclasses.replace(_BOUNDED, patch_sizes=(4, 7)),
    "cifar10": dataclasses.replace(_BOUNDED, image_size=16),
    "paper": Config(
        patch_sizes=(2, 4, 8),
        mask_ratios=(0.15, 0.3, 0.45, 0.6, 0.75, 0.9),
        seeds=(0, 1, 2, 3, 4),
        network=NetworkConfig(192, 12, 3, 128, 2, 4, epochs=400, batch_size=1024, warmup_epochs=20.0, bfloat16=True),
    ),
}


def main(config: Config) -> None:
    """Train, probe, predict and compare.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    if config.analyse_only is not None:
        with refused_together():
            table = read_table(config.analyse_only)
        folder = RunFolder.open("alignment_vs_probe", Path(config.analyse_only).stem, config, config.out)
        write_report(table, folder, AnalysisConfig(seed=config.seed))
        return
    _check(config)
    data = load_together(config.data, image_size=config.image_size, seed=config.seed)
    run = _Run.of(config, data)
    num_images = len(run.probed.train_images)
    if config.network.batch_size > num_images:
        raise ma.InputError(
            f"--network.batch-size {config.network.batch_size}: there are {num_images} training images, give a smaller "
            "batch"
        )
    cells = [Cell(*of) for of in itertools.product(config.patch_sizes, config.mask_ratios, config.losses)]
    for cell in cells:
        # Refuses sizes that do not fit before anything is trained.
        make_training(run.pixels, cell, config.network, num_images, len(config.seeds))
    for patch in config.patch_sizes:
        check_ratios(run.pixels.image_shape, patch, config.mask_ratios)
    folder = RunFolder.open("alignment_vs_probe", config.data, config, config.out)
    parts = Parts(folder.points, run.identity)
    baselines = parts.once("baselines", lambda: _baselines(run))
    for patch in config.patch_sizes:
        baselines += parts.once(f"untrained-patch{patch}", lambda patch=patch: list(_untrained(config, run, patch)))
    folder.save_table("baselines", baselines)
    rows, lost = [], []

    def trained(key: str, observe: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Rows of some networks; none, and a note, if they diverge."""
        try:
            return parts.once(key, observe)
        except Diverged as error:
            lost.append(f"Left out: {key}, {error}.")
            warnings.warn(lost[-1], stacklevel=2)
            return []

    for patch in config.patch_sizes:
        baselines += trained(
            f"supervised-patch{patch}", lambda patch=patch: list(_supervised(config, run, patch, folder.shared))
        )
        folder.save_table("baselines", baselines)
    predicted = _predictions(config, run, parts)
    diverged = 0
    bar = tqdm(cells, desc="networks", unit="cell", disable=silent())
    for cell in bar:
        bar.set_postfix_str(cell.key)
        observed = trained(cell.key, lambda cell=cell: list(_observed(config, run, cell, folder)))
        rows += [row | predicted[cell.patch_size, cell.mask_ratio, row["task"]] for row in observed]
        diverged += not observed
        folder.save_table("rows", rows)
    kept = _compared(rows)
    if not kept:
        raise ma.InputError(
            f"{diverged} of {len(cells)} cells diverged, and no loss is left with networks at three mask ratios: give "
            "a smaller --network.learning-rate"
        )
    drawn = [f"Reconstructions of every trained cell: {folder.shared / 'reconstructions-*.png'}"]
    notes = [*baseline_sentences(kept, baselines), *lost]
    write_report(check_rows(kept), folder, AnalysisConfig(seed=config.seed), notes, drawn)


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the losses that have networks at three mask ratios; fewer have no correlation."""
    ratios: dict[str, set[float]] = {}
    for row in rows:
        ratios.setdefault(row["objective"], set()).add(row["mask_ratio"])
    return [row for row in rows if len(ratios[row["objective"]]) >= 3]


def _check(config: Config) -> None:
    """Refuse settings that no data could fit."""
    if len(set(config.mask_ratios)) < 3:
        raise ma.InputError("--mask-ratios: a correlation over ratios needs at least three different ones, give more")
    for name in ("patch_sizes", "mask_ratios", "losses", "seeds", "ks"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ma.InputError(f"--{name.replace('_', '-')} repeats a value: give each once")
    for name in ("max_train", "max_test"):
        value = getattr(config, name)
        if value is not None and value < 40:
            raise ma.InputError(f"--{name.replace('_', '-')} {value}: give at least 40 images")
    if min(config.ks) < 1 or min(config.seed, *config.seeds) < 0:
        raise ma.InputError("--ks must be at least 1, --seed and --seeds at least 0")
    if max(config.seeds) >= 2**32:
        raise ma.InputError(f"--seeds {max(config.seeds)}: give whole numbers below 2^32")


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """The images and tasks of a run.

    The test images are split: the held-out curves of the closed form and the test of the probes share none, so that
    prediction and observation have no sampling noise in common.

    Attributes:
        probed, predicted: the same training images, each with its half of the test images.
        probe_tasks, closed_tasks: the same tasks on both.
    """

    probed: ma.ImageDataset
    predicted: ma.ImageDataset
    probe_tasks: tuple[Task, ...]
    closed_tasks: tuple[Task, ...]
    moments: Moments
    pixels: Pixels

    @property
    def identity(self) -> str:
        """What parts of a run belong to."""
        arrays = [getattr(half, name) for half in (self.probed, self.predicted) for name in _ARRAYS]
        return fingerprint(arrays, {"tasks": [task.name for task in self.probe_tasks]})

    @classmethod
    def of(cls, config: Config, data: ma.ImageDataset) -> _Run:
        rng = np.random.default_rng(config.seed)
        rows = _some(len(data.train_labels), config.max_train, rng)
        test = rng.permutation(_some(len(data.test_labels), config.max_test, rng))
        images, labels = data.train_images[rows], data.train_labels[rows]
        halves = []
        for half in (np.sort(test[::2]), np.sort(test[1::2])):
            part = (data.test_images[half], data.test_labels[half])
            halves.append(ma.ImageDataset(images, labels, *part, data.class_names, data.name))
        # Refuses constant images, before tasks warn of what they lack.
        pixels, moments = Pixels.from_images(images), Moments.from_arrays(images)
        with warnings.catch_warnings():
            warnings.simplefilter("once")
            tasks = [standard_tasks(half, moments, config.seed) for half in halves]
        # A task that one half lacks (a class without test images) is left out of both.
        common = {task.name for task in tasks[0]} & {task.name for task in tasks[1]}
        kept = [tuple(task for task in half if task.name in common) for half in tasks]
        return cls(halves[0], halves[1], kept[0], kept[1], moments, pixels)


def _some(n: int, most: int | None, rng: np.random.Generator) -> np.ndarray:
    return np.arange(n) if most is None or most >= n else np.sort(rng.choice(n, most, replace=False))


_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def _baselines(run: _Run) -> list[dict[str, Any]]:
    """The same probes on raw pixels and on as many principal components as there are, by task."""
    data = run.probed
    k = min(128, run.moments.num_pixels, run.moments.count - 1)
    features = {
        "raw pixels": (raw_pixels(data.train_images), raw_pixels(data.test_images)),
        f"first {k} principal components": (
            principal_components(run.moments, data.train_images, k),
            principal_components(run.moments, data.test_images, k),
        ),
    }
    rows = []
    for name, parts in features.items():
        for task, result in probe_tasks(parts[0], parts[1], run.probe_tasks, name).items():
            rows.append({"dataset": data.name, "task": task, "features": name, **probe_columns(result)})
    return rows


def _untrained(config: Config, run: _Run, patch: int) -> Iterator[dict[str, Any]]:
    """The same probes on the networks of a patch size before their first step, which no mask or loss has changed."""
    cell = _any_cell(config, patch)
    training = make_training(run.pixels, cell, config.network, len(run.probed.train_images), len(config.seeds))
    yield from _network_baseline(config, run, patch, UNTRAINED, training, training.init(config.seeds))


def _supervised(config: Config, run: _Run, patch: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The same probes on the networks of a patch size trained with the fine labels, for as long and as fast."""
    data, seeds, cell = run.probed, config.seeds, _any_cell(config, patch)
    num_images = len(data.train_images)
    training = make_supervised(run.pixels, cell, config.network, num_images, len(seeds), data.num_classes)
    where = folder / "networks" / f"supervised-patch{patch}"
    identity = fingerprint([data.train_labels], {"of": _identity(config, run, cell), "supervised": data.num_classes})
    state = train(training, data.train_images, config.network, seeds, where, identity, data.train_labels)
    yield from _network_baseline(config, run, patch, SUPERVISED, training, state)


def _any_cell(config: Config, patch: int) -> Cell:
    """One of the cells of a patch size, where mask and loss do not matter."""
    return Cell(patch, config.mask_ratios[0], config.losses[0])


def _network_baseline(
    config: Config, run: _Run, patch: int, name: str, training: Training, state: TrainState
) -> Iterator[dict[str, Any]]:
    data = run.probed
    features = [training.features(state, part, _FEATURE_BATCH) for part in (data.train_images, data.test_images)]
    for seed, fitted, tested in zip(config.seeds, *features, strict=True):
        about = {"dataset": data.name, "features": name, "patch_size": patch, "seed": seed}
        for task, result in probe_tasks(fitted, tested, run.probe_tasks, name).items():
            yield about | {"task": task} | probe_columns(result)


def _predictions(config: Config, run: _Run, parts: Parts) -> dict[tuple[int, float, str], dict[str, Any]]:
    """Columns of the closed form by patch size, mask ratio and task."""
    grid = list(itertools.product(config.patch_sizes, config.mask_ratios))
    found = {}
    for patch, ratio in tqdm(grid, desc="closed form", unit="mask", disable=silent()):

        def solve(patch: int = patch, ratio: float = ratio) -> list[dict[str, Any]]:
            masking = ma.FixedCountPatchMasking.from_ratio(patch, ratio, run.probed.image_shape)
            rows = closed_form(run.moments, masking, run.predicted, run.closed_tasks, config.ks)
            return [{"task": name} | row for name, row in rows.items()]

        for row in parts.once(f"closed-patch{patch}-ratio{ratio:g}", solve):
            found[patch, ratio, row.pop("task")] = row
    return found


def _observed(config: Config, run: _Run, cell: Cell, folder: RunFolder) -> Iterator[dict[str, object]]:
    """Rows of one cell: its networks trained, the first one's reconstructions drawn, and all tasks probed on each."""
    data, seeds = run.probed, config.seeds
    training = make_training(run.pixels, cell, config.network, len(data.train_images), len(seeds))
    where = folder.shared / "networks" / cell.key
    identity, online = _identity(config, run, cell), _online_probe(config, run, training)
    state = train(training, data.train_images, config.network, seeds, where, identity, evaluate=online)
    shown = data.test_images[np.random.default_rng(config.seed).permutation(len(data.test_labels))[:_PICTURES]]
    drawn = pictures(training.model(state, 0), shown, data.train_images, config.seed)
    folder.save_figure(f"reconstructions-{cell.key}", drawn)
    features = [training.features(state, part, _FEATURE_BATCH) for part in (data.train_images, data.test_images)]
    losses = masked_loss(training, state, data.test_images)
    for member, seed in enumerate(seeds):
        fitted, tested = (part[member] for part in features)
        about = {
            "patch_size": cell.patch_size,
            "mask_ratio": cell.mask_ratio,
            "objective": cell.loss.value,
            "seed": seed,
            "reconstruction_loss": float(losses[member]),
            "rankme": rankme(tested),
            "latent": fitted.shape[1],
            "realized_ratio": 1
            - ma.FixedCountPatchMasking.from_ratio(cell.patch_size, cell.mask_ratio, data.image_shape).keep_probability(
                data.image_shape
            ),
        }
        results = probe_tasks(fitted, tested, run.probe_tasks, "mean patch token")
        for task in run.probe_tasks:
            name = {"dataset": data.name, "task": task.name, "task_kind": task.kind.value}
            yield name | about | probe_columns(results[task.name])


def _online_probe(config: Config, run: _Run, training: Training) -> OnlineProbe:
    """Of fine labels on training images alone, half of them to fit: for watching, not for reporting."""
    data = run.probed
    order = np.random.default_rng(config.seed).permutation(len(data.train_labels))
    fit, watch = (np.sort(order[i::2]) for i in (0, 1))
    images, labels = data.train_images, data.train_labels
    halves = (images[fit], labels[fit], images[watch], labels[watch], data.test_images, data.test_labels)
    return OnlineProbe.of(
        training, LabelledSplit(data.name, data.num_classes, *halves, "halves of the training images"), _WATCHED, 0
    )


def _identity(config: Config, run: _Run, cell: Cell) -> str:
    settings = {"network": dataclasses.asdict(config.network), "cell": cell.key, "seeds": config.seeds}
    return fingerprint([run.probed.train_images], settings)


if __name__ == "__main__":
    launch(main, Config, PRESETS)
