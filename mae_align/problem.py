"""What the primal and the dual factorisation have in common: the problem that every sweep takes, and its defaults."""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import jax
import numpy as np

from mae_align.errors import InputError
from mae_align.patches import ImageShape, PatchSize
from mae_align.targets import TargetOperator

DType = Literal["float64", "float32"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Factorized(abc.ABC):
    """The factorised problem, all that sweeps need: the spectrum of S and the targets in its whitened coordinates.

    Attributes:
        s: [r] eigenvalues of S above the cutoff, descending, squared pixel units.
        t0: [r, q] diag(s)^-1/2 U^T Sxy.
        trace: tr S, floor of every pixel included.
        syy: [q, q] target covariance. yty: [q, q] uncentred target second moment.
        mean_x: [d]. mean_y: [q]. count: number of samples n.
        pixel_noise: variance added to the diagonal of cov(x), squared pixel units.
        rtol: eigenvalues at or below rtol * s_max count as zero.
        image_shape: (h, w, c).
        dtype: precision of the solves.
        target: W where W x is reconstructed; None for the image itself.
        target_gram: [r, r] R^T W^T W R, which takes the place of diag(s); None without W.
    """

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
        """[r, r] P = R^T (D + rho I)^-1 R, inside :func:`mae_align.devices.solve_context`."""

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
