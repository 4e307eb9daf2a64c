"""Masks that are not exchangeable over patches: given by probabilities, by a list of masks, or by random rectangles.

A 0-1 mask delta, drawn independently of the image, has keep probabilities m_i = P(delta_i = 1) per pixel value and
M_ij = P(delta_i = delta_j = 1) per pair. With x' = delta * x and the mean image as fill::

    G = M * S (elementwise)      A = diag(m) S
"""

from __future__ import annotations

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.corruption.base import (
    CleanImages,
    CorruptionMoments,
    ExactCorruption,
    Fill,
    dropped_replaced,
    fill_offset,
    frozen_fill,
    independent_pairs,
    over_pixels,
    push_mask,
)
from mae_align.data.patches import ImageShape, PatchSize, patch_grid, patch_hw, patch_labels
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class ProbabilityMask(ExactCorruption):
    """A random mask of pixel values, known by its keep probabilities of first and second order.

    Attributes:
        fill: value of a dropped pixel, a number or an array [h, w, c] in the units of the stored pixels; None for the
            mean image.
    """

    fill: Fill = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fill", frozen_fill(self.fill))

    @abc.abstractmethod
    def probabilities(self, image_shape: ImageShape) -> tuple[np.ndarray, np.ndarray]:
        """Keep probabilities m [d] of pixel values and M [d, d] of pairs, float64."""

    @abc.abstractmethod
    def sample_mask(self, key: jax.Array, batch: int, image_shape: ImageShape) -> jax.Array:
        """[batch, h, w, c or 1] bool: which pixel values are kept."""

    def push(self, before: CorruptionMoments, clean: CleanImages) -> CorruptionMoments:
        """G = M * gram + cov(delta) * c c^T, A = diag(m) cross, c = fill - E[x'] (0 for the mean image).

        Cost d^2 and that of the probabilities.
        """
        return push_mask(before, *self.probabilities(clean.image_shape), fill_offset(self.fill, before, clean))

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        """Replace dropped pixels by the fill."""
        batch, height, width, channels = images.shape
        kept = self.sample_mask(key, batch, (height, width, channels))
        return dropped_replaced(images, kept, self.fill, fill)


@dataclasses.dataclass(frozen=True, eq=False)
class PixelMasking(ProbabilityMask):
    """Any mask, given by its keep probabilities; it has exact moments but no sampler.

    Probabilities of pairs do not determine a distribution of masks: :class:`MaskMixture` takes the masks themselves.

    Attributes:
        keep: m, [h, w, c], or [h, w] where all channels are kept or dropped together.
        pair: M [d, d] over pixel values, or [h w, h w] over pixels with ``keep`` [h, w]. None: independent entries of
            ``keep``, M_ij = m_i m_j for i != j.

    Raises:
        InputError: wrong shapes, values outside [0, 1], M not symmetric, its diagonal not m, a pair outside the Frechet
            bounds max(0, m_i + m_j - 1) <= M_ij <= min(m_i, m_j), or a covariance M - m m^T that is not positive
            semidefinite (so that M is not either, or no random mask has these moments).

    Example:
        >>> PixelMasking(np.full((2, 2), 0.5)).probabilities((2, 2, 1))[1][0].tolist()
        [0.5, 0.25, 0.25, 0.25]
    """

    keep: np.ndarray
    pair: np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        keep = np.asarray(self.keep, np.float64)
        if keep.ndim not in (2, 3):
            raise InputError(f"keep has shape {list(keep.shape)}: give probabilities [h, w] or [h, w, c]")
        if not ((keep >= 0) & (keep <= 1)).all():
            raise InputError("keep holds values outside [0, 1]: give the probability that each pixel is kept")
        if not keep.any():
            raise InputError("keep is 0 everywhere: at least one pixel must be kept now and then")
        flat = keep.reshape(-1)
        if self.pair is None:
            pair = independent_pairs(flat)
        else:
            pair = np.array(self.pair, np.float64)
            _check_pairs(flat, pair)
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "pair", pair)

    def probabilities(self, image_shape: ImageShape) -> tuple[np.ndarray, np.ndarray]:
        """The probabilities given, spread over channels where they are per pixel.

        Raises:
            InputError: images of another shape.
        """
        keep, pair = self.keep, np.asarray(self.pair)
        if keep.shape not in (tuple(image_shape), tuple(image_shape[:2])):
            raise InputError(f"keep has shape {list(keep.shape)}, the image {list(image_shape)}: give one shape")
        if keep.ndim == 3:
            return keep.reshape(-1), pair
        pixel = np.repeat(np.arange(keep.size), image_shape[2])
        return keep.reshape(-1)[pixel], pair[pixel[:, None], pixel]

    def check(self, image_shape: ImageShape) -> None:
        """Refuse images of another shape than the probabilities'."""
        self.probabilities(image_shape)

    def sample_mask(self, key: jax.Array, batch: int, image_shape: ImageShape) -> jax.Array:
        """There is none.

        Raises:
            InputError: always.
        """
        raise InputError(
            "keep probabilities of pairs do not say how to draw masks: give the masks themselves to MaskMixture"
        )


