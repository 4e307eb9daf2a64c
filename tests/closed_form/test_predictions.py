from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg

from mae_align import FixedCountPatchMasking, InputError, Moments, PatchMasking, denoising_autoencoder
from mae_align.closed_form.curves import encoder_curves
from mae_align.closed_form.predictions import closed_form_row, closed_form_rows, denoising_encoder, log_mean_weights
from mae_align.corruption import GaussianNoise
from mae_align.data.patches import patch_labels


def data(n=300, seed=0, q=3, shape=(4, 4, 1)):
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n, 5))
    x = factors @ np.random.default_rng(9).normal(size=(5, np.prod(shape))) + 0.5 * rng.normal(size=(n, np.prod(shape)))
    y = np.tanh(factors[:, :q]) + 0.3 * rng.normal(size=(n, q))
    return (x + np.arange(np.prod(shape))).reshape(-1, *shape), y


def log_mean(curve: np.ndarray) -> float:
    """Mean over log k by a fine grid."""
    grid = np.linspace(0.0, np.log(len(curve)), 200_001)
    return float(np.interp(grid, np.log(np.arange(1, len(curve) + 1)), curve).mean())


TRAIN, TARGETS = data()
TEST, TEST_TARGETS = data(200, seed=1)
MOMENTS = Moments.from_arrays(TRAIN, TARGETS)
HELD = Moments.from_arrays(TEST, TEST_TARGETS, groups=5)


def test_weights_are_the_mean_over_log_k():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 30, 200):
        curve = rng.normal(size=count)
        assert log_mean_weights(count).sum() == pytest.approx(1.0) and (log_mean_weights(count) >= 0).all()
        assert curve @ log_mean_weights(count) == pytest.approx(log_mean(curve) if count > 1 else curve[0], abs=2e-4)
    # 1 to 10 weighs as much as 10 to 100.
    w = log_mean_weights(100)
    assert w[:9].sum() + w[9] / 2 == pytest.approx(0.5, abs=0.01)


def by_definition(ratio: float, k: int) -> tuple[float, float]:
    """r2 in-sample and held-out: Theorem 3 by SciPy, the probe by least squares on the features themselves."""
    x, y = TRAIN.reshape(len(TRAIN), -1), TARGETS
    s = np.cov(x.T, bias=True)
    label = patch_labels((4, 4, 1), 2)
    gram = np.where(label[:, None] == label, s, (1 - ratio) * s)
    v = scipy.linalg.eigh(s @ s, gram)[1][:, ::-1][:, :k]
    parts = [((a.reshape(len(a), -1) - x.mean(0)) @ v, b - y.mean(0)) for a, b in ((TRAIN, y), (TEST, TEST_TARGETS))]
    w = np.linalg.lstsq(*parts[0])[0]
    inside, outside = (1 - ((b - a @ w) ** 2).sum() / (b**2).sum() for a, b in parts)
    return inside, outside


@pytest.mark.parametrize("ratio", [0.0, 0.6])
def test_a_row_is_theorem_3_and_a_probe(ratio):
    row = closed_form_row(MOMENTS, PatchMasking(2, ratio), HELD, (1, 4, 40), pixel_noise=0.0)
    assert row["closed_rank"] == 16 and row["closed_clipped"] == "40"
    inside, outside = np.array([by_definition(ratio, k) for k in range(1, 17)]).T
    for name, curve in (("r2", inside), ("eval_r2", outside)):
        for k in (1, 4, 40):
            assert row[f"closed_{name}_k{k}"] == pytest.approx(curve[min(k, 16) - 1], abs=1e-9)
        assert row[f"closed_{name}_logmean"] == pytest.approx(log_mean(curve), abs=1e-4)
    assert 0 < float(row["closed_eval_r2_se_logmean"]) < 0.2 and row["closed_alignment_k40"] == pytest.approx(1.0)


