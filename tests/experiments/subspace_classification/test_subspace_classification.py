from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray as xr

import mae_align as ma
from experiments.harness.cli import launch
from experiments.subspace_classification import __main__ as subspace_classification
from experiments.subspace_classification import networks as subspace_networks
from experiments.subspace_classification.__main__ import (
    PRESETS,
    Config,
    Preparation,
    controls,
    main,
    prepared,
    subspaces,
)
from experiments.subspace_classification.networks import (
    Network,
    Scale,
    Study,
    TrainingConfig,
    make_training,
    scaled,
    settled,
)
from experiments.subspace_classification.principal import Family, PrincipalAxes, Subspace
from experiments.subspace_classification.report import (
    Linear,
    Point,
    _table_text,
    accuracy_figure,
    comparisons,
    dimension_figure,
    sentences,
)
from mae_align.moments.moments import Moments
from mae_align.train.augment import CropFlip
from mae_align.train.loop import Diverged
from mae_align.train.step import Program

pytestmark = pytest.mark.slow

TINY = Config(
    max_train=200,
    max_test=80,
    network=Network.mlp,
    others=(),
    scale_networks=(Network.mlp,),
    training=TrainingConfig(epochs=1, batch_size=100, crop=1, flip=False, conv_widths=(4, 4), mlp_widths=(8,)),
    top=(0.8,),
    bottom=(0.2,),
    seeds=(0, 5),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Path]:
    """A run; its networks are made once for all that happens in its folder, so that programs are compiled once."""
    out = tmp_path_factory.mktemp("subspaces") / "run"
    make = functools.cache(lambda *sizes: make_training(*sizes, jax.devices()[:1]))  # pyright: ignore[reportCallIssue]
    patch = pytest.MonkeyPatch()
    patch.setattr(subspace_classification, "make_training", lambda *given: make(*given[:-1]))
    main(dataclasses.replace(TINY, out=str(out)))
    yield out
    patch.undo()


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_subspace_is_there_with_the_share_it_really_holds(run):
    data = prepared(ma.load_dataset("digits"), TINY)
    axes = PrincipalAxes.of(Moments.from_arrays(data.train_images.astype(np.float64)))
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
    assert "moved by up to 1 pixels each way, and none is mirrored" in text
    assert "networks on this one, not over draws of the subspace" in text and "diverged" not in text
    for name in ("accuracy", "dimension", "scales"):
        assert (run / f"{name}.png").stat().st_size > 10_000 and (run / f"{name}.pdf").exists()
    linear = [row for row in rows(run, "subspaces") if row["network"] == "mlp" and row["scale"] == "per_image"]
    by = {(row["family"], int(row["dimension"])): float(row["linear_r2"]) for row in linear}
    r = max(d for _, d in by)
    assert by["top", r] > 0.4 > by["bottom", min(d for f, d in by if f == "bottom")]


def test_what_is_finished_is_not_trained_again(run, monkeypatch):
    trained = []

    def measure(training, seeds, *rest):
        trained.append(tuple(seeds))
        return original(training, seeds, *rest)

    original = subspace_networks.measure
    before = (run / "points.csv").read_text()
    lost = sorted((run / "points").glob("mlp-per_image-bottom*.npz"))[:2]
    for file in lost:
        file.unlink()
    monkeypatch.setattr(subspace_classification, "measure", measure)
    main(dataclasses.replace(TINY, out=str(run), workers=1))
    # Both seeds of the ensemble together, and nothing else.
    assert trained == [(0, 5)]

    def results(text: str) -> list[str]:
        return [line.rsplit(",", 1)[0] for line in text.splitlines()]

    assert results((run / "points.csv").read_text()) == results(before)


def test_members_take_turns_where_convolutions_do():
    one, both = (
        make_training(network, (8, 8, 1), 10, TINY.training, 200, (0, 5), jax.devices()[:1])
        for network in (Network.conv, Network.mlp)
    )
    assert (one.program, one.num_members) == (Program.ONE_BY_ONE, 1)
    assert (both.program, both.num_members) == (Program.VMAPPED_SCAN, 2)
    data = prepared(ma.load_dataset("digits"), TINY)
    axes = PrincipalAxes.of(Moments.from_arrays(data.train_images.astype(np.float64)))
    config = dataclasses.replace(TINY, others=(Network.conv,))
    trainings = {Network.conv: one, Network.mlp: both}
    tasks = subspace_classification._group(Subspace(Family.random, 5), config, data, axes, trainings).tasks
    assert [task.keys for task in tasks] == [
        ("linear-random-5",),
        ("mlp-per_image-random-5-seed0", "mlp-per_image-random-5-seed5"),
        ("conv-per_image-random-5-seed0",),
        ("conv-per_image-random-5-seed5",),
    ]


