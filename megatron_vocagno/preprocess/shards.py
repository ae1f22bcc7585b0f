"""One shard: the one function that every engine runs.

    make_shard   a job -> one folder of the dataset; idempotent and atomic, so that it may be killed at any moment,
                 repeated, or run twice at once

A shard is written beside its place, flushed to the disk, hashed and renamed in one step; on an object store, shard.json
is uploaded last. It is done exactly when its shard.json is there, is whole, and was made from the same input with the
same settings. Its bytes depend on nothing else: not on time, place, engine or the number of workers.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import orjson
from pydantic import ValidationError

from megatron_vocagno.corpus.encoders import Backend
from megatron_vocagno.corpus.manifest import (
    CODEC,
    FORMAT,
    Record,
    ShardRecord,
    check_size,
    hash_file,
    make_folder,
    to_json,
    write_durably,
)
from megatron_vocagno.corpus.places import Place, place, reaching
from megatron_vocagno.corpus.tokens import Tokenizer, open_tokenizer
from megatron_vocagno.errors import ChangedError, DatasetError
from megatron_vocagno.files import beside, sync
from megatron_vocagno.preprocess.documents import Document, read
from megatron_vocagno.preprocess.inputs import InputSplit, names
from megatron_vocagno.preprocess.shard_writer import OnBadLine, ShardWriter
from megatron_vocagno.preprocess.workers import report


@dataclass(frozen=True)
class BuildConfig:
    """What decides a shard's bytes, beside its input. (`backend` does not: its ids are checked.)"""

    student: str  # as open_tokenizer takes them
    teacher: str
    student_eos: str | None = None
    teacher_eos: str | None = None
    text_key: str | tuple[str, ...] = "text"  # of several, the first that is there
    id_key: str | tuple[str, ...] | None = None
    on_bad_line: OnBadLine = "error"
    nfc: bool = True
    backend: Backend = "auto"

    @property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """student, teacher; opened once a process."""
        return _tokenizer(self.student, self.student_eos, self.backend), _tokenizer(self.teacher, self.teacher_eos, self.backend)

    @property
    def id_name(self) -> str | None:
        """What a dataset calls its ids."""
        return " or ".join(names(self.id_key)) or None

    @property
    def sha256(self) -> str:
        """By what tokenizers do, not by where they lie."""
        student, teacher = (t.fingerprint for t in self.tokenizers)
        text, ids = ([*names(key)] for key in (self.text_key, self.id_key))
        keys = {"text_key": text[0] if len(text) == 1 else text, "id_key": ids[0] if len(ids) == 1 else ids or None}
        how = {"on_bad_line": self.on_bad_line, "nfc": self.nfc, "format": FORMAT, "codec": CODEC}
        return hashlib.sha256(orjson.dumps({"student": student, "teacher": teacher, **keys, **how})).hexdigest()

    @property
    def in_words(self) -> dict[str, str]:
        """What `sha256` is made of, as options and their values; of a tokenizer its fingerprint, and where it lies."""
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


@dataclass(frozen=True)
class ShardJob:
    """One shard to make.

    root      the folder that all input files have in common: they are named from there on
    trusted   the input's sizes and times are those of the plan that the shard was made by: its bytes need not be read again
    force     replace a shard that was made from other input or with other settings
    """

    index: int
    pieces: tuple[InputSplit, ...]
    root: str
    out: str
    settings: BuildConfig
    settings_sha256: str
    trusted: bool = False
    force: bool = False

    @property
    def name(self) -> str:
        """Of the shard."""
        return f"{self.index:04}"

    def file(self, piece: InputSplit) -> str:
        """The name of an input file; not its path: bytes do not depend on places."""
        return piece.url.removeprefix(self.root)

    @property
    def folder(self) -> Place:
        """Of the shard."""
        return place(self.out) / "shards" / self.name


@dataclass(frozen=True)
class ShardResult:
    """A shard that is there. reused: it was there before."""

    job: ShardJob
    record: ShardRecord
    reused: bool


@dataclass(frozen=True)
class Progress:
    """How far a shard is. bad: records that were refused."""

    index: int
    documents: int
    text_bytes: int
    bad: int


