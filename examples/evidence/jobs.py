"""Many small jobs in processes of their own, forked from one that has imported DeepSpeed: an import costs 8 s, such a fork none.

A job's words go into its log. The first that fails ends the others and is told with its log's end. None outlives the command.
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
"""Characters at its end."""


class JobFailed(UserError):
    """A job has failed; what it said last."""


@dataclass(frozen=True)
class Job:
    """do: a function that can be pickled; it may be killed at any moment, and done again."""

    name: str
    log: Path
    do: Callable[[], None]


def work(jobs: Sequence[Job], workers: int, say: Callable[[str], None] = print) -> None:
    """Does all jobs, so many at a time, in their order. Raises JobFailed."""
    # before the first of them imports torch: it reads how many threads it may have then
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
    """In the child."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    job.do()
    print(f"done in {time.process_time():.1f} seconds of CPU time")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """A run that went on when its command has been killed would write where the next command does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-SHOWN_OF_A_LOG:] if log.exists() else "(it has none)"
