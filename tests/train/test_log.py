"""Lines of metrics, TensorBoard's event files read back, and the progress line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2

from mae_align.runtime.errors import InputError
from mae_align.train.log import MetricLog

_event = vars(event_pb2)["Event"].FromString


def events(folder: Path) -> list[Any]:
    """All events of all files, in the order of writing, with the checksums of the record format."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content, place = file.read_bytes(), 0
        while place < len(content):
            head = content[place : place + 8]
            (length,), (check,) = struct.unpack("<Q", head), struct.unpack_from("<I", content, place + 8)
            body = content[place + 12 : place + 12 + length]
            (check_body,) = struct.unpack_from("<I", content, place + 12 + length)
            for data, stored in ((head, check), (body, check_body)):
                crc = crc32c(data)
                assert ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF == stored
            found.append(_event(body))
            place += 16 + length
    return found


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """What TensorBoard shows: a session that starts at a step hides what was written from there on."""
    shown: list[tuple[int, str, float]] = []
    for event in events(folder):
        if event.HasField("session_log"):
            shown = [point for point in shown if point[0] < event.step]
        shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return shown


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_numbers_and_arrays_go_to_both_files(tmp_path):
    with MetricLog(tmp_path) as log:
        log.start(0, 20)
        log.write(10, {"loss": np.array([0.5, 0.25], np.float32), "rate": 0.125})
        log.write(20, {"loss": np.array([0.5]), "accuracy": 0.75})
    first, second = lines(tmp_path)
    assert first.pop("seconds") <= second.pop("seconds")
    assert first == {"step": 10, "loss": [0.5, 0.25], "rate": 0.125}
    assert second == {"step": 20, "loss": [0.5], "accuracy": 0.75}
    expected = [
        (10, "loss/0", 0.5),
        (10, "loss/1", 0.25),
        (10, "rate", 0.125),
        (20, "loss", 0.5),
        (20, "accuracy", 0.75),
    ]
    assert scalars(tmp_path) == expected


def test_going_on_removes_what_is_past_the_checkpoint(tmp_path, monkeypatch):
    with MetricLog(tmp_path) as log:
        log.start(0, 50)
        for step in (10, 20, 30):
            log.write(step, {"loss": step / 8})
    seconds = [line["seconds"] for line in lines(tmp_path)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "sec')  # killed while writing
    with MetricLog(tmp_path) as log:
        log.start(20, 50)
        assert [line["step"] for line in lines(tmp_path)] == [10, 20]
        log.write(30, {"loss": 1.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 1.25), (20, 2.5), (30, 1.0)]
    # Time goes on from the line that is kept.
    assert lines(tmp_path)[-1]["seconds"] >= seconds[1]
    assert scalars(tmp_path) == [(10, "loss", 1.25), (20, "loss", 2.5), (30, "loss", 1.0)]
    assert {p.name.split(".")[0] for p in tmp_path.iterdir()} == {"metrics", "events"}


def test_what_is_no_number_is_null(tmp_path):
    with MetricLog(tmp_path) as log:
        log.start(0, 20)
        log.write(1, {"a": np.array([np.nan, 1.0]), "b": np.inf})
    assert (lines(tmp_path)[0]["a"], lines(tmp_path)[0]["b"]) == ([None, 1.0], None)


def test_the_progress_line_shows_loss_speed_accuracy_and_time_left(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mae_align.train.log.time.monotonic", lambda: now[0])
    with MetricLog(tmp_path, progress=True) as log:
        log.start(40, 100)
        log.write(50, {"accuracy": np.array([0.25, 0.75]), "other": 3.0})
        for step, loss in ((50, 0.5), (60, 0.125)):
            now[0] += 2.0
            log.progress(step, loss, 1000)
    text = capsys.readouterr().err.splitlines()[-1].split("\r")[-1]
    assert "training:  60%" in text and "60/100 [" in text
    assert "loss=0.125, images/s=500, accuracy=0.5]" in text
    assert "other" not in text and "<" in text.split("[")[1]


@pytest.mark.parametrize("progress", [None, False])
def test_without_a_terminal_or_unasked_there_is_no_progress_line(tmp_path, capsys, progress):
    with MetricLog(tmp_path, progress=progress) as log:
        log.start(0, 10)
        log.progress(5, 1.0, 8)
    assert capsys.readouterr().err == ""


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricLog(tmp_path / "log", progress=True) as log:
        log.start(0, 10)
        log.write(5, {"loss": 1.0})
        log.progress(5, 1.0, 8)
    assert not (tmp_path / "log").exists() and capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_used_and_a_log_that_is_not_started(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/metrics\.jsonl .*choose another"):
        MetricLog(tmp_path / "file").start(0, 1)
    with pytest.raises(ValueError, match="start the log"):
        MetricLog(tmp_path).write(1, {"a": 1.0})
