"""Networks of Theorem 2 and what they are compared with: PCA, the best free codes, Theorem 1's linear encoder."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mae_align as ma
from experiments.harness.config import Training as Settings
from experiments.harness.train import optimizer, training_programs
from experiments.theorem2_check.spans import explained_shares, sample_basis, span_angles
from mae_align.closed_form.autoencoder import supervised_solution
from mae_align.closed_form.factorize import factorize
from mae_align.models import GuidedAutoencoder, MLPAutoencoder, Pixels
from mae_align.train.ensemble import Member, Metrics, Training, TrainState
from mae_align.train.loop import Diverged
from mae_align.train.optimizer import adamw

# Images of one forward pass.
_BATCH = 500


class Decoder(enum.Enum):
    """Kinds of decoders."""

    linear = "linear"
    nonlinear = "nonlinear"


@dataclasses.dataclass(frozen=True)
class Case:
    """One ensemble.

    Attributes:
        width: of the hidden layer.
        decoder: its kind.
        members: (relative lambda, seed) of each.
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
        free: [n, k] orthonormal basis of the best free codes.
        linear: [n, k] that of Theorem 1's codes.
        free_loss: loss of the former.
        linear_loss: loss of the latter.
    """

    free: np.ndarray
    linear: np.ndarray
    free_loss: float
    linear_loss: float


@dataclasses.dataclass(frozen=True, eq=False)
class References:
    """Images, their principal components, and the solutions that networks are compared with.

    Attributes:
        images: [n, h, w, c].
        labels: [n].
        num_classes: q.
        latent: k.
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
        model: autoencoder and linear head.
        images: [b, h, w, c] stored units.
        labels: [b] classes.
        key: PRNG key of the step.
        member: its guidance, 1 / (lambda tr Syy).

    Returns:
        The loss, and {"reconstruction", "task"}.
    """
    reconstruction, _, code = model.autoencoder.loss_and_features(images, key)
    guess = model.head(code)
    classes = guess.shape[1]
    error = jnp.square(guess - jax.nn.one_hot(labels, classes)).sum(axis=1).mean()
    return reconstruction + member.guidance * error, {"reconstruction": reconstruction, "task": error}


def make_training(references: References, settings: Settings, case: Case) -> Training:
    """The networks of an ensemble.

    Raises:
        InputError: sizes that do not fit the images or each other.
    """
    pixels = Pixels.from_images(references.images)
    back = () if case.decoder is Decoder.linear else (case.width,)

    def make(rngs: nnx.Rngs) -> GuidedAutoencoder:
        autoencoder = MLPAutoencoder(
            pixels,
            hidden=(case.width,),
            decoder_hidden=back,
            latent=references.latent,
            dtype=jnp.bfloat16 if settings.bfloat16 else jnp.float32,
            rngs=rngs,
        )
        return GuidedAutoencoder(autoencoder, references.num_classes, rngs=rngs)

    rule = adamw(optimizer(settings, len(references.images)))
    return training_programs(make, regress, rule, batch_size=settings.batch_size, num_members=len(case.members))


def start(training: Training, references: References, case: Case) -> TrainState:
    """The networks of an ensemble before their first step, each with the weight of its labels."""
    lambdas, seeds = zip(*case.members, strict=True)
    task = float(1 - np.square(np.eye(references.num_classes)[references.labels].mean(0)).sum())
    return training.init(seeds, guidance=[0.0 if math.isinf(lam) else 1 / (lam * task) for lam in lambdas])


def measure(
    training: Training, state: TrainState, references: References, case: Case, at: Mapping[float, Reference]
) -> dict[str, np.ndarray]:
    """What the codes of every network explain of its training images.

    Args:
        training: of the ensemble.
        state: of the networks.
        references: of the images.
        case: the ensemble.
        at: solutions by lambda.

    Returns:
        [E] rank of the codes; codes_loss, that of their best linear decoder and head; network_error, that of the
        network's own decoder; angle_median and angle_largest to PCA, free_angle_median and linear_angle_median to the
        two solutions, degrees. [E, k] r2 of each principal component.

    Raises:
        Diverged: a code is not finite.
    """
    codes = training.features(state, references.images, _BATCH)
    finite = np.isfinite(codes).all(axis=(1, 2))
    if not finite.all():
        member = int(finite.argmin())
        raise Diverged(f"a code of member {member} is not finite", int(state.step), member, None)
    found = []
    for member, (lam, _) in enumerate(case.members):
        basis, reference = sample_basis(codes[member]), at[lam]
        # Of centred rows whose blocks have total variance 1.
        explained = ((basis.T @ references.rows) ** 2).sum(0) / len(references.rows)
        missed = 1 - explained[: references.pixels].sum(), 1 - explained[references.pixels :].sum()
        angles = {
            name: np.degrees(span_angles(basis, other))
            for name, other in (("", references.components), ("free_", reference.free), ("linear_", reference.linear))
        }
        found.append(
            {
                "rank": basis.shape[1],
                "codes_loss": missed[0] + (0.0 if math.isinf(lam) else missed[1] / lam),
                "network_error": _own_error(training.model(state, member), references.images),
                **{f"{name}angle_median": np.median(values) for name, values in angles.items()},
                "angle_largest": angles[""][-1],
                "r2": explained_shares(basis, references.components),
            }
        )
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


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
