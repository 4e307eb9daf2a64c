from __future__ import annotations

import csv
import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest

import mae_align as ma
from experiments.theorem2_check import networks as theorem2_networks
from experiments.theorem2_check.__main__ import PRESETS, Config, main
from experiments.theorem2_check.networks import Case, Decoder, NetworkConfig, References, follow, record_steps
from experiments.theorem2_check.report import course_rows, end_rows, leading
from mae_align.runtime.files import PointStore, fingerprint
from mae_align.train.loop import fit

pytestmark = pytest.mark.slow

LAM = 0.5
SETTINGS = NetworkConfig(steps=12, batch_size=16, learning_rate=1e-2, warmup_steps=0)
TINY = Config(latent=3, widths=(8,), lambdas=(math.inf, LAM), seeds=(0,), network=SETTINGS, records=4, early=0.5)


@functools.cache
def images_and_labels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    mixed = rng.normal(size=(120, 6)) @ rng.normal(size=(6, 12)) * 25 + 12 * rng.normal(size=(3, 12))[labels]
    noise = rng.normal(0, 6, (120, 12))
    return np.clip(mixed + noise + 120, 0, 255).astype(np.uint8).reshape(-1, 4, 3, 1), labels


@pytest.fixture(scope="module")
def references() -> References:
    return References.of(*images_and_labels(), 3, 3)


