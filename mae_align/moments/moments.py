"""Second moments of images and targets: all the data that the linear theory needs.

The data is read once, here. Every closed form and every sweep works on the result, so their cost does not depend on
the number of samples. With rows as samples, ``x`` a flattened image (h, w, c order) and ``y`` a target row::

    Sxx = cov(x) [d, d]    Sxy = cov(x, y) [d, q]    Syy = cov(y) [q, q]

Sums are kept about a fixed *pivot*. For 8-bit images the pivot is 128: the products are integers, summed exactly, and
the moments come out bit-identical for every order, batch size and split of the data (their products with targets that
are no classes excepted). For float images the pivot is the mean, so that merging is the centred update of Chan, Golub &
LeVeque (1983). How the sums are made: :mod:`mae_align.moments.sums`; from a stream: :func:`mae_align.stream_moments`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_align.moments.accumulate import (
    Accumulator,
    Layout,
    RawSums,
    TargetKind,
    check_batch,
    group_of,
    pivots,
    sums_on_host,
)
from mae_align.runtime.checks import are_class_labels, as_targets
from mae_align.runtime.devices import is_cpu, solve_device
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import read_arrays, write_arrays

__all__ = ["Moments", "SecondMoments", "assemble", "group_of"]
_SUMS = ("counts", "sum_x", "sum_y", "sum_xx", "sum_xy", "sum_yy")
_ARRAYS = ("pivot_x", "pivot_y", *_SUMS)
_FILE_KIND, _FILE_VERSION = "moments", 1


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
        sum_x: [g, d].
        sum_y: [g, q].
        sum_xx: [g, d, d].
        sum_xy: [g, d, q].
        sum_yy: [g, q, q]. All sums are float64.

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
        targets: np.ndarray | None = None,
        *,
        num_classes: int | None = None,
        center: bool = True,
        groups: int = 1,
        preprocessing: str = "stored pixels",
        first_index: int = 0,
    ) -> Moments:
        """Moments of arrays in memory.

        Args:
            images: [n, h, w, c] uint8 (exact) or floating (float16 as float32).
            targets: [n] integer class labels (made one-hot), or any float targets [n, q] or [n]; None: q = 0.
            num_classes: q for class labels; default: largest label + 1.
            center: covariances about the mean (default) or raw second moments.
            groups: samples are spread over this many groups by a hash of their index; standard errors of held-out
                curves come from the spread between groups (20 is a good number; costs 8 d^2 bytes each).
            preprocessing: description of how the pixels were made; moments with different ones do not merge.
            first_index: index of the first sample in the whole data set (for the group hash).

        Returns:
            The moments. Cost: n d^2 multiply-adds on one device.

        Raises:
            InputError: wrong ranks or lengths, NaN or infinite values, labels out of range, a single class.

        Example:
            >>> x = np.random.default_rng(0).normal(size=(10, 2, 2, 1))
            >>> Moments.from_arrays(x, x.reshape(10, 4)[:, :1]).sxy.shape
            (4, 1)
        """
        batch = check_batch(images, targets, num_classes)
        index = np.arange(first_index, first_index + len(batch.rows))
        if batch.rows.dtype == np.float64 and groups >= 1 and is_cpu(solve_device("float64")):
            raw = sums_on_host(batch, group_of(index, groups), groups)
            return assemble(raw, batch.layout, center=center, preprocessing=preprocessing)
        accumulator = Accumulator(batch.layout, *pivots(batch), groups=groups)
        accumulator.add(batch, index)
        return assemble(accumulator.finish(), batch.layout, center=center, preprocessing=preprocessing)

    def update(self, images: np.ndarray, targets: np.ndarray | None = None) -> Moments:
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
        targets = None if targets is None else as_targets(targets)
        return self.merge(
            Moments.from_arrays(
                images,
                targets,
                num_classes=self.num_targets if targets is not None and are_class_labels(targets) else None,
                center=self.center,
                groups=self.num_groups,
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
        check_alike(self, other, ("image_shape", "pixel_dtype", "center", "preprocessing", "num_targets", "num_groups"))
        share = other.count / max(self.count + other.count, 1)
        pivot_x, pivot_y = self.pivot_x, self.pivot_y
        if not np.array_equal(pivot_x, other.pivot_x):
            pivot_x = self.pivot_x + share * (other.pivot_x - self.pivot_x)
        if not np.array_equal(pivot_y, other.pivot_y):
            pivot_y = self.pivot_y + share * (other.pivot_y - self.pivot_y)
        a, b = self._about_pivot(pivot_x, pivot_y), other._about_pivot(pivot_x, pivot_y)
        return dataclasses.replace(a, **{name: getattr(a, name) + getattr(b, name) for name in _SUMS})

    def ungrouped(self) -> Moments:
        """The same moments in one group, without a basis for standard errors; they merge with other ungrouped ones.

        Example:
            >>> m = Moments.from_arrays(np.ones((8, 1, 1, 1)), np.arange(8) % 2, groups=3)
            >>> m.ungrouped().counts.tolist()
            [8]
        """
        return dataclasses.replace(self, **{name: getattr(self, name).sum(0, keepdims=True) for name in _SUMS})

    def select_groups(self, groups: np.ndarray | slice) -> Moments:
        """The moments of some of the groups.

        Args:
            groups: indices of the groups; a slice copies nothing.

        Example:
            >>> m = Moments.from_arrays(np.ones((8, 1, 1, 1)), np.arange(8) % 2, groups=2)
            >>> sum(m.select_groups(np.array([i])).count for i in (0, 1))
            8
        """
        return dataclasses.replace(self, **{name: getattr(self, name)[groups] for name in _SUMS})

    def save(self, path: str | Path) -> None:
        """Write everything to a file: an ``.npz`` without pickle, with a version and a checksum, whole or not at all.

        Args:
            path: the file. Size: 8 g d^2 bytes.

        Raises:
            InputError: a place that cannot be written to.

        Example:
            >>> import os, tempfile
            >>> file = os.path.join(tempfile.mkdtemp(), "train.npz")
            >>> Moments.from_arrays(np.ones((2, 1, 1, 1)), np.array([0, 1])).save(file)
            >>> Moments.load(file).count
            2
        """
        fields = {name: getattr(self, name) for name in ("image_shape", "pixel_dtype", "center", "preprocessing")}
        write_arrays(path, _FILE_KIND, _FILE_VERSION, fields, dict(zip(_ARRAYS, self.state, strict=True)))

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what :meth:`save` wrote, bit for bit.

        Args:
            path: the file.

        Raises:
            InputError: a missing, foreign, damaged or newer file.
        """
        fields, arrays = read_arrays(path, _FILE_KIND, _FILE_VERSION)
        h, w, c = fields.pop("image_shape")
        values: dict[str, Any] = fields | arrays
        return cls(image_shape=(h, w, c), **values)

    @property
    def state(self) -> tuple[np.ndarray, ...]:
        """All arrays that define these moments (for a fingerprint)."""
        return tuple(getattr(self, name) for name in _ARRAYS)

    @property
    def count(self) -> int:
        """Number of samples n."""
        return int(self.counts.sum())

    @property
    def num_groups(self) -> int:
        """Number of groups g."""
        return len(self.counts)

    @property
    def most_rank(self) -> int:
        """Largest rank that the covariance can have, with a noise floor: one for every pixel value."""
        return self.num_pixels

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
        s, pivot = self.sum_y.sum(0), self.pivot_y
        moved = self.sum_yy.sum(0) + np.outer(s, pivot) + np.outer(pivot, s)
        return moved / self.count + np.outer(pivot, pivot)

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
            mean_x: [d].
            mean_y: [q].

        Returns:
            count, sxx, sxy, syy as means over the samples.

        Example:
            >>> m = Moments.from_arrays(np.ones((2, 1, 1, 1)), np.array([0, 1]))
            >>> float(m.about(np.zeros(1), np.zeros(2)).sxx[0, 0])
            1.0
        """
        # Summed first, so that only one [d, d] array is moved.
        moved = self.ungrouped()._about_pivot(mean_x, mean_y)
        n = max(self.count, 1)
        return SecondMoments(self.count, moved.sum_xx[0] / n, moved.sum_xy[0] / n, moved.sum_yy[0] / n)

    def groups_about(self, mean_x: np.ndarray, mean_y: np.ndarray) -> Iterator[SecondMoments]:
        """One :class:`SecondMoments` per group, about given centres, made one at a time to save memory.

        Args:
            mean_x: [d].
            mean_y: [q].

        Yields:
            The moments of each group, as means over the group's own samples (zeros for an empty group).

        Example:
            >>> m = Moments.from_arrays(np.ones((8, 1, 1, 1)), np.arange(8) % 2, groups=2)
            >>> sum(g.count for g in m.groups_about(m.mean_x, m.mean_y))
            8
        """
        for g in range(self.num_groups):
            yield self.select_groups(slice(g, g + 1)).about(mean_x, mean_y)

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


def check_alike(mine: object, theirs: object, names: tuple[str, ...]) -> None:
    """Refuse to merge what was made differently.

    Args:
        mine: moments or samples.
        theirs: others of the same class.
        names: of the properties that must be equal.

    Raises:
        InputError: one of them differs.
    """
    for name in names:
        a, b = getattr(mine, name), getattr(theirs, name)
        if a != b:
            kind = type(mine).__name__.lower()
            raise InputError(f"{kind} made differently do not merge: {name} is {a!r} and {b!r}")


def assemble(raw: RawSums, layout: Layout, *, center: bool, preprocessing: str) -> Moments:
    """Moments from sums; inexact pivots move to the mean, so that later merges lose nothing to cancellation.

    Args:
        raw: see :class:`mae_align.moments.accumulate.RawSums`.
        layout: of the batches that were added up.
        center: as in :meth:`Moments.from_arrays`.
        preprocessing: likewise.

    Example:
        >>> batch = check_batch(np.ones((2, 1, 1, 1)), None, None)
        >>> accumulator = Accumulator(batch.layout, *pivots(batch), groups=1)
        >>> accumulator.add(batch, np.arange(2))
        >>> assemble(accumulator.finish(), batch.layout, center=True, preprocessing="none").mean_x.tolist()
        [1.0]
    """
    if not all(np.isfinite(total).all() for total in raw):
        raise InputError(
            f"sums of these {layout.dtype} images or targets overflow: divide them by a power of two, or give float64"
        )
    moments = Moments(layout.image_shape, layout.dtype, center, preprocessing, *raw)
    n = max(moments.count, 1)
    pivot_x, pivot_y = raw.pivot_x, raw.pivot_y
    if not layout.integer:
        pivot_x = pivot_x + raw.sum_x.sum(0) / n
    if layout.kind is TargetKind.numbers:
        pivot_y = pivot_y + raw.sum_y.sum(0) / n
    return moments._about_pivot(pivot_x, pivot_y)
