"""What the primal and the dual factorisation have in common: the problem that every sweep takes, and its defaults."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import solve_triangular

from mae_align.closed_form.basis import PatchBasis, patch_basis, pca_basis
from mae_align.closed_form.held_out import HeldOut, HeldOutRows, check_projection
from mae_align.closed_form.targets import TargetOperator, mapped, target_gram
from mae_align.data.patches import ImageShape, PatchSize, patch_labels
from mae_align.moments.moments import Moments
from mae_align.moments.sums import gram
from mae_align.runtime.devices import solve_context
from mae_align.runtime.errors import InputError
from mae_align.runtime.memory import check_memory, primal_bytes

DType = Literal["float64", "float32"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Factorized(abc.ABC):
    """The factorised problem, all that sweeps need: the spectrum of S and the targets in its whitened coordinates.

    Attributes:
        s: [r] eigenvalues of S above the cutoff, descending, squared pixel units.
        t0: [r, q] diag(s)^-1/2 U^T Sxy.
        trace: tr S, floor of every pixel included.
        syy: [q, q] target covariance.
        yty: [q, q] uncentred target second moment.
        mean_x: [d] mean image.
        mean_y: [q] mean target.
        count: number of samples n.
        pixel_noise: variance added to the diagonal of cov(x), squared pixel units.
        rtol: eigenvalues at or below rtol * s_max count as zero.
        image_shape: (h, w, c).
        dtype: precision of the solves.
        target: W where W x is reconstructed; None for the image itself.
        target_gram: [r, r] R^T W^T W R, which takes the place of diag(s); None without W.
    """

    kind: ClassVar[str]
    """How it was factorised, in results."""

    s: np.ndarray
    t0: np.ndarray
    trace: float
    syy: np.ndarray
    yty: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    count: int
    pixel_noise: float
    rtol: float
    image_shape: ImageShape
    dtype: DType
    target: TargetOperator | None = None
    target_gram: np.ndarray | None = None

    @property
    def target_trace(self) -> float:
        """Reconstruction error of the zero predictor, tr W S W^T (tr S without W), squared pixel units."""
        return self.trace if self.target_gram is None else float(self.target_gram.trace())

    @abc.abstractmethod
    def precision(self, patch_size: PatchSize, rho: float) -> jax.Array:
        """[r, r] P = R^T (D + rho I)^-1 R, inside :func:`mae_align.runtime.devices.solve_context`."""

    @abc.abstractmethod
    def hold_out(self, unseen: Any) -> HeldOut | HeldOutRows:
        """Held-out data, of the kind that the problem was made from, in coordinates without a mask."""

    @abc.abstractmethod
    def masked(self, patch_size: PatchSize, rho: float, unseen: Any, held: Any) -> tuple[PatchBasis, Any]:
        """The basis of a patch size, and the held-out data as its masked encoders see them.

        Args:
            patch_size: int or (h, w) in pixels.
            rho: sigma^2 / p for isotropic noise before the mask.
            unseen: held-out data, or None.
            held: the same in coordinates without a mask (:meth:`hold_out`), or None.
        """

    def coordinates(self, patch_size: PatchSize | None, noise: float, unseen: Any, held: Any) -> tuple[PatchBasis, Any]:
        """As :meth:`masked`; without a patch size the basis without a mask, ``noise`` being sigma^2."""
        if patch_size is None:
            return pca_basis(self, noise), held
        return self.masked(patch_size, noise, unseen, held)

    @property
    def spectrum(self) -> jax.Array:
        """[r] s, or [r, r] R^T W^T W R where W x is reconstructed, in the precision of the solves."""
        return jnp.asarray(self.s if self.target_gram is None else self.target_gram, self.dtype)

    @property
    def rank(self) -> int:
        """Numerical rank r of S; no more than r features can be told apart."""
        return len(self.s)

    @property
    def cutoff(self) -> float:
        """Variance at or below which a direction counts as empty."""
        return self.rtol * float(self.s[0])

    def check_k(self, k: int) -> int:
        """Refuse a number of features outside 1..rank.

        Raises:
            InputError: k outside 1..rank.
        """
        if not isinstance(k, int | np.integer) or not 1 <= k <= self.rank:
            raise InputError(
                f"k={k} is not a number of features up to the rank {self.rank} of these images: "
                f"ask for a whole number 1 <= k <= {self.rank}"
            )
        return int(k)


def check_options(count: int, pixel_noise: float | None, rtol: float | None, dtype: str) -> None:
    """Refuse options of a factorisation, or too few samples.

    Raises:
        InputError: fewer than 2 samples, a negative floor, a cutoff outside [0, 1), another precision.

    Example:
        >>> check_options(2, None, None, "float64")
    """
    if dtype not in ("float64", "float32"):
        raise InputError(f"dtype={dtype!r}: give 'float64' or 'float32'")
    if count < 2:
        raise InputError(f"moments of {count} samples: at least 2 are needed")
    if rtol is not None and not 0 <= rtol < 1:
        raise InputError(f"rtol={rtol}: give a relative cutoff from 0 up to, not including, 1")
    if pixel_noise is not None and not (np.isfinite(pixel_noise) and pixel_noise >= 0):
        raise InputError(f"pixel_noise={pixel_noise}: give a variance of at least 0")


def check_variance(trace_x: float, trace_y: float | None) -> None:
    """Refuse data with nothing to learn; ``trace_y`` is None where there are no targets.

    Raises:
        InputError: constant images or constant targets.

    Example:
        >>> check_variance(1.0, 1.0)
    """
    if trace_y is not None and not trace_y > 0:
        raise InputError("the targets are constant (one class?): there is nothing to explain")
    if not trace_x > 0:
        raise InputError("the images are constant: there is nothing to reconstruct")


def default_rtol(size: int, dtype: DType) -> float:
    """Relative cutoff of a spectrum: size * 2.2e-16 in float64, 1e-7 in float32.

    Example:
        >>> default_rtol(784, "float32")
        1e-07
    """
    return size * float(np.finfo(np.float64).eps) if dtype == "float64" else 1e-7


def default_floor(pixel_dtype: str, quantization_step: float, largest: float) -> float:
    """Variance of the measurement noise of a pixel: step^2 / 12 for 8-bit images, else tied to the largest eigenvalue.

    Example:
        >>> default_floor("float64", 0.0, 2.0)
        2e-09
    """
    # Products of float32 images are themselves rounded at about 1e-7 of the largest eigenvalue.
    return quantization_step**2 / 12 or (1e-7 if pixel_dtype == "float32" else 1e-9) * largest


def within_targets(t0: np.ndarray, syy: np.ndarray) -> np.ndarray:
    """Whitened targets [r, q] without what lies outside the range of the target covariance [q, q].

    Centred one-hot targets add up to zero; whitening must not blow that rounding up to a target of its own.

    Example:
        >>> within_targets(np.array([[1.0, 1e-9]]), np.diag([1.0, 0.0])).tolist()
        [[1.0, 0.0]]
    """
    variance, axes = np.linalg.eigh(syy)
    largest = variance.max(initial=0.0)  # without targets there is none
    axes = axes[:, variance > len(variance) * np.finfo(np.float64).eps * largest].astype(t0.dtype)
    return t0 @ axes @ axes.T


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PrimalProblem(Factorized):
    """The problem factorised from second moments: S = U diag(s) U^T with U at hand.

    Attributes:
        u: [d, r] eigenvectors.
        sxx: [d, d] S itself, floor included.
    """

    kind: ClassVar[str] = "primal"

    u: np.ndarray
    sxx: np.ndarray

    @property
    def root(self) -> np.ndarray:
        """[d, r] R = U diag(sqrt s)."""
        return self.u * np.sqrt(self.s)

    def precision(self, patch_size: PatchSize, rho: float) -> jax.Array:
        """[r, r] P = R^T (D + rho I)^-1 R. Cost d r^2 + the blocks' eigendecompositions."""
        dtype = np.dtype(self.dtype)
        root = jnp.asarray(self.root, dtype)
        p = jnp.zeros((self.rank, self.rank), dtype)
        for index in patch_blocks(patch_labels(self.image_shape, patch_size)):
            block = np.ascontiguousarray(self.sxx[index[:, :, None], index[:, None, :]], dtype)
            p = _add_precision(p, root, index, block, dtype.type(rho), dtype.type(self.cutoff))
        return p

    def hold_out(self, unseen: Moments) -> HeldOut:
        """Held-out moments, taken about the training means, in coordinates without a mask: diag(s)^-1/2 U^T x.

        Args:
            unseen: of the held-out data, grouped for standard errors.

        Returns:
            The projected moments. Cost: g d^2 r; memory 4 g r^2 bytes.

        Raises:
            InputError: the two data sets differ in image shape or targets, or a group is empty.

        Example:
            >>> x, y = np.random.default_rng(0).normal(size=(60, 2, 2, 1)), np.arange(60) % 2
            >>> train, test = Moments.from_arrays(x[:40], y[:40]), Moments.from_arrays(x[40:], y[40:], groups=2)
            >>> factorize(train).hold_out(test).group_gram.shape
            (2, 4, 4)
        """
        return self._projected(self.u / np.sqrt(self.s), unseen)

    def masked(
        self, patch_size: PatchSize, rho: float, unseen: Moments | None, held: HeldOut | None
    ) -> tuple[PatchBasis, HeldOut | None]:
        """As :meth:`Factorized.masked`; at full rank masked encoders see held-out images as those without a mask do.

        Where S is singular (rank under d) a masked encoder V = (D + rho I)^-1 R E diag(w / pi) B leaves the range of
        S, since masked images do: x has the coordinates E diag(1/pi) E^T R^T (D + rho I)^-1 x. Cost: g d^2 r.
        """
        basis = patch_basis(self, patch_size, rho)
        if unseen is None or self.rank == unseen.num_pixels:
            return basis, held
        with solve_context(self.dtype):
            e, pi = np.asarray(basis.e), np.asarray(basis.pi)
            whiten = ((self.solved_root(patch_size, rho) @ e) / pi) @ e.T
            return basis, jax.device_put(self._projected(whiten, unseen))

    def hold_out_encoder(self, encoder: np.ndarray, q: np.ndarray, unseen: Moments) -> HeldOut:
        """Held-out moments in the coordinates of an encoder's own features, which may leave the range of a singular S.

        With R^T V = Q B, V B^-1 are the features that are orthonormal on the training data.

        Args:
            encoder: [d, k] V.
            q: [r, k] Q, nested; a column is 0 where its feature adds nothing.
            unseen: of the held-out data.

        Returns:
            The projected moments, [k, k] in place of [r, r]: to be used with f = I. Cost: g d^2 k.

        Raises:
            InputError: as :meth:`hold_out`.

        Example:
            >>> m = Moments.from_arrays(np.random.default_rng(0).normal(size=(60, 2, 2, 1)), np.arange(60) % 2)
            >>> problem = factorize(m, pixel_noise=0.0)
            >>> held = problem.hold_out_encoder(problem.u, np.eye(4), m)
            >>> bool(np.allclose(held.gram, np.eye(4)))
            True
        """
        real = q.any(0)
        triangle = q[:, real].T @ (self.root.T @ encoder[:, real])
        whiten = np.zeros(encoder.shape)
        whiten[:, real] = solve_triangular(triangle, encoder[:, real].T, trans=1).T
        return self._projected(whiten, unseen)

    def _projected(self, whiten: np.ndarray, unseen: Moments) -> HeldOut:
        """Held-out moments of whiten^T x, whiten [d, r]."""
        check_projection(unseen, self.image_shape, len(self.syy))
        n, r, g = unseen.count, whiten.shape[1], len(unseen.counts)
        gram, cross = np.zeros((r, r), whiten.dtype), np.zeros((r, self.syy.shape[0]), whiten.dtype)
        group_gram, group_cross = np.zeros((g, r, r), np.float32), np.zeros((g, *cross.shape), whiten.dtype)
        group_variance = np.zeros(g, whiten.dtype)
        for i, part in enumerate(unseen.groups_about(self.mean_x, self.mean_y)):
            share = part.count / n
            part_gram = share * (whiten.T @ (part.sxx.astype(whiten.dtype) @ whiten))
            group_cross[i] = share * (whiten.T @ part.sxy)
            group_variance[i] = share * np.trace(part.syy)
            gram += part_gram
            cross += group_cross[i]
            group_gram[i] = part_gram
        return HeldOut(gram, cross, group_variance.sum(), group_gram, group_cross, group_variance)

    def solved_root(self, patch_size: PatchSize, rho: float) -> np.ndarray:
        """[d, r] (D + rho I)^-1 R, inside :func:`solve_context`. Cost d c r, c pixels in a patch."""
        dtype = np.dtype(self.dtype)
        out, root = np.empty(self.u.shape, dtype), self.root.astype(dtype)
        for index in patch_blocks(patch_labels(self.image_shape, patch_size)):
            block = np.ascontiguousarray(self.sxx[index[:, :, None], index[:, None, :]], dtype)
            out[index] = _solve_blocks(root, index, block, dtype.type(rho), dtype.type(self.cutoff))
        return out


