from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge

import mae_align as ma
from mae_align.closed_form.curves import curves_from_targets
from mae_align.closed_form.factorize import factorize
from mae_align.closed_form.held_out import HeldOut, HeldOutCurves, held_out_curves
from mae_align.moments.moments import Moments, group_of
from tests import oracles
from tests.oracles import Sample

FASHION = Path("/usr/share/datasets/fashion-mnist")
REAL = ["digits", *(["fashion-mnist"] if FASHION.is_dir() else [])]


def real_images(name: str) -> Sample:
    """Real images whose classes have very different sizes, jittered as published so that no pixel is constant."""
    if name == "digits":
        sample = oracles.unbalanced_digits()
        images, labels = sample.images.astype(np.float64), sample.labels
    else:
        pixels = gzip.decompress((FASHION / "train-images-idx3-ubyte.gz").read_bytes())
        classes = gzip.decompress((FASHION / "train-labels-idx1-ubyte.gz").read_bytes())
        labels = np.frombuffer(classes, np.uint8, offset=8).astype(int)
        take = np.concatenate([np.flatnonzero(labels == c)[:size] for c, size in enumerate((600, 300, 150, 80, 40))])
        raw = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28, 1)
        # Every second pixel: 196 of them, fewer than the images.
        images, labels = raw[take, ::2, ::2].astype(np.float64), labels[take]
    images += 1e-3 * images.std() * np.random.default_rng(0).normal(size=images.shape)
    return Sample(images, labels, np.eye(labels.max() + 1)[labels])


@pytest.fixture(scope="module")
def moments() -> Moments:
    return Moments.from_arrays(oracles.train().images, oracles.train().labels)


@pytest.fixture(scope="module")
def encoder() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(60, 12))


def held_out_curves_of(moments: Moments, encoder: np.ndarray, unseen: Moments, **options: float) -> HeldOutCurves:
    curves = ma.encoder_curves(moments, encoder, eval_moments=unseen, **options)[1]
    assert curves is not None
    return curves


def held_out_moments(groups: int, sample: Sample | None = None) -> Moments:
    sample = sample or oracles.held_out()
    return Moments.from_arrays(sample.images, sample.labels, num_classes=oracles.CLASSES, groups=groups)


@pytest.mark.parametrize("name", REAL)
def test_alignment_of_unbalanced_real_images_is_the_published_ratio(name):
    sample = real_images(name)
    found = ma.masking_sweep(Moments.from_arrays(sample.images, sample.labels), [4], [0.5], pixel_noise=0.0)
    direct = oracles.stats(sample.x, sample.y)
    v = oracles.solve(direct, sample.images.shape[1:], 4, oracles.bernoulli(0.5)).v
    published = oracles.alignment_from_samples(v, sample.x, sample.y)
    np.testing.assert_allclose(found.alignment.values[0, 0], published, atol=1e-6)
    np.testing.assert_allclose(found.r2.values[0, 0], oracles.r2_of(v, direct), atol=1e-6)
    # The classes are so unbalanced that centring Y in Y^T Y would be a visibly different curve.
    centred = oracles.alignment_from_samples(v, sample.x, sample.y - sample.y.mean(0))
    assert abs(published - centred).max() > 0.01
    assert abs(published - oracles.r2_of(v, direct) / oracles.r2_of(v, direct)[-1]).max() > 0.01


def test_curves_of_an_encoder_are_least_squares_fits_at_every_k(moments, encoder):
    x, y = oracles.train().x, oracles.train().y
    found, outside = ma.encoder_curves(moments, encoder, pixel_noise=0.0)
    for k in range(1, 13):
        model = LinearRegression().fit(x @ encoder[:, :k], y)
        error = ((y - model.predict(x @ encoder[:, :k])) ** 2).sum(1).mean()
        assert found.probe_mse[k - 1] == pytest.approx(error, rel=1e-10)
        assert found.r2[k - 1] == pytest.approx(1 - error / y.var(0).sum(), rel=1e-9)
    full = np.hstack([encoder, np.random.default_rng(6).normal(size=(60, 48))])
    np.testing.assert_allclose(found.alignment, oracles.alignment_from_samples(full, x, y)[:12], atol=1e-10)
    assert outside is None


