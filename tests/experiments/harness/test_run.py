"""Runs: written whole, computed once, gone on with, printed again, refused where they are of something else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from experiments import runs
from experiments.harness import run as run_module
from experiments.harness.cli import launch_experiment, with_written
from experiments.harness.config import ADDS, Counts, RunConfig
from experiments.harness.data import Split
from experiments.harness.run import Run, execute
from mae_align.runtime.errors import InputError
from mae_align.train.loop import Diverged

REPOSITORY = Path(__file__).resolve().parents[3]
COLUMNS = {"k": "number of features", "loss_*": "mean squared error [squared pixel units]", "seconds": "time [s]"}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings."""

    max_train: int | None = 40
    """Images."""
    ks: Counts = (1, 2)
    """Numbers."""
    measured: bool = True
    """Whether."""
    more: Annotated[tuple[str, ...], ADDS] = ("a",)
    """What is reported as well."""


class Main:
    """An experiment that counts what it computes and can fail at a cell."""

    def __init__(self, fails: object = None) -> None:
        self.computed: list[int] = []
        self.fails = fails

    def __call__(self, config: Config, run: Run[Split]) -> None:
        def measure(k: int) -> list[dict[str, float]]:
            if isinstance(self.fails, dict) and k in self.fails:
                raise self.fails[k]
            self.computed.append(k)
            return [{"k": k, "loss_train": k / 3}]

        frame = run.sweep({f"k{k}": k for k in config.ks}, measure)
        run.table("rows", frame, show=frame.round(2))
        run.dataset("curves", xr.Dataset({"loss_test": ("k", [1.0, 2.0]), "seconds": 1.5}, {"k": [1, 2]}))
        run.verdict("It is over.")


def go(main, tmp_path, **settings):
    execute("toy", main, Config(out=str(tmp_path / "run"), **settings), Split.load, COLUMNS)
    return tmp_path / "run"


def test_a_run_folder_says_what_it_is(tmp_path, capsys):
    folder = go(Main(), tmp_path)
    split = Split.load(Config())
    assert json.loads((folder / "data.json").read_text()) == split.fingerprint
    assert set(split.fingerprint) == {"train", "validation", "test"}
    record = json.loads((folder / "run.json").read_text())
    assert record["experiment"] == "toy" and record["data"] == "digits" and record["command"].startswith("python -m ")
    assert record["version"] and record["started"] <= record["finished"]
    assert json.loads((folder / "config.json").read_text())["config"]["ks"] == [1, 2]
    text = (folder / "columns.md").read_text()
    assert "## rows.csv" in text and "- `loss_train`: mean squared error [squared pixel units]" in text
    curves = xr.load_dataset(folder / "curves.nc", engine="scipy")
    assert curves.loss_test.attrs == {"long_name": "mean squared error", "units": "squared pixel units"}
    assert curves.seconds.attrs["units"] == "s" and curves.k.attrs["units"] == "1"
    assert pd.read_csv(folder / "rows.csv").loss_train.tolist() == pytest.approx([1 / 3, 2 / 3])
    summary = (folder / "summary.txt").read_text()
    assert summary.startswith("digits: 40 training, 40 validation and 359 test images of 8x8x1")
    assert summary.rstrip().endswith("It is over.") and capsys.readouterr().out.strip() == summary.strip()


def test_a_finished_run_prints_its_result_and_computes_nothing(tmp_path, capsys):
    go(Main(), tmp_path)
    first = capsys.readouterr().out
    again = Main({1: AssertionError("computed again"), 2: AssertionError("computed again")})
    go(again, tmp_path)
    assert capsys.readouterr().out == first and again.computed == []


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_other_code_is_refused_and_goes_on_where_that_is_asked_for(tmp_path, finished):
    stopped = Main({2: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        go(stopped, tmp_path)
    folder = go(Main(), tmp_path) if finished else tmp_path / "run"
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"version": "0.0.0", "code": "another"}))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(InputError, match=r"computed by other code \(mae_align 0.0.0, .*--out .*--reuse"):
        go(Main(), tmp_path)
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    main = Main()
    go(main, tmp_path, reuse=True)
    assert main.computed == ([] if finished else [2])
    assert "Some of this was computed by other code" in (folder / "summary.txt").read_text()
    assert json.loads((folder / "run.json").read_text())["code"] == record["code"]
    go(Main({k: AssertionError("computed again") for k in (1, 2)}), tmp_path)  # now it is shown
    assert json.loads((folder / "run.json").read_text())["reused"] is True


