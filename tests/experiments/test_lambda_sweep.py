from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import mae_align as ma
from experiments.lambda_sweep import __main__ as lambda_sweep
from experiments.lambda_sweep.__main__ import relative_grid
from experiments.lambda_sweep.report import excess_percent, frontier_weights, report_rows, shown, verdict
from tests.experiments.cases import refusal, rows_of, run_experiment

TINY = ("--ks", 3, 12, "--lambdas", 0.1, 1, 10, "--groups", 5)


@pytest.fixture(scope="module")
def digits() -> ma.ImageDataset:
    return ma.load_dataset("digits")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lambda") / "run"
    run_experiment(lambda_sweep, *TINY, "--out", out)
    return out


@pytest.fixture(scope="module")
def result(run) -> xr.Dataset:
    return xr.load_dataset(run / "trade_off.nc", engine="scipy")


def plain_moments(data: ma.ImageDataset) -> tuple[np.ndarray, ...]:
    """Centred rows and targets, and the covariance with its floor, by plain NumPy."""
    x = data.train_images.reshape(len(data.train_images), -1).astype(float)
    y = np.eye(data.classes)[data.train_labels]
    xc, yc = x - x.mean(0), y - y.mean(0)
    return xc, yc, xc.T @ xc / len(x) + np.eye(x.shape[1]) / 12


def test_run_leaves_everything_in_its_folder(run):
    names = {path.name for path in run.iterdir()}
    figures = {f"{name}.{kind}" for name in ("trade_off", "against_lambda") for kind in ("png", "pdf")}
    assert names == figures | {
        "columns.md",
        "config.json",
        "data.json",
        "run.json",
        "trade_off.nc",
        "trade_off.csv",
        "influence.nc",
        "summary.csv",
        "summary.txt",
        "points",
    }


def test_ends_are_least_squares_and_pca(result, digits):
    xc, yc, s = plain_moments(digits)
    sxy, total = xc.T @ yc / len(xc), np.sum(yc**2) / len(yc)
    least_squares = np.trace(sxy.T @ np.linalg.solve(s, sxy)) / total
    assert result.attrs["r2_full_rank"] == pytest.approx(least_squares, rel=1e-9)
    # 12 features are more than the 9 that ten classes need.
    assert float(result.r2.sel(lam_relative=0.0, k=12)) == pytest.approx(least_squares, rel=1e-9)
    values, vectors = np.linalg.eigh(s)
    for k in (3, 12):
        v = vectors[:, -k:]
        pca = np.trace(sxy.T @ v @ np.linalg.solve(v.T @ s @ v, v.T @ sxy)) / total
        at = result.sel(lam_relative=np.inf, k=k)
        assert float(at.r2) == pytest.approx(pca, rel=1e-9)
        assert float(at.reconstruction_mse) == pytest.approx(values[:-k].sum(), rel=1e-9)
        assert float(at.angle_largest) < 1e-4


def test_relative_lambda_is_in_units_of_the_traces(result, digits):
    _, yc, s = plain_moments(digits)
    unit = np.trace(s) / (np.sum(yc**2) / len(yc))
    np.testing.assert_allclose(result.lam[1:-1] * unit, [0.1, 1.0, 10.0], rtol=1e-12)


def test_held_out_curves_are_errors_of_real_predictions(result, digits):
    moments = ma.Moments.from_arrays(digits.train_images, digits.train_labels)
    lam = float(result.lam.sel(lam_relative=1.0))
    model = ma.supervised_autoencoder(moments, lam, 12)
    y = np.eye(10)[digits.test_labels]
    images = digits.test_images.astype(float)
    error = np.sum((model.predict(images) - y) ** 2) / np.sum((y - moments.mean_y) ** 2)
    at = result.sel(lam_relative=1.0, k=12)
    assert float(at.eval_r2) == pytest.approx(1 - error, rel=1e-9)
    plain = np.sum((model.reconstruct(images) - images) ** 2) / len(images)
    # The measurement noise of a test image passes through the autoencoder as well.
    noise = np.sum((model.encoder @ model.decoder - np.eye(64)) ** 2) / 12
    assert float(at.eval_reconstruction_mse) == pytest.approx(plain + noise, rel=1e-9)


