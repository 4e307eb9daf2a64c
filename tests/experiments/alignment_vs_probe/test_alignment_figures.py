from __future__ import annotations

import dataclasses

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from experiments.alignment_vs_probe.agreement import Panel, gains
from experiments.alignment_vs_probe.figures import forest_figure, gain_figure
from experiments.alignment_vs_probe.predictors import OURS, Agreement
from experiments.harness.figures import PALETTE


def panel(scale=1.0) -> Panel:
    rng = np.random.default_rng(0)
    p = rng.normal(size=(5, 2, 4))
    y = scale * p[..., None] + rng.normal(size=(5, 2, 4, 2))
    return Panel(tuple("abcde"), ("x",) * 5, (2, 8), (0.2, 0.4, 0.6, 0.8), y, p, {})


def test_gains_are_drawn_in_points_by_patch_size_and_objective():
    panels = {"matched": panel(), "standard": panel(0.5)}
    figure = gain_figure(panels, title="digits")
    axis = figure.axes[0]
    clouds = [c for c in axis.collections if isinstance(c, PathCollection)]
    assert len(clouds) == 4 and axis.get_title() == "digits" and figure.get_size_inches()[0] < 3.5
    for cloud, (one, j) in zip(clouds, [(p, j) for p in panels.values() for j in (0, 1)], strict=True):
        expected = np.stack([100 * gains(x)[:, j].ravel() for x in (one.predicted, one.scores)], 1)
        drawn = np.ma.filled(cloud.get_offsets(), np.nan)
        np.testing.assert_allclose(drawn[np.isfinite(drawn).all(1)], expected[np.isfinite(expected).all(1)])
        assert to_hex(np.asarray(cloud.get_facecolor())[0].tolist()) == PALETTE[j].lower()
    assert len({np.asarray(c.get_paths()[0].vertices).tobytes() for c in clouds}) == 2  # a marker per objective
    legend = axis.get_legend()
    assert legend is not None
    texts = [t.get_text() for t in legend.get_texts()]
    lines = ["a task, from the\nlowest mask ratio on", "observed = predicted"]
    assert texts == ["2x2 patches", "8x8 patches", "matched loss", "standard loss", *lines]
    assert "r2 [points]" in axis.get_xlabel() and "r2 [points]" in axis.get_ylabel()
    # A faint line per task, patch size and objective, from the origin; and the two axes and the diagonal.
    lines = [line for line in axis.get_lines() if line.get_alpha() is not None]
    assert len(lines) == 20 and all(np.asarray(line.get_xydata())[0].tolist() == [0, 0] for line in lines)
    assert len(axis.get_lines()) == 23
    # Gains of another size: no diagonal, in the legend neither.
    other = gain_figure({"matched": panel(50.0)}).axes[0]
    legend = other.get_legend()
    assert len(other.get_lines()) == 12 and legend is not None
    assert [t.get_text() for t in legend.get_texts()][2:] == ["a task, from the\nlowest mask ratio on"]


def test_missing_networks_leave_gaps():
    one = panel()
    observed = one.observed.copy()
    observed[:, 1] = np.nan
    figure = gain_figure({"matched": dataclasses.replace(one, observed=observed)})
    assert np.isfinite(figure.axes[0].dataLim.get_points()).all()


def agreement(name: str, value: float, p: float = np.nan) -> Agreement:
    return Agreement(name, value, value - 0.2, value + 0.1, p, p, p, 0.0, 0.0, 0.0, 1.0, 5, 10, 0, 0, 0, 99, 99)


def test_predictors_stand_below_each_other():
    groups = {
        "digits, matched loss": [agreement(OURS, 0.7, 0.0004), agreement("RankMe", -0.3)],
        "digits, standard loss": [agreement(OURS, 0.1, 0.25), agreement("mask ratio", np.nan)],
    }
    figure = forest_figure(groups, label="correlation")
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == [OURS, "RankMe", OURS, "mask ratio"]
    texts = [t.get_text() for t in axis.texts]
    assert texts == ["digits, matched loss", "p < 0.001", "digits, standard loss", "p = 0.25", "not defined"]
    points = [line for line in axis.get_lines() if line.get_marker() == "o"]
    assert [float(np.asarray(line.get_xdata())[0]) for line in points[:3]] == [0.7, -0.3, 0.1]
    spans = [line for line in axis.get_lines() if line.get_marker() != "o" and len(np.asarray(line.get_xdata())) == 2]
    np.testing.assert_allclose(np.asarray(spans[0].get_xdata()), [0.5, 0.8])
    assert points[0].get_markerfacecolor() == PALETTE[0] and points[1].get_markerfacecolor() == "white"
    assert "95% interval" in axis.get_xlabel()
    # From top to bottom in the order given.
    assert axis.get_ylim()[0] > axis.get_ylim()[1]