class ShardFile(Record):
    """shard.json. settings, input: sha256 of what the shard was made with and from; encoders: of student and teacher."""

    settings: str
    input: str
    pieces: tuple[tuple[str, int, int], ...]  # file name, and what InputSplit calls start and stop
    encoders: tuple[str, str]
    record: ShardRecord


def make_shard(job: ShardJob) -> ShardResult:
    """The finished shard: as it lies there, or made now. Leaves nothing behind when it fails.

    Raises CorpusError: bad input, changed input or settings, gigatoken's ids are wrong. Raises OSError: disk full.
    """
    if (made := finished(job)) is not None:
        return ShardResult(job, made.record, reused=True)
    folder = job.folder
    if isinstance(folder, Path):
        make_folder(folder.parent)
        temporary = beside(folder)
        temporary.mkdir()
    else:
        temporary = Path(tempfile.mkdtemp(prefix=f"vocagno-{job.name}-"))
    try:
        made = _write(job, temporary)
        if isinstance(folder, Path):
            _publish(temporary, folder)
        else:
            with reaching(folder):
                _upload(temporary, folder)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(temporary)) from error  # a failed write does not say where
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ShardResult(job, made.record, reused=False)


def _write(job: ShardJob, folder: Path) -> ShardFile:
    student, teacher = job.settings.tokenizers
    digest = hashlib.sha256()
    settings = job.settings
    writer = ShardWriter(folder, student, teacher, settings.nfc, bool(names(settings.id_key)), job.file, settings.on_bad_line)

    def tell(counts: Counter[str]) -> None:
        report(Progress(job.index, counts["documents"], counts["text_bytes"], counts["bad_lines"]))

    totals = writer.write(_read(job, digest), tell)
    files = {file.name: hash_file(file) for file in sorted(folder.iterdir())}
    made = ShardFile(
        settings=job.settings_sha256,
        input=digest.hexdigest(),
        pieces=tuple((job.file(p), p.start, p.stop) for p in job.pieces),
        encoders=(student.encoder.name, teacher.encoder.name),
        record=ShardRecord(path=f"shards/{job.name}", totals=totals, files=files),
    )
    write_durably(folder / "shard.json", to_json(made))
    return made


def _read(job: ShardJob, digest: hashlib._Hash) -> Iterator[Document]:
    for piece in job.pieces:
        digest.update(b"\0piece\0")
        yield from read(piece, job.settings.text_key, job.settings.id_key, digest.update)


# ---- done, or not


def finished(job: ShardJob) -> ShardFile | None:
    """shard.json of a shard that needs no work; None where there is none, a damaged one, or --force replaces it.

    Raises ChangedError where it was made with other settings or from other input.
    """
    file = job.folder / "shard.json"
    try:
        made = ShardFile.model_validate_json(file.read_bytes())
        for name, record in made.record.files.items():
            check_size(job.folder / name, record)
    except (FileNotFoundError, ValidationError, DatasetError):
        return None
    if job.settings.backend == "huggingface" and "gigatoken" in made.encoders:
        return None  # its ids are in doubt
    changed = _changed(job, made)
    if changed is None:
        return made
    if job.force:
        return None
    raise ChangedError(
        f"{job.folder} was made from other {changed[0]} ({changed[1]}) than are asked for now ({changed[2]}): "
        "name another --out, or rebuild it with --force"
    )


def _changed(job: ShardJob, made: ShardFile) -> tuple[str, object, object] | None:
    """What a finished shard was made with that differs from what is asked for: then, and now."""
    if made.settings != job.settings_sha256:
        return "settings or tokenizers", made.settings, job.settings_sha256
    if (then := [p[1:] for p in made.pieces]) != (now := [(p.start, p.stop) for p in job.pieces]):
        return "parts of the input", then, now
    if not job.trusted and (source := _hash_input(job)) != made.input:
        return "input", made.input, source
    return None


def _hash_input(job: ShardJob) -> str:
    digest = hashlib.sha256()
    for _ in _read(job, digest):
        pass
    return digest.hexdigest()


# ---- into its place


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


def _upload(temporary: Path, folder: Place) -> None:
    """An object store has no rename: shard.json, which says that the shard is done, goes first and comes last."""
    (folder / "shard.json").unlink(missing_ok=True)
    files = sorted(temporary.iterdir(), key=lambda file: (file.name == "shard.json", file.name))
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        with file.open("rb") as source, (folder / file.name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)
