"""Make one shard of a dataset.

    make_shard   a job -> one folder of the dataset. Every engine runs this function.

`make_shard` is idempotent and atomic: it may be killed at any moment, repeated, or run twice at the same time.

A shard is written to a temporary folder, flushed to the disk, hashed and renamed in one step. On an object store, shard.json
is uploaded last. A shard is finished if its shard.json exists, is complete, and records the same input and settings. The
shard's bytes depend only on input and settings, not on time, path, engine or the number of workers. They depend on --on-bad-line
only if the shard has bad records.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import orjson
from pydantic import ValidationError

from megatron_vocagno.corpus.encoders import Backend
from megatron_vocagno.corpus.manifest import (
    CODEC,
    FORMAT,
    Record,
    ShardRecord,
    Totals,
    check_size,
    hash_file,
    make_folder,
    to_json,
    write_durably,
)
from megatron_vocagno.corpus.places import Place, place, reaching
from megatron_vocagno.corpus.tokens import Tokenizer, open_tokenizer
from megatron_vocagno.errors import ChangedError, DatasetError, counted
from megatron_vocagno.files import beside, sync
from megatron_vocagno.preprocess.documents import InputRecord, read
from megatron_vocagno.preprocess.inputs import InputSplit, names
from megatron_vocagno.preprocess.shard_writer import OnBadLine, ShardWriter
from megatron_vocagno.preprocess.workers import report


@dataclass(frozen=True)
class BuildConfig:
    """The settings of a build. They and the input decide a shard's bytes. (`backend` does not: its ids are compared.)"""

    student: str  # for open_tokenizer, as `teacher`
    teacher: str
    student_eos: str | None = None
    teacher_eos: str | None = None
    text_key: str | tuple[str, ...] = "text"  # if there are several, the first that a record has
    id_key: str | tuple[str, ...] | None = None
    on_bad_line: OnBadLine = "error"
    nfc: bool = True
    backend: Backend = "auto"

    @property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """The student's and the teacher's tokenizer, opened once per process."""
        return _tokenizer(self.student, self.student_eos, self.backend), _tokenizer(self.teacher, self.teacher_eos, self.backend)

    @property
    def id_name(self) -> str | None:
        """The name of the ids in dataset.json; None for a dataset without ids."""
        return " or ".join(names(self.id_key)) or None

    @property
    def sha256(self) -> str:
        """Hash of the settings. It contains fingerprints of the tokenizers instead of their paths."""
        student, teacher = (t.fingerprint for t in self.tokenizers)
        text, ids = ([*names(key)] for key in (self.text_key, self.id_key))
        keys = {"text_key": text[0] if len(text) == 1 else text, "id_key": ids[0] if len(ids) == 1 else ids or None}
        how = {"on_bad_line": self.on_bad_line, "nfc": self.nfc, "format": FORMAT, "codec": CODEC}
        return hashlib.sha256(orjson.dumps({"student": student, "teacher": teacher, **keys, **how})).hexdigest()

    @property
    def hashes(self) -> dict[OnBadLine, str]:
        """`sha256` for each value of --on-bad-line."""
        return {value: replace(self, on_bad_line=value).sha256 for value in get_args(OnBadLine)}

    @property
    def in_words(self) -> dict[str, str]:
        """The values that `sha256` hashes, by command-line option. A tokenizer's value is its fingerprint and path."""
        student, teacher = self.tokenizers
        return {
            "--student": f"{student.fingerprint} ({self.student})",
            "--student-eos": student.eos_token,
            "--teacher": f"{teacher.fingerprint} ({self.teacher})",
            "--teacher-eos": teacher.eos_token,
            "--text-key": " or ".join(names(self.text_key)),
            "--id-key": " or ".join(names(self.id_key)) or "none",
            "--on-bad-line": self.on_bad_line,
            "--no-nfc": "absent" if self.nfc else "given",
            "format": f"{FORMAT}, {CODEC}",
        }


@functools.lru_cache(maxsize=4)
def _tokenizer(path: str, eos: str | None, backend: Backend) -> Tokenizer:
    return open_tokenizer(path, backend, eos_token=eos)


def shard_name(index: int) -> str:
    """The name of a shard's folder.

    >>> shard_name(7)
    '0007'
    """
    return f"{index:04}"


@dataclass(frozen=True)
class ShardJob:
    """One shard to make.

    root      the common folder of all input files; their recorded names are relative to it
    hashes    `settings.hashes`, computed once, because a finished shard needs no tokenizer
    trusted   the input has the sizes and times that the plan recorded, so it need not be read again to compare its hash
    force     replace a shard that was made from other input or with other settings
    """

    index: int
    splits: tuple[InputSplit, ...]
    root: str
    out: str
    settings: BuildConfig
    hashes: dict[OnBadLine, str]
    trusted: bool = False
    force: bool = False

    @property
    def name(self) -> str:
        """The name of the shard."""
        return shard_name(self.index)

    def file(self, split: InputSplit) -> str:
        """The recorded name of a split's file. It is not the full path, so that moved input gives the same bytes."""
        return split.url.removeprefix(self.root)

    @property
    def folder(self) -> Place:
        """The folder of the shard."""
        return place(self.out) / "shards" / self.name


@dataclass(frozen=True)
class ShardResult:
    """A finished shard. reused: an earlier job had made it."""

    job: ShardJob
    record: ShardRecord
    reused: bool


@dataclass(frozen=True)
class ShardJobProgress:
    """The progress of one shard. bad: records that were refused."""

    index: int
    documents: int
    text_bytes: int
    bad: int


