"""One run at a time in an output folder.

A launcher that dies may leave ranks behind, and a lost node may come back: two runs that write the same checkpoints would take
them from each other. The first rank holds a lock for as long as it lives, and the system lets go of it whatever way it dies.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from megatron_vocagno.config import OccupiedError, RunError
from megatron_vocagno.corpus.places import NO_LOCKS
from megatron_vocagno.engine.agreement import from_first_rank

LOCK = ".lock"
PATIENCE = 300.0
"""Seconds to wait for another run to end. Less than the ten minutes after which the other ranks give the first one up."""


def check_output(output: Path) -> None:
    """Raises RunError where a run could not write there: better before a teacher is read than after. Makes nothing."""
    nearest = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if nearest == output and not nearest.is_dir():
        raise RunError(f"'output', {output}, is a file; a run writes into a folder: name another one")
    if not nearest.is_dir():
        raise RunError(f"cannot make the folder of 'output', {output}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot write to 'output', {output}: this user may not. Name another folder, or change its permissions")


def make_output(output: Path) -> None:
    """The folder. Raises RunError: it cannot be made, or be written to."""
    check_output(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder of 'output', {output}: {error.strerror}") from None


class Occupancy:
    """Holds an output folder for one run, until it is closed or its process ends."""

    def __init__(self, output: Path, patience: float = PATIENCE) -> None:
        self.output, self.patience = output, patience
        self._lock: BinaryIO | None = None

    def take(self, say: Callable[[str], None]) -> None:
        """Wait for another run to leave. Collective over the world.

        Raises OccupiedError: it has not left. Raises SharedError: nothing can be written there.
        """
        if not from_first_rank(lambda: self._take(say), RunError):
            raise OccupiedError(
                f"another run is at work in {self.output}, and has not left within {self.patience:.0f} s ({LOCK} is locked).\n"
                "  Wait for it, end what an earlier start has left behind, or give this run another 'output'."
            )

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take(self, say: Callable[[str], None]) -> bool:
        make_output(self.output)
        try:
            self._lock = (self.output / LOCK).open("ab")
        except OSError as error:
            raise RunError(f"cannot write to 'output', {self.output}: {error}") from None
        end = time.monotonic() + self.patience
        told = False
        while not self._try():
            if not told:
                say(f"another run is at work in {self.output}: waiting up to {self.patience:.0f} s for it to end")
                told = True
            if time.monotonic() >= end:
                return False
            time.sleep(0.5)
        return True

    def _try(self) -> bool:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            # a file system without locks cannot keep two runs apart, and need not keep one from starting
            if error.errno not in NO_LOCKS:
                raise
        return True
