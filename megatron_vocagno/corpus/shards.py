"""Text files -> the shards of a dataset.

    plan        input files -> jobs: one shard each, whole lines of one or several files; the same every time
    make_shard  one job -> one folder; idempotent and atomic, so that it may be killed, repeated or run twice at once
    build       both, through an engine (`workers.run_local`), and dataset.json at the end

A shard is written beside its place, flushed to the disk, hashed and renamed in one step. It is done exactly when its
shard.json is there and was made from the same bytes with the same settings; other bytes or settings are refused. Its
bytes depend on nothing else: not on time, place, or the number of workers.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shutil
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_vocagno.corpus import CorpusError
from megatron_vocagno.corpus.dataset import (
    CODEC,
    FORMAT,
    AlignedDataset,
    DatasetError,
    Record,
    ShardRecord,
    Totals,
    check_size,
    create,
    hash_file,
    sync,
    to_json,
    write_durably,
)
from megatron_vocagno.corpus.documents import BadLine, InputError, Line, Piece, batches, cut, text_of
from megatron_vocagno.corpus.indexed import PairWriter, token_dtype
from megatron_vocagno.corpus.spans import align, encode, intersection_over_student
from megatron_vocagno.corpus.tokens import Tokenizer, Tokens, open_tokenizer
from megatron_vocagno.corpus.workers import run_local

SHARD_BYTES = 64 << 20  # of input
OnBadLine = Literal["error", "skip", "quarantine"]


class ChangedError(CorpusError):
    """A finished shard was made from other input, or with other settings."""


@dataclass(frozen=True)
class Settings:
    """What decides a shard's bytes, beside its input."""

    student: str  # as open_tokenizer takes them
    teacher: str
    student_eos: str | None = None
    teacher_eos: str | None = None
    text_key: str = "text"
    on_bad_line: OnBadLine = "error"
    nfc: bool = True

    @property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """student, teacher; opened once a process."""
        return _tokenizer(self.student, self.student_eos), _tokenizer(self.teacher, self.teacher_eos)

    @property
    def sha256(self) -> str:
        """By what tokenizers do, not by where they lie."""
        student, teacher = (t.fingerprint for t in self.tokenizers)
        rest = {"text_key": self.text_key, "on_bad_line": self.on_bad_line, "nfc": self.nfc, "format": FORMAT, "codec": CODEC}
        return hashlib.sha256(orjson.dumps({"student": student, "teacher": teacher, **rest})).hexdigest()


@functools.lru_cache(maxsize=4)
def _tokenizer(path: str, eos: str | None) -> Tokenizer:
    return open_tokenizer(path, eos_token=eos)


@dataclass(frozen=True)
class Job:
    index: int
    pieces: tuple[Piece, ...]
    out: Path
    settings: Settings
    force: bool = False

    @property
    def folder(self) -> Path:
        return self.out / "shards" / f"{self.index:04}"

    @property
    def n_bytes(self) -> int:
        return sum(p.stop - p.start for p in self.pieces)


@dataclass(frozen=True)
class Result:
    job: Job
    record: ShardRecord
    reused: bool


class ShardFile(Record):
    """shard.json. settings, input: sha256 of what the shard was made with and from."""

    settings: str
    input: str
    pieces: tuple[tuple[str, int, int], ...]  # file name, first byte, byte after the last
    record: ShardRecord


# ---- plan


def plan(inputs: Sequence[Path], out: Path, settings: Settings, shard_bytes: int = SHARD_BYTES, force: bool = False) -> list[Job]:
    """Jobs of about `shard_bytes` of input each: long files are cut at line ends, short ones in a row share a shard.

    Raises InputError for a file that is missing or not JSON lines.
    """
    groups: list[list[Piece]] = []
    for path in inputs:
        for piece in cut(path, shard_bytes):
            room = shard_bytes - sum(p.stop - p.start for p in groups[-1]) if groups else 0
            if piece.stop - piece.start <= room:
                groups[-1].append(piece)
            else:
                groups.append([piece])
    return [Job(i, tuple(pieces), out, settings, force) for i, pieces in enumerate(groups)]


# ---- one shard


