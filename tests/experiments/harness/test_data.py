"""The one split: parts that share no image, drawn apart from each other, and what is fitted after a choice."""

from __future__ import annotations

import numpy as np
import pytest

import mae_align as ma
from experiments.harness.config import RunConfig
from experiments.harness.data import Split, check_groups, drawn
from experiments.masking_sweep.__main__ import Config, load
from mae_align.runtime.errors import InputError


def rows_of(images: np.ndarray) -> list[bytes]:
    return sorted(image.tobytes() for image in images)


def test_the_parts_are_the_images_of_the_data_set():
    """All digits differ, so that images stand for their rows."""
    split, data = Split.load(RunConfig()), ma.load_dataset("digits")
    assert rows_of(np.concatenate([split.train_images, split.validation_images])) == rows_of(data.train_images)
    assert rows_of(split.test_images) == rows_of(data.test_images)
    images, labels = split.train_and_validation()
    np.testing.assert_array_equal(images, data.train_images)
    np.testing.assert_array_equal(labels, data.train_labels)
    each = np.bincount(split.validation_labels) / np.bincount(data.train_labels)
    np.testing.assert_allclose(each, 0.2, atol=0.01)


def test_test_images_do_not_depend_on_how_many_train():
    splits = [Split.load(RunConfig(max_train=most, max_test=50)) for most in (None, 100, 500)]
    assert len({split.fingerprint["test"] for split in splits}) == 1
    assert len({split.fingerprint["validation"] for split in splits}) == 1
    assert len({split.fingerprint["train"] for split in splits}) == 3
    assert Split.load(RunConfig(max_test=50, seed=1)).fingerprint["test"] != splits[0].fingerprint["test"]


@pytest.mark.parametrize(("most", "fitted"), [(None, 1438), (5000, 1438), (1151, 1438), (1150, 1150), (100, 100)])
def test_no_more_images_are_fitted_than_asked_for(most, fitted):
    """1,151 training images are left beside 287 for validation."""
    images, labels = Split.load(RunConfig(max_train=most)).refit()
    assert len(images) == len(labels) == fitted


@pytest.mark.parametrize(("held_out", "jitter"), [(True, 0.0), (True, 0.01), (False, 0.0), (False, 0.01)])
@pytest.mark.parametrize(("most", "fitted"), [(None, 1438), (500, 500)])
def test_the_masking_sweep_fits_as_many_as_asked_for(held_out, jitter, most, fitted):
    config = Config(max_train=most, held_out=held_out, jitter=jitter)
    parts = load(config).parts()
    assert parts.train.count == fitted
    if parts.choice is not None:
        assert [part.count for part in parts.choice] == [1151 if most is None else 500, 287]


def test_few_are_drawn_in_order_and_all_where_there_are_no_more():
    rows = np.arange(10, 20)
    some = drawn(rows, 4, np.random.default_rng(0))
    assert len(set(some)) == 4 and (np.diff(some) > 0).all() and np.isin(some, rows).all()
    assert drawn(rows, None, np.random.default_rng(0)) is rows and drawn(rows, 10, np.random.default_rng(0)) is rows


def test_a_group_without_images_is_refused():
    check_groups(40, 359)
    with pytest.raises(InputError, match="--groups 400: 359 test images leave a group empty"):
        check_groups(400, 359)


def test_constant_images_are_refused(tmp_path):
    np.savez(
        tmp_path / "flat.npz",
        train_images=np.ones((20, 4, 4), np.uint8),
        train_labels=np.arange(20) % 2,
        test_images=np.arange(64, dtype=np.uint8).reshape(4, 4, 4),
        test_labels=np.arange(4) % 2,
    )
    with pytest.raises(InputError, match="constant"):
        Split.load(RunConfig(data=f"npz:{tmp_path / 'flat.npz'}"))
