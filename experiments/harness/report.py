"""What is reported of trained networks: beside the closed form of their corruption, and beside every baseline."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd

import mae_align as ma
from experiments.harness.columns import CLOSED_FORM, PROBE
from experiments.harness.data import Split
from experiments.harness.ends import NAMES
from experiments.harness.ensembles import End, Ensemble, Member, Probe, Problem, batches
from experiments.harness.probes import NETWORK, PREDICTED, SUPERVISED
from experiments.harness.run import Rows, Run
from experiments.harness.statistics import WORTH
from mae_align.closed_form.predictions import KS, closed_form_row
from mae_align.corruption import Corruption, PatchMask
from mae_align.data import average_pool
from mae_align.data.patches import patch_hw
from mae_align.metrics import Outputs, report_row
from mae_align.moments.moments import group_of
from mae_align.moments.principal import PrincipalComponents, varying_components

# Pixel values up to which whole images are measured; larger ones are pooled.
MOST_PIXELS = 12_288
# Of test images, for standard errors.
_GROUPS = 20

COLUMNS = {
    "data": "name of the data set",
    "member": "what tells a network from the others; empty where no network is involved",
    "seed": "seed of the network",
    "learning_rate": "peak learning rate of the network",
    "guidance": "weight of the cross-entropy beside the reconstruction in the loss of the network",
    "features": "what is probed, or how a whole network was trained",
    "features_note": "how features are taken, where not as in training",
    "compared_as": "the features, and the guidance where networks differ in it",
    "reported": "whether the summary and the figures are about this row: of several learning rates only about the best",
    "probe": "kind of probe; none for whole networks trained with labels",
    "against": "what the networks are compared with",
    "accuracy": "mean accuracy on test images [%]",
    "difference": "accuracy minus that of the other side [points]",
    "difference_se": "its standard error, paired over the test images, which both share, and between networks (paired "
    "by seed where both have the same) [points]",
    "predicted": "number of the class that is found for each test image",
    "label": "number of the class of each test image",
    "row": "position in results.csv, from 0",
    "image": "position among the test images, from 0",
    "corruption": "corruption that the closed form is of",
    "latent": "number of features",
    "rankme": "effective rank of the features of test images",
    "feature_r2": "share of the label variance that least squares on the features explains in training",
    "feature_eval_r2": "the same on test images",
    **CLOSED_FORM,
    "reconstruction_of": "what the reconstruction errors are of",
    "images": "whole images, or averages over squares of them, on which everything linear is measured",
    "reconstruction_mse": "mean squared error of a pixel value of test images [squared pixel units]",
    "reconstruction_error": "squared error of test images over their variance about the training mean",
    "reconstruction_error_top": "the same within reconstruction_top_count principal components",
    "reconstruction_error_bottom": "the same within the other principal components",
    "reconstruction_error_band*": "the same by spatial frequency, from low to high",
    "reconstruction_top_count": "components that carry reconstruction_top_share of the variance",
    "reconstruction_top_share": "see reconstruction_top_count",
    "end_learning_rate": "the best learning rate with labels on validation images",
    "end_learning_rates_tried": "all learning rates with labels",
    "end_epochs": "passes over the training images with labels",
    **PROBE,
    **{
        name.removeprefix("probe_"): line
        for name, line in PROBE.items()
        if name.startswith(("probe_accuracy", "probe_r2"))
    },
    **{
        f"{probe.value}_{name.removeprefix('probe_')}": f"{probe.value} probe: {line}"
        for probe in Probe
        for name, line in PROBE.items()
    },
}
"""A line for every column of the tables of the training experiments."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """The images that everything linear is computed on: those of a split, pooled where they are large.

    Averages over squares inside of a patch keep a patch mask a patch mask.

    Attributes:
        split: of the whole images.
        factor: side of the squares, 1 for whole images.
        corruption: of the pooled images.
    """

    split: Split
    factor: int
    corruption: Corruption | None

    @classmethod
    def of(cls, split: Split, corruption: Corruption | None, most: int = MOST_PIXELS) -> Measured:
        """The smallest pooling that leaves at most so many values, or the largest there is."""
        height, width, channels = split.image_shape
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
    def components(self) -> PrincipalComponents:
        """Principal components of the training images."""
        return varying_components(self.train)

    @functools.cached_property
    def test(self) -> ma.Moments:
        """Of the test images and labels, in groups for standard errors."""
        labels, classes = self.split.test_labels, self.split.num_classes
        numbers = range(min(_GROUPS, len(labels)), 0, -1)
        groups = next(g for g in numbers if len(set(group_of(np.arange(len(labels)), g))) == g)
        return ma.Moments.from_arrays(self.pool(self.split.test_images), labels, num_classes=classes, groups=groups)

    def closed_form(self, corruption: Corruption | None) -> dict[str, Any]:
        """Cells of the closed form with a corruption."""
        ks = [k for k in KS if k <= self.train.num_pixels]
        return closed_form_row(self.train, corruption, self.test, ks)


def _pooled_corruption(corruption: Corruption | None, factor: int) -> Corruption | None:
    """What a corruption is on pooled images."""
    if factor == 1 or corruption is None:
        return corruption
    if isinstance(corruption, PatchMask):
        height, width = patch_hw(corruption.patch_size)
        return dataclasses.replace(corruption, patch_size=(height // factor, width // factor))
    assert isinstance(corruption, ma.GaussianNoise)
    return ma.GaussianNoise(corruption.sigma / factor)


def closed_form_rows(run: Run[Split], measured: Measured) -> Rows:
    """The closed form with the corruption of the networks, if there is one, and without any."""
    rows = [{"corruption": "none", **run.once("closed_form-none", lambda: measured.closed_form(None))}]
    if (corruption := measured.corruption) is None:
        return rows
    return [{"corruption": str(corruption), **run.once("closed_form", lambda: measured.closed_form(corruption))}, *rows]


def report_rows(
    run: Run[Split],
    problem: Problem,
    measured: Measured,
    trained: Ensemble,
    chosen: Sequence[int],
    probes: Rows,
    closed: dict[str, Any],
    seed: int,
) -> Rows:
    """The shared report of trained networks: one row for each of the chosen members.

    Args:
        run: keeps what is finished.
        problem: what was trained.
        measured: the images.
        trained: the networks.
        chosen: positions.
        probes: rows of the probes, those of the chosen members among them.
        closed: cells of the closed form with the same corruption.
        seed: of the corruptions of test images.
    """
    split, names = run.data, [member.name(problem.members) for member in problem.members]
    features = functools.cache(lambda: [trained.features(x) for x in (split.train_images, split.test_images)])

    def compute(at: int) -> dict[str, Any]:
        train, test = (x[at] for x in features())
        restored = measured.pool(restore(problem, trained, at, split.test_images, seed))
        return report_row(
            {"data": split.name, "member": names[at], **dataclasses.asdict(problem.members[at])},
            Outputs(train, test, restored),
            moments=measured.train,
            eval_moments=measured.test,
            corruption=measured.corruption,
            targets=split.train_labels,
            eval_images=measured.pool(split.test_images),
            eval_targets=split.test_labels,
            probes={},
            closed_form=closed,
            components=measured.components,
        )

    suffix = "" if trained.clean is None else "-clean"
    found = run.each(
        {f"report-{at}{suffix}": at for at in chosen},
        lambda key, at: run.once(key, lambda: compute(at)),
        unit="network",
    )
    rows = []
    for at, row in zip(chosen, found.values(), strict=True):
        scores = {
            f"{probe['probe']}_{key.removeprefix('probe_')}": value
            for probe in probes
            if (probe["features"], probe["member"]) == (NETWORK, at)
            for key, value in probe.items()
            if key not in ("probe", "member", "features", "features_note", PREDICTED)
        }
        about = {"reconstruction_of": problem.restores, "images": f"whole{measured.note}"}
        rows.append({**row, **scores, **about, **({"features_note": trained.note} if trained.note else {})})
    return rows


def restore(problem: Problem, trained: Ensemble, member: int, images: np.ndarray, seed: int) -> np.ndarray:
    """What a network makes of corrupted images, [n, h, w, c] in stored units."""
    model, program = trained.training.model(trained.state, member), jax.jit(problem.restore)
    keys: Callable[[int], jax.Array] = functools.partial(jax.random.fold_in, jax.random.key(seed))
    return np.concatenate(
        [np.asarray(program(model, part, keys(i)))[:count] for i, (part, count) in enumerate(batches(images))]
    )


def best_rates(members: Sequence[Member], probes: Rows) -> list[int]:
    """Positions with the learning rate whose ridge probe is best on validation images, for each guidance weight.

    Args:
        members: of the ensemble.
        probes: rows of the probes on all of them.
    """
    ridge = {row["member"]: row["accuracy_val"] for row in probes if row["probe"] == Probe.ridge.value}
    found = []
    for guidance in dict.fromkeys(member.guidance for member in members):
        by_rate: dict[float, list[int]] = {}
        for i, member in enumerate(members):
            if member.guidance == guidance:
                by_rate.setdefault(member.learning_rate, []).append(i)
        found += max(by_rate.values(), key=lambda positions: np.mean([ridge[i] for i in positions]))
    return found


def result_rows(members: Sequence[Member], rows: Rows, chosen: Sequence[int]) -> Rows:
    """The tidy table: one row for each network, kind of features and probe, and for each whole network with labels.

    Args:
        members: of the ensemble.
        rows: of probes and ends, with positions of members; what they predict is left out.
        chosen: positions of the members that are reported on.
    """
    names = [member.name(members) for member in members]
    several = len({members[i].guidance for i in chosen}) > 1
    table = []
    for row in rows:
        at, kind = row["member"], row["features"]
        who: dict[str, Any] = {"member": "", "seed": "", "learning_rate": "", "guidance": ""}
        if at >= 0:
            who = {"member": names[at], **dataclasses.asdict(members[at])}
        guided = several and kind in (NETWORK, NAMES[End.fine_tuning])
        about = {
            "features": kind,
            "compared_as": f"{kind}, guidance {members[at].guidance:g}" if guided else kind,
            "reported": kind != NETWORK or at in chosen,
            "probe": row["probe"],
        }
        table.append(
            {**who, **about, **{name: value for name, value in row.items() if name not in {*who, *about, PREDICTED}}}
        )
    return table


def percent(shares: pd.Series) -> str:
    """Mean of shares in percent, and their standard deviation where there are several.

    Example:
        >>> percent(pd.Series([0.5, 0.52])), percent(pd.Series([1.0]))
        ('51.0 +- 1.4', '100.0')
    """
    spread = f" +- {100 * shares.std(ddof=1):.1f}" if len(shares) > 1 else ""
    return f"{100 * shares.mean():.1f}{spread}"


def accuracy_table(reported: pd.DataFrame, chance: float) -> pd.DataFrame:
    """Test accuracies as text: what is compared down, probes across.

    Args:
        reported: rows of the tidy table.
        chance: accuracy of always naming the most frequent class.
    """
    cells = reported.groupby(["compared_as", "probe"], sort=False).accuracy_test.agg(percent).unstack("probe")
    cells = cells.loc[reported.compared_as.unique(), reported.probe.unique()]
    cells.loc["most frequent class"] = f"{100 * chance:.1f}"
    several = " [%], +-: standard deviation between networks" if reported.seed.nunique() > 2 else " [%]"
    return cells.rename(columns={"none": "whole network"}).rename_axis(f"test accuracy{several}").reset_index()


def comparison_rows(reported: pd.DataFrame, correct: np.ndarray) -> Rows:
    """The trained networks against every baseline, and against those without guidance, by every probe.

    The standard error of a difference is that of its mean over test images, on which both sides are measured, and of
    the spread between networks.

    Args:
        reported: rows of the tidy table; their index says where they stand in ``correct``.
        correct: [rows, n] whether a row is right on a test image.
    """
    rows = []
    for probe, table in reported[reported.probe != "none"].groupby("probe", sort=False):
        kinds = dict(iter(table.groupby("compared_as", sort=False)))
        networks = [name for name in kinds if str(name).startswith(NETWORK)]
        for i, network in enumerate(networks):
            # The first network of several guidance weights stands in for no guidance.
            for other in [name for name in kinds if name not in networks] + networks[: min(i, 1)]:
                own, its = kinds[network], kinds[other]
                a, b = (correct[part.index.to_numpy()].astype(np.float64) for part in (own, its))
                paired = own.seed.tolist() == its.seed.tolist()
                rows.append(
                    {
                        "probe": probe,
                        "compared_as": network,
                        "against": other,
                        "accuracy": 100 * a.mean(),
                        "difference": 100 * (a.mean() - b.mean()),
                        "difference_se": 100 * difference_se(a, b, paired=paired),
                    }
                )
    return rows


def difference_se(a: np.ndarray, b: np.ndarray, *, paired: bool) -> float:
    """Standard error of the difference of two mean accuracies on the same test images.

    Args:
        a: [E, n] 1 where network e of one side is right on an image, else 0.
        b: [E', n] of the other side.
        paired: whether network e of both sides has the same seed.

    Example:
        >>> a, b = np.array([[1.0, 1.0, 0.0, 1.0]]), np.array([[1.0, 0.0, 0.0, 1.0]])
        >>> difference_se(a, b, paired=False)
        0.25
    """
    images = a.mean(0) - b.mean(0)
    sides = [(a - b).mean(1)] if paired else [a.mean(1), b.mean(1)]
    between = sum(float(side.var(ddof=1)) / len(side) for side in sides if len(side) > 1)
    return math.sqrt(float(images.var(ddof=1)) / len(images) + between)


def sentences(subject: str, comparisons: Rows, report: Rows, closed: Rows) -> list[str]:
    """At most three: the networks, and those with the most guidance, against all baselines; and the closed form."""
    ridge = [row for row in comparisons if row["probe"] == Probe.ridge.value]
    said = []
    for network in dict.fromkeys([ridge[0]["compared_as"], ridge[-1]["compared_as"]]):
        mine = [row for row in ridge if row["compared_as"] == network]
        said.append(
            f"{worth(network, mine)} Ridge probe, {network}: {mine[0]['accuracy']:.1f} % of test images right; in "
            f"points, {'; '.join(map(compared, mine))}."
        )
    said[0] = f"{subject}. {said[0]}"
    latent, cells = report[0]["latent"], closed[0]
    ks = [int(key.removeprefix("closed_eval_r2_k")) for key in cells if key.startswith("closed_eval_r2_k")]
    k = max([k for k in ks if k <= latent], default=ks[0])
    r2, se = cells[f"closed_eval_r2_k{k}"], cells[f"closed_eval_r2_se_k{k}"]
    against = f" ({r2 - closed[1][f'closed_eval_r2_k{k}']:+.3f} against no corruption)" if len(closed) > 1 else ""
    own, error = (np.mean([row[name] for row in report]) for name in ("feature_eval_r2", "reconstruction_error"))
    said.append(
        f"Share of the label variance of test images: {own:.3f} by least squares on the {latent} features, "
        f"{r2:.3f} +- {se:.3f} by the closed form of the same corruption at k = {k}{against}; the reconstruction of "
        f"{report[0]['reconstruction_of']} leaves {error:.3f} of the variance."
    )
    return said


def worth(network: str, rows: Rows) -> str:
    """What training is worth beside the best features that need none.

    Args:
        network: what is compared, in words.
        rows: its comparisons by one probe, see :func:`comparison_rows`.
    """
    free = [row for row in rows if not str(row["against"]).startswith((NETWORK, SUPERVISED))]
    row = min(free, key=lambda row: row["difference"])
    change, best = row["difference"], row["against"]
    if change < WORTH:
        return (
            f"The {network} is not worth its training for the {row['probe']} probe: {best} serve it as well or better."
        )
    if change < 2 * row["difference_se"]:
        return f"The {network} may be worth its training: its gain over {best} is too small for these test images."
    return f"The {network} is worth its training: the {row['probe']} probe gains {change:.1f} points over {best}."


def compared(row: dict[str, Any]) -> str:
    """One comparison in words."""
    change, se = row["difference"], row["difference_se"]
    if abs(change) < 2 * se:
        return f"no detectable difference to {row['against']} ({change:+.1f} +- {se:.1f})"
    return f"{'above' if change > 0 else 'BELOW'} {row['against']} by {abs(change):.1f} +- {se:.1f}"
