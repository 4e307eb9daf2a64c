"""Tables, files and plain sentences of the alignment curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

import mae_align as ma
from experiments.alignment_curves import figures
from experiments.alignment_curves.studies import Curve
from experiments.harness.folder import RunFolder

Row = dict[str, Any]
_CURVE_COLUMNS = {
    "k": "{k}",
    "d": "{d}",
    "n": "{n}",
    "r2": "{r2:.3f}",
    "r2 held-out": "{eval_r2:.3f} +- {eval_r2_se:.3f}",
    "100 sqrt(alignment) [%]": "{alignment_percent:.2f}",
    "held-out / best": "{eval_share:.3f} +- {eval_share_se:.3f}",
    "k for 90%, held-out": "{eval_k90}",
}
_CLASS_COLUMNS = {
    "classes": "{classes}",
    "k": "{k}",
    "n": "{n}",
    "r2": "{r2:.3f}",
    "r2 held-out": "{eval_r2:.3f}",
    "spread": "{eval_r2_spread:.3f}",
    "limit of k": "{bound:.3f}",
    "100 sqrt(alignment) [%]": "{alignment_percent:.2f}",
}


def curve_dataset(curves: Mapping[Any, Curve], dim: str) -> xr.Dataset:
    """Curves of several conditions as one labelled result, NaN beyond the rank of a condition.

    Args:
        curves: by coordinate value. dim: name of the coordinate.

    Returns:
        Dataset over ``dim`` and k.
    """
    longest = max(len(curve.r2) for curve in curves.values())

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(np.asarray(values, np.float64), (0, longest - len(values)), constant_values=np.nan)

    k = np.arange(1, longest + 1)
    data = {
        name: (
            (dim, "k"),
            np.stack([padded(getattr(curve, attribute)) for curve in curves.values()]),
            {"long_name": text},
        )
        for name, attribute, text in (
            ("r2", "r2", "share of the label variance a linear probe explains, in-sample"),
            (
                "alignment",
                "alignment",
                "the paper's alignment ratio (uncentred Y^T Y, relative to full rank), in-sample",
            ),
            ("alignment_percent", "percent", "100 sqrt(alignment), in-sample [%]"),
            ("eval_r2", "eval_r2", "r2 on held-out images"),
            ("eval_r2_se", "eval_r2_se", "standard error of eval_r2"),
        )
    }
    sizes = {
        name: (dim, [int(getattr(curve, name)) for curve in curves.values()])
        for name in ("num_pixels", "num_train", "num_test")
    }
    labels = list(curves)
    result = xr.Dataset(data, {dim: labels, "k": k, **sizes})
    return result.assign_coords(share_of_d=result.k / result.num_pixels)


def curve_rows(curves: Mapping[Any, Curve], name: str, ks: Sequence[int], *, paired: bool) -> list[Row]:
    """A table of curves at chosen k; k over a condition's rank is left out.

    Args:
        curves: by condition, the reference first. name: what the condition is. ks: numbers of features.
        paired: whether held-out images are the same in all conditions, for differences to the reference.

    Returns:
        One row per condition and k, held-out differences with paired standard errors.
    """
    reference = next(iter(curves.values()))
    rows = []
    for value, curve in curves.items():
        share, share_influence = curve.eval_share()
        for k in (k for k in ks if k <= len(curve.r2)):
            row: Row = {name: value, "k": k, "d": int(curve.num_pixels), "n": int(curve.num_train)}
            row |= {
                "r2": float(curve.r2[k - 1]),
                "alignment_percent": float(curve.percent[k - 1]),
                "eval_r2": float(curve.eval_r2[k - 1]),
                "eval_r2_se": float(curve.eval_r2_se[k - 1]),
                "eval_share": float(share[k - 1]),
                "eval_share_se": _se(share_influence[:, k - 1]),
                "k90": curve.k90,
                "eval_k90": curve.eval_k90,
            }
            if paired and k <= len(reference.r2):
                base, base_influence = reference.eval_share()
                row |= {
                    "r2_change": float(curve.eval_r2[k - 1] - reference.eval_r2[k - 1]),
                    "r2_change_se": _se(curve.eval_influence[:, k - 1] - reference.eval_influence[:, k - 1]),
                    "share_change": float(share[k - 1] - base[k - 1]),
                    "share_change_se": _se(share_influence[:, k - 1] - base_influence[:, k - 1]),
                }
            rows.append(row)
    return rows


def class_rows(curves: Mapping[tuple[int, int], Curve], ks: Sequence[int]) -> list[Row]:
    """Means over the random class subsets, their spread, and differences to the smallest count, paired by subset.

    Args:
        curves: by (order of the classes, count). ks: numbers of features.

    Returns:
        One row per count and k. ``bound`` is k / (count - 1), at most 1: balanced one-hot labels have count - 1
        directions of equal variance, and k features cannot explain more of them.
    """
    orders = sorted({order for order, _ in curves})
    counts = sorted({count for _, count in curves})
    rows = []
    for count in counts:
        group = [curves[order, count] for order in orders]
        first = [curves[order, counts[0]] for order in orders]
        for k in (k for k in ks if k <= min(len(curve.r2) for curve in [*group, *first])):
            values = np.array([curve.eval_r2[k - 1] for curve in group])
            change = values - np.array([curve.eval_r2[k - 1] for curve in first])
            rows.append(
                {
                    "classes": count,
                    "k": k,
                    "d": int(group[0].num_pixels),
                    "n": int(group[0].num_train),
                    "bound": min(1.0, k / (count - 1)),
                    "r2": float(np.mean([curve.r2[k - 1] for curve in group])),
                    "alignment_percent": float(np.mean([curve.percent[k - 1] for curve in group])),
                    "eval_r2": float(values.mean()),
                    "eval_r2_spread": _spread(values),
                    "r2_change": float(change.mean()),
                    "r2_change_se": _spread(change) / len(change) ** 0.5,
                }
            )
    return rows


def _spread(values: np.ndarray) -> float:
    """Standard deviation between subsets; NaN for one."""
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _se(influence: np.ndarray) -> float:
    return float(ma.paired_se(influence[:, None])[0])


def table_text(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Rows as a plain-text table.

    Args:
        title: line above. rows: the table.
        columns: format of a cell by its heading, with the row's names as fields, such as ``"{r2:.3f}"``.

    Returns:
        The text.
    """
    lines = [list(columns), *([pattern.format(**row) for pattern in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([title, *text])


def change_text(change: float, se: float) -> str:
    """A difference in words: "no detectable difference" under two standard errors.

    Example:
        >>> change_text(-0.3, 0.01), change_text(0.01, 0.02)
        ('-0.300 +- 0.010', 'no detectable difference (+0.010 +- 0.020)')
    """
    if np.isnan(se):
        return f"{change:+.3f} (standard error unknown)"
    # Three decimals, or as many as show the standard error.
    digits = max(3, -math.floor(math.log10(se))) if se > 0 else 3
    numbers = f"{change:+.{digits}f} +- {se:.{digits}f}"
    return numbers if abs(change) >= 2 * se and change != 0 else f"no detectable difference ({numbers})"


def set_sentences(rows: Sequence[Row]) -> Iterator[str]:
    """Which set is how far aligned with its principal components."""
    for k in dict.fromkeys(row["k"] for row in rows):
        at = sorted((row for row in rows if row["k"] == k), key=lambda row: -row["alignment_percent"])
        if len(at) > 1:
            order = ", ".join(f"{row['set']} {row['alignment_percent']:.1f}" for row in at)
            yield f"k = {k}, 100 sqrt(alignment) from high to low: {order}."
    for row in {row["set"]: row for row in rows}.values():
        share = 100 * row["eval_k90"] / row["d"]
        yield f"{row['set']}: 90% of its best held-out r2 takes k = {row['eval_k90']}, {share:.1f}% of d = {row['d']}."


def class_sentences(rows: Sequence[Row]) -> Iterator[str]:
    """What more classes change, where the number of features does not itself limit it."""
    few, many = rows[0]["classes"], rows[-1]["classes"]
    if few == many:
        return
    for row in (row for row in rows if row["classes"] == many):
        start = next(r["eval_r2"] for r in rows if r["k"] == row["k"] and r["classes"] == few)
        text = (
            f"From {few} to {many} classes (equal numbers of training images) at k = {row['k']}, held-out r2 goes from "
            f"{start:.3f} to {row['eval_r2']:.3f}: {change_text(row['r2_change'], row['r2_change_se'])}"
        )
        if row["bound"] < 1:
            text += f"; k features cannot pass {row['bound']:.3f} with {many} balanced classes"
        yield text + "."


def resolution_sentences(rows: Sequence[Row]) -> Iterator[str]:
    """What average pooling changes at equal k."""
    fine, coarse = rows[0]["factor"], rows[-1]["factor"]
    if fine == coarse:
        return
    for k in dict.fromkeys(row["k"] for row in rows):
        at = [row for row in rows if row["k"] == k and "r2_change" in row]
        if at and at[-1]["factor"] != fine:
            row = at[-1]
            yield (
                f"Pooling {row['factor']} x {row['factor']} at k = {k} (d = {at[0]['d']} to {row['d']}): held-out r2 "
                f"{at[0]['eval_r2']:.3f} to {row['eval_r2']:.3f}, {change_text(row['r2_change'], row['r2_change_se'])}."
            )


def background_sentences(rows: Sequence[Row]) -> Iterator[str]:
    """What the background alone changes: same glyphs, same labels."""
    low, high = rows[0]["contrast"], rows[-1]["contrast"]
    if low == high:
        return
    for row in (row for row in rows if row["contrast"] == high):
        start = next(r for r in rows if r["k"] == row["k"] and r["contrast"] == low)
        yield (
            f"Background contrast {low:g} to {high:g} at k = {row['k']}, same glyphs and labels: held-out r2 "
            f"{start['eval_r2']:.3f} to {row['eval_r2']:.3f}, {change_text(row['r2_change'], row['r2_change_se'])}; "
            f"its share of the best r2 {start['eval_share']:.3f} to {row['eval_share']:.3f}, "
            f"{change_text(row['share_change'], row['share_change_se'])}; 100 sqrt(alignment) "
            f"{start['alignment_percent']:.1f} to {row['alignment_percent']:.1f}."
        )
    start, end = rows[0], rows[-1]
    yield (
        f"90% of the best held-out r2 takes k = {start['eval_k90']} of {start['d']} at contrast {low:g} and "
        f"k = {end['eval_k90']} at contrast {high:g}."
    )


def report_sets(folder: RunFolder, curves: Mapping[str, Curve], ks: Sequence[int], r2_name: str) -> list[str]:
    """Files of the sets themselves: sets.nc, sets.csv, sets_table.csv, sets.png and .pdf.

    Args:
        folder: where to. curves: by label. ks: numbers of features for the table. r2_name: what r2 is.

    Returns:
        The table and sentences, as lines.
    """
    short = {_short(label): curve for label, curve in curves.items()}
    named = short if len(short) == len(curves) else dict(curves)
    rows = curve_rows(named, "set", ks, paired=False)
    _save(folder, "sets", curve_dataset(named, "set"), rows)
    folder.save_figure("sets", figures.set_figure(named, r2_name))
    columns = {"set": "{set}", **_CURVE_COLUMNS}
    return [table_text(f"Principal components of each set ({r2_name})", rows, columns), *set_sentences(rows)]


def report_classes(
    folder: RunFolder, curves: Mapping[tuple[int, int], Curve], ks: Sequence[int], r2_name: str, label: str
) -> list[str]:
    """Files of the study of the number of classes: classes.nc and so on.

    Args:
        folder, ks, r2_name: as :func:`report_sets`. curves: by (order, count). label: of the set.

    Returns:
        The table and sentences, as lines.
    """
    orders = sorted({order for order, _ in curves})
    by_order = [curve_dataset({c: v for (o, c), v in curves.items() if o == order}, "classes") for order in orders]
    rows = class_rows(curves, ks)
    _save(folder, "classes", xr.concat(by_order, xr.Variable("order", orders), join="outer"), rows)
    folder.save_figure("classes", figures.class_figure(curves, ks, r2_name))
    title = f"Number of classes: {len(orders)} random nested subsets of {label}"
    return [table_text(title, rows, _CLASS_COLUMNS), *class_sentences(rows)]


def report_resolution(
    folder: RunFolder,
    curves: Mapping[int, Curve],
    ks: Sequence[int],
    r2_name: str,
    label: str,
    shape: Sequence[int],
) -> list[str]:
    """Files of the study of the resolution: resolution.nc and so on.

    Args:
        folder, ks, r2_name: as :func:`report_sets`. curves: by factor. label: of the set. shape: of its images.

    Returns:
        The table and sentences, as lines.
    """
    rows = curve_rows(curves, "factor", ks, paired=True)
    _save(folder, "resolution", curve_dataset(curves, "factor"), rows)
    folder.save_figure("resolution", figures.resolution_figure(curves, shape, r2_name))
    columns = {"pooling": "{factor} x {factor}", **_CURVE_COLUMNS}
    return [table_text(f"Resolution: {label}, average-pooled", rows, columns), *resolution_sentences(rows)]


def report_background(
    folder: RunFolder,
    curves: Mapping[float, Curve],
    ks: Sequence[int],
    r2_name: str,
    label: str,
    examples: np.ndarray,
) -> list[str]:
    """Files of the study of the background: background.nc and so on.

    Args:
        folder, ks, r2_name: as :func:`report_sets`. curves: by contrast. label: of the sets.
        examples: [contrasts, images, h, w, c] uint8.

    Returns:
        The table and sentences, as lines.
    """
    rows = curve_rows(curves, "contrast", ks, paired=True)
    _save(folder, "background", curve_dataset(curves, "contrast"), rows)
    changes = {}
    for k in dict.fromkeys(row["k"] for row in rows):
        at = [row for row in rows if row["k"] == k]
        if len(at) == len(curves):
            changes[k] = tuple(np.array([row[name] for row in at]) for name in ("r2_change", "r2_change_se"))
    folder.save_figure("background", figures.background_figure(curves, changes, examples, r2_name))
    columns = {"contrast": "{contrast:g}", **_CURVE_COLUMNS}
    return [table_text(f"Background: {label}", rows, columns), *background_sentences(rows)]


def _save(folder: RunFolder, name: str, result: xr.Dataset, rows: Sequence[Row]) -> None:
    result.attrs.update(mae_align_version=ma.__version__)
    folder.save_dataset(name, result)
    folder.save_table(f"{name}_table", rows)


def _short(label: str) -> str:
    """A data set's label without its path."""
    return label.partition(":")[2].rstrip("/").rsplit("/", 1)[-1].removesuffix(".npz") or label
