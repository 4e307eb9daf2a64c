"""Tables, files and sentences of the alignment curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import mae_align as ma
from experiments.alignment_curves import figures
from experiments.alignment_curves.studies import Curve
from experiments.harness.run import Run

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
    names = {"r2": "r2", "alignment": "alignment", "alignment_percent": "percent"}
    names |= {"eval_r2": "eval_r2", "eval_r2_se": "eval_r2_se"}
    data = {
        name: ((dim, "k"), np.stack([padded(getattr(curve, attribute)) for curve in curves.values()]))
        for name, attribute in names.items()
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


def shown(rows: Sequence[Row], columns: Mapping[str, str]) -> pd.DataFrame:
    """A table of the summary.

    Args:
        rows: the table.
        columns: format of a cell by its heading, with the row's names as fields, such as ``"{r2:.3f}"``.

    Returns:
        The formatted cells.
    """
    return pd.DataFrame([{head: pattern.format(**row) for head, pattern in columns.items()} for row in rows])


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


def set_sentence(rows: Sequence[Row]) -> str:
    """Which set is how far aligned with its principal components, and how many of them it takes."""
    k = rows[-1]["k"]
    at = sorted((row for row in rows if row["k"] == k), key=lambda row: -row["alignment_percent"])
    order = ", ".join(f"{row['set']} {row['alignment_percent']:.1f} ({row['eval_k90']} of {row['d']})" for row in at)
    return (
        f"100 sqrt(alignment) at k = {k} from high to low, and in brackets the k of d for 90% of the best held-out r2: "
        f"{order}."
    )


def change_sentence(rows: Sequence[Row], name: str, what: str) -> list[str]:
    """What changing one thing from its first to its last value does to held-out r2; nothing for one value.

    Args:
        rows: by condition and k, the first condition first. name: of the condition. what: of it in words.
    """
    first, last = rows[0][name], rows[-1][name]
    at = [row for row in rows if row[name] == last and "r2_change" in row]
    if first == last or not at:
        return []
    words = []
    for row in at:
        start = next(r["eval_r2"] for r in rows if r["k"] == row["k"] and r[name] == first)
        limit = f" (k features cannot pass {row['bound']:.3f})" if row.get("bound", 1) < 1 else ""
        change = change_text(row["r2_change"], row["r2_change_se"])
        words.append(f"k = {row['k']}: {start:.3f} to {row['eval_r2']:.3f}{limit}, {change}")
    return [f"Held-out r2 {what.format(first, last)}: {'; '.join(words)}."]


def report_sets(run: Run[Any], curves: Mapping[str, Curve], ks: Sequence[int], r2_name: str) -> list[str]:
    """Files of the sets themselves: sets.nc, sets.csv, sets_table.csv, sets.png and .pdf.

    Args:
        run: where to. curves: by label. ks: numbers of features for the table. r2_name: what r2 is.

    Returns:
        A sentence.
    """
    short = {_short(label): curve for label, curve in curves.items()}
    named = short if len(short) == len(curves) else dict(curves)
    rows = curve_rows(named, "set", ks, paired=False)
    _save(run, "sets", curve_dataset(named, "set"), rows, {"set": "{set}", **_CURVE_COLUMNS})
    run.figure("sets", figures.set_figure(named, r2_name))
    return [set_sentence(rows)]


def report_classes(
    run: Run[Any], curves: Mapping[tuple[int, int], Curve], ks: Sequence[int], r2_name: str
) -> list[str]:
    """Files of the study of the number of classes: classes.nc and so on.

    Args:
        run, ks, r2_name: as :func:`report_sets`. curves: by (order, count).

    Returns:
        A sentence, or none.
    """
    orders = sorted({order for order, _ in curves})
    by_order = [curve_dataset({c: v for (o, c), v in curves.items() if o == order}, "classes") for order in orders]
    rows = class_rows(curves, ks)
    result = xr.concat(by_order, xr.Variable("order", orders), join="outer")
    _save(run, "classes", result, rows, _CLASS_COLUMNS)
    run.figure("classes", figures.class_figure(curves, ks, r2_name))
    return change_sentence(rows, "classes", "from {} to {} classes, equal numbers of training images")


def report_resolution(
    run: Run[Any], curves: Mapping[int, Curve], ks: Sequence[int], r2_name: str, shape: Sequence[int]
) -> list[str]:
    """Files of the study of the resolution: resolution.nc and so on.

    Args:
        run, ks, r2_name: as :func:`report_sets`. curves: by factor. shape: of the images.

    Returns:
        A sentence, or none.
    """
    rows = curve_rows(curves, "factor", ks, paired=True)
    columns = {"pooling": "{factor} x {factor}", **_CURVE_COLUMNS}
    _save(run, "resolution", curve_dataset(curves, "factor"), rows, columns)
    run.figure("resolution", figures.resolution_figure(curves, shape, r2_name))
    return change_sentence(rows, "factor", "from pooling {0} x {0} to {1} x {1}")


def report_background(
    run: Run[Any], curves: Mapping[float, Curve], ks: Sequence[int], r2_name: str, examples: np.ndarray
) -> list[str]:
    """Files of the study of the background: background.nc and so on.

    Args:
        run, ks, r2_name: as :func:`report_sets`. curves: by contrast. examples: [contrasts, images, h, w, c] uint8.

    Returns:
        A sentence, or none.
    """
    rows = curve_rows(curves, "contrast", ks, paired=True)
    columns = {"contrast": "{contrast:g}", **_CURVE_COLUMNS}
    _save(run, "background", curve_dataset(curves, "contrast"), rows, columns)
    changes = {}
    for k in dict.fromkeys(row["k"] for row in rows):
        at = [row for row in rows if row["k"] == k]
        if len(at) == len(curves):
            changes[k] = tuple(np.array([row[name] for row in at]) for name in ("r2_change", "r2_change_se"))
    run.figure("background", figures.background_figure(curves, changes, examples, r2_name))
    return change_sentence(rows, "contrast", "from background contrast {:g} to {:g}, same glyphs and labels")


def _save(run: Run[Any], name: str, result: xr.Dataset, rows: list[Row], columns: Mapping[str, str]) -> None:
    if not rows:
        raise ma.InputError(
            f"--ks: every k is over the rank of some images ({name}), the largest of which is "
            f"{result.sizes['k']}: give a smaller one"
        )
    result.attrs.update(mae_align_version=ma.__version__)
    run.dataset(name, result)
    run.table(f"{name}_table", rows, show=shown(rows, columns))


def _short(label: str) -> str:
    """A data set's label without its path."""
    return label.partition(":")[2].rstrip("/").rsplit("/", 1)[-1].removesuffix(".npz") or label