def test_the_code_of_a_run_is_all_source_that_computes_it(tmp_path, monkeypatch):
    root = tmp_path / "experiments"
    shutil.copytree(REPOSITORY / "experiments", root)
    shutil.copytree(REPOSITORY / "mae_align", tmp_path / "mae_align")
    monkeypatch.setattr(run_module, "__file__", str(root / "harness" / "run.py"))
    monkeypatch.setattr("mae_align.__file__", str(tmp_path / "mae_align" / "__init__.py"))
    code = run_module.code_of.__wrapped__
    before = code("masking_sweep")
    for file in ("experiments/minimal.py", "experiments/masking_dynamics/report.py"):
        (tmp_path / file).write_text("changed = True")
    assert code("masking_sweep") == before  # other experiments
    for file in (
        "experiments/masking_sweep/report.py",
        "experiments/harness/data.py",
        "mae_align/metrics.py",
        "mae_align/closed_form/sweep.py",
    ):
        (tmp_path / file).write_text("changed = True")
        assert code("masking_sweep") != before, file
        before = code("masking_sweep")


def test_a_folder_of_something_else_is_refused_before_the_work(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    main = Main()
    with pytest.raises(InputError, match="not the folder of a run"):
        go(main, tmp_path)
    assert main.computed == []


def test_a_finished_run_goes_on_with_what_is_to_be_added_and_keeps_the_rest(tmp_path):
    folder = go(Main(), tmp_path)
    assert "more" not in json.loads((folder / "config.json").read_text())["config"]
    ended = (folder / "run.json").stat().st_mtime_ns
    main = Main()
    go(main, tmp_path, more=("a", "b"))
    assert (folder / "run.json").stat().st_mtime_ns > ended and main.computed == []
    assert json.loads((folder / "run.json").read_text())["added"] == {"more": ["a", "b"]}
    assert with_written(["--config", str(folder / "config.json")], "toy")[-3:] == ["--more", "a", "b"]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    stopped = Main({2: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        go(stopped, tmp_path)
    assert stopped.computed == [1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is None
    main = Main()
    folder = go(main, tmp_path)
    assert main.computed == [2]  # what was finished is not computed again
    assert pd.read_csv(folder / "rows.csv").k.tolist() == [1, 2]


def test_cells_that_diverge_are_left_out_with_a_note(tmp_path):
    diverged = {2: Diverged("the loss of member 0 is nan", 3, 0, None)}
    with pytest.warns(UserWarning, match="Left out: k2"):
        folder = go(Main(diverged), tmp_path)
    assert pd.read_csv(folder / "rows.csv").k.tolist() == [1]
    assert "Left out: k2, the loss of member 0 is nan" in (folder / "summary.txt").read_text()
    with pytest.warns(UserWarning, match="Left out"), pytest.raises(InputError, match="every network diverged"):
        go(Main({k: diverged[2] for k in (1, 2)}), tmp_path / "none")


def test_a_folder_of_other_settings_or_other_images_is_refused(tmp_path):
    go(Main(), tmp_path)
    with pytest.raises(InputError, match="belongs to another configuration"):
        go(Main(), tmp_path, ks=(1,))
    data = tmp_path / "run" / "data.json"
    data.write_text(json.dumps(json.loads(data.read_text()) | {"train": "other"}))
    with pytest.raises(InputError, match="results of other images"):
        go(Main(), tmp_path)


def test_what_is_refused_leaves_no_folder(tmp_path):
    for settings in (["--ks"], ["--data", "nowhere"], ["--max-test", "1"]):
        with pytest.raises(SystemExit) as ended:
            launch_experiment(Main(), Config, {"laptop": Config(out=str(tmp_path / "run"))}, COLUMNS, argv=settings)
        assert ended.value.code == 2
    assert not (tmp_path / "run").exists()


def test_columns_without_a_line_and_long_verdicts_are_faults_of_the_program(tmp_path):
    run = Run("toy", Config(out=str(tmp_path / "run")), Split.load(Config()), COLUMNS)
    with pytest.raises(InputError, match=r"COLUMNS of experiments.toy has no line for the column 'other': add one"):
        run.table("rows", [{"other": 1}])
    with pytest.raises(ValueError, match="at most 3 sentences"):
        run.verdict("a", "b", "c", "d")


def test_arrays_are_computed_once(tmp_path):
    def run():
        return Run("toy", Config(out=str(tmp_path / "run")), Split.load(Config()), COLUMNS)

    first = run().arrays("a", lambda: {"x": np.arange(3)})
    second = run().arrays("a", lambda: pytest.fail("computed again"))
    np.testing.assert_array_equal(first["x"], second["x"])


def command(main, *argv):
    launch_experiment(main, Config, {"laptop": Config()}, COLUMNS, argv=list(argv))


def test_a_written_configuration_is_taken_back_and_options_win(tmp_path, capsys):
    def main(config: Config, run: Run[Split]) -> None:
        assert run.experiment == "test_run"
        run.verdict(f"ks {config.ks}, images {config.max_train}")

    command(main, "--ks", "3", "4", "--max-train", "50", "--out", str(tmp_path / "a"))
    file = str(tmp_path / "a" / "config.json")
    command(main, "--config", file, "--out", str(tmp_path / "b"))
    command(main, f"--config={file}", "--ks", "5", "--out", str(tmp_path / "c"))
    texts = [(tmp_path / name / "summary.txt").read_text() for name in "abc"]
    assert texts[0] == texts[1] and "ks (3, 4), images 50" in texts[0] and "ks (5,), images 50" in texts[2]


NOT_CONFIGS = {
    "missing": (None, "cannot be read"),
    "not JSON": ("{", "is not the config.json of a run folder"),
    "something else": ("[1]", "is not the config.json of a run folder"),
    "another experiment": ('{"experiment": "other", "config": {}}', "run python -m experiments.other with it"),
}


@pytest.mark.parametrize("case", NOT_CONFIGS)
def test_files_that_are_no_configuration_are_refused(case, tmp_path):
    text, message = NOT_CONFIGS[case]
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message):
        with_written(["--config", str(file)], "toy")


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_damaged_run_folders_are_one_line(tmp_path, text, capsys):
    folder = go(Main(), tmp_path)
    (folder / "run.json").write_text(text)
    for words in (["list", str(tmp_path)], ["compare", str(folder), str(folder)]):
        with pytest.raises(SystemExit) as ended:
            runs.main(words)
        assert ended.value.code == 2
    assert capsys.readouterr().err.count("run.json is damaged") == 2


def test_runs_are_listed_and_compared(tmp_path, capsys):
    go(Main(), tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        go(Main({2: KeyboardInterrupt()}), tmp_path / "c")
    go(Main(), tmp_path / "b", ks=(2, 3), max_train=50, measured=False)
    capsys.readouterr()
    runs.main(["list", str(tmp_path)])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 4 and sum("not finished" in line for line in listed) == 1
    runs.main(["compare", str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")])
    text = capsys.readouterr().out
    assert "--measured yes no" in " ".join(text.split()) and "--more" not in text
    assert "--ks 1 2 2 3" in " ".join(text.split()) and "--max-train 40 50" in " ".join(text.split())
    assert "The same images and labels: test." in text
    lines = [line.split() for line in text.splitlines()[-3:]]
    assert [line[0] for line in lines] == ["1", "2", "3"] and lines[0][2] == lines[2][1] == "-"
    with pytest.raises(SystemExit) as end:
        runs.main(["compare", str(tmp_path), str(tmp_path)])
    assert end.value.code == 2 and "is not a run folder" in capsys.readouterr().err


def test_a_folder_in_which_nothing_is_finished_is_taken_over_by_other_code(tmp_path):
    """As while an experiment is written: the first cell fails, the source is changed, the same command is given."""
    with pytest.raises(ZeroDivisionError):
        go(Main({1: ZeroDivisionError()}), tmp_path)
    record = tmp_path / "run" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"code": "another"}))
    main = Main()
    go(main, tmp_path)
    assert main.computed == [1, 2]