def factorize(
    moments: Moments,
    *,
    pixel_noise: float | None = None,
    rtol: float | None = None,
    dtype: DType = "float64",
    target: TargetOperator | None = None,
) -> PrimalProblem:
    """Eigendecomposition of the pixel covariance with its noise floor.

    S = cov(x) + pixel_noise I = U diag(s) U^T, s > rtol * s_max.

    Args:
        moments: of the training data, [d, d] and [d, q].
        pixel_noise: variance of the measurement noise of one pixel, squared units of the stored pixels. Default:
            quantisation step^2 / 12 for 8-bit images, 1e-9 of the largest eigenvalue for float64
            images (1e-7 for float32). 0 for no floor.
        rtol: relative cutoff of the spectrum; default d * 2.2e-16 in float64, 1e-7 in float32.
        dtype: precision of this and all later solves ("float32" loses rank and accuracy).
        target: W where W x is reconstructed instead of x.

    Returns:
        The factorised problem. Cost: one eigh of size d; memory about 56 d^2 bytes.

    Raises:
        InputError: fewer than 2 samples, constant images, constant targets, a negative floor, not enough memory, a
            target operator that does not fit the images or leaves nothing of them, or samples in place of moments
            (see :func:`mae_align.closed_form.dual.factorize_samples`).

    Example:
        >>> x = np.random.default_rng(0).integers(0, 256, (50, 3, 3, 1)).astype(np.uint8)
        >>> f = factorize(Moments.from_arrays(x, np.arange(50) % 2))
        >>> f.rank, round(f.pixel_noise, 4)
        (9, 0.0833)
    """
    if not isinstance(moments, Moments):
        raise InputError(
            f"this needs second moments [d, d], not {type(moments).__name__}: make them with Moments.from_arrays"
        )
    if target is not None:
        mapped(target, np.zeros((1, *moments.image_shape)))
    check_options(moments.count, pixel_noise, rtol, dtype)
    d = moments.num_pixels
    check_memory(primal_bytes(d), f"factorising second moments of {d} pixel values ({d} x {d})", "shrink the images")
    second = moments.second_moments()
    check_variance(float(np.trace(second.sxx)), float(np.trace(second.syy)) if second.syy.size else None)
    if rtol is None:
        rtol = default_rtol(d, dtype)
    with solve_context(dtype, alone=True):
        s, u = (np.asarray(a) for a in eigh(np.asarray(second.sxx, dtype)))
    if pixel_noise is None:
        pixel_noise = default_floor(moments.pixel_dtype, moments.quantization_step, float(s[-1]))
    s = s + s.dtype.type(pixel_noise)  # isotropic: the eigenvectors stay
    sxx = second.sxx + pixel_noise * np.eye(d)
    keep = s > rtol * s[-1]
    s, u = s[keep][::-1].copy(), u[:, keep][:, ::-1].copy()
    t0 = (u.T @ second.sxy.astype(u.dtype)) / np.sqrt(s)[:, None]
    return PrimalProblem(
        s=s,
        u=u,
        t0=within_targets(t0, second.syy),
        trace=float(np.trace(sxx)),
        sxx=sxx,
        syy=second.syy,
        yty=moments.yty,
        mean_x=moments.mean_x,
        mean_y=moments.mean_y,
        count=moments.count,
        pixel_noise=float(pixel_noise),
        rtol=rtol,
        image_shape=moments.image_shape,
        dtype=dtype,
        target=target,
        target_gram=None if target is None else target_gram(target, u * np.sqrt(s), moments.image_shape),
    )


