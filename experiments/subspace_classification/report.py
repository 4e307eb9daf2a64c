"""Accuracy on principal and random subspaces: tables, comparisons paired by seed, figures and the verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.data import Split
from experiments.harness.figures import PALETTE, legend_below, panels
from experiments.harness.run import Run
from experiments.harness.statistics import AccuracyDifference, accuracy_difference
from experiments.subspace_classification.images import Scale
from experiments.subspace_classification.networks import NETWORK_WORDS, SCALE_WORDS, Study
from experiments.subspace_classification.principal import Family, PrincipalAxes, Subspace
from mae_align.metrics import report_table

Row = dict[str, Any]
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
# The shares of the published comparison, and how far ours may be from them to be called by their name.
_HEADLINE, _NEAR = (0.2, 0.9), 0.06


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """Networks of all seeds on one subspace.

    Attributes:
        study: network and scale.
        subspace: what was seen.
        share: of the variance that it holds.
        correct: [E, n] whether each network is right on each test image.
        fitted: [E] accuracy on training images.
    """

    study: Study
    subspace: Subspace
    share: float
    correct: np.ndarray
    fitted: np.ndarray

    @property
    def accuracies(self) -> np.ndarray:
        """[E] test accuracy."""
        return self.correct.mean(axis=1)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Accuracy of ``first`` minus that of ``second``.

    Attributes:
        kind: why they are compared.
        study: network and scale, or network and subspace where scales are compared.
        first: in words.
        second: in words.
        difference: on test images.
    """

    kind: str
    study: str
    first: str
    second: str
    difference: AccuracyDifference

    @property
    def better(self) -> str:
        """Which of the two is; empty where no difference is detected."""
        if not self.difference.detected:
            return ""
        return self.first if self.difference.mean > 0 else self.second


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

    Args:
        axes: of the training images.
        points: of a run; what diverged is not among them.
    """
    found: list[Comparison] = []
    by_study = {study: [p for p in points if p.study == study] for study in dict.fromkeys(p.study for p in points)}
    for study, own in by_study.items():
        at = {p.subspace: p for p in own}

        def add(kind: str, first: Point, second: Point, label: str = study.label) -> None:
            one, two = (words(p.subspace, p.share, axes.rank) for p in (first, second))
            found.append(Comparison(kind, label, one, two, accuracy_difference(first.correct, second.correct)))

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
                    difference = accuracy_difference(p.correct, q.correct)
                    one, two = SCALE_WORDS[study.scale], SCALE_WORDS[q.study.scale]
                    found.append(Comparison("scale", label, one, two, difference))
    return found


def write_report(
    run: Run[Split],
    axes: PrincipalAxes,
    points: Sequence[Point],
    linear: Mapping[Subspace, Mapping[str, Any]],
    seeds: Sequence[int],
    studies: Sequence[Study],
) -> None:
    """Tables, figures and verdict.

    Args:
        run: where to.
        axes: of the training images.
        points: results.
        linear: of every subspace, linear_accuracy and linear_r2.
        seeds: of the results of each point.
        studies: those of every subspace, the first is the one that the experiment is about.
    """
    name, rank = run.data.name, axes.rank
    rows, table = [], []
    for p in points:
        about: Row = {"dataset": name, "network": p.study.network.value, "scale": p.study.scale.value}
        about |= {"family": p.subspace.family.value, "dimension": p.subspace.dimension, "share": p.share}
        for seed, accuracy, fitted in zip(seeds, p.accuracies, p.fitted, strict=True):
            rows.append(about | {"seed": seed, "accuracy": float(accuracy), "accuracy_train": float(fitted)})
        spread = float(p.accuracies.std(ddof=1)) if len(seeds) > 1 else math.nan
        means = {
            "accuracy": float(p.accuracies.mean()),
            "accuracy_sd": spread,
            "accuracy_train": float(p.fitted.mean()),
        }
        table.append(about | means | dict(linear[p.subspace]))
    run.dataset("points", report_table(rows))
    run.table("subspaces", table, show=shown(points, linear, studies))
    compared = comparisons(axes, points)
    columns = ["dataset", "kind", "study", "first", "second", *AccuracyDifference._fields, "better"]
    found = [(name, c.kind, c.study, c.first, c.second, *c.difference, c.better) for c in compared]
    run.table("comparisons", pd.DataFrame(found, columns=columns))
    chance = run.data.chance
    run.figure("accuracy", accuracy_figure(name, rank, points, studies, linear, chance))
    run.figure("dimension", dimension_figure(name, rank, points, studies, chance))
    if len({p.study.scale for p in points}) > 1:
        run.figure("scales", scale_figure(name, rank, points))
    run.verdict(*sentences(compared, studies))


def shown(
    points: Sequence[Point], linear: Mapping[Subspace, Mapping[str, Any]], studies: Sequence[Study]
) -> pd.DataFrame:
    """What the summary shows: a line for each subspace, accuracies in percent.

    Args:
        points: results.
        linear: of every subspace.
        studies: whose accuracies.
    """
    share = {p.subspace: p.share for p in points}
    accuracy = {(p.study, p.subspace): 100 * p.accuracies.mean() for p in points}
    return pd.DataFrame(
        {
            "family": subspace.family.value,
            "dimension": subspace.dimension,
            "variance [%]": f"{100 * share[subspace]:.1f}",
            **{f"{s.network.value} [%]": round(accuracy.get((s, subspace), math.nan), 1) for s in studies},
            "linear [%]": round(100 * probe["linear_accuracy"], 1),
            "linear r2": round(probe["linear_r2"], 3),
        }
        for subspace, probe in linear.items()
        if subspace in share
    )


def sentences(compared: Sequence[Comparison], studies: Sequence[Study]) -> Iterator[str]:
    """The verdict: the published pair, or else the first pair of complements, of two networks, and what is published.

    Args:
        compared: of :func:`comparisons`.
        studies: the one that the experiment is about first.
    """
    for study in studies[:2]:
        pairs = [c for c in compared if c.study == study.label and c.kind in ("published pair", "complement")]
        for c in sorted(pairs, key=lambda c: c.kind == "complement")[:1]:
            d = c.difference
            yield (
                f"{study.label}: {c.first} minus {c.second} {100 * d.mean:+.1f} points "
                f"({100 * d.low:+.1f} to {100 * d.high:+.1f} over seeds; standard error of the images "
                f"{100 * d.image_se:.1f}): {f'{c.better} is better' if c.better else 'no detectable difference'}."
            )
    yield PUBLISHED


def _of(points: Sequence[Point], study: Study, family: Family) -> list[Point]:
    return sorted((p for p in points if p.study == study and p.subspace.family is family), key=lambda p: p.share)


def accuracy_figure(
    dataset: str,
    rank: int,
    points: Sequence[Point],
    studies: Sequence[Study],
    linear: Mapping[Subspace, Mapping[str, Any]],
    chance: float,
) -> Figure:
    """Accuracy against the share of the variance, a panel per network, one for the linear probe, one as published.

    Top and bottom subspaces are joined by lines, bars are the range over seeds.
    """
    figure, axes = panels(1, len(studies) + 2, width=2.3, height=2.5)
    probe = axes[0, len(studies)]
    for family in Family:
        for axis, study in zip(axes[0], studies, strict=False):
            own = [p for p in _of(points, study, family) if p.subspace.dimension < rank]
            if own:
                low, mean, high = (f([p.accuracies for p in own], axis=1) for f in (np.min, np.mean, np.max))
                _series(axis, family, [p.share for p in own], mean)
                x = [100 * p.share for p in own]
                axis.vlines(x, 100 * low, 100 * high, color=_COLORS[family], lw=2.0, alpha=0.5)
        shares = {p.subspace: p.share for p in points if p.subspace.family is family and p.subspace.dimension < rank}
        own = sorted(shares, key=lambda subspace: shares[subspace])
        x = [shares[subspace] for subspace in own]
        _series(probe, family, x, [linear[subspace]["linear_accuracy"] for subspace in own])
        style = ":" if family is not Family.random else ""
        r2 = [100 * linear[subspace]["linear_r2"] for subspace in own]
        probe.plot([100 * share for share in x], r2, color=_COLORS[family], ls=style, marker=".")
    whole = Subspace(Family.top, rank)
    for axis, study in zip(axes[0], studies, strict=False):
        full = [100 * p.accuracies.mean() for p in points if (p.study, p.subspace) == (study, whole)]
        _frame(axis, f"{dataset}: {NETWORK_WORDS[study.network]}", full[0] if full else None, 100 * chance)
    full = 100 * linear[whole]["linear_accuracy"] if whole in linear else None
    _frame(probe, f"{dataset}: linear probe (dots: 100 r2)", full, 100 * chance)
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


def dimension_figure(
    dataset: str, rank: int, points: Sequence[Point], studies: Sequence[Study], chance: float
) -> Figure:
    """Accuracy against the number of dimensions, a panel per network; where families meet, dimension is equal."""
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
    networks = list(dict.fromkeys(p.study.network for p in points if p.study.scale is not Scale.per_image))
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