def test_trade_off_is_monotone(result):
    for name, sign in (("r2", -1), ("reconstruction_mse", -1), ("angle_largest", -1)):
        assert (sign * result[name].diff("lam_relative") > 0).sum() >= 6, name
    assert (result.r2.diff("lam_relative") <= 1e-12).all()
    assert (excess_percent(result) >= 0).all()


# --- a data set on which everything can be worked out by hand ---

AMPLITUDES = (90, 60, 30, 15)


def designed(signal: int) -> ma.ImageDataset:
    """Four independent pixels of different variance; the label is the sign of one of them."""
    signs = np.array(list(itertools.product((-1, 1), repeat=4)))
    images = np.tile(128 + signs * np.array(AMPLITUDES), (10, 1)).astype(np.uint8).reshape(-1, 2, 2, 1)
    labels = np.tile((signs[:, signal] > 0).astype(int), 10)
    return ma.ImageDataset(images, labels, images, labels, ("low", "high"), "designed")


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("by-hand")
    data = designed(signal=1)
    np.savez(
        folder / "designed.npz",
        x_train=data.train_images,
        y_train=data.train_labels,
        x_test=data.test_images,
        y_test=data.test_labels,
    )
    out = folder / "run"
    run_experiment(lambda_sweep, *by_hand_arguments(folder, out))
    return out


def by_hand_arguments(data: Path, out: Path) -> list[object]:
    return ["--data", f"npz:{data / 'designed.npz'}", "--ks", 1, 2, "--lambdas", 1, "--groups", 4, "--out", out]


def test_encoder_depends_on_lambda_exactly_where_pca_misses_the_label(by_hand):
    one, two = rows_of(by_hand / "summary.csv")
    # The label is the second principal component.
    assert (one["depends_on_lambda"], two["depends_on_lambda"]) == ("True", "False")
    assert float(one["angle_zero_to_pca"]) == pytest.approx(90.0, abs=1e-6)
    assert float(two["angle_zero_to_pca"]) == pytest.approx(0.0, abs=1e-4)
    assert float(one["shortfall"]) == pytest.approx(1.0, abs=1e-3)
    assert float(two["shortfall"]) == pytest.approx(0.0, abs=1e-9)
    text = (by_hand / "summary.txt").read_text()
    assert "The encoder depends on lambda at k = 1, where PCA falls short" in text
    assert "; it does not at k = 2." in text


def test_what_the_budget_buys_is_the_worked_out_price(by_hand):
    one, two = rows_of(by_hand / "summary.csv")
    a, b, c, d = (x**2 + 1 / 12 for x in AMPLITUDES)
    # One feature between the first two pixels: r2 and error are linear in the share of the second pixel.
    share = 0.01 * (b + c + d) / (a - b)
    full = AMPLITUDES[1] ** 2 / b
    assert float(one["budget_gain"]) == pytest.approx(share * full, rel=1e-9)
    assert float(one["budget_excess_percent"]) == pytest.approx(1.0)
    assert float(one["zero_gain"]) == pytest.approx(full, rel=1e-9)
    # Two features hold both pixels whatever lambda is: nothing to buy, and no price.
    assert float(two["budget_gain"]) == pytest.approx(0.0, abs=1e-9)
    assert float(two["zero_excess_percent"]) == pytest.approx(0.0, abs=1e-9)


# --- the report ---


@pytest.mark.parametrize(
    ("excess", "budget", "expected"),
    [
        ([40.0, 3.0, 0.5, 0.0], 1.0, [0.0, 0.2, 0.8, 0.0]),
        ([40.0, 3.0, 0.5, 0.0], 40.0, [1.0, 0.0, 0.0, 0.0]),
        ([0.4, 0.2, 0.0], 1.0, [1.0, 0.0, 0.0]),
        ([4.0, 4.0, 0.0], 1.0, [0.0, 0.25, 0.75]),
    ],
)
def test_budget_is_spent_between_two_solutions(excess, budget, expected):
    weights = frontier_weights(np.array(excess), budget)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert weights @ excess == pytest.approx(min(budget, excess[0]))


