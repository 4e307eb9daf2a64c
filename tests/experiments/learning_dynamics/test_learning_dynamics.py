from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray as xr

import mae_align as ma
from experiments.harness.cli import launch
from experiments.learning_dynamics import __main__ as learning_dynamics
from experiments.learning_dynamics import cells as dynamics_cells
from experiments.learning_dynamics.__main__ import PRESETS, Config, main
from experiments.learning_dynamics.analysis import Cell, analyse
from experiments.learning_dynamics.cells import (
    Images,
    Learner,
    Scene,
    Schedule,
    TrainingConfig,
    cells,
    image_map,
    make_scene,
    make_training,
    num_steps,
    run_cell,
)
from experiments.learning_dynamics.dynamics import HalfTimes
from experiments.learning_dynamics.figures import intervention_figure
from experiments.learning_dynamics.reference import flow_cost, flow_half_times
from experiments.learning_dynamics.report import sentences
from experiments.learning_dynamics.spectrum import Spectrum
from mae_align.train.checkpoint import Checkpoints
from mae_align.train.ensemble import Training

pytestmark = pytest.mark.slow

SETTINGS = TrainingConfig(latent=6, mlp_hidden=(9,), batch_size=48, steps=20, descent_steps=150)
TINY = Config(
    max_train=200,
    learners=(Learner.linear_descent,),
    intervened=(Learner.linear_descent,),
    interventions=(Images.reversed,),
    seeds=(0, 1),
    training=SETTINGS,
    records=7,
    looked_at=60,
    bands=3,
    response_points=30,
    response_widths=(0.5,),
    resamples=20,
)


@pytest.fixture(scope="module")
def digits() -> ma.ImageDataset:
    data = ma.load_dataset("digits")
    return dataclasses.replace(data, train_images=data.train_images[:200], train_labels=data.train_labels[:200])


@pytest.fixture(scope="module")
def scene(digits) -> Scene:
    spectrum = Spectrum.of(ma.Moments.from_arrays(digits.train_images))
    moved = image_map(Images.original, spectrum, 6, 0)
    return make_scene(digits, moved, seen=60, response_points=30, widths=(0.5,), seed=0)


@pytest.fixture(scope="module")
def training(digits) -> Training:
    return make_training(Learner.linear_descent, SETTINGS, digits.image_shape, 2)


def run(training: Training, scene: Scene, checkpoints: Checkpoints | None = None) -> dynamics_cells.Arrays:
    about = {"records": 7, "bands": 3, "checkpoints": checkpoints, "label": ""}
    return run_cell(Learner.linear_descent, training, scene, SETTINGS, (0, 1), **about)


@pytest.fixture(scope="module")
def whole(training, scene) -> dynamics_cells.Arrays:
    return run(training, scene)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dynamics") / "run"
    main(dataclasses.replace(TINY, out=str(out)))
    return out


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_run_leaves_everything_in_its_folder(folder):
    figures = {
        f"{n}.{kind}"
        for n in ("residuals", "spectra", "half_times", "groups", "frequency", "interventions", "set_apart")
        for kind in ("png", "pdf")
    }
    tables = {f"{n}.csv" for n in ("dynamics", "half_times", "laws", "correlations", "orders")}
    assert {path.name for path in folder.iterdir()} == figures | tables | {
        "dynamics.nc",
        "summary.txt",
        "config.json",
        "points",
    }
    found = xr.load_dataset(folder / "dynamics.nc", engine="scipy")
    assert dict(found.residual.sizes) == {"cell": 2, "seed": 2, "record": 8, "direction": 6}
    summary = (folder / "summary.txt").read_text()
    assert "original, linear_descent: half-time ~ eigenvalue^-" in summary
    assert "reversed, linear_descent: half-time with eigenvalue given frequency" in summary


def test_half_times_of_the_linear_network_are_those_of_the_flow_and_of_the_eigenvalue(folder):
    found = rows(folder / "half_times.csv")
    assert len(found) == 2 * 2 * 6
    for row in found:
        if row["censored"] == "False":
            assert float(row["half_time"]) == pytest.approx(float(row["flow_half_time"]), rel=0.25)
    for law in rows(folder / "laws.csv"):
        assert 0.7 < float(law["exponent"]) < 1.4
    order = {row["images"]: float(row["eigenvalue"]) for row in rows(folder / "correlations.csv")}
    assert order["original"] < -0.8
    # The same eigenvalues on the directions in reverse order, and still those with the largest come first.
    assert order["reversed"] < -0.8


