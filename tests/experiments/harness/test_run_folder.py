from __future__ import annotations

import csv
import dataclasses
import enum
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from experiments.harness.config import ELSEWHERE
from experiments.harness.folder import RunFolder, atomic_path, file_name_part, netcdf3_ready
from mae_align.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    ratios: tuple[float, ...] = (0.0, 0.5)
    seed: int = 0
    limit: float = float("nan")
    out: Annotated[str | None, ELSEWHERE] = None
    workers: Annotated[int, ELSEWHERE] = 1


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open("masking", "digits", Config(), str(tmp_path / "run"))


def visible_and_hidden_files(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


# --- which folder, and whose ---


def test_default_folder_is_named_after_experiment_data_set_and_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = RunFolder.open("masking", "npz:/a/b/c.npz", Config())
    assert first.path.parent == Path("runs")
    name, digest = first.path.name.rsplit("-", 1)
    assert name == "masking-npz-c"
    assert len(digest) == 8
    assert int(digest, 16) >= 0
    other = RunFolder.open("masking", "npz:/a/b/c.npz", Config(seed=1))
    assert other.path != first.path
    elsewhere = RunFolder.open("masking", "npz:/z/c.npz", Config())
    assert elsewhere.path != first.path
    again = RunFolder.open("masking", "npz:/a/b/c.npz", Config())
    assert again.path == first.path


def test_default_folder_is_the_same_in_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = RunFolder.open("masking", "digits", Config()).path
    code = (
        "from test_run_folder import Config; from experiments.harness.folder import RunFolder;"
        "run = RunFolder.open('masking', 'digits', Config()); print(run.path)"
    )
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parents[2]}", "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.split() == [str(ours)]


def test_fields_that_do_not_change_results_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = RunFolder.open("masking", "digits", Config())
    assert RunFolder.open("masking", "digits", Config(workers=2, out="x")).path == first.path
    assert RunFolder.open("masking", "digits", Config(seed=2)).path != first.path


def test_config_is_written_and_can_be_read(folder):
    stored = json.loads((folder.path / "config.json").read_text())
    assert (stored["experiment"], stored["dataset"]) == ("masking", "digits")
    assert stored["config"]["ratios"] == [0.0, 0.5]
    assert "out" not in stored["config"]
    assert visible_and_hidden_files(folder.path) == ["config.json"]


def test_same_configuration_goes_on_and_keeps_results(folder):
    (folder.points / "0.npz").write_bytes(b"point")
    again = RunFolder.open("masking", "digits", Config(out="elsewhere"), str(folder.path))
    assert (again.points / "0.npz").read_bytes() == b"point"


@pytest.mark.parametrize(
    ("experiment", "label", "config", "difference"),
    [
        ("masking", "digits", Config(seed=3), r"--seed: 0 there, 3 now"),
        ("masking", "idx:a", Config(), r'data set: "digits" there, "idx:a" now'),
        ("masking", "digits", Config(ratios=(0.1,)), r"ratios: \[0.0, 0.5\] there, \[0.1\] now"),
    ],
)
def test_another_configuration_is_refused(folder, experiment, label, config, difference):
    before = (folder.path / "config.json").read_bytes()
    with pytest.raises(InputError, match=rf"({difference}).*choose another --out or delete"):
        RunFolder.open(experiment, label, config, str(folder.path))
    assert (folder.path / "config.json").read_bytes() == before


def test_a_run_of_another_experiment_is_named(folder):
    with pytest.raises(InputError, match=r"run is a run of masking: choose another --out$"):
        RunFolder.open("lambda", "digits", Config(), str(folder.path))


@pytest.mark.parametrize(
    "damaged", [b"", b'{"experiment": "mas', b"\xff\xfe", b"[1]", b"{}", b'{"config": 1}', b"null"]
)
def test_damaged_config_is_refused(folder, damaged):
    (folder.path / "config.json").write_bytes(damaged)
    with pytest.raises(InputError, match=r"config.json is damaged.*choose another --out or delete"):
        RunFolder.open("masking", "digits", Config(), str(folder.path))


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"not the folder of a run .*choose another --out"):
        RunFolder.open("masking", "digits", Config(), str(tmp_path))
    assert visible_and_hidden_files(tmp_path) == ["thesis.tex"]


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="choose another --out"):
            RunFolder.open("masking", "digits", Config(), str(out))


