"""SIGTERM and Ctrl-C as requests, for loops that have something to save first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While the context is open, the first SIGTERM or SIGINT is noted; later ones do what they did before.

    Handlers are put back when the context ends. Python lets only the main thread set them: elsewhere, or where
    not ``wanted``, nothing is noted.

    Args:
        wanted: whether to listen; several processes have a common way to stop instead.

    Attributes:
        received: whether one came.
        interrupted: whether it was SIGINT, as of Ctrl-C.

    Example:
        >>> with StopSignals(True) as signals:
        ...     before = signals.received
        ...     signal.raise_signal(signal.SIGTERM)
        ...     before, signals.received, signals.interrupted
        (False, True, False)
    """

    def __init__(self, wanted: bool) -> None:
        self.received = self.interrupted = False
        self._wanted = wanted
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if self._wanted and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received, self.interrupted = True, number == signal.SIGINT
        self._put_back()

    def _put_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: set by other than Python, and not ours to set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
