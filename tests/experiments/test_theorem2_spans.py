"""Sample spaces of features against least squares and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

import mae_align as ma
from experiments.theorem2_check.spans import explained_shares, sample_basis, span_angles
from mae_align.closed_form.compare import principal_angles


def test_sample_basis_is_what_least_squares_with_an_intercept_can_reach():
    rng = np.random.default_rng(0)
    # Dependent, constant and badly scaled columns about a large mean.
    raw = rng.normal(size=(60, 3)) * [1.0, 1e-3, 50.0]
    z = np.column_stack([raw + 100.0, raw[:, 0] - 2 * raw[:, 2], np.full(60, 7.0)])
    basis = sample_basis(z)
    assert basis.shape == (60, 3) and sample_basis(z.astype(np.float32)).shape == (60, 3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(basis.sum(0), 0.0, atol=1e-8)
    y = np.column_stack([rng.normal(size=60) + raw[:, 0], raw @ [1.0, 2.0, 3.0], np.full(60, 0.1)])
    design = np.column_stack([np.ones(60), raw])
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    expected = 1 - ((y - fitted) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0).clip(1e-20)
    shares = explained_shares(basis, y)
    np.testing.assert_allclose(shares[:2], expected[:2], rtol=1e-9)
    assert np.isnan(shares[2]) and 0.1 < shares[0] < 0.9
    assert sample_basis(np.ones((5, 2))).shape == (5, 0)
    np.testing.assert_array_equal(explained_shares(np.empty((60, 0)), y[:, :1]), [0.0])


def test_span_angles_of_unequal_dimensions():
    rng = np.random.default_rng(1)
    a, b = (np.linalg.qr(rng.normal(size=(30, k)))[0] for k in (3, 5))
    np.testing.assert_allclose(span_angles(a, b)[:3], scipy.linalg.subspace_angles(a, b)[::-1], atol=1e-10)
    np.testing.assert_allclose(span_angles(a, b)[3:], np.pi / 2)
    np.testing.assert_array_equal(span_angles(a, b), span_angles(b, a))
    np.testing.assert_array_equal(span_angles(a, b[:, :3]), principal_angles(a, b[:, :3]))
    np.testing.assert_allclose(span_angles(b[:, :2], b), [0, 0, *[np.pi / 2] * 3], atol=1e-12)
    np.testing.assert_allclose(span_angles(np.empty((30, 0)), a), np.pi / 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sample_basis(np.ones(3)),
        lambda: sample_basis(np.array([[np.nan], [1.0]])),
        lambda: explained_shares(np.eye(3)[:, :1], np.ones((4, 1))),
        lambda: span_angles(np.eye(3)[:, :1], np.eye(4)[:, :1]),
    ],
)
def test_sample_spaces_that_do_not_fit_are_refused(call):
    with pytest.raises(ma.InputError, match="give"):
        call()
