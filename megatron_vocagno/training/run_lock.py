"""Allow one run at a time in an output folder, and check that all ranks see the same folder.

A dead launcher may leave ranks behind, and a lost node may come back. Two runs in one folder would remove each other's
checkpoints. Therefore the first rank holds a lock, which the system releases when the process ends, for any reason. All ranks
write checkpoints, so before the first step they all read a file that the first rank writes to the folder.
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
TIMEOUT = 300.0
"""Seconds to wait for another run to end."""
POLL_INTERVAL = 0.5
"""Seconds between two attempts, and so the longest time until a stop request is noticed."""
PROBE_FILE = re.compile(r"\.seen-by-all-[0-9a-f]{32}")
VISIBLE_WITHIN = 10.0
"""Seconds to wait until a file of one machine is visible on the others. A network file system may have a delay."""


def check_output(output: Path) -> None:
    """Raises RunError if a run could not write there. Creates nothing, so it can be called before a teacher is read."""
    nearest = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if nearest == output and not nearest.is_dir():
        raise RunError(f"'output', {output}, is a file, but a run needs a folder: use another path")
    if not nearest.is_dir():
        raise RunError(f"cannot create the folder of 'output', {output}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot write to 'output', {output}: permission denied. Use another folder, or change its permissions")


def make_output(output: Path) -> None:
    """Create the folder. Raises RunError if that fails, or if it cannot be written to."""
    check_output(output)
    try:
        make_folder(output)
    except OSError as error:
        raise RunError(f"cannot create the folder of 'output', {output}: {error.strerror}") from None


class RunLock:
    """Locks an output folder for one run, until `close` is called or the process ends."""

    def __init__(self, output: Path, timeout: float = TIMEOUT) -> None:
        """timeout: seconds to wait for another run to end."""
        self.output, self.timeout = output, timeout
        self._lock: BinaryIO | None = None
        self._end = 0.0

    def acquire(self, report: Callable[[str], None], requested: Callable[[], int]) -> int:
        """Wait until no other run has the lock, and check that all ranks see the same folder. Collective over the world.

        report     gets lines for the user
        requested  returns the stop request of this rank, or 0: see StopSignal
        returns    0 if the lock was acquired; else the stop request that ended the wait, and then no lock is held

        Raises RunLockedError if the other run has not ended in time. Raises SharedError if the folder cannot be written to, or if
        ranks see different folders.
        """
        run_on_rank0(self._open, RunError)
        reported = False
        while (state := run_on_rank0(self._try, OSError)) == "held":
            if run_on_rank0(lambda: time.monotonic() >= self._end):
                raise RunLockedError(
                    f"another run is using {self.output}, and has not ended within {self.timeout:.0f} s "
                    f"({LOCK} is locked).\n"
                    "  Wait for it, stop processes that an earlier start has left behind, or use another 'output'."
                )
            if not reported:
                report(f"another run is using {self.output}: waiting up to {self.timeout:.0f} s for it to end")
                reported = True
            if signal := max(all_gather(requested())):
                self.close()
                return signal
            time.sleep(POLL_INTERVAL)
        _check_shared(self.output)
        if problem := self._lock_problem(state):
            report(f"note: {problem}: two runs in this folder would not notice each other")
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
        self._end = time.monotonic() + self.timeout

    def _try(self) -> Literal["taken", "held", "none"]:
        assert self._lock is not None
        # on a file system without locks ("none") a run starts anyway
        return try_lock(self._lock)

    def _lock_problem(self, state: str) -> str | None:
        """The reason why other machines would not notice the lock. None if they would. Collective over the world.

        One rank of each other machine tries to acquire the lock, which must fail.
        """
        hosts, options = all_gather(_host()), all_gather(local_option(self.output))
        first_on_host = hosts.index(_host()) == my_rank() != 0
        acquired = all_gather(state == "taken" and first_on_host and _can_lock(self.output / LOCK))
        if state == "none":
            return f"the file system of {self.output} has no locks"
        if True in acquired:
            rank = acquired.index(True)
            return f"rank {rank} on {hosts[rank][0]} could acquire the lock that rank 0 on {hosts[0][0]} holds"
        option = next((option for option in options if option), None)
        return f"{self.output} is mounted with {option!r}, so locks only work within one machine" if option else None


def _host() -> tuple[str, str]:
    """The name of this machine, and its boot id, because two machines may have the same name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text().strip() if boot.exists() else ""


def _can_lock(lock: Path) -> bool:
    """Whether this rank can acquire a lock that another rank holds. It is released at once."""
    with lock.open("ab") as stream:
        return try_lock(stream) == "taken"


def _check_shared(output: Path) -> None:
    """Raises SharedError unless all ranks can read a file that the first rank writes to the folder. Collective over the world."""

    def write() -> tuple[str, bytes]:
        for path in output.iterdir():
            if PROBE_FILE.fullmatch(path.name):  # from a run that was killed
                path.unlink(missing_ok=True)
        name, content = f".seen-by-all-{secrets.token_hex(16)}", secrets.token_hex(16).encode()
        try:
            write_durably(output / name, content)
        except OSError as error:
            raise RunError(f"cannot write to 'output', {output}: {error}") from None
        return name, content

    name, content = run_on_rank0(write, RunError, OSError)
    try:
        found = all_gather((_becomes_visible(output / name, content), _host()[0], str(output.absolute())))
    finally:
        if my_rank() == 0:
            (output / name).unlink(missing_ok=True)
    blind = [f"rank {rank} on {host}: {folder}" for rank, (seen, host, folder) in enumerate(found) if not seen]
    if blind:
        _, host, folder = found[0]
        raise SharedError(
            f"not all ranks see the 'output' folder of rank 0 ({folder} on {host}):\n"
            + "".join(f"  {line}\n" for line in blind[:8])
            + f"  A file that rank 0 wrote there was not visible to {len(blind)} of {len(found)} ranks within "
            f"{VISIBLE_WITHIN:.0f} s. All ranks write checkpoints: use an absolute path on a shared file system."
        )


def _becomes_visible(file: Path, content: bytes) -> bool:
    """Whether this rank can read the file within VISIBLE_WITHIN seconds."""
    end = time.monotonic() + VISIBLE_WITHIN
    while True:
        with suppress(OSError):
            list(file.parent.iterdir())  # makes a network file system update its view of the folder
            if file.read_bytes() == content:
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)
