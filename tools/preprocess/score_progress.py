"""Progress and summary of a scoring: a bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vocagno.batch.text_losses import NEAR_CHANCE
from megatron_vocagno.corpus.manifest import TeacherLosses
from megatron_vocagno.errors import counted
from megatron_vocagno.preprocess.score_shard import ScoreJob, ScoreJobProgress, ScoreResult
from megatron_vocagno.preprocess.workers import JobFailure

from .console import WorkProgress

if TYPE_CHECKING:
    from megatron_vocagno.preprocess.score_check import Difference


class ScoreProgress(WorkProgress):
    """Progress of a scoring, in teacher tokens. Receives the jobs, scored shards, and the state of the others."""

    def __init__(self, console: Console, name: str = "", verbose: bool = False) -> None:
        """name: prefix of the lines of this process if several processes share the work. They print plain lines."""
        super().__init__(console, "planning", verbose, plain=bool(name))
        self.name = name
        self.shards = self.done = self.reused = 0
        self.tokens = self.scored = self.taken = 0
        self.seconds_of_forwards = 0.0
        self.at_work: dict[int, int] = {}
        self.state = ""

    def plan(self, jobs: Sequence[ScoreJob]) -> None:
        self.shards = len(jobs)
        self.tokens = sum(job.record.totals.teacher_tokens for job in jobs)
        self.bar.update(self.task, total=self.tokens, description=f"shard 0/{self.shards}")
        self.start()
        if not self.shown:
            self.line(
                f"{counted(self.shards, 'shard')} with {self.tokens:,} teacher tokens; finished shards are kept if you interrupt"
            )

    def check(self, difference: Difference) -> None:
        self.line(f"served and own losses of {difference}")

    def shard(self, result: ScoreResult | JobFailure[ScoreJob]) -> None:
        self.done += 1
        self.at_work.pop(result.job.index, None)
        if isinstance(result, JobFailure):
            # the error at the end contains the reasons again
            how = f"FAILED: {result.reason}" if self.done < self.shards else "FAILED"
        elif result.taken == result.losses.totals.tokens:
            self.tokens -= result.losses.totals.tokens
            self.taken += result.taken
            how = "taken from the other dataset"
        elif result.seconds:
            self.taken += result.taken
            totals = result.losses.totals
            self.scored += totals.tokens - result.taken
            self.seconds_of_forwards += result.seconds
            rate = (totals.tokens - result.taken) / result.seconds
            left = self.left(self._done(), self.tokens)
            how = f"{totals.tokens:,} tokens, {rate:,.0f} per second, {totals.mean:.3f} nats per token{left}"
        else:
            self.tokens -= result.losses.totals.tokens
            self.reused += 1
            how = "scored before"
        if not self.shown or self.verbose or isinstance(result, JobFailure):
            self.line(f"shard {result.job.folder.name}, {self.done} of {self.shards}: {how}")
        self._show()

    def within(self, progress: ScoreJobProgress) -> None:
        """Receive the progress within a shard."""
        self.at_work[progress.index] = progress.tokens
        self.state = f", {progress.state}" if progress.state else ""
        self._show()

    def _done(self) -> int:
        return self.scored + sum(self.at_work.values())

    def _show(self) -> None:
        done = self._done()
        self.show(
            f"shard {self.done}/{self.shards}",
            done,
            self.tokens,
            f"{done:,} tokens, {done / self.seconds:,.0f} per second{self.state}",
        )

    def line(self, text: str) -> None:
        super().line(f"{self.name}{text}")


def summary(path: Path, losses: TeacherLosses, progress: ScoreProgress) -> Table:
    """The table of the losses of a dataset."""
    scoring, totals = losses.scoring, losses.totals
    table = Table(title=Text(f"{path}: losses of {scoring.name}"), title_justify="left", show_header=False)
    rows = {
        "tokens": f"{totals.tokens:,} in {counted(len(losses.shards), 'shard')} ({progress.reused:,} were scored before)",
        "mean loss": f"{totals.mean:.4f} nats per token",
        "not finite": f"{totals.nan:,} NaN, {totals.infinite:,} infinite",
        "context": f"{scoring.context:,} tokens, windows every {scoring.stride:,}",
        "read again as context": f"{totals.positions - totals.padding - totals.tokens:,} tokens",
        "padding": f"{totals.padding / max(1, totals.positions):.2%} of all positions",
        "precision": f"{scoring.dtype}, quantization {scoring.quantization}",
    }
    if scoring.served is not None:
        rows["precision"] = f"{scoring.dtype}, quantization {scoring.served.quantization}"
        rows["server"] = f"{scoring.served.engine} {scoring.served.version}, {scoring.served.model}"
    if progress.taken:
        rows["taken over"] = f"{progress.taken:,} tokens were scored in the other dataset"
    if progress.seconds_of_forwards:
        speed = progress.scored / progress.seconds_of_forwards
        rows["speed"] = f"{speed:,.0f} tokens per second and process, in the shards of this process"
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def near_chance(losses: TeacherLosses, vocabulary: int) -> str | None:
    """A warning if the losses are hardly better than chance, else None. vocabulary: number of ids of the teacher's tokenizer."""
    mean, chance = losses.totals.mean, math.log(vocabulary)
    if not mean > NEAR_CHANCE * chance:
        return None
    return (
        f"warning: the teacher is hardly better than chance: {mean:.2f} nats per token, {chance:.2f} for equal probabilities of "
        f"its {vocabulary:,} tokens. Does it read its usual prefix (--bos)? Other causes: "
        "docs/troubleshooting.md#the-teacher-is-no-better-than-its-student-or-than-chance"
    )
