"""From batches of images and targets to the sums that define moments, by group.

:func:`check_batch` makes rows of them, :func:`pivots` chooses the points about which is summed and :func:`group_of` the
group of a sample. :class:`Accumulator` collects batches of any size into full steps of :mod:`mae_align.moments.sums` on
the devices of a mesh; :func:`sums_on_host` sums float64 images in memory where the host does it best. Both end in
:class:`RawSums`.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mae_align.data.patches import ImageShape
from mae_align.moments import sums
from mae_align.runtime.checks import are_class_labels, as_targets, check_images, check_labels, check_targets
from mae_align.runtime.devices import has_float64, solve_device
from mae_align.runtime.errors import InputError
from mae_align.runtime.memory import accumulator_bytes, check_memory
from mae_align.runtime.processes import data_mesh, gathered, local_mesh

# Few rows left over go in a smaller step: two programs at most are compiled.
_FEW_ROWS = 64
# Steps on their way to the devices at any time: the host prepares one while another runs.
_IN_FLIGHT = 2
# Rows that the host multiplies at a time.
_HOST_ROWS = 4096
# Between these, products of float32 stay far inside its range; outside, rows are scaled by a power of two first.
_SMALL, _LARGE = 2.0**-30, 2.0**40


class TargetKind(enum.Enum):
    """What the targets of images are."""

    none = "no targets"
    classes = "class labels"
    numbers = "numbers"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all batches of a stream have in common.

    Attributes:
        image_shape: (h, w, c).
        dtype: name of the pixels' dtype.
        kind: of the targets.
        q: target columns.
    """

    image_shape: ImageShape
    dtype: str
    kind: TargetKind
    q: int

    @property
    def integer(self) -> bool:
        """Whether the pixels are 8-bit: their sums are exact."""
        return self.dtype == "uint8"

    @property
    def d(self) -> int:
        """Number of pixel values."""
        return int(np.prod(self.image_shape))

    @property
    def columns(self) -> int:
        """Indicator columns on the devices: one for each class, one alone where there are no classes."""
        return self.q if self.kind is TargetKind.classes else 1


class Batch(NamedTuple):
    """Checked samples.

    Attributes:
        layout: what it has in common with the others of its stream.
        rows: [b, d] pixels.
        labels: [b] int32; zeros where there are no classes.
        numbers: [b, q] float64 targets, [b, 0] where they are not numbers.
    """

    layout: Layout
    rows: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray


class RawSums(NamedTuple):
    """The sums that define moments, in float64, g groups.

    Attributes:
        pivot_x: [d] and pivot_y: [q], the points about which all others are.
        counts: [g] int64.
        sum_x: [g, d].
        sum_y: [g, q].
        sum_xx: [g, d, d].
        sum_xy: [g, d, q].
        sum_yy: [g, q, q].
    """

    pivot_x: np.ndarray
    pivot_y: np.ndarray
    counts: np.ndarray
    sum_x: np.ndarray
    sum_y: np.ndarray
    sum_xx: np.ndarray
    sum_xy: np.ndarray
    sum_yy: np.ndarray


def check_batch(images: np.ndarray, targets: np.ndarray | None, num_classes: int | None) -> Batch:
    """Images and targets as rows.

    Args:
        images: [b, h, w, c].
        targets: [b] class labels, numbers [b] or [b, q], or None.
        num_classes: q for class labels; default: largest label + 1.

    Raises:
        InputError: as :mod:`mae_align.runtime.checks` says.

    Example:
        >>> check_batch(np.zeros((2, 1, 2, 1), np.uint8), np.array([1, 0]), None).layout
        Layout(image_shape=(1, 2, 1), dtype='uint8', kind=<TargetKind.classes: 'class labels'>, q=2)
    """
    images = check_images(images)
    n = len(images)
    labels, numbers, q = np.zeros(n, np.int32), np.zeros((n, 0)), 0
    kind = TargetKind.none
    if targets is not None:
        targets = as_targets(targets)
        if targets.ndim and len(targets) == n and are_class_labels(targets):
            found, q = check_labels(targets, num_classes)
            kind, labels = TargetKind.classes, found.astype(np.int32)
        else:
            kind, numbers = TargetKind.numbers, check_targets(targets, n, num_classes)
            q = numbers.shape[1]
    elif num_classes is not None:
        raise InputError("num_classes goes with class labels, and there are no targets: leave it out or give labels")
    shape: ImageShape = images.shape[1:]
    return Batch(Layout(shape, images.dtype.name, kind, q), images.reshape(n, -1), labels, numbers)


