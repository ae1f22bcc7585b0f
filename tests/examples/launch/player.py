"""Stands where `python` does for a launch script: ranks that only play, so that the script's own conduct is seen in no time.

PLAY in the environment: for each start of the job, for each rank, words joined by `+` that it does in turn: `save` writes a
checkpoint, `finish` says that the last step was reached, `wait` waits for a signal, `die` is killed, a number is its exit code.

A command of `tools` is only recorded, as a line of OUTPUT/commands.jsonl: `run_recorded` runs it later.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def install(folder: Path, *starts: list[str]) -> dict[str, str]:
    """A command `python` in `folder`/bin; the variables with which it is found."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{Path(__file__).resolve()}" "$@"\n')
    python.chmod(0o755)
    return {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PLAY": json.dumps(starts), "OUTPUT": str(folder)}


def recorded(folder: Path) -> list[tuple[str, list[str], dict[str, str]]]:
    """Module, arguments, and the variables that tell a rank its place, in the order of the starts."""
    return [tuple(json.loads(line)) for line in (folder / "commands.jsonl").read_text().splitlines()]


def run_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process."""
    for module, arguments, place in recorded(folder):
        with monkeypatch.context() as patch:
            for name, value in place.items():
                patch.setenv(name, value)
            assert importlib.import_module(module).main(arguments) == 0, arguments


def play(output: Path, words: str) -> None:
    def leave(number: int, frame: FrameType | None) -> None:
        (output / f"{signal.Signals(number).name}-{os.environ['RANK']}").touch()
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGUSR1, leave)
    (output / f"rank-{os.environ['RANK']}").write_text(" ".join(os.environ[name] for name in NAMES))
    for word in words.split("+"):
        match word:
            case "save":
                (output / "checkpoints").mkdir(exist_ok=True)
                (output / "checkpoints" / "latest").write_text(f"step-{time.monotonic_ns()}")
            case "finish":
                (output / "finished").touch()
            case "wait":
                time.sleep(1000)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case code:
                sys.exit(int(code))


def main() -> None:
    output = Path(os.environ["OUTPUT"])
    if sys.argv[1] == "-m" and sys.argv[2].startswith("tools."):
        place = {name: os.environ[name] for name in PLACE if name in os.environ}
        with (output / "commands.jsonl").open("a") as file:
            file.write(json.dumps([sys.argv[2], sys.argv[3:], place]) + "\n")
    elif sys.argv[1] == "-c":
        print(output)  # what a script asks the printed configuration for
    elif "--print-config" in sys.argv:
        print(json.dumps({"output": str(output)}))
    else:
        starts = json.loads(os.environ["PLAY"])
        play(output, starts[int(os.environ.get("SLURM_RESTART_COUNT", 0))][int(os.environ["RANK"]) % len(starts[0])])


if __name__ == "__main__":
    main()
