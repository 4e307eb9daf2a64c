from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

from mae_align import InputError, Moments, PatchMasking
from mae_align.closed_form.predictions import closed_form_row
from mae_align.metrics import (
    Outputs,
    feature_r2,
    probe_row,
    rankme,
    reconstruction_errors,
    report_row,
    report_table,
)
from mae_align.moments import principal
from mae_align.probes import ridge_probe


def images(n=120, seed=0, shape=(6, 6, 1)):
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(7).normal(size=(4, np.prod(shape)))
    return (128 + 30 * (rng.normal(size=(n, 4)) @ base) + 9 * rng.normal(size=(n, np.prod(shape)))).reshape(n, *shape)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.floats(-6, 6), st.integers(0, 99))
def test_rankme_is_the_entropy_of_singular_values(n, k, log_scale, seed):
    z = 10.0**log_scale * np.random.default_rng(seed).normal(size=(n, k)).astype(np.float32)
    s = np.linalg.svd(z.astype(np.float64), compute_uv=False)
    p = s / s.sum()
    assert rankme(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert 1 - 1e-9 <= rankme(z) <= min(n, k) + 1e-9
    assert rankme(3.0 * z[::-1]) == pytest.approx(rankme(z), rel=1e-6)


def test_rankme_of_known_features():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(50, 6)))[0]
    assert rankme(q) == pytest.approx(6.0)
    assert rankme(q[:, :2] @ rng.normal(size=(2, 6))) < 2.0 + 1e-6
    # A small direction counts for what it is: a covariance in float64 would lose it below 1e-8.
    s = np.array([1.0, 1e-10])
    p = s / s.sum()
    assert rankme(q[:, :2] * s) - 1 == pytest.approx(np.exp(-(p * np.log(p)).sum()) - 1, rel=1e-3)
    assert math.isnan(rankme(np.zeros((5, 3))))
    for bad in (np.ones(3), np.ones((0, 3)), np.array([[1.0, np.nan]])):
        with pytest.raises(InputError, match="features"):
            rankme(bad)


def test_feature_r2_is_least_squares():
    rng = np.random.default_rng(0)
    z, z_test = rng.normal(size=(80, 5)), rng.normal(size=(60, 5))
    w = rng.normal(size=(5, 2))
    y, y_test = (a @ w + rng.normal(size=(len(a), 2)) for a in (z, z_test))
    z, z_test = (np.c_[a, np.ones(len(a)), a[:, 0]] for a in (z, z_test))  # a constant and a copy
    fit = LinearRegression().fit(z, y)
    found = feature_r2(z, y, z_test, y_test)
    spread = ((y - y.mean(0)) ** 2).sum(), ((y_test - y.mean(0)) ** 2).sum()
    assert found.r2 == pytest.approx(1 - ((y - fit.predict(z)) ** 2).sum() / spread[0])
    assert found.eval_r2 == pytest.approx(1 - ((y_test - fit.predict(z_test)) ** 2).sum() / spread[1])
    assert math.isnan(feature_r2(z, y).eval_r2)
    labels = (y[:, 0] > 0).astype(int)
    onehot = np.eye(2)[labels]
    assert feature_r2(z, labels).r2 == pytest.approx(feature_r2(z, onehot).r2)
    # A held-out part that lacks the last class.
    some = feature_r2(z, labels, z_test, np.zeros(60, int))
    assert some.eval_r2 == pytest.approx(feature_r2(z, onehot, z_test, np.eye(2)[np.zeros(60, int)]).eval_r2)
    with pytest.raises(InputError, match="neither"):
        feature_r2(z, y, z_test)


def test_errors_in_subspaces_are_those_of_projections():
    x, test = images(), images(50, seed=1)
    moments = Moments.from_arrays(x)
    rng = np.random.default_rng(3)
    x_hat = test + rng.normal(size=test.shape) * 5
    found = reconstruction_errors(test, x_hat, moments, share=0.8, num_bands=3)
    flat = x.reshape(120, -1)
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh(np.cov(flat.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    count = int(np.argmax(np.cumsum(values) / values.sum() >= 0.8)) + 1
    e, x0 = (x_hat - test).reshape(50, -1), test.reshape(50, -1) - mean
    assert found.top_count == count and 1 < count < 36
    for value, basis in ((found.top, vectors[:, :count]), (found.bottom, vectors[:, count:]), (found.total, vectors)):
        assert value == pytest.approx(((e @ basis) ** 2).sum() / ((x0 @ basis) ** 2).sum())
    assert found.mse == pytest.approx((e**2).mean())
    # Noise is little of the large components and much of the small ones.
    assert 10 * found.top < found.bottom and found.bands.shape == (3,)
    power = [np.abs(np.fft.fft2(a.reshape(50, 6, 6))) ** 2 for a in (e, x0)]
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(6), np.fft.fftfreq(6), indexing="ij"))
    low = radius < np.sqrt(0.5) / 3
    assert found.bands[0] == pytest.approx(power[0][:, low].sum() / power[1][:, low].sum(), rel=1e-5)
    perfect = reconstruction_errors(test, test, moments, num_bands=2)
    assert perfect.mse == perfect.total == perfect.top == perfect.bottom == 0.0 and (perfect.bands == 0).all()


