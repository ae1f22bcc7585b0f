"""One run at a time in an output folder that all ranks see. A second run waits for the first, for a limited time."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vocagno.errors import RunLockedError, SharedError
from megatron_vocagno.files import local_option
from megatron_vocagno.training import run_lock
from megatron_vocagno.training.run_lock import LOCK, RunLock
from tests import runs
from tests.runs import Case, spawn, spawn_each


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of one rank, without a process group."""
    monkeypatch.setattr(run_lock, "run_on_rank0", lambda action, *_: action())
    monkeypatch.setattr(run_lock, "all_gather", lambda item: [item])
    monkeypatch.setattr(run_lock, "my_rank", lambda: 0)


def nobody() -> int:
    return 0


def test_the_second_run_waits_reports_and_fails_until_the_first_has_ended(tmp_path: Path, alone: None) -> None:
    said: list[str] = []
    first, second = RunLock(tmp_path / "out", timeout=0), RunLock(tmp_path / "out", timeout=1)
    assert first.acquire(said.append, nobody) == 0 and not said
    with pytest.raises(RunLockedError):
        second.acquire(said.append, nobody)
    assert said == [f"another run is using {tmp_path / 'out'}: waiting up to 1 s for it to end"]
    first.close()
    assert second.acquire(said.append, nobody) == 0 and len(said) == 1
    second.close()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


def test_a_requested_stop_ends_the_wait_at_once_without_a_lock(tmp_path: Path, alone: None) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire(pytest.fail, nobody)
    start = time.monotonic()
    assert second.acquire(lambda _: None, lambda: signal.SIGTERM) == signal.SIGTERM
    assert time.monotonic() - start < 5 and second._lock is None
    first.close()
    # one that need not wait begins, and leaves before its first step
    assert second.acquire(pytest.fail, lambda: signal.SIGTERM) == 0
    second.close()


def test_a_run_starts_on_a_file_system_without_locks_and_reports_it(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said: list[str] = []
    assert RunLock(tmp_path).acquire(said.append, nobody) == 0
    assert said == [f"note: the file system of {tmp_path} has no locks: two runs in this folder would not notice each other"]


def test_probe_files_are_removed_after_a_failure_and_after_a_killed_run(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, own = tmp_path / f".seen-by-all-{'0a' * 16}", tmp_path / ".seen-by-all-of-us"
    left.touch()
    own.touch()
    monkeypatch.setattr(run_lock, "_becomes_visible", lambda file, content: not file.exists())
    with pytest.raises(SharedError, match="not all ranks see the"):
        RunLock(tmp_path).acquire(pytest.fail, nobody)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, own.name}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("rw,localflock,lazystatfs", "localflock"),
        ("rw,vers=3,nolock,proto=tcp", "nolock"),
        ("rw,vers=3,local_lock=all", "local_lock=all"),
        ("rw,vers=4.2,local_lock=none,flock", None),
    ],
)
def test_a_mount_whose_locks_hold_on_one_machine_is_known_by_its_options(tmp_path: Path, options: str, found: str | None) -> None:
    place = tmp_path / "a folder"
    place.mkdir()
    mounts = tmp_path / "mounts"
    other = "server:/x / nfs rw,nolock 0 0\n" if found is None else "none / ext4 rw 0 0\n"
    mounts.write_text(f"{other}server:/y {str(place).replace(' ', chr(92) + '040')} nfs {options} 0 0\n")
    assert local_option(place / "runs" / "mine", mounts) == found
    assert local_option(tmp_path, mounts) == ("nolock" if found is None else None)


