"""A process records a requested stop, and exits after its step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from megatron_vocagno.training.stop_signal import OUT_OF_TIME, SIGNALS, StopSignal, reason


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_counts_and_later_ones_do_nothing_even_after_the_end(number: signal.Signals) -> None:
    with StopSignal(None) as stopper:
        assert stopper.requested == 0
        for each in (number, *SIGNALS):
            os.kill(os.getpid(), each)
        assert stopper.requested == number and reason(stopper.requested) == number.name
    for each in SIGNALS:
        os.kill(os.getpid(), each)
    assert stopper.requested == number


def test_without_a_signal_everything_is_as_before() -> None:
    met: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: met.append(number))
    with StopSignal(None):
        pass
    os.kill(os.getpid(), signal.SIGUSR1)
    assert met == [signal.SIGUSR1]


def test_time_runs_out_but_a_signal_is_the_better_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopSignal(max_minutes=2) as stopper:
        now[0] += 119
        assert stopper.requested == 0
        now[0] += 1
        assert stopper.requested == OUT_OF_TIME and reason(OUT_OF_TIME) == "training.max_minutes"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopper.requested == signal.SIGTERM
