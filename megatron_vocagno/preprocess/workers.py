"""Runs jobs in processes of this machine, and replaces those that die. Knows nothing of what the jobs are.

    run_local         jobs -> their results as they come, a Failure for a job that cannot be done
    in_this_process   the same without processes
    failures_of       the failures among results
    report            called by a task: how far it is

A task is a function that can be imported by its name, and may be killed at any moment and run again. What a task raises is
the Failure of its job, and the rest goes on; exceptions that the caller names in `stop` end everything by being raised.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from megatron_vocagno.errors import CorpusError

STRIKES = 3  # workers that may die at one job
FALSE_STARTS = 10  # workers that may die in a row before any of them is ready
REPORT_SECONDS = 0.2  # at least, between two reports of one job

# a worker is one core; the threads of libraries would fight for the others. Libraries read this when they are imported
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"} | dict.fromkeys(
    ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)

J = TypeVar("J")
R = TypeVar("R")
Stop: TypeAlias = tuple[type[Exception], ...]


@dataclass(frozen=True)
class Failure(Generic[J]):
    """A job that could not be done."""

    job: J
    reason: str  # for people: the message of a CorpusError, the traceback of another exception, or how the workers died


def in_this_process(task: Callable[[J], R], jobs: Sequence[J], stop: Stop = ()) -> Iterator[R | Failure[J]]:
    """The engine that starts no process."""
    return run_local(task, jobs, workers=1, stop=stop)


def failures_of(results: Iterable[R | Failure[J]], on_result: Callable[[R | Failure[J]], object]) -> list[Failure[J]]:
    """Waits for all results, and tells each as it comes."""
    failures = []
    for result in results:
        on_result(result)
        if isinstance(result, Failure):
            failures.append(result)
    return failures


def run_local(
    task: Callable[[J], R],
    jobs: Sequence[J],
    workers: int,
    stop: Stop = (),
    on_progress: Callable[[Any], object] | None = None,
) -> Iterator[R | Failure[J]]:
    """Results as they come; jobs are begun in their order. One worker runs in this process.

    A worker that is killed is replaced and its job done again; the third death at one job is a Failure. on_progress: called
    with what tasks report. Raises CorpusError when no worker can start. Workers end when the iterator is closed or dropped,
    and soon after this process, however that ends.

    Each worker has a pipe of its own and shares no lock or queue with the others: a death costs one job, and is seen at
    once as the end of its pipe. (concurrent.futures waits for ever when a worker dies while another one starts.)
    """
    if workers > 1:
        crew = _Crew(task, jobs, workers, stop, on_progress)
        try:
            yield from crew.results()
        finally:
            crew.dismiss()
        return
    for job in jobs:
        with _followed(on_progress):
            answer = run_job(task, job, stop)
        yield unwrap(job, answer)


# ---- how far a task is

_listener: ContextVar[Callable[[object], object] | None] = ContextVar("listener", default=None)


def report(update: object) -> None:
    """Called by a task as often as it likes: how far it is, in one value that replaces the one before. Most are dropped."""
    if (listener := _listener.get()) is not None:
        listener(update)


@contextmanager
def _followed(listener: Callable[[object], object] | None) -> Iterator[None]:
    """Hands on what is reported meanwhile, a few updates a second."""
    due = 0.0

    def tell(update: object) -> None:
        nonlocal due
        if listener is not None and time.monotonic() >= due:
            listener(update)
            due = time.monotonic() + REPORT_SECONDS

    token = _listener.set(tell)
    try:
        yield
    finally:
        _listener.reset(token)


# ---- one job, on any engine

Answer: TypeAlias = tuple[Literal["done", "failed", "stopped"], Any]  # with the result, the reason, the exception


def run_job(task: Callable[[J], R], job: J, stop: Stop) -> Answer:
    """Does a job, whatever becomes of it. stop: exceptions that end all jobs. Ctrl-C and exits pass."""
    try:
        return "done", task(job)
    except (KeyboardInterrupt, SystemExit):
        raise
    except stop as error:
        return "stopped", error
    except CorpusError as error:
        return "failed", str(error)
    except BaseException:  # a panic of Rust code is not an Exception
        return "failed", traceback.format_exc()


def serialize(answer: Answer) -> bytes:
    """Pickled. Of what cannot be, the text: many exceptions can be pickled, but not unpickled."""
    outcome, value = answer
    text = "".join(traceback.format_exception(value)) if outcome == "stopped" else ""
    try:
        if outcome == "stopped":
            value.add_note(text)
        packed = pickle.dumps(answer)
        pickle.loads(packed)
    except Exception as error:
        unsent = ("stopped", CorpusError(text)) if outcome == "stopped" else ("failed", f"the result cannot be sent: {error}")
        return pickle.dumps(unsent)
    return packed


def unwrap(job: J, answer: Answer) -> Any:
    """The result or a Failure. Raises an exception of `stop`."""
    outcome, value = answer
    if outcome == "stopped":
        raise value
    return value if outcome == "done" else Failure(job, value)


@dataclass(eq=False)
class Entry(Generic[J]):
    """A job in the queue. deaths: workers that died at it."""

    job: J
    deaths: int = 0


class Queue(deque[Entry[J]]):
    """Jobs in their order; one whose worker died comes first again."""

    def __init__(self, jobs: Sequence[J]) -> None:
        super().__init__(Entry(job) for job in jobs)

    def again(self, entry: Entry[J], death: str) -> Iterator[Failure[J]]:
        """After a worker died: puts its job back, or gives it up."""
        entry.deaths += 1
        if entry.deaths < STRIKES:
            self.appendleft(entry)
            return
        hint = "Out of memory? Fewer workers a machine need less"
        yield Failure(entry.job, f"{STRIKES} workers died at it, the last one {death}. {hint}")


# ---- the workers of this machine


@dataclass(eq=False)
class _Worker(Generic[J]):
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    entry: Entry[J] | None = None  # at work on it

    @property
    def death(self) -> str:
        code = self.process.exitcode or 0
        return f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit status {code}"


class _Crew(Generic[J, R]):
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

    def results(self) -> Iterator[R | Failure[J]]:
        while self.queue or self._at_work:
            while len(self.workers) < min(self.size, len(self.queue) + self._at_work):
                self._hire()
            self._feed()
            for pipe in wait(list(self.workers)):
                yield from self._hear(self.workers[pipe])

    @property
    def _at_work(self) -> int:
        return sum(worker.entry is not None for worker in self.workers.values())

    def _hire(self) -> None:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        args = (self.task, self.stop, theirs, self.on_progress is not None)
        process = context.Process(target=_work, args=args, daemon=True)
        with _interrupts_held(), _environment(ONE_THREAD):
            process.start()
            self.workers[pipe] = _Worker(process, pipe)
        theirs.close()  # the worker's copy is the last one: the pipe ends when the worker does

    def _feed(self) -> None:
        for worker in self.workers.values():
            if self.queue and worker.ready and worker.entry is None:
                worker.entry = self.queue.popleft()
                with suppress(OSError):  # it is dead already: heard next
                    worker.pipe.send(worker.entry.job)

    def _hear(self, worker: _Worker[J]) -> Iterator[R | Failure[J]]:
        try:
            message = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            yield from self._bury(worker)
            return
        outcome, value = pickle.loads(message)
        if outcome == "ready":
            worker.ready, self.false_starts = True, 0
        elif outcome == "progress":
            if self.on_progress is not None:
                self.on_progress(value)
        elif worker.entry is not None:
            entry, worker.entry = worker.entry, None
            self._feed()  # it need not wait for who takes this result
            yield unwrap(entry.job, (outcome, value))

    def _bury(self, worker: _Worker[J]) -> Iterator[Failure[J]]:
        del self.workers[worker.pipe]
        worker.pipe.close()
        worker.process.join(timeout=5)  # on its way out, with a status of its own
        worker.process.kill()
        worker.process.join()
        if worker.entry is not None:
            yield from self.queue.again(worker.entry, worker.death)
        elif not worker.ready:
            self.false_starts += 1
            if (worker.process.exitcode or 0) > 0 or self.false_starts == FALSE_STARTS:
                raise CorpusError(f"workers cannot start: the last one died {worker.death}; see what it wrote above")

    def dismiss(self) -> None:
        for worker in self.workers.values():
            worker.process.kill()
        for worker in self.workers.values():
            worker.process.join()
            worker.pipe.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits, and a process that is started meanwhile never sees it: who started it does, and ends it."""
    resource_tracker.ensure_running()  # its own start would let interrupts through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.getsignal(signal.SIGINT)
    came: list[int] = []
    # the mask is this thread's; a library's thread may take the signal, and then Python interrupts this one all the same
    swapped = threading.current_thread() is threading.main_thread() and callable(handler)
    if swapped:
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        if swapped:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
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


def _work(task: Callable[[J], R], stop: Stop, pipe: Connection, followed: bool) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(update: object) -> None:
        pipe.send_bytes(pickle.dumps(("progress", update)))

    with suppress(EOFError, OSError):  # the parent is gone
        pipe.send_bytes(pickle.dumps(("ready", None)))
        while True:
            job = pipe.recv()
            with _followed(tell if followed else None):
                answer = run_job(task, job, stop)
            pipe.send_bytes(serialize(answer))


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and one at work does not look at its pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
