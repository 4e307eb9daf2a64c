"""Accuracy on principal and random subspaces: tables, comparisons paired by seed, figures and plain sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import mae_align as ma
from experiments.harness.figures import PALETTE, legend_below, panels
from experiments.harness.paired import PairedDifference, paired_difference
from experiments.harness.folder import RunFolder
from experiments.subspace_classification.networks import NETWORK_WORDS, SCALE_WORDS, Network, Scale, Study
from experiments.subspace_classification.principal import Family, PrincipalAxes, Subspace
from mae_align.metrics import report_table
from mae_align.train.augment import CropFlip

Row = dict[str, float | int | str]
# Fig. 1 (top) of the paper, digitised: share of the variance asked for and accuracy, both in percent. The first top
# point is one direction alone, and the last bottom one all but one: their shares are those of the next direction.
PUBLISHED_TOP = ((48.3, 0.9), (55.7, 3.6), (63.1, 4.8), (70.5, 9.1), (77.8, 15.1), (85.2, 32.2), (92.6, 50.0))
PUBLISHED_BOTTOM = ((1.95, 25.0), (4.2, 31.9), (6.8, 41.3), (9.8, 48.6), (14.0, 52.8), (19.9, 55.1), (51.7, 58.5))
PUBLISHED_FULL = 58.7
PUBLISHED = (
    "Published, Tiny ImageNet, ResNet9: 55% on the bottom 20% of the variance, 45% on the top 90%, "
    f"{PUBLISHED_FULL}% on all of it."
)
_COLORS = {Family.top: PALETTE[1], Family.bottom: PALETTE[0], Family.random: "0.45"}
_MARKERS = {Family.top: "o", Family.bottom: "s", Family.random: "D"}
_MIRRORED = {True: "half of them are mirrored", False: "none is mirrored"}
# The shares of the published comparison, and how far ours may be from them to be called by their name.
_HEADLINE, _NEAR = (0.2, 0.9), 0.06


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """Networks of all seeds on one subspace.

    Attributes:
        study: network and scale. subspace, share: what was seen, and its share of the variance.
        results: by seed, of :func:`experiments.subspace_classification.networks.measure`.
    """

    study: Study
    subspace: Subspace
    share: float
    results: Sequence[dict[str, np.ndarray]]

    @property
    def correct(self) -> np.ndarray:
        """[E, n] whether each network is right on each test image; NaN of one that diverged."""
        return np.stack([row["correct"] for row in self.results])

    @property
    def accuracies(self) -> np.ndarray:
        """[E] test accuracy."""
        return self.correct.mean(axis=1)

    @property
    def diverged(self) -> int:
        """How many networks did."""
        return int(np.isnan(self.accuracies).sum())


@dataclasses.dataclass(frozen=True)
class Linear:
    """The linear probe on one subspace: test accuracy, and r2, the share of label variance that it explains."""

    subspace: Subspace
    share: float
    accuracy: float
    r2: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Accuracy of ``first`` minus that of ``second``."""

    kind: str
    study: str
    first: str
    second: str
    difference: PairedDifference


def words(subspace: Subspace, share: float, rank: int) -> str:
    """A subspace in words.

    Example:
        >>> words(Subspace(Family.bottom, 61), 0.2041, 64)
        'bottom 20.4% (61 dimensions)'
    """
    if subspace.dimension == rank:
        return f"all of the image ({rank} dimensions)"
    plural = "" if subspace.dimension == 1 else "s"
    return f"{subspace.family.value} {100 * share:.3g}% ({subspace.dimension} dimension{plural})"


