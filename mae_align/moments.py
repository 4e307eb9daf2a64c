"""Second moments of images and targets: all the data that the linear theory needs.

The data is read once, here. Every closed form and every sweep works on the result, so their cost does not depend on
the number of samples. With rows as samples, ``x`` a flattened image (h, w, c order) and ``y`` a target row::

    Sxx = cov(x) [d, d]    Sxy = cov(x, y) [d, q]    Syy = cov(y) [q, q]

Sums are kept about a fixed *pivot*. For 8-bit images the pivot is 128: the products are integers, a batch of 1,024 sums
exactly in float32, and the moments come out bit-identical for every order, batch size and split of the data. For float
images the pivot is the mean, so that merging is the centred update of Chan, Golub & LeVeque (1983).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_align.checks import are_class_labels, check_images, check_targets
from mae_align.errors import InputError
from mae_align.products import add_upper, mirror_upper, upper_blocks

Batch = slice | np.ndarray
_SUMS = ("counts", "sum_x", "sum_y", "sum_xx", "sum_xy", "sum_yy")
_INT_PIVOT = 128.0
# |x - 128| <= 2^7, so 1,024 products of at most 2^14 stay within the 2^24 integers that float32 holds exactly.
_BATCH = 1024


class SecondMoments(NamedTuple):
    """Second moments of ``count`` samples about stated centres, as means over the samples.

    Attributes:
        count: number of samples.
        sxx: [d, d] mean of (x - a)(x - a)^T, squared pixel units.
        sxy: [d, q] mean of (x - a)(y - b)^T.
        syy: [q, q] mean of (y - b)(y - b)^T.
    """

    # Hides tuple.count, which nobody misses here.
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    sxx: np.ndarray
    sxy: np.ndarray
    syy: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mergeable second moments of a labelled image set, in ``groups`` groups (for standard errors).

    Build it with :meth:`from_arrays`; the raw sums below are its state.

    Attributes:
        image_shape: (h, w, c); d = h w c.
        pixel_dtype: dtype name of the pixels as they were given; moments of different dtypes do not merge.
        center: whether covariances (True) or moments about zero (False, the first published protocol) are reported.
        preprocessing: free description of what was done to the stored pixels before; part of the problem's identity.
        pivot_x: [d] point about which the x sums are kept.
        pivot_y: [q] likewise for targets.
        counts: [g] int64, samples per group.
        sum_x: [g, d]. sum_y: [g, q]. sum_xx: [g, d, d]. sum_xy: [g, d, q]. sum_yy: [g, q, q]. All float64.

    Memory: 8 g d^2 bytes.

    Example:
        >>> images = np.arange(48, dtype=np.uint8).reshape(4, 3, 4, 1)
        >>> m = Moments.from_arrays(images, np.array([0, 1, 0, 1]))
        >>> m.count, m.image_shape, m.sxx.shape, m.mean_y.tolist()
        (4, (3, 4, 1), (12, 12), [0.5, 0.5])
    """

    image_shape: tuple[int, int, int]
    pixel_dtype: str
    center: bool
    preprocessing: str
    pivot_x: np.ndarray
    pivot_y: np.ndarray
    counts: np.ndarray
    sum_x: np.ndarray
    sum_y: np.ndarray
    sum_xx: np.ndarray
    sum_xy: np.ndarray
    sum_yy: np.ndarray

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        targets: np.ndarray,
        *,
        num_classes: int | None = None,
        center: bool = True,
        groups: int = 1,
        preprocessing: str = "stored pixels",
        first_index: int = 0,
    ) -> Moments:
        """Moments of arrays in memory.

        Args:
            images: [n, h, w, c] uint8 (exact path) or floating (float32 products summed in float64, or float64).
            targets: [n] integer class labels (made one-hot), or any float targets [n, q] or [n].
            num_classes: q for class labels; default: largest label + 1.
            center: covariances about the mean (default) or raw second moments.
            groups: samples are spread over this many groups by a hash of their index; standard errors of held-out
                curves come from the spread between groups (20 is a good number; costs 8 d^2 bytes each).
            preprocessing: description of how the pixels were made; moments with different ones do not merge.
            first_index: index of the first sample in the whole data set (for the group hash).

        Returns:
            The moments. Cost: n d^2 multiply-adds.

        Raises:
            InputError: wrong ranks or lengths, NaN or infinite values, labels out of range, a single class.

        Example:
            >>> x = np.random.default_rng(0).normal(size=(10, 2, 2, 1))
            >>> Moments.from_arrays(x, x.reshape(10, 4)[:, :1]).sxy.shape
            (4, 1)
        """
        images = check_images(images)
        y = check_targets(targets, len(images), num_classes)
        if groups < 1:
            raise InputError(f"groups={groups}: ask for at least 1 group")
        shape: tuple[int, int, int] = images.shape[1:]
        rows = images.reshape(len(images), -1)
        d, q = rows.shape[1], y.shape[1]
        integer = rows.dtype == np.uint8
        is_labels = are_class_labels(targets)
        pivot_x = np.full(d, _INT_PIVOT) if integer else _pivot(rows[:_BATCH])
        pivot_y = np.zeros(q) if is_labels else y[:_BATCH].mean(0)
        member = group_of(np.arange(first_index, first_index + len(rows)), groups)
        out = cls(
            image_shape=shape,
            pixel_dtype=rows.dtype.name,
            center=center,
            preprocessing=preprocessing,
            pivot_x=pivot_x,
            pivot_y=pivot_y,
            counts=np.bincount(member, minlength=groups).astype(np.int64),
            sum_x=np.zeros((groups, d)),
            sum_y=np.zeros((groups, q)),
            sum_xx=np.zeros((groups, d, d)),
            sum_xy=np.zeros((groups, d, q)),
            sum_yy=np.zeros((groups, q, q)),
        )
        add_rows = _ADD_ROWS[rows.dtype.name]
        for g in range(groups):
            # Without groups, slices: nothing is gathered.
            index = np.flatnonzero(member == g) if groups > 1 else None
            add_rows(out, g, rows, y, _batches(index, len(rows), _BATCH if integer else 4 * _BATCH))
            mirror_upper(out.sum_xx[g])
        return out if integer and is_labels else out._recentred(keep_x=integer, keep_y=is_labels)

    def update(self, images: np.ndarray, targets: np.ndarray) -> Moments:
        """Moments of the data so far and these samples; neither operand changes.

        Args:
            images: [n, h, w, c], the same dtype as before.
            targets: [n] or [n, q] as before.

        Returns:
            The merged moments.

        Raises:
            InputError: as for :meth:`from_arrays` and :meth:`merge`.

        Example:
            >>> x, y = np.zeros((4, 1, 2, 1), np.uint8), np.array([0, 1, 1, 0])
            >>> m = Moments.from_arrays(x, y)
            >>> m.update(x, y).count
            8
        """
        return self.merge(
            Moments.from_arrays(
                images,
                targets,
                num_classes=self.num_targets if are_class_labels(targets) else None,
                center=self.center,
                groups=len(self.counts),
                preprocessing=self.preprocessing,
                first_index=self.count,
            )
        )

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two sample sets.

        With the same pivot the sums add (exactly, for 8-bit images); otherwise both are moved to the common mean.

        Args:
            other: moments made in the same way.

        Returns:
            The merged moments. Cost: g d^2.

        Raises:
            InputError: the two were made differently (shape, dtype, centring, preprocessing, targets, groups).

        Example:
            >>> a = Moments.from_arrays(np.zeros((2, 1, 1, 1)), np.array([0, 1]))
            >>> b = Moments.from_arrays(np.ones((2, 1, 1, 1)), np.array([0, 1]))
            >>> float(a.merge(b).sxx[0, 0])
            0.25
        """
        for name in ("image_shape", "pixel_dtype", "center", "preprocessing"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise InputError(f"moments made differently do not merge: {name} is {mine!r} and {theirs!r}")
        if self.sum_xy.shape != other.sum_xy.shape:
            raise InputError(
                "moments made differently do not merge: [groups, pixels, targets] are "
                f"{list(self.sum_xy.shape)} and {list(other.sum_xy.shape)}"
            )
        share = other.count / max(self.count + other.count, 1)
        pivot_x, pivot_y = self.pivot_x, self.pivot_y
        if not np.array_equal(pivot_x, other.pivot_x):
            pivot_x = self.pivot_x + share * (other.pivot_x - self.pivot_x)
        if not np.array_equal(pivot_y, other.pivot_y):
            pivot_y = self.pivot_y + share * (other.pivot_y - self.pivot_y)
        a, b = self._about_pivot(pivot_x, pivot_y), other._about_pivot(pivot_x, pivot_y)
        return dataclasses.replace(a, **{name: getattr(a, name) + getattr(b, name) for name in _SUMS})

    @property
    def state(self) -> tuple[np.ndarray, ...]:
        """All arrays that define these moments (for a fingerprint)."""
        sums = (self.sum_x, self.sum_y, self.sum_xx, self.sum_xy, self.sum_yy)
        return (self.pivot_x, self.pivot_y, self.counts, *sums)

    @property
    def count(self) -> int:
        """Number of samples n."""
        return int(self.counts.sum())

    @property
    def num_pixels(self) -> int:
        """Number of pixel values d = h w c."""
        return len(self.pivot_x)

    @property
    def num_targets(self) -> int:
        """Number of target columns q."""
        return len(self.pivot_y)

    @property
    def quantization_step(self) -> float:
        """Distance of neighbouring pixel values: 1 for 8-bit images, 0 where it is not known."""
        return 1.0 if self.pixel_dtype == "uint8" else 0.0

    @property
    def mean_x(self) -> np.ndarray:
        """[d] mean image, or zeros where ``center`` is False."""
        if not self.center:
            return np.zeros(self.num_pixels)
        return self.pivot_x + self.sum_x.sum(0) / self.count

    @property
    def mean_y(self) -> np.ndarray:
        """[q] mean target, or zeros where ``center`` is False."""
        if not self.center:
            return np.zeros(self.num_targets)
        return self.pivot_y + self.sum_y.sum(0) / self.count

    @property
    def sxx(self) -> np.ndarray:
        """[d, d] covariance of the pixels (computed at each access, d^2)."""
        return self.second_moments().sxx

    @property
    def sxy(self) -> np.ndarray:
        """[d, q] covariance of pixels and targets."""
        return self.second_moments().sxy

    @property
    def syy(self) -> np.ndarray:
        """[q, q] covariance of the targets."""
        return self.second_moments().syy

    @property
    def yty(self) -> np.ndarray:
        """[q, q] uncentred second moment mean(y y^T), the weight of the paper's alignment ratio."""
        n, s = self.count, self.sum_y.sum(0)
        return (self.sum_yy.sum(0) + np.outer(s, self.pivot_y) + np.outer(self.pivot_y, s)) / n + np.outer(
            self.pivot_y, self.pivot_y
        )

    def second_moments(self) -> SecondMoments:
        """Moments of all groups together about the mean (about zero where ``center`` is False).

        Returns:
            count, sxx, sxy, syy. For centred 8-bit images the numerator n sum(xx^T) - sum(x) sum(x)^T is an integer:
            a constant pixel has a variance of exactly 0.

        Example:
            >>> x = np.full((3, 1, 1, 1), 7, np.uint8)
            >>> float(Moments.from_arrays(x, np.array([0, 1, 1])).second_moments().sxx[0, 0])
            0.0
        """
        if not self.center:
            return self.about(np.zeros(self.num_pixels), np.zeros(self.num_targets))
        n = self.count
        sx, sy = self.sum_x.sum(0), self.sum_y.sum(0)
        return SecondMoments(
            n,
            (n * self.sum_xx.sum(0) - np.outer(sx, sx)) / n**2,
            (n * self.sum_xy.sum(0) - np.outer(sx, sy)) / n**2,
            (n * self.sum_yy.sum(0) - np.outer(sy, sy)) / n**2,
        )

    def about(self, mean_x: np.ndarray, mean_y: np.ndarray) -> SecondMoments:
        """Moments of all groups together about given centres (held-out data about the *training* means).

        Args:
            mean_x: [d]. mean_y: [q].

        Returns:
            count, sxx, sxy, syy as means over the samples.

        Example:
            >>> m = Moments.from_arrays(np.ones((2, 1, 1, 1)), np.array([0, 1]))
            >>> float(m.about(np.zeros(1), np.zeros(2)).sxx[0, 0])
            1.0
        """
        # Summed first, so that only one [d, d] array is moved.
        total = {name: getattr(self, name).sum(0, keepdims=True) for name in _SUMS}
        moved = dataclasses.replace(self, **total)._about_pivot(mean_x, mean_y)
        n = max(self.count, 1)
        return SecondMoments(self.count, moved.sum_xx[0] / n, moved.sum_xy[0] / n, moved.sum_yy[0] / n)

    def groups_about(self, mean_x: np.ndarray, mean_y: np.ndarray) -> Iterator[SecondMoments]:
        """One :class:`SecondMoments` per group, about given centres, made one at a time to save memory.

        Args:
            mean_x: [d]. mean_y: [q].

        Yields:
            The moments of each group, as means over the group's own samples (zeros for an empty group).

        Example:
            >>> m = Moments.from_arrays(np.ones((8, 1, 1, 1)), np.arange(8) % 2, groups=2)
            >>> sum(g.count for g in m.groups_about(m.mean_x, m.mean_y))
            8
        """
        for g in range(len(self.counts)):
            part = dataclasses.replace(self, **{name: getattr(self, name)[g : g + 1] for name in _SUMS})
            yield part.about(mean_x, mean_y)

    def _about_pivot(self, pivot_x: np.ndarray, pivot_y: np.ndarray) -> Moments:
        """The same moments with the sums kept about other pivots."""
        dx, dy = self.pivot_x - pivot_x, self.pivot_y - pivot_y
        n = self.counts.astype(np.float64)[:, None, None]
        sx, sy = self.sum_x, self.sum_y
        sum_xx, sum_xy, sum_yy = self.sum_xx, self.sum_xy, self.sum_yy
        if dx.any():
            sum_xx = sum_xx.copy()
            for g, count in enumerate(self.counts):  # one group at a time: temporaries of d^2, not g d^2
                half = np.outer(sx[g] + count / 2 * dx, dx)
                sum_xx[g] += half
                sum_xx[g] += half.T
        if dx.any() or dy.any():
            sum_xy = sum_xy + sx[:, :, None] * dy + dx[:, None] * sy[:, None, :] + n * np.outer(dx, dy)
        if dy.any():
            cross = sy[:, :, None] * dy
            sum_yy = sum_yy + cross + cross.transpose(0, 2, 1) + n * np.outer(dy, dy)
        return dataclasses.replace(
            self,
            pivot_x=pivot_x,
            pivot_y=pivot_y,
            sum_x=sx + n[:, 0] * dx,
            sum_y=sy + n[:, 0] * dy,
            sum_xx=sum_xx,
            sum_xy=sum_xy,
            sum_yy=sum_yy,
        )

    def _recentred(self, *, keep_x: bool, keep_y: bool) -> Moments:
        """Move inexact pivots to the mean, so that later merges lose nothing to cancellation."""
        n = max(self.count, 1)
        pivot_x = self.pivot_x if keep_x else self.pivot_x + self.sum_x.sum(0) / n
        pivot_y = self.pivot_y if keep_y else self.pivot_y + self.sum_y.sum(0) / n
        return self._about_pivot(pivot_x, pivot_y)


