"""Bad input is refused before anything compiles; variables that are not trained are kept up to date."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mae_align.models import ModelKind
from mae_align.runtime.devices import compile_counter
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import data_mesh, train_mesh
from mae_align.train import batches as train_data
from mae_align.train.ensemble import Training, reconstruct
from mae_align.train.optimizer import momentum
from mae_align.train.step import Program
from tests.train.train_cases import BATCH, QUICK, SHAPE, N, examples, training


class ConvNet(nnx.Module):
    """A convolution and a batch normalisation."""

    kind = ModelKind.CONVOLUTION
    image_shape = SHAPE

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2, momentum=0.9, use_fast_variance=False, rngs=rngs)

    def features(self, images):
        return self.norm(self.conv(images / 255)).mean(axis=(1, 2))

    def loss(self, images, key):
        del key
        out = self.norm(self.conv(images / 255)).mean(axis=3, keepdims=True)
        loss = jnp.mean(jnp.square(out - images / 255))
        return loss, {}


class Dropping(ConvNet):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def build(model=ConvNet, *, batch_size=BATCH, num_members=2, ensemble=1, devices=1, **options) -> Training:
    mesh = train_mesh(ensemble, jax.devices()[:devices])
    rule = momentum(0.1, 0.0)
    options = {"mesh": mesh, "compiler_options": QUICK, **options}
    return Training(model, reconstruct, rule, batch_size=batch_size, num_members=num_members, **options)


def test_batch_statistics_are_updated_and_used():
    """Convolutions on a CPU: member after member."""
    which, images = build(), examples()[0]
    assert which.program is Program.ONE_BY_ONE
    state = which.init([0, 1])
    before = [which.model(state, i) for i in range(2)]
    rows = np.asarray(which.order(state, 0, N))[:, :BATCH]
    state, metrics = which.advance(state, which.put(images), 1)
    for i, model in enumerate(before):
        out = np.asarray(model.conv(images[rows[i]].astype(np.float32) / 255), np.float64)
        mean, variance = out.mean((0, 1, 2)), out.var((0, 1, 2))
        after = which.model(state, i)
        np.testing.assert_allclose(after.norm.mean[...], 0.1 * mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(after.norm.var[...], 0.9 + 0.1 * variance, rtol=1e-4)
        assert after.norm.use_running_average
        np.testing.assert_allclose(which.features(state, images, 16)[i], after.features(images / 1.0), rtol=1e-4)
    state, more = which.advance(state, which.put(images), 19)
    assert (np.asarray(more["loss"])[-5:].mean(0) < np.asarray(metrics["loss"])[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "devices": 2}, "batch_size=9 is not divisible by the 2 devices"),
        ({"num_members": 3, "devices": 2, "ensemble": 2}, "num_members=3 is not divisible by the 2 devices"),
        ({"batch_size": 0}, "batch_size=0: give at least 1"),
        ({"num_members": 0}, "num_members=0: give at least 1"),
        ({"steps_per_call": 0}, "steps_per_call=0: give at least 1"),
        ({"mesh": data_mesh()}, "make it with mae_align.runtime.processes.train_mesh"),
        ({"devices": 2, "ensemble": 2}, "one member after the other"),
        ({"model": Dropping}, "random numbers of its own"),
    ],
)
def test_trainings_that_cannot_be(options, message):
    with compile_counter() as count, pytest.raises(InputError, match=message):
        build(**options)
    assert count.names == []


IMAGES, LABELS = examples()
WITH_NAN = np.where(np.arange(N)[:, None, None, None] == 3, np.nan, IMAGES).astype(np.float32)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:5], LABELS[:5], "5 images are fewer than a batch of 8"),
        (IMAGES[:, :2], LABELS, r"images have shape \[2, 4, 1\]: the model takes \[4, 4, 1\]"),
        (IMAGES.astype(np.int32), LABELS, "dtype int32"),
        (WITH_NAN, LABELS, "image 3 holds NaN"),
        (IMAGES, None, "give labels beside the images"),
        (IMAGES, LABELS[:-1], "one label per image"),
        (IMAGES, LABELS + 1, r"outside 0\.\.2"),
        (IMAGES, LABELS - 1, r"outside 0\.\.2"),
        (IMAGES, LABELS[:, None] * 1.0, r"give integer classes \[n\]$"),
    ],
)
def test_data_that_do_not_fit(images, labels, message):
    with compile_counter() as count, pytest.raises(InputError, match=message):
        training().put(images, labels)
    assert count.names == []


def test_numbers_as_labels_go_with_models_without_a_head():
    which = build()
    labels = which.put(IMAGES, LABELS[:, None] * 0.5).labels
    assert labels is not None and labels.dtype == np.float32
    assert which.put(IMAGES.astype(np.float64)).images.dtype == np.float32
    for bad, message in ((LABELS * 0.5, r"numbers \[n, q\]"), (LABELS[:, None] * np.nan, "labels hold NaN")):
        with pytest.raises(InputError, match=message):
            which.put(IMAGES, bad)


def test_data_that_no_memory_holds(monkeypatch):
    monkeypatch.setattr(train_data, "available_bytes", lambda: IMAGES.nbytes + 10)
    build().put(IMAGES)
    # Every virtual device of a CPU holds a copy of its own.
    with pytest.raises(InputError, match="stream them with advance_batches"):
        build(devices=2).put(IMAGES)


def test_members_that_cannot_be():
    which = training()
    for arguments in (
        {"seeds": [1, 2]},
        {"seeds": [1, 2, -3]},
        {"seeds": [1, 2, 2**32]},
        {"seeds": [1, 2, 3], "learning_rates": [1.0, 2.0]},
        {"seeds": [1, 2, 3], "learning_rates": [1.0, 2.0, -1.0]},
        {"seeds": [1, 2, 3], "guidance": [1.0, 2.0, np.nan]},
    ):
        with compile_counter() as count, pytest.raises(InputError, match="give 3"):
            which.init(**arguments)
        assert count.names == []


def test_calls_that_cannot_be():
    which, other = training(), training(1, steps=4)
    state = other.init([0])
    data = which.put(IMAGES, LABELS)
    stack, classes = IMAGES[: 2 * BATCH].reshape(2, BATCH, *SHAPE), LABELS[: 2 * BATCH].reshape(2, BATCH)
    with compile_counter() as count:
        for call, message in (
            (lambda: which.advance(state, data, 3), "this state has 1 members, this training 3"),
            (lambda: other.advance(state, data, 0), "0 steps: give at least 1"),
            (lambda: other.advance_batches(state, stack[:, :5], classes[:, :5]), r"give \[S, 8, h, w, c\]"),
            (lambda: other.advance_batches(state, stack[0], classes[0]), r"give \[S, 8, h, w, c\]"),
            (lambda: other.advance_batches(state, stack, classes[:1]), "one per image"),
            (lambda: other.advance_batches(state, stack, classes + 5), r"outside 0\.\.2"),
            (lambda: other.advance_batches(state, stack[:0], classes[:0]), "0 steps: give at least 1"),
            (lambda: other.model(state, 1), "there are members 0 to 0"),
            (lambda: other.features(state, IMAGES, 0), "batch_size=0: give at least 1"),
            (lambda: other.features(state, IMAGES[:, :1], 4), "the model takes"),
        ):
            with pytest.raises(InputError, match=message):
                call()
    assert count.names == [] and not state.keys.is_deleted()
