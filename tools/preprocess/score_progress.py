"""How a scoring is told to people: a bar on a terminal, plain lines elsewhere, and at the end what came out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vocagno.corpus.manifest import TeacherLosses
from megatron_vocagno.preprocess.score_shard import Progress as ShardProgress
from megatron_vocagno.preprocess.score_shard import ScoreJob, ScoreResult
from megatron_vocagno.preprocess.workers import Failure
from megatron_vocagno.training.first_batch import NEAR_CHANCE

from .console import WorkProgress


class ScoreProgress(WorkProgress):
    """Hears of the jobs, of scored shards, and of how far the others are."""

    def __init__(self, console: Console, name: str = "", verbose: bool = False) -> None:
        """name: of this process, where several share the work; they write plain lines."""
        super().__init__(console, "planning", verbose, plain=bool(name))
        self.name = name
        self.shards = self.done = self.reused = 0
        self.tokens = self.scored = 0
        self.seconds_of_forwards = 0.0
        self.at_work: dict[int, int] = {}

    def plan(self, jobs: Sequence[ScoreJob]) -> None:
        self.shards = len(jobs)
        self.tokens = sum(job.record.totals.teacher_tokens for job in jobs)
        self.bar.update(self.task, total=self.tokens, description=f"shard 0/{self.shards}")
        self.start()
        if not self.shown:
            self.line(
                f"{self.shards} shards of {self.tokens:,} teacher tokens to look at; a shard is what an interruption spares"
            )

    def shard(self, result: ScoreResult | Failure[ScoreJob]) -> None:
        self.done += 1
        self.at_work.pop(result.job.index, None)
        if isinstance(result, Failure):
            how = f"FAILED: {result.reason}"
        elif result.seconds:
            totals = result.losses.totals
            self.scored += totals.tokens
            self.seconds_of_forwards += result.seconds
            rate = totals.tokens / result.seconds
            left = self.left(self._done(), self.tokens)
            how = f"{totals.tokens:,} tokens, {rate:,.0f} a second, {totals.mean:.3f} nats a token{left}"
        else:
            self.tokens -= result.losses.totals.tokens
            self.reused += 1
            how = "scored before"
        if not self.shown or self.verbose or isinstance(result, Failure):
            self.line(f"shard {result.job.folder.name}, {self.done} of {self.shards}: {how}")
        self._show()

    def within(self, progress: ShardProgress) -> None:
        """A shard has come so far."""
        self.at_work[progress.index] = progress.tokens
        self._show()

    def _done(self) -> int:
        return self.scored + sum(self.at_work.values())

    def _show(self) -> None:
        done = self._done()
        self.show(f"shard {self.done}/{self.shards}", done, self.tokens, f"{done:,} tokens, {done / self.seconds:,.0f} a second")

    def line(self, text: str) -> None:
        super().line(f"{self.name}{text}")


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
        "precision": f"{scoring.dtype}, quantization {scoring.quantization}",
    }
    if progress.seconds_of_forwards:
        rows["speed"] = f"{progress.scored / progress.seconds_of_forwards:,.0f} tokens a second and process, in this one's shards"
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def near_chance(losses: TeacherLosses, vocabulary: int) -> str | None:
    """A warning of losses that are hardly better than a guess; None of others. vocabulary: ids of the teacher's tokenizer."""
    mean, chance = losses.totals.mean, math.log(vocabulary)
    if not mean > NEAR_CHANCE * chance:
        return None
    return (
        f"warning: the teacher is hardly better than chance: {mean:.2f} nats a token, where a guess among its {vocabulary:,} "
        f"tokens costs {chance:.2f}. Does it read before a text what it was trained to read there (--bos)? What else to look at: "
        "docs/troubleshooting.md#the-teacher-is-no-better-than-its-student-or-than-chance"
    )
