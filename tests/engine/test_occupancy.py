"""One run at a time in an output folder: the second waits for the first, and does not wait for ever."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vocagno.engine.occupancy import LOCK, Occupancy
from tests.runs import REPOSITORY, SCRIPT, Case, environment


def test_the_second_waits_says_so_and_gives_up_until_the_first_has_left(tmp_path: Path) -> None:
    said: list[str] = []
    first, second = Occupancy(tmp_path / "out", patience=0), Occupancy(tmp_path / "out", patience=1)
    assert first._take(said.append) and not said
    assert not second._take(said.append)
    assert said == [f"another run is at work in {tmp_path / 'out'}: waiting up to 1 s for it to end"]
    first.close()
    assert second._take(said.append) and len(said) == 1
    second.close()


def test_a_file_system_without_locks_keeps_no_run_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert Occupancy(tmp_path)._take(pytest.fail)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_starts_once_the_other_has_left_its_folder(case: Case) -> None:
    arguments, output = case.command("occupied", ["training.steps=1", "eval.rows=4"]), case.out("occupied")
    output.mkdir()
    with (output / LOCK).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        command = [sys.executable, SCRIPT, *arguments]
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout is not None
            said = next((line for line in second.stdout if "another run" in line), None)
            assert said is not None and not (output / "checkpoints").exists()
            fcntl.flock(other, fcntl.LOCK_UN)
            assert "finished: step 1" in second.stdout.read()
    assert second.returncode == 0
