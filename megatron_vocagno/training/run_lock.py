"""One run at a time in an output folder, and one folder for all ranks.

A launcher that dies may leave ranks behind, and a lost node may come back: two runs that write the same checkpoints would take
them from each other. The first rank holds a lock for as long as it lives, and the system lets go of it whatever way it dies.
Checkpoints are written by all ranks: that they see one folder is proved before the first step, by a file that all of them read.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal

from megatron_vocagno.engine.collectives import all_gather, my_rank, run_on_rank0
from megatron_vocagno.errors import RunError, RunLockedError, SharedError
from megatron_vocagno.files import local_option, make_folder, try_lock, write_durably

LOCK = ".lock"
PATIENCE = 300.0
"""Seconds to wait for another run to end."""
LOOK = 0.5
"""Seconds between two tries; so soon a signal is heard."""
PROOF = re.compile(r"\.seen-by-all-[0-9a-f]{32}")
APPEARS = 10.0
"""Seconds within which a file that one machine has written comes to the others: a network file system may be late."""


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
        make_folder(output)
    except OSError as error:
        raise RunError(f"cannot make the folder of 'output', {output}: {error.strerror}") from None


class RunLock:
    """Holds an output folder for one run, until it is closed or its process ends."""

    def __init__(self, output: Path, patience: float = PATIENCE) -> None:
        self.output, self.patience = output, patience
        self._lock: BinaryIO | None = None
        self._end = 0.0

    def acquire(self, say: Callable[[str], None], requested: Callable[[], int]) -> int:
        """Wait for another run to leave, and prove that all ranks see one folder. Collective over the world.

        say        takes a line for a person, on the first rank
        requested  gives the signal that asked this rank to stop, or 0: see stop_signal.py
        returns    0 with the lock held; or the signal that asked a rank to stop before the folder was free, with no lock held

        Raises RunLockedError: the other run has not left. Raises SharedError: nothing can be written there, or ranks see other
        folders.
        """
        run_on_rank0(self._open, RunError)
        told = False
        while (state := run_on_rank0(self._try, OSError)) == "held":
            if run_on_rank0(lambda: time.monotonic() >= self._end):
                raise RunLockedError(
                    f"another run is at work in {self.output}, and has not left within {self.patience:.0f} s "
                    f"({LOCK} is locked).\n"
                    "  Wait for it, end what an earlier start has left behind, or give this run another 'output'."
                )
            if not told:
                say(f"another run is at work in {self.output}: waiting up to {self.patience:.0f} s for it to end")
                told = True
            if signal := max(all_gather(requested())):
                self.close()
                return signal
            time.sleep(LOOK)
        _prove_shared(self.output)
        if doubt := self._doubt(state):
            say(f"note: {doubt}: two runs at once in this folder would not notice each other")
        return 0

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open(self) -> None:
        make_output(self.output)
        try:
            self._lock = (self.output / LOCK).open("ab")
        except OSError as error:
            raise RunError(f"cannot write to 'output', {self.output}: {error}") from None
        self._end = time.monotonic() + self.patience

    def _try(self) -> Literal["taken", "held", "none"]:
        assert self._lock is not None
        # a file system without locks cannot keep two runs apart, and need not keep one from starting
        return try_lock(self._lock)

    def _doubt(self, state: str) -> str | None:
        """Why other machines would not notice the lock; None where it holds. Collective over the world.

        One rank of each other machine tries to take it, and must be refused.
        """
        hosts, options = all_gather(_host()), all_gather(local_option(self.output))
        first_here = hosts.index(_host()) == my_rank() != 0
        taken = all_gather(state == "taken" and first_here and _gets(self.output / LOCK))
        if state == "none":
            return f"the file system of {self.output} has no locks"
        if True in taken:
            rank = taken.index(True)
            return f"rank {rank} on {hosts[rank][0]} was given the lock that rank 0 on {hosts[0][0]} holds"
        option = next((option for option in options if option), None)
        return f"{self.output} is mounted with {option!r}, so locks hold on one machine alone" if option else None


def _host() -> tuple[str, str]:
    """The name of this machine, and what tells it from others of that name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text().strip() if boot.exists() else ""


def _gets(lock: Path) -> bool:
    """Whether a lock that another rank holds is given to this one as well; it is given back at once."""
    with lock.open("ab") as stream:
        return try_lock(stream) == "taken"


def _prove_shared(output: Path) -> None:
    """All ranks read what the first one writes into the folder. Collective over the world.

    Raises SharedError: some do not see it, or it cannot be written.
    """

    def write() -> tuple[str, bytes]:
        for path in output.iterdir():
            if PROOF.fullmatch(path.name):  # of a run that was killed
                path.unlink(missing_ok=True)
        name, content = f".seen-by-all-{secrets.token_hex(16)}", secrets.token_hex(16).encode()
        try:
            write_durably(output / name, content)
        except OSError as error:
            raise RunError(f"cannot write to 'output', {output}: {error}") from None
        return name, content

    name, content = run_on_rank0(write, RunError, OSError)
    try:
        found = all_gather((_appears(output / name, content), _host()[0], str(output.absolute())))
    finally:
        if my_rank() == 0:
            (output / name).unlink(missing_ok=True)
    blind = [f"rank {rank} on {host}: {folder}" for rank, (seen, host, folder) in enumerate(found) if not seen]
    if blind:
        _, host, folder = found[0]
        raise SharedError(
            f"not all ranks see the folder of 'output' that the first one has taken ({folder} on {host}):\n"
            + "".join(f"  {line}\n" for line in blind[:8])
            + f"  What rank 0 writes there did not appear to {len(blind)} of {len(found)} ranks within {APPEARS:.0f} s. "
            "All ranks write checkpoints: name an 'output' on a file system that all machines share, by its whole path."
        )


def _appears(file: Path, content: bytes) -> bool:
    """Whether this rank comes to see a file, in so far as a machine's view of a network file system is late."""
    end = time.monotonic() + APPEARS
    while True:
        with suppress(OSError):
            list(file.parent.iterdir())  # asks the server anew for what is in the folder
            if file.read_bytes() == content:
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)