def group_of(index: np.ndarray, groups: int) -> np.ndarray:
    """Group of each sample: a hash of its index (splitmix64), so that no order of the data lines up with it.

    Args:
        index: [n] position of each sample in its data set.
        groups: number of groups.

    Returns:
        [n] int64 in [0, groups).

    Example:
        >>> group_of(np.arange(4), 1).tolist()
        [0, 0, 0, 0]
    """
    z = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(groups)).astype(np.int64)


def _batches(index: np.ndarray | None, n: int, size: int) -> Iterator[Batch]:
    """Batches of row numbers; of all n rows in order where ``index`` is None."""
    for start in range(0, n if index is None else len(index), size):
        yield slice(start, min(start + size, n)) if index is None else index[start : start + size]


def _add_integer_rows(out: Moments, g: int, rows: np.ndarray, y: np.ndarray, batches: Iterator[Batch]) -> None:
    """Add 8-bit rows to group g of ``out`` in place; every sum is an integer held exactly."""
    pending: tuple[jax.Array, ...] = ()
    for take in batches:
        x = rows[take]
        # Rows of zeros (the pivot) pad the last batch: one shape, one compilation.
        z = np.zeros((_BATCH, rows.shape[1]), np.float32)
        np.subtract(x, np.float32(_INT_PIVOT), out=z[: len(x)], dtype=np.float32)
        blocks = upper_blocks(jnp.asarray(z))  # runs while the host adds the batch before
        if pending:
            add_upper(out.sum_xx[g], pending)
        pending = blocks
        _add_small_sums(out, g, z[: len(x)].astype(np.float64), y[take])
    if pending:
        add_upper(out.sum_xx[g], pending)


