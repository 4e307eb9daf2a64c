from __future__ import annotations

import dataclasses
import math
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mae_align as ma
from experiments.harness.config import RunConfig, Training
from experiments.harness.data import Split
from experiments.harness.run import execute
from experiments.theorem2_check import __main__ as experiment
from experiments.theorem2_check.__main__ import COLUMNS, PRESETS, Config, main
from experiments.theorem2_check.networks import Case, Decoder, References, make_training, measure, start
from experiments.theorem2_check.tables import course_table, end_table, leading
from mae_align.train.loop import Preempted

LAM = 0.5
# 12 steps on the 100 images that a sixth of validation images leaves.
SETTINGS = Training(
    epochs=2,
    batch_size=16,
    learning_rate=1e-2,
    warmup_epochs=0,
    weight_decay=0.0,
    beta2=0.999,
    clip_norm=math.inf,
)
CONFIG = Config(latent=3, widths=(8,), lambdas=(math.inf, LAM), seeds=(0,), training=SETTINGS, evaluations=3, early=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Split:
    file = tmp_path_factory.mktemp("theorem2") / "toy.npz"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 120)
    mixed = rng.normal(size=(120, 6)) @ rng.normal(size=(6, 12)) * 25 + 12 * rng.normal(size=(3, 12))[y]
    x = np.clip(mixed + rng.normal(0, 6, (120, 12)) + 120, 0, 255).astype(np.uint8).reshape(-1, 4, 3, 1)
    np.savez(file, x_train=x, y_train=y, x_test=x, y_test=y)
    return Split.load(RunConfig(data=f"npz:{file}", validation_fraction=1 / 6))


@pytest.fixture(scope="module")
def references(data) -> References:
    return References.of(data.train_images, data.train_labels, 3, 3)


def go(data: Split, out: Path, **change) -> Path:
    execute("theorem2_check", main, dataclasses.replace(CONFIG, out=str(out), **change), lambda _: data, COLUMNS)
    return out


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    return go(data, tmp_path_factory.mktemp("theorem2") / "run")


@pytest.fixture(scope="module")
def rows(run) -> pd.DataFrame:
    return pd.read_csv(run / "networks.csv")


@pytest.fixture(scope="module")
def blocks(data) -> tuple[np.ndarray, np.ndarray]:
    """Centred images and one-hot labels, each of total variance 1."""
    x, y = data.train_images, data.train_labels
    found = [block - block.mean(0) for block in (x.reshape(len(x), -1).astype(float), np.eye(3)[y])]
    a, b = (block / np.sqrt((block**2).sum() / len(x)) for block in found)
    return a, b


def left(codes: np.ndarray, targets: np.ndarray) -> float:
    """E|W z + b - t|^2 of least squares."""
    design = np.column_stack([np.ones(len(codes)), codes])
    fitted = design @ np.linalg.lstsq(design, targets, rcond=None)[0]
    return float(((fitted - targets) ** 2).sum() / len(targets))


def test_free_codes_are_best_and_linear_ones_are_theorem_1s(references, blocks):
    x, y = blocks
    joined = np.concatenate([x, y / np.sqrt(LAM)], axis=1)
    u, s, _ = np.linalg.svd(joined, full_matrices=False)
    at = references.at(LAM)
    assert at.free_loss == pytest.approx((s[3:] ** 2).sum() / len(x), rel=1e-9)
    assert left(at.free, joined) == pytest.approx(at.free_loss, rel=1e-9)
    np.testing.assert_allclose(at.free @ at.free.T, u[:, :3] @ u[:, :3].T, atol=1e-9)
    # Theorem 1's minimum is attained by its codes, which are linear in the images, and it is no minimum of free codes.
    assert left(at.linear, joined) == pytest.approx(at.linear_loss, rel=1e-8)
    assert left(x, at.linear) < 1e-12 < 1e-3 < left(x, at.free)
    assert at.linear_loss > 1.01 * at.free_loss
    for seed in range(20):
        v = np.random.default_rng(seed).normal(size=(12, 3))
        assert left(x @ v, joined) > at.linear_loss