class ShardFile(Record):
    """shard.json.

    settings, input  sha256 of the settings and of the input; the settings are those of --on-bad-line error if no record is bad
    pieces           file name, start and stop of each input split
    encoders         names of the student's and the teacher's encoder
    """

    settings: str
    input: str
    pieces: tuple[tuple[str, int, int], ...]
    encoders: tuple[str, str]
    record: ShardRecord


def make_shard(job: ShardJob) -> ShardResult:
    """Make a shard, or reuse it if it is finished. Removes its temporary files if it fails.

    Raises CorpusError for bad input, ChangedError for changed input or settings, EncoderMismatchError for wrong ids of gigatoken,
    and OSError, for example for a full disk.
    """
    if (shard := finished(job)) is not None:
        return ShardResult(job, shard.record, reused=True)
    folder = job.folder
    if isinstance(folder, Path):
        make_folder(folder.parent)
        temporary = beside(folder)
        temporary.mkdir()
    else:
        temporary = Path(tempfile.mkdtemp(prefix=f"vocagno-{job.name}-"))
    try:
        shard = _write(job, temporary)
        if isinstance(folder, Path):
            _publish(temporary, folder)
        else:
            with reaching(folder):
                _upload(temporary, folder)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(temporary)) from error  # the error of a failed write has no path
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ShardResult(job, shard.record, reused=False)


def _write(job: ShardJob, folder: Path) -> ShardFile:
    student, teacher = job.settings.tokenizers
    digest = hashlib.sha256()
    settings = job.settings
    writer = ShardWriter(folder, student, teacher, settings.nfc, bool(names(settings.id_key)), job.file, settings.on_bad_line)

    def report_counts(counts: Counter[str]) -> None:
        report(ShardJobProgress(job.index, counts["documents"], counts["text_bytes"], counts["bad_lines"]))

    totals = writer.write(_read(job, digest), report_counts)
    files = {file.name: hash_file(file) for file in sorted(folder.iterdir())}
    shard = ShardFile(
        settings=job.hashes[settings.on_bad_line if _bad_records(totals) else "error"],
        input=digest.hexdigest(),
        pieces=tuple((job.file(split), split.start, split.stop) for split in job.splits),
        encoders=(student.encoder.name, teacher.encoder.name),
        record=ShardRecord(path=f"shards/{job.name}", totals=totals, files=files),
    )
    write_durably(folder / "shard.json", to_json(shard))
    return shard


def _read(job: ShardJob, digest: hashlib._Hash) -> Iterator[InputRecord]:
    for split in job.splits:
        digest.update(b"\0piece\0")  # part of the format: the hashes of existing shards contain it
        yield from read(split, job.settings.text_key, job.settings.id_key, digest.update)


# ---- is a shard finished?


def read_shard(folder: Place) -> ShardFile:
    """The shard.json of a shard's folder. Raises FileNotFoundError, and ValidationError for a damaged one."""
    return ShardFile.model_validate_json((folder / "shard.json").read_bytes())


def finished(job: ShardJob) -> ShardFile | None:
    """The shard.json of a shard that needs no work; None if the shard is missing or damaged, or if `force` replaces it.

    Raises ChangedError if the shard has documents, and was made with other settings or from other input.
    """
    try:
        shard = read_shard(job.folder)
        for name, record in shard.record.files.items():
            check_size(job.folder / name, record)
    except (FileNotFoundError, ValidationError, DatasetError):
        return None
    if job.settings.backend == "huggingface" and "gigatoken" in shard.encoders:
        return None  # its ids may be wrong
    difference = _difference(job, shard)
    if difference is None:
        return shard
    if job.force or not shard.record.totals.documents:
        return None
    raise ChangedError(f"{job.folder} {difference}")


def _bad_records(totals: Totals) -> int:
    """The records that --on-bad-line decides about."""
    return totals.bad_lines + totals.broken_inputs


def _difference(job: ShardJob, shard: ShardFile) -> str | None:
    """The first difference between a finished shard and its job, as the rest of a sentence about the shard."""
    policies = {sha256: value for value, sha256 in job.hashes.items()}
    then, now = policies.get(shard.settings), job.settings.on_bad_line
    if then is not None and then != now and (n := _bad_records(shard.record.totals)):
        return (
            f"has {counted(n, 'bad record')} and was made with --on-bad-line {then}, {now} now. Use {then} again, or --force, "
            "which rebuilds only the shards with bad records"
        )
    if then is None:
        return _from_other("settings or tokenizers", shard.settings, job.hashes[now])
    if (before := [piece[1:] for piece in shard.pieces]) != (after := [(split.start, split.stop) for split in job.splits]):
        return _from_other("parts of the input", before, after)
    if not job.trusted and (source := _hash_input(job)) != shard.input:
        return _from_other("input", shard.input, source)
    return None


def _from_other(what: str, then: object, now: object) -> str:
    return f"was made from other {what}: {then} then, {now} now. Use another --out, or rebuild it with --force"


def _hash_input(job: ShardJob) -> str:
    digest = hashlib.sha256()
    for _ in _read(job, digest):
        pass
    return digest.hexdigest()


# ---- publish


def _publish(temporary: Path, folder: Path) -> None:
    """Rename the folder. An existing folder is damaged, outdated, or the same shard that another worker has just made."""
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


def _upload(temporary: Path, folder: Place) -> None:
    """Upload the shard. An object store has no rename, so that shard.json is removed first and uploaded last."""
    (folder / "shard.json").unlink(missing_ok=True)
    files = sorted(temporary.iterdir(), key=lambda file: (file.name == "shard.json", file.name))
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        with file.open("rb") as source, (folder / file.name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)
