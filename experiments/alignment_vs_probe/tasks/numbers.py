"""Tasks made of the images: brightness, contrast, position, principal components; numbers, standardised."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from experiments.alignment_vs_probe.tasks.task import Task, TaskKind
from mae_align.data.dataset import ImageDataset
from mae_align.moments.moments import Moments
from mae_align.moments.principal import PrincipalComponents, varying_components
from mae_align.runtime.errors import InputError

# Images held in float64 at a time.
_ROWS = 4096


def brightness(dataset: ImageDataset) -> Task:
    """Mean of all pixel values of the image.

    Args:
        dataset: any.

    Raises:
        InputError: images that are all equally bright.

    Example:
        >>> x, y = np.arange(4.0).reshape(4, 1, 1, 1), np.array([0, 1, 0, 1])
        >>> brightness(ImageDataset(x, y, x, y, ("a", "b"), "toy")).train_targets.round(2).ravel().tolist()
        [-1.34, -0.45, 0.45, 1.34]
    """
    return _of_numbers(dataset, "brightness", TaskKind.BRIGHTNESS, lambda x: x.mean((1, 2, 3))[:, None])


def contrast(dataset: ImageDataset) -> Task:
    """Standard deviation of the pixel values of the image.

    Args:
        dataset: any.

    Raises:
        InputError: images that all have the same contrast.

    Example:
        >>> x, y = np.arange(8.0).reshape(4, 2, 1, 1) ** 2, np.array([0, 1, 0, 1])
        >>> contrast(ImageDataset(x, y, x, y, ("a", "b"), "toy")).train_targets.shape
        (4, 1)
    """
    return _of_numbers(dataset, "contrast", TaskKind.CONTRAST, lambda x: x.std((1, 2, 3))[:, None])


def position(dataset: ImageDataset, reference: np.ndarray | float, of: str) -> tuple[Task, Task]:
    """Where in the image it differs from a reference: the centre of mass of |x - reference|, across and down.

    Args:
        dataset: any.
        reference: the mean image [h, w, c], or a number: 0 gives the centre of mass of the intensity.
        of: what that is, for the names.

    Returns:
        Two tasks. An image that is the reference everywhere has its centre of mass in the middle.

    Raises:
        InputError: a reference of another shape; centres that do not vary.

    Example:
        >>> x, y = np.eye(4).reshape(4, 2, 2, 1), np.array([0, 1, 0, 1])
        >>> across, down = position(ImageDataset(x, y, x, y, ("a", "b"), "toy"), 0.0, "intensity")
        >>> across.train_targets.ravel().tolist(), down.name
        ([-1.0, 1.0, -1.0, 1.0], 'position of intensity, down')
    """
    height, width, _ = dataset.image_shape
    reference = np.asarray(reference, np.float64)
    if reference.ndim and reference.shape != dataset.image_shape:
        raise InputError(f"reference of shape {list(reference.shape)}: give a number or {list(dataset.image_shape)}")

    def centre(axis: tuple[int, int], size: int) -> Callable[[np.ndarray], np.ndarray]:
        def found(x: np.ndarray) -> np.ndarray:
            mass = np.abs(x - reference).sum(axis)
            total, middle = mass.sum(1), (size - 1) / 2
            moment = mass @ (np.arange(size) - middle)
            return (middle + np.where(total > 0, moment / np.where(total > 0, total, 1.0), 0.0))[:, None]

        return found

    names = f"position of {of}, across", f"position of {of}, down"
    return (
        _of_numbers(dataset, names[0], TaskKind.POSITION, centre((1, 3), width)),
        _of_numbers(dataset, names[1], TaskKind.POSITION, centre((2, 3), height)),
    )


def top_components(
    dataset: ImageDataset, moments: Moments, count: int, *, components: PrincipalComponents | None = None
) -> Task:
    """Scores along the principal components of largest variance: what reconstruction learns first.

    Args:
        dataset: any.
        moments: of its training images.
        count: m, at most the number of components with variance.
        components: of :func:`components_with_variance`, where they are at hand.

    Raises:
        InputError: count outside 1..number of components with variance, moments of other images.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(50, 2, 2, 1)), np.arange(50) % 2
        >>> data = ImageDataset(x, y, x, y, ("a", "b"), "toy")
        >>> top_components(data, Moments.from_arrays(x), 2).train_targets.shape
        (50, 2)
    """
    vectors, _ = components or components_with_variance(dataset, moments)
    if not 1 <= count <= vectors.shape[1]:
        raise InputError(f"count={count}: these images have {vectors.shape[1]} components with variance")
    return _of_numbers(
        dataset,
        f"top {count} components",
        TaskKind.TOP_COMPONENTS,
        lambda x: _scores(x, moments.mean_x, vectors[:, :count]),
    )


def bottom_components(
    dataset: ImageDataset,
    moments: Moments,
    count: int,
    share: float,
    seed: int,
    *,
    components: PrincipalComponents | None = None,
) -> Task:
    """Scores along random principal components of the bottom subspace: what reconstruction learns last.

    The subspace holds the most components of small variance that together carry at most ``share`` of it; directions in
    which the images vary no more than their values are rounded are left out.

    Args:
        dataset: any.
        moments: of its training images.
        count: m; fewer where the subspace has fewer.
        share: of the variance, inside (0, 1).
        seed: of the choice among the components.
        components: of :func:`components_with_variance`, where they are at hand.

    Raises:
        InputError: a share that holds no component, count below 1, moments of other images.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(50, 2, 2, 1)), np.arange(50) % 2
        >>> data = ImageDataset(x, y, x, y, ("a", "b"), "toy")
        >>> bottom_components(data, Moments.from_arrays(x), 2, 0.6, seed=0).name
        '2 components of the bottom 60% of the variance'
    """
    if not 0.0 < share < 1.0 or count < 1:
        raise InputError(f"share={share}, count={count}: give a share of the variance inside (0, 1) and at least 1")
    vectors, values = components or components_with_variance(dataset, moments)
    below = np.cumsum(values[::-1])[::-1] / values.sum()
    inside = np.flatnonzero((below <= share) & (values > moments.quantization_step**2 / 12))
    if not len(inside):
        raise InputError(f"share={share}: no component with variance carries so little of it, give more")
    chosen = np.sort(np.random.default_rng([seed, 2]).permutation(inside)[:count])
    return _of_numbers(
        dataset,
        f"{len(chosen)} component{'s' if len(chosen) > 1 else ''} of the bottom {100 * share:g}% of the variance",
        TaskKind.BOTTOM_COMPONENTS,
        lambda x: _scores(x, moments.mean_x, vectors[:, chosen]),
    )


def _of_numbers(dataset: ImageDataset, name: str, kind: TaskKind, measure: Callable[[np.ndarray], np.ndarray]) -> Task:
    """A task of numbers: ``measure`` maps float64 images [b, h, w, c] to [b, q]."""
    train, test = (_measured(images, measure) for images in (dataset.train_images, dataset.test_images))
    mean, spread = train.mean(0), train.std(0)
    # What rounding leaves of a constant is not a quantity. All of them are sums of pixel values, but for positions.
    pixels = train if kind is TaskKind.POSITION else dataset.train_images
    largest = max(abs(float(pixels.min())), abs(float(pixels.max())))
    if not (spread > 1e-9 * largest).all():
        raise InputError(f"{name} is the same for all training images of {dataset.name!r}: there is nothing to learn")
    rows = (np.arange(len(train)), np.arange(len(test)))
    return Task(name, kind, (train - mean) / spread, (test - mean) / spread, None, *rows, restricted=False)


def _measured(images: np.ndarray, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    parts = range(0, len(images), _ROWS)
    return np.concatenate([measure(images[i : i + _ROWS].astype(np.float64)) for i in parts])


def _scores(x: np.ndarray, mean: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return (x.reshape(len(x), -1) - mean) @ vectors


def components_with_variance(dataset: ImageDataset, moments: Moments) -> PrincipalComponents:
    """Principal components along which the images vary.

    Args:
        dataset: any.
        moments: of its training images.

    Returns:
        As :func:`mae_align.moments.principal.varying_components`.

    Raises:
        InputError: moments of other images.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(50, 2, 2, 1)), np.arange(50) % 2
        >>> components_with_variance(ImageDataset(x, y, x, y, ("a", "b"), "toy"), Moments.from_arrays(x))[0].shape
        (4, 4)
    """
    if moments.image_shape != dataset.image_shape:
        raise InputError(
            f"moments of images {list(moments.image_shape)}, data set of {list(dataset.image_shape)}: make them from it"
        )
    return varying_components(moments)
