"""Run jobs in processes of this machine, and replace processes that die.

    run_local         jobs -> their results as they arrive, a JobFailure for a job that could not be done
    in_this_process   the same without processes
    report            called by a task to report its progress

A task is a function that can be imported by its name. It may be killed at any moment and run again. An exception in a task
becomes the JobFailure of its job, and the other jobs continue. An exception that the caller names in `stop` is raised and ends
all jobs.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from megatron_vocagno.compat import add_note
from megatron_vocagno.errors import CorpusError, UserError

STRIKES = 3  # deaths of workers after which a job is given up
FALSE_STARTS = 10  # deaths in sequence, without any worker becoming ready, after which no more workers are started
REPORT_SECONDS = 0.2  # minimum time between two reports of one job

# Each worker uses one core; threads of libraries would compete for the others. Libraries read these variables on import.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"} | dict.fromkeys(
    ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)

J = TypeVar("J")
R = TypeVar("R")
Stop: TypeAlias = tuple[type[Exception], ...]


@dataclass(frozen=True)
class JobFailure(Generic[J]):
    """A job that could not be done.

    reason  the message of a UserError, the traceback of another exception, or how the workers died
    """

    job: J
    reason: str


def in_this_process(task: Callable[[J], R], jobs: Sequence[J], stop: Stop = ()) -> Iterator[R | JobFailure[J]]:
    """The engine that runs jobs in the calling process."""
    return run_local(task, jobs, workers=1, stop=stop)


def run_local(
    task: Callable[[J], R],
    jobs: Sequence[J],
    workers: int,
    stop: Stop = (),
    on_progress: Callable[[Any], object] | None = None,
) -> Iterator[R | JobFailure[J]]:
    """Yield results as they arrive. Jobs start in their order. A single worker runs in the calling process.

    on_progress  called with the reports of tasks

    A worker that dies is replaced and its job is run again; after the third death the job is a JobFailure. Workers end when the
    iterator is closed or dropped, and shortly after this process ends for any reason. Raises CorpusError if no worker can start.

    Each worker has a separate pipe and shares no lock or queue with others. A death therefore affects one job, and is detected
    immediately as the end of the pipe. (concurrent.futures waits forever if a worker dies while another one starts.)
    """
    if workers > 1:
        pool = _WorkerPool(task, jobs, workers, stop, on_progress)
        try:
            yield from pool.results()
        finally:
            pool.stop_workers()
        return
    for job in jobs:
        with _listening(on_progress):
            answer = run_job(task, job, stop)
        yield unwrap(job, answer)


# ---- progress

_listener: ContextVar[Callable[[object], object] | None] = ContextVar("listener", default=None)


def report(update: object) -> None:
    """Report a task's progress, as often as the task likes. A value replaces the one before; most values are dropped."""
    if (listener := _listener.get()) is not None:
        listener(update)


@contextmanager
def _listening(listener: Callable[[object], object] | None) -> Iterator[None]:
    """Pass reports to the listener, at most one per `REPORT_SECONDS`, while the block runs."""
    due = 0.0

    def forward(update: object) -> None:
        nonlocal due
        if listener is not None and time.monotonic() >= due:
            listener(update)
            due = time.monotonic() + REPORT_SECONDS

    token = _listener.set(forward)
    try:
        yield
    finally:
        _listener.reset(token)


# ---- one job, on any engine

Answer: TypeAlias = tuple[Literal["done", "failed", "stopped"], Any]  # and the result, the reason, or the exception


def run_job(task: Callable[[J], R], job: J, stop: Stop) -> Answer:
    """Run a job. An exception is returned in the answer, except KeyboardInterrupt and SystemExit, which are raised.

    stop: exceptions that end all jobs
    """
    try:
        return "done", task(job)
    except (KeyboardInterrupt, SystemExit):
        raise
    except stop as error:
        return "stopped", error
    except UserError as error:
        return "failed", str(error)
    except BaseException:  # a panic of Rust code is not an Exception
        return "failed", traceback.format_exc()


def serialize(answer: Answer) -> bytes:
    """Pickle an answer. A value that does not survive pickling is replaced by its text: many exceptions cannot be unpickled."""
    outcome, value = answer
    text = "".join(traceback.format_exception(value)) if outcome == "stopped" else ""
    try:
        if outcome == "stopped":
            add_note(value, text)
        packed = pickle.dumps(answer)
        pickle.loads(packed)
    except Exception as error:
        unsent = ("stopped", CorpusError(text)) if outcome == "stopped" else ("failed", f"the result cannot be sent: {error}")
        return pickle.dumps(unsent)
    return packed


def unwrap(job: J, answer: Answer) -> Any:
    """The result, or a JobFailure. Raises the exception of an answer that ends all jobs."""
    outcome, value = answer
    if outcome == "stopped":
        raise value
    return value if outcome == "done" else JobFailure(job, value)


@dataclass(eq=False)
class Entry(Generic[J]):
    """A job in the queue. deaths: workers that died while they ran it."""

    job: J
    deaths: int = 0