def _add_float32_rows(out: Moments, g: int, rows: np.ndarray, y: np.ndarray, batches: Iterator[Batch]) -> None:
    """Add float32 rows in place: products of rows centred within their batch, moved to the pivot in float64."""
    pivot = out.pivot_x.astype(np.float32)
    means: list[np.ndarray] = []
    totals: list[np.ndarray] = []
    for take in batches:
        z = rows[take] - pivot
        total = z.sum(0, dtype=np.float64)
        m = (total / len(z)).astype(np.float32)
        _add_small_sums(out, g, z.astype(np.float64), y[take])
        z -= m
        add_upper(out.sum_xx[g], upper_blocks(jnp.asarray(z)))
        means.append(m.astype(np.float64))
        totals.append(total - len(z) / 2 * means[-1])
    if means:
        # What centring took out of every batch, m t^T + t m^T - n m m^T, as one product.
        half = np.stack(means).T @ np.stack(totals)
        half += half.T.copy()
        out.sum_xx[g] += half


def _add_float64_rows(out: Moments, g: int, rows: np.ndarray, y: np.ndarray, batches: Iterator[Batch]) -> None:
    """Add float64 rows in place, on the host: the pivot alone leaves no cancellation worth a second pass."""
    for take in batches:
        z = rows[take] - out.pivot_x
        out.sum_xx[g] += z.T @ z  # BLAS sees the symmetry
        _add_small_sums(out, g, z, y[take])


_ADD_ROWS = {"uint8": _add_integer_rows, "float32": _add_float32_rows, "float64": _add_float64_rows}


def _add_small_sums(out: Moments, g: int, z: np.ndarray, y: np.ndarray) -> None:
    yc = y - out.pivot_y
    # A column of ones sums the rows in the same product.
    both = z.T @ np.concatenate([yc, np.ones((len(yc), 1))], axis=1)
    out.sum_xy[g] += both[:, :-1]
    out.sum_x[g] += both[:, -1]
    out.sum_y[g] += yc.sum(0)
    out.sum_yy[g] += yc.T @ yc


def _pivot(rows: np.ndarray) -> np.ndarray:
    """[d] mean of the first rows, rounded to the rows' own dtype so that subtracting it is exact near it."""
    return rows.mean(0, dtype=np.float64).astype(rows.dtype).astype(np.float64)