def make_shard(job: Job) -> Result:
    """The finished shard: as it lies there, or made now. Raises CorpusError; leaves nothing behind when it fails."""
    settings, source = job.settings.sha256, _hash_input(job)
    if (record := _finished(job, settings, source)) is not None:
        return Result(job, record, reused=True)
    temporary = job.folder.with_name(f".{job.folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        totals = _ShardWriter(job, temporary).run()
        files = {file.name: hash_file(file) for file in sorted(temporary.iterdir())}
        record = ShardRecord(path=f"shards/{job.folder.name}", totals=totals, files=files)
        pieces = tuple((p.path.name, p.start, p.stop) for p in job.pieces)
        write_durably(temporary / "shard.json", to_json(ShardFile(settings=settings, input=source, pieces=pieces, record=record)))
        _publish(temporary, job.folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Result(job, record, reused=False)


def _hash_input(job: Job) -> str:
    digest = hashlib.sha256()
    for piece in job.pieces:
        with piece.path.open("rb") as file:
            file.seek(piece.start)
            while chunk := file.read(min(1 << 20, piece.stop - file.tell())):
                digest.update(chunk)
    return digest.hexdigest()


def _finished(job: Job, settings: str, source: str) -> ShardRecord | None:
    """The record of a shard that needs no work; None where there is none, a damaged one, or --force replaces it."""
    file = job.folder / "shard.json"
    if not file.is_file():
        return None
    made = ShardFile.model_validate_json(file.read_bytes())
    for what, then, now in (("settings or tokenizers", made.settings, settings), ("input", made.input, source)):
        if then != now:
            if job.force:
                return None
            raise ChangedError(
                f"{job.folder} was made from other {what} ({then}) than are asked for now ({now}): "
                "name another --out, or rebuild it with --force"
            )
    with suppress(DatasetError):
        for name, record in made.record.files.items():
            check_size(job.folder / name, record)
        return made.record
    return None


def _publish(temporary: Path, folder: Path) -> None:
    """One rename. A folder that is already there is damaged, outdated, or the same made by another worker just now."""
    if folder.exists():
        old = temporary.with_name(f"{temporary.name}.old")
        with suppress(FileNotFoundError):
            folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / "shard.json").is_file():
            raise
    sync(folder.parent)


class _ShardWriter:
    """Reads a job's lines, writes the four pairs and counts."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder, self.settings = job, folder, job.settings
        self.student, self.teacher = job.settings.tokenizers
        self.counts: Counter[str] = Counter()
        self.widths = np.zeros(9, np.int64)
        self.quarantined: list[bytes] = []

    def run(self) -> Totals:
        with ExitStack() as stack:
            dtypes = {"student": token_dtype(self.student.vocab_size), "teacher": token_dtype(self.teacher.vocab_size)}
            dtypes |= {"spans": np.dtype(np.uint8), "anchors": np.dtype(np.int32)}
            pairs = {name: stack.enter_context(PairWriter(self.folder / name, dtype)) for name, dtype in dtypes.items()}
            for batch in batches(self._documents()):
                texts = [text for _, text in batch]
                both = zip(self.student.encode_batch(texts), self.teacher.encode_batch(texts), strict=True)
                for (line, text), (student, teacher) in zip(batch, both, strict=True):
                    self._add(pairs, line, len(text.encode()), student, teacher)
        if not self.counts["documents"]:
            # an empty .bin can be opened by nobody; such a shard is its shard.json
            for file in self.folder.iterdir():
                file.unlink()
        if self.quarantined:
            write_durably(self.folder / "quarantine.jsonl", b"".join(self.quarantined))
        return Totals(**self.counts, span_widths=tuple(self.widths.tolist()))

    def _documents(self) -> Iterator[tuple[Line, str]]:
        for piece in self.job.pieces:
            for number, raw in enumerate(piece.lines()):
                line = Line(piece, number, raw)
                if not raw.strip():
                    continue
                try:
                    text = text_of(raw.removeprefix(b"\xef\xbb\xbf"), self.settings.text_key)
                except BadLine as bad:
                    self._refuse(line, str(bad))
                    continue
                if not text:
                    self.counts["empty_documents"] += 1
                    continue
                yield line, unicodedata.normalize("NFC", text) if self.settings.nfc else text

    def _refuse(self, line: Line, reason: str) -> None:
        if self.settings.on_bad_line == "error":
            raise InputError(
                f"{line}: {reason}: {line.raw[:80]!r}\n  --on-bad-line skip leaves such lines out, quarantine keeps them aside"
            )
        self.counts["bad_lines"] += 1
        if self.settings.on_bad_line == "quarantine":
            self._quarantine(line, reason)

    def _quarantine(self, line: Line, reason: str) -> None:
        where = {"file": line.piece.path.name, "line": line.piece.first_line + line.number, "reason": reason}
        raw = base64.b64encode(line.raw.rstrip(b"\r\n")).decode()
        self.quarantined.append(orjson.dumps({**where, "raw_base64": raw}) + b"\n")

    def _add(self, pairs: dict[str, PairWriter], line: Line, n_bytes: int, student: Tokens, teacher: Tokens) -> None:
        for side, tokens in (("student", student), ("teacher", teacher)):
            if tokens.ends_from == "unknown":
                self.counts["mismatched_documents"] += 1
                self._quarantine(line, f"the {side}'s tokens hold {tokens.n_bytes:,} of its {n_bytes:,} bytes")
                return
        spans = align(student, teacher)
        covered = intersection_over_student(student, teacher, spans) == 1
        stored = encode(spans.ended())
        pairs["student"].add(np.append(student.ids, self.student.eos_id))
        pairs["teacher"].add(np.append(teacher.ids, self.teacher.eos_id))
        pairs["spans"].add(stored.codes)
        pairs["anchors"].add(np.concatenate([stored.anchors, stored.escapes.ravel()]))
        widths: NDArray[np.int64] = np.append(spans.last - spans.first, 0)
        self.widths += np.bincount(np.minimum(widths, 8), minlength=9)
        self.counts["documents"] += 1
        self.counts["student_tokens"] += len(stored.codes)
        self.counts["teacher_tokens"] += len(teacher.ids) + 1
        self.counts["text_bytes"] += n_bytes
        self.counts["eos_tokens"] += 1
        self.counts["zero_width_tokens"] += int((~spans.mapped).sum())
        self.counts["covered_tokens"] += int(covered.sum())
        self.counts["offset_documents"] += "offsets" in (student.ends_from, teacher.ends_from)


# ---- all of it


def build(
    inputs: Sequence[Path],
    out: Path,
    settings: Settings,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    on_plan: Callable[[list[Job]], None] = lambda jobs: None,
    on_shard: Callable[[Result], None] = lambda result: None,
) -> AlignedDataset:
    """The dataset of all documents in `inputs`, in their order. Raises CorpusError; then there is no dataset.json.

    Finished shards stay and are reused by the next call. on_plan, on_shard: called with the jobs, then with each result.
    """
    jobs = plan(inputs, out, settings, shard_bytes, force)
    student, teacher = settings.tokenizers
    _refuse_strangers(out, jobs, force)
    on_plan(jobs)
    results = []
    try:
        for result in run_local(make_shard, jobs, workers):
            results.append(result)
            on_shard(result)
        shards = [r.record for r in sorted(results, key=lambda r: r.job.index)]
        return create(out, student, teacher, shards, settings.nfc)
    finally:
        _tidy(out)


def _refuse_strangers(out: Path, jobs: list[Job], force: bool) -> None:
    """What lies at `out` must be an earlier build of the same plan; --force removes the shards of another."""
    if out.exists() and not out.is_dir():
        raise ChangedError(f"{out} is a file")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in ("shards", "dataset.json")):
        raise ChangedError(f"{out} is not empty and holds no dataset: name another --out")
    planned = {job.folder for job in jobs}
    strangers = [folder for folder in sorted((out / "shards").glob("[0-9]*")) if folder not in planned]
    if strangers and not force:
        raise ChangedError(
            f"{strangers[0]} is not part of this plan of {len(jobs)} shards: other input or --shard-mb? Use --force"
        )
    if force:
        # it would describe shards that are about to change
        (out / "dataset.json").unlink(missing_ok=True)
    for folder in strangers:
        shutil.rmtree(folder)


def _tidy(out: Path) -> None:
    """Removes what killed workers left, and the folders when nothing was made."""
    for leftover in (out / "shards").glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in (out / "shards", out):
        with suppress(OSError):
            folder.rmdir()
