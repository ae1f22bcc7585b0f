"""Corpus files -> an aligned dataset, ready for training.

    python -m tools.preprocess.build_dataset corpus.jsonl --student STUDENT --teacher TEACHER --out DIR --workers 8

Run it again after an interruption: finished shards are reused.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_vocagno.corpus import CorpusError
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.documents import InputError
from megatron_vocagno.corpus.shards import SHARD_BYTES, Job, OnBadLine, Result, Settings, build


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for an error that the message explains."""
    args = parse(argv)
    console = Console()
    settings = Settings(
        student=args.student,
        teacher=args.teacher,
        student_eos=args.student_eos,
        teacher_eos=args.teacher_eos,
        text_key=args.text_key,
        on_bad_line=args.on_bad_line,
        nfc=args.nfc,
    )
    try:
        inputs = input_files(args.inputs)
        with ShardProgress(console) as progress:
            dataset = build(
                inputs, args.out, settings, args.workers, int(args.shard_mb * 2**20), args.force, progress.plan, progress.shard
            )
        if args.verify:
            dataset.verify()
    except (CorpusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(summary(dataset, progress.reused))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="build_dataset", description="Corpus files -> an aligned dataset.")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="JSON-lines files, folders of *.jsonl, or globs")
    parser.add_argument("--student", required=True, help="tokenizer: a folder, a tokenizer.json, or a SentencePiece model")
    parser.add_argument("--teacher", required=True, help="the same for the teacher")
    parser.add_argument("--out", required=True, type=Path, help="folder of the dataset")
    parser.add_argument("--engine", choices=["local"], default="local", help="where shards are made (default: local)")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--text-key", default="text", help="key of the text in each line (default: text)")
    parser.add_argument("--on-bad-line", choices=get_args(OnBadLine), default="error", help="default: error")
    parser.add_argument("--no-nfc", dest="nfc", action="store_false", help="leave the texts as they are, not NFC-normalised")
    parser.add_argument("--student-eos", help="end-of-text token, where the tokenizer names none")
    parser.add_argument("--teacher-eos", help="the same for the teacher")
    parser.add_argument("--shard-mb", type=positive_float, default=SHARD_BYTES / 2**20, help="input of a shard (default: 64)")
    parser.add_argument("--force", action="store_true", help="replace shards that were made from other input or settings")
    parser.add_argument("--verify", action="store_true", help="read everything again at the end and check it")
    return parser.parse_args(argv)


def positive_int(text: str) -> int:
    return int(positive_float(str(int(text))))


def positive_float(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def input_files(patterns: Sequence[str]) -> list[Path]:
    """Files in the order of the arguments, those of a folder or glob by name, each once. Raises InputError."""
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(path.glob("*.jsonl"))
            what = "holds no *.jsonl"
        elif path.exists():
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 - absolute patterns too
            what = "no such file or folder"
        if not found:
            raise InputError(f"{pattern}: {what}")
        files += found
    return list(dict.fromkeys(files))


class ShardProgress:
    """A bar on a terminal, a line a shard elsewhere."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("shards")
        self.console, self.shards, self.done, self.reused = console, 0, 0, 0

    def __enter__(self) -> ShardProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def plan(self, jobs: list[Job]) -> None:
        self.shards = len(jobs)
        self.bar.update(self.task, total=sum(job.n_bytes for job in jobs))

    def shard(self, result: Result) -> None:
        self.done += 1
        self.reused += result.reused
        self.bar.update(self.task, advance=result.job.n_bytes, description=f"shard {self.done}/{self.shards}")
        if not self.console.is_terminal:
            how = "reused" if result.reused else f"{result.record.totals.documents:,} documents"
            print(f"shard {self.done}/{self.shards}: {result.job.folder.name} {how}", flush=True)


def summary(dataset: AlignedDataset, reused: int) -> Table:
    t = dataset.totals
    mapped = max(t.mapped_tokens, 1)
    table = Table(title=str(dataset.path), title_justify="left", show_header=False)
    rows = {
        "documents": f"{t.documents:,} in {len(dataset.manifest.shards):,} shards ({reused:,} reused)",
        "text": f"{t.text_bytes:,} bytes of UTF-8",
        "student tokens": f"{t.student_tokens:,}, {t.student_tokens / t.text_bytes:.3f} a byte",
        "teacher tokens": f"{t.teacher_tokens:,}, {t.teacher_tokens / t.text_bytes:.3f} a byte",
        "teacher tokens a student token": f"{t.teacher_tokens / t.student_tokens:.3f}",
        "unmapped": f"{share(t.eos_tokens, t.student_tokens)} EOS, {share(t.zero_width_tokens, t.student_tokens)} zero-width",
        "IoS = 100 %": f"{share(t.covered_tokens, mapped)} of {t.mapped_tokens:,} mapped tokens",
        "span width": ", ".join(f"{w if w < 8 else '8+'}: {share(n, mapped)}" for w, n in enumerate(t.span_widths) if w and n),
        "empty documents": f"{t.empty_documents:,} dropped",
        "bad lines": f"{t.bad_lines:,} left out",
        "length mismatches": f"{t.mismatched_documents:,} documents quarantined, {t.offset_documents:,} placed by offsets",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def share(part: int, whole: int) -> str:
    return f"{part / whole:.3%}"


if __name__ == "__main__":
    sys.exit(main())
