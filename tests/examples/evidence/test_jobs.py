"""No job outlives its command, even if the command is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

# jobs of tests are in this small module, because the process of a job imports the module of its function


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


def test_a_killed_command_leaves_no_job_behind(tmp_path: Path) -> None:
    sleeper = tmp_path / "pid"
    program = f"""
from functools import partial
from pathlib import Path
from examples.evidence import jobs
from tests.examples.evidence.test_jobs import sleep_after_writing_pid

jobs.PRELOADED = "json"  # this job does not need DeepSpeed
job = jobs.Job("sleeps", Path({str(tmp_path / "log")!r}), partial(sleep_after_writing_pid, Path({str(sleeper)!r})))
if __name__ == "__main__":
    jobs.work([job], 1)
"""
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
