"""The data set of an experiment, loaded by every process."""

from __future__ import annotations

import mae_align as ma
from mae_align.distributed import refused_together


def load_together(label: str, *, image_size: int | None, seed: int) -> ma.ImageDataset:
    """`mae_align.load_dataset` in every process; what one of them cannot load, all refuse.

    Args:
        label, image_size, seed: as for `load_dataset`, the same in every process.

    Returns:
        The data set.

    Raises:
        InputError: of the first process that cannot load it, such as one on a machine without the files.

    Example:
        >>> load_together("digits", image_size=None, seed=0).name
        'digits'
    """
    with refused_together():
        return ma.load_dataset(label, image_size=image_size, seed=seed)