def test_no_corruption_is_pca_and_a_count_is_a_mask():
    none = closed_form_row(MOMENTS, None, HELD, (3,))
    pca = closed_form_row(MOMENTS, PatchMasking(2, 0.0), HELD, (3,))
    assert none["closed_eval_r2_k3"] == pytest.approx(pca["closed_eval_r2_k3"], abs=1e-9)
    noise = closed_form_row(MOMENTS, GaussianNoise(2.0), HELD, (3,))
    assert noise["closed_eval_r2_k3"] == pytest.approx(none["closed_eval_r2_k3"], abs=1e-9)
    count = closed_form_row(MOMENTS, FixedCountPatchMasking(2, 1), HELD, (3,))
    p_eff = closed_form_row(MOMENTS, PatchMasking(2, 1.0), HELD, (3,))
    assert count["closed_eval_r2_k3"] == pytest.approx(p_eff["closed_eval_r2_k3"], abs=1e-9)
    assert abs(float(count["closed_eval_r2_k3"]) - float(none["closed_eval_r2_k3"])) > 1e-4


def test_many_tasks_are_those_of_each_alone():
    columns = {"a": slice(0, 1), "b": slice(1, 3)}
    rows = closed_form_rows(MOMENTS, PatchMasking(2, 0.5), columns, HELD, (2, 8))
    for name, c in columns.items():
        alone = closed_form_row(
            Moments.from_arrays(TRAIN, TARGETS[:, c]),
            PatchMasking(2, 0.5),
            Moments.from_arrays(TEST, TEST_TARGETS[:, c], groups=5),
            (2, 8),
        )
        assert rows[name].keys() == alone.keys()
        for key, value in alone.items():
            if key != "closed_clipped":
                assert rows[name][key] == pytest.approx(value, rel=1e-6), key


def test_an_encoder_trained_on_all_images_serves_a_task_of_some():
    encoder = denoising_encoder(MOMENTS, PatchMasking(2, 0.7))
    auto = denoising_autoencoder(MOMENTS, PatchMasking(2, 0.7), 16)
    some = TRAIN[:, 0, 0, 0] > TRAIN[:, 0, 0, 0].mean()
    part = Moments.from_arrays(TRAIN[some], TARGETS[some])
    row = closed_form_row(part, None, HELD, (2, 8), encoder=encoder)
    inside, outside = encoder_curves(part, auto.encoder, eval_moments=HELD)
    assert outside is not None
    for k in (2, 8):
        assert row[f"closed_r2_k{k}"] == pytest.approx(inside.r2[k - 1])
        assert row[f"closed_eval_r2_k{k}"] == pytest.approx(outside.r2[k - 1])
        assert row[f"closed_eval_r2_se_k{k}"] == pytest.approx(outside.se[k - 1], rel=1e-4)
        assert row[f"closed_alignment_k{k}"] == pytest.approx(inside.alignment[k - 1])
    # The standard error of a mean is not the mean of standard errors, but no larger.
    assert 0 < float(row["closed_eval_r2_se_logmean"]) <= outside.se @ log_mean_weights(16)
    own = closed_form_row(part, PatchMasking(2, 0.7), HELD, (2, 8))
    assert abs(float(own["closed_eval_r2_k2"]) - float(row["closed_eval_r2_k2"])) > 1e-6
    # Fewer images than pixels: the curve ends at their rank.
    few = Moments.from_arrays(TRAIN[:9], TARGETS[:9])
    short = closed_form_row(few, None, HELD, (2, 12), encoder=encoder, pixel_noise=0.0)
    assert short["closed_rank"] == 8 and short["closed_clipped"] == "12"
    assert short["closed_r2_k12"] == pytest.approx(1.0) and math.isfinite(float(short["closed_eval_r2_k12"]))


def test_bad_input_is_refused():
    for call, match in (
        (lambda: closed_form_row(MOMENTS, None, HELD, ()), "ks"),
        (lambda: closed_form_row(MOMENTS, None, HELD, (0,)), "ks"),
        (lambda: closed_form_row(Moments.from_arrays(TRAIN), None), "without targets"),
        (lambda: closed_form_row(MOMENTS, PatchMasking(9, 0.5)), "larger than the image"),
        (lambda: closed_form_row(MOMENTS, None, Moments.from_arrays(TEST, TEST_TARGETS[:, :1])), "columns"),
        (lambda: closed_form_row(MOMENTS, None, encoder=np.eye(3)), "encoder"),
        (lambda: closed_form_rows(MOMENTS, None, {}), "columns"),
        (lambda: closed_form_rows(MOMENTS, None, {"a": slice(3, 4)}), "columns"),
        (lambda: denoising_encoder(MOMENTS, PatchMasking(9, 0.5)), "larger than the image"),
    ):
        with pytest.raises(InputError, match=match):
            call()
