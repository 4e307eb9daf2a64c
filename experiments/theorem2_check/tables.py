"""Tables of the check of Theorem 2: what networks end with, and what they have learned on the way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from experiments.theorem2_check.figures import components, means
from experiments.theorem2_check.networks import Decoder

# From this share of its variance on a component counts as learned, or as mostly learned.
LEARNED, MOSTLY = 0.99, 0.9
_ANGLES = ("angle_median", "angle_largest", "free_angle_median", "linear_angle_median")


def leading(r2: np.ndarray, threshold: float) -> int:
    """How many components from the first one on reach a share.

    Example:
        >>> leading(np.array([1.0, 0.95, 0.2, 0.99]), 0.9)
        2
    """
    below = np.flatnonzero(~(r2 >= threshold))
    return int(below[0]) if len(below) else len(r2)


def end_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each decoder, lambda and width, at the last step: means over seeds and the range of the loss.

    Args:
        frame: a row for each network and step.

    Returns:
        Loss of the best linear decoder of the codes over that of the best free codes (excess, percent) and over
        Theorem 1's (over_linear, percent); error of the network's own decoder over PCA's (network_excess, percent,
        reconstruction alone); angles; number of learned components; least R^2.
    """
    found, keys = [], ["decoder", "lam", "width"]
    for _, ends in frame.loc[frame.step == frame.step.max()].groupby(keys):
        excess = 100 * (ends.codes_loss / ends.free_loss - 1)
        r2 = ends[components(frame)].to_numpy().mean(0)
        row: dict[str, Any] = {**ends.iloc[0][keys].to_dict(), "seeds": len(ends)}
        row |= {"excess": excess.mean(), "excess_low": excess.min(), "excess_high": excess.max()}
        row["over_linear"] = (100 * (ends.codes_loss / ends.linear_loss - 1)).mean()
        row["linear_over_free"] = (100 * (ends.linear_loss / ends.free_loss - 1)).mean()
        own = (100 * (ends.network_error / ends.free_loss - 1)).mean()
        row["network_excess"] = own if math.isinf(row["lam"]) else math.nan
        row |= {name: ends[name].mean() for name in _ANGLES}
        row |= {"learned": leading(r2, LEARNED), "mostly": leading(r2, MOSTLY), "least_r2": r2.min()}
        found.append(row | {"rank": ends["rank"].min()})
    return pd.DataFrame(found).sort_values(
        ["decoder", "lam", "width"], ascending=[True, False, True], ignore_index=True
    )


def course_table(frame: pd.DataFrame, early: float) -> pd.DataFrame:
    """What has been learned at the start, early, nearest to PCA and at the end, for reconstruction alone: a row each.

    Args:
        frame: a row for each network and step.
        early: share of the steps; the last measurement within it counts. Nearest is the measurement of least median
            angle.

    Returns:
        For each width, decoder and moment: step, number of leading components mostly learned, mean R^2, median angle,
        all means over seeds; difference, the largest difference in mean R^2 of a component from the network of the
        same width with the other decoder.
    """
    names, found = components(frame), []
    for width in dict.fromkeys(frame.width):
        courses = {decoder: means(frame, decoder, math.inf, width) for decoder in Decoder}
        # Networks that diverged are not there.
        there = {decoder: course for decoder, course in courses.items() if len(course)}
        for decoder, course in there.items():
            other = next((one for kind, one in there.items() if kind is not decoder), None)
            steps = course.index
            within = steps[steps <= early * steps[-1]]
            moments = {"start": 0, "early": within[-1], "nearest": course.angle_median.idxmin(), "end": steps[-1]}
            for moment, step in moments.items():
                r2 = course.loc[step, names].to_numpy(float)
                row: dict[str, Any] = {"width": width, "decoder": decoder.value, "moment": moment, "step": step}
                row |= {"mostly": leading(r2, MOSTLY), "mean_r2": r2.mean()}
                row["angle_median"] = course.angle_median[step]
                found.append(row)
                if other is not None:
                    row["difference"] = np.abs(r2 - other.loc[step, names].to_numpy(float)).max()
    return pd.DataFrame(found)
