"""How a build is told to people: a bar on a terminal, plain lines elsewhere, and at the end what came out."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from megatron_vocagno.corpus.dataset import Manifest
from megatron_vocagno.corpus.places import Place
from megatron_vocagno.corpus.plan import Plan
from megatron_vocagno.corpus.shards import Job, Result
from megatron_vocagno.corpus.shards import Progress as ShardProgress
from megatron_vocagno.corpus.workers import Failure

EVERY = 30.0  # seconds between plain lines, where no shard ends


class BuildProgress:
    """Hears of the plan, of finished shards, and of how far the others are."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = TextColumn("{task.description}"), BarColumn(), Rates(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("planning", total=None, documents=0, text=0, bad=0)
        self.shards = self.done = self.reused = self.failed = 0
        self.weight: dict[int, int] = {}  # bytes of text that each shard of this run holds, about
        self.at_work: dict[int, ShardProgress] = {}
        self.documents = self.text = self.bad = 0  # of shards that this run has finished
        self.started = self.told = time.monotonic()

    def __enter__(self) -> BuildProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def plan(self, plan: Plan, jobs: Sequence[Job]) -> None:
        self.shards, self.done, self.reused, self.failed = len(jobs), 0, 0, 0
        self.documents = self.text = self.bad = 0
        self.at_work.clear()
        self.weight = {job.index: sum(p.weight for p in job.pieces) for job in jobs}
        self.bar.update(self.task, total=sum(self.weight.values()))
        self.bar.reset(self.task, description=f"shard 0/{self.shards}")
        self.started = self.told = time.monotonic()

    def note(self, note: str) -> None:
        self.console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)

    def shard(self, result: Result | Failure[Job]) -> None:
        self.done += 1
        job = result.job
        self.at_work.pop(job.index, None)
        if isinstance(result, Failure):
            self.failed += 1
            how = f"FAILED: {result.reason}"
        else:
            totals = result.record.totals
            self.reused += result.reused
            if not result.reused:
                self.documents += totals.documents
                self.text += totals.text_bytes
                self.bad += totals.bad_lines + totals.broken_inputs
            if totals.broken_inputs:
                files = ", ".join(sorted({job.file(piece) for piece in job.pieces}))
                self.note(f"shard {job.name}: {totals.broken_inputs} of its input files ended early ({files})")
            how = "reused" if result.reused else f"{totals.documents:,} documents, {totals.text_bytes / 1e6:.1f} MB"
        self._show()
        if not self.console.is_terminal or isinstance(result, Failure):
            self._print(f"shard {self.done}/{self.shards}: {job.name} {how}")

    def within(self, progress: ShardProgress) -> None:
        """A shard in the making has come so far."""
        self.at_work[progress.index] = progress
        self._show()
        if not self.console.is_terminal and time.monotonic() - self.told > EVERY:
            self._print(f"shard {self.done}/{self.shards}: {self.rates()}")

    def rates(self) -> str:
        documents, text, bad = self._sums()
        seconds = max(time.monotonic() - self.started, 1e-9)
        return f"{documents / seconds:,.0f} documents/s, {text / seconds / 1e6:.1f} MB/s, {bad:,} bad"

    def _sums(self) -> tuple[int, int, int]:
        more = self.at_work.values()
        return (
            self.documents + sum(p.documents for p in more),
            self.text + sum(p.text_bytes for p in more),
            self.bad + sum(p.bad for p in more),
        )

    def _show(self) -> None:
        # within a shard by its text; a shard that is done counts whole, whatever its weight was guessed to be
        begun = sum(min(p.text_bytes, self.weight[i]) for i, p in self.at_work.items())
        ended = sum(self.weight.values()) * self.done / max(self.shards, 1)
        documents, text, bad = self._sums()
        self.bar.update(
            self.task,
            completed=ended + begun,
            description=f"shard {self.done}/{self.shards}",
            documents=documents,
            text=text,
            bad=bad,
        )

    def _print(self, line: str) -> None:
        self.told = time.monotonic()
        self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Rates(ProgressColumn):
    """documents/s, MB/s, bad records."""

    def render(self, task: Task) -> Text:
        seconds = max(task.elapsed or 0.0, 1e-9)
        rates = f"{task.fields['documents'] / seconds:,.0f} documents/s {task.fields['text'] / seconds / 1e6:.1f} MB/s"
        return Text(f"{rates} {task.fields['bad']:,} bad")


def summary(out: Place, manifest: Manifest, reused: int) -> Table:
    """What came out."""
    t = manifest.totals
    mapped = max(t.mapped_tokens, 1)
    table = Table(title=Text(str(out)), title_justify="left", show_header=False)
    rows = {
        "documents": f"{t.documents:,} in {len(manifest.shards):,} shards ({reused:,} reused)",
        "text": f"{t.text_bytes:,} bytes of UTF-8",
        "student tokens": f"{t.student_tokens:,}, {t.student_tokens / t.text_bytes:.3f} a byte",
        "teacher tokens": f"{t.teacher_tokens:,}, {t.teacher_tokens / t.text_bytes:.3f} a byte",
        "teacher tokens a student token": f"{t.teacher_tokens / t.student_tokens:.3f}",
        "unmapped": f"{share(t.eos_tokens, t.student_tokens)} EOS, {share(t.zero_width_tokens, t.student_tokens)} zero-width",
        "IoS = 100 %": f"{share(t.covered_tokens, mapped)} of {t.mapped_tokens:,} mapped tokens",
        "span width": ", ".join(f"{w if w < 8 else '8+'}: {share(n, mapped)}" for w, n in enumerate(t.span_widths) if w and n),
        "empty documents": f"{t.empty_documents:,} dropped",
        "bad records": f"{t.bad_lines:,} left out",
        "broken inputs": f"{t.broken_inputs:,} files ended early",
        "length mismatches": f"{t.mismatched_documents:,} documents quarantined, {t.offset_documents:,} placed by offsets",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def share(part: int, whole: int) -> str:
    return f"{part / whole:.3%}"
