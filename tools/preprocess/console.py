"""What the tools share: the part of a job array that is asked for, and what is told while work goes on.

A bar on a terminal, plain lines elsewhere, both with the time that is left.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_vocagno.command import duration
from megatron_vocagno.corpus.places import Place
from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.plan import Slice

EVERY, EVERY_VERBOSE = 30.0, 5.0
"""Seconds between plain lines, at least, where nothing ends meanwhile."""


class Terminal(Console):
    """Where results go, and progress."""

    def on_broken_pipe(self) -> None:
        """rich would leave with exit code 1; the command decides that."""
        self.quiet = True
        raise


class WorkProgress:
    """The bar, or the plain lines. What is counted has a unit of its own, such as bytes or tokens."""

    def __init__(self, console: Console, begin: str, verbose: bool = False, plain: bool = False) -> None:
        """begin: stands before the bar. plain: no bar, also on a terminal."""
        self.console = console
        self.shown = console.is_terminal and not plain and not console.quiet
        self.verbose, self.every = verbose, EVERY_VERBOSE if verbose else EVERY
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
        self.bar = Progress(*columns, console=console, disable=not self.shown)
        self.task = self.bar.add_task(begin, total=None, rate="")
        self.started = self.told = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self) -> None:
        """The clock of rates and of what is left."""
        self.started = self.told = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def show(self, description: str, done: float, total: float, rate: str) -> None:
        """How far it is: on the bar, or from time to time as a line."""
        self.bar.update(self.task, description=description, completed=done, total=total, rate=rate)
        if not self.shown and time.monotonic() - self.told > self.every:
            self.line(f"{description}: {rate}{self.left(done, total)}")

    def left(self, done: float, total: float) -> str:
        """`, eta 12m`, once it can be known. done: by this run, since `start`."""
        return f", eta {duration(self.seconds * (total - done) / done)}" if 0 < done < total else ""

    def line(self, text: str) -> None:
        self.told = time.monotonic()
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


P = TypeVar("P", bound=Place)


def absolute(where: P) -> P:
    """A path as workers find it, who start elsewhere, and people read it: without `..`. A link keeps its name."""
    if not isinstance(where, Path):
        return where
    if ".." not in where.parts:
        return where.absolute()
    return where.resolve() if where.name == ".." else where.parent.resolve() / where.name


def slice_of(text: str) -> Slice:
    """For argparse: "2/8" is the second of eight parts."""
    i, _, n = text.partition("/")
    try:
        return Slice(int(i), int(n))
    except (ValueError, CorpusError):
        raise argparse.ArgumentTypeError(f"{text}: two numbers are needed, I/N with I from 1 to N") from None
