"""Measure reading: the rate of packed rows, the growth of memory, and the time until the first batch.

    python -m benchmarks.loader [--write]      the table; --write puts it into docs/performance.md
    python -m benchmarks.loader --quick        small datasets: checks that it runs

The goals are:

- At least 5 M student tokens per CPU-second: packed rows of 2,048 with their teacher tokens and spans, in random order from
  memory-mapped shards, collated.
- Flat memory: after the dataset was read twice, the process holds at most 8 MB more than after a hundredth of it.
- At most 5 s from opening a dataset to the first batch, with 6.3 M documents in 1,000 shards (15 G tokens).

The first dataset has 24 M student tokens: random ids, spans like those of two BPE tokenizers, documents of lognormal length.
The large dataset has real indices and sparse .bin files: opening reads only the indices, and its first batch is all zeros. A
rate is that of the fastest of five rounds, in CPU time of the process, with files in the page cache. For the cold start, the
indices are dropped from the page cache. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.page import GOALS, PAGE, Figure, circumstances, markdown, show, write_section
from megatron_vocagno.batch.loader import Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import Rows
from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.corpus.create import create
from megatron_vocagno.corpus.indexed import token_dtype, write_index
from megatron_vocagno.corpus.manifest import PAIRS, FileRecord, ShardRecord, Totals
from megatron_vocagno.corpus.tokens import Tokenizer, open_tokenizer
from tests import tokenizers_for_tests as real
from tests.datasets import invent_dataset

ROW = 2048
ROUNDS, ROWS = 5, 1024  # rows per round
LEAST_TOKENS = 5e6  # per CPU-second
MOST_GROWTH = 8e6  # bytes
MOST_SECONDS = 5.0
SHARDS, DOCUMENTS, TOKENS_A_DOCUMENT = 1000, 6_300_000, 2380


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.loader",
        "",
        "Measure the rate of packed rows, memory, and the time until the first batch.",
        "python -m benchmarks.loader --write",
        GOALS,
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder for the datasets, 1.5 GB (default: a temporary folder)"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--quick", action="store_true", help="small datasets: checks that it runs")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        student = open_tokenizer(real.mistral_tokenizer_path())
        teacher = open_tokenizer(real.smollm2_tokenizer_folder(root / "tokenizer"))
        random = np.random.default_rng(0)
        shards = [np.maximum(4, random.lognormal(6.9, 1.0, 1250)).astype(int).tolist() for _ in range(1 if args.quick else 12)]
        rows = TrainRows(invent_dataset(root / "read", student, teacher, shards), ROW, seed=0)
        table = Table("read", "M student tokens per CPU-second", "µs per row", title="Reading rows", title_justify="left")
        rate = rates(rows, table)
        growth = memory_growth(rows)
        documents = invent_index(root / "large", student, teacher, random, 10 if args.quick else SHARDS)
        cold, warm = (start(root / "large", drop) for drop in (True, False))
    Console().print(table)
    figures = [
        Figure(
            f"student tokens per CPU-second, rows of {ROW:,} with spans, collated",
            f"{rate / 1e6:.1f} M",
            f"≥ {LEAST_TOKENS / 1e6:.0f} M",
            rate >= LEAST_TOKENS,
        ),
        Figure(
            f"memory growth while {2 * rows.rows_in_epoch:,} rows are read",
            f"{growth / 1e6:+.1f} MB",
            f"≤ {MOST_GROWTH / 1e6:.0f} MB",
            growth <= MOST_GROWTH,
        ),
        Figure(
            f"time to the first batch with {documents / 1e6:.1f} M documents, cold and warm page cache",
            f"{cold:.1f} s, {warm:.1f} s",
            f"≤ {MOST_SECONDS:.0f} s",
            max(cold, warm) <= MOST_SECONDS,
        ),
    ]
    show(figures)
    if args.write:
        write_section("loader", f"`python -m benchmarks.loader`, {circumstances('numpy')}\n\n{markdown(figures)}", PAGE)
    return int(any(figure.met is False for figure in figures))


def rates(rows: TrainRows, table: Table) -> float:
    """Student tokens per CPU-second of complete batches. Rates of the partial steps are added to the table."""
    batches = Batches(rows, Layout(micro_batch_rows=8, micro_batches=4, data_parallel=1), rank=0)
    order = np.random.default_rng(0).permutation(np.arange(len(rows.dataset.student_lengths), dtype=np.int32))
    packed = Rows(rows.dataset, order, ROW)

    def ids_only(first: int) -> None:
        for k in range(first, first + ROWS):
            np.concatenate([rows.dataset.student(*piece) for piece in packed.pieces(k % len(packed))])

    def whole_rows(first: int) -> None:
        for k in range(first, first + ROWS):
            rows[k]

    def whole_batches(first: int) -> None:
        for k in range(first, first + ROWS, batches.layout.rows):
            batches.step(k)

    rate = 0.0
    for name, read in (("student ids only", ids_only), ("rows", whole_rows), ("rows, collated", whole_batches)):
        seconds = min(cpu_seconds(read, k * ROWS) for k in range(ROUNDS)) / ROWS
        rate = rows.tokens_per_row / seconds
        table.add_row(name, f"{rate / 1e6:.1f}", f"{seconds * 1e6:.0f}")
    return rate


def cpu_seconds(read: Callable[[int], None], first: int) -> float:
    begin = time.process_time()
    read(first)
    return time.process_time() - begin


def memory_growth(rows: TrainRows) -> float:
    """Growth of the process's own memory, in bytes. Pages of mapped files belong to the page cache and do not count."""
    last = 2 * rows.rows_in_epoch
    for k in range(last // 100):
        rows[k]
    before = own_memory()
    for k in range(last // 100, last):
        rows[k]
    return own_memory() - before


def own_memory() -> float:
    status = Path("/proc/self/status").read_text()
    return 1024 * float(status.split("RssAnon:")[1].split()[0])


def invent_index(out: Path, student: Tokenizer, teacher: Tokenizer, random: np.random.Generator, shards: int) -> int:
    """Write a dataset with complete indices and sparse files, whose numbers are all zero. Returns the number of documents."""
    records = []
    for k in range(shards):
        folder = out / "shards" / f"{k:04}"
        folder.mkdir(parents=True)
        sigma = 1.1
        lengths = random.lognormal(np.log(TOKENS_A_DOCUMENT) - sigma**2 / 2, sigma, DOCUMENTS // SHARDS)
        n_student = np.maximum(2, lengths).astype(np.int64)
        n_teacher = np.maximum(2, 0.84 * lengths).astype(np.int64)
        ids = token_dtype(student.vocab_size), token_dtype(teacher.vocab_size)
        for name, dtype, numbers in zip(
            PAIRS,
            (*ids, np.dtype(np.uint8), np.dtype(np.int32)),
            (n_student, n_teacher, n_student, -(-n_student // 4096)),
            strict=True,
        ):
            write_zeros(folder / name, dtype, numbers)
        totals = Totals(documents=len(n_student), student_tokens=int(n_student.sum()), teacher_tokens=int(n_teacher.sum()))
        sizes = {file.name: FileRecord(size=file.stat().st_size, sha256="") for file in sorted(folder.iterdir())}
        records.append(ShardRecord(path=f"shards/{k:04}", totals=totals, files=sizes))
    create(out, student, teacher, records, nfc=True)
    return shards * (DOCUMENTS // SHARDS)


def write_zeros(prefix: Path, dtype: np.dtype[np.generic], lengths: NDArray[np.int64]) -> None:
    write_index(prefix, dtype, lengths)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(int(lengths.sum()) * dtype.itemsize)


START = """
import sys, time
from megatron_vocagno.batch.loader import Batches, Layout, TrainRows
from megatron_vocagno.corpus.dataset import AlignedDataset
begin = time.perf_counter()
rows = TrainRows(AlignedDataset.open(sys.argv[1]), int(sys.argv[2]), seed=0)
assert len(Batches(rows, Layout(8, 4, 1), 0).step(0)) == 4
print(time.perf_counter() - begin)
"""


def start(dataset: Path, drop: bool) -> float:
    """Seconds in which a new process opens a dataset and reads its first batch."""
    if drop:
        for idx in dataset.rglob("*.idx"):
            descriptor = os.open(idx, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    done = subprocess.run([sys.executable, "-c", START, dataset, str(ROW)], check=True, capture_output=True, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
