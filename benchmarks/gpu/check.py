"""Run the parts, each in a process with a time limit, and write their rows after each part."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from benchmarks.gpu.page import Part, Report, State, table
from benchmarks.gpu.record import Record
from megatron_vocagno.errors import UserError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "gpu"
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL, and after it."""


class CannotCheckError(UserError):
    """There is nothing to measure, or no place for the results."""


@dataclass(frozen=True)
class Plan:
    """A part, and how it is started."""

    name: str
    share: float
    """Its time limit, relative to those of the other parts. Time that a part does not use goes to later parts."""
    checks: bool = True
    """Whether it is an error if the part reaches its time limit, because then its checks are incomplete. The part `tests` repeats
    and extends other checks, and compiles for minutes."""
    command: tuple[str, ...] = (sys.executable, "-m", "benchmarks.gpu")


PARTS = (
    Plan("card", 8, checks=False),  # the first import of torch can take long
    Plan("ceilings", 6, checks=False),
    Plan("kernels", 18),
    Plan("heads", 20, checks=False),
    Plan("step", 18, checks=False),
    Plan("teachers", 12, checks=False),
    Plan("quickstart", 20),
    Plan("tests", 15, checks=False),
)


def check(options: argparse.Namespace, parts: Sequence[Plan] = PARTS) -> int:
    """Run the parts and write their results. Returns 1 if a check failed, a part crashed, or checks are incomplete.

    Raises CannotCheckError: no GPU, or no folder for a rehearsal.
    """
    folder = _folder(options)
    begin = time.monotonic()
    report = Report(command=_command(options), day=date.today(), rehearsal=options.rehearse)
    with TemporaryDirectory(prefix="gpu-check-") as records:
        for number, plan in enumerate(parts):
            left = begin + 60 * options.minutes - time.monotonic()
            limit = left * plan.share / sum(later.share for later in parts[number:])
            part = run_part(plan, Path(records), limit, options.rehearse)
            report.parts.append(part)
            if not options.rehearse and "card" not in report.facts:
                raise CannotCheckError(f"nothing was measured: {part.reason}")
            report.seconds = time.monotonic() - begin
            report.write(folder)
            print(_line(part), flush=True)
    print(f"\n{table(report.parts)}\n\n{report.heading}\nwritten: {folder / report.name}.json and .md")
    return int(any(part.failed for part in report.parts))


def _folder(options: argparse.Namespace) -> Path:
    folder: Path = options.out or DOCS
    if options.rehearse and (options.out is None or folder.resolve().is_relative_to(DOCS)):
        raise CannotCheckError(f"the figures of a rehearsal are meaningless: choose a folder that is not {DOCS}, with --out")
    return folder


def _command(options: argparse.Namespace) -> str:
    return f"python -m benchmarks.gpu --minutes {options.minutes:g}{' --rehearse' if options.rehearse else ''}"


def _line(part: Part) -> str:
    reason = f": {part.reason.splitlines()[-1]}" if part.reason else ""
    bad = sum(row.failed for row in part.record.rows)
    return f"{part.name:10} {part.state:10} {part.seconds:5.0f} s  {len(part.record.rows):3} rows, {bad} failed{reason}"


def run_part(plan: Plan, records: Path, limit: float, rehearse: bool) -> Part:
    """Run a part until its end or its time limit, in seconds. Its processes have ended when this function returns."""
    file, log = records / f"{plan.name}.json", records / f"{plan.name}.log"
    arguments = ["--part", plan.name, "--record", str(file), "--seconds", f"{limit:.0f}"]
    command = [*plan.command, *arguments, *(["--rehearse"] if rehearse else [])]
    begin = time.monotonic()
    with log.open("wb") as output, _process(command, output, _environment(rehearse)) as process:
        try:
            code: int | None = process.wait(timeout=max(limit, 0.0))
        except subprocess.TimeoutExpired:
            code = None
    record = Record.read(file)
    state, reason = _state(code, record, log)
    return Part(plan.name, state, reason, time.monotonic() - begin, record, must_end=plan.checks)


def _state(code: int | None, record: Record, log: Path) -> tuple[State, str]:
    if code is None:
        return "time limit", "ended by its time limit, so later rows are missing"
    if code:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return "crashed", "\n".join(lines[-6:]) or f"exit code {code}"
    return ("skipped", record.skipped) if record.skipped else ("finished", "")


def _environment(rehearse: bool) -> dict[str, str]:
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))), "HF_HUB_OFFLINE": "1"}
    if rehearse:  # Triton reads its variable when a kernel is defined
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return os.environ | variables


@contextmanager
def _process(command: Sequence[str], output: IO[bytes], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a new group. At the end of the block the whole group is ended, also after Ctrl-C."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything that it has started. Its children may be there after it has ended."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=GRACE)
    until = time.monotonic() + GRACE
    with suppress(ProcessLookupError):
        while time.monotonic() < until:  # a zombie that no process reaps stays in its group
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.01)
