"""The nearest-neighbour probe: no fit, only whether samples of a class lie close together.

A sample gets the class with most votes among its k nearest training samples by the cosine of normalised features
z = D (x - mean). A vote weighs exp(cosine / temperature), as is usual for self-supervised networks (Wu et al., 2018;
temperature 0.07), or 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.probes.inputs import Normalization, Rows, name_of, per_feature
from mae_align.probes.labelled import class_parts
from mae_align.probes.result import ProbeResult
from mae_align.runtime.errors import InputError

# Weights of votes from cosines, both of any one shape; hashable.
Votes = Callable[[jax.Array], jax.Array]
NEIGHBORS: tuple[int, ...] = (1, 5, 20, 50)
# Samples whose similarities to all training samples are held at a time.
_QUERIES = 256
# Training samples on which the training accuracy is taken: it costs as much as a test sample each.
_TRAIN_SAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class ExponentialVotes:
    """Votes weighted exp(cosine / temperature).

    Attributes:
        temperature: positive.

    Raises:
        InputError: a temperature that is not positive and finite.

    Example:
        >>> ExponentialVotes(0.5)(jnp.zeros(2)).tolist()
        [1.0, 1.0]
    """

    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not 0 < self.temperature < np.inf:
            raise InputError(f"temperature={self.temperature}: give a positive number")

    def __call__(self, cosine: jax.Array) -> jax.Array:
        """Weights of votes; only their ratios matter, and those of the nearest neighbour are kept from overflow."""
        return jnp.exp((cosine - cosine.max(-1, keepdims=True)) / self.temperature)


def plain_votes(cosine: jax.Array) -> jax.Array:
    """Every neighbour has one vote.

    Example:
        >>> plain_votes(jnp.zeros(2)).tolist()
        [1.0, 1.0]
    """
    return jnp.ones_like(cosine)


def knn_probe(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    test_features: np.ndarray,
    test_targets: np.ndarray,
    *,
    num_classes: int | None = None,
    val: Rows | None = None,
    val_fraction: float = 0.1,
    neighbors: Sequence[int] | None = None,
    votes: Votes = ExponentialVotes(),
    normalization: Normalization = per_feature,
    seed: int = 0,
    features: str = "features",
) -> ProbeResult:
    """Nearest-neighbour probe of one task; k of largest validation accuracy, the smaller of equal ones.

    Args:
        train_features: [n, k].
        train_targets: [n] class labels.
        test_features, test_targets: likewise.
        num_classes, val, val_fraction, normalization, seed, features: as in :func:`mae_align.probes.ridge_probe`.
        neighbors: values of k to choose among; one alone is fixed; None: those of ``NEIGHBORS`` that are fewer than the
            fitted samples.
        votes: :class:`ExponentialVotes` or :func:`plain_votes`.

    Returns:
        Scores (r2 is NaN; the training accuracy leaves each sample out of its own neighbours, on 2,000 samples at most)
        and protocol. Cost: n times samples times k multiply-adds, and their largest; memory 1,024 n bytes.

    Raises:
        InputError: bad or ill-fitting features, targets that are no class labels, neighbours below 1 or as many as the
            training samples.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = rng.integers(0, 2, 200)
        >>> x = rng.normal(size=(200, 5)) + 5.0 * y[:, None]
        >>> knn_probe(x[:150], y[:150], x[150:], y[150:], neighbors=[5]).accuracy_test
        1.0
    """
    train, test = Rows(train_features, train_targets), Rows(test_features, test_targets)
    parts = class_parts(train, test, num_classes, val, val_fraction, normalization, seed, np.dtype(np.float32))
    n = len(parts.train.y)
    counts = sorted(set([k for k in NEIGHBORS if k < n] if neighbors is None else neighbors))
    if not counts or counts[0] < 1 or counts[-1] >= n or any(int(k) != k for k in counts):
        raise InputError(f"neighbors={counts}: give whole numbers from 1 to {n - 1}, one less than fitted samples")
    bank, labels = _unit(jnp.asarray(parts.train.x)), jnp.asarray(parts.train.y)
    wanted = jnp.asarray(counts)

    def classes(x: np.ndarray, itself: np.ndarray) -> np.ndarray:
        """[m, number of k] found; the training sample ``itself`` [m] is left out, none where negative."""
        count, size = len(x), min(_QUERIES, len(x))
        padded = -(-count // size) * size
        queries, alone = np.zeros((padded, x.shape[1]), np.float32), np.full(padded, -1, np.int32)
        queries[:count], alone[:count] = x, itself
        batches = (jnp.asarray(queries).reshape(-1, size, x.shape[1]), jnp.asarray(alone).reshape(-1, size))
        found = _classes(*batches, bank, labels, wanted, max(counts), parts.num_classes, votes)
        return np.asarray(found).reshape(padded, -1)[:count]

    def accuracies(x: np.ndarray, y: np.ndarray, itself: np.ndarray) -> np.ndarray:
        return (classes(x, itself) == y[:, None]).mean(0)

    nobody = [np.full(len(part.y), -1, np.int32) for part in (parts.val, parts.test)]
    on_val = accuracies(*parts.val, nobody[0])
    best = int(on_val.argmax())
    predicted = classes(parts.test.x, nobody[1])[:, best]
    some = np.sort(np.random.default_rng(seed).permutation(n)[:_TRAIN_SAMPLES])
    on_train = accuracies(parts.train.x[some], parts.train.y[some], some.astype(np.int32))
    return parts.result(
        (float(on_train[best]), float(on_val[best]), float((predicted == parts.test.y).mean())),
        predicted,
        probe="knn",
        features=features,
        normalization=name_of(normalization),
        seed=seed,
        selected_by="accuracy" if len(counts) > 1 else "",
        settings=(
            ("neighbors", counts[best]),
            ("neighbors_tried", " ".join(map(str, counts))),
            ("votes", getattr(votes, "__name__", repr(votes))),
            ("similarity", "cosine"),
            ("train_samples_scored", len(some)),
        ),
    )


def _unit(x: jax.Array) -> jax.Array:
    """Rows of length 1; a row of zeros stays, with cosine 0 to all."""
    size = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(size > 0, size, 1.0)


@partial(jax.jit, static_argnums=(5, 6, 7))
def _classes(
    queries: jax.Array,
    itself: jax.Array,
    bank: jax.Array,
    labels: jax.Array,
    wanted: jax.Array,
    most: int,
    num_classes: int,
    votes: Votes,
) -> jax.Array:
    """[batches, b, number of k] classes of queries [batches, b, d], for each k in ``wanted``, at most ``most``."""

    def one(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, alone = batch
        cosine = jnp.matmul(_unit(x), bank.T, precision=jax.lax.Precision.HIGHEST)
        # Positions outside the bank are dropped; a negative one would count from the end.
        column = jnp.where(alone < 0, len(labels), alone)
        cosine = cosine.at[jnp.arange(len(x)), column].set(-jnp.inf, mode="drop")
        near, index = jax.lax.top_k(cosine, most)
        cast = votes(near)[:, :, None] * jax.nn.one_hot(labels[index], num_classes)
        return jnp.cumsum(cast, axis=1)[:, wanted - 1].argmax(-1)

    return jax.lax.map(one, (queries, itself))
