"""What holds for every experiment: it is listed, says how it is used, and trains on the same images as the others."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import ROOT, experiments, main
from experiments.harness.cli import launch, with_written
from experiments.harness.config import TAKE_TARGETS, RunConfig, Task, computed, settings
from experiments.harness.data import Split
from experiments.harness.folder import to_json
from tests.experiments.cases import run_experiment

LISTED = experiments()
NAMES = [one.name for one in LISTED]
# On data of their own, or on none: their commands are no experiments on one data set.
COMMANDS = {"prepare_data", "runs", "stream_moments"}


def module(name: str):
    return importlib.import_module(f"experiments.{name}" + (".__main__" if (ROOT / name).is_dir() else ""))


def test_everything_at_the_top_runs():
    entries = {path.stem for path in ROOT.iterdir()} - {"__init__", "__main__", "__pycache__", "harness", "README"}
    assert entries == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_says_what_it_asks_and_how_long_it_takes(name):
    listed = LISTED[NAMES.index(name)]
    assert listed.question and listed.paper and re.search(r"\d", listed.time)
    assert f"python -m experiments.{name}" in (module(name).__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
def test_help_is_given(name, monkeypatch, capsys):
    found = module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    ending = compile(_ending(found), name, "exec")
    with pytest.raises(SystemExit) as end:
        exec(ending, vars(found))
    assert end.value.code == 0
    assert f"usage: python -m experiments.{name}" in capsys.readouterr().out


def _ending(found) -> str:
    """What a module does when it is run."""
    text = Path(found.__file__).read_text(encoding="utf-8")
    return text.partition('if __name__ == "__main__":\n')[2].replace("\n    ", "\n").strip()


@pytest.mark.parametrize("name", sorted(set(NAMES) - COMMANDS))
def test_every_experiment_draws_the_same_images(name):
    """The same data, sizes and seed are the same images to train, to validate and to test on."""
    found = module(name)
    drawn = {"data": "digits", "max_train": 300, "max_test": 250, "seed": 3}
    if not issubclass(found.Config, RunConfig):
        assert not {"max_train", "max_test"} & {field.name for field in dataclasses.fields(found.Config)}
        return
    config = dataclasses.replace(found.PRESETS["laptop"], **drawn)
    load = getattr(found, "load", Split.load)
    assert dict(load(config).fingerprint) == Split.load(RunConfig(**drawn)).fingerprint


# A pattern of options, and those that may have the words.
WORDS = {
    r"epochs": {"--training.epochs", "--end-epochs", "--training.warmup-epochs"},
    r"batch-size": {"--training.batch-size", "--exact.batch-size", "--sampled.batch-size"},
    r"learning-rate": {
        *("--training.learning-rate", "--learning-rates", "--end-learning-rates"),
        *("--exact.learning-rate", "--sampled.learning-rate"),
    },
    r"warm": {"--training.warmup-epochs"},
    r"decay": {"--training.weight-decay"},
    r"shift|flip|grey|crop": {f"--training.augmentation.{word}" for word in ("shift", "flip", "grey", "smallest-crop")},
    r"latent|(?<!de)code(?!r)": {"--latent", "--latents"},
    r"width": {
        *("--network.width", "--network.decoder-width", "--network.resnet-width", "--response-widths"),
        *("--network.mlp-widths", "--network.conv-widths", "--network.resnet-widths"),
    },
    r"blocks": {"--network.resnet-blocks"},
    r"mlp|conv|resnet": {
        *("--network.mlp-widths", "--network.conv-widths", "--network.resnet-widths"),
        *("--network.resnet-width", "--network.resnet-blocks", "--training.conv-steps"),
    },
    # Several that are compared, in one run.
    r"networks?$": {"--networks", "--scale-networks"},
    r"depth|heads": {f"--network.{word}" for word in ("depth", "heads", "decoder-depth", "decoder-heads")},
    r"stride|kind": {"--network.stem-stride", "--network.kind"},
    r"loss|objective": {"--loss", "--losses"},
    r"guid|weights": {"--guidance"},
    r"evaluat|record|moments$": {
        *("--evaluations", "--evaluate-every", "--train-moments", "--validation-moments", "--test-moments"),
    },
    r"probe": {"--probes", "--probe-images", "--probe-fraction"},
    r"images|online": {"--probe-images"},
    r"seed": {"--seed", "--seeds", "--seeds-at-once"},
    r"max-(train|test|images|probe)": {"--max-train", "--max-test"},
    r"sizes": {"--patch-sizes"},
    r"noise": {"--pixel-noise", "--noise-levels"},
}
# Each number is the one hidden layer of a network of its own.
ONLY_THERE = {"theorem2_check": {"--widths"}}
# Words that experiments had of their own, and what they are called now.
OLD_WORDS = {
    ("guided_autoencoder", "--network.widths"): "--network.mlp-widths",
    ("guided_autoencoder", "--weights"): "--guidance",
    ("learning_dynamics", "--network.latent"): "--latent",
    ("learning_dynamics", "--records"): "--evaluations",
    ("masking_dynamics", "--max-probe"): "--probe-images",
    ("subspace_classification", "--sizes.conv"): "--network.conv-widths",
    ("subspace_classification", "--sizes.mlp"): "--network.mlp-widths",
    ("subspace_classification", "--sizes.resnet9"): "--network.resnet-widths",
    ("subspace_classification", "--training.flip"): "--training.augmentation.flip",
    ("subspace_classification", "--training.shift"): "--training.augmentation.shift",
    ("theorem2_check", "--records"): "--evaluations",
    ("train_autoencoder", "--network"): "--network.kind",
    ("train_autoencoder", "--network.widths"): "--network.mlp-widths",
    ("train_autoencoder", "--online-images"): "--probe-images",
    ("train_autoencoder", "--resnet-width"): "--network.resnet-width",
    ("train_autoencoder", "--stem-stride"): "--network.stem-stride",
    ("train_autoencoder", "--widths"): "--network.mlp-widths",
    ("train_mae", "--online-images"): "--probe-images",
}


def own_words(name: str, options: set[str]) -> set[str]:
    """Options of an experiment that have a word of the vocabulary and do not belong to it."""
    found = {
        option
        for pattern, allowed in WORDS.items()
        for option in options
        if re.search(pattern, option) and option not in allowed
    }
    return found - ONLY_THERE.get(name, set())


@pytest.mark.parametrize("name", sorted(set(NAMES) - COMMANDS))
def test_words_mean_the_same_everywhere(name):
    """One vocabulary: no experiment has its own word for what others have."""
    for preset in module(name).PRESETS.values():
        assert own_words(name, {one.option for one in settings(preset)}) == set()


@pytest.mark.parametrize(("name", "old"), OLD_WORDS)
def test_old_words_are_refused(name, old, capsys):
    """Whoever brings one back fails the vocabulary, and whoever gives one is told of it."""
    found, new = module(name), OLD_WORDS[name, old]
    assert own_words(name, {old}) == {old} and own_words(name, {new}) == set()
    assert new in {one.option for one in settings(found.PRESETS["laptop"])}
    with pytest.raises(SystemExit) as end:
        launch(lambda config: pytest.fail(f"{old} is taken: {config}"), found.Config, found.PRESETS, [old, "1"])
    assert end.value.code == 2
    assert old in capsys.readouterr().err


def test_every_option_in_the_documents_exists():
    """Of every command in the documents, in the docstrings and of the runs that they cite."""
    root = ROOT.parent
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("docs/runs/*/run.json"), *ROOT.rglob("*.py")]
    known = {
        name: {one.option for one in settings(module(name).PRESETS["laptop"])} | {"--preset", "--config", "--help"}
        for name in set(NAMES) - {"runs"}
    }
    seen = 0
    for page in pages:
        for name, words in re.findall(r"experiments\.(\w+)((?: +[^\s`#]+)+)", page.read_text(encoding="utf-8")):
            for option in re.findall(r" (--[a-z][\w.-]*)", words) if name in known else ():
                head, _, tail = option.rpartition("no-")
                assert option in known[name] or (head.endswith(("--", ".")) and head + tail in known[name]), (
                    page,
                    option,
                )
                seen += 1
    assert seen > 100


@pytest.mark.parametrize("folder", sorted((ROOT.parent / "docs" / "runs").iterdir()), ids=lambda path: path.name)
def test_the_settings_of_every_cited_run_can_be_taken_back(folder):
    name = json.loads((folder / "config.json").read_text())["experiment"]
    found, taken = module(name), []
    argv = with_written(["--config", str(folder / "config.json"), "--out", "elsewhere"], name)
    launch(lambda config: taken.append(config), found.Config, found.PRESETS, argv)
    written = json.loads((folder / "config.json").read_text())["config"]
    # Options that are newer than the run are not in it.
    assert json.loads(to_json(computed(taken[0]))).items() >= written.items()


def test_a_misspelt_name_gets_the_nearest_one(capsys):
    assert main(["maskng_sweep"]) == 2
    assert capsys.readouterr().err == "error: there is no experiment 'maskng_sweep': did you mean masking_sweep?\n"
    command = [sys.executable, "-m", "experiments.theorem_chek"]
    run = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "did you mean theorem_check?" in run.stderr and "Traceback" not in run.stderr


def test_the_list_names_every_experiment(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_readme_of_the_experiments_has_the_same_line(name):
    one = LISTED[NAMES.index(name)]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = f"| `{one.name}` | {one.paper} | {one.time} | {one.question} |"
    assert line in text, f"add this line to experiments/README.md: {line}"


def has_tests(name: str) -> bool:
    here = Path(__file__).parent
    return (here / f"test_{name}.py").exists() or (here / name).exists()


@pytest.mark.parametrize("name", [name for name in NAMES if not has_tests(name) and name not in COMMANDS])
def test_an_experiment_without_tests_of_its_own_runs_on_few_images(name, tmp_path, capsys):
    found, run = module(name), tmp_path / "run"
    run_experiment(found, "--max-train", 200, "--max-test", 100, "--out", run)
    files = {path.name for path in run.iterdir()}
    assert {"summary.txt", "columns.md", "config.json", "data.json", "run.json"} <= files
    assert any(file.endswith(".csv") for file in files) and any(file.endswith(".png") for file in files)
    assert (run / "summary.txt").read_text() == capsys.readouterr().out


def test_minimal_is_short_and_says_what_it_found(tmp_path, capsys):
    found = module("minimal")
    assert len(Path(str(found.__file__)).read_text().splitlines()) < 85
    run_experiment(found, "--ks", 2, 8, "--out", tmp_path / "run")
    assert {"curve.png", "rows.csv"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert "8 features" in capsys.readouterr().out


def test_experiments_that_take_targets_are_named():
    """In the refusal of all others."""
    found = {name: module(name) for name in NAMES}
    taking = [name for name, one in found.items() if Task.targets in getattr(vars(one).get("Config"), "TAKES", ())]
    assert tuple(sorted(taking)) == TAKE_TARGETS
