"""Settings of experiments: the fields that all of them have, and bounds that are checked before any work.

A setting is a field of a frozen dataclass. Its help text is the string below it, and its bounds stand in its type::

    patch_sizes: Annotated[tuple[int, ...], Bounds(least=1, unique=True)] = (2, 4)
    \"\"\"Sides of square patches, in pixels.\"\"\"
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from mae_align.runtime.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def _text(value: float) -> str:
    """A number in a message: whole ones in full."""
    return str(value) if isinstance(value, int) else f"{value:g}"


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a number, or every number of a tuple, must keep to; NaN keeps to nothing.

    Attributes:
        least: smallest value allowed.
        above: value that it must be over.
        most: largest value allowed.
        below: value that it must be under.
        unique: whether a tuple may not repeat a value.
        infinite: whether infinity is a value.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    unique: bool = False
    infinite: bool = False

    def allows(self, value: float) -> bool:
        """Whether one number keeps to the bounds.

        Example:
            >>> Bounds(least=0, below=1).allows(1.0), Bounds(above=0).allows(math.inf)
            (False, False)
        """
        return (
            not math.isnan(value)
            and (self.infinite or math.isfinite(value))
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """What to give, in words."""
        words = {"at least": self.least, "over": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {_text(limit)}" for word, limit in words.items() if limit is not None) or "finite"


ELSEWHERE = "changes where or how fast, not what is computed"
"""Mark of a field, ``Annotated[T, ELSEWHERE]``: a run with another value is the same run."""
ADDS = "adds to what is reported, and changes none of the rest"
"""Mark of a field: a run with another value goes on in the same folder with what is missing."""

Count = Annotated[int, Bounds(least=1)]
Counts = Annotated[tuple[int, ...], Bounds(least=1, unique=True)]
# Of the layers of one network, which may be equally wide.
Widths = Annotated[tuple[int, ...], Bounds(least=1)]
Seed = Annotated[int, Bounds(least=0)]
# Of networks: JAX takes seeds of 32 bits.
Seeds = Annotated[tuple[int, ...], Bounds(least=0, below=2**32, unique=True)]
Ratios = Annotated[tuple[float, ...], Bounds(least=0, most=1, unique=True)]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
Workers = Annotated[int | None, Bounds(least=1), ELSEWHERE]
Groups = Annotated[int, Bounds(least=2)]


class Task(enum.Enum):
    """What a data set asks about its images."""

    classes = enum.auto()
    targets = enum.auto()
    nothing = enum.auto()


TAKE_TARGETS = ("diagnose_corruption", "lambda_sweep", "masking_sweep", "minimal", "theorem_check")
"""Experiments whose measure is defined for numbers and attributes, too; a test holds it."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every experiment on a data set can be told."""

    TAKES: ClassVar[tuple[Task, ...]] = (Task.classes,)
    """Of which kinds the labels may be."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, table:FILE.csv, images:DIR, cifar:DIR, stl10:DIR, svhn:DIR,
    tfds:NAME or prepared:DIR."""
    image_size: Annotated[int | tuple[int, int] | None, Bounds(least=1)] = None
    """Resize images to squares of this side, or to HEIGHT WIDTH, in pixels; none keeps them."""
    validation_fraction: Annotated[float, Bounds(above=0, below=1)] = 0.2
    """Share of the training images kept out for validation: everything that is chosen is chosen on it.

    A data set with validation images of its own keeps to these.
    """
    max_train: Annotated[int | None, Bounds(least=2)] = None
    """Fit on at most so many of the remaining training images, drawn at random; none for all.

    With it, validation images are never fitted, in no experiment, and no more of them are used than images are fitted.
    """
    max_validation: Annotated[int | None, Bounds(least=2)] = None
    """Use at most so many validation images, drawn at random; none for all, or for as many as --max-train leaves."""
    max_test: Annotated[int | None, Bounds(least=2)] = None
    """Use at most so many test images, drawn at random; none for all."""
    seed: Seed = 0
    """Of the split and of every subset that is drawn."""
    out: Annotated[str | None, ELSEWHERE] = None
    """Run folder; none for runs/EXPERIMENT-DATA-HASH. A run that is finished there is shown, not computed again."""
    reuse: Annotated[bool, ELSEWHERE] = False
    """Go on in a folder that another version of the code began, and keep what is finished there."""

    def check(self) -> None:
        """Refuse settings that do not go together, before any data are read; each experiment adds its own.

        Raises:
            InputError: naming the options.
        """
        for value in vars(self).values():
            if isinstance(value, Training):
                value.check()


