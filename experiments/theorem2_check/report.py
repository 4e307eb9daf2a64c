"""Tables, figures and plain sentences of the check of Theorem 2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.figures import COLUMN_WIDTH, PALETTE, ordered_colors, panels
from experiments.harness.folder import RunFolder
from experiments.theorem2_check.networks import Decoder, References, Row
from mae_align.metrics import report_table

_LINEAR, _NONLINEAR = Decoder.linear.value, Decoder.nonlinear.value
# From this share of its variance on a component counts as learned, or as mostly learned.
_LEARNED, _MOSTLY = 0.99, 0.9


def write_report(rows: Sequence[Row], folder: RunFolder, references: References, name: str, early: float) -> None:
    """Tables, figures and summary into the run folder.

    Args:
        rows: of :func:`experiments.theorem2_check.networks.measure`. references: PCA. name: of the data set. early:
            share of
            the steps.
    """
    flat = []
    for row in rows:
        cells = {f"r2_{i + 1}": value for i, value in enumerate(row["r2"])}
        flat.append({key: value for key, value in row.items() if key != "r2"} | cells)
    folder.save_dataset("networks", report_table(flat))
    ends = end_rows(rows)
    folder.save_table("end", ends)
    course = course_rows(rows, early)
    folder.save_table("early", course)
    figures = [
        folder.save_figure("components", component_figure(rows, early)),
        folder.save_figure("convergence", convergence_figure(rows)),
    ]
    shares = references.shares
    k = references.latent
    head = (
        f"Theorem 2 on {name}: {len(references.images)} training images, code of {k}. PCA leaves "
        f"{1 - shares[:k].sum():.4f} of the variance; component {k} has {shares[k - 1] / shares[k]:.3f} times the "
        f"variance of component {k + 1}."
    )
    text = "\n".join(summarise(ends, course, k))
    folder.summary(f"{head}\n\n{table_text(ends, k)}\n\nFigures: {figures[0]}  {figures[1]}\n\n{text}")


def _groups(rows: Sequence[Row], *names: str) -> Mapping[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def leading(r2: np.ndarray, threshold: float) -> int:
    """How many components from the first one on reach a share.

    Example:
        >>> leading(np.array([1.0, 0.95, 0.2, 0.99]), 0.9)
        2
    """
    below = np.flatnonzero(~(r2 >= threshold))
    return int(below[0]) if len(below) else len(r2)


def end_rows(rows: Sequence[Row]) -> list[Row]:
    """One row for each width, decoder and lambda, at the last step: means over seeds and the range of the loss.

    Args:
        rows: of all steps.

    Returns:
        Loss of the best linear decoder of the codes over that of the best free codes (excess, percent) and over
        Theorem 1's (over_linear, percent); error of the network's own decoder over PCA's (network_excess, percent,
        reconstruction alone); median angles; number of learned components; least R^2.
    """
    last = max(row["step"] for row in rows)
    found = []
    for (decoder, lam, width), group in _groups(rows, "decoder", "lam", "width").items():
        ends = [row for row in group if row["step"] == last]
        excess = np.array([100 * (row["loss"] / row["free_loss"] - 1) for row in ends])
        own = [100 * (row["network_error"] / row["free_loss"] - 1) for row in ends]
        r2 = np.mean([row["r2"] for row in ends], axis=0)
        found.append(
            {
                "decoder": decoder,
                "lam": lam,
                "width": width,
                "seeds": len(ends),
                "excess": float(excess.mean()),
                "excess_low": float(excess.min()),
                "excess_high": float(excess.max()),
                "over_linear": float(np.mean([100 * (row["loss"] / row["linear_loss"] - 1) for row in ends])),
                "linear_over_free": float(100 * (ends[0]["linear_loss"] / ends[0]["free_loss"] - 1)),
                "network_excess": float(np.mean(own)) if math.isinf(lam) else math.nan,
                **{name: float(np.mean([row[name] for row in ends])) for name in _ANGLES},
                "learned": leading(r2, _LEARNED),
                "mostly": leading(r2, _MOSTLY),
                "least_r2": float(r2.min()),
                "rank": min(row["rank"] for row in ends),
            }
        )
    return sorted(found, key=lambda row: (row["decoder"], -row["lam"], row["width"]))


_ANGLES = ("angle_median", "angle_largest", "free_angle_median", "linear_angle_median")


def course_rows(rows: Sequence[Row], early: float) -> list[Row]:
    """What has been learned at the start, early, nearest to PCA and at the end, for reconstruction alone: a row each.

    Args:
        rows: of all steps. early: share of the steps; the last measurement within it counts. Nearest is the measurement
            of least median angle.

    Returns:
        For each width, decoder and moment: step, number of leading components mostly learned, mean R^2, median angle,
        all means over seeds; difference, the largest difference in mean R^2 of a component from the network of the
        same width with the other decoder.
    """
    alone = [row for row in rows if math.isinf(row["lam"])]
    steps = sorted({row["step"] for row in alone})
    early_step = max(s for s in steps if s <= early * steps[-1])
    r2 = {key: np.mean([row["r2"] for row in group], axis=0) for key, group in _groups(alone, *_KEY).items()}
    angle = {key: np.mean([row["angle_median"] for row in group]) for key, group in _groups(alone, *_KEY).items()}
    found = []
    for width, decoder in dict.fromkeys((w, d) for w, d, _ in r2):
        nearest = min(steps, key=lambda step: angle[width, decoder, step])
        moments = {"start": 0, "early": early_step, "nearest": nearest, "end": steps[-1]}
        for moment, step in moments.items():
            key = (width, decoder, step)
            other = (width, _LINEAR if decoder == _NONLINEAR else _NONLINEAR, step)
            found.append(
                {
                    "width": width,
                    "decoder": decoder,
                    "moment": moment,
                    "step": step,
                    "mostly": leading(r2[key], _MOSTLY),
                    "mean_r2": float(r2[key].mean()),
                    "angle_median": float(angle[key]),
                    "difference": float(np.abs(r2[key] - r2[other]).max()),
                }
            )
    return found


_KEY = ("width", "decoder", "step")


def table_text(ends: Sequence[Row], k: int) -> str:
    """The ends as plain text."""
    lines = [
        "At the end, means over seeds; losses are those of the best linear decoder of the codes, training images",
        f"{'decoder':>9} {'lambda':>7} {'width':>6} {'loss over best free':>26} {'over Theorem 1':>15} "
        f"{'median angle to PCA':>20} {f'R2 >= {_LEARNED:g}':>11} {f'R2 >= {_MOSTLY:g}':>10} {'least R2':>9}",
    ]
    for row in ends:
        loss = f"{row['excess']:+.2f}% ({row['excess_low']:+.2f}..{row['excess_high']:+.2f})"
        lines.append(
            f"{row['decoder']:>9} {row['lam']:>7g} {row['width']:>6} {loss:>26} {row['over_linear']:>+14.2f}% "
            f"{row['angle_median']:>16.1f} deg {row['learned']:>7}/{k:<3} {row['mostly']:>6}/{k:<3} "
            f"{row['least_r2']:>9.3f}"
        )
    return "\n".join(lines)


def summarise(ends: Sequence[Row], course: Sequence[Row], k: int) -> Iterator[str]:
    """Plain sentences: linear decoder, finite lambda, nonlinear decoder early and late."""
    yield "Linear decoder, reconstruction alone (lambda = infinity, where free codes, linear encoders and PCA agree):"
    for row in ends:
        if row["decoder"] == _LINEAR and math.isinf(row["lam"]):
            yield (
                f"  width {row['width']}: the loss ends {row['excess']:+.2f}% from PCA's, which is its lower bound; "
                f"median angle {row['angle_median']:.1f} degrees; the first {row['learned']} of {k} components are "
                f"explained to {_LEARNED:g}, the first {row['mostly']} to {_MOSTLY:g}"
            )
    finite = [row for row in ends if not math.isinf(row["lam"])]
    if finite:
        yield "Linear decoder, finite lambda (the best free codes are PCA of images and labels, not Theorem 1's codes):"
    for row in finite:
        side = "below" if row["over_linear"] < 0 else "above"
        yield (
            f"  lambda {row['lam']:g}, width {row['width']}: the loss ends {abs(row['over_linear']):.2f}% {side} the "
            f"minimum of Theorem 1 and {row['excess']:.2f}% above that of free codes ({row['linear_over_free']:.2f}% "
            f"apart); median angle {row['free_angle_median']:.1f} degrees to the free codes, "
            f"{row['linear_angle_median']:.1f} to Theorem 1's"
        )
    yield f"Leading components explained to {_MOSTLY:g}, reconstruction alone:"
    for width, decoder in dict.fromkeys((row["width"], row["decoder"]) for row in course):
        at = {r["moment"]: r for r in course if (r["width"], r["decoder"]) == (width, decoder)}
        told = "; ".join(
            f"{row['moment']} (step {row['step']}) {row['mostly']} of {k}, median angle {row['angle_median']:.0f} deg"
            for row in at.values()
        )
        yield f"  width {width}, {decoder} decoder: {told}"
        if decoder == _NONLINEAR:
            yield (
                f"    up to {at['early']['difference']:.2f} in R2 from the linear decoder's early, "
                f"{at['end']['difference']:.2f} at the end"
            )


def _course(rows: Sequence[Row], decoder: str, lam: float, width: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """[s] steps and [s, ...] means over seeds."""
    of = [row for row in rows if (row["decoder"], row["lam"], row["width"]) == (decoder, lam, width)]
    groups = _groups(of, "step")
    steps = sorted(step for (step,) in groups)
    return np.array(steps), np.array([np.mean([row[name] for row in groups[(step,)]], axis=0) for step in steps])


def _over_steps(axis: Axes, last: int) -> None:
    axis.set_xscale("symlog", linthresh=1.0, linscale=0.5)
    ticks = [0, *(10**i for i in range(int(math.log10(last)) + 1))]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(-0.1, 1.1 * last)
    axis.set_xlabel("training step")


def component_figure(rows: Sequence[Row], early: float) -> Figure:
    """R^2 of every principal component over training, widest network: linear decoder beside a nonlinear one."""
    width = max(row["width"] for row in rows)
    figure, axes = panels(1, 2, width=0.95 * COLUMN_WIDTH, height=2.5, sharey=True)
    for axis, decoder in zip(axes[0], (_LINEAR, _NONLINEAR), strict=True):
        steps, r2 = _course(rows, decoder, math.inf, width, "r2")
        k = r2.shape[1]
        named = {0, 1, k // 4, k // 2, k - 1}
        for i, color in enumerate(ordered_colors(k)):
            axis.plot(steps, r2[:, i], color=color, lw=1.0, label=f"component {i + 1}" if i in named else None)
        axis.axvline(early * steps[-1], color="0.5", lw=0.8, ls=":", label="early")
        _over_steps(axis, int(steps[-1]))
        axis.set_title(f"{decoder} decoder, width {width}", fontsize=8)
    axes[0, 0].set_ylabel("R2 of a principal component\nfrom the code")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, frameon=False)
    return figure


def convergence_figure(rows: Sequence[Row]) -> Figure:
    """Excess over PCA's loss and median angle over training, by width; losses at finite lambda between their minima."""
    finite = sorted({row["lam"] for row in rows if not math.isinf(row["lam"])})
    widths = sorted({row["width"] for row in rows})
    last = max(row["step"] for row in rows)
    columns = 2 + len(finite)
    figure, axes = panels(1, columns, width=0.85 * COLUMN_WIDTH, height=2.6)
    for width, color in zip(widths, ordered_colors(len(widths)), strict=True):
        for decoder, style in ((_LINEAR, "-"), (_NONLINEAR, "--")):
            steps, loss = _course(rows, decoder, math.inf, width, "loss")
            _, best = _course(rows, decoder, math.inf, width, "free_loss")
            label = f"width {width}, {decoder} decoder"
            axes[0, 0].plot(steps, 100 * (loss / best - 1), style, color=color, label=label)
            axes[0, 1].plot(*_course(rows, decoder, math.inf, width, "angle_median"), style, color=color)
        for axis, lam in zip(axes[0, 2:], finite, strict=True):
            axis.plot(*_course(rows, _LINEAR, lam, width, "loss"), color=color)
    for axis, lam in zip(axes[0, 2:], finite, strict=True):
        one = next(row for row in rows if row["lam"] == lam)
        axis.axhline(one["linear_loss"], color=PALETTE[1], lw=1.0, ls="-.", label="minimum, Theorem 1")
        axis.axhline(one["free_loss"], color="black", lw=1.0, ls=":", label="minimum, free codes")
        axis.set_ylabel(f"loss at lambda = {lam:g}")
        axis.set_title("linear decoder and head", fontsize=8)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("loss of the best linear decoder\nover PCA's [%]")
    axes[0, 1].set_ylabel("median angle to PCA [degrees]")
    for axis in axes[0]:
        _over_steps(axis, last)
    found = [axis.get_legend_handles_labels() for axis in (axes[0, 0], *axes[0, 2:3])]
    handles, labels = ([item for part in found for item in part[i]] for i in (0, 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure
