from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import mae_align as ma
from experiments import masking_dynamics
from experiments.masking_dynamics import PRESETS, Cell, Config, NetworkConfig, main, make_training, milestones
from experiments.masking_dynamics_report import Curve, agreement_over_time, dynamics_figure, sentences
from mae_align.models import Pixels
from mae_align.predictions import closed_form_row
from mae_align.train import Training

pytestmark = pytest.mark.slow

TINY = Config(
    max_train=200,
    max_test=100,
    max_probe=80,
    patch_sizes=(4,),
    # One patch of four stays visible with both: cells of their own, from one program.
    mask_ratios=(0.7, 0.75),
    network=NetworkConfig(8, 1, 2, 8, 1, 2, epochs=2, batch_size=50),
    evaluations=3,
    ks=(4,),
    seeds=(0, 1),
)


@pytest.fixture(scope="module")
def trainings() -> Iterator[list[Training]]:
    """Trainings are made once for all that see as many patches: programs are compiled once."""
    original, made = masking_dynamics.make_training, []

    def make(pixels, cell, config, num_images):
        if config is not PRESETS["paper"] and config.network == TINY.network and cell.patch_size == 4:
            if not made:
                made.append(original(pixels, cell, config, num_images))
            return made[0]
        return original(pixels, cell, config, num_images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_dynamics, "make_training", make)
        yield made


@pytest.fixture(scope="module")
def run(tmp_path_factory, trainings) -> Path:
    """A run that was stopped in its second network, and went on."""
    out = tmp_path_factory.mktemp("dynamics") / "run"
    config = dataclasses.replace(TINY, out=str(out))
    original, calls = masking_dynamics.evaluate, []

    def evaluate(*given):
        calls.append(given)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_dynamics, "evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            main(config)
        main(config)
    # Two cells of four evaluations: six were kept, and the seventh was made again.
    assert len(calls) == 9
    return out


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_run_ends_as_one_that_never_was(run, trainings):
    used = masking_dynamics._used(ma.load_dataset("digits"), TINY)
    training = trainings[0]
    state, _ = training.advance(training.init(TINY.seeds), training.put(used.train_images), 8)
    whole = masking_dynamics.evaluate(training, state, masking_dynamics._probed(used, TINY), TINY)
    found = [row for row in rows(run, "probes") if row["mask_ratio"] == "0.75" and row["step"] == "8"]
    assert [float(row["accuracy"]) for row in found] == whole["accuracy"].tolist()
    assert [float(row["r2"]) for row in found] == pytest.approx(whole["r2"].tolist(), abs=1e-12)


def test_every_curve_has_its_prediction_beside_it(run):
    table = rows(run, "probes")
    assert len(table) == 2 * len(milestones(8, 3)) * 2
    used = masking_dynamics._used(ma.load_dataset("digits"), TINY)
    train = ma.Moments.from_arrays(used.train_images, used.train_labels)
    test = ma.Moments.from_arrays(used.test_images, used.test_labels, groups=5)
    for ratio in TINY.mask_ratios:
        masking = ma.FixedCountPatchMasking.from_ratio(4, ratio, used.image_shape)
        expected = closed_form_row(train, masking, test, (4, 8))
        own = [row for row in table if float(row["mask_ratio"]) == ratio]
        assert {float(row["closed_eval_r2_k4"]) for row in own} == {expected["closed_eval_r2_k4"]}
        assert {row["hidden_share"] for row in own} == {"0.75"}
    assert (run / "masking_dynamics.png").stat().st_size > 10_000 and (run / "masking_dynamics.pdf").exists()
    text = (run / "summary.txt").read_text()
    assert "raw pixels" in text and "In front: from step 0" in text and "fewer than three" in text


def test_milestones_begin_before_training_and_end_with_it():
    assert milestones(8, 3) == (0, 1, 3, 8)
    assert milestones(3, 12) == (0, 1, 2, 3)


def curve(patch: int, predicted: float, ends: tuple[float, float]) -> Curve:
    r2 = np.linspace(*ends, 3)[:, None] + np.array([[-0.01, 0.01]])
    return Curve(patch, 0.5, 0.5, (0, 1, 10), r2, r2, {"closed_eval_r2_logmean": predicted})


def test_agreement_is_held_against_all_masks_at_each_step():
    curves = [curve(p, q, (0.1, q)) for p, q in ((1, 0.2), (2, 0.3), (4, 0.5), (8, 0.6))]
    table = agreement_over_time(curves)
    assert [row["step"] for row in table] == [0, 1, 10]
    assert np.isnan(table[0]["pearson"]) and table[2]["pearson"] == pytest.approx(1.0)
    assert table[2]["spearman_p"] == pytest.approx(2 / 24)
    assert "pearson" not in agreement_over_time(curves[:2])[0]
    figure = dynamics_figure("toy", curves, {"accuracy": 0.5, "r2": 0.4}, table)
    assert len(figure.axes) == 6 and len(figure.axes[-1].lines[0].get_xdata()) == 2  # pyright: ignore[reportArgumentType]
    text = " ".join(sentences(ma.load_dataset("digits"), curves, {"accuracy": 0.5, "r2": 0.4}, table))
    assert "8x8 patches, 50% hidden is best (60.0)" in text
    backwards = [dataclasses.replace(c, predicted={"closed_eval_r2_logmean": -c.r2[-1].mean()}) for c in curves]
    text = " ".join(
        sentences(ma.load_dataset("digits"), backwards, {"accuracy": 0.5, "r2": 0.4}, agreement_over_time(backwards))
    )
    assert "does not follow" in text


def test_when_most_is_learned():
    assert curve(2, 0.5, (0.1, 0.5)).settled(0.5) == 1
    assert curve(2, 0.5, (0.1, 0.5)).settled(0.9) == 10
    assert curve(2, 0.5, (0.5, 0.1)).settled() == 0


@pytest.mark.parametrize(
    "change,message",
    [
        ({"patch_sizes": (3,)}, "patch"),
        ({"mask_ratios": (0.5, 0.5)}, "--mask-ratios repeats"),
        ({"evaluations": 1}, "--evaluations"),
        ({"max_probe": 3}, "--max-probe"),
        ({"network": NetworkConfig(epochs=0)}, "--network"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(change, message, tmp_path):
    with pytest.raises(ma.InputError, match=message):
        main(dataclasses.replace(TINY, **change, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_paper_preset_fits_its_images():
    paper = PRESETS["paper"]
    pixels = Pixels(np.zeros((32, 32, 3), np.float32), np.float32(1.0))  # pyright: ignore[reportArgumentType]
    for patch in paper.patch_sizes:
        training = make_training(pixels, Cell(patch, paper.mask_ratios[-1]), paper, 50_000)
        assert training.num_members == 5 and len(jax.tree.leaves(training.abstract_state.params)) > 100
