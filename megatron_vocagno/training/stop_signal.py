"""Requests to stop a run, by a signal or by the clock. The run finishes its step, saves, and exits with code 0.

A scheduler sends SIGTERM or SIGUSR1 to all processes, a user may send it to one. Each process only records the request. All
processes exchange their requests between two steps (see loop.py). A second signal changes nothing.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
OUT_OF_TIME = 1
"""Stands for the time limit. Neither signal has this number."""


class StopSignal:
    """A context in which SIGTERM and SIGUSR1 request a stop.

    At its end the handlers are restored. If a signal has arrived, both signals are ignored instead, because a second signal would
    kill the process while it exits.
    """

    def __init__(self, max_minutes: float | None) -> None:
        """max_minutes: wall time from now until a stop is requested. None for no limit."""
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self._signal else handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    @property
    def requested(self) -> int:
        """The number of the signal that this process got, OUT_OF_TIME, or 0 if no stop is requested."""
        if self._signal:
            return self._signal
        return OUT_OF_TIME if self._end is not None and time.monotonic() >= self._end else 0


def reason(requested: int) -> str:
    """The reason for a stop: the name of a signal, for example `SIGTERM`, or the field `training.max_minutes`."""
    return "training.max_minutes" if requested == OUT_OF_TIME else signal.Signals(requested).name
