"""Networks of Theorem 2 and what they are compared with: PCA, the best free codes, Theorem 1's linear encoder."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mae_align as ma
from experiments.theorem2_check.spans import explained_shares, sample_basis, span_angles
from mae_align.closed_form.autoencoder import supervised_solution
from mae_align.closed_form.factorize import factorize
from mae_align.models import GuidedAutoencoder, MLPAutoencoder, Pixels
from mae_align.runtime.files import PointStore, fingerprint
from mae_align.train.checkpoint import Checkpoints
from mae_align.train.ensemble import Member, Metrics, Training, TrainState
from mae_align.train.loop import fit
from mae_align.train.optimizer import OptimizerConfig, adamw

Row = dict[str, Any]
_BATCH = 500


class Decoder(enum.Enum):
    """Kinds of decoders."""

    linear = "linear"
    nonlinear = "nonlinear"


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Training by AdamW without weight decay; the learning rate falls to 0 along a cosine."""

    steps: int = 4_000
    """Steps of training; enough that the loss with a linear decoder has converged."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 2e-3
    """Largest learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""

    def check(self) -> None:
        """Refuse settings that no data could fit.

        Raises:
            InputError: naming the option and what to give instead.
        """
        if min(self.steps, self.batch_size) < 1 or not 0 <= self.warmup_steps < self.steps:
            raise ma.InputError(
                f"--network.steps {self.steps}, --network.batch-size {self.batch_size}, --network.warmup-steps "
                f"{self.warmup_steps}: give at least 1 of each, and fewer warm-up steps than steps"
            )


@dataclasses.dataclass(frozen=True)
class Case:
    """One ensemble.

    Attributes:
        width: of the hidden layer. decoder: its kind. members: (relative lambda, seed) of each.
    """

    width: int
    decoder: Decoder
    members: tuple[tuple[float, int], ...]

    @property
    def key(self) -> str:
        """A file name."""
        return f"width{self.width}-{self.decoder.value}"


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """The two solutions at one lambda; the same for reconstruction alone.

    Losses are E|Zh - x|^2 / tr Sxx + E|Wh - y|^2 / (lambda tr Syy), in-sample.

    Attributes:
        free: [n, k] orthonormal basis of the best free codes. linear: [n, k] that of Theorem 1's codes.
        free_loss, linear_loss: their losses.
    """

    free: np.ndarray
    linear: np.ndarray
    free_loss: float
    linear_loss: float


@dataclasses.dataclass(frozen=True, eq=False)
class References:
    """Images, their principal components, and the solutions that networks are compared with.

    Attributes:
        images: [n, h, w, c]. labels: [n]. num_classes: q. latent: k.
        rows: [n, d + q] centred images and one-hot labels, each block scaled to total variance 1.
        pixels: d, columns of ``rows`` that are images.
        components: [n, k] orthonormal sample basis of the first principal components.
        shares: [m] share of the variance of every component, largest first.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    latent: int
    rows: np.ndarray
    pixels: int
    components: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray, num_classes: int, latent: int) -> References:
        """Solve PCA of the images.

        Raises:
            InputError: a code that is not smaller than the rank of the images.
        """
        x = images.reshape(len(images), -1).astype(np.float64)
        y = np.eye(num_classes)[labels]
        blocks = [block - block.mean(0) for block in (x, y)]
        rows = np.concatenate([b / np.linalg.norm(b) * np.sqrt(len(b)) for b in blocks], axis=1)
        basis, shares = _principal(rows[:, : x.shape[1]], latent)
        if latent >= len(shares):
            raise ma.InputError(f"--latent {latent}: these images have rank {len(shares)}, choose a smaller code")
        return cls(images, labels, num_classes, latent, rows, x.shape[1], basis, shares)

    def at(self, lam: float) -> Reference:
        """The best free codes and Theorem 1's at a relative lambda; of infinity both are PCA's."""
        k = self.latent
        if math.isinf(lam):
            loss = 1.0 - float(self.shares[:k].sum())
            return Reference(self.components, self.components, loss, loss)
        scaled = np.concatenate([self.rows[:, : self.pixels], self.rows[:, self.pixels :] / math.sqrt(lam)], axis=1)
        basis, values = _principal(scaled, k)
        moments = ma.Moments.from_arrays(self.images, self.labels, num_classes=self.num_classes)
        problem = factorize(moments, pixel_noise=0.0)
        unit = float(np.trace(problem.syy)) / problem.trace
        solved = supervised_solution(problem, lam * unit, k)
        linear = sample_basis(solved.encode(self.images))
        # Their loss is E|W h - y|^2 + lambda E|Z h - x|^2, in the targets' units.
        linear_loss = solved.loss / (lam * float(np.trace(problem.syy)))
        return Reference(basis, linear, float(values[k:].sum()), linear_loss)


def _principal(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal sample basis [n, k] of the first principal components of centred rows, and all variances [m]."""
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values[::-1], vectors[:, ::-1]
    values = values[values > max(rows.shape) * np.finfo(np.float64).eps * values[0]]
    return np.linalg.qr(rows @ vectors[:, :k])[0], values


