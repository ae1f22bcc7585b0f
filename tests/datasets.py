"""Small aligned datasets for the tests: of real text (Mistral's tokenizer, SmolLM2's as the teacher's), and invented ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from megatron_vocagno.corpus.create import create
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.indexed import PairWriter, token_dtype
from megatron_vocagno.corpus.manifest import ShardRecord, Totals, hash_file
from megatron_vocagno.corpus.spans import Spans, encode
from megatron_vocagno.corpus.tokens import Tokenizer
from megatron_vocagno.preprocess.build import build
from megatron_vocagno.preprocess.shards import BuildConfig
from tests import tokenizers_for_tests as real


def build_dataset(out: Path, texts: Sequence[str], student: Path, teacher: Path, shard_bytes: int = 100_000) -> AlignedDataset:
    out.mkdir(parents=True)
    corpus = out / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    build([corpus], out / "dataset", BuildConfig(student=str(student), teacher=str(teacher)), shard_bytes=shard_bytes)
    return AlignedDataset.open(out / "dataset")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A copy of the folder that `make` fills in the first of pytest-xdist's processes that needs it."""
    base = factory.getbasetemp()
    original = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{name}_original"
    with FileLock(f"{original}.lock"):
        if not (original / "made").exists():
            shutil.rmtree(original, ignore_errors=True)
            original.mkdir()
            make(original)
            (original / "made").touch()
    return Path(shutil.copytree(original, factory.mktemp(name), ignore=shutil.ignore_patterns("made"), dirs_exist_ok=True))


@pytest.fixture(scope="session")
def teacher_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "teacher_tokenizer", real.smollm2_tokenizer_folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> AlignedDataset:
    """About 0.5 MB in many languages, awkward cases among them."""

    def make(folder: Path) -> None:
        build_dataset(folder / "all", real.texts(), real.mistral_tokenizer_path(), teacher_tokenizer)

    return AlignedDataset.open(made_once(tmp_path_factory, "data", make) / "all" / "dataset")


def invent_dataset(
    out: Path, student: Tokenizer, teacher: Tokenizer, shards: Sequence[Sequence[int]], seed: int = 0, wide: float = 0
) -> AlignedDataset:
    """Random ids and random spans, as plausible as numbers are: 95 % one teacher token wide, a fifth shares its first one.

    shards: for each its documents' lengths in student tokens without EOS; wide: share of tokens with 127 teacher tokens or more.
    """
    random = np.random.default_rng(seed)
    records = [_invent_shard(out, f"{k:04}", student, teacher, lengths, random, wide) for k, lengths in enumerate(shards)]
    create(out, student, teacher, records, nfc=True)
    return AlignedDataset.open(out)


def _invent_shard(
    out: Path,
    name: str,
    student: Tokenizer,
    teacher: Tokenizer,
    lengths: Sequence[int],
    random: np.random.Generator,
    wide: float,
) -> ShardRecord:
    folder = out / "shards" / name
    folder.mkdir(parents=True)
    widths, teacher_tokens = np.zeros(9, np.int64), 0
    with (
        PairWriter(folder / "student", token_dtype(student.vocab_size)) as student_ids,
        PairWriter(folder / "teacher", token_dtype(teacher.vocab_size)) as teacher_ids,
        PairWriter(folder / "spans", np.uint8) as codes,
        PairWriter(folder / "anchors", np.int32) as anchors,
    ):
        for n in lengths:
            spans = invent_spans(random, n, wide)
            stored = encode(spans)
            student_ids.add(np.append(random.integers(3, student.vocab_size, n), student.eos_id))
            teacher_ids.add(np.append(random.integers(20, teacher.vocab_size, spans.last[-1]), teacher.eos_id))
            codes.add(stored.codes)
            anchors.add(np.concatenate([stored.anchors, stored.escapes.ravel()]))
            widths += np.bincount(np.minimum(spans.last - spans.first, 8), minlength=9)
            teacher_tokens += int(spans.last[-1]) + 1
    (folder / "shard.json").write_text("{}\n")
    totals = Totals(
        documents=len(lengths),
        student_tokens=int(widths.sum()),
        teacher_tokens=teacher_tokens,
        eos_tokens=len(lengths),
        zero_width_tokens=int(widths[0]) - len(lengths),
        covered_tokens=int(widths[1:].sum()),
        span_widths=tuple(widths.tolist()),
    )
    files = {file.name: hash_file(file) for file in sorted(folder.iterdir())}
    return ShardRecord(path=f"shards/{name}", totals=totals, files=files)


def invent_spans(random: np.random.Generator, n: int, wide: float = 0) -> Spans:
    """Of n student tokens and EOS; some with a dummy prefix on either side."""
    width = random.choice([1, 2, 3, 4], n, p=[0.95, 0.04, 0.008, 0.002])
    is_wide = random.random(n) < wide
    width[is_wide] = random.integers(127, 300, int(is_wide.sum()))
    shared = random.random(n) < 0.2
    shared[0] = False
    if random.random() < 0.1 and n > 1:
        width[0] = shared[1] = 0
    before = int(random.random() < 0.1)
    last = before + np.cumsum(width - shared)
    return Spans((last - width).astype(np.int32), last.astype(np.int32), before).with_eos()