def test_folder_killed_before_its_config_was_complete_can_be_used(tmp_path):
    (tmp_path / ".config.json.0123.tmp").write_text('{"experi')
    RunFolder.open("masking", "digits", Config(), str(tmp_path))
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("digits", "digits"),
        ("npz:/a/b/c.npz", "npz-c"),
        ("npz:c.v2.npz", "npz-c.v2"),
        ("idx:/data/fashion-mnist/", "idx-fashion-mnist"),
        ("folder:../my photos (2)", "folder-my-photos-2"),
        ("folder:/", "folder"),
        ("/etc/passwd", "etc-passwd"),
        ("..", "data"),
        ("", "data"),
        ("x" * 300, "x" * 60),
    ],
)
def test_file_name_part(label, expected):
    assert file_name_part(label) == expected


def test_file_name_part_of_a_dot_is_the_folders_name(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    assert file_name_part("folder:.") == "folder-photos"


# --- writing ---


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as unfinished:
            unfinished.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert visible_and_hidden_files(tmp_path) == ["a.txt"]
    with atomic_path(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def example_dataset() -> xr.Dataset:
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "r2": (("patch_size", "mask_ratio", "k"), rng.random((2, 3, 4))),
            "rank": (("patch_size",), np.array([30, 2**31 - 1])),
            "visible": (("mask_ratio",), np.array([True, False, True])),
            "shape": (("patch_size",), np.array(["4x4", "full \u00e9"])),
            "half": (("k",), np.arange(4, dtype=np.float16) / 4),
            "big": (("k",), np.array([0, 1, 2, 2**40], np.uint64)),
            "small": (("k",), np.arange(4, dtype=np.uint8) + 250),
            "count": ((), np.int64(1797)),
        },
        coords={
            "patch_size": np.array([1, 2]),
            "mask_ratio": [0.0, 0.5, 1.0],
            "k": np.arange(1, 5),
            "label": ("k", ["a", "b", "c", "d"]),
        },
        attrs={
            "count": 60_000,
            "large": 2**40,
            "center": True,
            "numpy_bool": np.bool_(False),
            "pixel_noise": np.float32(0.5),
            "infinite": float("inf"),
            "nothing": None,
            "image_shape": (28, 28, 1),
            "one": [7],
            "array": np.arange(3),
            "empty": [],
            "nested": {"a": [1, None, "b"]},
            "text": "fill: mean \u00e9",
        },
    )


def test_dataset_is_read_back_with_all_values(folder):
    dataset = example_dataset()
    dataset["r2"].attrs = {"held_out": False, "of": ("y", "x")}
    dataset["k"].attrs = {"first": np.int64(1)}
    untouched = dataset.copy(deep=True)
    path = folder.save_dataset("results", dataset)
    xr.testing.assert_identical(dataset, untouched)
    assert path == folder.path / "results.nc"
    back = xr.load_dataset(folder.path / "results.nc", engine="scipy")
    xr.testing.assert_equal(back, dataset)
    assert back["visible"].dtype == bool
    assert back["rank"].dtype == np.int32
    assert back["big"].dtype == np.float64
    assert back["r2"].sel(patch_size=2, mask_ratio=0.5, k=3) == dataset["r2"][1, 1, 2]
    assert back["r2"].attrs == {"held_out": 0, "of": '["y", "x"]'}
    assert back["k"].attrs == {"first": 1}
    attrs = dict(back.attrs)
    assert attrs.pop("text") == "fill: mean \u00e9"
    assert {key: attrs.pop(key) for key in ("count", "center", "numpy_bool", "infinite")} == {
        "count": 60_000,
        "center": 1,
        "numpy_bool": 0,
        "infinite": float("inf"),
    }
    assert attrs.pop("pixel_noise") == 0.5
    assert {key: json.loads(value) for key, value in attrs.items()} == {
        "large": 2**40,
        "nothing": None,
        "image_shape": [28, 28, 1],
        "one": [7],
        "array": [0, 1, 2],
        "empty": [],
        "nested": {"a": [1, None, "b"]},
    }


def test_dataset_is_read_back_by_scipy_alone(folder):
    """The file is plain netCDF-3: another reader finds the same numbers."""
    from scipy.io import netcdf_file

    dataset = example_dataset()
    with netcdf_file(folder.save_dataset("results", dataset), mmap=False) as file:
        np.testing.assert_array_equal(file.variables["r2"][:], dataset["r2"])
        assert file.variables["r2"].dimensions == ("patch_size", "mask_ratio", "k")
        assert file._attributes["count"] == 60_000


