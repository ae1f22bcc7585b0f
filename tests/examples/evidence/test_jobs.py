"""Jobs: what they say is in their logs, the first failure ends all, and none outlives the command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from examples.evidence.jobs import Job, JobFailed, work


def say(word: str) -> None:
    print(word)


def fail_beside(file: Path) -> None:
    assert eventually(file.exists)
    print("reading the corpus")
    raise SystemExit(3)


def sleep_after_writing_pid(file: Path) -> None:
    file.with_suffix(".tmp").write_text(str(os.getpid()))
    file.with_suffix(".tmp").rename(file)
    time.sleep(300)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


def eventually(found, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found():
            return True
        time.sleep(0.1)
    return False


def test_each_job_writes_its_own_log_and_the_first_failure_ends_the_others(tmp_path: Path) -> None:
    told: list[str] = []
    words = [Job(word, tmp_path / f"{word}.log", partial(say, word)) for word in ("one", "two", "three")]
    work(words, 2, told.append)
    assert [(tmp_path / f"{job.name}.log").read_text().splitlines()[0] for job in words] == ["one", "two", "three"]
    assert sorted(line.split()[1] for line in told) == ["one", "three", "two"] and told[-1].startswith("3/3")
    sleeper = tmp_path / "pid"
    jobs = [Job("sleeps", tmp_path / "sleeps.log", partial(sleep_after_writing_pid, sleeper))]
    jobs.append(Job("fails", tmp_path / "fails.log", partial(fail_beside, sleeper)))
    with pytest.raises(JobFailed, match=r"(?s)fails ended with exit code 3; .*fails\.log ends:\nreading the corpus"):
        work(jobs, 2, told.append)
    assert not is_running(int(sleeper.read_text()))


def test_a_killed_command_leaves_no_job_behind(tmp_path: Path) -> None:
    sleeper = tmp_path / "pid"
    program = (
        "from functools import partial; from pathlib import Path; from examples.evidence.jobs import Job, work\n"
        "from tests.examples.evidence.test_jobs import sleep_after_writing_pid as sleep\n"
        f"job = Job('sleeps', Path({str(tmp_path / 'log')!r}), partial(sleep, Path({str(sleeper)!r})))\n"
        "if __name__ == '__main__': work([job], 1)"
    )
    path = tmp_path / "program.py"
    path.write_text(program)
    root = Path(__file__).parents[3]
    command = subprocess.Popen([sys.executable, str(path)], env=os.environ | {"PYTHONPATH": str(root)}, cwd=root)
    try:
        assert eventually(sleeper.exists), "the job has not begun"
        pid = int(sleeper.read_text())
        assert is_running(pid)
    finally:
        command.kill()
        command.wait()
    assert eventually(lambda: not is_running(pid), 20)
