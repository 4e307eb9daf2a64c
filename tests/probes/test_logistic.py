from __future__ import annotations

import numpy as np
import pytest
from probe_cases import blobs, refused, standardized
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from mae_align.probes import Rows, logistic_probe
from mae_align.probes.logistic import logistic_path
from mae_align.runtime.devices import compile_counter

TRAIN, VAL, TEST = blobs(0, 90), blobs(1, 60), blobs(2, 72)
GRID = [1.0, 1e-2, 1e-4]


def scikit_learn(strength: float) -> LogisticRegression:
    z = standardized(TRAIN.features, TRAIN.features)
    return LogisticRegression(C=1 / (len(z) * strength), tol=1e-10, max_iter=5000).fit(z, TRAIN.labels)


@pytest.mark.parametrize(("dtype", "tolerance", "atol"), [("float64", 1e-8, 1e-4), ("float32", 1e-5, 2e-2)])
def test_path_equals_scikit_learn(dtype, tolerance, atol):
    z = standardized(TRAIN.features, TRAIN.features)
    path = logistic_path(z, TRAIN.labels, 3, strengths=GRID[::-1], tolerance=tolerance, dtype=dtype)
    assert path.strengths.tolist() == GRID and path.weights.dtype == dtype
    assert (path.gradient <= tolerance).all() and (path.steps > 0).all()
    for i, strength in enumerate(GRID):
        model = scikit_learn(strength)
        np.testing.assert_allclose(path.weights[i], model.coef_.T, atol=atol)
        np.testing.assert_allclose(path.bias[i], model.intercept_ - np.mean(model.intercept_), atol=atol)


def test_gradient_at_the_end_is_below_the_tolerance_by_its_definition():
    z = standardized(TRAIN.features, TRAIN.features)
    path = logistic_path(z, TRAIN.labels, 3, strengths=GRID, tolerance=1e-6)
    for strength, w, b, reported in zip(path.strengths, path.weights, path.bias, path.gradient, strict=True):
        gap = np.exp(log_softmax(z @ w + b, axis=1)) - np.eye(3)[TRAIN.labels]
        largest = max(np.abs(z.T @ gap / len(z) + strength * w).max(), np.abs(gap.mean(0)).max())
        assert largest == pytest.approx(reported, rel=1e-3, abs=1e-12) and largest <= 1e-6
    cut = logistic_path(z, TRAIN.labels, 3, strengths=GRID, tolerance=1e-9, max_steps=2)
    assert cut.steps.tolist() == [2, 2, 2] and cut.gradient[0] > 1e-9


def test_probe_scores_and_choice_are_those_of_scikit_learn():
    found = logistic_probe(*TRAIN, *TEST, val=Rows(*VAL), strengths=GRID, tolerance=1e-7, features="blobs")
    models = [scikit_learn(s) for s in GRID]
    on = [(p, standardized(TRAIN.features, p.features)) for p in (TRAIN, VAL, TEST)]
    scores = []
    for model in models:
        accuracy = [float(np.mean(model.predict(z) == p.labels)) for p, z in on]
        entropy = -float(log_softmax(model.decision_function(on[1][1]), axis=1)[np.arange(60), VAL.labels].mean())
        scores.append((accuracy, entropy))
    best = max(range(3), key=lambda i: (scores[i][0][1], -scores[i][1]))
    assert found.strength == GRID[best]
    assert [found.accuracy_train, found.accuracy_val, found.accuracy_test] == pytest.approx(scores[best][0])
    assert len({tuple(s[0]) for s in scores}) == 3, "the strengths must differ in what they find"
    row = found.as_dict()
    assert (row["probe"], row["features"], row["normalization"]) == ("logistic", "blobs", "per_feature")
    assert (row["n_train"], row["n_val"], row["n_test"], row["unconverged_strengths"]) == (90, 60, 72, 0)
    assert np.isnan(found.r2_test)


def test_constant_features_and_missing_classes():
    wide, wide_test = (np.c_[p.features, np.full((len(p.labels), 2), v)] for p, v in ((TRAIN, 0.1), (TEST, 7.0)))
    plain = logistic_probe(*TRAIN, *TEST, val=Rows(*VAL), strengths=GRID)
    wide_val = Rows(np.c_[VAL.features, np.zeros((60, 2))], VAL.labels)
    padded = logistic_probe(
        wide, TRAIN.labels, wide_test, TEST.labels, val=wide_val, strengths=GRID, num_classes=5, tolerance=1e-6
    )
    assert padded.strength == plain.strength
    for score in ("accuracy_train", "accuracy_val", "accuracy_test"):
        assert getattr(padded, score) == getattr(plain, score)
    flat = logistic_probe(0 * TRAIN.features, TRAIN.labels, *TEST, val=Rows(*VAL), strengths=GRID)
    assert flat.accuracy_test == pytest.approx(1 / 3)


def test_second_call_compiles_nothing_and_is_the_same():
    first = logistic_probe(*TRAIN, *TEST, val=Rows(*VAL), strengths=GRID)
    with compile_counter() as seen:
        again = logistic_probe(*TRAIN, *TEST, val=Rows(*VAL), strengths=GRID)
        other = {"strengths": [1.0, 0.1, 0.001], "tolerance": 1e-3, "max_steps": 50}
        logistic_probe(TRAIN.features[::-1], TRAIN.labels, *TEST, val=Rows(*VAL), **other)
    assert seen.names == []
    assert again.protocol == first.protocol and again.accuracy_test == first.accuracy_test


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": [0.0]}, "above 0"),
        ({"strengths": []}, "at least one"),
        ({"tolerance": 0.0}, "must be positive"),
        ({"max_steps": 0}, "must be positive"),
        ({"dtype": "float16"}, "float64"),
        ({"train_targets": np.linspace(0, 1, 90)}, "no class labels: use ridge_probe"),
        ({"train_targets": np.zeros(90, int)}, "all training targets are equal"),
        ({"train_targets": TRAIN.labels[:80]}, "give 90 class labels"),
        ({"test_targets": TEST.labels + 1}, "outside 0..2"),
        ({"test_targets": TEST.labels * 1.0}, "give 72 class labels"),
        ({"test_features": TEST.features[:, :5]}, "5 features where the training ones have 6"),
        ({"val": Rows(VAL.features, VAL.labels + 5)}, "outside 0..2"),
    ],
)
def test_bad_input(change, message):
    refused(logistic_probe, TRAIN, TEST, change, message)