def patch_blocks(labels: np.ndarray) -> list[np.ndarray]:
    """Pixel indices [blocks, pixels] of the patches, one array for each number of pixels (at most four).

    Example:
        >>> [index.tolist() for index in patch_blocks(patch_labels((1, 3, 1), (1, 2)))]
        [[[2]], [[0, 1]]]
    """
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    sizes = sorted({len(m) for m in members})
    return [np.stack([m for m in members if len(m) == size]) for size in sizes]


@jax.jit
def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [n], ascending, and eigenvectors [n, n] of a symmetric matrix, compiled."""
    values, vectors = jnp.linalg.eigh(a, symmetrize_input=False)
    return values, vectors


def _half_solve(
    root: jax.Array, index: jax.Array, block: jax.Array, rho: jax.Array, cutoff: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """W [b, m, m] with W W^T = (D_b + rho I)^-1, on the range of D_b, and W^T R_b [b, m, r]."""
    values, vectors = jnp.linalg.eigh(block)
    # Without noise a null direction of a block carries no variance: it is left out, not inverted.
    inverse = jnp.where(values + rho > cutoff, 1.0 / jnp.where(values + rho > cutoff, values + rho, 1.0), 0.0)
    scaled = vectors * jnp.sqrt(inverse)[:, None, :]
    return scaled, jnp.einsum("bij,bir->bjr", scaled, root[index], precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _add_precision(
    p: jax.Array, root: jax.Array, index: jax.Array, block: jax.Array, rho: jax.Array, cutoff: jax.Array
) -> jax.Array:
    """P + sum over blocks of R_b^T (D_b + rho I)^-1 R_b, in the blocks' own eigenbases."""
    return p + gram(_half_solve(root, index, block, rho, cutoff)[1].reshape(-1, root.shape[1]))


@jax.jit
def _solve_blocks(root: jax.Array, index: jax.Array, block: jax.Array, rho: jax.Array, cutoff: jax.Array) -> jax.Array:
    """[b, m, r] (D_b + rho I)^-1 R_b."""
    scaled, half = _half_solve(root, index, block, rho, cutoff)
    return jnp.einsum("bij,bjr->bir", scaled, half, precision=jax.lax.Precision.HIGHEST)