def test_curves_of_several_float_targets():
    x, rng = oracles.train().x, np.random.default_rng(8)
    y = x[:, :5] * [1.0, 2.0, 0.1, 0.5, 3.0] + rng.normal(size=(400, 5)) + 4.0
    found, _ = ma.encoder_curves(Moments.from_arrays(oracles.train().images, y), np.eye(60)[:, :8], pixel_noise=0.0)
    for k in range(1, 9):
        model = LinearRegression().fit(x[:, :k], y)
        error = ((y - model.predict(x[:, :k])) ** 2).sum()
        assert found.r2[k - 1] == pytest.approx(1 - error / ((y - y.mean(0)) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("groups", [1, 7])
def test_held_out_curves_are_real_predictions(moments, encoder, groups):
    found = held_out_curves_of(moments, encoder, held_out_moments(groups), pixel_noise=0.0)
    direct = oracles.predicted_r2(encoder, oracles.train(), oracles.held_out())
    np.testing.assert_allclose(found.r2, direct, atol=1e-9)
    assert np.isnan(found.se).all() if groups == 1 else (found.se > 0).all()


def test_held_out_curves_with_a_floor_are_ridge_predictions(moments, encoder):
    """A floor f adds f V^T V to the probe's normal equations: ridge on orthonormal directions."""
    floor, fit, test = 0.4, oracles.train(), oracles.held_out()
    v, _ = np.linalg.qr(encoder)
    found = held_out_curves_of(moments, v, held_out_moments(7), pixel_noise=floor)
    total = ((test.y - fit.y.mean(0)) ** 2).sum()
    for k in (1, 4, 12):
        model = Ridge(alpha=floor * len(fit.x)).fit(fit.x @ v[:, :k], fit.y)
        error = ((test.y - model.predict(test.x @ v[:, :k])) ** 2).sum()
        assert found.r2[k - 1] == pytest.approx(1 - error / total, abs=1e-9)


def test_uncentred_moments_have_probes_without_intercept(encoder):
    fit, test = oracles.train(), oracles.held_out()
    raw = [Moments.from_arrays(s.images, s.labels, num_classes=4, center=False, groups=7) for s in (fit, test)]
    inside = ma.encoder_curves(raw[0], encoder, pixel_noise=0.0)[0]
    outside = held_out_curves_of(raw[0], encoder, raw[1], pixel_noise=0.0)
    for k in (1, 5, 12):
        model = LinearRegression(fit_intercept=False).fit(fit.x @ encoder[:, :k], fit.y)
        for curve, sample in ((inside, fit), (outside, test)):
            error = ((sample.y - model.predict(sample.x @ encoder[:, :k])) ** 2).sum()
            assert curve.r2[k - 1] == pytest.approx(1 - error / (sample.y**2).sum(), abs=1e-9)


def test_held_out_parts_are_the_groups_own_moments(moments):
    problem, sample = factorize(moments, pixel_noise=0.0), oracles.held_out()
    held = problem.hold_out(held_out_moments(4))
    whiten = problem.u / np.sqrt(problem.s)
    z, y = (sample.x - problem.mean_x) @ whiten, sample.y - problem.mean_y
    n = len(z)
    np.testing.assert_allclose(held.gram, z.T @ z / n, atol=1e-10)
    np.testing.assert_allclose(held.cross, z.T @ y / n, atol=1e-11)
    assert held.variance == pytest.approx((y**2).sum() / n, rel=1e-12)
    for g in range(4):
        mine = group_of(np.arange(n), 4) == g
        np.testing.assert_allclose(held.group_gram[g], z[mine].T @ z[mine] / n, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(held.group_cross[g], z[mine].T @ y[mine] / n, atol=1e-11)
        assert held.group_variance[g] == pytest.approx((y[mine] ** 2).sum() / n, rel=1e-12)


def per_image_errors(encoder: np.ndarray, k: int, test: Sample) -> tuple[np.ndarray, np.ndarray]:
    fit = oracles.train()
    model = LinearRegression().fit(fit.x @ encoder[:, :k], fit.y)
    errors = ((test.y - model.predict(test.x @ encoder[:, :k])) ** 2).sum(1)
    return errors, ((test.y - fit.y.mean(0)) ** 2).sum(1)


def test_standard_errors_are_the_bootstrap_of_held_out_images(moments, encoder):
    """100 groups estimate a standard deviation to 7%, 2,000 resamples to 1.6%: 25% is over three of both together."""
    test = oracles.draw(9, 3000)
    other = encoder + 0.3 * np.random.default_rng(10).normal(size=(60, 12))
    resample = np.random.default_rng(11).integers(0, 3000, (2000, 3000))
    found = [held_out_curves_of(moments, v, held_out_moments(100, test), pixel_noise=0.0) for v in (encoder, other)]
    paired = ma.paired_se(found[0].influence - found[1].influence)
    for k in (2, 12):
        draws = []
        for v in (encoder, other):
            errors, variances = per_image_errors(v, k, test)
            draws.append(1 - errors[resample].sum(1) / variances[resample].sum(1))
        for curve, draw in zip(found, draws, strict=True):
            assert curve.se[k - 1] / draw.std() == pytest.approx(1.0, abs=0.25)
        difference = (draws[0] - draws[1]).std()
        assert paired[k - 1] / difference == pytest.approx(1.0, abs=0.25)
        # Pairing matters here: independent errors would give another number.
        unpaired = np.hypot(found[0].se[k - 1], found[1].se[k - 1])
        assert abs(unpaired / difference - 1) > 0.27
    np.testing.assert_array_equal(found[0].se, ma.paired_se(found[0].influence))


def test_standard_errors_are_the_spread_over_new_held_out_sets(moments, encoder):
    """40 fresh test sets of 250: their spread is known to 11%, the mean of 40 squared errors of 20 groups to 5%."""
    curves = [held_out_curves_of(moments, encoder, held_out_moments(20, oracles.draw(100 + i, 250))) for i in range(40)]
    spread = np.std([c.r2 for c in curves], axis=0, ddof=1)
    claimed = np.sqrt(np.mean([c.se**2 for c in curves], axis=0))
    np.testing.assert_allclose((claimed / spread)[[1, 5, 11]], 1.0, atol=0.38)


def test_influences_are_centred_and_follow_their_definition():
    """Two groups of the same variance and errors 0.5 +- 0.1: psi = -+ 0.1 over the total."""
    parts, total = np.array([[0.6], [0.4]]), 2.0
    one = np.ones((2, 1, 1))
    curves = held_out_curves(parts.sum(0), parts, HeldOut(one[0], one[0], np.float64(total), one, one, np.ones(2)))
    np.testing.assert_allclose(curves.influence[:, 0], [-0.05, 0.05], atol=1e-15)
    assert curves.r2[0] == 0.5 and curves.se[0] == pytest.approx(np.sqrt(2 / 1 * 2 * 0.05**2))
    np.testing.assert_allclose(ma.paired_se(np.stack([parts, 3 * parts]))[1], 3 * ma.paired_se(parts), rtol=1e-14)
    assert np.isnan(ma.paired_se(parts[:1])).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6))
def test_curves_are_shares_that_grow_to_one(seed, classes):
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, p=rng.dirichlet(np.ones(classes)), size=400)
    labels[:classes] = np.arange(classes)
    moments = Moments.from_arrays(oracles.train().images, labels, num_classes=classes)
    curves, _ = ma.encoder_curves(moments, rng.normal(size=(60, 60)), pixel_noise=0.0)
    for share in (curves.r2, curves.alignment):
        assert share.min() >= 0 and share.max() <= 1 + 1e-12
        assert (np.diff(share) >= -1e-12).all()
    assert curves.alignment[-1] == pytest.approx(1.0, abs=1e-10)
    np.testing.assert_allclose(curves.probe_mse, (1 - curves.r2) * np.trace(moments.syy), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12))