@pytest.fixture(scope="module")
def built():
    """Programs compiled once for all runs of this module."""
    with pytest.MonkeyPatch.context() as patch:
        made, make = {}, theorem2_networks.make_training

        def once(references, config, case):
            if case.key not in made:
                made[case.key] = make(references, config, case)
            return made[case.key]

        patch.setattr(theorem2_networks, "make_training", once)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("theorem2")
    x, y = images_and_labels()
    np.savez(folder / "toy.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return dataclasses.replace(TINY, data=f"npz:{folder / 'toy.npz'}", out=str(folder / "run"))


@pytest.fixture(scope="module")
def run(config, built) -> Path:
    main(config)
    return Path(config.out)


@pytest.fixture(scope="module")
def rows(run) -> list[dict[str, str]]:
    with (run / "networks.csv").open() as file:
        return list(csv.DictReader(file))


def blocks() -> tuple[np.ndarray, np.ndarray]:
    """Centred images and one-hot labels, each of total variance 1."""
    x, y = images_and_labels()
    found = [block - block.mean(0) for block in (x.reshape(120, -1).astype(float), np.eye(3)[y])]
    a, b = (block / np.sqrt((block**2).sum() / 120) for block in found)
    return a, b


def left(codes: np.ndarray, targets: np.ndarray) -> float:
    """E|W z + b - t|^2 of least squares."""
    design = np.column_stack([np.ones(len(codes)), codes])
    fitted = design @ np.linalg.lstsq(design, targets, rcond=None)[0]
    return float(((fitted - targets) ** 2).sum() / len(targets))


def test_free_codes_are_best_and_linear_ones_are_theorem_1s(references):
    x, y = blocks()
    joined = np.concatenate([x, y / np.sqrt(LAM)], axis=1)
    u, s, _ = np.linalg.svd(joined, full_matrices=False)
    at = references.at(LAM)
    assert at.free_loss == pytest.approx((s[3:] ** 2).sum() / 120, rel=1e-9)
    assert left(at.free, joined) == pytest.approx(at.free_loss, rel=1e-9)
    np.testing.assert_allclose(at.free @ at.free.T, u[:, :3] @ u[:, :3].T, atol=1e-9)
    # Theorem 1's minimum is attained by its codes, which are linear in the images, and it is no minimum of free codes.
    assert left(at.linear, joined) == pytest.approx(at.linear_loss, rel=1e-8)
    assert left(x, at.linear) < 1e-12 < 1e-3 < left(x, at.free)
    assert at.linear_loss > 1.01 * at.free_loss
    for seed in range(20):
        v = np.random.default_rng(seed).normal(size=(12, 3))
        assert left(x @ v, joined) > at.linear_loss


def test_of_reconstruction_alone_both_are_pca(references):
    at = references.at(math.inf)
    x, _ = blocks()
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    assert at.free is at.linear and at.free_loss == at.linear_loss == pytest.approx((s[3:] ** 2).sum() / 120)
    np.testing.assert_allclose(np.abs(at.free.T @ u[:, :3]), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(references.shares, s**2 / 120, rtol=1e-9)


def test_measurements_are_those_of_the_codes(references, built, run, rows):
    steps = record_steps(12, 4)
    assert sorted({int(float(r["step"])) for r in rows}) == list(steps) == [0, 1, 3, 12]
    x, y = blocks()
    case = Case(8, Decoder.linear, ((math.inf, 0), (LAM, 0)))
    training = theorem2_networks.make_training(references, SETTINGS, case)
    state = training.init([0, 0])
    codes = training.features(state, images_and_labels()[0], 50)
    first = [r for r in rows if (float(r["step"]), r["decoder"]) == (0.0, "linear")]
    assert [float(r["lam"]) for r in first] == [math.inf, LAM]
    u = np.linalg.svd(x, full_matrices=False)[0][:, :3]
    for row, code in zip(first, codes.astype(float), strict=True):
        lam = float(row["lam"])
        expected = left(code, x) + (0.0 if math.isinf(lam) else left(code, y) / lam)
        assert float(row["loss"]) == pytest.approx(expected, rel=1e-5)
        shares = [1 - left(code, u[:, [i]]) * 120 for i in range(3)]
        assert [float(row[f"r2_{i + 1}"]) for i in range(3)] == pytest.approx(shares, abs=1e-5)
        q = np.linalg.qr(code - code.mean(0))[0]
        angles = np.degrees(np.arccos(np.clip(np.linalg.svd(q.T @ u, compute_uv=False), 0, 1)))
        assert float(row["angle_median"]) == pytest.approx(np.median(angles), abs=1e-3)
        assert float(row["angle_largest"]) == pytest.approx(angles.max(), abs=1e-3)


def test_training_goes_towards_the_bound_and_never_below(rows):
    for row in rows:
        assert float(row["loss"]) >= float(row["free_loss"]) * (1 - 1e-9)
        if row["decoder"] == "linear" and math.isinf(float(row["lam"])):
            # Eckart and Young: no code of k with a linear decoder does better on these images.
            assert float(row["network_error"]) >= float(row["loss"]) * (1 - 1e-5)
    for decoder in ("linear", "nonlinear"):
        of = [r for r in rows if r["decoder"] == decoder and math.isinf(float(r["lam"]))]
        errors = [float(r["network_error"]) for r in sorted(of, key=lambda r: float(r["step"]))]
        assert errors[-1] < 0.9 * errors[0]


def test_stopped_and_resumed_is_the_same_run(references, built, run, tmp_path, monkeypatch):
    """Measurements that are there are kept; the rest of the training goes on from its checkpoint."""
    case = Case(8, Decoder.nonlinear, ((math.inf, 0),))
    steps = record_steps(12, 4)
    store = PointStore(tmp_path / "points", "toy")

    def killed(training, state, data, *, num_steps):
        if int(state.step) >= 3:
            raise KeyboardInterrupt
        return fit(training, state, data, num_steps=num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(theorem2_networks, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            follow(references, SETTINGS, case, steps, store, tmp_path / "networks")
    (tmp_path / "points" / f"{case.key}-step3.npz").unlink()  # killed between checkpoint and measurement
    kept = dict.fromkeys(["step0", "step1"])
    for name in kept:
        kept[name] = (tmp_path / "points" / f"{case.key}-{name}.npz").stat().st_mtime_ns
    begun = []
    monkeypatch.setattr(theorem2_networks, "fit", lambda *a, **k: begun.append(k["num_steps"]) or fit(*a, **k))
    rows = follow(references, SETTINGS, case, steps, store, tmp_path / "networks")
    again = follow(references, SETTINGS, case, steps, PointStore(run / "points", _identity(run)), tmp_path / "none")
    assert rows == again and len(rows) == 4 and not (tmp_path / "none").exists()
    assert sum(begun) == 9  # from the checkpoint at step 3
    for name, time in kept.items():
        assert (tmp_path / "points" / f"{case.key}-{name}.npz").stat().st_mtime_ns == time
    # A lost measurement from before the checkpoint is made again, from the start and no further than needed.
    (tmp_path / "points" / f"{case.key}-step3.npz").write_bytes(b"cut off")
    begun.clear()
    with pytest.warns(UserWarning, match="step3"):
        assert follow(references, SETTINGS, case, steps, store, tmp_path / "networks") == rows
    assert sum(begun) == 3
    (tmp_path / "points" / f"{case.key}-step1.npz").unlink()
    (tmp_path / "points" / f"{case.key}-step12.npz").unlink()
    assert follow(references, SETTINGS, case, steps, store, tmp_path / "networks") == rows


def _identity(run: Path) -> str:
    return fingerprint(list(images_and_labels()), {})


def test_run_leaves_everything_in_its_folder(run, config):
    tables = {f"{name}.csv" for name in ("networks", "end", "early")} | {"networks.nc", "summary.txt"}
    figures = {f"{name}.{kind}" for name in ("components", "convergence") for kind in ("png", "pdf")}
    assert {path.name for path in run.iterdir()} == tables | figures | {"config.json", "points", "networks"}
    text = (run / "summary.txt").read_text()
    told = ("code of 3", "lambda 0.5, width 8", "width 8, nonlinear decoder: start (step 0)", "minimum of Theorem 1")
    for words in told:
        assert words in text


def made_up(decoder: str, step: int, r2: list[float], seed: int = 0, loss: float = 0.3) -> dict:
    angles = dict.fromkeys(("angle_median", "angle_largest", "free_angle_median", "linear_angle_median"), 10.0 + seed)
    row = {"width": 8, "decoder": decoder, "lam": math.inf, "seed": seed, "step": step, "r2": r2, "rank": 3}
    return row | angles | {"loss": loss, "free_loss": 0.2, "linear_loss": 0.25, "network_error": 0.22}


def test_ends_and_early_rows_are_means_over_seeds():
    rows = [
        made_up("linear", step, [0.9 + step / 1000, 0.8, value], seed, 0.21 + 0.02 * seed)
        for seed, value in enumerate((0.2, 0.6))
        for step in (0, 10, 90, 100)
    ]
    rows += [made_up("nonlinear", step, [0.95, 0.95, 0.95 - step / 1000]) for step in (0, 10, 90, 100)]
    ends = {row["decoder"]: row for row in end_rows(rows)}
    one = ends["linear"]
    assert (one["excess"], one["excess_low"], one["excess_high"]) == pytest.approx((10.0, 5.0, 15.0))
    assert one["over_linear"] == pytest.approx(100 * (0.22 / 0.25 - 1)) and one["network_excess"] == pytest.approx(10)
    assert (one["learned"], one["mostly"], one["least_r2"]) == (1, 1, pytest.approx(0.4))
    assert one["angle_median"] == pytest.approx(10.5) and one["linear_over_free"] == pytest.approx(25.0)
    course = {(row["decoder"], row["moment"]): row for row in course_rows(rows, 0.1)}
    early = course["nonlinear", "early"]
    assert early["step"] == 10 and early["mostly"] == 3 and early["mean_r2"] == pytest.approx(0.9467, abs=1e-4)
    assert early["difference"] == pytest.approx(0.94 - 0.4)
    assert course["nonlinear", "end"]["mostly"] == 2
    # Angles are equal throughout, so the first measurement is nearest.
    assert course["linear", "nearest"]["step"] == 0 and course["linear", "nearest"]["mostly"] == 1
    assert leading(np.array([np.nan, 1.0]), 0.9) == 0 and leading(np.ones(2), 0.9) == 2


def test_hidden_layers_of_the_presets_are_no_bottleneck():
    for preset in PRESETS.values():
        assert min(preset.widths) >= preset.latent


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lambdas": (1.0,)}, "--lambdas: give inf"),
        ({"lambdas": (math.inf, 0.0)}, "--lambdas 0"),
        ({"widths": (8, 8)}, "--widths repeats"),
        ({"latent": 12, "widths": (12,)}, "--latent 12"),
        ({"latent": 9}, "--widths 8"),
        ({"latent": 1}, "--latent at least 2"),
        ({"seeds": (-1,)}, "--seed and"),
        ({"early": 1.0}, "--early 1"),
        ({"max_train": 10}, "--max-train 10"),
        ({"network": NetworkConfig(steps=0)}, "steps 0"),
        ({"network": NetworkConfig(steps=5, warmup_steps=5)}, "warm-up"),
        ({"network": NetworkConfig(batch_size=500)}, "batch-size 500"),
    ],
)
def test_bad_settings_are_refused_before_work(config, tmp_path, change, message):
    with pytest.raises(ma.InputError, match=message):
        main(dataclasses.replace(config, out=str(tmp_path / "new"), **change))
    assert not (tmp_path / "new").exists()
