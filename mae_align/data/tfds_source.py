"""TensorFlow Datasets without TensorFlow: prepared sets are read through ``tfds.data_source``."""

from __future__ import annotations

import dataclasses
import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mae_align.data.dataset import ImageShape
from mae_align.data.pictures import is_deep, open_picture, with_channels
from mae_align.data.resize import ImageSize, height_and_width, resize_images
from mae_align.data.source import ImageSource, Splits, split_off_test
from mae_align.runtime.errors import InputError

METADATA = "dataset_info.json"  # TFDS opens a folder that has it
INCOMPLETE = ".incomplete"  # suffix of the folder in which a set is being prepared

_HELD_OUT = ("test", "validation")  # in the order in which they are tried
_PIXELS = (np.uint8, np.float32, np.float64)
_OWN_FILES = (
    "mae_align.data.prepare.write_prepared(mae_align.data.open_splits('folder:DIR'), 'DIR2'), then prepared:DIR2"
)


def open_tfds(name: str, image_size: ImageSize | None, seed: int, test_fraction: float) -> Splits:
    """A data set that TFDS has prepared as ArrayRecord, under ``TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

    The test images are the split ``test``; ``validation`` where there is no ``test`` or its labels are withheld
    (-1); where there is neither, a share of ``train``. What is not ``test`` is said in the name of the data set.
    The label is the class label named by the set itself (its supervised keys), else the only one.

    Args:
        name: NAME, NAME/CONFIG, either with :VERSION, as TFDS writes them.
        image_size: side of a square, or (height, width), in pixels; needed where the images differ in size.
        seed: of the split, where there is no other test set.
        test_fraction: share of the test images, where there is no other test set.

    Returns:
        Sources that decode each image when it is read.

    Raises:
        InputError: TFDS is not installed, an unknown name, a set that is not prepared or not as ArrayRecord (the
            message says how to prepare it), no class label, images of several sizes without ``image_size``.

    Example:
        >>> import tensorflow_datasets as tfds
        >>> with tfds.testing.mock_data(num_examples=3):  # random pixels, for lack of files
        ...     splits = open_tfds("cifar10", None, seed=0, test_fraction=0.2)
        >>> len(splits.train), splits.train.image_shape, splits.train.num_classes
        (3, (32, 32, 3), 10)
    """
    tfds = import_tfds()
    try:
        builder = tfds.builder(name)
    except ImportError as error:
        raise InputError(
            f"TFDS needs {error.name} for {name!r}: give the folder it was prepared in, prepared:DIR"
        ) from None
    except Exception as error:  # a bad name shows as whatever TFDS stumbles on
        raise _unknown(tfds, name, error) from None
    return _splits(tfds, builder, name, _unprepared(name, builder), image_size, seed, test_fraction)