class Queue(deque[Entry[J]]):
    """Jobs in their order. A job whose worker died returns to the front."""

    def __init__(self, jobs: Sequence[J]) -> None:
        super().__init__(Entry(job) for job in jobs)

    def retry(self, entry: Entry[J], death: str) -> Iterator[JobFailure[J]]:
        """Put the job of a dead worker back, or yield a JobFailure after `STRIKES` deaths."""
        entry.deaths += 1
        if entry.deaths < STRIKES:
            self.appendleft(entry)
            return
        hint = "Out of memory? Try fewer --workers"
        yield JobFailure(entry.job, f"{STRIKES} workers died while they ran it, the last one {death}. {hint}")


# ---- the workers of this machine


@dataclass(eq=False)
class _Worker(Generic[J]):
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    entry: Entry[J] | None = None  # the job that it runs

    @property
    def death(self) -> str:
        code = self.process.exitcode or 0
        return f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit status {code}"


class _WorkerPool(Generic[J, R]):
    def __init__(
        self,
        task: Callable[[J], R],
        jobs: Sequence[J],
        size: int,
        stop: Stop,
        on_progress: Callable[[Any], object] | None,
    ) -> None:
        self.task, self.size, self.stop, self.on_progress = task, size, stop, on_progress
        self.queue = Queue(jobs)
        self.workers: dict[Any, _Worker[J]] = {}
        self.false_starts = 0

    def results(self) -> Iterator[R | JobFailure[J]]:
        while self.queue or self._running:
            while len(self.workers) < min(self.size, len(self.queue) + self._running):
                self._start_worker()
            self._send_jobs()
            for pipe in wait(list(self.workers)):
                yield from self._receive(self.workers[pipe])

    @property
    def _running(self) -> int:
        """The number of workers that run a job."""
        return sum(worker.entry is not None for worker in self.workers.values())

    def _start_worker(self) -> None:
        context = multiprocessing.get_context("spawn")
        pipe, worker_end = context.Pipe()
        args = (self.task, self.stop, worker_end, self.on_progress is not None)
        process = context.Process(target=_work, args=args, daemon=True)
        with _interrupts_held(), _environment(ONE_THREAD):
            process.start()
            self.workers[pipe] = _Worker(process, pipe)
        worker_end.close()  # only the worker has a copy now: the pipe ends when the worker does

    def _send_jobs(self) -> None:
        for worker in self.workers.values():
            if self.queue and worker.ready and worker.entry is None:
                worker.entry = self.queue.popleft()
                with suppress(OSError):  # the worker is dead: `_receive` notices it next
                    worker.pipe.send(worker.entry.job)

    def _receive(self, worker: _Worker[J]) -> Iterator[R | JobFailure[J]]:
        try:
            message = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            yield from self._remove_dead(worker)
            return
        outcome, value = pickle.loads(message)
        if outcome == "ready":
            worker.ready, self.false_starts = True, 0
        elif outcome == "progress":
            if self.on_progress is not None:
                self.on_progress(value)
        elif worker.entry is not None:
            entry, worker.entry = worker.entry, None
            self._send_jobs()  # the worker need not wait until the caller has used this result
            yield unwrap(entry.job, (outcome, value))

    def _remove_dead(self, worker: _Worker[J]) -> Iterator[JobFailure[J]]:
        del self.workers[worker.pipe]
        worker.pipe.close()
        worker.process.join(timeout=5)  # it may still be exiting; its own exit status is more useful than that of a kill
        worker.process.kill()
        worker.process.join()
        if worker.entry is not None:
            yield from self.queue.retry(worker.entry, worker.death)
        elif not worker.ready:
            self.false_starts += 1
            if (worker.process.exitcode or 0) > 0 or self.false_starts == FALSE_STARTS:
                raise CorpusError(f"workers cannot start: the last one died {worker.death}; see its output above")

    def stop_workers(self) -> None:
        for worker in self.workers.values():
            worker.process.kill()
        for worker in self.workers.values():
            worker.process.join()
            worker.pipe.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block. A process that starts in the block never receives it: its parent ends it."""
    resource_tracker.ensure_running()  # if it started in the block, it would unblock interrupts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.getsignal(signal.SIGINT)
    received: list[int] = []
    # The mask applies to this thread. If a library's thread receives the signal, Python still interrupts this thread.
    swapped = threading.current_thread() is threading.main_thread() and callable(handler)
    if swapped:
        signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        if swapped:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if received:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(task: Callable[[J], R], stop: Stop, pipe: Connection, with_progress: bool) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send_progress(update: object) -> None:
        pipe.send_bytes(pickle.dumps(("progress", update)))

    with suppress(EOFError, OSError):  # the parent has ended
        pipe.send_bytes(pickle.dumps(("ready", None)))
        while True:
            job = pipe.recv()
            with _listening(send_progress if with_progress else None):
                answer = run_job(task, job, stop)
            pipe.send_bytes(serialize(answer))


def _end_with_parent() -> None:
    """End this process when its parent ends. A killed parent cannot end its workers, and a busy worker does not read its pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
