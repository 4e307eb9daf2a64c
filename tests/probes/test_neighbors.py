from __future__ import annotations

import numpy as np
import pytest
from probe_cases import blobs, refused, rings, standardized
from sklearn.neighbors import KNeighborsClassifier

from mae_align import InputError
from mae_align.probes import ExponentialVotes, Rows, knn_probe, plain_votes, ridge_probe
from mae_align.runtime.devices import compile_counter

# More samples than one batch of queries holds, and no multiple of it.
TRAIN, VAL, TEST = blobs(0, 301, 2.0), blobs(1, 120, 2.0), blobs(2, 280, 2.0)


def weight(distance: np.ndarray) -> np.ndarray:
    return np.exp((1.0 - distance) / 0.07)


@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize(("votes", "weights"), [(plain_votes, "uniform"), (ExponentialVotes(0.07), weight)])
def test_equals_scikit_learn(k, votes, weights):
    model = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")
    model.fit(standardized(TRAIN.features, TRAIN.features), TRAIN.labels)
    found = knn_probe(*TRAIN, *TEST, val=Rows(*VAL), neighbors=[k], votes=votes)
    for part, accuracy in ((VAL, found.accuracy_val), (TEST, found.accuracy_test)):
        expected = model.predict(standardized(TRAIN.features, part.features)) == part.labels
        # Of equal votes both take the smaller class; a sum rounded in float32 may break one.
        assert accuracy == pytest.approx(expected.mean(), abs=1.01 / len(expected))
    assert found.protocol.selected_by == "" and found.as_dict()["neighbors"] == k


def test_training_accuracy_leaves_each_sample_out():
    z = standardized(TRAIN.features, TRAIN.features)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    cosine = z @ z.T
    np.fill_diagonal(cosine, -np.inf)
    expected = (TRAIN.labels[cosine.argmax(1)] == TRAIN.labels).mean()
    found = knn_probe(*TRAIN, *TEST, val=Rows(*VAL), neighbors=[1])
    assert found.accuracy_train == pytest.approx(expected, abs=1e-6) and expected < 0.9


def test_number_of_neighbors_is_chosen_on_validation():
    grid = [1, 20, 100]
    alone = [knn_probe(*TRAIN, *TEST, val=Rows(*VAL), neighbors=[k]) for k in grid]
    best = int(np.argmax([a.accuracy_val for a in alone]))
    assert 0 < best, "the case must not have its best k first"
    found = knn_probe(*TRAIN, *TEST, val=Rows(*VAL), neighbors=grid[::-1], features="blobs")
    assert found.as_dict()["neighbors"] == grid[best]
    for score in ("accuracy_train", "accuracy_val", "accuracy_test"):
        assert getattr(found, score) == getattr(alone[best], score)
    row = found.as_dict()
    assert (row["features"], row["neighbors_tried"], row["selected_by"]) == ("blobs", "1 20 100", "accuracy")
    assert row["votes"] == "ExponentialVotes(temperature=0.07)"


def test_few_samples_have_fewer_numbers_of_neighbors_to_choose_among():
    few = blobs(0, 30, 2.0)
    assert knn_probe(*few, *few, val=Rows(*few)).as_dict()["neighbors_tried"] == "1 5 20"
    with pytest.raises(InputError, match=r"neighbors=\[1, 5, 50\]: give whole numbers from 1 to 26"):
        knn_probe(*few, *few, neighbors=(50, 1, 5))


def test_what_a_linear_probe_misses_and_a_constant_feature():
    train, test = rings(0, 400), rings(1, 200)
    # The cosine sees directions only, so inside and outside are told apart after a lift to a paraboloid.
    lifted = [np.c_[p.features[:, :2] ** 2, p.features[:, 2:]] for p in (train, test)]
    assert ridge_probe(*train, *test).accuracy_test < 0.75
    assert knn_probe(lifted[0], train.labels, lifted[1], test.labels, neighbors=[5]).accuracy_test > 0.9
    flat = knn_probe(0 * train.features, train.labels, *test, neighbors=[5])
    assert 0 < flat.accuracy_test < 1


def test_small_temperature_neither_overflows_nor_forgets():
    sharp = knn_probe(*TRAIN, *TEST, val=Rows(*VAL), neighbors=[20], votes=ExponentialVotes(1e-4))
    nearest = knn_probe(*TRAIN, *TEST, val=Rows(*VAL), neighbors=[1])
    # The nearest outvotes all others together.
    assert sharp.accuracy_test == pytest.approx(nearest.accuracy_test, abs=0.02)


def test_second_call_compiles_nothing_and_is_the_same():
    first = knn_probe(*TRAIN, *TEST, neighbors=[1, 5])
    with compile_counter() as seen:
        again = knn_probe(*TRAIN, *TEST, neighbors=[1, 5])
    assert seen.names == []
    assert again.protocol == first.protocol and again.accuracy_test == first.accuracy_test
    assert (first.protocol.n_train, first.protocol.n_val) == (271, 30)
    assert knn_probe(*TRAIN, *TEST, neighbors=[1, 5], seed=1).accuracy_val != first.accuracy_val


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbors": []}, "from 1 to 270"),
        ({"neighbors": [0, 5]}, "from 1 to 270"),
        ({"neighbors": [271]}, "from 1 to 270"),
        ({"neighbors": [2.5]}, "whole numbers"),
        ({"train_features": TRAIN.features * np.nan}, "NaN"),
        ({"train_targets": TRAIN.labels * 0.5}, "no class labels"),
    ],
)
def test_bad_input(change, message):
    refused(knn_probe, TRAIN, TEST, change, message)
    with pytest.raises(InputError):
        ExponentialVotes(0.0)
