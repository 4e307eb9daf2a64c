"""What training experiments report: every column of their tables has a line."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
import pandas as pd
import pytest

from experiments.harness.config import RunConfig
from experiments.harness.data import Split
from experiments.harness.ensembles import Member, Probe
from experiments.harness.probes import NETWORK, PROBES, Encoded, Features, probe_rows
from experiments.harness.report import COLUMNS, comparison_rows, result_rows, sentences
from experiments.harness.run import Run


@pytest.mark.parametrize("probe", list(Probe))
def test_every_column_of_the_results_has_a_line(probe, tmp_path):
    """Whole runs are slow tests; the columns must not wait for them."""
    assert set(PROBES) == set(Probe)
    config = RunConfig(max_train=60, max_test=40, out=str(tmp_path / "run"))
    split = Split.load(config)
    run = Run("toy", config, split, COLUMNS)
    kinds = [
        Features(NETWORK, 0, lambda: Encoded.of(lambda x: x.reshape(len(x), -1)[:, 20:24] / np.float32(16), split), "")
    ]
    rows = result_rows([Member(0, 0.1)], probe_rows(run, [probe], kinds, 0), [0])
    run.table("results", rows)
    for name in {name for row in rows for name in row}:
        assert any(fnmatchcase(name, pattern) for pattern in COLUMNS), name
    text = (tmp_path / "run" / "columns.md").read_text()
    assert "- `accuracy_test`: accuracy of the probe on test images" in text


def test_differences_are_paired_over_the_same_test_images():
    """Against the mean and standard error of the differences of every image, and of the seeds."""
    rng = np.random.default_rng(0)
    hard = rng.random(500)
    correct = np.stack([hard < level for level in (0.8, 0.81, 0.75, 0.76)]) ^ (rng.random((4, 500)) < 0.02)
    table = pd.DataFrame(
        {"probe": "ridge", "compared_as": [NETWORK] * 2 + ["untrained network"] * 2, "seed": [0, 1, 0, 1]},
        index=[1, 0, 3, 2],
    )
    (row,) = comparison_rows(table, correct)
    own, its = correct[[1, 0]].astype(float), correct[[3, 2]].astype(float)
    images, seeds = (own - its).mean(0), (own - its).mean(1)
    expected = np.sqrt(images.var(ddof=1) / 500 + seeds.var(ddof=1) / 2)
    assert row["difference"] == pytest.approx(100 * (own.mean() - its.mean()))
    assert row["difference_se"] == pytest.approx(100 * expected)
    unpaired = np.sqrt(sum(p.mean() * (1 - p.mean()) / 500 for p in (own, its)))
    assert row["difference_se"] < 0.7 * 100 * unpaired
    # Raw pixels are one row without a seed: networks on the one side alone vary.
    table = pd.DataFrame({"probe": "ridge", "compared_as": [NETWORK] * 2 + ["raw pixels"], "seed": [0, 1, ""]})
    (row,) = comparison_rows(table, correct)
    images = correct[:2].mean(0) - correct[2]
    expected = np.sqrt(images.var(ddof=1) / 500 + correct[:2].mean(1).var(ddof=1) / 2)
    assert row["difference_se"] == pytest.approx(100 * expected)


@pytest.mark.parametrize("probe", list(Probe))
def test_predictions_are_those_that_were_scored_and_are_kept(probe, tmp_path):
    split = Split.load(RunConfig(max_train=60, max_test=40))
    run = Run("toy", RunConfig(out=str(tmp_path / "run")), split, COLUMNS)
    images = {"calls": 0}

    def encode(x):
        images["calls"] += 1
        return x.reshape(len(x), -1)[:, 10:30] / np.float32(16)

    kinds = [Features("pixels", -1, lambda: Encoded.of(encode, split))]
    (row,), calls = probe_rows(run, [probe], kinds, 0), images["calls"]
    assert row["predicted"].shape == (40,)
    assert (row["predicted"] == split.test_labels).mean() == pytest.approx(row["accuracy_test"], abs=1e-6)
    (again,) = probe_rows(run, [probe], kinds, 0)
    np.testing.assert_array_equal(again["predicted"], row["predicted"])
    assert images["calls"] == calls == 3


@pytest.mark.parametrize(
    ("difference", "se", "words"),
    [
        (3.0, 0.5, "The trained network is worth its training: the ridge probe gains 3.0 points over raw pixels."),
        (3.0, 2.0, "The trained network may be worth its training: its gain over raw pixels is too small for these"),
        (0.2, 0.01, "The trained network is not worth its training for the ridge probe: raw pixels serve it as well"),
        (-3.0, 0.5, "The trained network is not worth its training for the ridge probe: raw pixels serve it as well"),
    ],
)
def test_the_sentence_says_first_what_it_means(difference, se, words):
    """The best of what needs no training decides; networks with labels do not."""
    row = {"probe": "ridge", "compared_as": NETWORK, "accuracy": 80.0, "difference": difference, "difference_se": se}
    others = [(9.0, "untrained network"), (difference, "raw pixels"), (-20.0, "supervised network")]
    comparisons = [{**row, "difference": change, "against": against} for change, against in others]
    report = [{"latent": 8, "feature_eval_r2": 0.5, "reconstruction_error": 0.1, "reconstruction_of": "images"}]
    closed = [{"closed_eval_r2_k8": 0.4, "closed_eval_r2_se_k8": 0.01}]
    said = sentences("Autoencoder", comparisons, report, closed)
    assert said[0].startswith(f"Autoencoder. {words}") and len(said) == 2