@pytest.mark.slow
def test_ranks_that_see_different_folders_are_refused_before_the_first_step(case: Case, tmp_path: Path) -> None:
    """A relative `output`, and a working directory of each rank's own: as with disks of each machine's own."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    arguments = case.command("unshared", ["output=out", "training.steps=1", "eval.rows=4"])
    codes, said = spawn_each([arguments, arguments], folders)
    assert codes == [2, 2] and "Traceback" not in said and "step 1" not in said, (codes, said)
    host = os.uname().nodename
    assert (
        f"error: not all ranks see the 'output' folder of rank 0 ({tmp_path}/one/out on {host}):\n"
        f"  rank 1 on {host}: {tmp_path}/two/out\n"
        "  A file that rank 0 wrote there was not visible to 1 of 2 ranks within 10 s. "
    ) in said
    assert said.count("error: ") == 1
    assert [path.name for path in (tmp_path / "one" / "out").iterdir()] == [LOCK] and not (tmp_path / "two" / "out").exists()


TAKE = """
import os, socket, subprocess, sys
from pathlib import Path
from megatron_vocagno.training.run_lock import RunLock
from megatron_vocagno.engine.processes import start, stop
from tests.forked import enter_own_namespaces
folder, lock, other = sys.argv[1:]
if os.environ["RANK"] == "1":
    enter_own_namespaces()
    socket.sethostname("another-host")
    if other:
        subprocess.run(["mount", "--bind", other, lock], check=True)
processes = start()
held = RunLock(Path(folder))
assert held.acquire(lambda text: sys.stdout.write(f"{processes.rank}: {text}\\n"), lambda: 0) == 0
stop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("local", [True, False])
def test_locks_that_another_machine_does_not_see_are_reported(tmp_path: Path, local: bool) -> None:
    """The second rank has another host's name; and, where locks are local, a lock file that is not the first one's."""
    out, other = tmp_path / "out", tmp_path / "other-lock"
    out.mkdir()
    (out / LOCK).touch()
    other.touch()
    taken = spawn(2, [str(out), str(out / LOCK), str(other) if local else ""], ("-c", TAKE))
    if taken.returncode == 77:
        pytest.skip("no mount and no name of its own: unshare is not allowed here")
    assert taken.returncode == 0, taken.stdout
    host = os.uname().nodename
    note = (
        f"note: rank 1 on another-host could acquire the lock that rank 0 on {host} holds: "
        "two runs in this folder would not notice each other"
    )
    assert (f"0: {note}\n" in taken.stdout) == local, taken.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to", "code"), [(signal.SIGUSR1, [1], 0), (signal.SIGTERM, [0], 0), (signal.SIGINT, [0, 1], 130)]
)
def test_a_signal_while_it_waits_for_the_folder_ends_all_ranks_at_once(
    case: Case, number: signal.Signals, to: list[int], code: int
) -> None:
    arguments, output = case.command("waiting", ["training.steps=1", "eval.rows=4"]), case.out("waiting")
    output.mkdir(exist_ok=True)
    answer: list[Any] = []
    with (output / LOCK).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: answer.append(spawn_each([arguments] * 2)))
        thread.start()
        ranks = waiting_ranks(output, 2)
        start = time.monotonic()
        for rank in to:
            ranks[rank].send_signal(number)
        thread.join()
        assert time.monotonic() - start < 20, "and not after the five minutes of its timeout"
    codes, said = answer[0]
    assert codes == [code, code] and "Traceback" not in said, (codes, said)
    if code == 0:
        assert f"stopped while it waited for {output}: {number.name}; nothing was written" in said
    assert [path.name for path in output.iterdir()] == [LOCK]


def waiting_ranks(output: Path, number: int) -> list[psutil.Process]:
    """All ranks, once the first of them has told that it waits."""
    server = psutil.Process(runs.forks()[1])
    end = time.monotonic() + 120
    while time.monotonic() < end:
        ranks = sorted(server.children(), key=lambda process: process.pid)
        said = Path(f"/proc/{ranks[0].pid}/fd/1") if len(ranks) == number else None
        # a new rank still has the standard output of its server, which is a pipe
        if said is not None and said.resolve().is_file() and f"another run is using {output}" in said.read_text():
            return ranks
        time.sleep(0.05)
    raise AssertionError("it never came to wait")


@pytest.mark.slow
def test_a_run_starts_once_the_other_has_left_its_folder(case: Case) -> None:
    arguments, output = case.command("occupied", ["training.steps=1", "eval.rows=4"]), case.out("occupied")
    output.mkdir()
    answer: list[Any] = []
    with (output / LOCK).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: answer.append(spawn(1, arguments)))
        thread.start()
        waiting_ranks(output, 1)
        assert not (output / "checkpoints").exists()
        fcntl.flock(other, fcntl.LOCK_UN)
        thread.join()
    assert answer[0].returncode == 0, answer[0].stdout[-3000:]
    assert "another run is using " in answer[0].stdout and "finished: step 1" in answer[0].stdout