def test_of_reconstruction_alone_both_are_pca(references, blocks):
    at = references.at(math.inf)
    x, _ = blocks
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    assert at.free is at.linear and at.free_loss == at.linear_loss == pytest.approx((s[3:] ** 2).sum() / len(x))
    np.testing.assert_allclose(np.abs(at.free.T @ u[:, :3]), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(references.shares, s**2 / len(x), rtol=1e-9)


def test_measurements_are_those_of_the_codes(references, blocks, data):
    x, y = blocks
    case = Case(8, Decoder.linear, ((math.inf, 0), (LAM, 0)))
    training = make_training(references, SETTINGS, case)
    state = start(training, references, case)
    found = measure(training, state, references, case, {lam: references.at(lam) for lam in (math.inf, LAM)})
    codes = training.features(state, data.train_images, 50)
    u = np.linalg.svd(x, full_matrices=False)[0][:, :3]
    for e, (lam, code) in enumerate(zip((math.inf, LAM), codes.astype(float), strict=True)):
        expected = left(code, x) + (0.0 if math.isinf(lam) else left(code, y) / lam)
        assert found["codes_loss"][e] == pytest.approx(expected, rel=1e-5)
        shares = [1 - left(code, u[:, [i]]) * len(x) for i in range(3)]
        assert found["r2"][e].tolist() == pytest.approx(shares, abs=1e-5)
        q = np.linalg.qr(code - code.mean(0))[0]
        angles = np.degrees(np.arccos(np.clip(np.linalg.svd(q.T @ u, compute_uv=False), 0, 1)))
        assert found["angle_median"][e] == pytest.approx(np.median(angles), abs=1e-3)
        assert found["angle_largest"][e] == pytest.approx(angles.max(), abs=1e-3)
        assert found["rank"][e] == 3


@pytest.mark.slow
def test_training_goes_towards_the_bound_and_never_below(rows):
    assert sorted(rows.step.unique()) == [0, 1, 3, 12]
    assert (rows.codes_loss >= rows.free_loss * (1 - 1e-9)).all()
    # Eckart and Young: no code of k with a linear decoder does better on these images.
    alone = rows[np.isinf(rows.lam)]
    linear = alone[alone.decoder == "linear"]
    assert (linear.network_error >= linear.codes_loss * (1 - 1e-5)).all()
    for _, of in alone.groupby("decoder"):
        errors = of.sort_values("step").network_error.to_numpy()
        assert errors[-1] < 0.9 * errors[0]


@pytest.mark.slow
def test_stopped_by_sigterm_and_gone_on_with_it_is_the_same_run(data, run, rows, tmp_path, monkeypatch):
    measured = []

    def stopping(training, state, references, case, at):
        step = int(state.step)
        measured.append((case.key, step))
        if measured.count(("width8-nonlinear", 3)) == 1 and measured[-1] == ("width8-nonlinear", 3):
            signal.raise_signal(signal.SIGTERM)
        return measure(training, state, references, case, at)

    monkeypatch.setattr(experiment, "measure", stopping)
    with pytest.raises(Preempted, match="step 3 is saved"):
        go(data, tmp_path / "run")
    go(data, tmp_path / "run")
    # No measurement is made twice.
    assert measured == [(f"width8-{decoder.value}", step) for decoder in Decoder for step in (0, 1, 3, 12)]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "run" / "networks.csv"), rows, check_exact=True)


@pytest.mark.slow
def test_run_leaves_everything_in_its_folder(run):
    tables = {f"{name}.csv" for name in ("networks", "end", "early")}
    figures = {f"{name}.{kind}" for name in ("components", "convergence") for kind in ("png", "pdf")}
    records = {"summary.txt", "columns.md", "config.json", "data.json", "run.json", "points", "networks"}
    assert {path.name for path in run.iterdir()} == tables | figures | records
    for key in ("width8-linear", "width8-nonlinear"):
        assert {"metrics.jsonl", "checkpoints"} <= {path.name for path in (run / "networks" / key).iterdir()}
    text = (run / "summary.txt").read_text()
    for words in ("Linear decoder, lambda 0.5: at width 8", "Nonlinear decoder, width 8: ", "the minimum of Theorem 1"):
        assert words in text