def pivots(batch: Batch) -> tuple[np.ndarray, np.ndarray, float]:
    """Points about which sums are kept, and the unit in which: near the mean for floats, fixed where sums are exact.

    Args:
        batch: the first samples.

    Returns:
        [d] 128 for 8-bit images, else the mean of the first rows, rounded to their dtype so that subtracting it is
        exact near it; [q] 0 for classes, else the mean of the first targets; 1, or for floats so large or small that
        their products would leave the range of their dtype the power of two that is nearest to them.

    Example:
        >>> x, y, unit = pivots(check_batch(np.ones((2, 1, 1, 1)), np.array([1.0, 2.0]), None))
        >>> x.tolist(), y.tolist(), unit
        ([1.0], [1.5], 1.0)
        >>> pivots(check_batch(np.array([4e-22, 0.0]).reshape(2, 1, 1, 1).astype(np.float32), None, None))[
        ...     2
        ... ] == 2.0**-72
        True
    """
    rows, numbers = batch.rows[: sums.MAX_ROWS], batch.numbers[: sums.MAX_ROWS]
    if batch.layout.integer:
        x = np.full(batch.layout.d, float(sums.BYTE_PIVOT))
    else:
        x = rows.mean(0, dtype=np.float64).astype(rows.dtype).astype(np.float64)
    y = numbers.mean(0) if batch.layout.kind is TargetKind.numbers else np.zeros(batch.layout.q)
    return x, y, _unit(rows - x) if batch.layout.dtype == "float32" else 1.0


def _unit(z: np.ndarray) -> float:
    """1, or the power of two nearest to the largest entry, where products of entries of float32 are in danger."""
    largest = float(np.abs(z).max(initial=0.0))
    if largest == 0.0 or _SMALL < largest < _LARGE:
        return 1.0
    return 2.0 ** round(math.log2(largest))


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


class _Pending:
    """Rows of one group that do not fill a step yet; never written to again once they are on their way to a device."""

    def __init__(self, capacity: int, layout: Layout) -> None:
        self.count = 0
        self.rows = np.empty((capacity, layout.d), layout.dtype)
        self.labels = np.full(capacity, -1, np.int32)
        self.numbers = np.empty((capacity, layout.q if layout.kind is TargetKind.numbers else 0))

    def take(self, batch: Batch, which: slice | np.ndarray) -> None:
        """Append rows of a batch."""
        rows = batch.rows[which]
        to = slice(self.count, self.count + len(rows))
        self.rows[to], self.labels[to], self.numbers[to] = rows, batch.labels[which], batch.numbers[which]
        self.count = to.stop


