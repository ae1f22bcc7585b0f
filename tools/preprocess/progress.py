"""Progress and summary of a build: a bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vocagno.command import duration
from megatron_vocagno.corpus.manifest import Manifest
from megatron_vocagno.corpus.places import Place
from megatron_vocagno.errors import counted
from megatron_vocagno.preprocess.plan import Plan
from megatron_vocagno.preprocess.shards import ShardJob, ShardJobProgress, ShardResult
from megatron_vocagno.preprocess.workers import JobFailure

from .console import WorkProgress


class BuildProgress(WorkProgress):
    """Progress of a build, in bytes of text. Receives the plan, finished shards, and the state of the others."""

    def __init__(self, console: Console, verbose: bool = False) -> None:
        super().__init__(console, "planning", verbose)
        self.shards = self.done = self.reused = self.failed = 0
        self.weight: dict[int, int] = {}  # estimated bytes of text in each shard of this run
        self.left_out = 0  # the part of these bytes in shards of earlier runs
        self.ended = 0  # the part in finished shards, of this run and of earlier ones
        self.at_work: dict[int, ShardJobProgress] = {}
        self.began: dict[int, float] = {}
        self.documents = self.text = self.bad = 0  # in the shards that this run has finished

    def plan(self, plan: Plan, jobs: Sequence[ShardJob]) -> None:
        self.shards, self.done, self.reused, self.failed = len(jobs), 0, 0, 0
        self.documents = self.text = self.bad = self.left_out = self.ended = 0
        self.at_work.clear()
        self.weight = {job.index: sum(p.weight for p in job.splits) for job in jobs}
        self.bar.reset(self.task, description=f"shard 0/{self.shards}", total=sum(self.weight.values()))
        self.start()

    def note(self, note: str) -> None:
        self.console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)

    def shard(self, result: ShardResult | JobFailure[ShardJob]) -> None:
        self.done += 1
        job = result.job
        self.at_work.pop(job.index, None)
        self.ended += self.weight.get(job.index, 0)
        if isinstance(result, JobFailure):
            self.failed += 1
            # the error at the end contains the reasons again
            how = f"FAILED: {result.reason}" if self.done < self.shards else "FAILED"
        else:
            how = self._finished(result)
        if not self.shown or self.verbose or isinstance(result, JobFailure):
            self.line(f"shard {self.done}/{self.shards}: {job.name} {how}{self.left(*self._spent())}")
        self._show()

    def _finished(self, result: ShardResult) -> str:
        job, totals = result.job, result.record.totals
        if totals.broken_inputs:
            files = ", ".join(sorted({job.file(split) for split in job.splits}))
            self.note(f"shard {job.name}: {totals.broken_inputs} of its input files are cut off or damaged ({files})")
        if result.reused:
            self.reused += 1
            self.left_out += self.weight.get(job.index, 0)
            return "reused"
        self.documents += totals.documents
        self.text += totals.text_bytes
        self.bad += totals.bad_lines + totals.broken_inputs
        began = self.began.pop(job.index, None)
        took = f" in {duration(time.monotonic() - began)}" if began is not None and self.verbose else ""
        return f"{counted(totals.documents, 'document')}, {totals.text_bytes / 1e6:.1f} MB{took}"

    def within(self, progress: ShardJobProgress) -> None:
        """Receive the progress within a shard."""
        self.began.setdefault(progress.index, time.monotonic())
        self.at_work[progress.index] = progress
        self._show()

    def rates(self) -> str:
        more = self.at_work.values()
        documents = self.documents + sum(p.documents for p in more)
        text = self.text + sum(p.text_bytes for p in more)
        bad = self.bad + sum(p.bad for p in more)
        return f"{documents / self.seconds:,.0f} documents/s, {text / self.seconds / 1e6:.1f} MB/s, {bad:,} bad"

    def _spent(self) -> tuple[float, float]:
        """Bytes of text that this run has processed, and its total. A finished shard counts with its estimated weight."""
        begun = sum(min(p.text_bytes, self.weight[i]) for i, p in self.at_work.items())
        return self.ended - self.left_out + begun, sum(self.weight.values()) - self.left_out

    def _show(self) -> None:
        self.show(f"shard {self.done}/{self.shards}", *self._spent(), self.rates())


class VerifyProgress(WorkProgress):
    """Progress of a verification, in shards. Receives the shards that have been read, in any order."""

    def __init__(self, console: Console, manifest: Manifest) -> None:
        super().__init__(console, "reading")
        self.shards, self.done = len(manifest.shards), 0

    def shard(self) -> None:
        self.done += 1
        self.show(f"shard {self.done}/{self.shards}", self.done, self.shards, f"{self.done / self.seconds:.1f} shards/s")


def summary(out: Place, manifest: Manifest, reused: int) -> Table:
    """The table of the totals of a dataset. reused: shards of earlier runs."""
    t = manifest.totals
    mapped = max(t.mapped_tokens, 1)
    table = Table(title=Text(str(out)), title_justify="left", show_header=False)
    quarantined = counted(t.mismatched_documents, "document")
    rows = {
        "documents": f"{t.documents:,} in {counted(len(manifest.shards), 'shard')} ({reused:,} reused)",
        "text": f"{t.text_bytes:,} bytes of UTF-8",
        "student tokens": f"{t.student_tokens:,}, {t.student_tokens / t.text_bytes:.3f} per byte",
        "teacher tokens": f"{t.teacher_tokens:,}, {t.teacher_tokens / t.text_bytes:.3f} per byte",
        "teacher tokens per student token": f"{t.teacher_tokens / t.student_tokens:.3f}",
        "unmapped": f"{share(t.eos_tokens, t.student_tokens)} EOS, {share(t.zero_width_tokens, t.student_tokens)} zero-width",
        "IoS = 100 %": f"{share(t.covered_tokens, mapped)} of {t.mapped_tokens:,} mapped tokens",
        "span width": ", ".join(f"{w if w < 8 else '8+'}: {share(n, mapped)}" for w, n in enumerate(t.span_widths) if w and n),
        "empty documents": f"{t.empty_documents:,} dropped",
        "bad records": f"{t.bad_lines:,} left out",
        "broken inputs": f"{counted(t.broken_inputs, 'file')} cut off or damaged",
        "length mismatches": f"{quarantined} quarantined, {t.offset_documents:,} placed by offsets",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def share(part: int, whole: int) -> str:
    return f"{part / whole:.3%}"
