"""Labelled images come in: loaders by name, sources to stream from, splits, transforms, patches and frequencies.

There is no mathematics here beyond what the functions say; patches are those of docs/theory.md, section 3.3.
"""

from mae_align.data.dataset import ImageDataset, encode_labels
from mae_align.data.registry import load_dataset, open_source, open_splits
from mae_align.data.source import ArraySource, ImageSource
from mae_align.data.split import stratified_split, validation_split
from mae_align.data.transforms import (
    average_pool,
    blend_over_backgrounds,
    jitter,
    select_classes,
)

__all__ = [
    "ArraySource",
    "ImageDataset",
    "ImageSource",
    "average_pool",
    "blend_over_backgrounds",
    "encode_labels",
    "jitter",
    "load_dataset",
    "open_source",
    "open_splits",
    "select_classes",
    "stratified_split",
    "validation_split",
]
