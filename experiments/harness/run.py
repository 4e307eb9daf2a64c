"""A run of an experiment: its data, its folder, its cells that are computed once, its tables, figures and verdict."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import jax
import numpy as np
import pandas as pd
import xarray as xr
from tqdm import tqdm

import mae_align as ma
from experiments.harness.config import RunConfig, added, check, computed
from experiments.harness.folder import RunFolder, once, shared_points, silent, to_json
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import PointStore, fingerprint
from mae_align.runtime.processes import of_first, refused_together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.harness.train import TrainedLooks
    from mae_align.train.batches import Feed
    from mae_align.train.ensemble import DeviceData, Training, TrainState

_MOST_SENTENCES = 3
_RECORD = "run.json"
Rows = list[dict[str, Any]]


class Data(Protocol):
    """What a run is about: a name, a line that describes it, and hashes of what is trained, validated and tested on."""

    @property
    def name(self) -> str:
        """Of the data set."""
        ...

    @property
    def description(self) -> str:
        """The first line of the summary."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Hashes by part: train, validation, test."""
        ...


DataT = TypeVar("DataT", bound=Data)
ConfigT = TypeVar("ConfigT", bound=RunConfig)
Cell = TypeVar("Cell")
Result = TypeVar("Result")


class Run(Generic[DataT]):
    """One run. Its folder is made when something is first written, so that what is refused before leaves nothing.

    Args:
        experiment: its name.
        config: its settings; bounds are checked already.
        data: what it is about.
        columns: a line for every column of every table, ``"test accuracy of the ridge probe [share]"``, by name or by
            a pattern of names such as ``"closed_r2_k*"``.
    """

    def __init__(self, experiment: str, config: RunConfig, data: DataT, columns: Mapping[str, str]) -> None:
        self.experiment, self.config, self.data, self._columns = experiment, config, data, columns
        self.notes: list[str] = []
        self.ended = "before"
        self._fingerprint = dict(data.fingerprint)
        self._shown: list[str] = []
        self._figures: list[Path] = []
        self._tables: dict[str, list[str]] = {}
        self._record: dict[str, Any] = {
            "experiment": experiment,
            "version": ma.__version__,
            "code": code_of(experiment),
            "jax": jax.__version__,
            "platform": jax.default_backend(),
            "command": shlex.join(["python", "-m", f"experiments.{experiment}", *sys.argv[1:]]),
            "data": data.name,
            "started": _now(),
            "finished": None,
            "added": json.loads(to_json(added(config))),
        }

    @property
    def _label(self) -> str:
        """What the folder is called after: what the data say, else the setting `data`."""
        return getattr(self.data, "label", None) or self.config.data

    @functools.cached_property
    def folder(self) -> RunFolder:
        """The folder, with config.json, data.json and run.json."""
        folder = RunFolder.open(self.experiment, self._label, self.config, self.config.out)
        folder.save_json("data", self._fingerprint)
        before = _read_json(folder.path / _RECORD) or {}
        self._record["started"] = before.get("started", self._record["started"])
        if before.get("reused") or (before and before.get("code") != self._record["code"]):
            self._record["reused"] = True
            self.notes.append("Some of this was computed by other code, as --reuse allows.")
        folder.save_json("run", self._record)
        return folder

    @property
    def identity(self) -> str:
        """What finished parts belong to: the images and labels."""
        return fingerprint([], {"data": self._fingerprint})

    @functools.cached_property
    def store(self) -> PointStore:
        """Finished points made of arrays; of several processes all get those of the first."""
        return shared_points(self.folder.points, self.identity)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """Numbers, text, lists and mappings: read where a run before has finished them, computed and kept where not."""
        return once(self.store, key, compute)

    def arrays(self, key: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays by name: read where a run before has finished them, computed and kept where not."""
        found = self.store.load(key)
        if found is None:
            found = {name: np.asarray(value) for name, value in compute().items()}
            self.store.save(key, found)
        return found

    def sweep(self, cells: Mapping[str, Cell], measure: Callable[[Cell], Rows], *, unit: str = "cell") -> pd.DataFrame:
        """Measure every cell once, with progress; networks that diverge are left out with a note.

        Args:
            cells: by a name that is part of a file name.
            measure: gives the rows of a cell.
            unit: what a cell is, for the progress line.

        Returns:
            All rows in the order of the cells.

        Raises:
            InputError: no cell is left.
        """
        found = self.each(cells, lambda key, cell: self.once(key, lambda: measure(cell)), unit=unit)
        return pd.DataFrame([row for rows in found.values() for row in rows])

    def each(
        self, cells: Mapping[str, Cell], compute: Callable[[str, Cell], Result], *, unit: str = "cell"
    ) -> dict[str, Result]:
        """Compute something of every cell, with progress; networks that diverge are left out with a note.

        Args:
            cells: by a name that is part of a file name.
            compute: gives the result of a name and cell; it keeps what is not to be computed again.
            unit: what a cell is, for the progress line.

        Returns:
            Results by name, in the order of the cells.

        Raises:
            InputError: no cell is left.
        """
        from mae_align.train.loop import Diverged

        found: dict[str, Result] = {}
        with tqdm(cells.items(), desc=self.experiment, unit=unit, disable=silent()) as bar:
            for key, cell in bar:
                bar.set_postfix_str(key)
                try:
                    found[key] = compute(key, cell)
                except Diverged as error:
                    self.notes.append(f"Left out: {key}, {error}.")
                    warnings.warn(self.notes[-1], stacklevel=2)
        if not found:
            raise InputError("every network diverged: give a smaller learning rate")
        return found

    def train_at(
        self,
        key: str,
        training: Training,
        start: Callable[[], TrainState],
        source: Callable[[], DeviceData | Feed],
        steps: Sequence[int],
        look: Callable[[TrainState, int], Mapping[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """Train an ensemble on the one training loop and look at it after chosen steps; see :func:`train_at`.

        Args:
            key: of the ensemble, part of file names; its checkpoints and metrics lie in networks/KEY.
            training: its programs.
            start: makes the state before the first step.
            source: makes the images on the device or the stream.
            steps: ascending; 0 is the untrained ensemble, the last ends the training.
            look: arrays of a state, of the same shapes at every step.

        Returns:
            By name, the arrays of all steps stacked, [T, ...].
        """
        # Only experiments that train pay for loading it.
        from experiments.harness.train import train_at

        return train_at(self._looks(key), training, start, source, steps, look)

    def train_to(
        self,
        key: str,
        training: Training,
        start: Callable[[], TrainState],
        source: Callable[[], DeviceData | Feed],
        steps: Sequence[int],
        look: Callable[[TrainState, int], Mapping[str, np.ndarray]],
        *,
        save_every: int | None = None,
    ) -> TrainState:
        """Train as :meth:`train_at`, and return the ensemble after the last step.

        Args:
            key, training, start, source, steps, look: as there.
            save_every: steps between checkpoints; None for a tenth of the training.

        Returns:
            The state, of its checkpoint where a run before has finished it.
        """
        from experiments.harness.train import train_to

        return train_to(self._looks(key), training, start, source, steps, look, save_every=save_every)

    def _looks(self, key: str) -> TrainedLooks:
        from experiments.harness.train import TrainedLooks

        return TrainedLooks(self.store, key, self.folder.shared / "networks" / key, self.identity_of_settings)

    @functools.cached_property
    def identity_of_settings(self) -> str:
        """What trained networks belong to: images, labels and settings."""
        return fingerprint([], {"data": self._fingerprint, "settings": repr(computed(self.config))})

    def table(self, name: str, frame: pd.DataFrame | Rows, *, show: pd.DataFrame | None = None) -> None:
        """Write rows as NAME.csv, and describe its columns in columns.md.

        Args:
            name: of the file.
            frame: the rows.
            show: what the summary shows of it; its columns may have other, shorter heads.
        """
        rows = frame if isinstance(frame, list) else frame.to_dict("records")
        self.folder.save_table(name, rows)
        self._describe(f"{name}.csv", [str(column) for row in rows for column in row])
        if show is not None:
            self._record.setdefault("table", name)
            self._shown.append(table_text(show))

    def dataset(self, name: str, dataset: xr.Dataset) -> None:
        """Write a labelled result as NAME.nc, and NAME.csv where it is a table; variables get long names and units."""
        described = self._with_units(dataset)
        table = self.folder.save_dataset(name, described).with_suffix(".csv")
        self._describe(table.name if table.exists() else f"{name}.nc", [str(v) for v in described.variables], described)

    def netcdf(self, name: str, dataset: xr.Dataset) -> None:
        """Write a labelled result that is too long for a table as NAME.nc; variables get long names and units."""
        described = self._with_units(dataset)
        self.folder.save_netcdf(name, described)
        self._describe(f"{name}.nc", [str(v) for v in described.variables], described)

    def _with_units(self, dataset: xr.Dataset) -> xr.Dataset:
        described = dataset.copy()
        for variable in described.variables:
            attrs = described[variable].attrs
            if "long_name" not in attrs or "units" not in attrs:
                attrs["long_name"], attrs["units"] = _text_and_units(self.column(str(variable)))
        return described

    def column(self, name: str) -> str:
        """The line that describes a column.

        Raises:
            InputError: nothing describes it.
        """
        if name in self._columns:
            return self._columns[name]
        for pattern, text in self._columns.items():
            if fnmatchcase(name, pattern):
                return text
        raise InputError(
            f"COLUMNS of experiments.{self.experiment} has no line for the column {name!r}: add one; "
            "what is computed is kept"
        )

    def _describe(self, table: str, columns: Sequence[str], dataset: xr.Dataset | None = None) -> None:
        lines = []
        for column in dict.fromkeys(columns):
            attrs = {} if dataset is None else dataset[column].attrs
            text = f"{attrs['long_name']} [{attrs['units']}]" if attrs else self.column(column)
            lines.append(f"- `{column}`: {text}")
        self._tables[table] = lines
        sections = [f"## {name}\n\n" + "\n".join(found) + "\n" for name, found in self._tables.items()]
        self.folder.save_text("columns.md", "\n".join(["# Columns of the tables\n", *sections]))

    def figure(self, name: str, figure: Figure) -> None:
        """Write a figure as NAME.png and NAME.pdf."""
        self._figures.append(self.folder.save_figure(name, figure))

    def verdict(self, *sentences: str) -> None:
        """End the run: summary.txt, and the same on standard output.

        It shows the data, the tables that were to be shown, the figures, what was left out, and the sentences.

        Args:
            sentences: at most three, in plain words; the detail is in the tables.
        """
        if len(sentences) > _MOST_SENTENCES:
            raise ValueError(f"a verdict has at most {_MOST_SENTENCES} sentences, not {len(sentences)}")
        figures = ["Figures: " + "  ".join(map(str, self._figures))] if self._figures else []
        parts = [[self.data.description], *([text] for text in self._shown), figures, self.notes, list(sentences)]
        text = "\n\n".join("\n".join(part) for part in parts if part)
        self.folder.summary(text)
        self._record["finished"] = _now()
        self.folder.save_json("run", self._record)

    def reopen(self) -> None:
        """Take back that the run has ended: started again, it is run and not only shown."""
        self._record["finished"] = None
        self.folder.save_json("run", self._record)

    def finished_before(self) -> str | None:
        """The summary of a run with these settings, images and code that has ended; None without one.

        Raises:
            InputError: the folder is of other settings, images or code, or of something else; nothing is written.
        """
        found = ""
        with refused_together():
            if jax.process_index() == 0:
                found = self._finished_here()
        return of_first(found.encode()).decode() or None

    def _finished_here(self) -> str:
        path = RunFolder.path_of(self.experiment, self._label, self.config, self.config.out)
        if not RunFolder.is_there(path, self.experiment, self._label, self.config):
            return ""
        if (_read_json(path / "data.json") or self._fingerprint) != self._fingerprint:
            raise InputError(
                f"{path} holds results of other images under the same name: choose another --out or delete it"
            )
        record = _read_json(path / _RECORD) or {}
        same_code = record.get("code") == self._record["code"]
        kept = any(path.glob("points/**/*.npz")) or (path / "networks").exists()
        if not same_code and kept and not self.config.reuse:
            raise InputError(
                f"{path} was computed by other code (mae_align {record.get('version', 'of before')}, or the source has "
                "changed since): give another --out to compute it anew, or --reuse to keep the numbers that are there"
            )
        summary = path / "summary.txt"
        self.ended = str(record.get("finished"))[:16].replace("T", " ")
        ended = record.get("finished") is not None and record.get("added") == self._record["added"]
        return summary.read_text(encoding="utf-8") if ended and same_code and summary.exists() else ""


@functools.cache
def code_of(experiment: str) -> str:
    """Hash of the source that computes an experiment: its own, that of the harness and that of mae_align.

    Example:
        >>> code_of("minimal") == code_of("minimal"), code_of("minimal") == code_of("masking_sweep")
        (True, False)
    """
    here = Path(__file__).resolve().parents[1]
    roots = [here / f"{experiment}.py", here / experiment, here / "harness", Path(ma.__file__).parent]
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*.py")))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def execute(
    experiment: str,
    main: Callable[[ConfigT, Run[DataT]], None],
    config: ConfigT,
    load: Callable[[ConfigT], DataT],
    columns: Mapping[str, str],
) -> None:
    """Run an experiment: check its settings, load its data, and run it; a finished run prints its result at once.

    Args:
        experiment: its name.
        main: does it.
        config: its settings.
        load: reads its data.
        columns: describes the columns of its tables.

    Raises:
        InputError: settings or data that do not fit, or a folder of something else, before any long work.
    """
    check(config)
    config.check()
    run = Run(experiment, config, load(config), columns)
    if (summary := run.finished_before()) is not None:
        if not silent():
            print(f"finished {run.ended}: shown, not computed again", file=sys.stderr)
            print(summary.rstrip("\n"), flush=True)
        return
    try:
        main(config, run)
    except SystemExit:
        # A check that failed gives its exit status again when the run is started again.
        run.reopen()
        raise


def table_text(frame: pd.DataFrame) -> str:
    """A table as aligned text; numbers as they are formatted in it, missing ones as a dash."""
    return frame.to_string(index=False, na_rep="-")


def _text_and_units(line: str) -> tuple[str, str]:
    """A column's line without its units, and its units; without any it has none (1).

    Example:
        >>> _text_and_units("time of a step [s]"), _text_and_units("seed")
        (('time of a step', 's'), ('seed', '1'))
    """
    found = re.fullmatch(r"(.*?)\s*\[([^\]]*)\]", line)
    return (found[1], found[2]) if found else (line, "1")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read_json(path: Path) -> Any:
    """The content of a file; None where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
