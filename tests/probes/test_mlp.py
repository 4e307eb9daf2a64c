from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from probe_cases import blobs, refused, rings

from mae_align.probes import Rows, mlp_probe, ridge_probe
from mae_align.runtime.devices import compile_counter

SMALL: dict[str, Any] = {"hidden": 32, "batch_size": 50, "learning_rate": 0.01, "max_epochs": 40, "patience": 8}
TRAIN, VAL, TEST = rings(0, 320), rings(1, 100), rings(2, 200)


def small(**changes: Any) -> dict[str, Any]:
    return SMALL | changes


def test_finds_what_a_linear_probe_misses():
    found = mlp_probe(*TRAIN, *TEST, val=Rows(*VAL), features="rings", **SMALL)
    assert found.accuracy_test > 0.93 > 0.65 > ridge_probe(*TRAIN, *TEST, val=Rows(*VAL)).accuracy_test
    row = found.as_dict()
    assert (row["probe"], row["features"], row["n_train"], row["hidden"]) == ("mlp", "rings", 320, 32)
    assert np.isnan(found.r2_test)


def test_the_kept_epoch_is_the_best_on_validation():
    scores = []
    for epochs in (1, 2, 4, 8):
        # Without patience running out, the best of the first m epochs can only improve with m.
        scores.append(mlp_probe(*TRAIN, *TEST, val=Rows(*VAL), **small(max_epochs=epochs)))
    kept = [int(s.as_dict()["epoch"] or 0) for s in scores]
    on_val = [s.accuracy_val for s in scores]
    assert on_val == sorted(on_val) and kept == sorted(kept) and kept[0] == 1 < kept[-1]
    for earlier, later in itertools.pairwise(scores):
        if earlier.as_dict()["epoch"] == later.as_dict()["epoch"]:
            assert earlier.accuracy_test == later.accuracy_test and earlier.accuracy_val == later.accuracy_val


def test_stops_when_validation_gains_no_more():
    # Validation labels are noise: there is nothing to gain after a few epochs.
    val = Rows(VAL.features, np.random.default_rng(0).integers(0, 2, 100))
    row = mlp_probe(*TRAIN, *TEST, val=val, **small(max_epochs=500, patience=3)).as_dict()
    assert row["epochs_trained"] == int(row["epoch"] or 0) + 3 and int(row["epochs_trained"] or 0) < 500


def test_the_seed_decides_everything():
    first, again, other = (mlp_probe(*TRAIN, *TEST, val=Rows(*VAL), seed=s, **SMALL) for s in (0, 0, 1))
    assert first.protocol == again.protocol and first.accuracy_test == again.accuracy_test
    assert other.protocol.seed == 1
    names = ("accuracy_train", "accuracy_val", "accuracy_test")
    assert [getattr(first, n) for n in names] + [first.as_dict()["epoch"]] != [
        *(getattr(other, n) for n in names),
        other.as_dict()["epoch"],
    ]


def test_normalises_and_handles_several_classes():
    train, test = blobs(0, 300, 0.3), blobs(1, 120, 0.3)
    # A batch larger than the data is one batch.
    found = mlp_probe(*train, *test, **small(batch_size=10_000))
    assert found.accuracy_test > 0.95 and found.as_dict()["batch_size"] == 270


def test_second_call_compiles_nothing():
    mlp_probe(*TRAIN, *TEST, val=Rows(*VAL), **SMALL)
    with compile_counter() as seen:
        changed = small(learning_rate=0.003, max_epochs=3, weight_decay=0.1, patience=2)
        mlp_probe(*TRAIN, *TEST, val=Rows(*VAL), seed=5, **changed)
    assert seen.names == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, "hidden=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"patience": True}, "patience=True"),
        ({"learning_rate": 0.0}, "positive rate"),
        ({"weight_decay": -1.0}, "no negative decay"),
        ({"train_targets": TRAIN.labels * 0.5}, "no class labels"),
    ],
)
def test_bad_input(change, message):
    refused(mlp_probe, TRAIN, TEST, change, message)