def made_up(test_gain: float, group_spread: float) -> tuple[xr.Dataset, xr.Dataset]:
    """A result over lambda 0, 1, inf at k = 2: lambda = 1 is best on validation, lambda = 0 on test images."""
    influence = np.zeros((3, 2, 1))
    influence[1, :, 0] = (group_spread, -group_spread)

    def over_lambda(*values: float) -> tuple[tuple[str, str], np.ndarray]:
        return ("lam_relative", "k"), np.array(values)[:, None]

    result = xr.Dataset(
        {
            "r2": over_lambda(0.9, 0.8, 0.5),
            "eval_r2": over_lambda(0.7, 0.4 + test_gain, 0.4),
            "eval_influence": (("lam_relative", "group", "k"), influence),
            "reconstruction_mse": over_lambda(20.0, 11.0, 10.0),
            "eval_reconstruction_mse": over_lambda(24.0, 13.0, 12.0),
            "angle_largest": over_lambda(50.0, 20.0, 0.0),
        },
        {"lam_relative": [0.0, 1.0, np.inf], "k": [2]},
    )
    return result, xr.Dataset({"eval_r2": over_lambda(0.3, 0.6, 0.5)}, result.coords)


def test_lambda_is_chosen_on_validation_and_measured_on_test():
    (row,) = report_rows(*made_up(test_gain=0.1, group_spread=0.01), budget=5.0)
    assert row["best_lam_relative"] == 1.0
    assert row["best_eval_gain"] == pytest.approx(0.1)
    # SE^2 = G / (G - 1) sum psi^2 with G = 2.
    assert row["best_eval_gain_se"] == pytest.approx(0.02)
    # Half of the way from PCA to lambda = 1, which costs 10% on training and 8.33% on test images.
    assert row["budget_gain"] == pytest.approx(0.15)
    assert row["budget_eval_gain"] == pytest.approx(0.05)
    assert row["budget_eval_gain_se"] == pytest.approx(0.01)
    assert row["budget_eval_excess_percent"] == pytest.approx(100 / 24)
    assert row["best_eval_excess_percent"] == pytest.approx(100 / 12)
    assert "k = 2: +0.1000 +- 0.0200" in verdict([row], 5.0)[1]
    assert shown([row], 5.0)["+5%: test"].tolist() == ["+0.0500 +- 0.0100"]


@pytest.mark.parametrize(("spread", "detected"), [(0.0245, True), (0.0255, False)])
def test_difference_under_two_standard_errors_is_not_called_one(spread, detected):
    rows = report_rows(*made_up(test_gain=0.1, group_spread=spread), budget=10.0)
    assert ("no detectable difference" in "\n".join(verdict(rows, 10.0))) != detected


# --- as users meet it ---


def test_same_folder_goes_on_where_it_stopped(by_hand, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(by_hand, folder)
    (folder / "summary.txt").unlink()
    # A stored number that no computation would give shows that it was read.
    stored = folder / "points" / "lam0.0.npz"
    with np.load(stored) as found:
        changed = {name: found[name] for name in found.files}
    changed["angle_largest"] = np.array([12.34, 0.0])
    np.savez(stored, allow_pickle=False, **changed)
    arguments = by_hand_arguments(by_hand.parent, folder)
    run_experiment(lambda_sweep, *arguments)
    assert float(rows_of(folder / "summary.csv")[0]["angle_zero_to_pca"]) == 12.34
    capsys.readouterr()
    assert "another configuration" in refusal(capsys, lambda_sweep, *arguments, "--budget", 2)


def test_grid_holds_both_ends_once():
    assert relative_grid((np.inf, 1.0, 0.0, 0.1)) == [0.0, 0.1, 1.0, np.inf]
    assert set(lambda_sweep.PRESETS) == {"laptop", "paper"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ks", "64"], "--ks 64: give numbers below 64, the number of pixel values"),
        (["--ks", "62", "--pixel-noise", "0"], "--ks 62: give numbers below 61, the rank"),
        (["--groups", "300"], "--groups 300: 359 test images leave a group empty"),
    ],
)
def test_what_does_not_fit_the_data_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, lambda_sweep, *arguments)
    assert not list(tmp_path.iterdir())
