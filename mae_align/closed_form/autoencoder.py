"""Closed-form linear autoencoders: Theorem 1 (with supervision) and Theorem 3 (with a corruption).

Both are stated for S = cov(x) + pixel_noise I on its numerical range; see docs/theory.md, sections 2 and 3.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.closed_form.basis import pca_basis
from mae_align.closed_form.factorize import PrimalProblem, factorize
from mae_align.closed_form.features import corruption_features
from mae_align.closed_form.point import Shared, Weights, features_of
from mae_align.closed_form.targets import TargetOperator
from mae_align.corruption import Corruption, CorruptionMoments
from mae_align.corruption.base import Images
from mae_align.data.patches import ImageShape
from mae_align.moments.moments import Moments
from mae_align.runtime.checks import check_task
from mae_align.runtime.devices import solve_context
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import read_arrays, write_arrays

_HIGHEST = jax.lax.Precision.HIGHEST
_FILE_KIND, _FILE_VERSION = "linear autoencoder", 1
_ARRAYS = ("encoder", "head", "decoder", "mean_x", "mean_y", "mean_input", "mean_output")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LinearAutoencoder:
    """A linear autoencoder with a linear head; a pytree.

    Attributes:
        encoder: [d, k] V.
        head: [k, q] W.
        decoder: [k, d] Z ([k, p] where a target operator is reconstructed).
        mean_x: [d] of clean images.
        mean_y: [q].
        mean_input: [d] of the images that are reconstructed from, E[x'].
        mean_output: [d] of what is reconstructed.
        loss: minimum of the training objective, in its own units.
        rank: numerical rank of S.
        pixel_noise: variance on its diagonal.
        rtol: relative cutoff of its spectrum.
        image_shape: (h, w, c).
        output_shape: the same, or (p,).
        note: what a reader of the result must know, "" if nothing.
    """

    encoder: np.ndarray
    head: np.ndarray
    decoder: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    mean_input: np.ndarray
    mean_output: np.ndarray
    loss: float
    rank: int = dataclasses.field(metadata={"static": True})
    pixel_noise: float = dataclasses.field(metadata={"static": True})
    rtol: float = dataclasses.field(metadata={"static": True})
    image_shape: ImageShape = dataclasses.field(metadata={"static": True})
    output_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    note: str = dataclasses.field(default="", metadata={"static": True})

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Features (x - mean_x) V.

        Args:
            images: [n, h, w, c], any numeric dtype.

        Returns:
            [n, k].

        Raises:
            InputError: images of another shape.
        """
        return (self._flat(images) - self.mean_x[None, :]) @ self.encoder

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Reconstructions mean_output + (x' - mean_input) V Z of corrupted images (of x' = x without a corruption).

        Args:
            images: [n, h, w, c].

        Returns:
            [n, h, w, c], or [n, p] where a target operator is reconstructed.

        Raises:
            InputError: images of another shape.
        """
        features = (self._flat(images) - self.mean_input[None, :]) @ self.encoder
        return (features @ self.decoder + self.mean_output[None, :]).reshape(len(images), *self.output_shape)

    def _flat(self, images: np.ndarray) -> np.ndarray:
        if tuple(images.shape[1:]) != tuple(self.image_shape):
            raise InputError(
                f"images have shape {list(images.shape)}: this encoder takes n of {list(self.image_shape)}"
            )
        return images.reshape(len(images), -1)

    def save(self, path: str | Path) -> None:
        """Write everything to a file: an ``.npz`` without pickle, with a version and a checksum, whole or not at all.

        Args:
            path: the file.

        Raises:
            InputError: a place that cannot be written to.

        Example:
            >>> import tempfile
            >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
            >>> model = supervised_autoencoder(Moments.from_arrays(x, np.arange(50) % 2), 1.0, 2)
            >>> file = Path(tempfile.mkdtemp()) / "model.npz"
            >>> model.save(file)
            >>> bool((LinearAutoencoder.load(file).encode(x) == model.encode(x)).all())
            True
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {name: np.asarray(values.pop(name)) for name in _ARRAYS}
        write_arrays(path, _FILE_KIND, _FILE_VERSION, values, arrays)

    @classmethod
    def load(cls, path: str | Path) -> LinearAutoencoder:
        """Read what :meth:`save` wrote, bit for bit.

        Args:
            path: the file.

        Raises:
            InputError: a missing, foreign, damaged or newer file.
        """
        fields, arrays = read_arrays(path, _FILE_KIND, _FILE_VERSION)
        shapes = {name: tuple(fields.pop(name)) for name in ("image_shape", "output_shape")}
        values: dict[str, Any] = {**fields, **shapes, **arrays}
        return cls(**values)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Predicted targets mean_y + (x - mean_x) V W of clean images.

        Args:
            images: [n, h, w, c].

        Returns:
            [n, q].
        """
        return self.encode(images) @ self.head + self.mean_y[None, :]


def supervised_autoencoder(
    moments: Moments,
    lam: float,
    k: int,
    *,
    pixel_noise: float | None = None,
    rtol: float | None = None,
    target: TargetOperator | None = None,
) -> LinearAutoencoder:
    """Theorem 1: min over V, W, Z of E|W^T V^T x - y|^2 + lam E|Z^T V^T x - x|^2.

    V spans the top-k solutions of (Sxy Sxy^T + lam S^2) v = mu S v, scaled to V^T S V = I; W = V^T Sxy; Z = V^T S; the
    minimum is tr Syy + lam tr S - sum of the k largest mu.

    Args:
        moments: of the training data; V is [d, k] and needs the [d, d] problem, not its dual.
        lam: weight of reconstruction in [0, inf], target^2 / pixel^2. inf is PCA (the loss is then the reconstruction
            error alone). 0 is ordinary least squares for k >= rank(Sxy) and
            reduced-rank regression below; features beyond rank(Sxy) are those of the limit 0+.
        k: number of features, at most the rank.
        pixel_noise, rtol, target: see :func:`mae_align.closed_form.factorize.factorize`; with a target operator its
            output is reconstructed instead of x.

    Returns:
        The autoencoder, float64. Cost: eigh of size d and of size rank.

    Raises:
        InputError: lam negative or NaN, k outside 1..rank.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> m = Moments.from_arrays(x, x.reshape(50, 4)[:, :1])
        >>> abs(supervised_autoencoder(m, 0.0, 1, pixel_noise=0.0).loss) < 1e-9
        True
    """
    if not lam >= 0:
        raise InputError(f"lambda {lam}: give a weight of at least 0 (inf for reconstruction alone)")
    check_task(moments.num_targets)
    return supervised_solution(factorize(moments, pixel_noise=pixel_noise, rtol=rtol, target=target), lam, k)


def supervised_solution(problem: PrimalProblem, lam: float, k: int) -> LinearAutoencoder:
    """Theorem 1 for a problem that is factorised already; see :func:`supervised_autoencoder`.

    Args:
        problem: factorised from moments, float64.
        lam: weight of reconstruction in [0, inf].
        k: number of features.

    Returns:
        The autoencoder, float64. Cost: eigh of size rank.

    Raises:
        InputError: lam negative or NaN, k outside 1..rank.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 2, 2, 1))
        >>> problem = factorize(Moments.from_arrays(x, np.arange(50) % 2))
        >>> supervised_solution(problem, np.inf, 2).encoder.shape
        (4, 2)
    """
    if not lam >= 0:
        raise InputError(f"lambda {lam}: give a weight of at least 0 (inf for reconstruction alone)")
    problem.check_k(k)
    trace_s, trace_y = problem.target_trace, float(np.trace(problem.syy))
    total = trace_s if math.isinf(lam) else trace_y + lam * trace_s
    alpha, beta = (0.0, 1.0 / total) if math.isinf(lam) else (1.0 / total, lam / total)
    with solve_context("float64"):
        at = Weights(jnp.ones(problem.rank), jnp.asarray(alpha), jnp.asarray(beta))
        solution, f = _features_of(Shared(pca_basis(problem), problem.spectrum), at, max_k=problem.rank)
        # Features are nested in k: one compiled program serves every k.
        f, mu = np.asarray(f)[:, :k], np.asarray(solution.mu)[:k]
    note = ""
    tasks = int(np.linalg.matrix_rank(problem.t0))
    if lam == 0 and k > tasks:
        note = f"lam = 0 fixes only {tasks} features; the other {k - tasks} are those of the limit lam -> 0+"
    encoder = problem.u / np.sqrt(problem.s) @ f
    decoder = f.T @ _through(problem.target, problem.root.T, problem.image_shape)
    return _result(problem, encoder, f.T @ problem.t0, decoder, total * (1.0 - float(mu.sum())), note)


def denoising_autoencoder(
    moments: Moments,
    corruption: Corruption,
    k: int,
    *,
    pixel_noise: float | None = None,
    rtol: float | None = None,
    target: TargetOperator | None = None,
    images: Images | None = None,
) -> LinearAutoencoder:
    """Theorem 3: min over V, Z of E|Z^T V^T x' - x|^2 for a corruption x' of x; the head is refitted on clean x.

    With G = E[x' x'^T], A = E[x' x^T]: V spans the top-k solutions of A A^T v = mu G v; Z = (V^T G V)^-1 V^T A;
    the minimum is tr S - sum of the k largest mu. Solved on the general path, see
    :mod:`mae_align.closed_form.features`.

    Args:
        moments: of the training data; its G and A are [d, d], so that there is no dual of it.
        corruption: any corruption with moments.
        k: number of features.
        pixel_noise, rtol, target: see :func:`mae_align.closed_form.factorize.factorize`.
        images: the training images [n, h, w, c], or a function that starts a pass over batches of them; only for
            corruptions without exact moments.

    Returns:
        The autoencoder, float64. Where everything is masked (p = 1) it is the finite limit p -> 1. Cost: one eigh
        and one SVD of size d.

    Raises:
        InputError: k outside 1..rank, or more features than survive the corruption.

    Example:
        >>> from mae_align.corruption import PatchMasking
        >>> x = np.random.default_rng(0).normal(size=(50, 4, 4, 1))
        >>> m = Moments.from_arrays(x, np.arange(50) % 2)
        >>> denoising_autoencoder(m, PatchMasking(2, 0.5), 3).decoder.shape
        (3, 16)
    """
    corruption.check(moments.image_shape)
    problem = factorize(moments, pixel_noise=pixel_noise, rtol=rtol, target=target)
    problem.check_k(k)
    found = corruption_features(problem, corruption, images=images, centered=moments.center)
    if k > len(found.mu):
        raise InputError(f"k={k}: only {len(found.mu)} features of these images survive the corruption")
    encoder = found.encoder[:, :k]
    head = _clean_head(problem, encoder, found.q[:, :k])
    model = _result(problem, encoder, head, found.decoder[:k], found.loss(k), "")
    return dataclasses.replace(model, mean_input=problem.mean_x + found.corrupted.offset)


def _clean_head(problem: PrimalProblem, encoder: np.ndarray, q: np.ndarray) -> np.ndarray:
    """W = (V^T S V)^-1 V^T Sxy from R^T V = Q B; 0 for features that add nothing on clean images."""
    real = np.flatnonzero(q.any(0))
    triangle = q[:, real].T @ (problem.root.T @ encoder[:, real])
    head = np.zeros((encoder.shape[1], problem.t0.shape[1]))
    head[real] = np.linalg.solve(triangle, q[:, real].T @ problem.t0)
    return head


_features_of = jax.jit(features_of, static_argnames="max_k")


def supervised_loss(
    encoder: jax.Array,
    head: jax.Array,
    decoder: jax.Array,
    lam: jax.Array | float,
    sxx: jax.Array,
    sxy: jax.Array,
    syy: jax.Array,
) -> jax.Array:
    """Expected loss of Theorem 1 at any V, W, Z, from moments: E|W^T V^T x - y|^2 + lam E|Z^T V^T x - x|^2.

    Args:
        encoder: [d, k] V.
        head: [k, q] W.
        decoder: [k, d] Z.
        lam: finite weight.
        sxx: [d, d] image covariance.
        sxy: [d, q] of images and targets.
        syy: [q, q] target covariance.

    Returns:
        Scalar; differentiable. Cost d^2 k.

    Example:
        >>> one = np.ones((1, 1))
        >>> float(supervised_loss(one, one, one, 1.0, one, one, one))
        0.0
    """
    task = _quadratic(encoder, head, sxx, sxy, jnp.trace(syy))
    return task + lam * _quadratic(encoder, decoder, sxx, sxx, jnp.trace(sxx))


def denoising_loss(encoder: jax.Array, decoder: jax.Array, sxx: jax.Array, corruption: CorruptionMoments) -> jax.Array:
    """Expected loss of Theorem 3 at any V, Z, from moments: E|Z^T V^T x' - x|^2.

    Args:
        encoder: [d, k] V.
        decoder: [k, d] Z.
        sxx: [d, d] clean covariance.
        corruption: moments of x'.

    Returns:
        Scalar, squared pixel units; differentiable. Cost d^2 k.

    Example:
        >>> one = np.ones((1, 1))
        >>> float(denoising_loss(one, one, one, CorruptionMoments(one, one, 1.0)))
        0.0
    """
    gram, cross = corruption.keep * corruption.gram, corruption.keep * corruption.cross
    return _quadratic(encoder, decoder, gram, cross, jnp.trace(sxx))


def _quadratic(
    encoder: jax.Array,
    read: jax.Array,
    gram: jax.Array | np.ndarray,
    cross: jax.Array | np.ndarray,
    constant: jax.Array,
) -> jax.Array:
    """E|read^T V^T a - b|^2 with gram = E a a^T, cross = E a b^T, constant = E|b|^2."""
    features = jnp.dot(encoder.T, jnp.dot(gram, encoder, precision=_HIGHEST), precision=_HIGHEST)
    linear = jnp.vdot(jnp.dot(encoder.T, cross, precision=_HIGHEST), read, precision=_HIGHEST)
    outer = jnp.dot(read, read.T, precision=_HIGHEST)
    return constant - 2 * linear + jnp.vdot(features, outer, precision=_HIGHEST)


def _through(target: TargetOperator | None, rows: np.ndarray, image_shape: ImageShape) -> np.ndarray:
    """W applied to rows that are flattened images, [m, d] -> [m, p]."""
    return rows if target is None else np.asarray(target.apply(rows.reshape(-1, *image_shape)), np.float64)


def _result(
    problem: PrimalProblem, encoder: np.ndarray, head: np.ndarray, decoder: np.ndarray, loss: float, note: str
) -> LinearAutoencoder:
    output_shape = problem.image_shape if problem.target is None else (decoder.shape[1],)
    return LinearAutoencoder(
        encoder,
        head,
        decoder,
        problem.mean_x,
        problem.mean_y,
        problem.mean_x,
        _through(problem.target, problem.mean_x[None, :], problem.image_shape)[0],
        loss,
        rank=problem.rank,
        pixel_noise=problem.pixel_noise,
        rtol=problem.rtol,
        image_shape=problem.image_shape,
        output_shape=output_shape,
        note=note,
    )
