"""Shared parts of the tools: paths and progress.

Progress is a bar on a terminal and plain lines elsewhere. Both include the remaining time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import Self

from megatron_vocagno.command import duration
from megatron_vocagno.corpus.places import Place

EVERY, EVERY_VERBOSE = 30.0, 5.0
"""Shortest time between two plain lines about work in progress, in seconds."""


class Terminal(Console):
    """The console for results and progress."""

    def on_broken_pipe(self) -> None:
        """Raise the error, so that the command chooses the exit code. rich would exit with code 1."""
        self.quiet = True
        raise


class WorkProgress:
    """A progress bar or plain lines. Subclasses count in their own unit, such as bytes or tokens."""

    def __init__(self, console: Console, begin: str, verbose: bool = False, plain: bool = False) -> None:
        """begin: first text before the bar. plain: print lines even on a terminal."""
        self.console = console
        self.shown = console.is_terminal and not plain and not console.quiet
        self.verbose, self.every = verbose, EVERY_VERBOSE if verbose else EVERY
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
        self.bar = Progress(*columns, console=console, disable=not self.shown)
        self.task = self.bar.add_task(begin, total=None, rate="")
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self) -> None:
        """Start the clock for rates and the remaining time."""
        self.started = self.last_line = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def show(self, description: str, done: float, total: float, rate: str) -> None:
        """Update the bar, or print a line if enough time has passed since the last one."""
        self.bar.update(self.task, description=description, completed=done, total=total, rate=rate)
        if not self.shown and time.monotonic() - self.last_line > self.every:
            self.line(f"{description}: {rate}{self.left(done, total)}")

    def left(self, done: float, total: float) -> str:
        """The remaining time, such as `, eta 12m`; "" if it is unknown. done: amount of work since `start`."""
        return f", eta {duration(self.seconds * (total - done) / done)}" if 0 < done < total else ""

    def line(self, text: str) -> None:
        self.last_line = time.monotonic()
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


P = TypeVar("P", bound=Place)


def absolute(where: P) -> P:
    """The absolute path, without `..`, because workers may run in another folder. A link keeps its name."""
    if not isinstance(where, Path):
        return where
    if ".." not in where.parts:
        return where.absolute()
    return where.resolve() if where.name == ".." else where.parent.resolve() / where.name
