from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_cases import refused
from sklearn.linear_model import Ridge

from mae_align import InputError, Moments, stream_moments
from mae_align.probes import (
    Rows,
    as_images,
    one_scale,
    per_feature,
    ridge_from_moments,
    ridge_path,
    ridge_probe,
    ridge_probe_many,
    validation_split,
)
from mae_align.runtime.devices import compile_counter

CLASSES = 4


def draw(seed: int, n: int, k: int = 12, dtype: type = np.float64) -> Rows:
    """Correlated features of very different sizes with a mean, and classes that are partly linear in them."""
    fixed, rng = np.random.default_rng(5), np.random.default_rng(seed)
    mix, teacher = np.eye(k) + fixed.uniform(-0.3, 0.3, (k, k)), fixed.normal(size=(k, CLASSES))
    z = rng.normal(size=(n, k))
    labels = (z @ teacher + 1.5 * rng.normal(size=(n, CLASSES))).argmax(1)
    size = np.geomspace(0.05, 20, k)
    return Rows(((z @ mix) * size + 3 * size).astype(dtype), labels)


def oracle(train: Rows, strength: float, one_for_all: bool = False) -> tuple[Ridge, np.ndarray, np.ndarray]:
    """Scikit-learn's ridge on standardised features with the strength in its units."""
    x = train.features.astype(np.float64)
    mean, std = x.mean(0), x.std(0)
    if one_for_all:
        std = np.full(len(std), np.sqrt((std**2).mean()))
    z = (x - mean) / std
    alpha = strength * len(x) * np.trace(np.cov(z.T, bias=True)) / z.shape[1]
    return Ridge(alpha=alpha, solver="svd").fit(z, np.eye(CLASSES)[train.targets]), mean, std


@pytest.mark.parametrize("normalization", [per_feature, one_scale])
@pytest.mark.parametrize("strength", [1e-4, 0.1, 10.0])
def test_equals_scikit_learn(normalization, strength):
    train, val, test = draw(0, 200), draw(1, 90), draw(2, 110)
    found = ridge_probe(*train, *test, val=val, strengths=[strength], normalization=normalization, features="drawn")
    model, mean, std = oracle(train, strength, normalization is one_scale)
    for part, accuracy, r2 in (
        (train, found.accuracy_train, found.r2_train),
        (val, found.accuracy_val, found.r2_val),
        (test, found.accuracy_test, found.r2_test),
    ):
        predicted = model.predict((part.features - mean) / std)
        y, center = np.eye(CLASSES)[part.targets], np.eye(CLASSES)[train.targets].mean(0)
        assert accuracy == pytest.approx((predicted.argmax(1) == part.targets).mean(), abs=1e-12)
        assert r2 == pytest.approx(1 - ((predicted - y) ** 2).sum() / ((y - center) ** 2).sum(), abs=1e-9)
    p = found.protocol
    assert (p.probe, p.features, p.normalization) == ("ridge", "drawn", normalization.__name__)
    assert (p.n_train, p.n_val, p.n_test, p.strength) == (200, 90, 110, strength)


def test_float32_features_give_the_weights_of_float64():
    train = draw(0, 500, dtype=np.float32)
    path = ridge_path(Moments.from_arrays(as_images(train.features), train.targets), strengths=[1e-3, 1.0])
    for i, strength in enumerate(path.strengths):
        model, _, std = oracle(train, strength)
        np.testing.assert_allclose(
            path.weights[i], model.coef_.T / std[:, None], atol=2e-5 * np.abs(model.coef_).max() / std.min()
        )


def test_strength_is_the_best_on_validation_and_the_test_part_has_no_say():
    train, val, test = (draw(i, n, k=30) for i, n in enumerate((40, 400, 300)))
    grid = [1e-5, 1e-2, 0.3, 3.0, 100.0, 1e4]
    alone = [ridge_probe(*train, *test, val=val, strengths=[s]) for s in grid]
    best = max(range(len(grid)), key=lambda i: (alone[i].accuracy_val, alone[i].r2_val))
    assert 0 < best < len(grid) - 1, "the case must have its best strength inside the grid"
    found = ridge_probe(*train, *test, val=val, strengths=grid[::-1])
    assert found.strength == grid[best] and found.accuracy_test == alone[best].accuracy_test
    other = ridge_probe(*train, test.features, (test.targets + 1) % CLASSES, val=val, strengths=grid)
    assert other.strength == grid[best] and other.accuracy_test != found.accuracy_test
    numbers = [np.eye(CLASSES)[part.targets] for part in (train, val, test)]
    by_r2 = ridge_probe(
        train.features, numbers[0], test.features, numbers[2], val=Rows(val.features, numbers[1]), strengths=grid
    )
    assert by_r2.r2_val == max(r.r2_val for r in alone) and by_r2.protocol.selected_by == "r2"