def test_same_folder_goes_on_and_trains_nothing_again(folder, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    monkeypatch.setattr(learning_dynamics, "run_cell", None)
    monkeypatch.setattr(learning_dynamics, "write_report", lambda found, *_, **__: keys.extend(found))
    keys: list[object] = []
    main(dataclasses.replace(TINY, out=str(copy)))
    assert keys == [(Images.original, Learner.linear_descent), (Images.reversed, Learner.linear_descent)]


def test_looks_are_at_the_network_of_their_step(whole, training, scene):
    """The last look, measured anew from the definitions on a network trained in one go."""
    assert whole["steps"].tolist()[:2] == [0, 1]
    state = training.init([0, 1], learning_rates=[float(whole["rate"])] * 2)
    state, _ = training.advance(state, training.put(scene.images), 150)
    model = training.model(state, 1)
    for images, residual, loss in (
        (scene.images[scene.seen], whole["seen"], whole["loss"]),
        (scene.held_out, whole["held_out"], whole["held_out_loss"]),
    ):
        reconstructed = np.asarray(model.reconstruct(images))  # pyright: ignore[reportAttributeAccessIssue]
        assert loss[1, -1] == pytest.approx(np.mean((reconstructed - images) ** 2), rel=1e-4)
        direction = scene.spectrum.vectors[:, 2]
        missed, there = ((a.reshape(len(a), -1) @ direction) ** 2 for a in (reconstructed - images, images))
        assert residual[1, -1, 2] == pytest.approx(missed.sum() / there.sum(), rel=1e-3)
    # Of all directions, also those beyond the code.
    assert whole["spectrum"].shape == whole["energy"].shape == (2, len(whole["steps"]), scene.spectrum.rank)
    seen = scene.images[scene.seen]
    rebuilt = np.asarray(model.reconstruct(seen))  # pyright: ignore[reportAttributeAccessIssue]
    for name, values, scale in (
        ("spectrum", rebuilt - seen, whole["data_energy"]),
        ("energy", rebuilt, np.ones(scene.spectrum.rank)),
    ):
        along = np.mean((values.reshape(len(seen), -1) @ scene.spectrum.vectors) ** 2, axis=0) / scale
        np.testing.assert_allclose(whole[name][1, -1], along, rtol=1e-3, atol=1e-6 * along.max())
    # Before training nothing of any direction is there: a small start.
    np.testing.assert_allclose(whole["seen"][:, 0], 1, atol=0.02)
    assert (whole["loss"][:, -1] < 0.6).all()


def test_interrupted_cell_goes_on_from_its_checkpoint(whole, training, scene, tmp_path, monkeypatch):
    look, count = dynamics_cells._look, [0]

    def until_the_fifth(*arguments):
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return look(*arguments)

    monkeypatch.setattr(dynamics_cells, "_look", until_the_fifth)
    with Checkpoints.open(tmp_path / "c", identity="a", every=1, keep_latest=1) as checkpoints:
        with pytest.raises(KeyboardInterrupt):
            run(training, scene, checkpoints)
    with Checkpoints.open(tmp_path / "c", identity="a", every=1, keep_latest=1) as checkpoints:
        assert checkpoints.latest_step() == whole["steps"][3]
        found = run(training, scene, checkpoints)
    # Four looks are read again, the other four made.
    assert count[0] == 5 + 4
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name], array)


def test_divergence_is_noted_and_not_fitted(training, scene):
    wild = dataclasses.replace(SETTINGS, descent_rate=50.0)
    arrays = run_cell(
        Learner.linear_descent, training, scene, wild, (0, 1), records=7, bands=3, checkpoints=None, label=""
    )
    assert np.isfinite(arrays["loss"][:, 0]).all()
    assert np.isnan(arrays["loss"][:, -1]).all()
    (cell,) = analyse({(Images.original, Learner.linear_descent): arrays}, resamples=20, seed=0)
    assert cell.diverged
    assert cell.laws is None
    assert cell.ranks is None
    assert "a loss is not finite at step" in next(sentences([cell], [0.5]))