def _check_pairs(keep: np.ndarray, pair: np.ndarray) -> None:
    """Refuse probabilities of pairs that no random mask has."""
    if pair.shape != (len(keep), len(keep)):
        raise InputError(f"pair has shape {list(pair.shape)}: {len(keep)} keep probabilities need [{len(keep)}] * 2")
    if not np.isfinite(pair).all() or np.abs(pair - pair.T).max() > 1e-12:
        raise InputError("pair is not a symmetric matrix of finite numbers: M_ij = M_ji = P(i and j both kept)")
    slack = 1e-9
    if np.abs(np.diag(pair) - keep).max() > slack:
        raise InputError("the diagonal of pair is not keep: M_ii = P(i kept)")
    low = np.maximum(0.0, keep[:, None] + keep - 1.0)
    high = np.minimum(keep[:, None], keep)
    outside = np.argwhere((pair < low - slack) | (pair > high + slack))
    if len(outside):
        i, j = outside[0]
        raise InputError(
            f"pair[{i}, {j}] = {pair[i, j]:g} is impossible: with keep {keep[i]:g} and {keep[j]:g} it lies between "
            f"{low[i, j]:g} and {high[i, j]:g}"
        )
    # E[delta delta^T] - m m^T is a covariance; it being positive semidefinite implies the same of M.
    if np.linalg.eigvalsh(pair - keep[:, None] * keep)[0] < -slack * len(keep):
        raise InputError(
            "pair is not positive semidefinite after taking off keep keep^T: no random mask has these moments"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class MaskMixture(ProbabilityMask):
    """One of finitely many masks, drawn per image: exact probabilities and a sampler.

    m = sum_j weight_j mask_j, M = sum_j weight_j mask_j mask_j^T.

    Attributes:
        masks: [j, h, w] or [j, h, w, c] bool, True where a pixel is kept.
        weights: [j] probabilities, or positive numbers in proportion; None for equal ones.

    Raises:
        InputError: wrong shapes, weights that are negative or all 0, or no pixel that is ever kept.

    Example:
        >>> left = np.array([[True, False], [True, False]])
        >>> MaskMixture(np.stack([left, ~left])).probabilities((2, 2, 1))[1].tolist()[0]
        [0.5, 0.0, 0.5, 0.0]
    """

    masks: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        masks = np.asarray(self.masks)
        if masks.ndim not in (3, 4) or masks.dtype != bool or masks.size == 0:
            raise InputError(
                f"masks of shape {list(masks.shape)} and dtype {masks.dtype}: give bool [j, h, w] or [j, h, w, c]"
            )
        weights = np.ones(len(masks)) if self.weights is None else np.asarray(self.weights, np.float64)
        if weights.shape != (len(masks),) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise InputError(f"weights: give {len(masks)} probabilities, one per mask, at least 0 and not all 0")
        if not masks[weights > 0].any():
            raise InputError("no mask keeps a pixel: at least one pixel must be kept now and then")
        object.__setattr__(self, "masks", masks if masks.ndim == 4 else masks[..., None])
        object.__setattr__(self, "weights", weights / weights.sum())

    def _fitting(self, image_shape: ImageShape) -> np.ndarray:
        """The masks, refused where they do not fit the image."""
        if self.masks.shape[1:3] != tuple(image_shape[:2]) or self.masks.shape[3] not in (1, image_shape[2]):
            raise InputError(
                f"masks have shape {list(self.masks.shape)}, the image {list(image_shape)}: give one shape"
            )
        return self.masks

    def probabilities(self, image_shape: ImageShape) -> tuple[np.ndarray, np.ndarray]:
        """The weighted sums over all masks. Cost j d^2.

        Raises:
            InputError: images of another shape.
        """
        masks = np.broadcast_to(self._fitting(image_shape), (len(self.masks), *image_shape))
        on, weights = masks.reshape(len(masks), -1).astype(np.float64), np.asarray(self.weights)
        return weights @ on, (on * weights[:, None]).T @ on

    def sample_mask(self, key: jax.Array, batch: int, image_shape: ImageShape) -> jax.Array:
        """One mask per image, [batch, h, w, c or 1] bool."""
        masks = self._fitting(image_shape)
        return jnp.asarray(masks)[_draw(key, np.asarray(self.weights), (batch,))]


@dataclasses.dataclass(frozen=True, eq=True)
class BlockMasking(ProbabilityMask):
    """Random rectangles are dropped, several per image, on the grid of patches (the target blocks of I-JEPA).

    Every block draws its own size and place: area s N and height over width a with s and a uniform, N the number of
    cells of the grid; height sqrt(s a N) and width sqrt(s N / a), rounded and cut to the grid; then one of all places
    inside the grid, each equally likely. Blocks are independent and may overlap, so::

        M_ij = P(one block covers neither i nor j)^num_blocks

    Both the sizes' distribution (an integral over s and a) and the places are summed exactly. I-JEPA itself draws one
    size for all blocks of a batch; the probabilities of one block are the same.

    Attributes:
        num_blocks: at least 1.
        scale: range of s, in (0, 1].
        aspect: range of a, positive.
        patch_size: int or (h, w) in pixels, the cells of the grid; 1 for pixels.

    Raises:
        InputError: ranges out of order or out of bounds; blocks that always cover the whole image.

    Example:
        >>> BlockMasking(1, (0.25, 0.25), (1.0, 1.0), patch_size=2).probabilities((4, 4, 1))[0][0]
        np.float64(0.75)
    """

    num_blocks: int = 4
    scale: tuple[float, float] = (0.15, 0.2)
    aspect: tuple[float, float] = (0.75, 1.5)
    patch_size: PatchSize = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        patch_hw(self.patch_size)
        if not isinstance(self.num_blocks, int | np.integer) or self.num_blocks < 1:
            raise InputError(f"num_blocks={self.num_blocks}: give a whole number of at least 1")
        for name, most in (("scale", 1.0), ("aspect", 1000.0)):
            pair = getattr(self, name)
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and 0 < pair[0] <= pair[1] <= most):
                raise InputError(f"{name}={pair}: give (low, high) with 0 < low <= high <= {most:g}")
            object.__setattr__(self, name, (float(pair[0]), float(pair[1])))

    def sizes(self, image_shape: ImageShape) -> tuple[np.ndarray, np.ndarray]:
        """Sizes of one block and their probabilities.

        Returns:
            [j, 2] heights and widths in cells, and [j] probabilities that add up to 1.

        Example:
            >>> BlockMasking(1, (0.25, 0.25), (1.0, 1.0)).sizes((4, 6, 1))[0].tolist()
            [[2, 2]]
        """
        down, across = patch_grid(image_shape, self.patch_size)
        (s0, s1), (a0, a1), cells = self.scale, self.aspect, down * across
        heights = _around(math.sqrt(s0 * a0 * cells), math.sqrt(s1 * a1 * cells), down)
        widths = _around(math.sqrt(s0 / a1 * cells), math.sqrt(s1 / a0 * cells), across)
        found = {
            (h, w): p
            for h in heights
            for w in widths
            if (p := _size_probability(h, w, down, across, self.scale, self.aspect)) > 1e-15
        }
        chance = np.array(list(found.values()))
        return np.array(list(found)), chance / chance.sum()

    def probabilities(self, image_shape: ImageShape) -> tuple[np.ndarray, np.ndarray]:
        """Exact probabilities, summed over sizes and places. Cost: sizes times the square of the number of cells.

        Raises:
            InputError: blocks that always cover everything; a patch larger than the image.
        """
        down, across = patch_grid(image_shape, self.patch_size)
        both = np.zeros((down * across, down * across))
        for (h, w), chance in zip(*self.sizes(image_shape), strict=True):
            both += chance * np.kron(_covered(down, h), _covered(across, w))
        one = np.diag(both)
        pair = np.maximum(1.0 - one[:, None] - one + both, 0.0) ** self.num_blocks
        keep = np.diag(pair).copy()
        if not keep.max() > 1e-12:
            raise InputError("the blocks always cover the whole image: lower scale or num_blocks")
        label = patch_labels(image_shape, self.patch_size)
        return keep[label], pair[label[:, None], label]

    def check(self, image_shape: ImageShape) -> None:
        """Refuse blocks that always cover these images.

        Raises:
            InputError: see above, and a patch larger than the image.
        """
        self.probabilities(image_shape)

    def sample_mask(self, key: jax.Array, batch: int, image_shape: ImageShape) -> jax.Array:
        """Blocks of random size and place, [batch, h, w, 1] bool."""
        down, across = patch_grid(image_shape, self.patch_size)
        sizes, chance = self.sizes(image_shape)
        key_size, key_place = jax.random.split(key)
        size = jnp.asarray(sizes, jnp.int32)[_draw(key_size, chance, (batch, self.num_blocks))]
        free = jnp.array([down, across], jnp.int32)[None, None] - size + 1
        place = jax.random.uniform(key_place, size.shape, jnp.float32)
        start = jnp.minimum((place * free).astype(jnp.int32), free - 1)
        inside = [
            (cell[None, None] >= start[..., i, None]) & (cell[None, None] < (start + size)[..., i, None])
            for i, cell in enumerate((jnp.arange(down), jnp.arange(across)))
        ]
        kept = ~(inside[0][..., :, None] & inside[1][..., None, :]).any(1)
        return over_pixels(kept, image_shape, self.patch_size)


