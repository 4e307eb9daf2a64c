"""The two ends of the scale of probes: the whole network fine-tuned, and the same network trained from scratch.

Both train encoder and linear head on the cross-entropy by AdamW with warm-up and cosine decay, and keep the epoch of
largest validation accuracy (of equal ones the least cross-entropy). The network trained from scratch is also the
supervised baseline whose frozen features the other probes are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mae_align.models import Autoencoder, Classifier
from mae_align.probes.inputs import Rows, validation_split
from mae_align.probes.labelled import Labelled, class_count, class_labels
from mae_align.probes.result import ProbeResult, Protocol
from mae_align.runtime.checks import check_images
from mae_align.runtime.errors import InputError
from mae_align.train.ensemble import Training, classify
from mae_align.train.optimizer import OptimizerConfig, adamw

# Share of the steps in which the learning rate grows.
_WARMUP = 0.05
# Images classified at a time.
_IMAGES = 256


def fine_tune(
    model: Autoencoder,
    train_images: np.ndarray,
    train_targets: np.ndarray,
    test_images: np.ndarray,
    test_targets: np.ndarray,
    *,
    epochs: int,
    features: str = "fine-tuned",
    **settings: Any,
) -> ProbeResult:
    """Accuracy after training a pretrained encoder and a new linear head together.

    Args:
        model: pretrained; it does not change.
        train_images, test_images: [n, h, w, c] in stored pixel units. train_targets, test_targets: [n] class labels.
        epochs: passes over the images that are fitted on. features: name for the protocol.
        settings: the other keyword arguments of :func:`train_classifier`.

    Returns:
        Scores (r2 is NaN) of the best epoch, and protocol.

    Raises:
        InputError: as :func:`train_classifier`.

    Example:
        >>> from mae_align.runtime.processes import train_mesh
        >>> from mae_align.models import MLPAutoencoder, Pixels
        >>> x = np.random.default_rng(0).integers(0, 256, (60, 2, 2, 1), dtype=np.uint8)
        >>> y = (x[:, 0, 0, 0] > 127).astype(int)
        >>> model = MLPAutoencoder(Pixels.from_images(x), hidden=(), latent=3, rngs=nnx.Rngs(0))
        >>> one = train_mesh(devices=jax.devices()[:1])
        >>> fine_tune(model, x, y, x, y, epochs=20, batch_size=9, learning_rate=0.05, mesh=one).accuracy_test > 0.9
        True
    """
    graphdef, state = nnx.split(model)

    def pretrained(rngs: nnx.Rngs) -> Autoencoder:
        del rngs
        return nnx.merge(graphdef, state, copy=True)

    given = (train_images, train_targets, test_images, test_targets)
    return train_classifier(pretrained, *given, epochs=epochs, probe="fine-tuning", features=features, **settings)[1]


def from_scratch(
    make_model: Callable[[nnx.Rngs], Autoencoder],
    train_images: np.ndarray,
    train_targets: np.ndarray,
    test_images: np.ndarray,
    test_targets: np.ndarray,
    *,
    epochs: int,
    features: str = "from scratch",
    **settings: Any,
) -> ProbeResult:
    """Accuracy of the same network trained on the labels alone.

    Args:
        make_model: the encoder of given random numbers. The others as in :func:`fine_tune`.
        train_images, train_targets, test_images, test_targets, epochs, features, settings: as in :func:`fine_tune`.

    Returns:
        Scores (r2 is NaN) of the best epoch, and protocol.

    Raises:
        InputError: as :func:`train_classifier`.
    """
    given = (train_images, train_targets, test_images, test_targets)
    return train_classifier(make_model, *given, epochs=epochs, probe="from scratch", features=features, **settings)[1]


def train_classifier(
    make_model: Callable[[nnx.Rngs], Autoencoder],
    train_images: np.ndarray,
    train_targets: np.ndarray,
    test_images: np.ndarray,
    test_targets: np.ndarray,
    *,
    epochs: int,
    probe: str = "supervised",
    num_classes: int | None = None,
    val: Rows | None = None,
    val_fraction: float = 0.1,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    seed: int = 0,
    features: str = "network",
) -> tuple[Classifier, ProbeResult]:
    """Train an encoder with a linear head on class labels; the epoch is chosen on validation samples.

    Args:
        make_model: the encoder of given random numbers; what it starts from is up to it.
        train_images, test_images: [n, h, w, c] in stored pixel units. train_targets, test_targets: [n] class labels.
        epochs: passes over the images that are fitted on; what does not fill a batch is left out of each.
        probe, features: names for the protocol.
        num_classes, val, val_fraction: as in :func:`mae_align.probes.ridge_probe`, ``val`` with images.
        learning_rate, weight_decay: of AdamW, after a warm-up of 5% of the steps and with cosine decay.
        batch_size: at most the images that are fitted on. mesh: of :func:`mae_align.runtime.processes.train_mesh`.
        seed: of the split, the head and the orders, and of what ``make_model`` draws.

    Returns:
        The classifier of the best epoch in eval mode, and its scores (r2 is NaN). Cost: a training of ``epochs``.

    Raises:
        InputError: images or labels that are bad or do not fit, fewer images than a batch, a loss that is not finite.
    """
    if epochs < 1:
        raise InputError(f"epochs={epochs}: give at least 1")
    train, on_val, test, q = _parts(
        Rows(train_images, train_targets), Rows(test_images, test_targets), num_classes, val, val_fraction, seed
    )
    size = min(batch_size, len(train.y))
    steps = len(train.y) // max(size, 1)
    total = epochs * steps
    config = OptimizerConfig(
        total_steps=total,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_steps=min(math.ceil(_WARMUP * total), total - 1),
    )

    def make(rngs: nnx.Rngs) -> Classifier:
        return Classifier(make_model(rngs), q, rngs=rngs)

    training = Training(make, classify, adamw(config), batch_size=size, num_members=1, mesh=mesh)
    state, data = training.init([seed]), training.put(train.x, train.y)
    best: tuple[float, float] = (-1.0, 0.0)
    best_epoch, kept = 0, None
    for epoch in range(1, epochs + 1):
        state, metrics = training.advance(state, data, steps)
        if not np.isfinite(np.asarray(metrics["loss"])).all():
            raise InputError(f"the loss is not finite in epoch {epoch} of {epochs}: choose a smaller learning_rate")
        model = training.model(state, 0)
        accuracy, entropy = _scores(model, on_val)
        if (accuracy, -entropy) > best:
            best, best_epoch, kept = (accuracy, -entropy), epoch, model
    assert isinstance(kept, Classifier)
    protocol = Protocol(
        probe=probe,
        features=features,
        normalization="the model's",
        n_train=len(train.y),
        n_val=len(on_val.y),
        n_test=len(test.y),
        seed=seed,
        selected_by="accuracy, then cross-entropy",
        settings=(
            ("epochs", epochs),
            ("epoch", best_epoch),
            ("learning_rate", learning_rate),
            ("weight_decay", weight_decay),
            ("batch_size", size),
        ),
    )
    nan = float("nan")
    scores = (_scores(kept, train)[0], best[0], _scores(kept, test)[0])
    return kept, ProbeResult(*scores, nan, nan, nan, protocol)


def _parts(
    train: Rows, test: Rows, num_classes: int | None, val: Rows | None, val_fraction: float, seed: int
) -> tuple[Labelled, Labelled, Labelled, int]:
    """Images and labels to fit, to choose and to test on, and the number of classes."""
    images = check_images(train.features)
    q = class_count(train.targets, num_classes)
    labels = class_labels(train.targets, len(images), q)
    if val is None:
        split = validation_split(len(images), val_fraction, labels, seed)
        chosen_on = Labelled(images[split.val], labels[split.val])
        fitted_on = Labelled(images[split.train], labels[split.train])
    else:
        fitted_on, chosen_on = Labelled(images, labels), _part(val, images, q)
    return fitted_on, chosen_on, _part(test, images, q), q


def _part(part: Rows, train_images: np.ndarray, q: int) -> Labelled:
    images = check_images(part.features)
    if images.shape[1:] != train_images.shape[1:]:
        raise InputError(f"images {list(images.shape[1:])} where the training ones are {list(train_images.shape[1:])}")
    return Labelled(images, class_labels(part.targets, len(images), q))


def _scores(model: Any, part: Labelled) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    correct, entropy = 0, 0.0
    size = min(_IMAGES, len(part.y))
    for start in range(0, len(part.y), size):
        rows = part.x[start : start + size]
        labels = part.y[start : start + size]
        # Filled up, so that one program serves all batches.
        full = np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)]).astype(np.float32)
        found = np.asarray(_log_probabilities(model, jnp.asarray(full)))[: len(rows)]
        correct += int((found.argmax(1) == labels).sum())
        entropy -= float(found[np.arange(len(rows)), labels].sum(dtype=np.float64))
    return correct / len(part.y), entropy / len(part.y)


@jax.jit
def _log_probabilities(model: Any, images: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(model.logits(images))