def comparisons(axes: PrincipalAxes, points: Sequence[Point]) -> list[Comparison]:
    """Every pair of subspaces of one network that a claim is about, and every pair of scales on one subspace.

    Points with a network that diverged are left out.

    Args:
        axes: of the training images. points: of a run.
    """
    found, points = [], [p for p in points if not p.diverged]
    by_study = {study: [p for p in points if p.study == study] for study in dict.fromkeys(p.study for p in points)}
    for study, own in by_study.items():
        at = {p.subspace: p for p in own}

        def add(kind: str, first: Point, second: Point, label: str = study.label) -> None:
            one, two = (words(p.subspace, p.share, axes.rank) for p in (first, second))
            found.append(Comparison(kind, label, one, two, paired_difference(first.correct, second.correct)))

        bottoms, tops = ([p for p in own if p.subspace.family is f] for f in (Family.bottom, Family.top))
        ends = [
            [p for p in part if abs(p.share - wanted) < _NEAR and p.subspace.dimension < axes.rank]
            for part, wanted in zip((bottoms, tops), _HEADLINE, strict=True)
        ]
        if all(ends):
            nearest = [
                min(part, key=lambda p, w=wanted: abs(p.share - w))
                for part, wanted in zip(ends, _HEADLINE, strict=True)
            ]
            add("published pair", nearest[0], nearest[1])
        for one in bottoms:
            rest = Subspace(Family.top, axes.rank - one.subspace.dimension)
            if rest in at:
                add("complement", one, at[rest])
        for one in (*bottoms, *tops):
            if one.subspace.dimension == axes.rank:
                continue
            for other in own:
                same = other.subspace.dimension == one.subspace.dimension
                # Top against bottom once.
                ahead = other.subspace.family is Family.random or one.subspace.family is Family.bottom
                if same and other.subspace.family is not one.subspace.family and ahead:
                    add("same dimension", one, other)
            random = axes.nearest(Family.random, one.share)
            if random in at and abs(at[random].share - one.share) < _NEAR:
                add("same variance", one, at[random])
    for study, own in by_study.items():
        for p in own:
            for q in points:
                pair = q.study.network is study.network and q.subspace == p.subspace
                if pair and study.scale is Scale.per_image and q.study.scale is not Scale.per_image:
                    where = words(p.subspace, p.share, axes.rank)
                    label = f"{NETWORK_WORDS[study.network]}, {where}"
                    difference = paired_difference(p.correct, q.correct)
                    one, two = SCALE_WORDS[study.scale], SCALE_WORDS[q.study.scale]
                    found.append(Comparison("scale", label, one, two, difference))
    return found


def write_report(
    folder: RunFolder,
    data: ma.ImageDataset,
    axes: PrincipalAxes,
    points: Sequence[Point],
    linear: Sequence[Linear],
    seeds: Sequence[int],
    augmentation: CropFlip,
) -> list[Comparison]:
    """Tables, figures and summary.

    Args:
        folder: where to. data: what was classified. axes: of its training images. points, linear: results.
        seeds: of the results of each point. augmentation: of the training images.

    Returns:
        The comparisons. Files: points (csv, nc), subspaces.csv, comparisons.csv, accuracy, dimension and scales (png,
        pdf), summary.txt.
    """
    probes = {one.subspace: one for one in linear}
    rows, table = [], []
    for p in points:
        about: Row = {"dataset": data.name, "network": p.study.network.value, "scale": p.study.scale.value}
        about |= {"family": p.subspace.family.value, "dimension": p.subspace.dimension, "share": p.share}
        for seed, result, accuracy in zip(seeds, p.results, p.accuracies, strict=True):
            measured = {"accuracy": float(accuracy), "accuracy_train": float(result["fitted"])}
            rows.append(about | {"seed": seed} | measured | {"seconds": float(result["seconds"])})
        spread = float(p.accuracies.std(ddof=1)) if len(p.accuracies) > 1 else float("nan")
        fitted = float(np.mean([result["fitted"] for result in p.results]))
        probe = probes[p.subspace]
        line = {"accuracy": float(p.accuracies.mean()), "accuracy_sd": spread, "accuracy_train": fitted}
        line["diverged"] = p.diverged
        table.append(about | line | {"linear_accuracy": probe.accuracy, "linear_r2": probe.r2})
    folder.save_dataset("points", report_table(rows))
    folder.save_table("subspaces", table)
    compared = comparisons(axes, points)
    folder.save_table("comparisons", [_comparison_row(data.name, one) for one in compared])
    chance = float(np.bincount(data.test_labels).max() / len(data.test_labels))
    folder.save_figure("accuracy", accuracy_figure(data.name, axes.rank, points, linear, chance))
    folder.save_figure("dimension", dimension_figure(data.name, axes.rank, points, chance))
    if len({p.study.scale for p in points}) > 1:
        folder.save_figure("scales", scale_figure(data.name, axes.rank, points))
    folder.summary("\n".join([_table_text(table), "", *sentences(data, axes, points, compared, augmentation)]))
    return compared


def _comparison_row(dataset: str, one: Comparison) -> Row:
    row: Row = {"dataset": dataset, "kind": one.kind, "study": one.study, "first": one.first, "second": one.second}
    return row | one.difference._asdict() | {"detected": int(one.difference.detected)}


