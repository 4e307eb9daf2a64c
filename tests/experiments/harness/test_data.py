"""The one split: parts that share no image, drawn apart from each other, and what is fitted after a choice."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import mae_align as ma
from experiments.harness.config import RunConfig
from experiments.harness.data import Split, check_groups, drawn
from experiments.masking_sweep.__main__ import Config, load
from mae_align.data import select_classes
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
    assert len({split.fingerprint["train"] for split in splits}) == 3
    assert Split.load(RunConfig(max_test=50, seed=1)).fingerprint["test"] != splits[0].fingerprint["test"]


@pytest.mark.parametrize(
    ("train", "validation", "count"),
    [(None, None, 287), (None, 50, 50), (None, 5000, 287), (500, None, 287), (100, None, 100), (100, 200, 200)],
)
def test_no_more_images_choose_than_are_fitted(train, validation, count):
    """Unless their number is given; which are drawn does not depend on how many train."""
    split, every = Split.load(RunConfig(max_train=train, max_validation=validation)), Split.load(RunConfig())
    assert len(split.validation_labels) == len(split.validation_images) == count
    pairs = zip(every.validation_images, every.validation_labels, strict=True)
    rows = {image.tobytes(): label for image, label in pairs}
    chosen = zip(split.validation_images, split.validation_labels, strict=True)
    assert all(rows[image.tobytes()] == label for image, label in chosen)
    images, labels = split.train_and_validation()
    assert len(images) == len(labels) == len(split.train_labels) + count
    np.testing.assert_array_equal(images[split.is_validation], split.validation_images)
    same = Split.load(RunConfig(max_train=300, max_validation=count))
    assert same.fingerprint["validation"] == split.fingerprint["validation"]


@pytest.mark.parametrize(("most", "fitted"), [(None, 1438), (5000, 1151), (1151, 1151), (1150, 1150), (100, 100)])
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


@pytest.fixture
def with_validation(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 60), ("val", 25), ("test", 30)):
        arrays |= {f"{part}_images": rng.integers(0, 256, (n, 4, 4), dtype=np.uint8)}
        arrays |= {f"{part}_labels": (np.arange(n) % 3)[:, None].astype(np.uint8)}  # as MedMNIST writes them
    np.savez(tmp_path / "med.npz", **arrays)
    return f"npz:{tmp_path / 'med.npz'}", arrays


def test_validation_images_of_its_own_are_kept_to(with_validation):
    label, arrays = with_validation
    split = Split.load(RunConfig(data=label))
    for part, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        np.testing.assert_array_equal(getattr(split, f"{name}_images")[..., 0], arrays[f"{part}_images"])
        np.testing.assert_array_equal(getattr(split, f"{name}_labels"), arrays[f"{part}_labels"][:, 0])
    images, labels = split.refit()
    np.testing.assert_array_equal(images[..., 0], np.concatenate([arrays["train_images"], arrays["val_images"]]))
    np.testing.assert_array_equal(labels, np.concatenate([arrays["train_labels"], arrays["val_labels"]])[:, 0])
    assert split.is_validation.tolist() == [False] * 60 + [True] * 25
    few = Split.load(RunConfig(data=label, max_train=20, image_size=2))
    assert len(few.train_labels) == 20 and few.validation_images.shape == (20, 2, 2, 1)
    assert few.is_validation.tolist() == [False] * 20 + [True] * 20
    few = Split.load(RunConfig(data=label, max_validation=7))
    assert len(few.train_labels) == 60 and few.is_validation.tolist() == [False] * 60 + [True] * 7
    parts = load(Config(data=label, groups=2)).parts()
    assert (parts.train.count, [part.count for part in parts.choice or ()]) == (85, [60, 25])


def test_every_part_is_resized_and_selected(with_validation):
    data = ma.load_dataset(with_validation[0], image_size=3)
    assert repr(data).startswith("ImageDataset('med', train 60, test 30, validation 25, image 3x3x1 uint8, 3 classes")
    chosen = select_classes(data, [2, 0])
    assert chosen.validation_labels is not None and np.bincount(chosen.validation_labels).tolist() == [8, 9]


def test_a_class_with_one_training_image_is_trained_on_and_said(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (61, 4, 4), dtype=np.uint8), np.append(np.arange(60) % 2, 2)
    np.savez(tmp_path / "rare.npz", x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])
    split = Split.load(RunConfig(data=f"npz:{tmp_path / 'rare.npz'}"))
    assert 2 in split.train_labels and 2 not in split.validation_labels
    assert split.notes == ("there is no validation image of 2", "there is no test image of 2")
    assert "Read so: there is no validation image of 2; there is no test image of 2." in split.description


@pytest.fixture
def with_targets(tmp_path):
    """Numbers of very different units, and one attribute; linear in the pixels, so that they can be predicted."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (400, 4, 4), dtype=np.uint8)
    flat = x.reshape(400, 16) / 255
    y = np.stack([1e6 * flat[:, 0] + 3e5 * flat[:, 5], flat[:, 1], flat[:, 2] > 0.5], 1)
    arrays = {"x_train": x[:300], "y_train": y[:300], "x_test": x[300:], "y_test": y[300:]}
    np.savez(tmp_path / "t.npz", allow_pickle=False, **arrays, class_names=np.array(["income", "height", "glasses"]))
    return f"npz:{tmp_path / 't.npz'}", arrays


def test_targets_weigh_the_same_and_r2_is_their_mean(with_targets):
    """Against scikit-learn: least squares on all pixels, r2 of every target, their mean."""
    sklearn = pytest.importorskip("sklearn.linear_model")
    split = Split.load(Config(data=with_targets[0]))
    assert split.num_classes is None and "3 targets, each scaled to variance 1" in split.description
    np.testing.assert_allclose(split.train_labels.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(split.train_labels.var(0), 1, rtol=1e-12)
    train, test = split.moments(groups=5)
    r2 = float(ma.masking_sweep(train, [1], [0.0], eval_moments=test).eval_r2[0, 0, -1])
    x, t = split.train_images.reshape(len(split.train_images), -1), split.test_images.reshape(100, -1)
    prediction = sklearn.LinearRegression().fit(x, split.train_labels).predict(t)
    wrong = np.square(split.test_labels - prediction).sum(0)
    total = np.square(split.test_labels).sum(0)  # about the mean of training
    assert r2 == pytest.approx(1 - wrong.sum() / total.sum(), abs=1e-6)
    assert r2 == pytest.approx((1 - wrong / total).mean(), abs=0.02)


def test_experiments_say_which_labels_they_take(with_targets, tmp_path):
    label, _ = with_targets
    with pytest.raises(InputError, match="t has 3 targets, which this experiment has no measure for: give one class"):
        Split.load(RunConfig(data=label))
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("L", (2, 2), i).save(tmp_path / "pictures" / f"{i}.png")
    with pytest.raises(InputError, match=r"pictures has no targets, .*: give labels, folder:DIR or table"):
        Split.load(Config(data=f"images:{tmp_path / 'pictures'}"))
