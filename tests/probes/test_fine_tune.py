from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from mae_align import InputError
from mae_align.models import Autoencoder, Classifier, MLPAutoencoder, Pixels
from mae_align.probes import ProbeResult, Rows, fine_tune, from_scratch, train_classifier
from mae_align.runtime.processes import train_mesh

PIXELS, LABELS = (np.asarray(part) for part in load_digits(return_X_y=True))
IMAGES = PIXELS.astype(np.uint8).reshape(-1, 8, 8, 1)
DATA = (IMAGES[:400], LABELS[:400], IMAGES[400:700], LABELS[400:700])
VAL = Rows(IMAGES[700:850], LABELS[700:850])
ONE = train_mesh(devices=jax.devices()[:1])
SETTINGS: dict[str, Any] = {"val": VAL, "batch_size": 50, "learning_rate": 2e-2, "mesh": ONE}


def make(rngs: nnx.Rngs) -> Autoencoder:
    return MLPAutoencoder(Pixels.from_images(IMAGES[:400]), hidden=(16,), latent=8, rngs=rngs)


def weights(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, ProbeResult]:
    return train_classifier(make, *DATA, epochs=12, **SETTINGS)


def test_learns_and_says_how(trained):
    model, found = trained
    assert found.accuracy_test > 0.8 and np.isnan(found.r2_test)
    row = found.as_dict()
    assert (row["probe"], row["n_train"], row["n_val"], row["n_test"]) == ("supervised", 400, 150, 300)
    assert row["epochs"] == 12 and row["selected_by"] == "accuracy, then cross-entropy"
    # The model that comes back is the one that was scored, and takes images in stored units.
    for part, accuracy in (
        (Rows(*DATA[:2]), found.accuracy_train),
        (VAL, found.accuracy_val),
        (Rows(*DATA[2:]), found.accuracy_test),
    ):
        predicted = np.asarray(model.logits(jax.numpy.asarray(part.features))).argmax(1)
        assert np.mean(predicted == part.targets) == pytest.approx(accuracy, abs=1e-9)


def test_fine_tuning_starts_from_the_given_weights_and_leaves_them(trained):
    model = trained[0].autoencoder
    before = weights(model)
    tuned = fine_tune(model, *DATA, epochs=2, **SETTINGS)
    carved = {k: v for k, v in SETTINGS.items() if k != "val"}
    fresh = from_scratch(make, *DATA, epochs=2, val_fraction=0.25, seed=2, **carved)
    assert tuned.accuracy_test > fresh.accuracy_test + 0.1
    assert (tuned.protocol.probe, fresh.protocol.probe) == ("fine-tuning", "from scratch")
    assert (fresh.protocol.n_train, fresh.protocol.n_val, fresh.protocol.seed) == (300, 100, 2)
    for a, b in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_epoch_is_chosen_on_validation():
    # With validation labels that only chance meets, the best epoch is any; it must be the one reported.
    noise = Rows(VAL.features, np.random.default_rng(0).permutation(VAL.targets))
    model, found = train_classifier(make, *DATA, epochs=8, **{**SETTINGS, "val": noise})
    assert found.accuracy_val == pytest.approx(
        (np.asarray(model.logits(jax.numpy.asarray(noise.features))).argmax(1) == noise.targets).mean()
    )
    assert found.accuracy_val < 0.25 and 1 <= int(found.as_dict()["epoch"] or 0) < 8


@pytest.mark.parametrize(
    ("data", "change", "message"),
    [
        (DATA, {"epochs": 0}, "epochs=0"),
        ((DATA[0], LABELS[:399], *DATA[2:]), {}, "give 400 class labels"),
        ((DATA[0], LABELS[:400] * 0.5, *DATA[2:]), {}, "no class labels"),
        ((DATA[0], DATA[1], DATA[2][:, :4], DATA[3]), {}, "images [4, 8, 1] where"),
        ((*DATA[:3], DATA[3] + 1), {}, "outside 0..9"),
        (DATA, {"batch_size": 0}, "batch_size"),
        (DATA, {"learning_rate": 1e30}, "smaller learning_rate"),
    ],
)
def test_bad_input(data, change, message):
    with pytest.raises(InputError) as error:
        from_scratch(make, *data, **{"epochs": 1, **SETTINGS, **change})
    assert message in str(error.value) and "\n" not in str(error.value)