def test_augmentation_is_settled_by_the_data_set(capsys):
    shape = (32, 32, 3)
    for name, flip in {"CIFAR10": True, "Fashion-MNIST": True, "digits": False, "arabic_digits": False}.items():
        assert settled(TrainingConfig(), name, shape).augmentation == CropFlip(4, flip)
    assert not capsys.readouterr().out
    assert settled(TrainingConfig(), "photos", (64, 80, 3)).augmentation == CropFlip(8, False)
    assert "photos are not mirrored" in capsys.readouterr().out
    assert settled(TrainingConfig(crop=2, flip=True), "digits", shape).augmentation == CropFlip(2, True)
    # What was run with these presets was cropped and mirrored so.
    given = {name: (preset.training.crop, preset.training.flip) for name, preset in PRESETS.items()}
    known = {"laptop": (1, False), "fashion_mnist": (2, True), "cifar10": (4, True), "paper": (None, None)}
    assert given == known


def test_augmentation_can_be_said_on_the_command_line():
    seen = []
    for preset in ("laptop", "cifar10", "paper"):
        argv = ["--preset", preset, "--training.crop", "0", "--training.flip", "False"]
        launch(lambda config: seen.append(config), Config, PRESETS, argv)
    assert [(config.training.crop, config.training.flip) for config in seen] == [(0, False)] * 3