def test_equal_scores_go_to_the_larger_strength():
    x = np.array([[-1.0], [1.0], [-1.0], [1.0]])
    y = np.array([0, 1, 0, 1])
    # All of these shrink the answer to the mean, to the last bit.
    found = ridge_probe(x, y, x, y, val=Rows(x, y), strengths=[1e300, 1e301, 1e299])
    assert found.r2_val == 0.0 and found.strength == 1e301


def test_many_tasks_equal_single_ones():
    train, val, test = draw(0, 150), draw(1, 70), draw(2, 80)
    tasks = [
        {"class": p.targets, "coarse": p.targets // 2, "first": p.features[:, 0], "pair": np.sin(p.features[:, 1:3])}
        for p in (train, val, test)
    ]
    found = ridge_probe_many(train.features, tasks[0], test.features, tasks[2], val=(val.features, tasks[1]))
    assert list(found) == list(tasks[0])
    for name in found:
        one = ridge_probe(
            train.features, tasks[0][name], test.features, tasks[2][name], val=Rows(val.features, tasks[1][name])
        )
        assert one.strength == found[name].strength
        for score in ("accuracy_train", "accuracy_val", "accuracy_test", "r2_train", "r2_val", "r2_test"):
            assert getattr(one, score) == pytest.approx(getattr(found[name], score), abs=1e-9, nan_ok=True)
    assert len({found[name].strength for name in found}) > 1, "the strength is chosen for each task"
    assert np.isnan(found["pair"].accuracy_test) and found["first"].r2_test > 0.99


def test_carved_validation_part_is_the_stratified_split():
    data, test = draw(0, 120), draw(2, 50)
    split = validation_split(120, 0.25, data.targets, seed=3)
    val = Rows(data.features[split.val], data.targets[split.val])
    given_parts = ridge_probe(data.features[split.train], data.targets[split.train], *test, val=val)
    carved = ridge_probe(*data, *test, val_fraction=0.25, seed=3)
    assert carved.accuracy_test == given_parts.accuracy_test and carved.r2_val == given_parts.r2_val
    assert (carved.protocol.n_train, carved.protocol.n_val, carved.protocol.seed) == (90, 30, 3)
    assert carved == ridge_probe(*data, *test, val_fraction=0.25, seed=3)
    assert carved.r2_val != ridge_probe(*data, *test, val_fraction=0.25, seed=4).r2_val


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_streamed_moments_give_the_same_probe(dtype):
    train, val, test = draw(0, 300, dtype=dtype), draw(1, 90, dtype=dtype), draw(2, 100, dtype=dtype)
    direct = ridge_probe(*train, *test, val=val)
    batches = [(as_images(train.features[i : i + 70]), train.targets[i : i + 70]) for i in range(0, 300, 70)]
    updated = Moments.from_arrays(*batches[0], num_classes=CLASSES)
    for batch in batches[1:]:
        updated = updated.update(*batch)
    for moments in (stream_moments(iter(batches), num_classes=CLASSES), updated):
        found = ridge_from_moments(moments, val, test)
        assert found.strength == direct.strength and np.isnan(found.accuracy_train)
        for score in ("accuracy_val", "accuracy_test", "r2_train", "r2_val", "r2_test"):
            assert getattr(found, score) == pytest.approx(getattr(direct, score), abs=1e-5)
    held_out = [Moments.from_arrays(as_images(p.features), p.targets, num_classes=CLASSES) for p in (val, test)]
    found = ridge_from_moments(moments, *held_out, strengths=[direct.strength])
    assert found.r2_val == pytest.approx(direct.r2_val, abs=1e-5)
    assert found.r2_test == pytest.approx(direct.r2_test, abs=1e-5)
    assert np.isnan(found.accuracy_test) and found.protocol.n_test == 100


@given(seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3))
@settings(max_examples=6, deadline=None)
def test_units_of_features_do_not_matter(seed, scale, shift):
    train, test = draw(seed, 60), draw(seed + 1, 40)
    for normalization in (per_feature, one_scale):
        base = ridge_probe(*train, *test, normalization=normalization)
        moved = ridge_probe(
            scale * (train.features + shift), train.targets, scale * (test.features + shift), test.targets,
            normalization=normalization,
        )  # fmt: skip
        assert moved.strength == base.strength
        assert moved.r2_test == pytest.approx(base.r2_test, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_constant_and_dependent_features_change_nothing(dtype):
    train, test = draw(0, 100), draw(1, 60)
    if dtype is np.uint8:
        train, test = (Rows(np.clip(p.features * 5 + 100, 0, 255).astype(dtype), p.targets) for p in (train, test))
    one = Moments.from_arrays(as_images(train.features.astype(dtype)), train.targets)
    wide = [
        np.concatenate([p.features, p.features, 0 * p.features[:, :3] + 77], axis=1).astype(dtype)
        for p in (train, test)
    ]
    two = Moments.from_arrays(as_images(wide[0]), train.targets)
    few, many = (ridge_path(m, strengths=[0.0, 0.5]) for m in (one, two))
    assert np.isfinite(many.weights).all() and (many.weights[:, 24:] == 0).all()
    # Least norm at strength 0: the two copies share the weight.
    np.testing.assert_allclose(many.weights[0, :12], few.weights[0] / 2, atol=1e-4 * np.abs(few.weights[0]).max())
    found = ridge_probe(wide[0], train.targets, wide[1], test.targets)
    assert np.isfinite([found.r2_train, found.r2_test]).all() and found.accuracy_test > 0.3


def test_fewer_samples_than_features_and_features_without_variance():
    train, test = draw(0, 8, k=30), draw(1, 40, k=30)
    interpolating = ridge_path(Moments.from_arrays(as_images(train.features), train.targets), strengths=[0.0])
    fitted = interpolating.mean_y + (train.features - interpolating.mean_x) @ interpolating.weights[0]
    np.testing.assert_allclose(fitted, np.eye(fitted.shape[1])[train.targets], atol=1e-8)
    flat = ridge_probe(0 * train.features + 0.1, train.targets, test.features, test.targets, num_classes=CLASSES)
    assert flat.r2_train == 0.0 and flat.r2_test == pytest.approx(flat.r2_test)


def test_second_call_compiles_nothing():
    train, test = draw(0, 100), draw(1, 60)
    ridge_probe(*train, *test)
    with compile_counter() as seen:
        other = draw(3, 100).features
        ridge_probe(other, train.targets, other[:60], test.targets, seed=2, strengths=list(np.geomspace(1e-3, 10, 19)))
    assert seen.names == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_features": np.zeros((5, 2, 2))}, "give [n, k]"),
        ({"train_features": np.full((100, 12), np.nan)}, "sample 0 are NaN"),
        ({"train_features": np.zeros((100, 12), np.int64)}, "give uint8 or a floating type"),
        ({"test_features": np.zeros((60, 11))}, "11 features where the training ones have 12"),
        ({"train_targets": np.zeros(100, int)}, "all training targets are equal"),
        ({"train_targets": np.arange(99) % 3}, "100 images but 99 targets"),
        ({"train_targets": np.arange(100) % 2}, "outside 0..1"),
        ({"num_classes": 2}, "outside 0..1"),
        ({"test_targets": np.zeros(60)}, "class labels in one part and numbers in another"),
        ({"strengths": []}, "at least one finite number"),
        ({"strengths": [-1.0]}, "none below 0"),
        ({"strengths": [np.inf]}, "at least one finite number"),
        ({"val_fraction": 0.0}, "between 0 and 1"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_bad_input(change, message):
    refused(ridge_probe, draw(0, 100), draw(1, 60), change, message)


def test_bad_tasks_and_moments():
    train = draw(0, 100)
    m = Moments.from_arrays(as_images(train.features), train.targets)
    x, y = train
    for call, message in (
        (lambda: ridge_probe_many(x, {}, x, {}), "no tasks"),
        (lambda: ridge_probe_many(x, {"a": y}, x, {"b": y}), "tasks are ['b'] here and ['a'] in training"),
        (lambda: ridge_probe_many(x, {"a": y}, x, {"a": y}, num_classes={"c": 3}), "which are no tasks"),
        (lambda: ridge_probe_many(x, {"a": x}, x, {"a": x[:, :2]}), "2 target columns, 12 in training"),
        (lambda: ridge_path(Moments.from_arrays(as_images(x))), "without targets"),
        (lambda: ridge_path(Moments.from_arrays(as_images(x), y, center=False)), "center=True"),
        (lambda: ridge_from_moments(m, Moments.from_arrays(as_images(x[:, :3]), y), train), "of 3 features"),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
