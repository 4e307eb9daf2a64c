from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from experiments.alignment_curves import __main__ as alignment_curves
from experiments.alignment_curves.__main__ import Background, Classes, Config, Resolution, Study
from experiments.alignment_curves.figures import set_figure
from experiments.alignment_curves.report import change_sentence, change_text
from experiments.alignment_curves.studies import Curve
from experiments.harness.config import RunConfig
from tests.experiments.cases import refusal, rows_of, run_experiment

SMALL = ["--groups", "10", "--classes.counts", "2", "10", "--classes.orders", "3", "--background.contrasts", "0", "1"]


def run(*arguments: str) -> str:
    """What the experiment prints on standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_experiment(alignment_curves, *arguments)
    return out.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("curves") / "run"
    return folder, run(*SMALL, "--out", str(folder))


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Drawing takes most of the time of a small run."""
    monkeypatch.setattr("experiments.harness.folder.RunFolder.save_figure", lambda self, name, figure: self.path)


def test_run_folder_holds_results_tables_and_figures(finished):
    folder, _ = finished
    assert json.loads((folder / "config.json").read_text())["config"]["classes"]["counts"] == [2, 10]
    for study in Study:
        for suffix in (".nc", ".csv", "_table.csv", ".png", ".pdf"):
            assert (folder / f"{study.value}{suffix}").stat().st_size > 0
        with Image.open(folder / f"{study.value}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_summary_comes_last_in_plain_words(finished):
    folder, printed = finished
    assert printed == (folder / "summary.txt").read_text()
    assert "from 2 to 10 classes" in printed
    assert "from pooling 1 x 1 to 2 x 2: k = 8" in printed
    assert "from background contrast 0 to 1, same glyphs and labels" in printed
    assert "100 sqrt(alignment) [%]" in printed
    assert len(printed.split("\n\n")[-1].splitlines()) == 3


def test_background_lowers_held_out_r2_of_the_same_glyphs(finished):
    folder, _ = finished
    rows = {(row["contrast"], row["k"]): row for row in rows_of(folder / "background_table.csv")}
    for k in ("8", "16"):
        change, se = float(rows["1.0", k]["r2_change"]), float(rows["1.0", k]["r2_change_se"])
        assert change < -2 * se < 0
        np.testing.assert_allclose(
            change, float(rows["1.0", k]["eval_r2"]) - float(rows["0.0", k]["eval_r2"]), rtol=1e-12
        )
        # The glyphs are the same, so that the difference is known better than either side of it.
        alone = np.hypot(float(rows["1.0", k]["eval_r2_se"]), float(rows["0.0", k]["eval_r2_se"]))
        assert se < 0.8 * alone


def test_background_without_pixels_changes_nothing_detectable(tmp_path, no_figures):
    # A contrast of 0.0001 rounds to the glyph on black.
    out = run("--studies", "background", "--background.contrasts", "0", "1e-4", "--out", str(tmp_path / "run"))
    assert out.count("no detectable difference") == 2
    rows = rows_of(tmp_path / "run" / "background_table.csv")
    assert {float(row["r2_change"]) for row in rows} == {0.0}


def test_more_classes_lower_r2(finished):
    folder, _ = finished
    rows = {(row["classes"], row["k"]): row for row in rows_of(folder / "classes_table.csv")}
    assert float(rows["10", "16"]["r2_change"]) < -2 * float(rows["10", "16"]["r2_change_se"]) < 0
    assert float(rows["10", "8"]["bound"]) == pytest.approx(8 / 9)
    result = xr.load_dataset(folder / "classes.nc", engine="scipy")
    assert dict(result.eval_r2.sizes) == {"order": 3, "classes": 2, "k": 64}
    values = result.eval_r2.sel(k=16)
    expected = values.sel(classes=10) - values.sel(classes=2)
    assert float(rows["10", "16"]["r2_change"]) == pytest.approx(float(expected.mean()))
    se = float(expected.std(ddof=1)) / np.sqrt(3)
    assert float(rows["10", "16"]["r2_change_se"]) == pytest.approx(se)


def test_resolutions_end_at_their_own_rank(finished):
    folder, _ = finished
    result = xr.load_dataset(folder / "resolution.nc", engine="scipy")
    assert result.num_pixels.values.tolist() == [64, 16, 4]
    assert result.r2.count("k").values.tolist() == [64, 16, 4]
    np.testing.assert_allclose(result.alignment.sel(factor=4, k=4), 1.0)
    np.testing.assert_allclose(result.share_of_d.sel(factor=2, k=4), 0.25)
    # k over the rank is left out of the table.
    assert [row["factor"] for row in rows_of(folder / "resolution_table.csv")] == ["1", "1", "2", "2"]


def test_table_and_curves_agree(finished):
    folder, _ = finished
    result = xr.load_dataset(folder / "sets.nc", engine="scipy")
    (row,) = [row for row in rows_of(folder / "sets_table.csv") if row["k"] == "16"]
    at = result.isel(set=0).sel(k=16)
    for name in ("r2", "alignment_percent", "eval_r2", "eval_r2_se"):
        assert float(row[name]) == pytest.approx(float(at[name]), rel=1e-12)
    assert float(row["alignment_percent"]) == pytest.approx(100 * float(at.alignment) ** 0.5)
    lines = rows_of(folder / "sets.csv")
    assert len(lines) == 64
    assert float(lines[15]["eval_r2"]) == pytest.approx(float(at.eval_r2), rel=1e-12)


def test_second_run_goes_on_in_the_same_folder_without_computing(finished, monkeypatch, no_figures):
    folder, printed = finished

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr("experiments.alignment_curves.studies.pca_curve", refuse)
    assert run(*SMALL, "--out", str(folder)) == printed
    # Without its summary the run is made again, of the curves that are there.
    (folder / "summary.txt").unlink()
    assert run(*SMALL, "--out", str(folder)).split("\n\n")[-1] == printed.split("\n\n")[-1]


def test_changed_data_are_not_taken_for_finished(tmp_path, capsys, no_figures):
    rng = np.random.default_rng(0)
    file = tmp_path / "toy.npz"

    def write() -> None:
        x, y = rng.integers(0, 256, (60, 4, 4)).astype(np.uint8), np.arange(60) % 3
        np.savez(file, x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])

    arguments = ["--studies", "sets", "--datasets", f"npz:{file}", "--groups", "2", "--out", str(tmp_path / "run")]
    write()
    run(*arguments)
    write()
    capsys.readouterr()
    assert "results of other images" in refusal(capsys, alignment_curves, *arguments)