def regress(
    model: GuidedAutoencoder, images: jax.Array, labels: Any, key: jax.Array, member: Member
) -> tuple[jax.Array, Metrics]:
    """E|x_hat - x|^2 / tr Sxx + guidance E|y_hat - y|^2 with one-hot y: Theorem 2's loss over lambda.

    Args:
        model: autoencoder and linear head. images: [b, h, w, c] stored units. labels: [b] classes. key: PRNG
            key of the step. member: its guidance, 1 / (lambda tr Syy).

    Returns:
        The loss, and {"reconstruction", "task"}.
    """
    reconstruction, _, code = model.autoencoder.loss_and_features(images, key)
    guess = model.head(code)
    classes = guess.shape[1]
    error = jnp.square(guess - jax.nn.one_hot(labels, classes)).sum(axis=1).mean()
    return reconstruction + member.guidance * error, {"reconstruction": reconstruction, "task": error}


def make_training(references: References, config: NetworkConfig, case: Case) -> Training:
    """The networks of an ensemble.

    Raises:
        InputError: sizes that do not fit the images or each other.
    """
    if config.batch_size > len(references.images):
        raise ma.InputError(
            f"--network.batch-size {config.batch_size}: there are {len(references.images)} images, give at most these"
        )
    optimizer = OptimizerConfig(
        total_steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=0.0,
        b2=0.999,
        clip_norm=None,
    )
    pixels = Pixels.from_images(references.images)
    back = () if case.decoder is Decoder.linear else (case.width,)

    def make(rngs: nnx.Rngs) -> GuidedAutoencoder:
        autoencoder = MLPAutoencoder(
            pixels, hidden=(case.width,), decoder_hidden=back, latent=references.latent, rngs=rngs
        )
        return GuidedAutoencoder(autoencoder, references.num_classes, rngs=rngs)

    return Training(
        make, regress, adamw(optimizer), batch_size=config.batch_size, num_members=len(case.members), mesh=None
    )


def record_steps(steps: int, count: int) -> tuple[int, ...]:
    """0 and about as many log-spaced steps up to the last.

    Example:
        >>> record_steps(1000, 5)
        (0, 1, 10, 100, 1000)
    """
    return (0, *sorted({round(s) for s in np.geomspace(1, steps, count - 1)}))


def follow(
    references: References, config: NetworkConfig, case: Case, steps: Sequence[int], store: PointStore, folder: Path
) -> list[Row]:
    """Trains an ensemble and measures its codes on the way; finished measurements are read, not made again.

    Args:
        references: what codes are compared with. config: of the training. case: the ensemble. steps: of measurements,
            from 0, ascending. store: of measurements. folder: of checkpoints.

    Returns:
        A row for each network and step, see :func:`measure`.
    """
    if any(store.load(f"{case.key}-step{step}") is None for step in steps):
        _run(references, config, case, steps, store, folder)
    rows: list[Row] = []
    for step in steps:
        found = store.load(f"{case.key}-step{step}")
        assert found is not None
        rows += json.loads(str(found["json"]))
    return rows


