"""Runs jobs in processes of this machine, and replaces those that are killed. Knows nothing of what the jobs are."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from megatron_vocagno.corpus import CorpusError

STRIKES = 3  # workers that may die at one shard

J = TypeVar("J")
R = TypeVar("R")


class WorkerError(CorpusError):
    """Workers die again and again at one shard."""


def run_local(task: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[R]:
    """Results as they come. A worker that is killed is replaced and its job repeated; errors of a task pass through.

    One worker runs in this process. Raises WorkerError when three workers die at one job.

    Each worker has a pipe of its own and shares no lock or queue with the others: a death costs one job, and is seen at
    once as the end of its pipe. (concurrent.futures waits for ever when a worker dies while another one starts.)
    """
    if workers == 1:
        yield from map(task, jobs)
        return
    waiting, deaths = deque(range(len(jobs))), Counter[int]()
    crew: dict[Any, BaseProcess] = {}
    at_work: dict[Any, int] = {}
    try:
        while waiting or at_work:
            while len(crew) < min(workers, len(waiting) + len(at_work)):
                pipe, process = _hire(task)
                crew[pipe] = process
            for pipe in crew.keys() - at_work.keys():
                if waiting:
                    at_work[pipe] = waiting.popleft()
                    with suppress(OSError):  # it is dead already: seen below
                        pipe.send(jobs[at_work[pipe]])
            ended: list[Any] = wait(list(at_work))
            for pipe in ended:
                job = at_work.pop(pipe)
                try:
                    succeeded, answer = pipe.recv()
                except (EOFError, OSError):
                    _dismiss(pipe, crew.pop(pipe))
                    waiting.appendleft(job)
                    deaths[job] += 1
                    if deaths[job] == STRIKES:
                        raise WorkerError(
                            f"{STRIKES} workers were killed while they made shard {job} of {len(jobs):,}: out of memory? "
                            "Use fewer --workers or a smaller --shard-mb; what is finished will be reused"
                        ) from None
                    continue
                if not succeeded:
                    raise answer
                yield answer
    finally:
        for pipe, process in crew.items():
            _dismiss(pipe, process)


def _hire(task: Callable[[J], R]) -> tuple[Any, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(task, theirs), daemon=True)
    process.start()
    theirs.close()  # the worker's copy is the last one: the pipe ends when the worker does
    return pipe, process


def _dismiss(pipe: Any, process: BaseProcess) -> None:
    pipe.close()
    process.terminate()
    process.join()


def _work(task: Callable[[J], R], pipe: Any) -> None:
    # each worker is one core; the library's own threads would fight for the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with suppress(EOFError, OSError, KeyboardInterrupt):  # the parent is gone, or going
        while True:
            job = pipe.recv()
            try:
                answer: tuple[bool, Any] = True, task(job)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = False, error
            pipe.send(answer)