def test_curves_depend_on_the_spans_only(moments, encoder, seed, k):
    rng = np.random.default_rng(seed)
    before, _ = ma.encoder_curves(moments, encoder[:, :k], pixel_noise=0.0)
    mixed, _ = ma.encoder_curves(moments, encoder[:, :k] @ (rng.normal(size=(k, k)) + 4 * np.eye(k)), pixel_noise=0.0)
    upper = np.triu(rng.normal(size=(k, k)), 1) + np.diag(rng.uniform(0.5, 2, k) * rng.choice([-1, 1], k))
    nested, _ = ma.encoder_curves(moments, encoder[:, :k] @ upper, pixel_noise=0.0)
    for name in ("r2", "alignment"):
        assert getattr(mixed, name)[-1] == pytest.approx(getattr(before, name)[-1], abs=1e-10)
        np.testing.assert_allclose(getattr(nested, name), getattr(before, name), atol=1e-10)


def test_targets_weigh_the_alignment_by_their_own_second_moment():
    t = np.array([[0.5, 0.0], [0.0, 0.5]])
    curves = curves_from_targets(t, t, np.eye(2), np.diag([3.0, 1.0]))
    np.testing.assert_allclose(curves.alignment, [0.75, 1.0])
    np.testing.assert_allclose(curves.r2, [0.125, 0.25])
    np.testing.assert_allclose(curves.probe_mse, [1.75, 1.5])
    batched = curves_from_targets(np.stack([t, t[::-1]]), t, np.eye(2), np.diag([3.0, 1.0]))
    np.testing.assert_allclose(batched.alignment, [[0.75, 1.0], [0.25, 1.0]])