@dataclasses.dataclass(frozen=True)
class Training:
    """How networks are trained by AdamW; the same words in every experiment."""

    epochs: Count = 5
    """Passes over the training images."""
    batch_size: Count = 128
    """Images in a step."""
    learning_rate: Positive = 2e-3
    """Peak learning rate: it grows linearly in the warm-up, then falls to 0 along half a cosine."""
    warmup_epochs: NotNegative = 0.5
    """Epochs in which the learning rate grows; fewer than all."""
    weight_decay: NotNegative = 0.05
    """Weight decay of AdamW."""
    beta2: Annotated[float, Bounds(least=0, below=1)] = 0.95
    """Second decay rate of AdamW."""
    clip_norm: Annotated[float, Bounds(above=0, infinite=True)] = 1.0
    """Largest norm of a gradient; inf for no clipping."""
    bfloat16: bool = False
    """Compute in bfloat16, parameters and losses in float32: for accelerators."""

    def check(self) -> None:
        """Refuse a warm-up as long as the training."""
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"--training.warmup-epochs {self.warmup_epochs:g}: give fewer than the {self.epochs} of "
                "--training.epochs"
            )

    def steps(self, num_images: int) -> int:
        """Steps of the training; what does not fill a batch is left out of each pass.

        Raises:
            InputError: a batch over the images.

        Example:
            >>> Training(epochs=2, batch_size=10).steps(39)
            6
        """
        if self.batch_size > num_images:
            raise InputError(
                f"--training.batch-size {self.batch_size}: there are {num_images} training images, give a smaller batch"
            )
        return self.epochs * (num_images // self.batch_size)

    def warmup_steps(self, num_images: int) -> int:
        """Steps of the warm-up, at least one fewer than the training has."""
        total = self.steps(num_images)
        return min(round(self.warmup_epochs * total / self.epochs), total - 1)


@dataclasses.dataclass(frozen=True)
class Vit:
    """Sizes of a vision transformer that is a masked autoencoder; the same words in every experiment."""

    width: Count = 64
    """Width of the encoder's tokens, and number of features."""
    depth: Annotated[int, Bounds(least=0)] = 2
    """Blocks of the encoder."""
    heads: Count = 4
    """Attention heads of the encoder."""
    decoder_width: Count = 64
    """Width of the decoder's tokens."""
    decoder_depth: Annotated[int, Bounds(least=0)] = 1
    """Blocks of the decoder."""
    decoder_heads: Count = 4
    """Attention heads of the decoder."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of the settings, nested ones with a dot in their option.

    Attributes:
        option: as on the command line.
        path: names of the fields that lead to it.
        value: what was given.
        bounds: of its numbers, or None.
        elsewhere: whether it changes nothing that is computed.
        adds: whether it only adds to what is reported.
    """

    option: str
    path: tuple[str, ...]
    value: Any
    bounds: Bounds | None
    elsewhere: bool
    adds: bool


def settings(config: DataclassInstance, path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every setting of a configuration, nested ones included.

    Example:
        >>> [s.option for s in settings(RunConfig())][:2]
        ['--data', '--image-size']
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, here = getattr(config, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from settings(value, here)
            continue
        marks = get_args(hints[field.name])[1:] if get_origin(hints[field.name]) is Annotated else ()
        bounds = next((mark for mark in marks if isinstance(mark, Bounds)), None)
        yield Setting("--" + ".".join(here).replace("_", "-"), here, value, bounds, ELSEWHERE in marks, ADDS in marks)


def check(config: DataclassInstance) -> None:
    """Refuse settings outside their bounds, tuples without a value and, where they must not, with one twice.

    Raises:
        InputError: naming the option, the value and what to give.

    Example:
        >>> check(RunConfig(seed=-1))
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: --seed -1: give a number at least 0
    """
    for one in settings(config):
        several = isinstance(one.value, tuple | list)
        values = list(one.value) if several else [one.value]
        if several and not values:
            raise InputError(f"{one.option} has no value: give at least one, or leave the option out")
        if one.bounds is None:
            continue
        for value in values:
            if isinstance(value, int | float) and not one.bounds.allows(value):
                kind = "numbers" if several else "a number"
                raise InputError(f"{one.option} {_text(value)}: give {kind} {one.bounds}")
        if one.bounds.unique and len(set(values)) < len(values):
            words = " ".join(str(v.value if isinstance(v, enum.Enum) else v) for v in values)
            raise InputError(f"{one.option} {words} repeats a value: give each once")


def computed(config: DataclassInstance) -> dict[str, Any]:
    """The settings that results depend on, as nested dictionaries.

    Example:
        >>> "out" in computed(RunConfig()), computed(RunConfig())["seed"]
        (False, 0)
    """
    return _nested(one for one in settings(config) if not (one.elsewhere or one.adds))


def added(config: DataclassInstance) -> dict[str, Any]:
    """The settings that only add to what is reported, as nested dictionaries.

    Example:
        >>> added(RunConfig())
        {}
    """
    return _nested(one for one in settings(config) if one.adds)


def _nested(found: Iterable[Setting]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for one in found:
        inner = nested
        for name in one.path[:-1]:
            inner = inner.setdefault(name, {})
        inner[one.path[-1]] = one.value
    return nested


def written_options(values: dict[str, Any], prefix: str = "--") -> list[str]:
    """A configuration read from config.json as options of the command line.

    Example:
        >>> written_options({"data": "digits", "network": {"mlp_widths": [4, 2]}, "held_out": False})
        ['--data', 'digits', '--network.mlp-widths', '4', '2', '--no-held-out']
    """
    options: list[str] = []
    for name, value in values.items():
        option = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            options += written_options(value, f"{option}.")
        elif isinstance(value, bool):
            head, _, tail = option.rpartition(".") if "." in option else ("", "", option)
            options.append(option if value else f"{head}.no-{tail}" if head else f"--no-{tail.removeprefix('--')}")
        else:
            options += [option, *map(str, value if isinstance(value, list) else [value])]
    return options
