"""The tasks that results are reported on."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from experiments.alignment_vs_probe.tasks.labels import class_pairs, class_subsets, coarse_labels, fine_labels
from experiments.alignment_vs_probe.tasks.numbers import (
    bottom_components,
    brightness,
    components_with_variance,
    contrast,
    position,
    top_components,
)
from experiments.alignment_vs_probe.tasks.task import Task
from mae_align.data.dataset import ImageDataset
from mae_align.moments.moments import Moments
from mae_align.runtime.errors import InputError

# Class pairs; components of a task, at most what there is; shares of the variance, a bottom task each.
_PAIRS = 4
_COMPONENTS = 8
_SHARES = (0.2, 0.05)


def standard_tasks(
    dataset: ImageDataset,
    moments: Moments,
    seed: int,
) -> tuple[Task, ...]:
    """All the tasks above, with the defaults that results are reported on.

    Fine and coarse labels, two subsets, pairs of classes, brightness, contrast, position of what differs from the mean
    image and of the intensity (across and down each), components of large and of small variance: 17 for ten classes. A
    task that a data set does not have (coarse groups of two classes, brightness where all images are equally bright) is
    left out with a warning.

    Args:
        dataset: any.
        moments: of its training images (mean image and components).
        seed: of the choices.

    Returns:
        Tasks with different names; the same for the same arguments. Cost: one eigh of size d, one pass over the images
        per task of numbers.

    Raises:
        InputError: moments of other images, a negative seed.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(60, 4, 4, 1)) * np.arange(16).reshape(4, 4, 1), np.arange(60) % 6
        >>> data = ImageDataset(x, y, x, y, tuple("abcdef"), "toy")
        >>> len(standard_tasks(data, Moments.from_arrays(x), seed=0))
        17
    """
    if seed < 0:
        raise InputError(f"seed={seed}: give a whole number from 0")
    found = components_with_variance(dataset, moments)
    top = min(_COMPONENTS, len(found[1]))
    mean = moments.mean_x.reshape(dataset.image_shape)
    makers: list[Callable[[], Task | tuple[Task, ...]]] = [lambda: fine_labels(dataset)]
    if dataset.classes > 2:
        makers += [lambda: coarse_labels(dataset), lambda: class_subsets(dataset, seed)]
        makers += [lambda: class_pairs(dataset, _PAIRS, seed)]
    makers += [
        lambda: brightness(dataset),
        lambda: contrast(dataset),
        lambda: position(dataset, mean, "difference from the mean"),
        lambda: position(dataset, 0.0, "intensity"),
        lambda: top_components(dataset, moments, top, components=found),
    ]
    for share in _SHARES:
        makers.append(
            lambda share=share: bottom_components(dataset, moments, _COMPONENTS, share, seed, components=found)
        )
    tasks: dict[str, Task] = {}
    for make in makers:
        try:
            made = make()
        except InputError as error:
            warnings.warn(f"a task is left out: {error}", stacklevel=2)
            continue
        for task in made if isinstance(made, tuple) else (made,):
            tasks.setdefault(task.name, task)
    return tuple(tasks.values())