def open_prepared(root: Path, image_size: ImageSize | None, seed: int, test_fraction: float) -> Splits:
    """A data set in a folder of its own, as :func:`mae_align.data.prepare.write_prepared` or TFDS leave it.

    Args:
        root: the folder with ``dataset_info.json``.
        image_size: side of a square, or (height, width), in pixels; needed where the images differ in size.
        seed: of the split, where there is no other test set.
        test_fraction: share of the test images, where there is no other test set.

    Returns:
        Sources as of :func:`open_tfds`.

    Raises:
        InputError: no complete data set in the folder, or as :func:`open_tfds`.

    Example:
        >>> open_prepared(Path("nowhere"), None, seed=0, test_fraction=0.2)
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: no prepared data set in nowhere (no dataset_info.json): prepare it with ...
    """
    if not (root / METADATA).is_file():
        unfinished = root.with_name(root.name + INCOMPLETE)
        started = f"; {unfinished} is unfinished, the same command goes on with it" if unfinished.is_dir() else ""
        raise InputError(f"no prepared data set in {root} (no {METADATA}){started}: prepare it with {_OWN_FILES}")
    tfds = import_tfds()
    try:
        builder = tfds.builder_from_directory(root)
        name = builder.name
    except Exception as error:
        raise InputError(f"cannot open {root} ({_first_line(error)}): prepare it again with {_OWN_FILES}") from None
    return _splits(tfds, builder, name, f"{root} holds no images: prepare it again", image_size, seed, test_fraction)


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource(ImageSource):
    """One split of a TFDS data set as a source; made by :func:`open_tfds` and :func:`open_prepared`.

    Attributes:
        records: examples by position, images still encoded.
        image_key: feature of the image.
        label_key: feature of the label.
        image_shape: of every image, after resizing.
        pixel_dtype: as stored.
        image_size: to resize to, or None.
        class_names: one name per class.
        name: short name.
        identity: name, version, split and size of the set.
    """

    records: Sequence[Mapping[str, Any]]
    image_key: str
    label_key: str
    image_shape: ImageShape
    pixel_dtype: np.dtype
    image_size: ImageSize | None
    class_names: tuple[str, ...]
    name: str
    identity: str

    def __len__(self) -> int:
        return len(self.records)

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """Decode one record."""
        record = self._record(i)
        value = record[self.image_key]
        image = self._decoded(value, i) if isinstance(value, bytes) else np.asarray(value)
        if self.image_size is not None and image.shape != self.image_shape:
            image = resize_images(image[None], self.image_size)[0]
        if image.shape != self.image_shape:
            raise InputError(
                f"image {i} of {self.name!r} has shape {list(image.shape)}, not {list(self.image_shape)}: "
                "pass image_size to resize all images to one size"
            )
        return image, int(record[self.label_key])

    def labels(self) -> np.ndarray:
        """All labels; reads every record, decodes no image."""
        from tqdm.auto import tqdm

        n = len(self)
        bar = tqdm(range(n), desc=f"{self.name}: labels", unit="image", disable=n <= 20_000)
        return np.fromiter((int(self._record(i)[self.label_key]) for i in bar), np.int64, n)

    def fingerprint(self) -> str:
        """Name, version, split and size."""
        return f"{self.identity} {self.image_shape}"

    def _record(self, i: int) -> Mapping[str, Any]:
        try:
            record = self.records[i]
        except Exception as error:  # damage shows as whatever the reader or the parser raises
            raise self._damaged(i, _first_line(error)) from None
        # Of a file that was cut short, ArrayRecord may return empty records without an error.
        if record[self.image_key] is None or record[self.label_key] is None:
            raise self._damaged(i, "the record is empty")
        return record

    def _damaged(self, i: int, reason: str) -> InputError:
        return InputError(f"cannot read image {i} of {self.name!r} ({reason}): prepare the data set again")

    def _decoded(self, encoded: bytes, i: int) -> np.ndarray:
        """Pixels of a PNG or JPEG. TFDS would leave grey images and palettes in a set of colour images as they are."""
        channels = self.image_shape[2]
        try:
            with open_picture(io.BytesIO(encoded)) as picture:
                deep = is_deep(picture)
                image = np.asarray(with_channels(picture, channels))
        except Exception as error:
            raise self._damaged(i, _first_line(error)) from None
        if deep:
            raise InputError(f"image {i} of {self.name!r} has more than 8 bits per channel: store 8-bit images")
        return image[..., None] if channels == 1 else image


