"""Run many small jobs, each in its own process, forked from a process that has imported DeepSpeed (an import takes 8 s).

The output of a job goes to its log. The first job that fails ends the others, and the error shows the end of its log.
No job outlives the command.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_vocagno.command import duration
from megatron_vocagno.errors import UserError
from megatron_vocagno.preprocess.workers import ONE_THREAD

PRELOADED = "examples.evidence.preload"
SHOWN_OF_A_LOG = 3000
"""Characters at the end of the log."""


class JobFailed(UserError):
    """A job has failed. The message has the end of its log."""


@dataclass(frozen=True)
class Job:
    """do: a function that can be pickled, that may be killed at any moment, and that can run again."""

    name: str
    log: Path
    do: Callable[[], None]


def work(jobs: Sequence[Job], workers: int, say: Callable[[str], None] = print) -> None:
    """Run all jobs in order, at most `workers` at a time. Raises JobFailed."""
    # before a job imports torch, which reads the number of threads at its import
    os.environ.update(ONE_THREAD | {"DS_ACCELERATOR": "cpu"})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    waiting, done, began = deque(jobs), 0, time.monotonic()
    working: dict[int, tuple[BaseProcess, Job]] = {}
    try:
        while waiting or working:
            while waiting and len(working) < workers:
                job = waiting.popleft()
                started = context.Process(target=_in_own_log, args=(job,), name=job.name)
                started.start()
                working[started.sentinel] = started, job
            for sentinel in wait(working):
                assert isinstance(sentinel, int)
                process, job = working.pop(sentinel)
                process.join()
                done += 1
                if process.exitcode:
                    raise JobFailed(f"{job.name} ended with exit code {process.exitcode}; {job.log} ends:\n{_end_of(job.log)}")
                left = (time.monotonic() - began) / done * (len(jobs) - done)
                say(f"{done}/{len(jobs)} {job.name}" + (f" (eta {duration(left)})" if left else ""))
    finally:
        for process, _ in working.values():
            process.kill()
            process.join()


def _in_own_log(job: Job) -> None:
    """Runs in the child process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    job.do()
    print(f"done in {time.process_time():.1f} seconds of CPU time")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """End this process with its parent, so that it does not write into files of the next command."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-SHOWN_OF_A_LOG:] if log.exists() else "(it has none)"
