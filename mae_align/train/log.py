"""What a training run reports as it goes: metrics.jsonl, TensorBoard event files and a progress line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from mae_align.runtime.errors import InputError

Values = Mapping[str, np.ndarray | float]


class MetricLog:
    """Metrics of a run in a folder, and a progress line on standard error.

    ``metrics.jsonl`` has one JSON object a line: ``step``, ``seconds`` of training (those before an interruption
    included) and the metrics, one number each or a list with one per member. NaN and infinity are written as null. The
    event files of TensorBoard have the same numbers; a metric of several members has one curve for each, ``loss/0``.
    Of several processes the first writes; the others do nothing.

    Args:
        folder: made if missing.
        shown: metrics that the progress line shows beside the loss, as their mean over members.
        progress: True and False show and hide the progress line; None shows it on a terminal only.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with MetricLog(folder) as log:
        ...     log.start(0, 20)
        ...     log.write(10, {"loss": np.array([0.5, 0.25])})
        >>> json.loads((folder / "metrics.jsonl").read_text())["loss"]
        [0.5, 0.25]
    """

    def __init__(
        self, folder: str | Path, *, shown: Collection[str] = ("accuracy",), progress: bool | None = None
    ) -> None:
        self.folder, self._shown = Path(folder), tuple(shown)
        self._active = jax.process_index() == 0
        # tqdm's own word for "on a terminal only" is None.
        self._hidden = None if progress is None else not progress
        self._writer: SummaryWriter | None = None
        self._bar: tqdm | None = None
        self._texts: dict[str, str] = {}
        self._before = self._begun = self._last = 0.0
        self._speed: float | None = None

    @property
    def file(self) -> Path:
        """metrics.jsonl."""
        return self.folder / "metrics.jsonl"

    def start(self, step: int, num_steps: int) -> None:
        """Begin, or go on after a step: what an earlier run wrote past it is removed, and hidden in TensorBoard.

        Raises:
            InputError: the folder cannot be used.
        """
        if not self._active:
            return
        self.close()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._before = self._cut(step)
        except OSError as error:
            raise InputError(f"cannot write {self.file} ({error.strerror}): choose another folder") from error
        self._begun = self._last = time.monotonic()
        self._speed = None
        # Files are named by the second, and a second one of that name would replace the first.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1, filename_suffix=suffix)
        self._texts = {}
        self._bar = tqdm(total=num_steps, initial=step, desc="training", unit="step", disable=self._hidden)

    def write(self, step: int, metrics: Values) -> None:
        """Metrics of a step: numbers, or arrays [E] with one number per member.

        Raises:
            ValueError: before :meth:`start`.
        """
        if not self._active:
            return
        if self._writer is None:
            raise ValueError("start the log before writing to it")
        lists = {name: np.asarray(value, np.float64).tolist() for name, value in metrics.items()}
        line = {"step": step, "seconds": round(self._before + time.monotonic() - self._begun, 3)}
        line |= {name: _finite(value) for name, value in lists.items()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for name, value in lists.items():
            for tag, number in _curves(name, value):
                self._writer.add_scalar(tag, number, step)
        self._texts |= {name: f"{np.mean(lists[name]):.4g}" for name in self._shown if name in lists}

    def progress(self, step: int, loss: float, images: int) -> None:
        """Move the progress line to a step; ``images`` is what all members have seen since the last call."""
        bar = self._bar
        if bar is None:
            return
        now = time.monotonic()
        speed = images / max(now - self._last, 1e-9)
        # Of late, so that compiling at the start does not weigh on it for long.
        self._speed = speed if self._speed is None else 0.7 * self._speed + 0.3 * speed
        self._last = now
        bar.set_postfix({"loss": f"{loss:.4g}", "images/s": f"{self._speed:.0f}"} | self._texts, False)
        bar.update(step - bar.n)

    def close(self) -> None:
        """End the progress line and the event file; :meth:`start` begins anew."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        self._writer = self._bar = None

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut(self, step: int) -> float:
        """Keep the lines up to a step; seconds of the last of them."""
        if not self.file.exists():
            return 0.0
        kept, seconds = [], 0.0
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                content = json.loads(line)
            except ValueError:
                continue  # half a line of a killed run
            if content["step"] <= step:
                kept.append(line + "\n")
                seconds = content["seconds"]
        unfinished = self.file.with_name(f".{self.file.name}.tmp")
        unfinished.write_text("".join(kept), encoding="utf-8")
        os.replace(unfinished, self.file)
        return seconds


def _finite(value: float | list[float]) -> float | list[float | None] | None:
    """JSON has no NaN and no infinity."""
    if isinstance(value, list):
        return [v if math.isfinite(v) else None for v in value]
    return value if math.isfinite(value) else None


def _curves(name: str, value: float | list[float]) -> list[tuple[str, float]]:
    """TensorBoard's names and numbers: one curve, or one per member."""
    if not isinstance(value, list):
        return [(name, value)]
    return [(name, value[0])] if len(value) == 1 else [(f"{name}/{i}", v) for i, v in enumerate(value)]