def test_several_sets_share_a_result_and_keep_their_names(tmp_path, no_figures):
    rng = np.random.default_rng(0)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        x, y = rng.integers(0, 256, (60, 3, 3)).astype(np.uint8), np.arange(60) % 3
        np.savez(tmp_path / folder / "toy.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    same = [f"npz:{tmp_path}/{folder}/toy.npz" for folder in ("a", "b")]
    options = ["--studies", "sets", "--groups", "2", "--ks", "4", "--no-center"]
    out = run(*options, "--datasets", "digits", same[0], "--out", str(tmp_path / "one"))
    result = xr.load_dataset(tmp_path / "one" / "sets.nc", engine="scipy")
    assert [str(name) for name in result.set.values] == ["digits", "toy"]
    assert "100 sqrt(alignment) at k = 4 from high to low" in out
    assert "r2 about zero" in out
    run(*options, "--datasets", *same, "--out", str(tmp_path / "two"))
    result = xr.load_dataset(tmp_path / "two" / "sets.nc", engine="scipy")
    assert [str(name) for name in result.set.values] == same


def test_set_figure_holds_long_names_and_many_sets():
    k = np.linspace(0.1, 1.0, 5)
    curve = Curve(k, k, k, k / 10, np.zeros((2, 5)), *(np.asarray(5) for _ in range(3)))
    figure = set_figure({f"npz:/a/very/long/path/to/some/data/set/{i}.npz": curve for i in range(9)}, "r2: share")
    figure.savefig(io.BytesIO(), format="png")  # a warning here is an error
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(names)) == 9
    assert max(map(len, names)) <= 31
    colors = [line.get_color() for line in figure.axes[2].get_lines()]
    assert len(set(colors)) == 9


def test_fewer_images_are_those_of_the_split(tmp_path, no_figures):
    run("--studies", "sets", "--max-train", "300", "--max-test", "100", "--groups", "5", "--out", str(tmp_path / "run"))
    result = xr.load_dataset(tmp_path / "run" / "sets.nc", engine="scipy")
    # No more than were asked for; without --max-train the validation images are fitted, too.
    assert result.num_train.values.tolist() == [300]
    assert result.num_test.values.tolist() == [100]


