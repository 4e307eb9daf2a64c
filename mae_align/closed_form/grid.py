"""The cells of a grid, checked before any work, and which of them share a solve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mae_align.closed_form.factorize import Factorized
from mae_align.corruption import PatchMask
from mae_align.data.patches import ImageShape, PatchSize, check_ratio, patch_grid, patch_hw
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class BasisKey:
    """Which basis a point is solved in.

    Attributes:
        patch_size: int or (h, w); None without a mask.
        noise: rho = sigma^2 / p with a mask, sigma^2 without.
    """

    patch_size: PatchSize | None
    noise: float

    @property
    def name(self) -> str:
        """File-name safe name.

        Example:
            >>> BasisKey(2, 0.0).name, BasisKey(None, 0.0).name
            ('patch2x2-rho0.0', 'pca-rho0.0')
        """
        size = "pca" if self.patch_size is None else "patch{}x{}".format(*patch_hw(self.patch_size))
        return f"{size}-rho{self.noise!r}"


@dataclasses.dataclass(frozen=True)
class GridPoint:
    """One cell of the grid.

    Attributes:
        index: position (patch_size, noise_level, mask_ratio, lam).
        basis: see :class:`BasisKey`.
        p_eff: effective drop probability.
        noise_variance: sigma^2.
        lam: weight of reconstruction in [0, inf].
        mask: the corruption.
    """

    index: tuple[int, int, int, int]
    basis: BasisKey
    p_eff: float
    noise_variance: float
    lam: float
    mask: PatchMask

    @property
    def key(self) -> str:
        """Name of the solve; cells with the same name have the same encoder."""
        return f"{self.basis.name}-p{self.p_eff!r}-lam{self.lam!r}"

    def weights(self, problem: Factorized) -> tuple[float, float, float]:
        """Weights (alpha, beta) of supervision and reconstruction, and the loss at k = 0 that scales both to shares.

        The loss at k = 0 is tr Syy + lam tr S, and tr S for lam = inf (tr W S W^T where W x is reconstructed).
        """
        trace_s, trace_y = problem.target_trace, float(problem.syy.trace())
        if math.isinf(self.lam):
            return 0.0, 1.0 / trace_s, trace_s
        total = trace_y + self.lam * trace_s
        return 1.0 / total, self.lam / total, total


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """A checked grid.

    Attributes:
        patch_sizes, noise_levels, mask_ratios, lambdas: the axes.
        masks: by patch size and ratio.
        image_shape: (h, w, c).
    """

    patch_sizes: tuple[PatchSize, ...]
    noise_levels: tuple[float, ...]
    mask_ratios: tuple[float, ...]
    lambdas: tuple[float, ...]
    masks: tuple[tuple[PatchMask, ...], ...]
    image_shape: ImageShape

    @classmethod
    def checked(
        cls,
        shape: ImageShape,
        patch_sizes: Sequence[PatchSize],
        noise_levels: Sequence[float],
        mask_ratios: Sequence[float],
        lambdas: Sequence[float],
        masking: type[PatchMask],
    ) -> GridSpec:
        """Refuse an empty or repeated axis and values out of range, before any work.

        Raises:
            InputError: see above.
        """
        axes = {
            "patch_sizes": patch_sizes,
            "noise_levels": noise_levels,
            "mask_ratios": mask_ratios,
            "lambdas": lambdas,
        }
        for name, values in axes.items():
            if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
                raise InputError(f"{name}={values!r}: give a list of values")
            if len(values) == 0:
                raise InputError(f"{name} is empty: give at least one value")
            if len({patch_hw(v) for v in values} if name == "patch_sizes" else set(values)) < len(values):
                raise InputError(f"{name} {list(values)} repeats a value: give each once")
        for ratio in mask_ratios:
            check_ratio(ratio)
        for sigma in noise_levels:
            if not (math.isfinite(sigma) and sigma >= 0):
                raise InputError(f"noise level {sigma}: give a standard deviation of at least 0")
        for lam in lambdas:
            if not lam >= 0:
                raise InputError(f"lambda {lam}: give a weight of at least 0 (inf for reconstruction alone)")
        for size in patch_sizes:
            patch_grid(shape, size)
        return cls(
            tuple(size if isinstance(size, int | np.integer) else patch_hw(size) for size in patch_sizes),
            tuple(float(v) for v in noise_levels),
            tuple(float(v) for v in mask_ratios),
            tuple(float(v) for v in lambdas),
            tuple(tuple(masking.from_ratio(size, r, shape) for r in mask_ratios) for size in patch_sizes),
            shape,
        )

    def points(self) -> list[GridPoint]:
        """Every cell of the grid; cells with the same encoder share a key."""
        cells = []
        for i, (size, masks) in enumerate(zip(self.patch_sizes, self.masks, strict=True)):
            for j, sigma in enumerate(self.noise_levels):
                for m, mask in enumerate(masks):
                    p = mask.p_eff(self.image_shape)
                    if p < np.finfo(np.float64).eps:
                        p = 0.0  # no different in float64, and rho = sigma^2 / p stays finite
                    noise = sigma**2
                    # Without a mask (or with one patch) every patch size is the same problem.
                    basis = BasisKey(None, noise) if p == 0.0 else BasisKey(size, noise / p)
                    for n, lam in enumerate(self.lambdas):
                        cells.append(GridPoint((i, j, m, n), basis, p, noise, lam, mask))
        return cells