class Accumulator:
    """Running sums of a stream of batches on the devices of a mesh.

    Pixels, and their products with classes, are summed on the devices; products with targets that are numbers on the
    host, in float64. Every process adds its own samples; :meth:`finish` adds up processes and devices.

    Args:
        layout: of all batches.
        pivot_x: see :func:`pivots`; the same in every process.
        pivot_y: likewise.
        unit: likewise; rows are divided by it, which is exact, before they are multiplied.
        groups: samples are spread over this many groups.
        mesh: one or several devices, of this process or of all; None for one device.

    Raises:
        InputError: fewer than 1 group, a mesh of some of the processes, float64 images on devices without float64.

    Memory: 5 groups d^2 bytes on each device (10 for float64 images), about three times as much at the end on the host,
    and at most 1,024 rows for each group and device.

    Example:
        >>> batch = check_batch(np.full((3, 1, 1, 1), 130, np.uint8), None, None)
        >>> accumulator = Accumulator(batch.layout, *pivots(batch), groups=1)
        >>> accumulator.add(batch, np.arange(3))
        >>> accumulator.finish().sum_xx.tolist()
        [[[12.0]]]
    """

    def __init__(
        self,
        layout: Layout,
        pivot_x: np.ndarray,
        pivot_y: np.ndarray,
        unit: float,
        groups: int,
        mesh: Mesh | None = None,
    ) -> None:
        if groups < 1:
            raise InputError(f"groups={groups}: ask for at least 1 group")
        _check_memory(layout.d, layout.q, groups)
        dtype = np.dtype(layout.dtype)
        self._x64 = dtype == np.float64
        if mesh is None:
            mesh = data_mesh([solve_device("float64" if self._x64 else "float32")])
        elif self._x64 and not all(has_float64(device) for device in mesh.devices.flat):
            raise InputError("these devices have no float64: give float32 images, or leave mesh out to use the host")
        self.layout, self.pivot_x, self.pivot_y, self.unit, self.groups = layout, pivot_x, pivot_y, unit, groups
        local = local_mesh(mesh)
        devices = local.devices.size
        # One axis over all devices, in the order of the processes.
        ordered = sorted(mesh.devices.flat, key=lambda device: (device.process_index, device.id))
        self._mesh = local if len(ordered) == devices else data_mesh(ordered)
        self._sharding, self._step = sums.sharding(local), sums.add_rows(local, dtype)
        self._sizes = (devices * _FEW_ROWS, devices * sums.MAX_ROWS)
        with jax.enable_x64(self._x64):
            self._sums = [sums.empty(local, layout.d, layout.columns, dtype) for _ in range(groups)]
            constant = ((pivot_x / unit).astype(dtype),) if not layout.integer else ()
            self._constants = [jax.device_put(a, jax.NamedSharding(local, jax.P())) for a in constant]
        self._pending = [_Pending(self._sizes[-1], layout) for _ in range(groups)]
        self._steps = np.zeros(groups, np.int64)
        self._tickets: collections.deque[jax.Array] = collections.deque()
        self._host = {
            "counts": np.zeros(groups, np.int64),
            "classes": np.zeros((groups, layout.columns), np.int64),
            "sum_y": np.zeros((groups, layout.q)),
            "sum_xy": np.zeros((groups, layout.d, self._pending[0].numbers.shape[1])),
            "sum_yy": np.zeros((groups, *2 * self._pending[0].numbers.shape[1:])),
        }

    def add(self, batch: Batch, index: np.ndarray) -> None:
        """Add samples.

        Args:
            batch: of the same layout.
            index: [b] their positions in the whole data set, which decide the groups.
        """
        if self.groups == 1:
            self._fill(0, batch, None)
            return
        member = group_of(index, self.groups)
        for g in np.unique(member):
            self._fill(int(g), batch, np.flatnonzero(member == g))

    def _fill(self, g: int, batch: Batch, which: np.ndarray | None) -> None:
        """Put rows of a batch (None: all) where group g collects its next step, and run every step that is full."""
        count = len(batch.rows) if which is None else len(which)
        start = 0
        while start < count:
            stop = min(count, start + self._sizes[-1] - self._pending[g].count)
            self._pending[g].take(batch, slice(start, stop) if which is None else which[start:stop])
            start = stop
            if self._pending[g].count == self._sizes[-1]:
                self._run_step(g)

    def _run_step(self, g: int) -> None:
        """Send the pending rows of group g to the devices."""
        rows = self._pending[g]
        self._add_on_host(g, rows)
        self._pending[g] = _Pending(self._sizes[-1], self.layout)
        size = next(size for size in self._sizes if rows.count <= size)
        while len(self._tickets) >= _IN_FLIGHT:  # or the host would run ahead and fill the memory
            jax.block_until_ready(self._tickets.popleft())
        with jax.enable_x64(self._x64):
            if self.unit != 1.0:
                rows.rows[: rows.count] /= self.unit
            sent = jax.device_put((rows.rows[:size], rows.labels[:size]), self._sharding)
            self._sums[g], ticket = self._step(self._sums[g], *sent, *self._constants)
            self._steps[g] += 1
            state = self._sums[g]
            if isinstance(state, sums.ByteSums) and self._steps[g] % sums.CARRY_EVERY == 0:
                self._sums[g] = sums.carried(state)
        self._tickets.append(ticket)

    def _add_on_host(self, g: int, rows: _Pending) -> None:
        """Counts, and the products with targets that are numbers."""
        n, host = rows.count, self._host
        host["counts"][g] += n
        host["classes"][g] += np.bincount(rows.labels[:n], minlength=self.layout.columns)
        if self.layout.kind is TargetKind.numbers:
            y = rows.numbers[:n] - self.pivot_y
            host["sum_xy"][g] += (rows.rows[:n] - self.pivot_x).T @ y
            host["sum_y"][g] += y.sum(0)
            host["sum_yy"][g] += y.T @ y

    def finish(self) -> RawSums:
        """The sums over all samples, devices and processes; the accumulator is used up.

        Returns:
            The same in every process. Cost: one collective for the device sums (none on one device), one small one for
            what the hosts hold where there are several processes.
        """
        for g in range(self.groups):
            if self._pending[g].count:
                self._run_step(g)
        layout, d = self.layout, self.layout.d
        with jax.enable_x64(self._x64):
            parts = [sums.carried(s) if isinstance(s, sums.ByteSums) else s for s in self._sums]
            # [g, D] rows and [g, D, d + e] sums of rows on each device.
            count = np.array([np.asarray(s.count, np.float64) for s in parts if isinstance(s, sums.FloatSums)])
            row = np.array([_joined(s.row) for s in parts if isinstance(s, sums.FloatSums)])
            self._sums = []
            totals = sums.total(parts, self._mesh)
        every = gathered([*self._host.values(), count, row], self._mesh)
        host = {name: np.sum([found[i] for found in every], axis=0) for i, name in enumerate(self._host)}
        xx, xe = (np.stack(a) for a in zip(*totals, strict=True))
        if layout.integer:
            sum_x = xe.sum(2)
        else:
            count, row = (np.concatenate([found[i] for found in every], axis=1) for i in (-2, -1))
            # Back from the unit that rows were divided by; powers of two are exact.
            xx, xe, row = xx * self.unit**2, xe * self.unit, row * np.repeat([self.unit, 1.0], [d, layout.columns])
            sum_x = row[:, :, :d].sum(1)
            weighted = row / np.maximum(count, 1)[:, :, None]
            for g in range(self.groups):
                # From each device's own mean to the pivot.
                moved = row[g, :, :d].T @ weighted[g]
                xx[g] += moved[:, :d]
                xe[g] += moved[:, d:]
        if layout.kind is TargetKind.classes:
            host |= {"sum_xy": xe, "sum_y": host["classes"].astype(np.float64)}
            host["sum_yy"] = host["sum_y"][:, :, None] * np.eye(layout.q)
        y, xy, yy = host["sum_y"], host["sum_xy"], host["sum_yy"]
        return RawSums(self.pivot_x, self.pivot_y, host["counts"], sum_x, y, xx, xy, yy)

    def state(self) -> dict[str, np.ndarray]:
        """All that has been added so far, for :meth:`restore` of an accumulator made with the same arguments.

        Returns:
            Arrays by name; later additions do not change them.
        """
        # Copies: a step reuses the memory of the sums before it.
        leaves = {
            f"sums/{g}/{i}": np.array(leaf)
            for g, state in enumerate(self._sums)
            for i, leaf in enumerate(jax.tree.leaves(state))
        }
        pending = {}
        for g, rows in enumerate(self._pending):
            for name in ("rows", "labels", "numbers"):
                pending[f"pending/{g}/{name}"] = getattr(rows, name)[: rows.count].copy()
        host = {f"host/{name}": array.copy() for name, array in self._host.items()}
        return leaves | pending | host | {"steps": self._steps.copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Put the accumulator where :meth:`state` was called, bit for bit."""
        self._steps = np.array(state["steps"])
        self._host = {name: np.array(state[f"host/{name}"]) for name in self._host}
        for g in range(self.groups):
            tree = jax.tree.structure(self._sums[g])
            leaves = [state[f"sums/{g}/{i}"] for i in range(tree.num_leaves)]
            with jax.enable_x64(self._x64):
                # Copies: the arrays are donated, and must not be those of the caller.
                self._sums[g] = jax.tree.unflatten(tree, [jax.device_put(a.copy(), self._sharding) for a in leaves])
            rows, labels, numbers = (state[f"pending/{g}/{name}"] for name in ("rows", "labels", "numbers"))
            self._pending[g] = _Pending(self._sizes[-1], self.layout)
            self._pending[g].take(Batch(self.layout, rows, labels, numbers), slice(None))


def _joined(pair: sums.Pair) -> np.ndarray:
    """high + low in float64."""
    return np.asarray(pair[0], np.float64) + np.asarray(pair[1], np.float64)


def _check_memory(d: int, q: int, groups: int) -> None:
    """Refuse sums that cannot fit."""
    what = f"second moments of {d} pixel values and {q} targets in {groups} group(s)"
    remedy = "shrink the images, use fewer groups or classes, or, with fewer images than pixel values, ma.Samples"
    check_memory(accumulator_bytes(d, q, groups), what, remedy)


def sums_on_host(batch: Batch, member: np.ndarray, groups: int) -> RawSums:
    """Sums about the mean of the first rows; in float64 that pivot leaves no cancellation worth a second pass.

    Args:
        batch: float64 rows [n, d].
        member: [n] group of each.
        groups: g.

    Returns:
        The sums. Cost: n d^2 multiply-adds; memory 8 g d^2 bytes and 4,096 rows.

    Raises:
        InputError: not enough memory.

    Example:
        >>> batch = check_batch(np.array([1.0, 3.0]).reshape(2, 1, 1, 1), None, None)
        >>> sums_on_host(batch, np.zeros(2, int), 1).sum_xx.tolist()
        [[[2.0]]]
    """
    pivot_x, pivot_y, _ = pivots(batch)
    d, q = batch.layout.d, len(pivot_y)
    _check_memory(d, q, groups)
    out = RawSums(
        pivot_x,
        pivot_y,
        np.bincount(member, minlength=groups).astype(np.int64),
        np.zeros((groups, d)),
        np.zeros((groups, q)),
        np.zeros((groups, d, d)),
        np.zeros((groups, d, q)),
        np.zeros((groups, q, q)),
    )
    for g in range(groups):
        index = np.flatnonzero(member == g) if groups > 1 else None
        count = len(member) if index is None else len(index)
        for start in range(0, count, _HOST_ROWS):
            take = slice(start, start + _HOST_ROWS) if index is None else index[start : start + _HOST_ROWS]
            z = batch.rows[take] - pivot_x
            if batch.layout.kind is TargetKind.classes:
                y = np.zeros((len(z), q))
                y[np.arange(len(z)), batch.labels[take]] = 1.0
            else:
                y = batch.numbers[take] - pivot_y
            # A column of ones sums the rows in the same product.
            both = z.T @ np.concatenate([y, np.ones((len(y), 1))], axis=1)
            out.sum_xx[g] += z.T @ z
            out.sum_xy[g] += both[:, :-1]
            out.sum_x[g] += both[:, -1]
            out.sum_y[g] += y.sum(0)
            out.sum_yy[g] += y.T @ y
    return out
