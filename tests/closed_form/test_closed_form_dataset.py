from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
import xarray as xr

import mae_align as ma
from mae_align.moments.moments import Moments
from tests import oracles
from tests.oracles import SHAPE


@pytest.fixture(scope="module")
def fit() -> Moments:
    return Moments.from_arrays(oracles.train().images, oracles.train().labels, preprocessing="drawn")


@pytest.fixture(scope="module")
def results(fit) -> dict[str, xr.Dataset]:
    sample = oracles.held_out()
    unseen = Moments.from_arrays(sample.images, sample.labels, num_classes=4, groups=6, preprocessing="drawn")
    return {
        "masking": ma.masking_sweep(fit, [2, (3, 4)], [0.0, 0.5, 0.9], eval_moments=unseen),
        "plain": ma.masking_sweep(fit, [1, 2], [0.0, 0.5], pixel_noise=0.0),
        "counts": ma.masking_sweep(fit, [2, (3, 4)], [0.3, 0.8], masking=ma.FixedCountPatchMasking),
        "joint": ma.sweep(
            fit, patch_sizes=[2], mask_ratios=[0.5], noise_levels=[0.0, 1.0], lambdas=[0.1, math.inf], max_k=60
        ),
        "lambda": ma.lambda_sweep(fit, [0.0, 0.5, math.inf]),
        "gaussian": ma.gaussian_sweep(fit, [0.0, 2.0]),
    }


NAMES = ["masking", "plain", "counts", "joint", "lambda", "gaussian"]


@pytest.mark.parametrize("name", NAMES)
def test_every_array_is_labelled_numpy_float64(results, name):
    data = results[name]
    assert len(data.data_vars) >= 7
    for variable, array in data.data_vars.items():
        assert type(array.data) is np.ndarray and array.dtype == np.float64, variable
        assert array.attrs["long_name"] != variable and array.attrs["units"], variable
    for coordinate, array in data.coords.items():
        assert type(array.data) is np.ndarray, coordinate
    assert data.k.values.tolist() == list(range(1, 61))


