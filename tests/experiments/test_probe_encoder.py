"""Probes on networks and features of others: the scores of scikit-learn, and one line for what does not fit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

import mae_align as ma
from experiments import probe_encoder
from mae_align.models import load_mae
from tests.experiments.cases import refusal, run_experiment
from tests.models.test_published import CONFIG, shapes


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Random ReLU features of the digits, with a validation part of their own."""
    data, rng = ma.load_dataset("digits"), np.random.default_rng(0)
    weights = rng.normal(size=(64, 40)) / 30
    parts = {"train": slice(0, 900), "val": slice(900, None)}
    x = np.maximum(data.train_images.reshape(-1, 64) @ weights, 0).astype(np.float32)
    arrays = {f"x_{part}": x[rows] for part, rows in parts.items()}
    arrays |= {f"y_{part}": data.train_labels[rows] for part, rows in parts.items()}
    arrays |= {"x_test": np.maximum(data.test_images.reshape(-1, 64) @ weights, 0).astype(np.float32)}
    arrays |= {"y_test": data.test_labels}
    file = tmp_path_factory.mktemp("features") / "mine.npz"
    np.savez(file, allow_pickle=False, **arrays)
    return file, arrays


def test_scores_are_those_of_scikit_learn(features, tmp_path):
    """Ridge and logistic regression at the strength that was chosen on the validation part, and nearest neighbours."""
    file, arrays = features
    run_experiment(probe_encoder, "--features", file, "--out", tmp_path / "run")
    rows = pd.read_csv(tmp_path / "run" / "results.csv").set_index("probe")
    x, y = arrays["x_train"].astype(np.float64), arrays["y_train"]
    z, t = ((arrays[f"x_{part}"] - x.mean(0)) / x.std(0) for part in ("train", "test"))
    y_test, n = arrays["y_test"], len(x)
    ridge = Ridge(alpha=n * rows.probe_strength["ridge"]).fit(z, np.eye(10)[y])
    assert (ridge.predict(t).argmax(1) == y_test).mean() == pytest.approx(rows.accuracy_test["ridge"], abs=1e-6)
    r2 = (
        1
        - np.square(np.eye(10)[y_test] - ridge.predict(t)).sum()
        / np.square(np.eye(10)[y_test] - np.eye(10)[y].mean(0)).sum()
    )
    assert r2 == pytest.approx(rows.r2_test["ridge"], abs=1e-6)
    logistic = LogisticRegression(C=1 / (n * rows.probe_strength["logistic"]), tol=1e-8, max_iter=5000).fit(z, y)
    assert (logistic.predict(t) == y_test).mean() == pytest.approx(rows.accuracy_test["logistic"], abs=1e-3)
    votes: Any = lambda distance: np.exp((distance.min(1, keepdims=True) - distance) / 0.07)  # noqa: E731
    near = KNeighborsClassifier(int(rows.probe_neighbors["knn"]), metric="cosine", weights=votes).fit(z, y)
    assert (near.predict(t) == y_test).mean() == rows.accuracy_test["knn"]
    text = (tmp_path / "run" / "summary.txt").read_text()
    assert "mine: 900 training, 538 validation and 359 test images of 1x1x40" in text
    assert "Pixels to compare with need images" in text


def test_without_an_encoder_the_baselines_say_what_is_to_be_beaten(tmp_path, capsys):
    run_experiment(probe_encoder, "--max-train", 200, "--max-test", 100, "--probes", "ridge", "--out", tmp_path)
    assert set(pd.read_csv(tmp_path / "results.csv").features) == {"raw pixels", "64 principal components"}
    assert "An encoder has to beat" in capsys.readouterr().out


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A masked autoencoder with random weights for images of 8 x 8 pixels and one channel, in Hugging Face layout."""
    about = CONFIG | {"image_size": [12, 20], "num_channels": 1}
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("mae")
    arrays = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes(about).items()}
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def test_a_published_network_stands_beside_everything(published, tmp_path):
    arguments = ["--max-train", 200, "--max-test", 100, "--probes", "ridge", "knn", "--out", tmp_path / "run"]
    run_experiment(probe_encoder, "--mae", published, *arguments)
    results = pd.read_csv(tmp_path / "run" / "results.csv")
    kinds = [
        f"{one} network, {how}" for one in ("trained", "untrained") for how in ("mean over patches", "class token")
    ]
    assert set(results.features) == {*kinds, "raw pixels", "64 principal components"} and len(results) == 12
    comparisons = pd.read_csv(tmp_path / "run" / "comparisons.csv")
    row = comparisons[(comparisons.probe == "ridge") & (comparisons.compared_as == kinds[0])].set_index("against")
    scores = results[results.probe == "ridge"].set_index("features").accuracy_test
    for other in ("raw pixels", kinds[2]):
        assert row.difference[other] == pytest.approx(100 * (scores[kinds[0]] - scores[other]))
    ranks = pd.read_csv(tmp_path / "run" / "encoders.csv").set_index("encoder").rankme
    network = load_mae(published, image_size=(8, 8))
    tests = probe_encoder.load(probe_encoder.Config(max_train=200, max_test=100)).test_images
    singular = np.linalg.svd(np.asarray(network.encode(tests)), compute_uv=False)
    p = singular / singular.sum()
    assert ranks[kinds[0]] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
    closed = pd.read_csv(tmp_path / "run" / "closed_form.csv")
    assert len(closed) == 2 and "FixedCountPatchMasking" in closed.corruption[0]


def test_what_does_not_fit_is_one_line(published, features, tmp_path, capsys):
    file, arrays = features
    out = ["--out", tmp_path / "run"]
    words = refusal(capsys, probe_encoder, "--mae", published, "--features", file, *out)
    assert "--mae and --features are two encoders" in words
    words = refusal(capsys, probe_encoder, "--mae", published, "--image-size", 6, *out)
    assert "give multiples of the patch, 4 pixels" in words
    assert "there is no such file" in refusal(capsys, probe_encoder, "--mae", tmp_path / "none", *out)
    assert "check --features" in refusal(capsys, probe_encoder, "--features", tmp_path / "none", *out)
    for change, words in (
        ({"x_test": arrays["x_test"][:, :3]}, "bring both to one height, width and number of channels"),
        ({"x_train": arrays["x_train"][:, :, None]}, "give features [n, k] as numbers"),
        ({"y_train": arrays["y_train"][:300]}, "give one label per image"),
        ({"y_test": None}, "lacks y_test: save x_train [n, k]"),
    ):
        kept = {name: array for name, array in {**arrays, **change}.items() if array is not None}
        np.savez(tmp_path / "x.npz", allow_pickle=False, **kept)
        assert words in refusal(capsys, probe_encoder, "--features", tmp_path / "x.npz", *out)
    assert not (tmp_path / "run").exists()
