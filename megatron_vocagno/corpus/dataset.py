"""An aligned dataset: one text as two token streams and the spans between them.

    DIR/dataset.json                         everything below, by name, size and sha256; written last
    DIR/tokenizers/{student,teacher}/        tokenizer.json, tokenizer_config.json, byte_lengths.npy (int32 [V])
    DIR/shards/NNNN/shard.json               the shard's record and what it was made from
    DIR/shards/NNNN/{student,teacher}.{bin,idx}   token ids, EOS last; uint16 for vocabularies below 65,500, else int32
    DIR/shards/NNNN/spans.{bin,idx}          uint8, one code a student token (`spans`)
    DIR/shards/NNNN/anchors.{bin,idx}        int32, ceil(N / 4096) anchors, then (position, code) of each escape
    DIR/shards/NNNN/quarantine.jsonl         what was refused, where anything was

Every pair is a Megatron pair (`indexed`) with the same documents in the same order. A shard without documents has no
pairs. Opening refuses an unknown format version and any file that is missing or of another size than recorded;
`verify` reads everything.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_vocagno.corpus import CorpusError
from megatron_vocagno.corpus.indexed import PairReader
from megatron_vocagno.corpus.spans import ANCHOR_EVERY, ESCAPE, EncodedSpans, Spans, decode, encode
from megatron_vocagno.corpus.tokens import Tokenizer

FORMAT = 1
CODEC = "width << 1 | shared, uint8, 255 escapes; anchors every 4096"
PAIRS = ("student", "teacher", "spans", "anchors")


class DatasetError(CorpusError):
    """A dataset that is missing, damaged, of another version, or not what the caller needs."""


class TokenizerMismatch(DatasetError):
    """The dataset was made with another tokenizer."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    size: int  # bytes
    sha256: str


class Totals(Record):
    """Counts of a shard or of a dataset; they add."""

    documents: int = 0
    student_tokens: int = 0  # EOS included, as below
    teacher_tokens: int = 0
    text_bytes: int = 0
    eos_tokens: int = 0  # student tokens, unmapped: one a document
    zero_width_tokens: int = 0  # student tokens, unmapped: a dummy prefix that stands alone
    covered_tokens: int = 0  # mapped student tokens whose span holds all their bytes: IoS = 100 %
    span_widths: tuple[int, ...] = (0,) * 9  # student tokens by width of the span: 0 (unmapped), 1 … 7, 8 or more
    offset_documents: int = 0  # a side's ends come from its tokenizer's offsets
    mismatched_documents: int = 0  # refused: a side's tokens do not cover the text
    empty_documents: int = 0  # dropped
    bad_lines: int = 0  # refused

    def __add__(self, other: Totals) -> Totals:
        numbers = {k: getattr(self, k) + getattr(other, k) for k in type(self).model_fields if k != "span_widths"}
        widths = tuple(a + b for a, b in zip(self.span_widths, other.span_widths, strict=True))
        return Totals(**numbers, span_widths=widths)

    @property
    def mapped_tokens(self) -> int:
        return self.student_tokens - self.eos_tokens - self.zero_width_tokens


class TokenizerRecord(Record):
    fingerprint: str
    vocab_size: int
    eos_id: int
    eos_token: str
    files: dict[str, FileRecord]


class ShardRecord(Record):
    path: str  # from the dataset's folder
    totals: Totals
    files: dict[str, FileRecord]


class Manifest(Record):
    """dataset.json."""

    format: int
    codec: str
    nfc: bool
    student: TokenizerRecord
    teacher: TokenizerRecord
    totals: Totals
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True)
class TokenizerInfo:
    """What a dataset knows of a tokenizer. path: the folder with its tokenizer.json."""

    fingerprint: str
    vocab_size: int
    eos_id: int
    eos_token: str
    path: Path


@dataclass(frozen=True)
class Document:
    """student_ids int32 [N], teacher_ids int32 [M], EOS last in both; spans of the N student tokens."""

    student_ids: NDArray[np.int32]
    teacher_ids: NDArray[np.int32]
    spans: Spans