def import_tfds() -> ModuleType:
    """The module ``tensorflow_datasets``, imported when it is first needed.

    Raises:
        InputError: it is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"tfds: and prepared: need TensorFlow Datasets ({error.name} is not installed): pip install -e '.[tfds]'"
        ) from None
    return tfds


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _unknown(tfds: ModuleType, name: str, error: Exception) -> InputError:
    """The error for a name that TFDS does not know."""
    if Path(name).expanduser().is_dir():
        return InputError(f"{name!r} is a folder, not a name of TFDS: did you mean 'prepared:{name}'?")
    base, _, config = name.partition(":")[0].partition("/")
    known = tfds.core.registered.list_imported_builders()
    if base not in known:
        close = difflib.get_close_matches(base.lower(), known, n=1)
        hint = f", did you mean 'tfds:{close[0]}'?" if close else ""
        return InputError(f"TFDS has no data set {base!r}{hint}; from your own files: {_OWN_FILES}")
    configs = list(tfds.builder_cls(base).builder_configs)
    if config and config not in configs:
        listed = f"it has {', '.join(configs[:10])}{', ...' if len(configs) > 10 else ''}" if configs else "it has none"
        return InputError(f"TFDS has no {config!r} of {base!r}: {listed}; write tfds:NAME[/CONFIG]")
    return InputError(f"TFDS cannot open {name!r} ({_first_line(error)}): write tfds:NAME[/CONFIG]")


def _unprepared(name: str, builder: Any) -> str:
    """What is wrong where there are no files, and what to do."""
    command = f"""import tensorflow_datasets as tfds; tfds.builder('{name}').download_and_prepare("""
    command += "file_format='array_record')"
    return (
        f"{name!r} is not prepared in {builder.data_dir}: on a machine with TensorFlow run "
        f'python -c "{command}" and copy the folder here (TFDS_DATA_DIR says where), '
        f"or from your own files: {_OWN_FILES}"
    )


def _splits(
    tfds: ModuleType,
    builder: Any,
    name: str,
    unprepared: str,
    image_size: ImageSize | None,
    seed: int,
    test_fraction: float,
) -> Splits:
    """Training and test images of a builder."""
    known = [split for split, info in sorted(builder.info.splits.items()) if info.num_examples]
    if known and "train" not in known:
        raise InputError(f"{name!r} has no split 'train' (it has {', '.join(known)}): prepare one with that name")
    train = _source(tfds, builder, "train", name, unprepared, image_size)
    # Without a list of the splits there is "test", or reading it says that nothing is prepared.
    held_out: dict[str, TfdsSource] = {}
    for split in [split for split in _HELD_OUT if split in (known or ["test"])]:
        source = _source(tfds, builder, split, name, unprepared, image_size)
        if len(source) and source.read(0)[1] >= 0:
            held_out[split] = source
    if held_out:
        (split, test), *others = held_out.items()
        said = name if split == "test" else f"{name} (test: {split})"
        validation = next((dataclasses.replace(other, name=said) for _, other in others), None)
        return Splits(dataclasses.replace(train, name=said), dataclasses.replace(test, name=said), validation)
    return split_off_test(train, test_fraction, seed, f"{name} (test: {test_fraction:.0%} of train)")


def _source(
    tfds: ModuleType, builder: Any, split: str, name: str, unprepared: str, image_size: ImageSize | None
) -> TfdsSource:
    """One split of a builder."""
    image_key, label_key = _keys(tfds, builder.info, name)
    features = builder.info.features
    try:
        records = builder.as_data_source(split)
    except ImportError as error:
        raise InputError(f"reading {name!r} needs {error.name}: pip install -e '.[tfds]'") from None
    except Exception as error:
        if not builder.info.splits:
            raise InputError(unprepared) from None
        if not isinstance(error, NotImplementedError):
            raise InputError(f"cannot open {name!r} ({_first_line(error)}): prepare it again") from None
        stored = ", ".join(sorted(f.value for f in builder.info.available_file_formats())) or "an unknown format"
        raise InputError(
            f"{name!r} is prepared in {builder.data_dir} as {stored}, which only TensorFlow reads: there, run "
            f"tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record"
        ) from None
    # Images stay encoded: all of them here, for `read` decodes the one, and masks and the like are not wanted. (Set
    # afterwards, for `tfds.testing.mock_data` makes decoded examples and would need TensorFlow to encode them.)
    encoded = {key for key, feature in features.items() if _is_picture(tfds, feature)}
    records.decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
    size = builder.info.splits[split].num_bytes if split in builder.info.splits else 0
    return TfdsSource(
        records=records,
        image_key=image_key,
        label_key=label_key,
        image_shape=_shape(features[image_key], name, image_size),
        pixel_dtype=np.dtype(features[image_key].np_dtype),
        image_size=image_size,
        class_names=tuple(features[label_key].names),
        name=name,
        identity=f"{builder.info.full_name} {split} {len(records)} images {int(size)} bytes",
    )


def _is_picture(tfds: ModuleType, feature: Any) -> bool:
    """Whether a feature is stored as a PNG or JPEG of 8 bits per channel."""
    return isinstance(feature, tfds.features.Image) and feature.np_dtype == np.uint8


def _keys(tfds: ModuleType, info: Any, name: str) -> tuple[str, str]:
    """Which features are the image and its class."""
    features = info.features
    # Sorted, for TFDS restores them in any order.
    items = sorted(features.items()) if isinstance(features, tfds.features.FeaturesDict) else []
    labels = [key for key, feature in items if isinstance(feature, tfds.features.ClassLabel)]
    images = [key for key, feature in items if isinstance(feature, tfds.features.Image)]
    images = images or [
        key for key, feature in items if type(feature) is tfds.features.Tensor and len(feature.shape) == 3
    ]
    keys = info.supervised_keys or ()
    found = []
    for what, candidates in (("image", images), ("class label", labels)):
        if not candidates:
            raise InputError(f"{name!r} has no {what}: choose a set of labelled images")
        named = [key for key in keys if key in candidates] or [key for key in candidates if key in ("image", "label")]
        if not named and len(candidates) > 1:
            raise InputError(
                f"{name!r} has several features of kind {what} ({', '.join(candidates)}): choose another set"
            )
        found.append((named or candidates)[0])
    return found[0], found[1]


def _shape(feature: Any, name: str, image_size: ImageSize | None) -> ImageShape:
    """Height, width and channels of the images to be read."""
    if feature.np_dtype not in _PIXELS:
        raise InputError(
            f"images of {name!r} are {np.dtype(feature.np_dtype)}: only uint8, float32 and float64 are read"
        )
    shape = feature.shape
    if len(shape) != 3 or not shape[2]:
        raise InputError(f"images of {name!r} have shape {list(shape)}: only [h, w, c] with known c is read")
    if image_size is not None:
        return *height_and_width(image_size), shape[2]
    if None in shape:
        raise InputError(f"images of {name!r} differ in size: pass image_size to resize all images to one size")
    return shape
