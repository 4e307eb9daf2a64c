"""Small TFDS data sets of any features, written without TensorFlow, independently of the package."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import array_record.python.array_record_module as array_record_module
import numpy as np
import tensorflow_datasets
from PIL import Image

tfds: Any = tensorflow_datasets  # its types are those of TensorFlow

# The start of a program without TensorFlow, installed or not.
NO_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder
class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "tensorflow" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
"""


def encoded(picture: Image.Image | np.ndarray, kind: str = "png") -> bytes:
    """A picture as the bytes of a file."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return buffer.getvalue()


def pixels(seed: int, shape: tuple[int, ...] = (6, 5, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write_set(
    path: Path,
    features: Mapping[str, Any],
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    name: str = "pets",
    version: str = "1.0.0",
    supervised_keys: tuple[str, str] | None = None,
) -> Path:
    """One file per split, and the metadata that TFDS opens the folder by."""
    path.mkdir(parents=True)
    feature_dict = tfds.features.FeaturesDict(dict(features))
    for split, examples in splits.items():
        file = path / f"{name}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(os.fspath(file), "group_size:1")
        for example in examples:
            writer.write(feature_dict.serialize_example(dict(example)))
        writer.close()
    tfds.folder_dataset.write_metadata(
        data_dir=path,
        features=feature_dict,
        split_infos=[tfds.core.SplitInfo(name=s, shard_lengths=[len(e)], num_bytes=1) for s, e in splits.items()],
        version=version,
        check_data=False,
        supervised_keys=supervised_keys,
    )
    return path


def write_pets(path: Path, sizes: Mapping[str, int], *, label: int | None = None, shape=(6, 5, 3), **options) -> Path:
    """Random pictures of two classes; the labels alternate unless one is given."""
    features = {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }
    shape = tuple(side or 6 for side in shape)
    splits = {
        split: [
            {"image": encoded(pixels(100 * k + i, shape)), "label": i % 2 if label is None or k == 0 else label}
            for i in range(n)
        ]
        for k, (split, n) in enumerate(sizes.items())
    }
    return write_set(path, features, splits, **options)
