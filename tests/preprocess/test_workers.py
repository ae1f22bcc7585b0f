"""Workers of this machine, beside what `test_engines` asks of every engine; no worker outlives its use."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess import workers
from megatron_vocagno.preprocess.workers import report, run_job, run_local, serialize, unwrap
from tests.preprocess.tasks import (
    HasLock,
    NeedsTwo,
    children,
    fail,
    log_and_wait,
    report_often,
    runs,
    square,
    square_or_never_end,
    wait_until,
)

# ---- results


@pytest.mark.slow
def test_jobs_are_begun_in_their_order(tmp_path):
    assert len(list(run_local(log_and_wait, [(tmp_path, i) for i in range(40)], 2))) == 40
    begun = [int(line) for line in (tmp_path / "begun").read_text().split()]
    assert all(abs(i - job) <= 2 for i, job in enumerate(begun)) and len(begun) == 40


@pytest.mark.parametrize("job", [4, 5])
def test_of_an_error_that_cannot_be_sent_the_text_arrives(job):
    answer = run_job(fail, job, (NeedsTwo, HasLock))
    kind, text = type(answer[1]).__name__, str(answer[1])
    with pytest.raises(CorpusError, match=rf"in fail\n(.|\n)*{kind}: {text}"):
        unwrap(job, pickle.loads(serialize(answer)))


# ---- deaths


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
def test_random_kills_lose_nothing():
    chosen, killed = random.Random(7), Counter()
    results = run_local(square, range(1500), 2)
    got = []
    for result in results:
        got.append(result)
        if len(got) % 140 == 0:
            victim = chosen.choice(multiprocessing.active_children())
            victim.kill()
            killed[victim.pid] += 1
    assert sorted(got) == [i * i for i in range(1500)]
    assert killed.total() >= 10


# ---- what workers tell


@pytest.mark.parametrize("n_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_reports_arrive_a_few_a_second(n_workers):
    heard = []
    assert sorted(run_local(report_often, range(3), n_workers, on_progress=heard.append)) == [0, 1, 2]
    assert {job for job, _ in heard} == {0, 1, 2}
    assert 3 * 2 <= len(heard) <= 3 * 3
    assert len({pid for _, pid in heard}) == n_workers and (os.getpid() in {pid for _, pid in heard}) == (n_workers == 1)
    # nobody listens
    assert sorted(run_local(report_often, range(n_workers), n_workers)) == list(range(n_workers))
    report("outside of any job")


# ---- the end


@pytest.mark.slow
@pytest.mark.parametrize("how", ["close", "drop", "error in the loop"])
def test_workers_end_with_the_iterator(how, tmp_path):
    jobs = [tmp_path, *range(50)]
    results = run_local(square_or_never_end, jobs, 2)
    next(results)
    assert len(multiprocessing.active_children()) == 2
    if how == "close":
        results.close()
    elif how == "drop":
        del results
    else:
        with pytest.raises(ZeroDivisionError):
            for _ in run_local(square_or_never_end, jobs, 2):
                raise ZeroDivisionError
        results.close()
    assert not multiprocessing.active_children()


RUN_FOR_EVER = """
import signal, sys, time
from pathlib import Path
from megatron_vocagno.preprocess.workers import run_local
from tests.preprocess.tasks import never_end

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