def _run(
    references: References, config: NetworkConfig, case: Case, steps: Sequence[int], store: PointStore, folder: Path
) -> None:
    training = make_training(references, config, case)
    lambdas, seeds = zip(*case.members, strict=True)
    task = float(1 - np.square(np.eye(references.num_classes)[references.labels].mean(0)).sum())
    state = training.init(seeds, guidance=[0.0 if math.isinf(lam) else 1 / (lam * task) for lam in lambdas])
    data = training.put(references.images, references.labels)
    at = {lam: references.at(lam) for lam in dict.fromkeys(lambdas)}
    settings = {"network": dataclasses.asdict(config), "case": repr(case), "latent": references.latent}
    identity = fingerprint([references.images, references.labels], settings)
    # A twentieth of the training is what an interruption costs at most; the first tenth is soon done again.
    stops = sorted({*steps, *range(0, config.steps, max(config.steps // 20, 1))})
    with Checkpoints.open(folder, identity=identity, every=config.steps, keep_latest=1) as checkpoints:
        at_step, newest = 0, checkpoints.latest_step()
        missing = [step for step in steps if store.load(f"{case.key}-step{step}") is None]
        # A measurement that was lost from before the checkpoint means to begin again.
        if newest is not None and newest <= min(missing):
            at_step, state, _ = checkpoints.restore(state)
        for stop in stops:
            if stop > max(missing):
                break
            if stop < at_step:
                continue
            if stop > at_step:
                state = fit(training, state, data, num_steps=stop - at_step)
                at_step = stop
                # Saved before it is measured, so that no measurement is of a state that is lost.
                if 10 * stop >= config.steps and (newest is None or stop > newest):
                    checkpoints.save(stop, state, {}, {})
            if stop in missing:
                rows = measure(training, state, references, case, at, stop)
                store.save(f"{case.key}-step{stop}", {"json": np.array(json.dumps(rows))})


def measure(
    training: Training, state: TrainState, references: References, case: Case, at: dict[float, Reference], step: int
) -> list[Row]:
    """What the codes of every network explain of its training images.

    Args:
        training, state: of the ensemble. references: of the images. case: the ensemble. at: solutions by lambda.
        step: of the state.

    Returns:
        A row for each network: width, decoder, lam, seed, step; rank of the codes; loss, that of the best linear
        decoder and head of these codes, free_loss and linear_loss of the two solutions; r2, [k] per principal
        component; angle_median and angle_largest to PCA, free_angle_median and linear_angle_median to the two
        solutions, degrees; network_error, that of the network's own decoder.
    """
    codes = training.features(state, references.images, _BATCH)
    rows = []
    for member, (lam, seed) in enumerate(case.members):
        basis, reference = sample_basis(codes[member]), at[lam]
        # Of centred rows whose blocks have total variance 1.
        explained = ((basis.T @ references.rows) ** 2).sum(0) / len(references.rows)
        missed = 1 - explained[: references.pixels].sum(), 1 - explained[references.pixels :].sum()
        angles = np.degrees(span_angles(basis, references.components))
        medians = [float(np.degrees(np.median(span_angles(basis, r)))) for r in (reference.free, reference.linear)]
        rows.append(
            {
                "width": case.width,
                "decoder": case.decoder.value,
                "lam": lam,
                "seed": seed,
                "step": step,
                "rank": basis.shape[1],
                "loss": float(missed[0] + (0.0 if math.isinf(lam) else missed[1] / lam)),
                "free_loss": reference.free_loss,
                "linear_loss": reference.linear_loss,
                "network_error": _own_error(training.model(state, member), references.images),
                "angle_median": float(np.median(angles)),
                "angle_largest": float(angles[-1]),
                "free_angle_median": medians[0],
                "linear_angle_median": medians[1],
                "r2": explained_shares(basis, references.components).tolist(),
            }
        )
    return rows


def _own_error(model: Any, images: np.ndarray) -> float:
    """E|x_hat - x|^2 / tr Sxx of the network's own decoder."""
    total = 0.0
    for start in range(0, len(images), _BATCH):
        part = images[start : start + _BATCH]
        full = np.concatenate([part, np.repeat(part[:1], _BATCH - len(part), axis=0)])
        total += float(np.asarray(_errors(model, jnp.asarray(full)), np.float64)[: len(part)].sum())
    return total / len(images)


@jax.jit
def _errors(model: Any, images: jax.Array) -> jax.Array:
    """[b] mean squared error of each image, normalised units."""
    pixels = model.autoencoder.pixels
    return jnp.square(pixels.normalize(model.reconstruct(images)) - pixels.normalize(images)).mean(axis=(1, 2, 3))