def _table_text(table: Sequence[Row]) -> str:
    head = ["network", "scale", "family", "dim", "share", "test acc.", "sd", "train acc.", "linear acc.", "linear r2"]
    lines = [head]
    for row in table:
        numbers = [row[name] for name in ("share", "accuracy", "accuracy_sd", "accuracy_train", "linear_accuracy")]
        cells = [f"{100 * float(value):.1f}" for value in numbers]
        if row["diverged"]:
            cells[1:4] = ["diverged", "", ""]
        names = [str(row[name]) for name in ("network", "scale", "family", "dimension")]
        lines.append([*names, *cells, f"{float(row['linear_r2']):.3f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def sentences(
    data: ma.ImageDataset,
    axes: PrincipalAxes,
    points: Sequence[Point],
    compared: Sequence[Comparison],
    augmentation: CropFlip,
) -> Iterator[str]:
    """What came out, in plain words, whatever it is."""
    first = float(axes.shares(Family.top)[0])
    yield (
        f"{data.name}: {len(data.train_labels)} training and {len(data.test_labels)} test images, {axes.rank} "
        f"directions; the first alone holds {100 * first:.1f}% of the variance. Accuracies in percent, differences in "
        f"points with 95% t intervals over {len(points[0].results)} seeds, then the standard error of the test images."
    )
    yield (
        f"After the projection training images are moved by up to {augmentation.pad} pixels each way, and "
        f"{_MIRRORED[augmentation.flip]}."
    )
    yield PUBLISHED
    if any(p.subspace.family is Family.random for p in points):
        yield (
            "Random subspaces are one for each dimension, drawn by --seed: intervals of comparisons with them are over "
            "networks on this one, not over draws of the subspace."
        )
    for p in (p for p in points if p.diverged):
        yield (
            f"diverged, {p.study.label}: {p.diverged} of {len(p.results)} networks on "
            f"{words(p.subspace, p.share, axes.rank)}, which is left out of the comparisons."
        )
    for one in compared:
        d = one.difference
        if not d.detected:
            verdict = "no detectable difference"
        else:
            verdict = f"{one.first if d.mean > 0 else one.second} is better"
        yield (
            f"{one.kind}, {one.study}: {one.first} minus {one.second}: {100 * d.mean:+.1f} "
            f"({100 * d.low:+.1f} to {100 * d.high:+.1f}; images {100 * d.image_se:.1f}): {verdict}."
        )


def _of(points: Sequence[Point], study: Study, family: Family) -> list[Point]:
    return sorted((p for p in points if p.study == study and p.subspace.family is family), key=lambda p: p.share)


def _main_studies(points: Sequence[Point]) -> list[Study]:
    """Studies on every subspace."""
    count = len({p.subspace for p in points})
    studies = dict.fromkeys(p.study for p in points)
    return [s for s in studies if sum(p.study == s for p in points) == count]


def accuracy_figure(
    dataset: str, rank: int, points: Sequence[Point], linear: Sequence[Linear], chance: float
) -> Figure:
    """Accuracy against the share of the variance, a panel per network, one for the linear probe, one as published.

    Top and bottom subspaces are joined by lines, bars are the range over seeds.
    """
    studies = _main_studies(points)
    figure, axes = panels(1, len(studies) + 2, width=2.3, height=2.5)
    for axis, study in zip(axes[0], studies, strict=False):
        for family in Family:
            own = [p for p in _of(points, study, family) if p.subspace.dimension < rank]
            if own:
                low, mean, high = (f([p.accuracies for p in own], axis=1) for f in (np.min, np.mean, np.max))
                _series(axis, family, [p.share for p in own], mean)
                x = [100 * p.share for p in own]
                axis.vlines(x, 100 * low, 100 * high, color=_COLORS[family], lw=2.0, alpha=0.5)
        full = [p.accuracies.mean() for p in _of(points, study, Family.top) if p.subspace.dimension == rank]
        _frame(axis, f"{dataset}: {NETWORK_WORDS[study.network]}", 100 * full[0] if full else None, 100 * chance)
    probe = axes[0, len(studies)]
    for family in Family:
        own = sorted((one for one in linear if one.subspace.family is family), key=lambda one: one.share)
        own = [one for one in own if one.subspace.dimension < rank]
        _series(probe, family, [one.share for one in own], [one.accuracy for one in own])
        style = ":" if family is not Family.random else ""
        probe.plot([100 * o.share for o in own], [100 * o.r2 for o in own], color=_COLORS[family], ls=style, marker=".")
    whole = [one.accuracy for one in linear if one.subspace.dimension == rank]
    _frame(probe, f"{dataset}: linear probe (dots: 100 r2)", 100 * whole[0] if whole else None, 100 * chance)
    paper = axes[0, -1]
    for family, curve in ((Family.top, PUBLISHED_TOP), (Family.bottom, PUBLISHED_BOTTOM)):
        x, y = np.array(curve).T / 100
        _series(paper, family, x, y)
    _frame(paper, "published: ResNet9, Tiny ImageNet", PUBLISHED_FULL, 0.5)
    axes[0, 0].set_ylabel("test accuracy [%]")
    legend_below(figure, axes[0, 0], 5)
    return figure


def _series(axis: Axes, family: Family, shares: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray):
    line = "-" if family is not Family.random else ""
    style = {"ls": line, "marker": _MARKERS[family], "markersize": 4, "color": _COLORS[family]}
    axis.plot(100 * np.asarray(shares), 100 * np.asarray(values), label=family.value, **style)


def _frame(axis: Axes, title: str, full: float | None, chance: float) -> None:
    if full is not None:
        axis.axhline(full, color="black", lw=0.8, ls="--", label="all of the image")
    axis.axhline(chance, color="0.6", lw=0.8, ls=":", label="most frequent class")
    axis.set_xlabel("share of the pixel variance kept [%]")
    axis.set_xlim(-3, 103)
    axis.set_title(title, fontsize=7)


def dimension_figure(dataset: str, rank: int, points: Sequence[Point], chance: float) -> Figure:
    """Accuracy against the number of dimensions, a panel per network; where families meet, dimension is equal."""
    studies = _main_studies(points)
    figure, axes = panels(1, len(studies), width=2.9, height=2.6, sharey=True)
    for axis, study in zip(axes[0], studies, strict=True):
        for family in Family:
            own = sorted(_of(points, study, family), key=lambda p: p.subspace.dimension)
            if own:
                style = {"marker": _MARKERS[family], "ls": "-", "lw": 0.7, "markersize": 4, "color": _COLORS[family]}
                mean = [100 * p.accuracies.mean() for p in own]
                axis.plot([p.subspace.dimension for p in own], mean, label=family.value, **style)
        axis.set_xscale("log")
        axis.axhline(100 * chance, color="0.6", lw=0.8, ls=":", label="most frequent class")
        axis.set_xlabel(f"dimensions kept of {rank}")
        axis.set_title(f"{dataset}: {NETWORK_WORDS[study.network]}", fontsize=7)
    axes[0, 0].set_ylabel("test accuracy [%]")
    legend_below(figure, axes[0, 0], 5)
    return figure


def scale_figure(dataset: str, rank: int, points: Sequence[Point]) -> Figure:
    """Accuracy of every seed by network and scale of the images, on the subspaces where scales are compared."""
    scales = list(dict.fromkeys(p.study.scale for p in points))
    several = {p.subspace for p in points if p.study.scale is not Scale.per_image}
    networks: list[Network] = [
        n
        for n in dict.fromkeys(p.study.network for p in points)
        if any(p.study.network is n and p.study.scale is not Scale.per_image for p in points)
    ]
    figure, axes = panels(1, len(networks), width=2.9, height=2.4, sharey=True)
    order = sorted(several, key=lambda s: (s.family.value, s.dimension))
    for axis, network in zip(axes[0], networks, strict=True):
        for i, scale in enumerate(scales):
            for j, subspace in enumerate(order):
                own = [p for p in points if p.study == Study(network, scale) and p.subspace == subspace]
                if own:
                    x = np.full(len(own[0].accuracies), j + 0.18 * (i - (len(scales) - 1) / 2))
                    axis.plot(x, 100 * own[0].accuracies, "o", color=PALETTE[i], markersize=4, alpha=0.8)
        share = {p.subspace: p.share for p in points}
        names = [f"{s.family.value}\n{100 * share[s]:.3g}%" if s.dimension < rank else "all" for s in order]
        axis.set_xticks(range(len(order)), names)
        axis.set_xlim(-0.6, len(order) - 0.4)
        axis.set_title(f"{dataset}: {NETWORK_WORDS[network]}", fontsize=7)
    for i, scale in enumerate(scales):
        axes[0, 0].plot([], [], "o", color=PALETTE[i], markersize=4, label=SCALE_WORDS[scale])
    axes[0, 0].set_ylabel("test accuracy [%]")
    legend_below(figure, axes[0, 0], 5)
    return figure
