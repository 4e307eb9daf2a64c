"""The MLP probe: whether what is missing from the linear probe is there in another form.

One hidden layer on normalised features z = D (x - mean)::

    logits = W2^T gelu(W1^T z + b1) + b2

trained by AdamW on the cross-entropy, in batches of a new order in each epoch, for as long as the validation samples
gain: the weights of the epoch with the largest validation accuracy (of equal ones the least cross-entropy) are the
result. Everything runs in one program.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_align.probes.inputs import Normalization, Rows, name_of, per_feature
from mae_align.probes.labelled import class_parts
from mae_align.probes.result import ProbeResult
from mae_align.runtime.errors import InputError


class _Weights(NamedTuple):
    """Input layer [k, m] and [m], output layer [m, q] and [q]."""

    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array


class _Progress(NamedTuple):
    """The state of training after some epochs, and the best weights so far with their scores."""

    epoch: jax.Array
    weights: _Weights
    optimizer: optax.OptState
    best: _Weights
    best_epoch: jax.Array
    accuracy: jax.Array
    loss: jax.Array


def mlp_probe(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    test_features: np.ndarray,
    test_targets: np.ndarray,
    *,
    num_classes: int | None = None,
    val: Rows | None = None,
    val_fraction: float = 0.1,
    hidden: int = 512,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    batch_size: int = 256,
    max_epochs: int = 100,
    patience: int = 10,
    normalization: Normalization = per_feature,
    seed: int = 0,
    features: str = "features",
) -> ProbeResult:
    """Probe with one hidden layer of one task.

    Args:
        train_features: [n, k].
        train_targets: [n] class labels.
        test_features, test_targets: likewise.
        num_classes, val, val_fraction, normalization, features: as in :func:`mae_align.probes.ridge_probe`.
        hidden: width m.
        learning_rate, weight_decay: of AdamW.
        batch_size: at most as many as fitted samples are used; what does not fill a batch waits for another epoch's
            order.
        max_epochs: at most.
        patience: epochs without a better one after which training ends.
        seed: of the split, the weights and the orders.

    Returns:
        Scores (r2 is NaN) of the best epoch, and protocol; float32. Cost: 6 n m (k + q) multiply-adds an epoch.

    Raises:
        InputError: bad or ill-fitting features, targets that are no class labels, settings that are not positive.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(300, 2))
        >>> y = (np.abs(x[:, 0]) > 0.7).astype(int)  # no linear probe finds it
        >>> settings = {"hidden": 32, "batch_size": 32, "learning_rate": 0.01}
        >>> mlp_probe(x[:200], y[:200], x[200:], y[200:], **settings).accuracy_test > 0.8
        True
    """
    whole = {"hidden": hidden, "batch_size": batch_size, "max_epochs": max_epochs, "patience": patience}
    for name, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"{name}={value!r}: give a whole number of at least 1")
    if not 0 < learning_rate < np.inf or not 0 <= weight_decay < np.inf:
        raise InputError(
            f"learning_rate={learning_rate}, weight_decay={weight_decay}: give a positive rate and no negative decay"
        )
    train, test = Rows(train_features, train_targets), Rows(test_features, test_targets)
    parts = class_parts(train, test, num_classes, val, val_fraction, normalization, seed, np.dtype(np.float32))
    fitted_on, chosen_on, tested_on = (
        (jnp.asarray(p.x), jnp.asarray(p.y)) for p in (parts.train, parts.val, parts.test)
    )
    rates = jnp.asarray([learning_rate, weight_decay], jnp.float32)
    limits = jnp.asarray([max_epochs, patience])
    sizes = (int(hidden), parts.num_classes, min(int(batch_size), len(parts.train.y)))
    end = _fit(jax.random.key(seed), *fitted_on, *chosen_on, rates, limits, *sizes)
    on_train, on_test = (float(_scores(end.best, *part)[0]) for part in (fitted_on, tested_on))
    return parts.result(
        (on_train, float(end.accuracy), on_test),
        np.asarray(_classes(end.best, tested_on[0])),
        probe="mlp",
        features=features,
        normalization=name_of(normalization),
        seed=seed,
        selected_by="accuracy, then cross-entropy",
        settings=(
            ("hidden", hidden),
            ("learning_rate", learning_rate),
            ("weight_decay", weight_decay),
            ("batch_size", sizes[2]),
            ("max_epochs", max_epochs),
            ("patience", patience),
            ("epoch", int(end.best_epoch)),
            ("epochs_trained", int(end.epoch)),
        ),
    )


def _logits(weights: _Weights, z: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(z @ weights.w1 + weights.b1[None, :])
    return hidden @ weights.w2 + weights.b2[None, :]


def _loss(weights: _Weights, z: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(_logits(weights, z), labels).mean()


@jax.jit
def _classes(weights: _Weights, z: jax.Array) -> jax.Array:
    return _logits(weights, z).argmax(1)


@jax.jit
def _scores(weights: _Weights, z: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Accuracy and mean cross-entropy."""
    return (_logits(weights, z).argmax(1) == labels).mean(), _loss(weights, z, labels)


@partial(jax.jit, static_argnums=(7, 8, 9))
def _fit(
    key: jax.Array,
    z: jax.Array,
    labels: jax.Array,
    z_val: jax.Array,
    labels_val: jax.Array,
    rates: jax.Array,
    limits: jax.Array,
    hidden: int,
    num_classes: int,
    batch_size: int,
) -> _Progress:
    """Training to its end. rates: learning rate, weight decay. limits: most epochs, patience."""
    first, second, order_key = jax.random.split(key, 3)
    he = jax.nn.initializers.he_normal()
    start = _Weights(
        he(first, (z.shape[1], hidden), jnp.float32),
        jnp.zeros(hidden),
        jax.nn.initializers.lecun_normal()(second, (hidden, num_classes), jnp.float32),
        jnp.zeros(num_classes),
    )
    solver = optax.adamw(rates[0], weight_decay=rates[1])

    def step(carry: tuple, rows: jax.Array) -> tuple:
        weights, state = carry
        slope = jax.grad(_loss)(weights, z[rows], labels[rows])
        updates, state = solver.update(slope, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    def epoch(at: _Progress) -> _Progress:
        order = jax.random.permutation(jax.random.fold_in(order_key, at.epoch), len(labels))
        batches = order[: len(labels) // batch_size * batch_size].reshape(-1, batch_size)
        (weights, state), _ = jax.lax.scan(step, (at.weights, at.optimizer), batches)
        accuracy, loss = _scores(weights, z_val, labels_val)
        better = (accuracy > at.accuracy) | ((accuracy == at.accuracy) & (loss < at.loss))
        kept = jax.tree.map(partial(jnp.where, better), (weights, at.epoch + 1, accuracy, loss), at[3:])
        return _Progress(at.epoch + 1, weights, state, *kept)

    def goes_on(at: _Progress) -> jax.Array:
        return (at.epoch < limits[0]) & (at.epoch - at.best_epoch < limits[1])

    zero = jnp.zeros((), limits.dtype)
    begin = _Progress(zero, start, solver.init(start), start, zero, jnp.asarray(-1.0), jnp.asarray(jnp.inf))
    return jax.lax.while_loop(goes_on, epoch, begin)
