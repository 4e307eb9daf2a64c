"""The folder in which a run keeps its configuration, results and figures.

The folder belongs to one configuration: opened again with the same one, the run goes on where it
stopped; opened with another, it is refused. Every file is written beside its place and moved there
when complete, so that an interrupted run leaves no half-written result.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import dataclasses
import enum
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import xarray as xr

from experiments.harness.config import computed
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import PointStore
from mae_align.runtime.pool import shared_store
from mae_align.runtime.processes import of_first, refused_together

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.figure import Figure
_TEMPORARY_SUFFIX = ".tmp"
# Names of files need not be UTF-8.
_ERRORS = "backslashreplace"
_INT32 = np.iinfo(np.int32)
# Largest whole number up to which float64 holds every whole number.
_EXACT_IN_FLOAT64 = 2**53


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write to, moved onto `path` when the context ends without an error.

    Args:
        path: The final place. Its folder must exist.

    Yields:
        A path in the same folder; nothing is there yet.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder, "a.txt")) as unfinished:
        ...         _ = unfinished.write_text("done")
        ...     Path(folder, "a.txt").read_text()
        'done'
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def file_name_part(label: str) -> str:
    """A data set's label as a part of a file name.

    Args:
        label: As given to `load_dataset`: a bare name or "kind:path".

    Returns:
        Letters, digits, ".", "_" and "-"; of a path only the last part, without ".kind".

    Example:
        >>> file_name_part("npz:/a/b/c.npz"), file_name_part("folder:my photos/")
        ('npz-c', 'folder-my-photos')
    """
    kind, colon, path = label.partition(":")
    # abspath, so that "folder:." is named after the folder and not after the dot.
    name = f"{kind}-{os.path.basename(os.path.abspath(path))}" if colon else kind
    name = re.sub(r"[^\w.-]+", "-", name.removesuffix(f".{kind}"), flags=re.ASCII)
    return name.strip("-.")[:60] or "data"


def _jsonable(value: object) -> Any:
    """What `json` does not know: NumPy scalars and arrays, paths, enumerations."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as JSON")


def to_json(value: object) -> str:
    """Numbers, text, lists, mappings, arrays, paths and enumerations as JSON."""
    return json.dumps(value, indent=2, default=_jsonable) + "\n"


def _netcdf3_attribute(value: Any) -> str | np.int32 | np.float64:
    """An attribute as netCDF-3 holds it: text or one number. Anything else becomes JSON text."""
    if isinstance(value, str):
        return value.encode("utf-8", _ERRORS).decode()
    if isinstance(value, bool | int | np.bool_ | np.integer):
        if _INT32.min <= value <= _INT32.max:
            return np.int32(value)
    elif isinstance(value, float | np.floating):
        return np.float64(value)
    return json.dumps(value, default=_jsonable)


def _netcdf3_variable(name: str, variable: xr.Variable) -> xr.Variable:
    """A variable in types netCDF-3 has, all values kept exactly."""
    variable = variable.copy(deep=False)
    variable.attrs = {key: _netcdf3_attribute(value) for key, value in variable.attrs.items()}
    kind, size = variable.dtype.kind, variable.dtype.itemsize
    if kind in "iu":
        # Python integers: NumPy would compare a uint64 with a negative bound through float64.
        low, high = (int(variable.min()), int(variable.max())) if variable.size else (0, 0)
        if _INT32.min <= low and high <= _INT32.max:
            return variable.astype(np.int32)
        if -_EXACT_IN_FLOAT64 <= low and high <= _EXACT_IN_FLOAT64:
            return variable.astype(np.float64)
        raise ValueError(f"{name} holds whole numbers over 2**53, too large for netCDF-3")
    if kind == "f" and size not in (4, 8):
        return variable.astype(np.float32 if size < 4 else np.float64)
    return variable


def netcdf3_ready(dataset: xr.Dataset) -> xr.Dataset:
    """A copy of a data set that xarray's SciPy engine can write and read back.

    Args:
        dataset: Numbers, truth values, text or dates; attributes of any JSON-like kind.

    Returns:
        The same values: whole numbers as int32 (float64 where int32 is too small), float16 as
        float32; attributes as text, int32 or float64, lists and the like as JSON text.

    Raises:
        ValueError: If a whole number is too large for float64 to hold it exactly.

    Example:
        >>> ready = netcdf3_ready(xr.Dataset({"k": ("i", [1, 2])}, attrs={"ratios": (0.5, 1.0)}))
        >>> ready.k.dtype, ready.attrs
        (dtype('int32'), {'ratios': '[0.5, 1.0]'})
    """
    variables = {name: _netcdf3_variable(str(name), v) for name, v in dataset.variables.items()}
    coords = {name: variables.pop(name) for name in dataset.coords}
    attrs = {key: _netcdf3_attribute(value) for key, value in dataset.attrs.items()}
    return xr.Dataset(variables, coords, attrs)