def test_networks_share_one_eigendecomposition(monkeypatch):
    x, test = images(), images(50, seed=1)
    moments, solved, solve = Moments.from_arrays(x), [], principal.principal_components
    monkeypatch.setattr(principal, "principal_components", lambda m: solved.append(1) or solve(m))
    alone = reconstruction_errors(test, test * 0.9, moments)
    assert len(solved) == 1
    shared = principal.varying_components(moments)
    assert len(solved) == 2
    again = reconstruction_errors(test, test * 0.9, moments, components=shared)
    assert len(solved) == 2 and again[:4] == alone[:4]


def test_errors_of_integer_images_and_dead_pixels():
    x = np.clip(images(), 0, 255).astype(np.uint8)
    x[:, 0] = 9
    moments = Moments.from_arrays(x)
    mean = np.broadcast_to(moments.mean_x.reshape(6, 6, 1), x.shape)
    found = reconstruction_errors(x, mean.astype(np.float32), moments)
    np.testing.assert_allclose([found.total, found.top, found.bottom], 1.0, rtol=1e-5)
    one = np.zeros((4, 2, 2, 1))
    one[:, 0, 0, 0] = [0, 1, 2, 3]
    found = reconstruction_errors(one, one, Moments.from_arrays(one), num_bands=2)
    assert found.top_count == 1 and math.isnan(found.bottom) and found.top == 0.0
    with pytest.raises(InputError, match="share"):
        reconstruction_errors(x, mean, moments, share=1.0)
    with pytest.raises(InputError, match="num_bands"):
        reconstruction_errors(x, mean, moments, num_bands=0)
    with pytest.raises(InputError, match="one reconstruction per image"):
        reconstruction_errors(x, mean[:5], moments)


def test_one_row_holds_everything():
    x, test = images(), images(60, seed=1)
    rng = np.random.default_rng(0)
    encoder = rng.normal(size=(36, 7))
    z, z_test = (a.reshape(len(a), -1) @ encoder for a in (x, test))
    y, y_test = np.arange(120) % 3, np.arange(60) % 3
    moments, held = Moments.from_arrays(x, y), Moments.from_arrays(test, y_test, groups=4)
    probe = ridge_probe(z, y, z_test, y_test, features="encoder")
    arguments = {
        "moments": moments,
        "eval_moments": held,
        "corruption": PatchMasking(2, 0.5),
        "targets": y,
        "eval_images": test,
        "eval_targets": y_test,
        "ks": (2, 99),
        "num_bands": 4,
    }
    outputs = Outputs(z, z_test, test * 0.9)
    shared = principal.varying_components(moments)
    row = report_row({"model": "random", "seed": 3}, outputs, probes={"ridge": probe}, components=shared, **arguments)
    assert list(row)[:2] == ["model", "seed"] and row["latent"] == 7 and row["rankme"] == rankme(z_test)
    own = feature_r2(z, y, z_test, y_test)
    assert (row["feature_r2"], row["feature_eval_r2"]) == own
    closed = closed_form_row(moments, PatchMasking(2, 0.5), held, (2, 99))
    assert closed.items() <= row.items() and row["closed_clipped"] == "99"
    error = reconstruction_errors(test, test * 0.9, moments, num_bands=4)
    assert row["reconstruction_error"] == error.total and row["reconstruction_error_bottom"] == error.bottom
    assert [row[f"reconstruction_error_band{i}"] for i in range(4)] == error.bands.tolist()
    assert row["ridge_accuracy_test"] == probe.accuracy_test and row["ridge_r2_train"] == probe.r2_train
    assert row["ridge_name"] == "ridge" and row["ridge_features"] == "encoder" and row["ridge_n_val"] == 12
    assert row["ridge_strength"] == probe.strength
    assert all(isinstance(cell, int | float | str) for cell in row.values())
    with pytest.raises(InputError, match="'rankme'"):
        report_row({"rankme": 1}, outputs, probes={}, **arguments)

    table = report_table([row, {**row, "seed": 4, "extra": 0.5}, {"model": "other", "seed": 5}])
    assert table.seed.dtype == np.int64 and table.seed.values.tolist() == [3, 4, 5]
    assert table.model.values.tolist() == ["random", "random", "other"]
    assert np.isnan(table.extra.values[[0, 2]]).all() and table.closed_clipped.values.tolist() == ["99", "99", ""]
    text = table.to_dataframe().to_csv(index=False)
    assert text.splitlines()[0].startswith("model,seed,latent") and len(text.splitlines()) == 4
    with pytest.raises(InputError, match="no rows"):
        report_table([])


def test_probe_cells_are_plain():
    z = np.random.default_rng(0).normal(size=(60, 3))
    row = probe_row(ridge_probe(z, z[:, 0], z, z[:, 0]), "linear")
    assert row["linear_r2_test"] > 0.99 and math.isnan(float(row["linear_accuracy_test"]))  # pyright: ignore
    assert row["linear_selected_by"] == "r2" and all(key.startswith("linear_") for key in row)
