"""Workers of this machine: what becomes of jobs whose task fails or whose worker dies, and that no worker outlives its use."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess import workers
from megatron_vocagno.preprocess.workers import ONE_THREAD, REPORT_SECONDS, JobFailure, report, run_local

both = pytest.mark.parametrize("n_workers", [1, pytest.param(2, marks=pytest.mark.slow)])


# ---- tasks


def square(job: int) -> int:
    return job * job


class Panic(BaseException):
    """As Rust code raises it."""


class NeedsTwo(Exception):
    """Can be pickled, but not unpickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class HasLock(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


ERRORS = {
    1: CorpusError("line 7 is bad"),
    2: ZeroDivisionError("division"),
    3: Panic("index out of bounds"),
    4: NeedsTwo(1, 2),
    5: HasLock(),
}


def fail(job: int) -> int:
    if job in ERRORS:
        raise ERRORS[job]
    return job


def result_with_lock(job: int) -> object:
    return threading.Lock() if job == 1 else job


def die(job: tuple[Path, int], times: int, how: int) -> int:
    """Job 2 kills its worker at its first attempts, by a signal or with an exit status."""
    folder, i = job
    if i == 2 and len(list(folder.iterdir())) < times:
        (folder / str(os.getpid())).touch()
        os.kill(os.getpid(), -how) if how < 0 else os._exit(how)
    return i * i


def log_and_wait(job: tuple[Path, int]) -> int:
    with (job[0] / "begun").open("a") as file:
        file.write(f"{job[1]}\n")
    time.sleep(0.02)
    return job[1]


def environment(job: str) -> str | None:
    return os.environ.get(job)


def report_often(job: int) -> int:
    began = time.monotonic()
    while time.monotonic() - began < 2.2 * REPORT_SECONDS:
        report((job, os.getpid()))
        time.sleep(0.001)
    return job


def never_end(job: Path) -> None:
    """In Python; tells its process id."""
    (job / str(os.getpid())).touch()
    while True:
        sum(range(1000))


# ---- results and failures


@both
def test_every_job_has_its_result(n_workers):
    assert sorted(run_local(square, range(20), n_workers)) == [i * i for i in range(20)]
    assert list(run_local(square, [], n_workers)) == []


@pytest.mark.slow
def test_jobs_are_begun_in_their_order(tmp_path):
    assert len(list(run_local(log_and_wait, [(tmp_path, i) for i in range(40)], 2))) == 40
    begun = [int(line) for line in (tmp_path / "begun").read_text().split()]
    assert all(abs(i - job) <= 2 for i, job in enumerate(begun)) and len(begun) == 40


@both
def test_what_a_task_raises_is_the_failure_of_its_job_alone(n_workers):
    results = list(run_local(fail, range(8), n_workers))
    failures = {r.job: r.reason for r in results if isinstance(r, JobFailure)}
    assert sorted(r for r in results if not isinstance(r, JobFailure)) == [0, 6, 7]
    assert failures.keys() == ERRORS.keys()
    assert failures[1] == "line 7 is bad"
    for job in (2, 3, 4, 5):
        assert "in fail" in failures[job] and f"{type(ERRORS[job]).__name__}: {ERRORS[job]}" in failures[job]


@both
@pytest.mark.parametrize(("job", "stop"), [(1, CorpusError), (2, ArithmeticError)])
def test_what_the_caller_names_ends_everything(n_workers, job, stop):
    results = run_local(fail, [0, job, 6, 7], n_workers, stop=(KeyError, stop))
    with pytest.raises(type(ERRORS[job]), match=str(ERRORS[job])) as error:
        for result in results:
            assert result in (0, 6, 7)
    assert n_workers == 1 or any("in fail" in note for note in error.value.__notes__)
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("job", [4, 5])
def test_of_an_error_that_cannot_be_sent_the_text_arrives(job):
    with pytest.raises(CorpusError, match=rf"in fail\n(.|\n)*{type(ERRORS[job]).__name__}: {ERRORS[job]}"):
        list(run_local(fail, [job, 0], 2, stop=(NeedsTwo, HasLock)))


@pytest.mark.slow
def test_a_result_that_cannot_be_sent_is_a_failure():
    results = list(run_local(result_with_lock, [0, 1, 2], 2))
    assert {r for r in results if not isinstance(r, JobFailure)} == {0, 2}
    (failure,) = [r for r in results if isinstance(r, JobFailure)]
    assert failure.job == 1 and "cannot be sent" in failure.reason and "lock" in failure.reason


# ---- deaths


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_a_killed_worker_is_replaced(times, tmp_path):
    task = partial(die, times=times, how=-9)
    assert sorted(run_local(task, [(tmp_path, i) for i in range(5)], 2)) == [0, 1, 4, 9, 16]
    assert len(list(tmp_path.iterdir())) == times


@pytest.mark.slow
@pytest.mark.parametrize(("how", "words"), [(-9, "by signal 9 (Killed)"), (-40, "by signal 40"), (7, "with exit status 7")])
def test_the_third_death_at_one_job_is_its_failure(how, words, tmp_path):
    task = partial(die, times=10, how=how)
    results = list(run_local(task, [(tmp_path, i) for i in range(5)], 2))
    assert sorted(r for r in results if not isinstance(r, JobFailure)) == [0, 1, 9, 16]
    (failure,) = [r for r in results if isinstance(r, JobFailure)]
    assert failure.job == (tmp_path, 2) and words in failure.reason and "3 workers died" in failure.reason
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_a_worker_killed_while_another_starts_costs_nothing(monkeypatch):
    """The moment at which a pool of concurrent.futures hangs."""
    killed = kill_starting_workers(monkeypatch, 4)
    assert sorted(run_local(square, range(3), 2)) == [0, 1, 4]
    assert len(killed) == 4


@pytest.mark.slow
def test_workers_that_never_start_end_the_run(monkeypatch, tmp_path, capfd):
    killed = kill_starting_workers(monkeypatch, 1000)
    with pytest.raises(CorpusError, match=r"cannot start.*signal 9"):
        list(run_local(square, range(3), 2))
    assert len(killed) >= workers.FALSE_STARTS
    monkeypatch.undo()
    module = tmp_path / "broken_after_import.py"
    module.write_text("def task(job): ...")
    monkeypatch.syspath_prepend(tmp_path)
    task = importlib.import_module(module.stem).task
    module.write_text("raise ImportError('its package is gone')")
    with pytest.raises(CorpusError, match=r"cannot start.*exit status 1"):
        list(run_local(task, range(3), 2))
    assert capfd.readouterr().err.count("ImportError: its package is gone") <= 2


def kill_starting_workers(monkeypatch, n: int) -> list[int]:
    """The first n workers, each at once. Returns their process ids as they come."""
    killed: list[int] = []
    process = multiprocessing.get_context("spawn").Process
    start = process.start

    def start_and_kill(self):
        start(self)
        if len(killed) < n:
            os.kill(self.pid, 9)
            killed.append(self.pid)

    monkeypatch.setattr(process, "start", start_and_kill)
    return killed


@pytest.mark.slow
def test_twenty_random_kills_lose_nothing():
    chosen, killed = random.Random(7), Counter()
    results = run_local(square, range(3000), 2)
    got = []
    for result in results:
        got.append(result)
        if len(got) % 140 == 0:
            victim = chosen.choice(multiprocessing.active_children())
            victim.kill()
            killed[victim.pid] += 1
    assert sorted(got) == [i * i for i in range(3000)]
    assert killed.total() >= 20


# ---- what workers are given, and tell


@pytest.mark.slow
def test_workers_have_one_thread_and_this_process_keeps_its_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = dict(os.environ)
    assert sorted(run_local(environment, list(ONE_THREAD), 2)) == sorted(ONE_THREAD.values())
    assert dict(os.environ) == before


@both
def test_reports_arrive_a_few_a_second(n_workers):
    heard = []
    assert sorted(run_local(report_often, range(4), n_workers, on_progress=heard.append)) == [0, 1, 2, 3]
    assert {job for job, _ in heard} == {0, 1, 2, 3}
    assert 4 * 2 <= len(heard) <= 4 * 3
    assert len({pid for _, pid in heard}) == n_workers and (os.getpid() in {pid for _, pid in heard}) == (n_workers == 1)
    # nobody listens
    assert sorted(run_local(report_often, range(2), n_workers)) == [0, 1]
    report("outside of any job")


# ---- the end


@pytest.mark.slow
@pytest.mark.parametrize("how", ["close", "drop", "error in the loop"])
def test_workers_end_with_the_iterator(how, tmp_path):
    jobs = [tmp_path, *range(50)]
    results = run_local(sleep_or_never_end, jobs, 2)
    next(results)
    assert len(multiprocessing.active_children()) == 2
    if how == "close":
        results.close()
    elif how == "drop":
        del results
    else:
        with pytest.raises(ZeroDivisionError):
            for _ in run_local(sleep_or_never_end, jobs, 2):
                raise ZeroDivisionError
        results.close()
    assert not multiprocessing.active_children()


def sleep_or_never_end(job: Path | int) -> int:
    if isinstance(job, Path):
        never_end(job)
    return 1


RUN_FOR_EVER = """
import signal, sys, time
from pathlib import Path
from megatron_vocagno.preprocess.workers import run_local
from tests.preprocess.test_workers import never_end

def interrupted_while_busy(*_):
    time.sleep(0.5)
    raise KeyboardInterrupt

if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted_while_busy)
    list(run_local(never_end, [Path(sys.argv[1])] * 2, 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "to_group", "when"),
    [
        (signal.SIGINT, True, "at work"),
        (signal.SIGINT, True, "starting"),
        (signal.SIGINT, False, "at work"),
        (signal.SIGTERM, False, "at work"),
        (signal.SIGKILL, False, "at work"),
    ],
)
def test_no_worker_outlives_its_parent(sent, to_group, when, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RUN_FOR_EVER)
    told = tmp_path / "told"
    told.mkdir()
    with subprocess.Popen(
        [sys.executable, script, told],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        if when == "starting":
            wait_until(lambda: len(children(parent.pid)) >= 2)
        else:
            wait_until(lambda: len(list(told.iterdir())) == 2)
        started = children(parent.pid)
        began = time.monotonic()
        (os.killpg if to_group else os.kill)(parent.pid, sent)
        assert parent.wait(timeout=10) == -sent
        wait_until(lambda: not any(map(runs, started)))
        assert time.monotonic() - began < 3 and len(started) >= 2
        errors = parent.stderr.read()
    interrupted = sent == signal.SIGINT
    assert errors.count("Traceback") == interrupted and errors.endswith("\nKeyboardInterrupt\n") == interrupted


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Neither gone nor waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)
