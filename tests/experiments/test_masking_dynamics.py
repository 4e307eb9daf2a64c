from __future__ import annotations

import csv
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import mae_align as ma
from experiments.masking_dynamics import __main__ as masking_dynamics
from experiments.masking_dynamics.__main__ import PRESETS, Cell, Config, NetworkConfig, main, make_training, milestones
from experiments.masking_dynamics.report import Curve, agreement_over_time, dynamics_figure, sentences
from mae_align.closed_form.predictions import closed_form_row
from mae_align.models import Pixels
from mae_align.train.ensemble import Training

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
        same = config.network == TINY.network and config.seeds_at_once is None
        if config is not PRESETS["paper"] and same and cell.patch_size == 4:
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
    solved: list[tuple] = []

    def evaluate(*given):
        calls.append(given)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_dynamics, "evaluate", evaluate)
        patch.setattr(masking_dynamics, "closed_form_row", lambda *a: solved.append(a) or closed_form_row(*a))
        with pytest.raises(KeyboardInterrupt):
            main(config)
        main(config)
    # Two cells of four evaluations: six were kept, and the seventh was made again.
    assert len(calls) == 9
    # Each mask is solved once.
    assert len(solved) == 2
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


def test_a_damaged_evaluation_from_before_the_checkpoint_is_made_again(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "points" / "patch4-ratio0.75-step1.npz").write_bytes(b"cut off")
    (copy / "points" / "patch4-ratio0.75-step3.npz").unlink()
    with pytest.warns(UserWarning, match="step1"):
        main(dataclasses.replace(TINY, out=str(copy)))
    assert rows(copy, "probes") == rows(run, "probes")


def test_seeds_that_are_trained_at_once_have_one_folder_for_each_mask(run):
    assert {path.name for path in (run / "networks").iterdir()} == {"patch4-ratio0.7", "patch4-ratio0.75"}


def test_groups_of_seeds_are_joined(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def state_at(step, state, training, images, seeds, checkpoints):
        assert training.num_members == len(seeds) and (state is None or state[0] == seeds)
        return seeds, step

    def evaluate(training, state, *_):
        scores = np.array([seed + state[1] / 100 for seed in state[0]])
        return {"accuracy": scores, "r2": -scores}

    monkeypatch.setattr(masking_dynamics, "_state_at", state_at)
    monkeypatch.setattr(masking_dynamics, "evaluate", evaluate)
    seeds = (4, 2, 7, 5)
    main(dataclasses.replace(TINY, mask_ratios=(0.75,), seeds=seeds, seeds_at_once=2, out=str(out)))
    assert {path.name for path in (out / "networks").iterdir()} == {
        f"patch4-ratio0.75-seeds{g}" for g in ("4-2", "7-5")
    }
    found = rows(out, "probes")
    assert sorted(int(float(row["seed"])) for row in found if row["step"] == "8") == sorted(seeds)
    for row in found:
        assert float(row["accuracy"]) == float(row["seed"]) + float(row["step"]) / 100 == -float(row["r2"])


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


def curve(patch: int, predicted: float, ends: tuple[float, float], ratio: float = 0.5) -> Curve:
    r2 = np.linspace(*ends, 3)[:, None] + np.array([[-0.01, 0.01]])
    return Curve(patch, ratio, ratio, (0, 1, 10), r2, r2, {"closed_eval_r2_logmean": predicted})


def told(curves: list[Curve]) -> str:
    raw = {"accuracy": 0.5, "r2": 0.4}
    return " ".join(sentences(ma.load_dataset("digits"), curves, raw, agreement_over_time(curves)))


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
    assert np.isnan(agreement_over_time([curves[i] for i in (0, 1, 3, 4)])[2]["pearson"])
    # A size that lacks a mask takes part with those that it has.
    few = agreement_over_time(curves[:-1])[2]
    assert few["pearson"] == pytest.approx(1.0) and few["pearson_p"] == pytest.approx(1 / 12)
    figure = dynamics_figure("toy", curves, {"accuracy": 0.5, "r2": 0.4}, table)
    assert len(figure.axes) == 4 and len(figure.axes[-1].lines[0].get_xdata()) == 2  # pyright: ignore[reportArgumentType]
    assert "within patch size" in figure.axes[-1].get_ylabel()
    text = told(curves)
    assert "8x8 patches, 90% hidden is best (90.0)" in text and "both were chosen on these images" in text
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
        ({"seeds": (0, 1, 2), "seeds_at_once": 2}, "--seeds-at-once 2"),
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
        # One network and 65,536 patches in a step: what one accelerator holds.
        assert training.num_members == 1 and paper.network.batch_size * (32 // 2) ** 2 <= 2**16
        assert len(jax.tree.leaves(training.abstract_state.params)) > 100