class Shard:
    """The four pairs of one shard, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.student, self.teacher, self.codes, self.anchors = (PairReader(folder / name) for name in PAIRS)
        for pair in (self.teacher, self.codes, self.anchors):
            if len(pair) != len(self.student):
                raise DatasetError(f"{pair.prefix}: {len(pair):,} documents, {self.student.prefix}: {len(self.student):,}")

    def __len__(self) -> int:
        return len(self.student)

    def encoded(self, i: int) -> EncodedSpans:
        side = self.anchors.read(i)
        n = -(-int(self.student.lengths[i]) // ANCHOR_EVERY)
        return EncodedSpans(self.codes.read(i), side[:n], side[n:].reshape(-1, 2))


class AlignedDataset:
    """Documents as two token streams and their spans; `open` makes one. Reading touches only the bytes asked for."""

    def __init__(self, path: Path, manifest: Manifest, fingerprint: str) -> None:
        self.path, self.manifest, self.fingerprint = path, manifest, fingerprint
        self.totals = manifest.totals
        self._shards = [Shard(path / r.path) for r in manifest.shards if r.totals.documents]
        counts = np.cumsum([0, *(len(shard) for shard in self._shards)], dtype=np.int64)
        self._first_documents: list[int] = counts.tolist()
        self.student_lengths: NDArray[np.int64] = np.concatenate([shard.student.lengths for shard in self._shards])
        self.teacher_lengths: NDArray[np.int64] = np.concatenate([shard.teacher.lengths for shard in self._shards])
        self.student_tokenizer, self.teacher_tokenizer = (self._info(side) for side in ("student", "teacher"))
        self.student_byte_lengths, self.teacher_byte_lengths = (self._byte_lengths(side) for side in ("student", "teacher"))

    @classmethod
    def open(cls, path: str | Path) -> AlignedDataset:
        """Raises DatasetError: no dataset, unknown version, or a file missing or of another size than recorded."""
        root = Path(path)
        manifest, fingerprint = read_manifest(root)
        for file, record in recorded_files(root, manifest):
            check_size(file, record)
        return cls(root, manifest, fingerprint)

    def __len__(self) -> int:
        return self._first_documents[-1]

    def __getitem__(self, i: int) -> Document:
        return Document(self.student(i), self.teacher(i), self.spans(i))

    def student(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
        """int32 [stop - start], student ids of document i."""
        shard, j = self._locate(i)
        return shard.student.read(j, start, stop).astype(np.int32)

    def teacher(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
        """int32 [stop - start], teacher ids of document i."""
        shard, j = self._locate(i)
        return shard.teacher.read(j, start, stop).astype(np.int32)

    def spans(self, i: int, start: int = 0, stop: int | None = None) -> Spans:
        """Spans of the student tokens [start, stop) of document i; teacher positions count from the document's start."""
        shard, j = self._locate(i)
        length = int(shard.student.lengths[j])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"{self.path}: document {i} has {length:,} student tokens; [{start}, {stop}) is not within")
        return decode(shard.encoded(j), start, stop)

    def require_tokenizers(self, student_fingerprint: str | None = None, teacher_fingerprint: str | None = None) -> None:
        """Raises TokenizerMismatch with both fingerprints, unless the dataset was made with these."""
        for side, wanted in (("student", student_fingerprint), ("teacher", teacher_fingerprint)):
            made_with = self._record(side).fingerprint
            if wanted is not None and wanted != made_with:
                raise TokenizerMismatch(
                    f"{self.path}: its {side} ids were made with tokenizer {made_with}, the {side} model's is {wanted}: "
                    "build the dataset again with that model's tokenizer, or name the model it was built for"
                )

    def verify(self) -> None:
        """Reads everything: hashes, ids, EOS, spans against lengths. Raises DatasetError that names the file."""
        for file, record in recorded_files(self.path, self.manifest):
            check_size(file, record)
            actual = hash_file(file)
            if actual.sha256 != record.sha256:
                raise DatasetError(f"{file}: sha256 {actual.sha256}, recorded {record.sha256}: changed since it was written")
        for shard in self._shards:
            for j in range(len(shard)):
                self._verify_document(shard, j)
        actual_tokens = int(self.student_lengths.sum()), int(self.teacher_lengths.sum())
        if actual_tokens != (self.totals.student_tokens, self.totals.teacher_tokens):
            raise DatasetError(f"{self.path / 'dataset.json'}: its totals are not those of its shards: {actual_tokens}")

    def _verify_document(self, shard: Shard, j: int) -> None:
        for side, pair in (("student", shard.student), ("teacher", shard.teacher)):
            ids, record = pair.read(j), self._record(side)
            at = f"{pair.prefix}.bin: document {j}"
            if not len(ids) or ids[-1] != record.eos_id:
                raise DatasetError(f"{at} does not end with the {side}'s EOS, {record.eos_id}")
            if int(ids.max()) >= record.vocab_size or int(ids.min()) < 0:
                raise DatasetError(f"{at} has id {ids.max()} or {ids.min()}, the {side}'s vocabulary has {record.vocab_size:,}")
        stored = shard.encoded(j)
        at = f"{shard.codes.prefix}.bin: document {j}"
        if len(stored.codes) != shard.student.lengths[j]:
            raise DatasetError(f"{at} has {len(stored.codes):,} codes for {shard.student.lengths[j]:,} student tokens")
        if not np.array_equal(np.flatnonzero(np.asarray(stored.codes) == ESCAPE), stored.escapes[:, 0]):
            raise DatasetError(f"{at}: its escapes are not those of {shard.anchors.prefix}.bin")
        spans = decode(stored)
        again = encode(spans)
        if not (np.array_equal(again.codes, stored.codes) and np.array_equal(again.anchors, stored.anchors)):
            raise DatasetError(f"{at}: its codes do not lead to the anchors of {shard.anchors.prefix}.bin")
        # the sum of width - shared, from the first anchor on, and EOS
        if int(spans.last[-1]) + 1 != shard.teacher.lengths[j] or spans.mapped[-1]:
            raise DatasetError(
                f"{at} ends at teacher token {spans.last[-1]}; the teacher has {shard.teacher.lengths[j]:,}, EOS last"
            )

    def _locate(self, i: int) -> tuple[Shard, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: no document {i}; there are {len(self):,}")
        k = bisect.bisect_right(self._first_documents, i) - 1
        return self._shards[k], i - self._first_documents[k]

    def _record(self, side: str) -> TokenizerRecord:
        return self.manifest.student if side == "student" else self.manifest.teacher

    def _info(self, side: str) -> TokenizerInfo:
        r = self._record(side)
        return TokenizerInfo(r.fingerprint, r.vocab_size, r.eos_id, r.eos_token, self.path / "tokenizers" / side)

    def _byte_lengths(self, side: str) -> NDArray[np.int32]:
        file = self.path / "tokenizers" / side / "byte_lengths.npy"
        table: NDArray[np.int32] = np.load(file, allow_pickle=False)
        if table.dtype != np.int32 or table.shape != (self._record(side).vocab_size,):
            raise DatasetError(f"{file}: {table.dtype} {table.shape}, expected int32 ({self._record(side).vocab_size},)")
        return table


def create(out: Path, student: Tokenizer, teacher: Tokenizer, shards: Sequence[ShardRecord], nfc: bool) -> AlignedDataset:
    """Writes the tokenizers and, last, dataset.json around finished shards. Raises DatasetError when no document is left."""
    totals = sum((shard.totals for shard in shards), Totals())
    if not totals.documents:
        raise DatasetError(
            f"no document is left: {totals.empty_documents:,} were empty, {totals.bad_lines:,} lines were bad, "
            f"the tokens of {totals.mismatched_documents:,} did not cover their text"
        )
    records = []
    for side, tokenizer in (("student", student), ("teacher", teacher)):
        folder = out / "tokenizers" / side
        tokenizer.save(folder)
        np.save(folder / "byte_lengths.npy", tokenizer.byte_lengths, allow_pickle=False)
        records.append(
            TokenizerRecord(
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                eos_token=tokenizer.eos_token,
                files={file.name: hash_file(file) for file in sorted(folder.iterdir())},
            )
        )
    manifest = Manifest(
        format=FORMAT, codec=CODEC, nfc=nfc, student=records[0], teacher=records[1], totals=totals, shards=tuple(shards)
    )
    write_durably(out / "dataset.json", to_json(manifest))
    return AlignedDataset.open(out)


def merge(datasets: Sequence[str | Path], out: str | Path) -> AlignedDataset:
    """One dataset of the documents of several, in that order: their shards stay where they are, only dataset.json is new.

    Raises TokenizerMismatch where tokenizers differ, DatasetError where settings do or `out` is taken.
    """
    target = Path(out)
    if (target / "dataset.json").exists():
        raise DatasetError(f"{target} already holds a dataset; merge into a new folder")
    opened = [AlignedDataset.open(path) for path in datasets]
    if not opened:
        raise DatasetError("nothing to merge: no dataset was named")
    first = opened[0]
    shards: list[ShardRecord] = []
    for ds in opened:
        ds.require_tokenizers(first.student_tokenizer.fingerprint, first.teacher_tokenizer.fingerprint)
        if ds.manifest.nfc != first.manifest.nfc:
            raise DatasetError(f"{ds.path}: nfc is {ds.manifest.nfc}, in {first.path} it is {first.manifest.nfc}")
        for shard in ds.manifest.shards:
            where = os.path.relpath((ds.path / shard.path).resolve(), target.resolve())
            shards.append(shard.model_copy(update={"path": where}))
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(first.path / "tokenizers", target / "tokenizers", dirs_exist_ok=True)
    totals = sum((ds.totals for ds in opened), Totals())
    write_durably(target / "dataset.json", to_json(first.manifest.model_copy(update={"totals": totals, "shards": tuple(shards)})))
    return AlignedDataset.open(target)


def read_manifest(root: Path) -> tuple[Manifest, str]:
    """dataset.json and its sha256."""
    file = root / "dataset.json"
    if not file.is_file():
        unfinished = (root / "shards").is_dir()
        cause = "its build did not finish; run the same command again" if unfinished else "not a dataset"
        raise DatasetError(f"{file} is missing: {cause}")
    data = file.read_bytes()
    try:
        version = orjson.loads(data).get("format")
        if version != FORMAT:
            raise DatasetError(f"{file}: format {version!r}, this reads format {FORMAT}: made by another release?")
        manifest = Manifest.model_validate_json(data)
    except (ValidationError, orjson.JSONDecodeError, AttributeError) as error:
        raise DatasetError(f"{file} is damaged: {error}") from None
    if manifest.codec != CODEC:
        raise DatasetError(f"{file}: spans are coded as {manifest.codec!r}, this reads {CODEC!r}")
    return manifest, hashlib.sha256(data).hexdigest()


def recorded_files(root: Path, manifest: Manifest) -> list[tuple[Path, FileRecord]]:
    sides: tuple[tuple[Literal["student", "teacher"], TokenizerRecord], ...]
    sides = (("student", manifest.student), ("teacher", manifest.teacher))
    files = [(root / "tokenizers" / side / name, r) for side, record in sides for name, r in record.files.items()]
    return files + [(root / shard.path / name, r) for shard in manifest.shards for name, r in shard.files.items()]


def check_size(file: Path, record: FileRecord) -> None:
    if not file.is_file():
        raise DatasetError(f"{file} is missing; dataset.json records it with {record.size:,} bytes: was the copy interrupted?")
    size = file.stat().st_size
    if size != record.size:
        raise DatasetError(f"{file}: {size:,} bytes, dataset.json records {record.size:,}: cut off while copying, or disk full?")


def hash_file(file: Path) -> FileRecord:
    with file.open("rb") as stream:
        return FileRecord(size=file.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def to_json(record: BaseModel) -> bytes:
    return orjson.dumps(record.model_dump(), option=orjson.OPT_INDENT_2) + b"\n"


def write_durably(file: Path, data: bytes) -> None:
    """The whole file or nothing, on the disk when this returns."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
