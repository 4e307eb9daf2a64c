"""Guided autoencoders: what a run measures, against definitions, and how the claim is judged."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import mae_align as ma
from experiments.guided_autoencoder import networks as guided_networks
from experiments.guided_autoencoder.__main__ import COLUMNS, PRESETS, Config, main, plan
from experiments.guided_autoencoder.networks import GuidedSplit, Labels, make_training
from experiments.guided_autoencoder.report import compare_weights, judge, linear_gain, sentences
from experiments.harness.autoencoders import Autoencoder
from experiments.harness.config import RunConfig
from experiments.harness.data import Split
from experiments.harness.ensembles import Probe
from experiments.harness.run import execute

CLASSES = 3
TINY = Config(
    latents=(2,),
    guidance=(0.0, 1e-3, 1.0),
    seeds=(0, 1),
    probes=(Probe.ridge,),
    frontier=(0.0, 1.0),
    network=Autoencoder(mlp_widths=(6,)),
    training=dataclasses.replace(
        PRESETS["laptop"].training, epochs=3, batch_size=16, warmup_epochs=0.0, learning_rate=1e-2
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    labels = np.arange(300) % CLASSES
    images = rng.normal(100, 25, (300, 4, 3, 1))
    images[:, 0, :, 0] += 20 * (labels[:, None] == np.arange(3))
    images = np.clip(images, 0, 200).astype(np.uint8)
    file = tmp_path_factory.mktemp("guided") / "toy.npz"
    np.savez(file, x_train=images[:180], y_train=labels[:180], x_test=images[180:], y_test=labels[180:])
    return file


@pytest.fixture(scope="module")
def config(data) -> Config:
    return dataclasses.replace(TINY, data=f"npz:{data}", out=str(data.parent / "run"))


def run(config: Config) -> None:
    execute("guided_autoencoder", main, config, Split.load, COLUMNS)


@pytest.fixture(scope="module")
def trained(config) -> list:
    """What was measured of each ensemble in a whole run: (training, state, split)."""
    seen, measure = [], guided_networks.measure
    with pytest.MonkeyPatch.context() as patch:

        def note(training, state, split, probes):
            seen.append((training, state, split))
            return measure(training, state, split, probes)

        patch.setattr(guided_networks, "measure", note)
        run(config)
    return seen


@pytest.fixture(scope="module")
def rows(config, trained) -> list[dict[str, str]]:
    with (Path(config.out) / "networks.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_run_leaves_everything_in_its_folder(config, rows):
    names = {path.name for path in Path(config.out).iterdir()}
    tables = {f"{name}.csv" for name in ("networks", "weights", "claim")} | {"networks.nc", "columns.md", "summary.txt"}
    figures = {f"{name}.{kind}" for name in ("guidance", "latents") for kind in ("png", "pdf")}
    assert names == tables | figures | {"config.json", "data.json", "run.json", "points", "networks"}
    kinds = [row["labels"] for row in rows]
    # The frontier and its PCA end; three weights and two seeds; the control without weight 0.
    assert [kinds.count(kind) for kind in ("linear", "true", "shuffled")] == [3, 6, 4]
    assert {row["ridge_selected_by"] for row in rows} == {rows[-1]["ridge_selected_by"]} != {""}
    text = (Path(config.out) / "summary.txt").read_text()
    assert "90 train and guide, 54 fit the probes" in text and "Code 2, ridge probe" in text
    assert {path.name for path in (Path(config.out) / "networks").iterdir()} == {
        "latent2-true-seeds0-1",
        "latent2-shuffled-seeds0-1",
    }


@pytest.mark.slow
def test_parts_are_disjoint_and_labels_of_the_control_a_permutation(trained):
    split = trained[0][2]
    parts = [split.fit_images, *split.measured]
    assert [len(part) for part in parts] == [90, 54, 36, 120]
    flat = {image.tobytes() for part in parts for image in part}
    assert len(flat) == 300
    np.testing.assert_array_equal(np.sort(split.shuffled_labels), np.sort(split.fit_labels))
    assert (split.shuffled_labels != split.fit_labels).mean() > 0.3


@pytest.mark.slow
def test_errors_and_accuracy_are_those_of_the_networks(trained, rows):
    training, state, split = trained[0]
    member = 4
    row = next(r for r in rows if (r["labels"], float(r["weight"] or -1), float(r["seed"] or -1)) == ("true", 1.0, 0.0))
    assert next(plan(TINY)).members[member] == (1.0, 0)
    model = training.model(state, member)

    def through(layers, x):
        for i, layer in enumerate(layers):
            if i:
                x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
            x = x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)
        return x

    fit = split.fit_images.reshape(len(split.fit_images), -1).astype(float)
    mean, scale = fit.mean(0), np.sqrt(fit.var(0).mean())
    x = (split.data.test_images.reshape(120, -1) - mean) / scale
    code = through(model.autoencoder.down, x)
    error = ((through(model.autoencoder.up, code) - x) ** 2).sum() / (x**2).sum()
    assert float(row["test_error"]) == pytest.approx(error, rel=1e-4)
    head = code @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    assert float(row["head_accuracy_test"]) == pytest.approx((head.argmax(1) == split.data.test_labels).mean())
    published = scale**2 / (fit.max() - fit.min()) ** 2
    assert float(row["normalized_weight"]) == pytest.approx(1 / published, rel=1e-5)
    assert float(state.member.guidance[member]) == pytest.approx(1 / published, rel=1e-5)
    assert [float(row[f"ridge_n_{part}"]) for part in ("train", "val", "test")] == [54, 36, 120]


@pytest.mark.slow
def test_labels_reach_the_network_by_their_weight_alone(trained):
    """The same seed starts alike and sees the same images; shuffled labels matter only through the guidance."""
    _, true, _ = trained[0]
    _, shuffled, _ = trained[1]
    kernels = [np.asarray(s.params["autoencoder"]["down"][0]["kernel"][...]) for s in (true, shuffled)]
    # Members: weights by seeds; the control has no weight 0.
    apart = [np.abs(kernels[0][i + 2] - kernels[1][i]).max() for i in range(4)]
    assert 0 < max(apart[:2]) < min(apart[2:])
    from_unguided = [np.abs(kernels[0][i] - kernels[0][i % 2]).max() for i in range(2, 6)]
    assert 0 < max(from_unguided[:2]) < min(from_unguided[2:])
    assert not np.allclose(kernels[0][0], kernels[0][1])


@pytest.mark.slow
def test_linear_frontier_is_theorem_1_on_the_fitted_images(trained, rows):
    split = trained[0][2]
    x = split.fit_images.reshape(len(split.fit_images), -1).astype(float)
    s = np.cov(x.T, bias=True) + np.eye(12) / 12
    values = np.linalg.eigvalsh(s)
    at = {float(r["lam_relative"]): r for r in rows if r["labels"] == "linear"}
    assert float(at[math.inf]["fit_error"]) == pytest.approx(values[:-2].sum() / values.sum(), rel=1e-9)
    y = np.eye(CLASSES)[split.fit_labels]
    y, xc = y - y.mean(0), x - x.mean(0)
    sxy = xc.T @ y / len(x)
    best = np.trace(sxy.T @ np.linalg.solve(s, sxy)) / (y**2).sum() * len(x)
    # Two features are enough for three classes.
    assert float(at[0.0]["fit_r2"]) == pytest.approx(best, rel=1e-9)
    assert float(at[math.inf]["fit_r2"]) < float(at[1.0]["fit_r2"]) < best
    vectors = np.linalg.eigh(s)[1][:, -2:]
    test = split.data.test_images.reshape(120, -1) - x.mean(0)
    left = ((test - test @ vectors @ vectors.T) ** 2).sum() / (test**2).sum()
    assert float(at[math.inf]["test_error"]) == pytest.approx(left, rel=1e-6)


@pytest.mark.slow
def test_what_is_finished_is_not_computed_again(config, rows, monkeypatch):
    folder = Path(config.out)
    before = (folder / "networks.csv").read_bytes()
    # As a run that was stopped behind its last ensemble.
    (folder / "summary.txt").unlink()
    (folder / "points" / "latent2-shuffled-seeds0-1.npz").unlink()
    monkeypatch.setattr(guided_networks, "measure", lambda *_: pytest.fail("measured again"))
    run(config)
    assert (folder / "networks.csv").read_bytes() == before and (folder / "summary.txt").exists()


# --- the comparison, on made-up networks ---


def network(labels: str, weight: float, seed: int, error: float, accuracy: float) -> dict:
    errors = {"val_error": error * 1.02, "test_error": error}
    scores = {"p_accuracy_val": accuracy - 0.01, "p_accuracy_test": accuracy}
    key = {"latent": 4, "labels": labels, "weight": weight, "normalized_weight": 10 * weight, "seed": seed}
    return key | errors | scores


def networks(gains: dict[tuple[str, float], list[float]], costs: dict[float, float]) -> pd.DataFrame:
    base = [0.80, 0.82, 0.81]
    found = [network("true", 0.0, s, 0.2 + s / 100, a) for s, a in enumerate(base)]
    for (labels, weight), gain in gains.items():
        for seed in (2, 0, 1):
            error = (0.2 + seed / 100) * (1 + costs[weight] / 100)
            found.append(network(labels, weight, seed, error, base[seed] + gain[seed] / 100))
    return pd.DataFrame(found)


def test_comparison_is_paired_by_seed():
    rows = networks({("true", 0.1): [3.0, 4.0, 5.0]}, {0.1: 0.5})
    (found,) = compare_weights(rows, "p")
    assert (found["seeds"], found["normalized_weight"]) == (3, 1.0)
    assert found["test_excess"] == pytest.approx(0.5) and found["test_excess_high"] == pytest.approx(0.5)
    low, high = stats.ttest_1samp([3.0, 4.0, 5.0], 0).confidence_interval(0.95)
    assert (found["test_gain"], found["test_gain_low"], found["test_gain_high"]) == pytest.approx((4.0, low, high))
    assert found["unguided_range"] == pytest.approx(2.0) and found["unguided_accuracy"] == pytest.approx(81.0)


@pytest.mark.parametrize(
    "gain, cost, reproduced, reason",
    [
        ([3.0, 3.1, 2.9], 0.9, True, ""),
        ([3.0, 3.1, 2.9], 1.1, False, "every weight costs more"),
        ([1.0, 1.1, 0.9], 0.9, False, "the unguided seeds differ by more"),
        ([9.0, 0.1, -0.9], 0.9, False, "holds 0"),
    ],
)
def test_claim_needs_equal_error_and_a_gain_over_the_seeds(gain, cost, reproduced, reason):
    rows = networks({("true", 0.1): gain, ("shuffled", 0.1): [0.1, 0.0, -0.1]}, {0.1: cost})
    compared = compare_weights(rows, "p")
    (verdict,) = judge(rows, [], compared, "p", 1.0)
    assert verdict["reproduced"] is reproduced
    assert verdict["control_gain"] == pytest.approx(0.0, abs=1e-9)
    assert verdict["over_control"] == pytest.approx(np.mean(gain)) and math.isnan(verdict["linear_gain"])
    assert verdict["outcome"].startswith("not reproduced: ") is not reproduced and reason in verdict["outcome"]
    assert f"in {int(reproduced)} of 1 cases" in next(sentences(compared, [verdict], 1.0))


def test_an_error_that_differs_on_test_images_is_no_equal_error_whichever_is_lower():
    rows = networks({("true", 0.1): [3.0, 3.1, 2.9]}, {0.1: -2.0})
    (verdict,) = judge(rows, [], compare_weights(rows, "p"), "p", 1.0)
    assert verdict["outcome"] == "not reproduced: its test error differs by more"


def test_weight_is_chosen_on_validation_images():
    rows = networks({("true", 0.1): [3.0] * 3, ("true", 0.2): [5.0] * 3}, {0.1: 0.2, 0.2: 0.8})
    # Better on test images, worse where choices are made.
    rows.loc[rows.weight == 0.2, "p_accuracy_val"] -= 0.04
    (verdict,) = judge(rows, [], compare_weights(rows, "p"), "p", 1.0)
    assert verdict["weight"] == 0.1 and math.isnan(verdict["control_gain"])
    rows.loc[rows.weight == 0.1, "val_error"] *= 1.05
    assert judge(rows, [], compare_weights(rows, "p"), "p", 1.0)[0]["weight"] == 0.2


def test_networks_without_their_unguided_one_are_left_out():
    rows = networks({("true", 0.1): [3.0, 4.0, 5.0]}, {0.1: 0.5})
    rest = rows.drop(rows.index[(rows.weight == 0) & (rows.seed == 1)])
    (found,) = compare_weights(rest, "p")
    assert (found["seeds"], found["test_gain"]) == (2, pytest.approx(4.0))
    assert compare_weights(rows.drop(rows.index[rows.weight == 0]), "p") == []


def test_the_published_weight_is_spoken_of():
    rows = networks({("true", 0.01): [3.0, 4.0, 5.0]}, {0.01: 8.0})
    compared = compare_weights(rows, "p")
    text = list(sentences(compared, judge(rows, [], compared, "p", 1.0), 1.0))
    assert text[2].startswith("The published weight 0.01 costs +8.0 to +8.0% of")
    assert "+4.00 [" in text[1] and "exact linear frontier at that cost not measured" in text[1]


def test_linear_gain_is_read_off_the_frontier():
    rows = [
        {"labels": "linear", "latent": 4, "lam_relative": lam, "test_error": e, "p_accuracy_test": a}
        for lam, e, a in ((0.0, 0.24, 0.9), (1.0, 0.202, 0.85), (math.inf, 0.2, 0.8))
    ]
    assert linear_gain(rows, "p", 4, 0.5) == pytest.approx(2.5)
    assert linear_gain(rows, "p", 4, -0.3) == 0.0
    assert math.isnan(linear_gain(rows, "p", 4, 30.0)) and math.isnan(linear_gain(rows, "p", 5, 0.5))


# --- settings ---


def test_groups_of_seeds_are_ensembles_of_their_own():
    found = list(plan(dataclasses.replace(TINY, latents=(2, 3), seeds_at_once=1, guidance=(0.0, 0.5))))
    assert [ensemble.key for ensemble in found[:4]] == [
        "latent2-true-seeds0",
        "latent2-shuffled-seeds0",
        "latent2-true-seeds1",
        "latent2-shuffled-seeds1",
    ]
    assert len(found) == 8 and found[0].members == ((0.0, 0), (0.5, 0)) and found[1].members == ((0.5, 0),)
    assert all(ensemble.labels is Labels.true for ensemble in plan(dataclasses.replace(TINY, control=False)))


def test_published_preset_is_the_published_set_up(tmp_path):
    paper = PRESETS["paper"]
    assert paper.latents == (128, 256, 512, 640, 1024, 2048, 3072, 4096) and paper.guidance == (0.0, 0.01)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (160, 32, 32, 3), dtype=np.uint8), np.arange(160) % 2
    file = tmp_path / "toy.npz"
    np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
    split = GuidedSplit.of(Split.load(RunConfig(data=f"npz:{file}", validation_fraction=0.1)), 0.1, 0)
    # Only the shapes are worked out here.
    state = make_training(split, paper.network, paper.training, next(plan(paper))).abstract_state
    leaves = [(jax.tree_util.keystr(path), x.shape) for path, x in jax.tree_util.tree_leaves_with_path(state.params)]
    assert [shape for name, shape in leaves if "to_code" in name and "kernel" in name] == [(2, 512, 128)]
    assert paper.training.epochs == 1000 and paper.training.augmentation.smallest_crop == 0.5


def test_every_preset_has_the_published_weight():
    for preset in PRESETS.values():
        assert {0.0, 0.01} <= set(preset.guidance)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"guidance": (0.1, 0.2)}, "--guidance: give 0"),
        ({"guidance": (0.0,)}, "--guidance: give 0"),
        ({"latents": (12,)}, "--latents 12"),
        ({"training": dataclasses.replace(TINY.training, batch_size=500)}, "batch-size 500"),
    ],
)
def test_bad_settings_are_refused_before_work(config, tmp_path, change, message):
    with pytest.raises(ma.InputError, match=message):
        run(dataclasses.replace(config, out=str(tmp_path / "new"), **change))
    assert not (tmp_path / "new").exists()
