"""Networks on principal subspaces: what a run measures, what is compared with what, and how images are scaled."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray as xr

import mae_align as ma
from experiments.harness.cli import launch
from experiments.harness.data import Split
from experiments.harness.run import Run, execute
from experiments.subspace_classification import __main__ as subspace_classification
from experiments.subspace_classification import networks as subspace_networks
from experiments.subspace_classification.__main__ import (
    COLUMNS,
    PRESETS,
    Config,
    controls,
    main,
    moments,
    subspaces,
)
from experiments.subspace_classification.images import Preparation, Scale, prepared, scaled
from experiments.subspace_classification.networks import (
    Network,
    Sizes,
    Study,
    SubspaceTraining,
    Views,
    make_training,
    trained,
)
from experiments.subspace_classification.principal import Family, PrincipalAxes, Subspace
from experiments.subspace_classification.report import (
    Point,
    accuracy_figure,
    comparisons,
    dimension_figure,
    sentences,
    shown,
)
from mae_align.train.augment import Augmentation
from mae_align.train.loop import Diverged

TINY = Config(
    max_train=200,
    max_test=80,
    networks=(Network.mlp,),
    scale_networks=(Network.mlp,),
    network=Sizes(conv_widths=(4, 4), mlp_widths=(8,)),
    training=SubspaceTraining(epochs=1, batch_size=100, augmentation=Views(1, 0.0)),
    top=(0.8,),
    bottom=(0.2,),
    seeds=(0, 5),
)
CONV = Study(Network.conv, Scale.per_image)
TOY_AXES = PrincipalAxes((1, 5, 1), np.zeros(5), np.eye(5), np.array([6.0, 2.0, 1.0, 0.8, 0.2]), 0)


def run_it(config: Config) -> None:
    execute("subspace_classification", main, config, Split.load, COLUMNS)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("subspaces") / "run"
    run_it(dataclasses.replace(TINY, out=str(out)))
    return out


@pytest.fixture(scope="module")
def digits() -> Split:
    return Split.load(TINY)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_subspace_is_there_with_the_share_it_really_holds(run, digits):
    data = prepared(digits, TINY.preparation)
    axes = PrincipalAxes.of(moments(data.train_images))
    plan = subspaces(TINY, axes)
    k = axes.nearest(Family.top, 0.8).dimension
    r = axes.rank
    assert plan[:3] == [Subspace(Family.top, r), Subspace(Family.top, k), Subspace(Family.bottom, r - k)]
    # Both complements are matched in variance and in dimension.
    assert {Subspace(Family.top, r - k), Subspace(Family.bottom, k)} < set(plan)
    assert {Subspace(Family.random, k), Subspace(Family.random, r - k)} < set(plan)
    near = [axes.share(s) for s in plan if s.family is Family.random]
    for end in plan[1:3]:
        assert min(abs(share - axes.share(end)) for share in near) < 0.05
    table = rows(run, "subspaces")
    assert {(row["family"], int(row["dimension"])) for row in table} == {(s.family.value, s.dimension) for s in plan}
    total = data.train_images.astype(np.float64).var(axis=0).sum()
    for row in table:
        seen = axes.project(data.train_images, Subspace(Family[row["family"]], int(row["dimension"])))
        assert float(row["share"]) == pytest.approx(
            float(np.square(seen, dtype=np.float64).sum(-1).mean(0).sum() / total)
        )


@pytest.mark.slow
def test_results_are_written_once_per_seed_and_summed_up(run):
    points = xr.load_dataset(run / "points.nc")
    assert sorted(set(points.seed.values)) == [0, 5]
    raw = points.where(points.scale == "raw", drop=True)
    # Scales are compared on one pair of complements.
    assert (
        set(raw.network.values) == {"mlp"} and len(set(zip(raw.family.values, raw.dimension.values, strict=True))) == 2
    )
    kinds = {row["kind"] for row in rows(run, "comparisons")}
    assert kinds == {"complement", "same dimension", "same variance", "scale"}
    text = (run / "summary.txt").read_text()
    assert "55% on the bottom 20%" in text and "80 test images" in text
    assert "moved by up to 1 pixels each way, and 0% of them are mirrored" in text and "Left out" not in text
    for name in ("accuracy", "dimension", "scales"):
        assert (run / f"{name}.png").stat().st_size > 10_000 and (run / f"{name}.pdf").exists()
    linear = [row for row in rows(run, "subspaces") if row["network"] == "mlp" and row["scale"] == "per_image"]
    by = {(row["family"], int(row["dimension"])): float(row["linear_r2"]) for row in linear}
    r = max(d for _, d in by)
    assert by["top", r] > 0.4 > by["bottom", min(d for f, d in by if f == "bottom")]


@pytest.mark.slow
def test_what_is_finished_is_not_trained_again(run, monkeypatch):
    seen = []

    def put(training, images, labels=None):
        seen.append(training.num_members)
        return original(training, images, labels)

    original = subspace_networks.Training.put
    monkeypatch.setattr(subspace_networks.Training, "put", put)
    before = (run / "points.csv").read_text()
    # As a run that lost one ensemble and its summary.
    lost = next((run / "points").glob("mlp-per_image-bottom*.npz"))
    networks = run / "networks" / lost.name.rpartition("-step")[0]
    (networks / "checkpoints").rename(run.parent / "moved")
    lost.unlink()
    (run / "summary.txt").unlink()
    run_it(dataclasses.replace(TINY, out=str(run)))
    # Both seeds of the ensemble together, and nothing else.
    assert seen == [2]
    assert (run / "points.csv").read_text() == before


def test_augmentation_goes_by_the_data_set():
    shape = (32, 32, 3)
    for name, flip in {
        "CIFAR10": 0.5,
        "Fashion-MNIST": 0.5,
        "digits": 0.0,
        "arabic_digits": 0.0,
        "photos": 0.0,
    }.items():
        assert Views().of(name, shape) == Augmentation(shift=4, flip=flip)
    assert Views().of("photos", (64, 80, 3)).shift == 8
    given = Views(2, 0.25).of("digits", shape)
    assert given == Augmentation(shift=2, flip=0.25)
    # What was run with these presets was moved and mirrored so.
    given = {
        name: (preset.training.augmentation.shift, preset.training.augmentation.flip)
        for name, preset in PRESETS.items()
    }
    assert given == {"laptop": (1, 0.0), "fashion_mnist": (2, 0.5), "cifar10": (4, 0.5), "paper": (None, None)}


def test_augmentation_can_be_said_on_the_command_line():
    seen = []
    for preset in ("laptop", "cifar10", "paper"):
        argv = ["--preset", preset, "--training.augmentation.shift", "0", "--training.augmentation.flip", "0"]
        launch(lambda config: seen.append(config), Config, PRESETS, argv)
    assert [(config.training.augmentation.shift, config.training.augmentation.flip) for config in seen] == [
        (0, 0.0)
    ] * 3


def test_training_accuracy_is_of_all_classes_and_test_accuracy_of_test_images(monkeypatch, tmp_path):
    """Networks that know the classes below 5, on images that show their class, ordered by it."""
    labels = np.repeat(np.arange(10), 100)
    images = labels[:, None, None, None].astype(np.float32) * np.ones((1, 2, 2, 1), np.float32)
    one = images[:1], labels[:1]
    data = Split("toy", tuple("0123456789"), images, labels, *one, images[::2], labels[::2], np.arange(1001) == 0)
    config = dataclasses.replace(TINY, out=str(tmp_path / "run"))
    monkeypatch.setattr(subspace_networks, "_FITTED", 100)
    seen = lambda _, images: np.where(images[:, 0, 0, 0] < 5, images[:, 0, 0, 0], -1).astype(int)  # noqa: E731
    monkeypatch.setattr(subspace_networks, "predicted_classes", seen)
    training = make_training(Network.mlp, data, TINY.network, TINY.training, 1)
    made = Run("toy", config, data, {})
    # The look alone: after no step.
    found = trained(made, "key", training, (3,), 0, lambda: (data.train_images, data.test_images))
    assert found["correct"].shape == (1, 500) and found["correct"].mean() == 0.5
    assert found["fitted"].shape == (1,) and 0.3 < found["fitted"][0] < 0.7


def test_scales_use_statistics_of_the_training_images_alone():
    rng = np.random.default_rng(0)
    train = (rng.normal(size=(50, 3, 3, 1)) * rng.uniform(0.1, 3.0, (50, 1, 1, 1))).astype(np.float32)
    test = (5.0 * rng.normal(size=(20, 3, 3, 1))).astype(np.float32)
    assert scaled(train, test, Scale.raw) == (train, test)
    a, b = scaled(train, test, Scale.whole_set)
    np.testing.assert_allclose(np.sqrt(np.mean(a**2)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(b / test, a[0] / train[0] * np.ones_like(test[:, :3, :3]), rtol=1e-5)
    a, b = scaled(train, test, Scale.per_image)
    expected = train / train.std(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(a, expected - expected.mean(0), atol=1e-5)
    np.testing.assert_allclose(b, test / test.std(axis=(1, 2, 3), keepdims=True) - expected.mean(0), atol=1e-5)
    # A black image has no contrast to normalise.
    train[0] = 0.0
    assert np.isfinite(scaled(train, test, Scale.per_image)[0]).all()


def test_images_are_divided_as_asked(digits):
    contrast = prepared(digits, Preparation.contrast)
    for images in (contrast.train_images, contrast.validation_images, contrast.test_images):
        np.testing.assert_allclose(images.std(axis=(1, 2, 3)), 1.0, rtol=1e-5)
    whole = prepared(digits, Preparation.whole_set)
    assert whole.train_images.std() == pytest.approx(1.0, rel=1e-4)
    assert whole.train_images[0].std() != pytest.approx(whole.train_images[1].std(), rel=1e-3)
    factor = digits.train_images.std()
    for part in ("validation_images", "test_images"):
        np.testing.assert_allclose(getattr(whole, part) * factor, getattr(digits, part), rtol=1e-5)
    np.testing.assert_array_equal(whole.test_labels, digits.test_labels)


def point(subspace: Subspace, right: list[int]) -> Point:
    correct = np.zeros((3, 100), bool)
    for seed, count in enumerate(right):
        correct[seed, :count] = True
    return Point(CONV, subspace, TOY_AXES.share(subspace), correct, np.ones(3))


def test_comparisons_find_the_published_pair_and_pair_seeds():
    points = [
        point(Subspace(Family.bottom, 3), [60, 61, 62]),
        point(Subspace(Family.top, 3), [50, 51, 52]),
        point(Subspace(Family.top, 2), [40, 41, 42]),
    ]
    found = {(one.kind, one.second): one for one in comparisons(TOY_AXES, points)}
    pair = found["published pair", "top 90% (3 dimensions)"]
    assert pair.difference.mean == pytest.approx(0.1) and pair.better == pair.first == "bottom 20% (3 dimensions)"
    assert found["complement", "top 80% (2 dimensions)"].difference.mean == pytest.approx(0.2)
    assert found["same dimension", "top 90% (3 dimensions)"].difference.low == pytest.approx(0.1)
    first, published = sentences(list(found.values()), [CONV])
    assert "bottom 20% (3 dimensions) minus top 90% (3 dimensions) +10.0 points" in first
    assert first.endswith("bottom 20% (3 dimensions) is better.") and published.startswith("Published")
    # A subspace on which a network diverged is not there.
    assert [one.kind for one in comparisons(TOY_AXES, points[:2])] == ["published pair", "same dimension"]
    linear = {p.subspace: {"linear_accuracy": 0.5, "linear_r2": 0.2} for p in points}
    text = shown(points[:2], linear, [CONV])
    assert text["conv [%]"].tolist() == [61.0, 51.0] and text["variance [%]"].tolist() == ["20.0", "90.0"]
    for figure in (
        accuracy_figure("toy", 5, points, [CONV], linear, 0.1),
        dimension_figure("toy", 5, points, [CONV], 0.1),
    ):
        figure.canvas.draw()


def test_no_difference_is_called_none():
    points = [
        point(Subspace(Family.bottom, 3), [60, 40, 50]),
        point(Subspace(Family.top, 3), [50, 51, 52]),
    ]
    (pair, _) = comparisons(TOY_AXES, points)
    assert pair.better == "" and next(sentences([pair], [CONV])).endswith("no detectable difference.")


def test_a_subspace_on_which_a_network_diverges_is_left_out(monkeypatch, tmp_path, digits):
    def measured(run, key, training, seeds, steps, images):
        if "bottom" in key:
            raise Diverged("the loss is nan", 1, 0, None)
        right = np.random.default_rng(0).random((len(seeds), len(digits.test_labels))) < 0.5
        return {"correct": right, "fitted": np.ones(len(seeds))}

    monkeypatch.setattr(subspace_classification, "trained", measured)
    with pytest.warns(UserWarning, match="Left out: mlp-.*-bottom"):
        run_it(dataclasses.replace(TINY, out=str(tmp_path / "run")))
    assert "Left out: mlp-per_image-bottom" in (tmp_path / "run" / "summary.txt").read_text()
    assert {row["family"] for row in rows(tmp_path / "run", "points")} == {"top", "random"}
    assert all("bottom" not in row["first"] for row in rows(tmp_path / "run", "comparisons"))


def test_scales_are_compared_on_both_sides_of_a_split_even_where_one_was_not_asked_for():
    plan = subspaces(dataclasses.replace(TINY, top=(0.6,), bottom=(0.1, 0.2), scale_shares=(0.1,)), TOY_AXES)
    assert {Subspace(Family.bottom, 2), Subspace(Family.top, 3)} < set(plan)


def test_controls_of_a_split_without_a_top_direction():
    axes = PrincipalAxes((1, 2, 1), np.zeros(2), np.eye(2), np.array([1.0, 1.0]), 0)
    assert all(1 <= s.dimension <= 2 for s in controls(axes, 0.99))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"matched": (0.4,)}, "--bottom has not"),
        ({"training": dataclasses.replace(TINY.training, augmentation=Views(shift=8))}, "shift=8"),
        ({"networks": (Network.resnet9,)}, "16 x 16"),
        ({"training": dataclasses.replace(TINY.training, batch_size=201)}, "200 training images"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(change, message, tmp_path):
    with pytest.raises(ma.InputError, match=message):
        run_it(dataclasses.replace(TINY, **change, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_paper_preset_is_the_published_protocol():
    paper = PRESETS["paper"]
    assert paper.preparation is Preparation.contrast and paper.networks[0] is Network.resnet9
    assert (paper.training.epochs, paper.training.batch_size) == (50, 512)
    images, labels = np.zeros((512, 64, 64, 3), np.uint8), np.zeros(512, int)
    one = images[:1], labels[:1]
    data = Split("tiny-imagenet-200", ("",) * 200, images, labels, *one, *one, np.arange(513) == 0)
    assert paper.training.augmentation.of(data.name, data.image_shape) == Augmentation(shift=8, flip=0.5)
    training = make_training(paper.networks[0], data, paper.network, paper.training, 3)
    kernel = max(jax.tree.leaves(training.abstract_state.params), key=lambda p: p.size)
    assert kernel.shape[1:] == (3, 3, 1028, 1028)
