from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import mae_align as ma
from experiments.harness.config import Training, Vit
from experiments.harness.data import Split
from experiments.harness.run import execute
from experiments.harness.train import milestones
from experiments.masking_dynamics.__main__ import COLUMNS, PRESETS, Config, Probed, main, make_training
from experiments.masking_dynamics.report import Curve, agreement_over_time, dynamics_figure, sentences
from mae_align.closed_form.predictions import closed_form_row
from mae_align.corruption import FixedCountPatchMasking
from tests.experiments.cases import rows_of

TINY = Config(
    max_train=200,
    max_test=100,
    probe_images=80,
    patch_sizes=(4,),
    # One patch of four stays visible with both.
    mask_ratios=(0.7, 0.75),
    # The encoder has no blocks: they take long to compile.
    network=Vit(8, 0, 2, 8, 1, 2),
    training=Training(epochs=2, batch_size=50),
    evaluations=3,
    ks=(4,),
    seeds=(0, 1),
)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return rows_of(folder / f"{name}.csv")


def go(out: Path, **settings) -> Path:
    execute("masking_dynamics", main, dataclasses.replace(TINY, out=str(out), **settings), Split.load, COLUMNS)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that was stopped in its second network, and went on."""
    out = tmp_path_factory.mktemp("dynamics") / "run"
    original, calls = Probed.scores, []

    def scores(*given):
        calls.append(given)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probed, "scores", scores)
        with pytest.raises(KeyboardInterrupt):
            go(out)
        go(out)
    # Two masks of four evaluations, and raw pixels: six were kept, and the seventh was made again.
    assert len(calls) == 7 + 3
    return out


@pytest.mark.slow
def test_an_interrupted_run_ends_as_one_that_never_was(run):
    data = Split.load(TINY)
    training = make_training(data, FixedCountPatchMasking.from_ratio(4, 0.75, data.image_shape), TINY, 2)
    state, _ = training.advance(training.init(TINY.seeds), training.put(data.train_images), 8)
    whole = Probed(data, TINY).scores(lambda images: training.features(state, images, 500))
    found = [row for row in rows(run, "probes") if row["mask_ratio"] == "0.75" and row["step"] == "8"]
    for name, values in whole.items():
        assert [float(row[name]) for row in found] == pytest.approx(values.tolist(), abs=1e-12)
    untrained = [float(row["r2"]) for row in rows(run, "probes") if row["mask_ratio"] == "0.75" and row["step"] == "0"]
    assert np.abs(whole["r2"] - untrained).max() > 1e-3  # something was learned


@pytest.mark.slow
def test_seeds_that_are_trained_one_after_the_other_are_the_same_networks(run, tmp_path):
    out = go(tmp_path / "run", mask_ratios=(0.75,), seeds=(1, 0), seeds_at_once=1)
    assert {path.name for path in (run / "networks").iterdir()} == {"patch4-ratio0.7", "patch4-ratio0.75"}
    assert {path.name for path in (out / "networks").iterdir()} == {f"patch4-ratio0.75-seeds{seed}" for seed in (0, 1)}

    def r2(folder: Path) -> dict[tuple[str, str], float]:
        return {(x["step"], x["seed"]): float(x["r2"]) for x in rows(folder, "probes") if x["mask_ratio"] == "0.75"}

    assert r2(out) == pytest.approx(r2(run), abs=1e-4)


@pytest.mark.slow
def test_every_curve_has_its_prediction_beside_it(run):
    table = rows(run, "probes")
    assert len(table) == 2 * len(milestones(8, 3)) * 2
    train, test = Split.load(TINY).moments(groups=5)
    for ratio in TINY.mask_ratios:
        expected = closed_form_row(train, FixedCountPatchMasking.from_ratio(4, ratio, (8, 8, 1)), test, (4, 8))
        own = [row for row in table if float(row["mask_ratio"]) == ratio]
        assert {float(row["closed_eval_r2_k4"]) for row in own} == {expected["closed_eval_r2_k4"]}
        assert {row["hidden_share"] for row in own} == {"0.75"}
    assert (run / "masking_dynamics.png").stat().st_size > 10_000 and (run / "masking_dynamics.pdf").exists()
    for row in rows(run, "masks"):
        own = [x for x in table if x["mask_ratio"] == row["mask_ratio"]]
        steps = {x["step"]: [float(y["r2_validation"]) for y in own if y["step"] == x["step"]] for x in own}
        assert row["r2_best_step"] == max(steps, key=lambda step: np.mean(steps[step]))  # pyright: ignore
    assert "raw pixels" in (run / "summary.txt").read_text()


def curve(patch: int, predicted: float, ends: tuple[float, float], ratio: float = 0.5) -> Curve:
    r2 = np.linspace(*ends, 3)[:, None] + np.array([[-0.01, 0.01]])
    scores = {"accuracy": r2, "r2": r2, "accuracy_validation": r2 - 0.05, "r2_validation": -r2}
    return Curve(patch, ratio, ratio, (0, 1, 10), scores, {"closed_eval_r2_logmean": predicted, "closed_rank": 7})


def told(curves: list[Curve]) -> str:
    return " ".join(sentences(curves, {"accuracy": 0.5, "r2": 0.4}, agreement_over_time(curves)))


def test_agreement_is_within_patch_sizes_at_each_step():
    values = {2: (0.2, 0.3, 0.5), 8: (0.6, 0.7, 0.9)}
    curves = [
        curve(size, q, (0.1 * size, q), ratio)
        for size, of in values.items()
        for ratio, q in zip((0.3, 0.6, 0.9), of, strict=True)
    ]
    table = agreement_over_time(curves)
    assert [row["step"] for row in table] == [0, 1, 10]
    # Untrained networks differ by patch size alone.
    assert np.isnan(table[0]["pearson"]) and table[2]["pearson"] == pytest.approx(1.0)
    assert table[2]["spearman"] == pytest.approx(1.0)
    assert table[2]["pearson_p"] == table[2]["spearman_p"] == pytest.approx(1 / 36)
    assert (table[2]["best_patch_size"], table[2]["best_mask_ratio"]) == (8, 0.9)
    assert np.isnan(agreement_over_time([curves[i] for i in (0, 1, 3, 4)])[2]["pearson"])
    # A size that lacks a mask takes part with those that it has.
    few = agreement_over_time(curves[:-1])[2]
    assert few["pearson"] == pytest.approx(1.0) and few["pearson_p"] == pytest.approx(1 / 12)
    figure = dynamics_figure("toy", curves, {"accuracy": 0.5, "r2": 0.4}, table)
    assert len(figure.axes) == 4 and len(figure.axes[-1].lines[0].get_xdata()) == 2  # pyright: ignore[reportArgumentType]
    assert "within patch size" in figure.axes[-1].get_ylabel()
    text = told(curves)
    assert "8x8 patches, 90% hidden is best (90.0% of test images right)" in text and "on validation images" in text
    assert "within patch size, r2 of the probes at step 10 agrees with" in text


def test_a_difference_of_patch_sizes_alone_is_no_agreement():
    """Within each size the order is the other way round; over both together the correlation would be 0.8."""
    values = {2: ((0.2, 0.3), (0.25, 0.25), (0.3, 0.2)), 8: ((0.6, 0.7), (0.65, 0.65), (0.7, 0.6))}
    curves = [
        curve(size, predicted, (0.1, seen), ratio)
        for size, of in values.items()
        for ratio, (predicted, seen) in zip((0.3, 0.6, 0.9), of, strict=True)
    ]
    row = agreement_over_time(curves)[2]
    assert row["pearson"] == pytest.approx(-1.0) and row["pearson_p"] == pytest.approx(1.0)
    assert "does not follow" in told(curves)
    assert "cannot be held against the closed form: fewer than three" in told(curves[:2])


def test_what_is_best_is_chosen_on_validation_images():
    row = curve(2, 0.5, (0.1, 0.5)).summary()
    assert (row["accuracy_best_step"], row["accuracy_best"]) == (10, pytest.approx(0.5))
    # Validation says the contrary of r2 here.
    assert (row["r2_best_step"], row["r2_best"], row["r2_last"]) == (0, pytest.approx(0.1), pytest.approx(0.5))
    assert row["r2_last_sd"] == pytest.approx(0.02 / np.sqrt(2)) and "closed_rank" not in row


def test_when_most_is_learned():
    assert curve(2, 0.5, (0.1, 0.5)).settled(0.5) == 1
    assert curve(2, 0.5, (0.1, 0.5)).settled(0.9) == 10
    assert curve(2, 0.5, (0.5, 0.1)).settled() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_sizes": (3,)}, "patch"),
        ({"mask_ratios": (1.0,)}, "mask ratio 1"),
        ({"seeds": (0, 1, 2), "seeds_at_once": 2}, "--seeds-at-once 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_made(change, message, tmp_path):
    with pytest.raises(ma.InputError, match=message):
        go(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_paper_preset_fits_its_images():
    paper = PRESETS["paper"]
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    labels = np.arange(300) % 2
    data = Split("toy", ("a", "b"), images, labels, images, labels, images, labels, np.arange(600) % 2 > 0)
    for patch in paper.patch_sizes:
        mask = FixedCountPatchMasking.from_ratio(patch, paper.mask_ratios[-1], data.image_shape)
        training = make_training(data, mask, paper, 1)
        # One network and 65,536 patches in a step: what one accelerator holds.
        assert training.num_members == 1 and paper.training.batch_size * (32 // 2) ** 2 <= 2**16
        assert len(jax.tree.leaves(training.abstract_state.params)) > 100
