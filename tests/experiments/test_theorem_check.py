from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray as xr

import mae_align as ma
from experiments.harness.data import Split
from experiments.harness.run import execute
from experiments.theorem_check import __main__ as theorem_check
from experiments.theorem_check.__main__ import COLUMNS, Config, Descent, SampledDescent, Setup, cases, main
from experiments.theorem_check.descent import Objective, Pixels, Plan, denoising_share, minimise_exact, supervised_share
from experiments.theorem_check.report import Case, Part, row_of
from mae_align.closed_form.factorize import factorize
from mae_align.corruption import CorruptionMoments
from mae_align.runtime.devices import solve_context
from tests.experiments.cases import refusal, rows_of

TINY = Config(
    ks=(2,),
    lambdas=(0.0, 1.0),
    exact=Descent(starts=2, steps=1500),
    sampled=SampledDescent(starts=1, steps=600, learning_rate=0.01, tolerance=1e-3, batch_size=256),
)


def execute_in(folder: Path) -> None:
    execute("theorem_check", main, dataclasses.replace(TINY, out=str(folder)), Split.load, COLUMNS)


@pytest.fixture(scope="module")
def digits() -> ma.ImageDataset:
    return ma.load_dataset("digits")


@pytest.fixture(scope="module")
def setup(digits) -> Setup:
    moments = ma.Moments.from_arrays(digits.train_images, digits.train_labels)
    return Setup(TINY, digits.train_images, moments, factorize(moments))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of every case; it would end with SystemExit if a check failed."""
    out = tmp_path_factory.mktemp("theorem") / "run"
    execute_in(out)
    return out


def test_closed_forms_hold_for_every_lambda_and_corruption(run, setup):
    table = rows_by_part(run)
    assert [len(table[part]) for part in Part] == [2, 5, 5]
    assert {type(c) for c in theorem_check.corruptions(setup).values()} == {
        ma.PatchMasking,
        ma.FixedCountPatchMasking,
        ma.RandomRatioMasking,
        ma.GaussianNoise,
    }
    for part, limit in ((Part.supervised, 1e-6), (Part.denoising, 1e-6), (Part.sampled, 1e-3)):
        for row in table[part]:
            assert row["passed"] == "True"
            assert -1e-9 <= float(row["excess"]) <= limit
    summary = (run / "summary.txt").read_text()
    assert summary.endswith("PASS: gradient descent finds the closed-form minima and nothing below them.\n")


def rows_by_part(folder: Path) -> dict[Part, list[dict[str, str]]]:
    found = rows_of(folder / "checks.csv")
    return {part: [row for row in found if row["part"] == part.value] for part in Part}


def test_run_leaves_everything_in_its_folder(run):
    names = {path.name for path in run.iterdir()}
    results = {f"{name}.{kind}" for name in ("exact", "sampled") for kind in ("nc", "csv")}
    others = {"excess.png", "excess.pdf", "checks.csv", "config.json", "summary.txt", "points"}
    others |= {"columns.md", "data.json", "run.json"}
    assert names == results | others
    exact = xr.load_dataset(run / "exact.nc", engine="scipy")
    assert dict(exact.excess.sizes) == {"case": 7, "start": 2, "step": len(exact.step)}
    assert (exact.step[0], exact.step[-1]) == (1, TINY.exact.steps)
    # The descent descends: it starts far away.
    assert float(exact.excess[:, :, 0].min()) > 0.1


def test_same_folder_goes_on_and_a_failed_check_is_the_exit_status(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    # A stored case that did not reach the minimum: read again, it fails the run.
    stored = folder / "points" / "case1.npz"
    with np.load(stored) as found:
        short = {name: found[name] for name in found.files}
    short["excess"] += 2e-6
    np.savez(stored, allow_pickle=False, **short)
    (folder / "summary.txt").unlink()
    # Started again, a run that failed is judged again.
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_info:
            execute_in(folder)
        assert exit_info.value.code == 1
        out = capsys.readouterr().out
        assert out.count("FAILED") == 2
        assert "lambda = 1  2" in out.split("FAILED")[0].splitlines()[-1]
        assert out.endswith("FAIL: see the lines marked FAILED in the table above.\n")
    assert [row["passed"] for row in rows_of(folder / "checks.csv")].count("False") == 1


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"excess": np.array([[1.0, 1e-6], [1.0, 0.0]])}, True),
        ({"excess": np.array([[1.0, 1.1e-6], [1.0, 0.0]])}, False),
        ({"excess": np.array([[-1e-9, 0.0], [1.0, 0.0]])}, False),
        ({"excess": np.array([[1.0, np.nan], [1.0, 0.0]])}, False),
        ({"attained": np.array(4.001)}, False),
        ({"sampled_loss": np.array(4.39), "sampled_loss_se": np.array(0.1)}, True),
        ({"sampled_loss": np.array(4.41), "sampled_loss_se": np.array(0.1)}, False),
        ({"sampled_loss": np.array(3.59), "sampled_loss_se": np.array(0.1)}, False),
    ],
)
def test_what_passes(change, passes):
    found = {
        "step": np.array([1, 2]),
        "excess": np.array([[1.0, 1e-9], [1.0, 0.0]]),
        "minimum": np.array(4.0),
        "total": np.array(10.0),
        "attained": np.array(4.0),
    }
    case = Case(Part.denoising, "noise", 2, 1e-6, dict)
    assert row_of(case, found | change)["passed"] == passes


class MisstatedMasking(ma.PatchMasking):
    """Samples fewer masks than its moments say."""

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        return ma.PatchMasking(self.patch_size, self.ratio - 0.05).sample(key, images, fill)


def test_sampler_that_is_not_its_moments_is_caught(setup):
    corruption = MisstatedMasking(3, 0.75)
    few = setup._replace(config=dataclasses.replace(TINY, sampled=dataclasses.replace(TINY.sampled, steps=2)))
    found = theorem_check.check_sampled(few, corruption, 2)
    row = row_of(Case(Part.sampled, "misstated", 2, np.inf, dict), found)
    assert row["standard_errors"] < -10
    assert not row["passed"]


def test_whitened_losses_are_the_plain_expectations(setup, digits):
    """At any network, against images run through it one by one."""
    rng = np.random.default_rng(0)
    problem, x = setup.problem, setup.images.reshape(-1, 64).astype(float)
    xc, yc = x - x.mean(0), np.eye(10)[digits.train_labels]
    yc = yc - yc.mean(0)
    v, w, z = rng.normal(size=(64, 2)) / 50, rng.normal(size=(2, 10)), rng.normal(size=(2, 64))
    floor = np.sum((v @ z - np.eye(64)) ** 2) / 12
    task = np.sum((xc @ v @ w - yc) ** 2) / len(x) + np.sum((v @ w) ** 2) / 12
    reconstruct = np.sum((xc @ v @ z - xc) ** 2) / len(x) + floor
    objective = Objective.supervised(problem, setup.moments.sxy, 0.3)
    network = theorem_check.Network(v, w, z)
    with solve_context():
        assert float(supervised_share(network, objective)) * objective.total == pytest.approx(task + 0.3 * reconstruct)
        clean = Objective.denoising(problem, setup.moments.sxy, CorruptionMoments(problem.sxx, problem.sxx, 1.0))
        assert float(denoising_share(network, clean)) * clean.total == pytest.approx(reconstruct)


def test_descent_is_reproducible_and_its_starts_differ(setup):
    objective = Objective.supervised(setup.problem, setup.moments.sxy, 1.0)
    shares = [minimise_exact(objective, supervised_share, 2, 10, Plan(2, 5, 0.03, seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(shares[0], shares[1])
    assert len(np.unique(np.concatenate([shares[0], shares[2]])[:, 0])) == 4


def test_measurement_noise_has_the_variance_of_the_floor(setup):
    assert setup.problem.pixel_noise == pytest.approx(1 / 12)
    assert Pixels.of(setup.images, setup.problem).noise_width == pytest.approx(1.0)


def test_table_names_every_case_once(setup):
    many = setup._replace(config=dataclasses.replace(TINY, ks=(2, 5)))
    names = [(case.part, case.setting, case.k) for case in cases(many)]
    assert len(names) == len(set(names)) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ks", 3, 65], "--ks 65: give numbers from 1 to 64, the rank of these images"),
        (["--patch-size", 9], "patch 9x9 is larger than the image 8x8"),
        (["--patch-size", 8], "mask ratio 0.75 leaves none of the 1 patches of size 8 visible"),
        (["--mask-ratio", 1], "--mask-ratio 1"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, theorem_check, *arguments)
    assert not list(tmp_path.iterdir())