def test_whitened_images_on_which_every_network_diverged_are_drawn():
    arrays = {"values": np.ones(3), "frequency": np.linspace(0.1, 0.3, 3)}
    whole, lost = (HalfTimes(np.full((2, 3), time), np.zeros((2, 3), bool)) for time in (10.0, np.nan))
    drawn = [
        Cell(images, Learner.mlp_adamw, arrays, seen, seen, False, None, None)
        for images, seen in ((Images.original, whole), (Images.whitened, lost))
    ]
    panel = intervention_figure(drawn, "toy").axes[1]
    assert np.isfinite(panel.get_ylim()).all()


def test_a_class_that_is_not_looked_at_in_training_is_no_error(training, scene):
    assert scene.num_classes == 10
    few = scene._replace(seen_labels=scene.seen_labels % 3)
    looked = dynamics_cells._look(training, training.init([0, 1]), few, 6, 3)
    assert ((0 <= looked["accuracy"]) & (looked["accuracy"] < 1)).all()


def test_the_flow_says_nothing_of_directions_that_it_does_not_reach(training, scene):
    steps = np.array([0, 1, 2])
    state = training.init([0, 1], learning_rates=[1e-6] * 2)
    found = flow_half_times(training, state, scene.spectrum, steps, 1e-6)
    assert found.shape == (2, scene.spectrum.rank) and np.isnan(found).all()


def test_the_flow_is_left_out_where_it_would_take_hours(training, scene, whole, monkeypatch):
    assert whole["reference_half_times"].shape == (2, 6)
    monkeypatch.setattr(dynamics_cells, "_LARGEST_FLOW", flow_cost(0.1, 150, 6, scene.spectrum.rank, 2))
    monkeypatch.setattr(dynamics_cells, "flow_half_times", None)
    found = run(training, scene)
    assert whole.keys() - found.keys() == {"reference_half_times"}
    costs = {}
    for name, pixels in {"laptop": 64, "fashion_mnist": 784, "cifar10": 768, "paper": 3072}.items():
        of = PRESETS[name].training
        costs[name] = flow_cost(of.descent_rate, of.descent_steps, of.latent, pixels, len(PRESETS[name].seeds))
    assert {name for name, cost in costs.items() if cost >= 1e14} == {"paper"}


def test_cells_are_all_learners_on_the_original_and_some_on_changed_images():
    found = cells(
        (Learner.mlp_adamw,), (Learner.mlp_adamw, Learner.conv_adamw), (Images.rotated, Images.original, Images.top)
    )
    assert found == [
        (Images.original, Learner.mlp_adamw),
        (Images.rotated, Learner.mlp_adamw),
        (Images.top, Learner.mlp_adamw),
        (Images.top, Learner.conv_adamw),
    ]


@pytest.mark.parametrize("learner", list(Learner))
@pytest.mark.parametrize("schedule", list(Schedule))
def test_every_learner_can_be_made(learner, schedule):
    config = dataclasses.replace(SETTINGS, schedule=schedule, conv_steps=30)
    made = make_training(learner, config, (8, 8, 1), 1)
    steps = {"linear_descent": 150, "mlp_momentum": 150, "conv_adamw": 30, "conv_momentum": 30}
    assert num_steps(learner, config) == steps.get(learner.value, 20)
    moving = 1 if learner in (Learner.mlp_momentum, Learner.conv_momentum) else 0
    moving = 2 if learner.value.endswith("adamw") else moving
    sizes = [
        sum(x.size for x in jax.tree.leaves(tree))
        for tree in (made.abstract_state.params, made.abstract_state.opt_state)
    ]
    # Copies of the parameters that the rule keeps, and a few counters.
    assert 0 <= sizes[1] - moving * sizes[0] <= 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "digit"], "unknown data set 'digit', did you mean 'digits'?"),
        (["--training.latent", "65"], "--training.latent 65: these images vary in "),
        (["--training.latent", "3"], "--training.latent: give at least 4"),
        (["--training.batch-size", "9999"], "--training.batch-size 9999: there are "),
        (["--training.start", "1"], "--training.start 1.0: give a strength between 0 and 1"),
        (["--training.momentum-rate", "0"], "--training.momentum-rate 0.0: give a number over 0"),
        (["--records", "2"], "--records 2: give at least 4"),
        (["--response-widths", "0"], "--response-widths (0.0,): give numbers over 0"),
        (["--seeds", "1", "1"], "--seeds repeats a value: give each once"),
        (["--seed", "-1"], "--seed and --seeds: give whole numbers of at least 0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        launch(main, Config, PRESETS, argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