def _identity(experiment: str, dataset_label: str, config: DataclassInstance) -> str:
    """What results in a folder belong to: the text of its config.json."""
    return to_json({"experiment": experiment, "dataset": dataset_label, "config": computed(config)})


def _check_same_run(config_path: Path, wanted: Mapping[str, Any]) -> None:
    """Refuses a folder whose config.json is damaged or belongs to another configuration."""

    def flat(identity: Mapping[str, Any]) -> dict[str, str]:
        options = {f"--{key.replace('_', '-')}": value for key, value in identity["config"].items()}
        names = {"experiment": identity["experiment"], "data set": identity["dataset"]}
        return {key: json.dumps(value) for key, value in {**options, **names}.items()}

    try:
        stored = flat(json.loads(config_path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{config_path} is damaged, so what the folder holds cannot be trusted: "
            "choose another --out or delete the folder"
        ) from error
    now = flat(wanted)
    if stored["experiment"] != now["experiment"]:
        raise InputError(f"{config_path.parent} is a run of {json.loads(stored['experiment'])}: choose another --out")
    if stored != now:
        differences = [
            f"{key}: {stored.get(key, 'nothing')} there, {now.get(key, 'nothing')} now"
            for key in dict.fromkeys([*now, *stored])
            if stored.get(key) != now.get(key)
        ]
        listed = "; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else "")
        raise InputError(
            f"{config_path.parent} belongs to another configuration ({listed}): "
            "choose another --out or delete the folder"
        )


def _is_there(path: Path, text: str) -> bool:
    """Whether a folder is there and has this config.json; what cannot become that folder is refused.

    Raises:
        InputError: As `RunFolder.open`.
    """
    try:
        if (path / "config.json").exists():
            _check_same_run(path / "config.json", json.loads(text))
            return True
        if path.exists() and any(not entry.name.endswith(_TEMPORARY_SUFFIX) for entry in path.iterdir()):
            raise InputError(
                f"{path} is not the folder of a run (it has files but no config.json): choose another --out"
            )
    except NotADirectoryError:
        raise InputError(f"{path} is a file, not a folder: choose another --out") from None
    except OSError as error:
        raise _unusable(path, error) from error
    parent = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not parent.is_dir():
        raise InputError(f"{parent} is a file, not a folder: choose another --out")
    if not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to the folder {parent}: choose another --out")
    return False


def _unusable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot use the folder {path} ({error.strerror}): choose another --out")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of one run; made by `RunFolder.open`.

    Attributes:
        path: The folder.
        shared: The folder of the first process, in every process: for what all of them write together.
    """

    path: Path
    shared: Path

    @classmethod
    def open(cls, experiment: str, dataset_label: str, config: DataclassInstance, out: str | None = None) -> RunFolder:
        """Makes the folder of a run, or goes on in the one that an earlier run left.

        Of several processes (`jax.distributed`) the first has the folder. The others get one of
        their own that is removed when they end, so that a run leaves one result.

        Args:
            experiment: Name of the experiment's module.
            dataset_label: The data set as given to `load_dataset`, or a word for several.
            config: The configuration. Results in the folder belong to it alone.
            out: The folder. None: `runs/EXPERIMENT-DATASET-HASH`, HASH from the configuration.

        Returns:
            The open folder.

        Raises:
            InputError: If the folder belongs to another configuration, holds files of something
                else, has a damaged config.json or cannot be written; in every process.
        """
        text = _identity(experiment, dataset_label, config)
        path = shared = cls.path_of(experiment, dataset_label, config, out)
        if jax.process_index() > 0:
            path = Path(tempfile.mkdtemp())
            atexit.register(shutil.rmtree, path, ignore_errors=True)
        with refused_together():
            if not _is_there(path, text):
                try:
                    path.mkdir(parents=True, exist_ok=True)
                    with atomic_path(path / "config.json") as unfinished:
                        unfinished.write_text(text, encoding="utf-8")
                except OSError as error:
                    raise _unusable(path, error) from error
        return cls(path, shared)

    @staticmethod
    def path_of(experiment: str, dataset_label: str, config: DataclassInstance, out: str | None = None) -> Path:
        """Where the folder of a run lies; arguments as for `open`."""
        if out is not None:
            return Path(out).expanduser()
        digest = hashlib.sha256(_identity(experiment, dataset_label, config).encode()).hexdigest()[:8]
        return Path("runs", f"{experiment}-{file_name_part(dataset_label)}-{digest}")

    @staticmethod
    def is_there(path: Path, experiment: str, dataset_label: str, config: DataclassInstance) -> bool:
        """Whether a folder is that of a run of this configuration; nothing is written.

        Raises:
            InputError: As `open`.
        """
        return _is_there(path, _identity(experiment, dataset_label, config))

    @property
    def points(self) -> Path:
        """The sub-folder in which a sweep keeps finished points, made when asked for."""
        path = self.path / "points"
        path.mkdir(exist_ok=True)
        return path

    def save_dataset(self, name: str, dataset: xr.Dataset) -> Path:
        """Writes a labelled result as NAME.nc (netCDF-3, see `netcdf3_ready`) and NAME.csv.

        The table has one row for each combination of all coordinates and one column for each
        variable; a variable without one of the dimensions is repeated along it. There is none where no
        variable has all dimensions.

        Returns:
            The path of NAME.nc.
        """
        path = self.save_netcdf(name, dataset)
        # Where no variable has all dimensions, one table of all of them is mostly repetitions: a megabyte becomes three
        # gigabytes.
        if math.prod(dataset.sizes.values()) == max((v.size for v in dataset.variables.values()), default=0):
            # A data set without dimensions has no index; one row is its table.
            labelled = dataset if dataset.sizes else dataset.expand_dims("row")
            with atomic_path(self.path / f"{name}.csv") as unfinished:
                labelled.to_dataframe().reset_index().to_csv(unfinished, index=False, errors=_ERRORS)
        return path

    def save_netcdf(self, name: str, dataset: xr.Dataset) -> Path:
        """Writes a labelled result as NAME.nc alone: for what is too long for a table.

        Returns:
            Its path.
        """
        path = self.path / f"{name}.nc"
        with atomic_path(path) as unfinished:
            netcdf3_ready(dataset).to_netcdf(unfinished, engine="scipy")
        return path

    def save_table(self, name: str, rows: Sequence[Mapping[str, object]]) -> Path:
        """Writes rows as NAME.csv; columns in the order in which they first occur.

        Returns:
            The path of the table.
        """
        path = self.path / f"{name}.csv"
        columns = dict.fromkeys(column for row in rows for column in row)
        with (
            atomic_path(path) as unfinished,
            unfinished.open("w", newline="", encoding="utf-8", errors=_ERRORS) as file,
        ):
            writer = csv.DictWriter(file, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return path

    def save_text(self, name: str, text: str) -> Path:
        """Writes text as the file NAME.

        Returns:
            The path of the file.
        """
        path = self.path / name
        with atomic_path(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8", errors=_ERRORS)
        return path

    def save_json(self, name: str, value: object) -> Path:
        """Writes numbers, text, lists and mappings as NAME.json.

        Returns:
            The path of the file.
        """
        path = self.path / f"{name}.json"
        with atomic_path(path) as unfinished:
            unfinished.write_text(to_json(value), encoding="utf-8")
        return path

    def save_figure(self, name: str, figure: Figure) -> Path:
        """Writes a figure as NAME.png (200 dots per inch) and NAME.pdf, and closes it in pyplot.

        Returns:
            The path of NAME.png.
        """
        path = self.path / f"{name}.png"
        with atomic_path(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=200)
        with atomic_path(self.path / f"{name}.pdf") as unfinished:
            # Without the date, the same figure is the same file.
            figure.savefig(unfinished, format="pdf", metadata={"CreationDate": None})
        # A figure made without pyplot goes with its last reference.
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close(figure)
        return path

    def summary(self, text: str) -> Path:
        """Prints the summary of a run and writes it as summary.txt.

        Returns:
            The path of summary.txt.
        """
        path = self.path / "summary.txt"
        with atomic_path(path) as unfinished:
            unfinished.write_text(text.rstrip("\n") + "\n", encoding="utf-8", errors=_ERRORS)
        if jax.process_index() == 0:
            print(path.read_text(encoding="utf-8").rstrip("\n"), flush=True)
        return path


def once(store: PointStore, key: str, compute: Callable[[], Any]) -> Any:
    """Numbers, text, lists and mappings: read where a run before has finished them, computed and kept where not.

    Args:
        store: of finished parts, see :func:`shared_points`.
        key: a file name.
        compute: gives them, in every process; those of the first count.
    """
    found = store.load(key)
    if found is None:
        found = {"json": np.array(of_first(to_json(compute()).encode()).decode())}
        store.save(key, found)
    return json.loads(str(found["json"]))


def shared_points(folder: Path, identity: str) -> PointStore:
    """Finished points made of arrays; of several processes the first has the files, and all of them get its points.

    Args:
        folder: where they are kept.
        identity: of what they belong to, see :func:`mae_align.runtime.files.fingerprint`.

    Raises:
        InputError: the folder holds points of something else.
    """
    store = shared_store(folder, lambda: identity)
    assert store is not None
    return store


def silent() -> bool:
    """Whether this process shows no progress: of several only the first does."""
    return jax.process_index() > 0
