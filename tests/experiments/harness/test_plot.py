from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from experiments.harness import figures as plot


def luminance(color) -> float:
    return float(np.dot(color[:3], [0.2126, 0.7152, 0.0722]))


def test_panels_are_sized_and_styled_without_global_state():
    before = dict(matplotlib.rcParams)
    figure, axes = plot.panels(2, 3, width=1.5, height=2.0, sharey=True)
    assert axes.shape == (2, 3) and tuple(figure.get_size_inches()) == (4.5, 4.0)
    assert not axes[0, 0].spines["top"].get_visible() and axes[1, 2].title.get_fontsize() == 8
    assert axes[0, 0].get_shared_y_axes().joined(axes[0, 0], axes[1, 2])
    assert not axes[0, 0].get_shared_x_axes().joined(axes[0, 0], axes[1, 2])
    assert dict(matplotlib.rcParams) == before
    assert plot.panels(1, 1, width=1, height=1)[1].shape == (1, 1)


def test_colours_of_an_ordered_quantity_get_lighter():
    colors = plot.ordered_colors(10)
    assert len(colors) == 10 and all(len(c) == 4 for c in colors)
    light = [luminance(c) for c in colors]
    assert (np.diff(light) > 0).all() and light[-1] < 0.8  # readable on white
    assert len(plot.ordered_colors(1)) == 1


def test_palette_is_distinct():
    rgb = np.array([to_rgb(c) for c in plot.PALETTE])
    distance = np.abs(rgb[:, None] - rgb[None]).sum(-1) + 9 * np.eye(len(rgb))
    assert len(rgb) >= 7 and distance.min() > 0.3


def test_curves_are_drawn_against_k():
    _, axes = plot.panels(1, 1, width=2, height=2)
    k, curves = np.arange(1, 6), np.array([[1, 2, 3, 4, 5], [0, -1, 0, 1, 0]]) / 2
    plot.curves_over_k(axes[0, 0], k, curves, plot.PALETTE[:2], ["one", "two"])
    lines = axes[0, 0].get_lines()
    assert [line.get_label() for line in lines] == ["one", "two"]
    for line, curve, color in zip(lines, curves, plot.PALETTE, strict=False):
        np.testing.assert_array_equal(line.get_xdata(), k)
        np.testing.assert_array_equal(line.get_ydata(), curve)
        assert line.get_color() == color
    assert axes[0, 0].get_xscale() == "log" and "k" in axes[0, 0].get_xlabel()
    with pytest.raises(ValueError):
        plot.curves_over_k(axes[0, 0], k, curves, plot.PALETTE[:1], ["one", "two"])


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_figures_are_saved(tmp_path: Path, suffix: str):
    figure, axes = plot.panels(1, 2, width=2.0, height=1.5)
    plot.curves_over_k(axes[0, 1], np.arange(1, 50), np.ones((1, 49)), plot.ordered_colors(1), ["flat"])
    figure.savefig(tmp_path / f"figure{suffix}", dpi=100)
    if suffix == ".png":
        with Image.open(tmp_path / "figure.png") as image:
            assert image.size == (400, 150) and np.asarray(image.convert("L")).std() > 1
    else:
        assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_drawing_leaves_pyplot_alone():
    """No window system, no global figures that pile up in a notebook."""
    code = "import sys; from experiments.harness import figures as plot; plot.panels(1, 1, width=1, height=1); "
    code += "sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
