"""Labelled image sets: loaders, splits and transforms."""

from mae_align.data.dataset import ImageDataset
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
    "jitter",
    "load_dataset",
    "open_source",
    "open_splits",
    "select_classes",
    "stratified_split",
    "validation_split",
]
