"""What the alignment curves are drawn of: jobs that each end in one curve of PCA features.

Without corruption the autoencoder's features are the principal components (Theorem 3 with x' = x), so one
eigendecomposition of the moments gives every k. A job makes the images of one condition (a data set, a class subset, a
resolution, a background contrast) and returns its curve.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

import mae_align as ma
from mae_align.closed_form.curves import curves_from_targets
from mae_align.closed_form.factorize import factorize
from mae_align.closed_form.held_out import held_out_curves
from mae_align.data import average_pool, blend_over_backgrounds, select_classes
from mae_align.runtime.devices import is_cpu, solve_device, worker_count
from mae_align.runtime.files import PointStore
from mae_align.runtime.pool import Arrays, Task, TaskGroup, run_groups

_QUANTIZATION = 1.0 / 12.0  # variance of rounding to 8 bits, squared grey levels
_PHOTOGRAPH_POOL = 4


class Curve(NamedTuple):
    """Curve of the PCA features of one condition, index 0 is k = 1; fields are arrays so that a store can hold them.

    Attributes:
        r2: [k] share of the label variance a linear probe explains, in-sample. alignment: [k] the paper's ratio.
        eval_r2: [k] held-out. eval_r2_se: [k] its standard error. eval_influence: [g, k] for paired standard errors.
        num_pixels: d. num_train: n. num_test: number of held-out images.
    """

    r2: np.ndarray
    alignment: np.ndarray
    eval_r2: np.ndarray
    eval_r2_se: np.ndarray
    eval_influence: np.ndarray
    num_pixels: np.ndarray
    num_train: np.ndarray
    num_test: np.ndarray

    @property
    def percent(self) -> np.ndarray:
        """[k] 100 sqrt(alignment), the score of the published figures."""
        return 100.0 * np.sqrt(np.clip(self.alignment, 0.0, None))

    @property
    def k90(self) -> int:
        """Smallest k whose in-sample r2 reaches 90% of its value at full rank."""
        return _first_reaching(self.r2, 0.9 * self.r2[-1])

    @property
    def eval_k90(self) -> int:
        """Smallest k whose held-out r2 reaches 90% of its largest value over k."""
        return _first_reaching(self.eval_r2, 0.9 * self.eval_r2.max())

    def eval_share(self) -> tuple[np.ndarray, np.ndarray]:
        """Held-out r2 relative to its best, the held-out counterpart of `alignment`, and its influences.

        share(k) = r2(k) / r2(b), b the best k, influence (psi(k) - share(k) psi(b)) / r2(b) by the delta method. Not
        relative to full rank, where a probe on few images overfits.

        Returns:
            [k] and [g, k]; NaN where no k explains anything on held-out images.
        """
        b = int(self.eval_r2.argmax())
        best = self.eval_r2[b]
        if best <= 0:
            return np.full_like(self.eval_r2, np.nan), np.full_like(self.eval_influence, np.nan)
        share = self.eval_r2 / best
        return share, (self.eval_influence - share * self.eval_influence[:, b : b + 1]) / best


def _first_reaching(values: np.ndarray, target: float) -> int:
    return int(np.argmax(values >= target)) + 1


def pca_curve(train: ma.Moments, test: ma.Moments, pixel_noise: float | None) -> Curve:
    """The curve of PCA features for every k up to the rank.

    In the coordinates of the factorised problem the features are the unit vectors (Q = I): t = T0, and error(k) of
    ``mae_align.closed_form.held_out`` takes no product of matrices, sum_{i,j<=k} (t_i.t_j) M_ij is a cumulative sum
    of M * t t^T.

    Args:
        train: moments of the training images. test: of the held-out images, grouped.
        pixel_noise: variance of the measurement noise of a pixel, or None, as in ``factorize``.

    Returns:
        The curve, in float64. Cost: one eigh of size d, and 4 d^3 per group of held-out images.

    Raises:
        InputError: moments that do not fit together.

    Example:
        >>> x, y = np.random.default_rng(0).integers(0, 256, (90, 2, 2, 1)).astype(np.uint8), np.arange(90) % 3
        >>> m = ma.Moments.from_arrays(x, y, groups=2)
        >>> pca_curve(m, m, None).eval_r2.shape
        (4,)
    """
    problem = factorize(train, pixel_noise=pixel_noise)
    t = problem.t0
    inside = curves_from_targets(t, t, problem.syy, problem.yty)
    held = problem.hold_out(test)
    inner = t @ t.T
    weights = np.triu(2 * inner, 1) + np.diag(np.diag(inner))

    def errors(gram: np.ndarray, cross: np.ndarray, variance: np.ndarray | np.floating) -> np.ndarray:
        return variance + np.cumsum(np.einsum("ij,ij->j", gram, weights) - 2 * (t * cross).sum(1))

    groups = zip(held.group_gram, held.group_cross, held.group_variance, strict=True)
    parts = np.stack([errors(gram, cross, variance) for gram, cross, variance in groups])
    out = held_out_curves(errors(held.gram, held.cross, held.variance), parts, held)
    sizes = (np.asarray(n) for n in (train.num_pixels, train.count, test.count))
    return Curve(inside.r2, inside.alignment, out.r2, out.se, out.influence, *sizes)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How every curve is computed.

    Attributes:
        center: covariances (True) or moments about zero. groups: of held-out images. pixel_noise: variance or None.
    """

    center: bool
    groups: int
    pixel_noise: float | None


