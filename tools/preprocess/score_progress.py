"""How a scoring is told to people: a bar on a terminal, plain lines elsewhere, and at the end what came out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from megatron_vocagno.corpus.manifest import TeacherLosses
from megatron_vocagno.corpus.workers import Failure
from megatron_vocagno.offline.shard import Job, Result
from megatron_vocagno.offline.shard import Progress as ShardProgress

EVERY = 30.0  # seconds between plain lines, where no shard ends


class ScoreProgress:
    """Hears of the jobs, of scored shards, and of how far the others are."""

    def __init__(self, console: Console, name: str = "") -> None:
        """name: of this process, where several share the work; they write plain lines."""
        self.console, self.name = console, name
        self.shown = console.is_terminal and not name
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
        self.bar = Progress(*columns, console=console, disable=not self.shown)
        self.task = self.bar.add_task("planning", total=None, rate="")
        self.shards = self.done = self.reused = 0
        self.tokens = self.scored = 0
        self.seconds = 0.0  # of forwards
        self.at_work: dict[int, int] = {}
        self.started = self.told = time.monotonic()

    def __enter__(self) -> ScoreProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def plan(self, jobs: Sequence[Job]) -> None:
        self.shards = len(jobs)
        self.tokens = sum(job.record.totals.teacher_tokens for job in jobs)
        self.bar.update(self.task, total=self.tokens, description=f"shard 0/{self.shards}")
        self.started = self.told = time.monotonic()
        if not self.shown:
            self._print(
                f"{self.shards} shards of {self.tokens:,} teacher tokens to look at; a shard is what an interruption spares"
            )

    def shard(self, result: Result | Failure[Job]) -> None:
        self.done += 1
        self.at_work.pop(result.job.index, None)
        if isinstance(result, Failure):
            how = f"FAILED: {result.reason}"
        elif result.seconds:
            totals = result.losses.totals
            self.scored += totals.tokens
            self.seconds += result.seconds
            how = f"{totals.tokens:,} tokens, {totals.tokens / result.seconds:,.0f} a second, {totals.mean:.3f} nats a token"
        else:
            self.tokens -= result.losses.totals.tokens
            self.reused += 1
            how = "scored before"
        self._show()
        if not self.shown or isinstance(result, Failure):
            self._print(f"shard {result.job.folder.name}, {self.done} of {self.shards}: {how}")

    def within(self, progress: ShardProgress) -> None:
        """A shard has come so far."""
        self.at_work[progress.index] = progress.tokens
        self._show()
        if not self.shown and time.monotonic() - self.told > EVERY:
            self._print(f"{self.done} of {self.shards} shards, {self._done():,} of {self.tokens:,} tokens: {self._rate()}")

    def _done(self) -> int:
        return self.scored + sum(self.at_work.values())

    def _rate(self) -> str:
        rate = self._done() / max(time.monotonic() - self.started, 1e-9)
        left = f", {(self.tokens - self._done()) / rate / 60:,.0f} minutes left" if rate and not self.shown else ""
        return f"{rate:,.0f} tokens/s{left}"

    def _show(self) -> None:
        self.bar.update(
            self.task,
            total=self.tokens,
            completed=self._done(),
            description=f"shard {self.done}/{self.shards}",
            rate=self._rate(),
        )

    def _print(self, line: str) -> None:
        self.told = time.monotonic()
        self.bar.console.print(f"{self.name}{line}", markup=False, highlight=False, soft_wrap=True)


def summary(path: Path, losses: TeacherLosses, progress: ScoreProgress) -> Table:
    """What came out."""
    scoring, totals = losses.scoring, losses.totals
    table = Table(title=Text(f"{path}: losses of {scoring.name}"), title_justify="left", show_header=False)
    rows = {
        "tokens": f"{totals.tokens:,} in {len(losses.shards):,} shards ({progress.reused:,} were scored before)",
        "mean loss": f"{totals.mean:.4f} nats a token",
        "no number": f"{totals.nan:,} NaN, {totals.infinite:,} infinite",
        "context": f"{scoring.context:,} tokens, windows every {scoring.stride:,}",
        "read again as context": f"{totals.positions - totals.padding - totals.tokens:,} tokens",
        "padding": f"{totals.padding / max(1, totals.positions):.2%} of all positions",
        "precision": f"{scoring.dtype}, weights {scoring.weights}",
    }
    if progress.seconds:
        rows["speed"] = f"{progress.scored / progress.seconds:,.0f} tokens a second and process, in this one's shards"
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table