@pytest.mark.parametrize(
    "encoder, message",
    [
        (np.ones(60), r"shape \[60\]: give finite numbers \[60, k\]"),
        (np.ones((59, 2)), r"shape \[59, 2\]: give finite numbers \[60, k\]"),
        (np.full((60, 2), np.nan), "give finite numbers"),
        (np.ones((60, 2)), "linearly dependent"),
        (np.zeros((60, 1)), "linearly dependent"),
        (np.random.default_rng(0).normal(size=(60, 61)), "rank"),
    ],
)
def test_bad_encoders_are_refused(moments, encoder, message):
    with pytest.raises(ma.InputError, match=message):
        ma.encoder_curves(moments, encoder)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda x: x.reshape(-1, 5, 6, 2), {}, r"\(5, 6, 2\)"),
        (lambda x: x, {"num_classes": 6}, "held-out targets have 6 columns, training targets 4"),
        (lambda x: x[:3], {"groups": 20}, r"3 held-out samples leave .* empty: give more of them, or fewer groups"),
        (lambda x: np.clip(x * 10, 0, 255).astype(np.uint8), {}, "uint8"),
        (lambda x: x / 2, {"preprocessing": "halved"}, "halved"),
    ],
)
def test_held_out_data_that_does_not_match_is_refused(moments, encoder, change, options, message):
    images = change(oracles.held_out().images)
    labels = oracles.held_out().labels[: len(images)]
    unseen = Moments.from_arrays(images, labels, **({"num_classes": 4} | options))
    with pytest.raises(ma.InputError, match=message):
        ma.encoder_curves(moments, encoder, eval_moments=unseen)


def test_curves_do_not_change_with_the_units_of_the_pixels(moments, encoder):
    fit, test = oracles.train(), oracles.held_out()
    rows = []
    for unit in (1.0, 1e-8, 3e6):
        scaled = [Moments.from_arrays(unit * s.images, s.labels, num_classes=4, groups=7) for s in (fit, test)]
        inside = ma.encoder_curves(scaled[0], encoder, pixel_noise=0.3 * unit**2)[0]
        outside = held_out_curves_of(scaled[0], encoder, scaled[1], pixel_noise=0.3 * unit**2)
        rows.append(np.concatenate([inside.r2, inside.alignment, outside.r2, outside.se]))
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(rows[2], rows[0], rtol=1e-6, atol=1e-8)


def test_held_out_curves_of_an_encoder_that_leaves_the_range_of_a_singular_covariance_are_real_predictions():
    fit, test = oracles.draw(1, 40), oracles.draw(2, 250)  # 40 images of 60 pixels
    encoder = np.random.default_rng(3).normal(size=(60, 12))
    moments = Moments.from_arrays(fit.images, fit.labels, num_classes=oracles.CLASSES)
    unseen = Moments.from_arrays(test.images, test.labels, num_classes=oracles.CLASSES, groups=3)
    curves = ma.encoder_curves(moments, encoder, eval_moments=unseen, pixel_noise=0.0)[1]
    assert curves is not None
    np.testing.assert_allclose(curves.r2, oracles.predicted_r2(encoder, fit, test), atol=1e-9)


def test_held_out_curves_of_a_corruption_on_a_singular_covariance_are_those_of_its_mask():
    fit, test = oracles.draw(1, 40), oracles.draw(2, 250)
    moments = Moments.from_arrays(fit.images, fit.labels, num_classes=oracles.CLASSES)
    unseen = Moments.from_arrays(test.images, test.labels, num_classes=oracles.CLASSES, groups=3)
    options = {"eval_moments": unseen, "pixel_noise": 0.0, "max_k": 20}
    general = ma.corruption_sweep(moments, [ma.PatchMasking(2, 0.6)], **options)
    fast = ma.masking_sweep(moments, [2], [0.6], **options).isel(patch_size=0, mask_ratio=0)
    np.testing.assert_allclose(general.eval_r2[0], fast.eval_r2, atol=1e-7)
    np.testing.assert_allclose(general.eval_r2_se[0], fast.eval_r2_se, atol=1e-5)
