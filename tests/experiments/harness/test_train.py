"""The one way to train: looks at chosen steps, kept, resumed exactly, stopped by SIGTERM within a dispatch."""

from __future__ import annotations

import json
import shutil
import signal
from typing import Any

import numpy as np
import pytest

from experiments.harness.config import Training
from experiments.harness.train import TrainedLooks, milestones, optimizer, train_at, train_to
from mae_align.runtime.files import PointStore
from mae_align.train.loop import Preempted
from tests.train.toy_training import ToyTraining, images_and_labels

STEPS = (0, 1, 7, 130, 300)


class Looked:
    """A training whose looks are the weights, and the steps that were looked at or trained."""

    def __init__(self, folder, stop_at: int | None = None) -> None:
        self.training: Any = ToyTraining()
        self.looks = TrainedLooks(PointStore(folder / "points", "toy"), "key", folder / "networks", "toy")
        self.stop_at, self.seen = stop_at, []

    def look(self, state: Any, step: int) -> dict[str, np.ndarray]:
        self.seen.append(step)
        if step == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        return {"w": np.array(state.params["w"]), "b": np.array(state.params["b"])}

    def run(self, steps=STEPS) -> dict[str, np.ndarray]:
        return train_at(
            self.looks,
            self.training,
            lambda: self.training.init(range(3, 5)),
            lambda: self.training.put(*images_and_labels()),
            steps,
            self.look,
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, Looked(folder).run()


def test_looks_are_stacked_over_the_steps(whole):
    _, found = whole
    assert found["w"].shape == (5, 2, 16) and found["b"].shape == (5, 2)
    assert not (found["w"][1:] == found["w"][:-1]).any()


def test_metrics_of_all_steps_and_looks_are_logged(whole):
    folder, found = whole
    lines = [json.loads(line) for line in (folder / "networks" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "loss" in line} == set(range(1, 301))
    looked = {line["step"]: line["b"] for line in lines if "b" in line}
    assert sorted(looked) == list(STEPS[1:])
    assert looked[300] == pytest.approx(found["b"][-1].tolist())
    assert list((folder / "networks").glob("events.out.tfevents.*"))


def test_what_is_there_is_not_trained_again(whole):
    folder, found = whole
    again = Looked(folder)
    same = again.run()
    assert again.seen == [] and again.training.dispatches == []
    for name in found:
        np.testing.assert_array_equal(same[name], found[name])


@pytest.mark.parametrize("stop_at", [7, 130])
def test_stopped_by_sigterm_and_gone_on_with_it_is_the_same_bit_for_bit(whole, tmp_path, stop_at):
    with pytest.raises(Preempted, match=f"step {stop_at} is saved"):
        Looked(tmp_path, stop_at).run()
    rest = Looked(tmp_path)
    found = rest.run()
    assert rest.seen == [step for step in STEPS if step > stop_at]
    assert sum(rest.training.dispatches) == 300 - stop_at
    for name, values in whole[1].items():
        np.testing.assert_array_equal(found[name], values)


def test_a_look_that_was_lost_is_trained_up_to_again(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    next((folder / "points").glob("key-step7.*")).unlink()
    again = Looked(folder)
    found = again.run()
    assert again.seen == [7] and sum(again.training.dispatches) == 7
    np.testing.assert_array_equal(found["w"], whole[1]["w"])


def test_an_untrained_ensemble_is_looked_at_without_training(tmp_path):
    looked = Looked(tmp_path)
    assert looked.run((0,))["b"].tolist() == [[0.0, 0.0]] and looked.training.dispatches == []


def test_the_ensemble_of_a_finished_training_is_that_of_its_checkpoint(whole, tmp_path):
    folder, found = whole
    shutil.copytree(folder, tmp_path / "copy")
    again = Looked(tmp_path / "copy")
    state = train_to(
        again.looks,
        again.training,
        lambda: again.training.init(range(3, 5)),
        lambda: again.training.put(*images_and_labels()),
        STEPS,
        again.look,
    )
    assert again.seen == [] and again.training.dispatches == []
    np.testing.assert_array_equal(state.params["w"], found["w"][-1])


def test_milestones_begin_and_end_where_they_should():
    assert milestones(1000, 4) == (0, 1, 10, 100, 1000)
    assert milestones(3, 12) == (0, 1, 2, 3)


def test_optimiser_has_the_settings():
    made = optimizer(Training(epochs=3, batch_size=10, learning_rate=0.1, warmup_epochs=1, clip_norm=float("inf")), 57)
    assert (made.total_steps, made.warmup_steps, made.learning_rate, made.clip_norm) == (15, 5, 0.1, None)