def test_table_of_a_dataset_is_tidy(folder):
    dataset = example_dataset()
    folder.save_dataset("results", dataset)
    with (folder.path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 4
    assert set(rows[0]) == {str(name) for name in dataset.variables}
    for row in rows:
        place = {
            "patch_size": int(row["patch_size"]),
            "mask_ratio": float(row["mask_ratio"]),
            "k": int(row["k"]),
        }
        # repr of a float64 is exact
        assert float(row["r2"]) == float(dataset["r2"].sel(place))
        assert int(row["rank"]) == int(dataset["rank"].sel(patch_size=place["patch_size"]))
        assert row["label"] == str(dataset["label"].sel(k=place["k"]).item())


def test_dataset_without_dimensions(folder):
    dataset = xr.Dataset({"a": 1.5, "b": 2})
    folder.save_dataset("one", dataset)
    xr.testing.assert_equal(xr.load_dataset(folder.path / "one.nc", engine="scipy"), dataset)
    with (folder.path / "one.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (float(row["a"]), int(row["b"])) == (1.5, 2)


@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1])
def test_whole_numbers_that_would_be_rounded_are_refused(folder, value):
    with pytest.raises(ValueError, match="seed holds whole numbers over"):
        folder.save_dataset("results", xr.Dataset({"seed": ("i", np.array([1, value]))}))
    assert visible_and_hidden_files(folder.path) == ["config.json"]


def test_netcdf3_ready_leaves_the_original_alone():
    dataset = example_dataset()
    untouched = dataset.copy(deep=True)
    assert netcdf3_ready(dataset)["rank"].dtype == np.int32
    xr.testing.assert_identical(dataset, untouched)
    assert dataset["rank"].dtype == np.int64


def test_table_of_rows(folder):
    path = folder.save_table("cells", [{"k": 1, "r2": 0.1}, {"k": 2, "note": 'a "b", c'}])
    assert path == folder.path / "cells.csv"
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"k": "1", "r2": "0.1", "note": ""},
            {"k": "2", "r2": "", "note": 'a "b", c'},
        ]


def test_json_knows_numpy_paths_and_enumerations(folder):
    class Colour(enum.Enum):
        RED = "red"

    value = {"a": np.float64(0.1), "b": np.arange(2), "c": Path("x/y"), "d": Colour.RED, "e": (1,)}
    read = json.loads(folder.save_json("best", value).read_text())
    assert read == {"a": 0.1, "b": [0, 1], "c": "x/y", "d": "red", "e": [1]}
    with pytest.raises(TypeError, match="object"):
        folder.save_json("best", object())
    assert json.loads((folder.path / "best.json").read_text()) == read


def test_figure_is_saved_twice(folder):
    figure = Figure(figsize=(3, 2))
    # Shared logarithmic axes: clearing them warns in some versions of Matplotlib.
    for axes in figure.subplots(1, 2, sharex=True):
        axes.semilogx([1, 2, 3])
    path = folder.save_figure("curves", figure)
    assert path == folder.path / "curves.png"
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    # Inches times 200 dots per inch.
    assert np.frombuffer(header[16:24], ">u4").tolist() == [600, 400]
    assert (folder.path / "curves.pdf").read_bytes()[:5] == b"%PDF-"


def test_figure_of_pyplot_is_closed(folder, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    figure, _ = plt.subplots()
    assert plt.fignum_exists(figure.number)
    folder.save_figure("curves", figure)
    assert not plt.fignum_exists(figure.number)


def test_saving_a_figure_needs_no_pyplot(tmp_path):
    code = (
        "import sys; from test_run_folder import Config; from experiments.harness.folder import *;"
        "from matplotlib.figure import Figure; figure = Figure(); figure.subplots();"
        f"RunFolder.open('m', 'd', Config(), {str(tmp_path / 'run')!r}).save_figure('f', figure);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    here = Path(__file__).resolve().parent
    # A display backend that cannot work: figures must not depend on it.
    env = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[2]}", "MPLBACKEND": "tkagg"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert visible_and_hidden_files(tmp_path / "run") == ["config.json", "f.pdf", "f.png"]


def test_summary_is_printed_and_written(folder, capsys):
    path = folder.summary("Masking helps at k = 8.\n\n")
    assert capsys.readouterr().out == "Masking helps at k = 8.\n"
    assert path.read_text() == "Masking helps at k = 8.\n"


def test_points_is_a_sub_folder(folder):
    assert folder.points == folder.path / "points"
    assert folder.points.is_dir()


def test_a_result_that_is_no_table_has_none(tmp_path):
    """Variables over a, over b and over c would become a row for each of all combinations."""
    folder = RunFolder.open("toy", "toy", Config(), str(tmp_path / "run"))
    apart = xr.Dataset({"x": ("a", np.zeros(40)), "y": ("b", np.zeros(50)), "z": ("c", np.zeros(60))})
    folder.save_dataset("apart", apart)
    folder.save_dataset("together", xr.Dataset({"x": (("a", "b"), np.zeros((4, 5))), "y": ("b", np.zeros(5))}))
    assert (folder.path / "apart.nc").exists() and not (folder.path / "apart.csv").exists()
    assert len((folder.path / "together.csv").read_text().splitlines()) == 1 + 4 * 5
