from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

import mae_align as ma
from experiments.harness.paired import paired_difference


def test_interval_is_that_of_the_paired_t_test_over_seeds():
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 50)) < 0.7, rng.random((4, 50)) < 0.5
    found = paired_difference(a, b, 0.9)
    expected = ttest_rel(a.mean(1), b.mean(1)).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(a.mean() - b.mean())
    each = (a.astype(float) - b).mean(0)
    assert found.image_se == pytest.approx(each.std(ddof=1) / np.sqrt(50))


def test_a_difference_is_detected_only_if_seeds_and_images_both_say_so():
    n = 400
    better = np.zeros((3, n), bool)
    better[:, :200], worse = True, np.zeros((3, n), bool)
    for seed in range(3):
        worse[seed, : 100 + seed] = True
    assert paired_difference(better, worse).detected
    # The seeds agree, but on two images only.
    one = worse.copy()
    one[:, 300:302] = True
    found = paired_difference(one, worse)
    assert found.low > 0 and not found.detected
    # Many images, but the seeds disagree.
    split = worse.copy()
    split[0, 150:390] = True
    found = paired_difference(split, worse)
    assert abs(found.mean) > 2 * found.image_se and not found.detected
    single = paired_difference(better[:1], worse[:1])
    assert np.isnan(single.low) and not single.detected


def test_results_that_do_not_pair_are_refused():
    with pytest.raises(ma.InputError, match="the same"):
        paired_difference(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ma.InputError, match="level"):
        paired_difference(np.ones((2, 3)), np.ones((2, 3)), 1.0)
