"""The shared report of trained networks: the closed form of their corruption, and what they make of test images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import mae_align as ma
from experiments.harness.folder import Parts
from experiments.harness.report import NETWORK, Score
from experiments.harness.train_common import LabelledSplit
from experiments.harness.train_loop import FEATURE_BATCH, Ensemble, Problem
from mae_align.closed_form.predictions import KS, closed_form_row
from mae_align.closed_form.targets import varying_components
from mae_align.corruption import Corruption, PatchMask
from mae_align.data import average_pool
from mae_align.data.patches import patch_hw
from mae_align.metrics import Outputs, report_row
from mae_align.moments.moments import group_of

# Pixel values up to which whole images are measured; larger ones are pooled.
MOST_PIXELS = 12_288
# Of test images, for standard errors.
_GROUPS = 20
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """The images that everything linear is computed on: those of a split, pooled where they are large.

    Averages over squares inside of a patch keep a patch mask a patch mask.

    Attributes:
        split: of the whole images. factor: side of the squares, 1 for whole images. corruption: of the pooled images.
    """

    split: LabelledSplit
    factor: int
    corruption: Corruption | None

    @classmethod
    def of(cls, split: LabelledSplit, corruption: Corruption | None, most: int = MOST_PIXELS) -> Measured:
        """The smallest pooling that leaves at most so many values, or the largest there is."""
        height, width, channels = split.train_images.shape[1:]
        sides = [height, width, *(patch_hw(corruption.patch_size) if isinstance(corruption, PatchMask) else ())]
        factors = [f for f in range(1, min(sides) + 1) if not any(side % f for side in sides)]
        factor = next((f for f in factors if height * width * channels <= most * f * f), factors[-1])
        return cls(split, factor, _pooled_corruption(corruption, factor))

    @property
    def note(self) -> str:
        """What is to be said of the images."""
        return "" if self.factor == 1 else f", pooled {self.factor}x{self.factor}"

    def pool(self, images: np.ndarray) -> np.ndarray:
        """Images of any part, pooled."""
        return images if self.factor == 1 else average_pool(images, self.factor)

    @functools.cached_property
    def train(self) -> ma.Moments:
        """Of the training images and labels."""
        split = self.split
        return ma.Moments.from_arrays(self.pool(split.train_images), split.train_labels, num_classes=split.num_classes)

    @functools.cached_property
    def components(self) -> tuple[np.ndarray, np.ndarray]:
        """Principal components of the training images and their variances."""
        return varying_components(self.train)

    @functools.cached_property
    def test(self) -> ma.Moments:
        """Of the test images and labels, in groups for standard errors."""
        split = self.split
        numbers = range(min(_GROUPS, len(split.test_labels)), 0, -1)
        groups = next(g for g in numbers if len(set(group_of(np.arange(len(split.test_labels)), g))) == g)
        images = self.pool(split.test_images)
        return ma.Moments.from_arrays(images, split.test_labels, num_classes=split.num_classes, groups=groups)


def _pooled_corruption(corruption: Corruption | None, factor: int) -> Corruption | None:
    """What a corruption is on pooled images."""
    if factor == 1 or corruption is None:
        return corruption
    if isinstance(corruption, PatchMask):
        height, width = patch_hw(corruption.patch_size)
        return dataclasses.replace(corruption, patch_size=(height // factor, width // factor))
    assert isinstance(corruption, ma.GaussianNoise)
    return ma.GaussianNoise(corruption.sigma / factor)


@dataclasses.dataclass(frozen=True)
class Report:
    """The shared report.

    Attributes:
        rows: of the reported networks. corrupted, clean: cells of the closed form with the corruption and without.
        restored: what the reconstruction errors are of.
    """

    rows: list[Row]
    corrupted: Mapping[str, Any]
    clean: Mapping[str, Any]
    restored: str


def measure(
    problem: Problem,
    measured: Measured,
    trained: Ensemble,
    members: Sequence[int],
    scores: Sequence[Score],
    parts: Parts,
    seed: int,
) -> Report:
    """One row for each of some members.

    Args:
        members: positions. scores: of the probes, those of the trained networks among them. seed: of the corruptions
            of test images.
    """

    def closed(corruption: Corruption | None) -> Callable[[], Row]:
        ks = [k for k in KS if k <= measured.train.num_pixels]
        return lambda: closed_form_row(measured.train, corruption, measured.test, ks)

    corrupted = parts.once("closed_form", closed(measured.corruption))
    clean = corrupted if measured.corruption is None else parts.once("closed_form-none", closed(None))
    split, rows = measured.split, []
    features = functools.cache(lambda: [trained.features(x) for x in (split.train_images, split.test_images)])
    for member in tqdm(members, desc="report", unit="network", disable=jax.process_index() > 0):
        run = problem.runs[member]

        def compute(member: int = member, run: Any = run) -> Row:
            restored = restore(problem, trained, member, split.test_images, seed)
            train, test = (x[member] for x in features())
            outputs = Outputs(train, test, measured.pool(restored))
            return report_row(
                {"data": split.name, "member": run.name(problem.runs), **dataclasses.asdict(run)},
                outputs,
                moments=measured.train,
                eval_moments=measured.test,
                corruption=measured.corruption,
                targets=split.train_labels,
                eval_images=measured.pool(split.test_images),
                eval_targets=split.test_labels,
                probes={},
                closed_form=corrupted,
                components=measured.components,
            )

        row = parts.once(f"report-{member}" + ("" if trained.clean is None else "-clean"), compute)
        for score in scores:
            if (score.features, score.member) == (NETWORK, member):
                row |= {f"{score.probe}_{key}": value for key, value in score.values.items() if key != "probe"}
        about = {"reconstruction_of": problem.restores, "images": f"whole{measured.note}"}
        rows.append(row | about | ({"features_note": trained.note} if trained.note else {}))
    return Report(rows, corrupted, clean, problem.restores)


def restore(problem: Problem, trained: Ensemble, member: int, images: np.ndarray, seed: int) -> np.ndarray:
    """What a network makes of corrupted images, [n, h, w, c] in stored units."""
    model = trained.training.model(trained.state, member)
    program = jax.jit(problem.restore)
    found = []
    for i, start in enumerate(range(0, len(images), FEATURE_BATCH)):
        part = images[start : start + FEATURE_BATCH]
        rows = np.concatenate([part, np.repeat(part[:1], FEATURE_BATCH - len(part), axis=0)]).astype(np.float32)
        found.append(np.asarray(program(model, rows, jax.random.fold_in(jax.random.key(seed), i)))[: len(part)])
    return np.concatenate(found)


def report_sentences(report: Report, num_train: int) -> list[str]:
    """What the rows say, in plain words."""
    first = report.rows[0]
    mean = {key: np.mean([row[key] for row in report.rows]) for key in _NUMBERS}
    bands = [np.mean([row[key] for row in report.rows]) for key in first if key.startswith("reconstruction_error_band")]
    lines = [
        f"Networks: effective rank {mean['rankme']:.1f} of {first['latent']} features; least squares on them explains "
        f"{mean['feature_r2']:.3f} of the label variance in training, {mean['feature_eval_r2']:.3f} on test images.",
        f"Reconstruction of {report.restored}, error as a share of the variance: {mean['reconstruction_error']:.3f} in "
        f"all, {mean['reconstruction_error_top']:.3f} in the top {first['reconstruction_top_count']} components "
        f"(90 % of the variance), {mean['reconstruction_error_bottom']:.3f} in the others; from low to high spatial "
        f"frequencies {' '.join(f'{value:.2f}' for value in bands if np.isfinite(value))}.",
    ]
    cells = [key.removeprefix("closed_eval_r2_") for key in report.corrupted if key.startswith("closed_eval_r2_k")]
    words = []
    for k in cells:
        value, se = report.corrupted[f"closed_eval_r2_{k}"], report.corrupted[f"closed_eval_r2_se_{k}"]
        text = f"{value:.3f} +- {se:.3f} at k = {k[1:]}"
        if report.clean is not report.corrupted:
            text += f" ({value - report.clean[f'closed_eval_r2_{k}']:+.3f} against no corruption)"
        words.append(text)
    lines.append(
        f"Closed form (linear, same corruption, {num_train} training images): r2 on test images {'; '.join(words)}. "
        "For differences with their standard errors use experiments.masking_sweep."
    )
    return lines


_NUMBERS = (
    "rankme",
    "feature_r2",
    "feature_eval_r2",
    "reconstruction_error",
    "reconstruction_error_top",
    "reconstruction_error_bottom",
)