@pytest.mark.parametrize("name", NAMES)
def test_results_survive_netcdf(results, name, tmp_path):
    results[name].to_netcdf(tmp_path / "result.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "result.nc", engine="scipy") as stored:
        xr.testing.assert_identical(stored.load(), results[name])
    table = results[name].r2.to_dataframe()
    assert len(table) == results[name].r2.size and table.r2.notna().all()


def test_results_record_how_they_were_made(results, fit):
    held_out, plain = results["masking"].attrs, results["plain"].attrs
    floor = 1e-9 * np.linalg.eigvalsh(fit.sxx)[-1]
    expected = {
        "mae_align_version": ma.__version__,
        "jax_version": jax.__version__,
        "dtype": "float64",
        "rank": 60,
        "rtol": 60 * np.finfo(float).eps,
        "num_train": 400,
        "num_eval": 250,
        "num_groups": 6,
        "image_shape": "[6, 5, 2]",
        "pixel_dtype": "float64",
        "centered": "True",
        "preprocessing": "drawn",
        "fill": "mean image",
        "masking": "PatchMasking",
        "platform": "cpu",
    }
    assert {key: held_out[key] for key in expected} == expected
    assert held_out["pixel_noise"] == pytest.approx(floor, rel=1e-10) and plain["pixel_noise"] == 0.0
    assert plain["trace_sxx"] == pytest.approx(oracles.train().x.var(0).sum(), rel=1e-12)
    assert held_out["trace_sxx"] == pytest.approx(plain["trace_sxx"] + 60 * floor, rel=1e-13)
    assert plain["trace_syy"] == pytest.approx(oracles.train().y.var(0).sum(), rel=1e-12)
    assert results["counts"].attrs["masking"] == "FixedCountPatchMasking"
    assert (plain["num_eval"], plain["num_groups"]) == (0, 0)
    assert json.loads(json.dumps(held_out)) == held_out
    raw = Moments.from_arrays(oracles.train().images, oracles.train().labels, center=False)
    uncentred = ma.masking_sweep(raw, [2], [0.5]).attrs
    assert (uncentred["centered"], uncentred["fill"]) == ("False", "zero")


def test_coordinates_say_what_each_cell_is(results, fit):
    masking, counts, joint = results["masking"], results["counts"], results["joint"]
    assert masking.patch_size.values.tolist() == ["2x2", "3x4"]
    assert results["plain"].patch_size.values.tolist() == [1, 2]
    assert masking.num_patches.values.tolist() == [9, 4] and results["plain"].num_patches.values.tolist() == [30, 9]
    np.testing.assert_allclose(masking.p_eff, [[0, 0.5, 0.9]] * 2)
    np.testing.assert_allclose(masking.realized_ratio, [[0, 0.5, 0.9]] * 2)
    # 9 patches: 6 and 2 visible; 4 patches: 3 and 1.
    np.testing.assert_allclose(counts.realized_ratio, [[1 / 3, 7 / 9], [1 / 4, 3 / 4]])
    np.testing.assert_allclose(counts.p_eff, [[1 - 5 / 8, 1 - 1 / 8], [1 - 2 / 3, 1.0]])
    assert joint.noise_level.values.tolist() == [0.0, 1.0] and joint.lam.values.tolist() == [0.1, math.inf]
    # lambda has units; its relative size has none.
    relative = 0.1 * joint.attrs["trace_sxx"] / joint.attrs["trace_syy"]
    np.testing.assert_allclose(joint.lam_relative, [relative, math.inf])
    assert results["lambda"].lam_relative.dims == ("lam",) and float(results["lambda"].lam_relative[0]) == 0.0
    assert masking.condition.dims == ("patch_size", "mask_ratio")
    assert (masking.condition.sel(mask_ratio=0.0) == 1).all() and (masking.condition.sel(mask_ratio=0.9) > 1.5).all()
    assert fit.image_shape == SHAPE


def test_dimensions_are_those_of_the_question(results):
    dims = {name: data.r2.dims for name, data in results.items()}
    assert dims["masking"] == dims["plain"] == ("patch_size", "mask_ratio", "k")
    assert dims["joint"] == ("patch_size", "noise_level", "mask_ratio", "lam", "k")
    assert (dims["lambda"], dims["gaussian"]) == (("lam", "k"), ("noise_level", "k"))
    masking, joint = results["masking"], results["joint"]
    assert masking.eval_influence.dims == ("patch_size", "mask_ratio", "group", "k")
    assert masking.je_r2.dims == masking.je_eval_r2_se.dims == ("patch_size", "k")
    assert joint.je_r2.dims == ("patch_size", "noise_level", "mask_ratio", "k")
    assert not [v for v in (*results["lambda"], *results["gaussian"]) if str(v).startswith("eval")]
    assert not [v for v in results["lambda"] if str(v).startswith("je_")]  # no mask, no views
    assert masking.r2.sel(patch_size="3x4", mask_ratio=0.9, k=5).ndim == 0


def test_percent_is_the_score_of_the_published_figures(results):
    for data in (results["masking"], results["joint"]):
        np.testing.assert_allclose(data.alignment_percent, 100 * np.sqrt(data.alignment), rtol=1e-14)
        assert data.alignment_percent.attrs["units"] == "%"


def test_standard_errors_follow_from_the_recorded_influences(results):
    data = results["masking"]
    for prefix in ("", "je_"):
        influence = data[f"{prefix}eval_influence"]
        error = np.sqrt(6 / 5 * (influence**2).sum("group"))
        np.testing.assert_allclose(data[f"{prefix}eval_r2_se"], error, rtol=1e-12)
        assert float(abs(influence.sum("group")).max()) < 1e-6
    # Of a difference between two masks, on the same held-out images.
    change = (data.eval_influence.sel(mask_ratio=0.9) - data.eval_influence.sel(mask_ratio=0.0)).transpose(..., "k")
    assert np.isfinite(ma.paired_se(change.values)).all() and change.dims[-2:] == ("group", "k")


def test_joint_embedding_is_blank_where_views_are_equal(fit):
    found = ma.sweep(fit, patch_sizes=[2, (6, 5)], mask_ratios=[0.0, 0.5], noise_levels=[0.0, 1.0])
    blank = found.je_r2.isnull().all("k")
    assert blank.sel(noise_level=0.0).values.tolist() == [[True, False], [True, True]]
    assert not blank.sel(noise_level=1.0).any()
    alone = ma.masking_sweep(fit, [2, (6, 5)], [0.0])
    assert alone.je_r2.isnull().all() and alone.r2.notnull().all()