@dataclasses.dataclass(frozen=True)
class Job:
    """One condition.

    Attributes:
        key: its name in the store. build: makes the data set. num_pixels: d, for the estimate of memory.
        protocol: how its curve is computed. preprocessing: what was done to the stored pixels.
    """

    key: str
    build: Callable[[], ma.ImageDataset]
    num_pixels: int
    protocol: Protocol
    preprocessing: str = "stored pixels"

    @property
    def memory(self) -> int:
        """Bytes that the curve takes, about: grouped moments in float64 and float32, and a few [d, d] temporaries."""
        return self.num_pixels**2 * (12 * self.protocol.groups + 80)

    def solve(self, _basis: None) -> list[Arrays]:
        """Make the images, their moments and the curve."""
        data, protocol = self.build(), self.protocol
        moments = functools.partial(
            ma.Moments.from_arrays,
            num_classes=data.classes,
            center=protocol.center,
            preprocessing=self.preprocessing,
        )
        train = moments(data.train_images, data.train_labels)
        test = moments(data.test_images, data.test_labels, groups=protocol.groups)
        return [pca_curve(train, test, protocol.pixel_noise)._asdict()]


def run_jobs(jobs: Sequence[Job], store: PointStore, workers: int | None, memory: int) -> dict[str, Curve]:
    """Curves of all jobs, each stored as soon as it is finished.

    Args:
        jobs: what to do. store: finished curves. workers: threads, or None for one per core as far as memory goes.
        memory: bytes of this machine.

    Returns:
        Curves by key.
    """
    if workers is None:
        # Half of the memory: the data sets and the eigensolver want their part.
        fitting = max(1, memory // 2 // max(job.memory for job in jobs))
        workers = min(worker_count(), fitting) if is_cpu(solve_device()) else 1
    tasks = [Task((job.key,), job.solve) for job in jobs]
    found = run_groups([TaskGroup(lambda: None, tasks)], workers=workers, store=store, progress=True)
    return {job.key: Curve(**found[job.key]) for job in jobs}


def set_jobs(sets: Mapping[str, ma.ImageDataset], protocol: Protocol) -> dict[str, Job]:
    """One job per data set, by the set's label."""
    return {
        label: Job(f"set-{i}", functools.partial(_as_is, data), _pixels(data), protocol)
        for i, (label, data) in enumerate(sets.items())
    }


def _as_is(data: ma.ImageDataset) -> ma.ImageDataset:
    return data


def class_jobs(
    data: ma.ImageDataset, counts: Sequence[int], seeds: int, seed: int, protocol: Protocol
) -> dict[tuple[int, int], Job]:
    """Nested random class subsets: one job per (random order of the classes, number of classes).

    Every subset has the same number of training images, as many from each class, so that curves differ by the task and
    not by the sample size. The spread between orders gives the standard errors: held-out images stay one group.
    """
    one_group = dataclasses.replace(protocol, groups=1)
    total = int(np.bincount(data.train_labels, minlength=data.classes).min()) * min(counts)
    jobs = {}
    for i in range(seeds):
        order = np.random.default_rng([seed, i]).permutation(data.classes)
        for count in counts:
            build = functools.partial(class_subset, data, order[:count].tolist(), total // count, seed + i)
            jobs[i, count] = Job(f"classes-{i}-{count}", build, _pixels(data), one_group)
    return jobs


def class_subset(data: ma.ImageDataset, classes: Sequence[int], per_class: int, seed: int) -> ma.ImageDataset:
    """Some classes, with a random draw of as many training images of each, and all their test images.

    Args:
        data: any set. classes: at least two. per_class: training images of each class. seed: of the draw.

    Returns:
        The subset; labels 0, 1, ... in the order given.
    """
    part = select_classes(data, classes)
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(part.train_labels == c) for c in range(len(classes))]
    rows = np.sort(np.concatenate([rng.choice(m, per_class, replace=False) for m in members]))
    return dataclasses.replace(part, train_images=part.train_images[rows], train_labels=part.train_labels[rows])


def resolution_jobs(data: ma.ImageDataset, factors: Sequence[int], protocol: Protocol) -> dict[int, Job]:
    """The same images and labels, average-pooled: one job per factor.

    The mean of f x f pixels carries 1 / f^2 of the measurement noise of one.
    """
    noise = protocol.pixel_noise
    if noise is None and data.train_images.dtype == np.uint8:
        noise = _QUANTIZATION
    jobs = {}
    for factor in factors:
        scaled = dataclasses.replace(protocol, pixel_noise=None if noise is None else noise / factor**2)
        jobs[factor] = Job(
            f"resolution-{factor}",
            functools.partial(_pooled, data, factor),
            _pixels(data) // factor**2,
            scaled,
            f"average-pooled {factor} x {factor}",
        )
    return jobs


def _pooled(data: ma.ImageDataset, factor: int) -> ma.ImageDataset:
    if factor == 1:
        return data

    # float64: in float32 the moments' rounding would compare with the small noise floor.
    def pool(images: np.ndarray) -> np.ndarray:
        return average_pool(images, factor).astype(np.float64)

    return dataclasses.replace(data, train_images=pool(data.train_images), test_images=pool(data.test_images))


class Backgrounds(NamedTuple):
    """Natural images to crop backgrounds from.

    Attributes:
        train: [m, h, w, c] values 0..255. test: [m', h, w', c], other images or other parts of them.
    """

    train: np.ndarray
    test: np.ndarray


def photographs() -> Backgrounds:
    """The two photographs that scikit-learn bundles (china and flower), at a quarter of their resolution.

    Training crops come from the left 70% of each photograph, test crops from the rest.

    Returns:
        [2, 106, 112, 3] and [2, 106, 48, 3] float32.
    """
    # Imported here: scikit-learn is slow to import.
    from sklearn.datasets import load_sample_images

    images = np.stack(load_sample_images().images)
    h, w = (side // _PHOTOGRAPH_POOL * _PHOTOGRAPH_POOL for side in images.shape[1:3])
    pooled = average_pool(images[:, :h, :w], _PHOTOGRAPH_POOL)
    border = pooled.shape[2] * 7 // 10
    return Backgrounds(pooled[:, :, :border], pooled[:, :, border:])


def like_foreground(backgrounds: Backgrounds, channels: int) -> Backgrounds:
    """Grey backgrounds (mean of the channels) for grey glyphs, so that both share one channel."""
    if channels != 1 or backgrounds.train.shape[-1] == 1:
        return backgrounds
    return Backgrounds(*(images.mean(-1, keepdims=True, dtype=np.float32) for images in backgrounds))


def blended(data: ma.ImageDataset, backgrounds: Backgrounds, contrast: float, seed: int) -> ma.ImageDataset:
    """White glyphs over crops of natural images, as 8-bit images (one quantisation noise at every contrast).

    Args:
        data: glyphs, bright on dark. backgrounds: with as many channels. contrast: in [0, 1].
        seed: of the crops; those of one image are the same at every contrast.

    Returns:
        The data set with blended images, uint8.
    """
    train = blend_over_backgrounds(data.train_images, backgrounds.train, contrast, seed)
    test = blend_over_backgrounds(data.test_images, backgrounds.test, contrast, seed + 1)
    return dataclasses.replace(
        data, train_images=np.rint(train).astype(np.uint8), test_images=np.rint(test).astype(np.uint8)
    )


def background_jobs(
    data: ma.ImageDataset, backgrounds: Backgrounds, contrasts: Sequence[float], seed: int, protocol: Protocol
) -> dict[float, Job]:
    """The same glyphs, labels and crops: one job per contrast of the background."""
    return {
        contrast: Job(
            f"background-{contrast!r}",
            functools.partial(blended, data, backgrounds, contrast, seed),
            _pixels(data),
            protocol,
            f"over backgrounds of contrast {contrast:g}",
        )
        for contrast in contrasts
    }


def _pixels(data: ma.ImageDataset) -> int:
    return int(np.prod(data.image_shape))
