"""Signals and the time limit of a run. If one of them asks it to stop, it finishes its step, saves, and exits with 0.

A scheduler sends SIGTERM or SIGUSR1 to all processes, and a person to one. A process therefore only records the signal, and all
ranks exchange it between two steps (see loop.py). A second signal changes nothing.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
OUT_OF_TIME = 1
"""No signal that is listened to has this number."""


class StopSignal:
    """Listens while it is open as a context. Afterwards the signals do what they did before; where one has come, they do
    nothing: a second one would kill a process that is leaving."""

    def __init__(self, max_minutes: float | None) -> None:
        """max_minutes: of wall time from now; None for no limit."""
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._signal else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    @property
    def requested(self) -> int:
        """The signal's number, OUT_OF_TIME, or 0 while nobody asks. Of this process alone."""
        if self._signal:
            return self._signal
        return OUT_OF_TIME if self._end is not None and time.monotonic() >= self._end else 0


def reason(requested: int) -> str:
    """In words: a signal's name, or the field of the run file."""
    return "training.max_minutes" if requested == OUT_OF_TIME else signal.Signals(requested).name