class Recorded:
    """A training that notes which seeds it is started with; its state is these seeds, and its models too."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, ...]] = []

    def init(self, seeds):
        self.begun.append(tuple(seeds))
        return tuple(seeds)

    def put(self, images, labels):
        return images, labels

    def model(self, state, member):
        return state[member]


def measured(monkeypatch, seeds: tuple[int, ...], wild: set[int]) -> tuple[Recorded, list[dict[str, np.ndarray]]]:
    """Networks that know the classes below theirs, on images that show their class, ordered by it."""

    def fit(training, state, data, *, num_steps):
        for member, seed in enumerate(state):
            if seed in wild:
                raise Diverged("the loss is nan", 1, member, None)
        return state

    def predicted(model, images):
        shown = images[:, 0, 0, 0].astype(int)
        return np.where(shown < model, shown, -1)

    monkeypatch.setattr(subspace_networks, "fit", fit)
    monkeypatch.setattr(subspace_networks, "predicted_classes", predicted)
    monkeypatch.setattr(subspace_networks, "_FITTED", 100)
    labels = np.arange(1000) // 100
    part = labels[:, None, None, None].astype(np.float32), labels
    training = Recorded()
    return training, subspace_networks.measure(training, seeds, TINY.training, part, part)  # pyright: ignore[reportArgumentType]


def test_a_network_that_diverges_leaves_the_others(monkeypatch):
    training, found = measured(monkeypatch, (7, 2, 5), {2, 5})
    # In the places that they have in the ensemble, so that their program is the same.
    assert training.begun == [(7, 2, 5), (7, 7, 5), (7, 7, 7)]
    assert found[0]["correct"].mean() == 0.7
    for lost in found[1:]:
        assert np.isnan(lost["correct"]).all() and lost["correct"].shape == (1000,) and np.isnan(lost["fitted"])
    training, found = measured(monkeypatch, (2,), {2})
    assert training.begun == [(2,)] and np.isnan(found[0]["fitted"])


def test_training_accuracy_is_of_all_classes(monkeypatch):
    _, (row,) = measured(monkeypatch, (5,), set())
    assert row["correct"].mean() == 0.5 and 0.3 < row["fitted"] < 0.7


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


def test_images_are_divided_as_asked():
    data = ma.load_dataset("digits")
    contrast = prepared(data, dataclasses.replace(TINY, preparation=Preparation.contrast))
    np.testing.assert_allclose(contrast.train_images.std(axis=(1, 2, 3)), 1.0, rtol=1e-5)
    whole = prepared(data, dataclasses.replace(TINY, preparation=Preparation.whole_set))
    assert whole.train_images.std() == pytest.approx(1.0, rel=1e-4)
    assert whole.train_images[0].std() != pytest.approx(whole.train_images[1].std(), rel=1e-3)
    assert (len(whole.train_labels), len(whole.test_labels)) == (200, 80)


def test_comparisons_find_the_published_pair_and_pair_seeds():
    axes = PrincipalAxes((1, 5, 1), np.zeros(5), np.eye(5), np.array([6.0, 2.0, 1.0, 0.8, 0.2]), 0)
    study = Study(Network.conv, Scale.per_image)

    def point(subspace: Subspace, right: list[int]) -> Point:
        correct = np.zeros((3, 100), bool)
        for seed, count in enumerate(right):
            correct[seed, :count] = True
        result = [{"correct": row, "fitted": np.float64(1), "seconds": np.float64(1)} for row in correct]
        return Point(study, subspace, axes.share(subspace), result)

    points = [
        point(Subspace(Family.bottom, 3), [60, 61, 62]),
        point(Subspace(Family.top, 3), [50, 51, 52]),
        point(Subspace(Family.top, 2), [40, 41, 42]),
    ]
    found = {(one.kind, one.second): one.difference for one in comparisons(axes, points)}
    assert found["published pair", "top 90% (3 dimensions)"].mean == pytest.approx(0.1)
    assert found["complement", "top 80% (2 dimensions)"].mean == pytest.approx(0.2)
    assert found["same dimension", "top 90% (3 dimensions)"].low == pytest.approx(0.1)
    # Without the network that diverged there is only one pair.
    points[2].results[1]["correct"] = np.full(100, np.nan)
    assert [one.kind for one in comparisons(axes, points)] == ["published pair", "same dimension"]
    assert [point.diverged for point in points] == [0, 0, 1]
    row = dict.fromkeys(("network", "scale", "family"), "x") | {"dimension": 2, "share": 0.8, "diverged": 1}
    row |= dict.fromkeys(("accuracy", "accuracy_sd", "accuracy_train"), np.nan)
    row |= dict.fromkeys(("linear_accuracy", "linear_r2"), 0.5)
    assert _table_text([row]).splitlines()[1].split() == ["x", "x", "x", "2", "80.0", "diverged", "50.0", "0.500"]
    linear = [Linear(point.subspace, point.share, 0.5, 0.2) for point in points]
    for figure in (accuracy_figure("toy", 5, points, linear, 0.1), dimension_figure("toy", 5, points, 0.1)):
        figure.canvas.draw()
    text = list(sentences(ma.load_dataset("digits"), axes, points, [], CropFlip(2, True)))
    assert "moved by up to 2 pixels each way, and half of them are mirrored" in text[1]
    assert text[-1].startswith(
        "diverged, convolutional, each image rescaled: 1 of 3 networks on top 80% (2 dimensions)"
    )


def test_scales_are_compared_on_both_sides_of_a_split_even_where_one_was_not_asked_for():
    axes = PrincipalAxes((1, 5, 1), np.zeros(5), np.eye(5), np.array([6.0, 2.0, 1.0, 0.8, 0.2]), 0)
    plan = subspaces(dataclasses.replace(TINY, top=(0.6,), bottom=(0.1, 0.2), scale_shares=(0.1,)), axes)
    assert {Subspace(Family.bottom, 2), Subspace(Family.top, 3)} < set(plan)


def test_controls_of_a_split_without_a_top_direction():
    axes = PrincipalAxes((1, 2, 1), np.zeros(2), np.eye(2), np.array([1.0, 1.0]), 0)
    assert all(1 <= s.dimension <= 2 for s in controls(axes, 0.99))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"top": (1.0,)}, "--top"),
        ({"matched": (0.4,)}, "--bottom has not"),
        ({"max_train": 10}, "--max-train"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"training": TrainingConfig(epochs=0)}, "--training"),
        ({"training": TrainingConfig(crop=8)}, "pad=8"),
        ({"network": Network.resnet9}, "16 x 16"),
        ({"others": (Network.mlp,)}, "--network and --others mlp mlp repeats a value"),
        ({"scale_networks": (Network.mlp,) * 2}, "--scale-networks mlp mlp repeats a value"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(change, message, tmp_path):
    with pytest.raises(ma.InputError, match=message):
        main(dataclasses.replace(TINY, **change, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_paper_preset_is_the_published_protocol():
    paper = PRESETS["paper"]
    asked = settled(paper.training, "tiny-imagenet-200", (64, 64, 3))
    assert asked.augmentation == CropFlip(8, True)
    training = make_training(paper.network, (64, 64, 3), 200, asked, 100_000, (0, 1, 2), jax.devices()[:1])
    assert paper.preparation is Preparation.contrast and paper.network is Network.resnet9
    assert (paper.training.epochs, paper.training.batch_size) == (50, 512)
    kernel = max(jax.tree.leaves(training.abstract_state.params), key=lambda p: p.size)
    assert kernel.shape[1:] == (3, 3, 1028, 1028)
