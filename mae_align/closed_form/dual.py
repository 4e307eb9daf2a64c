"""The factorised problem from samples: n x n instead of d x d, for fewer samples than pixels.

With X the centred samples [n, d], K0 = X X^T / n = Z diag(s0) Z^T on its numerical range (rank r < n) and s = s0 + f,
f the pixel noise floor, S has the eigenvectors U = X^T Z diag(n s0)^-1/2 in the span of the samples. They are never
formed::

    T0 = diag(s0 / s)^1/2 Z^T Y / sqrt n                                                                     [r, q]
    P = diag(s / s0)^1/2 Z^T [ sum_b X_b (X_b^T X_b + n (f + rho) I)^-1 X_b^T ] Z diag(s / s0)^1/2             [r, r]

with X_b the columns of patch b, a few of which are converted to floating point at a time: memory is O(n^2 + n block).
Everything after that is the primal's. See docs/theory.md, section 11.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

from mae_align.closed_form.basis import PatchBasis, basis_of
from mae_align.closed_form.factorize import (
    DType,
    Factorized,
    check_options,
    check_variance,
    default_floor,
    default_rtol,
    eigh,
    patch_blocks,
    within_targets,
)
from mae_align.closed_form.held_out import HeldOutRows, check_projection
from mae_align.closed_form.targets import TargetOperator, check_something_left, mapped
from mae_align.data.patches import PatchSize, patch_grid, patch_labels
from mae_align.moments.samples import Samples
from mae_align.runtime.devices import solve_context
from mae_align.runtime.errors import InputError
from mae_align.runtime.memory import PIXELS_AT_ONCE, check_memory, dual_bytes

_HIGHEST = jax.lax.Precision.HIGHEST
# |x - 128| <= 2^7: a sum of 1,024 products stays within the integers that float32 holds exactly.
_EXACT_PIXELS = 1024
# Pixel values of the samples that a target operator is applied to at once: 256 MB of float64.
_TARGET_PIXELS = 2**25


@dataclasses.dataclass(frozen=True, eq=False)
class DualProblem(Factorized):
    """The problem factorised from samples.

    Attributes:
        samples: the training data.
        z: [n, r] eigenvectors of K0.
        raw: [r] s0, its eigenvalues, without the floor.
    """

    kind: ClassVar[str] = "dual"

    samples: Samples
    z: np.ndarray
    raw: np.ndarray

    def precision(self, patch_size: PatchSize, rho: float) -> jax.Array:
        """[r, r] P = R^T (D + rho I)^-1 R. Cost d n^2 + n d c, c pixels in a patch; memory n^2 + n block."""
        return self.precisions(patch_size, rho, None)[0]

    def precisions(self, patch_size: PatchSize, rho: float, unseen: Samples | None) -> tuple[jax.Array, jax.Array]:
        """P [r, r] and J = X_ev (D + rho I)^-1 R [n_ev, r] for held-out images about the training mean."""
        if self.pixel_noise + rho == 0:
            check_patches(self.samples, [patch_size])
        dtype = np.dtype(self.dtype)
        n, seen = self.count, 0 if unseen is None else unseen.count
        gamma, cutoff = dtype.type(self.pixel_noise + rho), dtype.type(self.cutoff)
        # Above the cutoff the floor alone makes every block definite, and nothing is cut off.
        definite = bool(gamma > cutoff)
        total, cross = jnp.zeros((n, n), dtype), jnp.zeros((seen, n), dtype)
        for index in patch_blocks(patch_labels(self.image_shape, patch_size)):
            if index.shape[1] < n:
                for x in self._thin(index, unseen):
                    total, cross = _add_thin(total, cross, x, n, gamma, cutoff, definite)
            else:
                for pixels in index:
                    gram = jnp.zeros((n + seen, n), dtype)
                    for x in self.columns(pixels, unseen):
                        gram = _add_gram(gram, x, n)
                    total, cross = _add_wide(total, cross, gram, gamma, cutoff, definite)
        weights = jnp.asarray(self.z * np.sqrt(self.s / self.raw), dtype)
        p = jnp.dot(weights.T, jnp.dot(total, weights, precision=_HIGHEST), precision=_HIGHEST)
        return (p + p.T) / 2, jnp.dot(cross, weights, precision=_HIGHEST) / math.sqrt(n)

    def hold_out(self, unseen: Samples) -> HeldOutRows:
        """Held-out samples in the coordinates of encoders in the span of the samples: diag(s)^-1/2 U^T x.

        These are the encoders without a mask.

        Args:
            unseen: held-out samples.

        Returns:
            Their coordinates [n_ev, r] and groups. Cost: d n n_ev.

        Raises:
            InputError: the two data sets differ in image shape or targets, or a group is empty.

        Example:
            >>> x = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1)).astype(np.uint8)
            >>> train, test = (Samples.from_arrays(part, np.arange(4) % 2) for part in (x[:4], x[4:]))
            >>> factorize_samples(train).hold_out(test).rows.shape
            (4, 3)
        """
        check_projection(unseen, self.image_shape, len(self.syy))
        n = self.count
        with solve_context(self.dtype):
            gram = jnp.zeros((n + unseen.count, n), self.dtype)
            for x in self.columns(np.arange(self.samples.num_pixels), unseen):
                gram = _add_gram(gram, x, n)
            weights = jnp.asarray(self.z / np.sqrt(n * self.raw * self.s), self.dtype)
            return self._held_out(unseen, np.asarray(jnp.dot(gram[n:], weights, precision=_HIGHEST)))

    def masked(
        self, patch_size: PatchSize, rho: float, unseen: Samples | None, held: HeldOutRows | None = None
    ) -> tuple[PatchBasis, HeldOutRows | None]:
        """The basis of one patch size and the held-out samples in its coordinates, in one pass over the pixels.

        A masked encoder V = (D + rho I)^-1 R E diag(w / pi) B leaves the span of the samples, since masked images do.
        It sees a new image x in the coordinates E diag(1/pi) E^T R^T (D + rho I)^-1 x, which depend on the patch size.

        Args:
            patch_size: int or (h, w) in pixels.
            rho: sigma^2 / p, see :func:`mae_align.closed_form.basis.patch_basis`.
            unseen: held-out samples, or None.
            held: not looked at.

        Returns:
            The basis, and the held-out coordinates [n_ev, r] with their groups (None without held-out samples). Cost:
            d n (n + n_ev) + n d c, c pixel values in a patch, and one eigh of size r; memory n^2 + (n + n_ev) block.

        Raises:
            InputError: a bad patch size, an inert mask (:func:`check_patches`), held-out samples that do not match.

        Example:
            >>> x = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1)).astype(np.uint8)
            >>> train, test = (Samples.from_arrays(part, np.arange(4) % 2) for part in (x[:4], x[4:]))
            >>> basis, held = factorize_samples(train).masked(2, 0.0, test)
            >>> basis.pi.shape, held.rows.shape
            ((3,), (4, 3))
        """
        del held
        patch_grid(self.image_shape, patch_size)
        if unseen is not None:
            check_projection(unseen, self.image_shape, len(self.syy))
        with solve_context(self.dtype):
            p, cross = self.precisions(patch_size, rho, unseen)
            basis = jax.block_until_ready(basis_of(self, p))
            if unseen is None:
                return basis, None
            rows = jnp.dot(cross, basis.e, precision=_HIGHEST) / basis.pi[None, :]
            return basis, self._held_out(unseen, np.asarray(jnp.dot(rows, basis.e.T, precision=_HIGHEST)))

    def _held_out(self, unseen: Samples, rows: np.ndarray) -> HeldOutRows:
        """Held-out samples by their coordinates [n_ev, r]."""
        y = unseen.targets - self.mean_y
        share = np.zeros((unseen.num_groups, unseen.count))
        share[unseen.member, np.arange(unseen.count)] = 1.0 / unseen.count
        variance = share @ (y**2).sum(1)
        return HeldOutRows(*(np.asarray(a, self.dtype) for a in (rows, y, share, variance)))

    def columns(self, pixels: np.ndarray, unseen: Samples | None) -> Iterator[np.ndarray]:
        """Some pixel values at a time, about the training mean: [m, n + n_ev]."""
        for start in range(0, len(pixels), PIXELS_AT_ONCE):
            yield self._centred(pixels[start : start + PIXELS_AT_ONCE], unseen)

    def _thin(self, index: np.ndarray, unseen: Samples | None) -> Iterator[np.ndarray]:
        """Some patches [b, m] at a time: [b, m, n + n_ev]. Patches of zeros fill the last batch: one compilation."""
        batch = min(max(1, PIXELS_AT_ONCE // index.shape[1]), len(index))
        for start in range(0, len(index), batch):
            part = index[start : start + batch]
            x = self._centred(part.reshape(-1), unseen).reshape(*part.shape, -1)
            yield np.concatenate([x, np.zeros((batch - len(part), *x.shape[1:]), x.dtype)]) if len(part) < batch else x

    def _centred(self, pixels: np.ndarray, unseen: Samples | None) -> np.ndarray:
        """[m, n + n_ev] pixel values of the training samples and those of the held-out ones."""
        mean = self.mean_x[pixels]
        parts = [self.samples] if unseen is None else [self.samples, unseen]
        out = np.empty((len(pixels), sum(part.count for part in parts)), self.dtype)
        start = 0
        for part in parts:
            out[:, start : start + part.count] = (part.rows[:, pixels] - mean).T
            start += part.count
        return out


def factorize_samples(
    samples: Samples,
    *,
    pixel_noise: float | None = None,
    rtol: float | None = None,
    dtype: DType = "float64",
    target: TargetOperator | None = None,
) -> DualProblem:
    """Eigendecomposition of the samples' inner products, with the noise floor of the pixels.

    K0 = X X^T / n = Z diag(s0) Z^T, s0 > rtol * s_max; s = s0 + pixel_noise.

    Args:
        samples: of the training data.
        pixel_noise: as in :func:`mae_align.closed_form.factorize.factorize`, with the same defaults.
        rtol: relative cutoff of the spectrum; default max(n, d) * 2.2e-16 in float64, 1e-7 in float32. Directions below
            it (centring makes one) are rounding and are dropped.
        dtype: precision of later solves; the spectrum itself is always found in float64.
        target: W where W x is reconstructed instead of x.

    Returns:
        The factorised problem, rank at most n - 1 (n without centring).
        Cost: d n^2 + one eigh of size n; memory 56 n^2 bytes + n block.

    Raises:
        InputError: fewer than 2 samples, constant images, constant targets, a negative floor, not enough memory, a
            target operator that does not fit the images or leaves nothing of them.

    Example:
        >>> x = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 1)).astype(np.uint8)
        >>> problem = factorize_samples(Samples.from_arrays(x, np.arange(5) % 2))
        >>> problem.rank, round(problem.pixel_noise, 4)
        (4, 0.0833)
    """
    if target is not None:
        mapped(target, np.zeros((1, *samples.image_shape)))
    check_options(samples.count, pixel_noise, rtol, dtype)
    n, d = samples.count, samples.num_pixels
    check_memory(dual_bytes(n, d), f"the dual of {n} samples ({n} x {n})", "use fewer samples or smaller images")
    syy = samples.syy
    if rtol is None:
        rtol = default_rtol(max(n, d), dtype)
    gram = _gram(samples) / n
    check_variance(float(np.trace(gram)), float(np.trace(syy)))
    with solve_context("float64"):
        raw, z = (np.asarray(a) for a in eigh(gram))
    if pixel_noise is None:
        pixel_noise = default_floor(samples.pixel_dtype, samples.quantization_step, float(raw[-1]))
    keep = raw > rtol * raw[-1]
    raw, z = raw[keep][::-1].copy(), z[:, keep][:, ::-1].copy()
    s = raw + pixel_noise
    t0 = np.sqrt(raw / s / n)[:, None] * (z.T @ (samples.targets - samples.mean_y))
    return DualProblem(
        s=s.astype(dtype),
        t0=within_targets(t0, syy).astype(dtype),
        trace=float(np.trace(gram)) + d * float(pixel_noise),
        syy=syy,
        yty=samples.yty,
        mean_x=samples.mean_x,
        mean_y=samples.mean_y,
        count=n,
        pixel_noise=float(pixel_noise),
        rtol=rtol,
        image_shape=samples.image_shape,
        dtype=dtype,
        target=target,
        target_gram=None if target is None else _target_gram(target, samples, z * np.sqrt(s / raw)).astype(dtype),
        samples=samples,
        z=z,
        raw=raw,
    )


def check_patches(samples: Samples, patch_sizes: list[PatchSize]) -> None:
    """Refuse masks that cannot change anything: without any noise, patches that each fit the samples exactly.

    With at least n - 1 pixel values in every patch, X_b (X_b^T X_b)^+ X_b^T is the identity on n centred samples for
    every patch b: P is a multiple of the identity, and every mask ratio gives PCA.

    Args:
        samples: of the training data.
        patch_sizes: int or (h, w) in pixels, of more than one patch.

    Raises:
        InputError: such a patch size.

    Example:
        >>> check_patches(Samples.from_arrays(np.eye(9).reshape(9, 3, 3, 1), np.arange(9) % 2), [1])
    """
    free = samples.count - samples.center
    for size in patch_sizes:
        blocks = patch_blocks(patch_labels(samples.image_shape, size))
        least = min(index.shape[1] for index in blocks)
        if least >= free and (len(blocks) > 1 or len(blocks[0]) > 1):
            raise InputError(
                f"patch size {size}: each patch has at least {least} pixel values and fits {samples.count} samples "
                "exactly, so that without pixel noise masking is identically inert: use smaller patches, more samples, "
                "or a positive pixel_noise"
            )


def _gram(samples: Samples) -> np.ndarray:
    """[n, n] X X^T of the centred samples, float64; its products are exact for 8-bit images."""
    n, d = samples.count, samples.num_pixels
    gram = np.zeros((n, n))
    if samples.pixel_dtype != "uint8":
        mean = samples.mean_x
        for start in range(0, d, PIXELS_AT_ONCE):
            x = samples.rows[:, start : start + PIXELS_AT_ONCE] - mean[start : start + PIXELS_AT_ONCE]
            gram += x @ x.T
        return gram
    pivot = 128.0 if samples.center else 0.0
    low = np.float32 if samples.center else np.float64  # products of 255 do not fit
    for start in range(0, d, _EXACT_PIXELS):
        x = samples.rows[:, start : start + _EXACT_PIXELS].astype(low) - low(pivot)
        gram += x @ x.T
    if samples.center:
        # Double centring of integers: the rounding is that of the last division.
        row = gram.sum(1)
        gram = (n * n * gram - n * (row[:, None] + row) + row.sum()) / (n * n)
    return gram


def _target_gram(target: TargetOperator, samples: Samples, weights: np.ndarray) -> np.ndarray:
    """R^T W^T W R [r, r] with R = X^T weights / sqrt n; W is applied to a block of samples at a time."""
    n, mean = samples.count, samples.mean_x

    def rows(start: int) -> np.ndarray:
        x = samples.rows[start : start + step] - mean
        return mapped(target, x.reshape(-1, *samples.image_shape))

    step = max(1, min(n, _TARGET_PIXELS // samples.num_pixels))
    gram, variance = np.zeros((n, n)), 0.0
    # Every pair of blocks once: W is applied anew rather than W x of all samples kept.
    for i in range(0, n, step):
        first = rows(i)
        variance += float(((samples.rows[i : i + step] - mean) ** 2).sum())
        for j in range(i, n, step):
            second = first if j == i else rows(j)
            gram[i : i + step, j : j + step] = first @ second.T
            gram[j : j + step, i : i + step] = gram[i : i + step, j : j + step].T
    check_something_left(target, float(gram.trace()), variance)
    return weights.T @ (gram / n) @ weights


def _inverse_root(block: jax.Array, gamma: jax.Array, cutoff: jax.Array, *, definite: bool) -> jax.Array:
    """W [..., m, m] with W^T W = (block + gamma I)^-1; on the range of a block that is singular."""
    m = block.shape[-1]
    if definite:
        eye = jnp.broadcast_to(jnp.eye(m, dtype=block.dtype), block.shape)
        lower = jnp.linalg.cholesky(block + gamma * eye)
        return solve_triangular(lower, eye, lower=True)
    values, vectors = jnp.linalg.eigh(block)
    real = values + gamma > cutoff
    inverse = jnp.where(real, 1.0 / jnp.where(real, values + gamma, 1.0), 0.0)
    return jnp.sqrt(inverse)[..., :, None] * jnp.swapaxes(vectors, -1, -2)


@partial(jax.jit, static_argnames=("n", "definite"), donate_argnums=(0, 1))
def _add_thin(
    total: jax.Array, cross: jax.Array, x: jax.Array, n: int, gamma: jax.Array, cutoff: jax.Array, definite: bool
) -> tuple[jax.Array, jax.Array]:
    """Add patches [b, m, n + n_ev] of fewer pixels than samples, by their pixels' m x m problems."""
    seen = x[:, :, :n]
    block = jnp.einsum("bin,bjn->bij", seen, seen, precision=_HIGHEST) / n
    root = _inverse_root(block, gamma, cutoff, definite=definite)
    half = jnp.einsum("bij,bjn->bin", root, x, precision=_HIGHEST).reshape(-1, x.shape[2])
    left = half[:, :n]
    total = total + jnp.dot(left.T, left, precision=_HIGHEST) / n
    return total, cross + jnp.dot(half[:, n:].T, left, precision=_HIGHEST)


@partial(jax.jit, static_argnames="definite", donate_argnums=(0, 1))
def _add_wide(
    total: jax.Array, cross: jax.Array, gram: jax.Array, gamma: jax.Array, cutoff: jax.Array, definite: bool
) -> tuple[jax.Array, jax.Array]:
    """Add one patch of at least as many pixels as samples, by the n x n problem of X_b X_b^T (rows [n + n_ev, n])."""
    n = gram.shape[1]
    block = gram[:n] / n
    if definite:
        lower = jnp.linalg.cholesky(block + gamma * jnp.eye(n, dtype=gram.dtype))
        solved = cho_solve((lower, True), gram.T).T
    else:
        root = _inverse_root(block, gamma, cutoff, definite=False)
        solved = jnp.dot(jnp.dot(gram, root.T, precision=_HIGHEST), root, precision=_HIGHEST)
    return total + solved[:n] / n, cross + solved[n:]


@partial(jax.jit, static_argnames="n", donate_argnums=0)
def _add_gram(gram: jax.Array, x: jax.Array, n: int) -> jax.Array:
    """Inner products of all samples [n + n_ev] with the training samples [n] over some pixels [m, n + n_ev]."""
    return gram + jnp.dot(x.T, x[:, :n], precision=_HIGHEST)