def test_one_set_has_the_fingerprint_of_its_split_and_several_one_of_all(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (60, 8, 8)).astype(np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "toy.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    toy = f"npz:{tmp_path}/toy.npz"
    one = alignment_curves.load(Config())
    assert list(one.splits) == ["digits"]
    assert one.fingerprint == one.splits["digits"].fingerprint
    both = alignment_curves.load(Config(background=Background(backgrounds=toy)))
    assert list(both.splits) == ["digits", toy] and both.name == "several"
    parts = {"train", "validation", "test"}
    assert set(both.fingerprint) == parts
    assert all(both.fingerprint[part] != one.fingerprint[part] for part in parts)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--datasets", "digit"], "unknown data set 'digit', did you mean 'digits'?"),
        (["--background.backgrounds", "photos"], "(or photographs)"),
        (["--resolution.factors", "1", "3"], "--resolution.factors 3 does not divide the 8 x 8 images of digits"),
        (["--resolution.factors", "16"], "give some of 1 2 4 8"),
        (["--classes.counts", "2", "11"], "--classes.counts 11: digits has 10 classes, give numbers from 2 to 10"),
        (["--classes.counts"], "--classes.counts has no value"),
        (["--background.contrasts", "nan"], "--background.contrasts nan"),
        (["--ks", "65"], "--ks 65: images of digits have 64 pixel values"),
        (["--groups", "300"], "--groups 300: 359 test images leave a group empty"),
        (["--max-train", "20", "--validation-fraction", "0.01", "--classes.counts", "2", "10"], "fewer than 2 of each"),
        (["--image-size", "64"], "backgrounds are 106 x 48 pixels, smaller than the 64 x 64 foreground"),
        (["--preset", "paper"], "check the path, npz:FILE"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(capsys, alignment_curves, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("study", ["sets", "classes", "resolution"])
def test_every_k_over_the_rank_is_one_line(study, tmp_path, capsys):
    """The rank is known when the curves are there: digits have 61 pixels that vary."""
    arguments = ["--pixel-noise", "0", "--ks", "64", "--studies", study, "--out", str(tmp_path / "run")]
    words = refusal(capsys, alignment_curves, *arguments)
    assert "--ks: every k is over the rank of some images" in words and words.count("\n") == 1


def test_images_too_large_for_the_machine_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("os.sysconf", lambda name: 1024)
    assert "give a smaller --image-size or --groups" in refusal(capsys, alignment_curves, "--studies", "sets")


def test_every_field_is_explained(capsys):
    with pytest.raises(SystemExit) as exit_:
        run_experiment(alignment_curves, "--help")
    assert exit_.value.code == 0
    text = "".join(c for c in capsys.readouterr().out if c.isalnum())
    for kind in (Config, Classes, Resolution, Background):
        fields = inspect.getsource(kind).partition("    def ")[0]
        documented = fields.split('"""')[3::2]  # after the docstring of the class
        plain = [f for f in dataclasses.fields(kind) if not dataclasses.is_dataclass(f.default)]
        plain = [
            f for f in plain if kind is not Config or f.name not in {g.name for g in dataclasses.fields(RunConfig)}
        ]
        assert len(documented) == len(plain)
        for words in documented:
            assert "".join(c for c in words if c.isalnum()) in text


def test_change_in_words():
    assert change_text(-0.2, 0.05) == "-0.200 +- 0.050"
    assert change_text(-0.00294, 0.00029) == "-0.0029 +- 0.0003"
    assert change_text(-0.09, 0.05).startswith("no detectable difference")
    assert change_text(0.0, 0.0).startswith("no detectable difference")
    assert change_text(0.1, float("nan")) == "+0.100 (standard error unknown)"


def test_limit_of_few_features_is_told():
    def row(classes: int, bound: float, change: float) -> dict[str, float]:
        return {
            "classes": classes,
            "k": 8,
            "eval_r2": 0.9 + change,
            "bound": bound,
            "r2_change": change,
            "r2_change_se": 0.01,
        }

    def line(*rows: dict[str, float]) -> str:
        return "".join(change_sentence(rows, "classes", "from {} to {} classes"))

    text = line(row(2, 1.0, 0.0), row(10, 8 / 9, -0.5))
    assert text == (
        "Held-out r2 from 2 to 10 classes: k = 8: 0.900 to 0.400 (k features cannot pass 0.889), -0.500 +- 0.010."
    )
    assert "cannot pass" not in line(row(2, 1.0, 0.0), row(3, 1.0, -0.5))
    assert line(row(10, 8 / 9, 0.0)) == ""