@pytest.mark.slow
def test_ensembles_that_diverge_are_left_out(data, tmp_path):
    wild = dataclasses.replace(SETTINGS, learning_rate=1e30)
    with pytest.warns(UserWarning, match="Left out: width8-"), pytest.raises(ma.InputError, match="every network"):
        go(data, tmp_path / "run", training=wild)


def made_up(decoder: str, step: int, r2: list[float], seed: int = 0, loss: float = 0.3) -> dict:
    angles = dict.fromkeys(("angle_median", "angle_largest", "free_angle_median", "linear_angle_median"), 10.0 + seed)
    row = {"width": 8, "decoder": decoder, "lam": math.inf, "seed": seed, "step": step, "rank": 3}
    row |= {f"r2_{i + 1}": share for i, share in enumerate(r2)}
    return row | angles | {"codes_loss": loss, "free_loss": 0.2, "linear_loss": 0.25, "network_error": 0.22}


def test_ends_and_early_rows_are_means_over_seeds():
    rows = [
        made_up("linear", step, [0.9 + step / 1000, 0.8, value], seed, 0.21 + 0.02 * seed)
        for seed, value in enumerate((0.2, 0.6))
        for step in (0, 10, 90, 100)
    ]
    rows += [made_up("nonlinear", step, [0.95, 0.95, 0.95 - step / 1000]) for step in (0, 10, 90, 100)]
    frame = pd.DataFrame(rows)
    ends = end_table(frame).set_index("decoder").to_dict("index")
    one = ends["linear"]
    assert (one["excess"], one["excess_low"], one["excess_high"]) == pytest.approx((10.0, 5.0, 15.0))
    assert one["over_linear"] == pytest.approx(100 * (0.22 / 0.25 - 1)) and one["network_excess"] == pytest.approx(10)
    assert (one["learned"], one["mostly"], one["least_r2"]) == (1, 1, pytest.approx(0.4))
    assert one["angle_median"] == pytest.approx(10.5) and one["linear_over_free"] == pytest.approx(25.0)
    course = course_table(frame, 0.1).set_index(["decoder", "moment"]).to_dict("index")
    early = course["nonlinear", "early"]
    assert early["step"] == 10 and early["mostly"] == 3 and early["mean_r2"] == pytest.approx(0.9467, abs=1e-4)
    assert early["difference"] == pytest.approx(0.94 - 0.4)
    assert course["nonlinear", "end"]["mostly"] == 2
    # Angles are equal throughout, so the first measurement is nearest.
    assert course["linear", "nearest"]["step"] == 0 and course["linear", "nearest"]["mostly"] == 1
    # Without the other decoder there is nothing to differ from.
    assert "difference" not in course_table(frame.loc[frame.decoder == "linear"], 0.1)
    assert leading(np.array([np.nan, 1.0]), 0.9) == 0 and leading(np.ones(2), 0.9) == 2


def test_hidden_layers_of_the_presets_are_no_bottleneck():
    for preset in PRESETS.values():
        assert min(preset.widths) >= preset.latent


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lambdas": (1.0,)}, "--lambdas: give inf"),
        ({"lambdas": (math.inf, 0.0)}, "--lambdas 0: give numbers over 0"),
        ({"latent": 12, "widths": (12,)}, "--latent 12"),
        ({"latent": 9}, "--widths 8: a layer narrower than the code"),
        ({"training": dataclasses.replace(SETTINGS, batch_size=500)}, "--training.batch-size 500: there are 100"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_work(data, tmp_path, change, message):
    with pytest.raises(ma.InputError, match=message):
        go(data, tmp_path / "new", **change)
    assert not (tmp_path / "new").exists()
