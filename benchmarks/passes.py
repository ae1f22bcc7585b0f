"""The passes that `benchmarks.preprocess` compares. Each runs in its own process, on one part of the text after another.

    gigatoken_alone      both tokenizers' `encode_batch`, one batch after another
    hugging_face_alone   the same with tokenizers' `encode_batch_fast`
    pipeline             `make_shard`: read, parse, normalize, tokenize twice, compare some ids, align, write, flush, hash
    megatron_style       one tokenizer's pass as Megatron's preprocess_data.py does it, without its pool and start-up

Costs are CPU-seconds of the process, user and system, over all threads. They exclude opening the tokenizers. The texts of the
two passes that only tokenize are in memory, in the batches that the pipeline makes, and their results are discarded.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import orjson

from megatron_vocagno.corpus.encoders import GigatokenEncoder
from megatron_vocagno.corpus.indexed import token_dtype
from megatron_vocagno.preprocess.aligner import Side, by_bytes, by_walk
from megatron_vocagno.preprocess.plan import plan
from megatron_vocagno.preprocess.shard_writer import BATCH_BYTES
from megatron_vocagno.preprocess.shards import BuildConfig, make_shard
from megatron_vocagno.preprocess.workers import ONE_THREAD


@dataclass(frozen=True)
class Cost:
    """CPU-seconds for a number of bytes of text. `student_tokens` is 0 if they were not counted."""

    seconds: float
    text_bytes: int
    student_tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.text_bytes + other.text_bytes, self.student_tokens + other.student_tokens)

    @property
    def per_mb(self) -> float:
        """CPU-seconds per megabyte (10^6 bytes) of text."""
        return self.seconds / self.text_bytes * 1e6


Pass: TypeAlias = Callable[[Path], Cost]


class Apart:
    """Run a pass in a new process with one thread, which lives until the end of the `with` block."""

    def __init__(self, begin: Callable[..., Pass], *arguments: Any) -> None:
        os.environ.update(ONE_THREAD)
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (begin, *arguments))

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pool.shutdown()

    def __call__(self, stretch: Path) -> Cost:
        return self.pool.submit(_go_on, stretch).result()


_pass: Pass | None = None


def _begin(begin: Callable[..., Pass], *arguments: Any) -> None:
    global _pass
    _pass = begin(*arguments)


def _go_on(stretch: Path) -> Cost:
    assert _pass is not None
    return _pass(stretch)


def contest(stretches: Sequence[Path], contestants: dict[str, Apart]) -> dict[str, list[Cost]]:
    """Run each contestant on each stretch of text, in alternating order. The first stretch is a warm-up and is not counted."""
    costs: dict[str, list[Cost]] = {name: [] for name in contestants}
    for number, stretch in enumerate(stretches):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            cost = contestants[name](stretch)
            if number:
                costs[name].append(cost)
    return costs


# ---- the passes


def gigatoken_alone(settings: BuildConfig) -> Pass:
    encoders = [t.encoder for t in settings.tokenizers if isinstance(t.encoder, GigatokenEncoder)]
    assert len(encoders) == 2
    return partial(_alone, [partial(encoder.tokenizer.encode_batch, parallel=False) for encoder in encoders])


def hugging_face_alone(settings: BuildConfig) -> Pass:
    references = [tokenizer.reference.tokenizer for tokenizer in settings.tokenizers]
    return partial(_alone, [partial(reference.encode_batch_fast, add_special_tokens=False) for reference in references])


def _alone(encodes: Sequence[Callable[[list[str]], Any]], stretch: Path) -> Cost:
    prepared = list(batches(stretch))
    begin = time.process_time()
    for texts in prepared:
        for encode in encodes:
            encode(texts)
    return Cost(time.process_time() - begin, _text_bytes(prepared))


def pipeline(settings: BuildConfig) -> Pass:
    settings.tokenizers  # noqa: B018 - opens the tokenizers
    return partial(_pipeline, settings)


def _pipeline(settings: BuildConfig, stretch: Path) -> Cost:
    with TemporaryDirectory(dir=stretch.parent) as out:
        jobs = plan([stretch], settings).jobs(out, settings)
        begin = time.process_time()
        results = [make_shard(job) for job in jobs]
        seconds = time.process_time() - begin
    totals = [result.record.totals for result in results]
    return Cost(seconds, sum(t.text_bytes for t in totals), sum(t.student_tokens for t in totals))


def megatron_style(settings: BuildConfig, side: int) -> Pass:
    tokenizer = settings.tokenizers[side]
    return partial(_megatron_style, tokenizer.reference.tokenizer, tokenizer.eos_id, token_dtype(tokenizer.vocab_size))


def _megatron_style(tokenizer: Any, eos: int, dtype: np.dtype[Any], stretch: Path) -> Cost:
    """Parse JSON, tokenize one document at a time as transformers does, and write ids and EOS to disk."""
    begin = time.process_time()
    with stretch.open(encoding="utf-8") as lines, TemporaryFile(dir=stretch.parent) as out:
        for line in lines:
            (encoding,) = tokenizer.encode_batch([json.loads(line)["text"]], add_special_tokens=False)
            out.write(np.array([*encoding.ids, eos], dtype).tobytes())
    return Cost(time.process_time() - begin, _text_bytes(batches(stretch)))


def align_alone(settings: BuildConfig, backend: str) -> Pass:
    """Align the tokens of both sides, in the pipeline's batches, to spans as they are stored."""
    return partial(_align_alone, settings, {"numba": by_walk, "numpy": by_bytes}[backend])


def _align_alone(settings: BuildConfig, align: Callable[..., Any], stretch: Path) -> Cost:
    prepared = []
    for texts in batches(stretch):
        student, teacher = (Side(t.encoder.encode(texts), t.prefixes(texts), t.short_byte_lengths) for t in settings.tokenizers)
        prepared.append((student, teacher, np.array([len(text.encode()) for text in texts])))
    begin = time.process_time()
    for batch in prepared:
        align(*batch)
    seconds = time.process_time() - begin
    return Cost(seconds, sum(int(n.sum()) for *_, n in prepared), sum(len(student.tokens.ids) for student, *_ in prepared))


def _text_bytes(batches: Iterable[list[str]]) -> int:
    return sum(len(text.encode()) for texts in batches for text in texts)


def batches(stretch: Path) -> Iterator[list[str]]:
    """The texts of a stretch, in batches of the pipeline's size."""
    batch: list[str] = []
    size = 0
    with stretch.open("rb") as lines:
        for line in lines:
            batch.append(orjson.loads(line)["text"])
            size += len(batch[-1].encode())
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