def _draw(key: jax.Array, chance: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Indices with these probabilities, by inversion."""
    edges = jnp.asarray(np.cumsum(chance)[:-1], jnp.float32)
    return jnp.searchsorted(edges, jax.random.uniform(key, shape, jnp.float32), side="right")


def _around(low: float, high: float, most: int) -> range:
    """Whole numbers from 1 to ``most`` that lengths from low to high may round or be cut to."""
    return range(min(max(math.floor(low), 1), most), min(max(math.ceil(high), 1), most) + 1)


def _covered(cells: int, length: int) -> np.ndarray:
    """[cells, cells] share of the places of an interval that cover both of two cells."""
    starts = np.arange(cells - length + 1)
    inside = (np.arange(cells) >= starts[:, None]) & (np.arange(cells) < starts[:, None] + length)
    return inside.T.astype(np.float64) @ inside / len(starts)


def _size_probability(
    h: int, w: int, down: int, across: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> float:
    """P(height = h and width = w) after rounding and cutting to the grid, s and a uniform.

    For one a the condition on s is an interval with ends c, c a or c / a: between the points where two such ends cross
    the length is smooth and Gauss-Legendre quadrature is exact to rounding.
    """
    cells = down * across
    # sqrt(s a N) in [h - 1/2, h + 1/2), open at the ends of the grid because larger blocks are cut, smaller ones are 1.
    high_h = math.inf if h == down else (h + 0.5) ** 2 / cells
    low_h = 0.0 if h == 1 else (h - 0.5) ** 2 / cells
    high_w = math.inf if w == across else (w + 0.5) ** 2 / cells
    low_w = 0.0 if w == 1 else (w - 0.5) ** 2 / cells
    (s0, s1), (a0, a1) = scale, aspect

    def share(a: np.ndarray) -> np.ndarray:
        low, high = np.maximum(low_h / a, low_w * a), np.minimum(high_h / a, high_w * a)
        if s0 == s1:
            return ((low <= s0) & (s0 < high)).astype(np.float64)
        return np.maximum(np.minimum(high, s1) - np.maximum(low, s0), 0.0) / (s1 - s0)

    if a0 == a1:
        return float(share(np.array([a0]))[0])
    crossings = [
        math.sqrt(x / y) for x in (low_h, high_h) for y in (low_w, high_w) if 0 < y < math.inf and x < math.inf
    ]
    crossings += [x / s for x in (low_h, high_h) if x < math.inf for s in (s0, s1)]
    crossings += [s / x for x in (low_w, high_w) if 0 < x < math.inf for s in (s0, s1)]
    crossings += list(np.geomspace(a0, a1, 2 + math.ceil(math.log2(a1 / a0))))  # for the accuracy of 1 / a
    edges = np.array([a0, *sorted(a for a in crossings if a0 < a < a1), a1])
    nodes, weights = np.polynomial.legendre.leggauss(24)
    half = np.diff(edges)[:, None] / 2
    return float((half * weights * share(edges[:-1, None] + half * (nodes + 1))).sum() / (a1 - a0))
