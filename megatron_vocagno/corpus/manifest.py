"""dataset.json: the files of a dataset by name, size and sha256, and functions that write it.

It is written last, so it exists only if all other files do. It contains its own checksum: `sha256` is the hash of the file with
this value replaced by 64 zeros. The checksum is the dataset's fingerprint. If the file records the teacher's losses too, the
fingerprint is the checksum that the file would have without them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import orjson
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from megatron_vocagno import files
from megatron_vocagno.compat import sha256_of
from megatron_vocagno.corpus.places import Place
from megatron_vocagno.errors import DatasetError, missing_path_hint, tool

FORMAT = 2
CODEC = "width << 1 | shared, uint8, 255 escapes; anchors every 4096"
DATASET = "dataset.json"
BUILD = ".build"  # folder of a build's notes for its next run; not a part of the dataset
PAIRS = ("student", "teacher", "spans", "anchors")
IDS = "ids"
SIDES = ("student", "teacher")
UNSEALED = "0" * 64


class Record(BaseModel):
    """A part of dataset.json or shard.json. It is frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    """The size and hash that a file must have."""

    size: int  # bytes
    sha256: str


class Totals(Record):
    """Counts of a shard or of a dataset. They can be added."""

    documents: int = 0
    student_tokens: int = 0  # including EOS, as all counts below
    teacher_tokens: int = 0
    text_bytes: int = 0
    eos_tokens: int = 0  # student tokens, unmapped: one per document
    zero_width_tokens: int = 0  # student tokens, unmapped: tokens that are only a dummy prefix
    covered_tokens: int = 0  # mapped student tokens whose span contains all their bytes: IoS = 100 %
    span_widths: tuple[int, ...] = (0,) * 9  # student tokens by width of the span: 0 (unmapped), 1 … 7, 8 or more
    offset_documents: int = 0  # documents for which the byte ends of a side come from its tokenizer's offsets
    mismatched_documents: int = 0  # refused: the tokens of a side do not cover the text
    empty_documents: int = 0  # dropped
    bad_lines: int = 0  # refused
    broken_inputs: int = 0  # files that are damaged or end early; the records before the damage are in the dataset

    def __add__(self, other: Totals) -> Totals:
        numbers = {k: getattr(self, k) + getattr(other, k) for k in type(self).model_fields if k != "span_widths"}
        widths = tuple(a + b for a, b in zip(self.span_widths, other.span_widths, strict=True))
        return Totals(**numbers, span_widths=widths)

    @property
    def mapped_tokens(self) -> int:
        """The number of student tokens with a range of teacher tokens."""
        return self.student_tokens - self.eos_tokens - self.zero_width_tokens


class TokenizerRecord(Record):
    """A tokenizer of the dataset, and its files."""

    fingerprint: str
    vocab_size: int
    eos_id: int
    eos_token: str
    files: dict[str, FileRecord]


class ShardRecord(Record):
    """A shard and its files, by name."""

    path: str  # from the dataset's folder
    totals: Totals
    files: dict[str, FileRecord]


SERVED = "served:"
"""Begins the fingerprint of a teacher whose weights were not at hand. No weights have such a fingerprint."""
CANARY_TOLERANCE = 0.05
"""Nats per token. Rounding in bfloat16 changes a canary by 0.03 to 0.04."""


class Canary(Record):
    """The losses of a fixed text by a served teacher. They show whether the same model still answers.

    Two canaries are equal if they differ by at most CANARY_TOLERANCE in the mean: a server's losses depend on which requests it
    reads together.
    """

    losses: tuple[float, ...]  # nats

    def distance(self, other: Canary) -> float:
        """The mean difference, nats. Infinite if the lengths differ or a loss is not finite."""
        if len(self.losses) != len(other.losses):
            return math.inf
        mean = sum(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)) / max(1, len(self.losses))
        return mean if math.isfinite(mean) else math.inf

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Canary) and self.distance(other) <= CANARY_TOLERANCE

    def __hash__(self) -> int:
        return hash(len(self.losses))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{sum(self.losses) / max(1, len(self.losses)):.3f} nats per token"


class Served(Record):
    """The server that computed losses, as it describes itself. 'unknown': it does not report this."""

    engine: str
    version: str
    model: str  # the name under which it was served
    quantization: str
    kv_cache_dtype: str
    canary: Canary

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self)


class Scoring(Record):
    """The settings by which the teacher's losses were computed."""

    teacher: str  # fingerprint of its weights; SERVED and a hash if only a server has them
    name: str  # of its folder or file, for messages
    dtype: str
    weights: Literal["as-is", "int8", "fp8"]
    context: int  # tokens of the longest window
    stride: int  # tokens from window to window
    before: int  # the id from which a document's first token is predicted: the last id of `front`, or the teacher's EOS
    front: tuple[int, ...] = ()  # ids at the beginning of each window: those that the teacher's tokenizer puts before a text
    served: Served | None = None  # None: the teacher ran in the process that scored

    @property
    def quantization(self) -> Literal["none", "int8", "fp8"]:
        """`weights` as the option --quantization has it. The file keeps the word of earlier releases."""
        return "none" if self.weights == "as-is" else self.weights

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        fields: dict[str, object] = dump(self)
        if not self.front:
            del fields["front"]
        if self.served is None:
            del fields["served"]
        return fields


class LossTotals(Record):
    """Counts of the losses of a shard or of a dataset. They can be added."""

    tokens: int = 0
    positions: int = 0  # of all forwards, including tokens that are read again as context, and padding
    padding: int = 0
    nan: int = 0
    infinite: int = 0
    nats: float = 0.0  # sum of the finite losses

    def __add__(self, other: LossTotals) -> LossTotals:
        return LossTotals(**{k: getattr(self, k) + getattr(other, k) for k in type(self).model_fields})

    @property
    def mean(self) -> float:
        """Mean of the finite losses, in nats per token; 0 if there are none."""
        return self.nats / max(1, self.tokens - self.nan - self.infinite)


class TeacherLosses(Record):
    """The losses of all shards (`losses`)."""

    scoring: Scoring
    totals: LossTotals
    shards: tuple[dict[str, FileRecord], ...]  # the files of each shard, in order


class Manifest(Record):
    """dataset.json."""

    format: int
    sha256: str
    codec: str
    nfc: bool
    id_key: str | None
    student: TokenizerRecord
    teacher: TokenizerRecord
    totals: Totals
    shards: tuple[ShardRecord, ...]
    teacher_losses: TeacherLosses | None = None

    @model_serializer(mode="wrap")
    def _without_losses_as_ever(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        fields: dict[str, object] = dump(self)
        if self.teacher_losses is None:
            del fields["teacher_losses"]
        return fields

    @property
    def fingerprint(self) -> str:
        """Hash of everything except the teacher's losses: scoring does not change it."""
        return self.sha256 if self.teacher_losses is None else self.model_copy(update={"teacher_losses": None})._digest()

    @property
    def pairs(self) -> tuple[str, ...]:
        """Names of the pairs of each shard that has documents."""
        return PAIRS if self.id_key is None else (*PAIRS, IDS)

    def tokenizer(self, side: str) -> TokenizerRecord:
        """side: one of SIDES."""
        return self.student if side == "student" else self.teacher

    def sealed(self) -> bytes:
        """The bytes of the file, including the checksum."""
        data = to_json(self.model_copy(update={"sha256": UNSEALED}))
        return data.replace(UNSEALED.encode(), self._digest().encode(), 1)

    def _digest(self) -> str:
        return hashlib.sha256(to_json(self.model_copy(update={"sha256": UNSEALED}))).hexdigest()


def read_manifest(root: Place) -> Manifest:
    """Read dataset.json. Raises DatasetError if there is none, if it has another format, or if it was changed."""
    file = root / DATASET
    if not file.is_file():
        if (root / "shards").is_dir():
            raise DatasetError(f"{file} is missing: the build of the dataset did not finish; run the same command again")
        raise DatasetError(f"{root} is not a dataset: {_why_no_dataset(root)}", str(root))
    data = file.read_bytes()
    try:
        fields = orjson.loads(data)
        version, recorded = fields.get("format"), str(fields.get("sha256"))
    except (orjson.JSONDecodeError, AttributeError) as error:
        raise DatasetError(f"{file} is damaged: {error}") from None
    if version != FORMAT:
        raise DatasetError(f"{file}: format {version!r}, this reads format {FORMAT}: made by another release? Build it again")
    actual = hashlib.sha256(data.replace(recorded.encode(), UNSEALED.encode(), 1)).hexdigest()
    if actual != recorded:
        raise DatasetError(f"{file} is damaged: its sha256 is {actual}, it records {recorded}: changed since it was written")
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DatasetError(f"{file} is not understood: {what}. Made by another release? Build it again") from None
    if manifest.codec != CODEC:
        raise DatasetError(f"{file}: spans are coded as {manifest.codec!r}, this reads {CODEC!r}")
    return manifest


def _why_no_dataset(root: Place) -> str:
    if not root.exists():
        return f"the path does not exist{missing_path_hint(root) if isinstance(root, Path) else ''}"
    if root.is_file():
        return f"it is a file. {tool('preprocess.build_dataset')} makes a dataset of a corpus, and that is a folder"
    return "the folder has no dataset.json"


def recorded_files(root: Path, manifest: Manifest) -> Iterator[tuple[Path, FileRecord]]:
    """All files of a dataset except dataset.json, with their records."""
    for side in SIDES:
        for name, record in manifest.tokenizer(side).files.items():
            yield root / "tokenizers" / side / name, record
    for shard in manifest.shards:
        for name, record in shard.files.items():
            yield root / shard.path / name, record
    if manifest.teacher_losses is not None:
        for shard, files in zip(manifest.shards, manifest.teacher_losses.shards, strict=True):
            for name, record in files.items():
                yield root / shard.path / name, record


def check_size(file: Place, record: FileRecord) -> None:
    """Raises DatasetError if a file is missing or does not have the recorded size."""
    try:
        size = file.stat().st_size
    except OSError as error:
        why = error.strerror or error
        raise DatasetError(
            f"{file} is missing; dataset.json records it with {record.size:,} bytes ({why}): was the copy interrupted?"
        ) from None
    if size != record.size:
        raise DatasetError(f"{file}: {size:,} bytes, dataset.json records {record.size:,}: cut off while copying, or disk full?")


def hash_file(file: Place) -> FileRecord:
    """The current size and hash of a file. Reads the complete file. Raises OSError."""
    with file.open("rb") as stream:
        return FileRecord(size=file.stat().st_size, sha256=sha256_of(stream))


def to_json(record: BaseModel) -> bytes:
    """The bytes of a record's file. Equal records have equal bytes."""
    return orjson.dumps(record.model_dump(), option=orjson.OPT_INDENT_2) + b"\n"


def write_durably(file: Place, data: bytes) -> None:
    """Write a file atomically. It is on the disk when this returns. Object stores guarantee both."""
    if isinstance(file, Path):
        files.write_durably(file, data)
    else:
        file.write_bytes(data)


def make_folder(folder: Place) -> None:
    """Create a folder and its parents. They are on the disk when this returns."""
    if isinstance(folder, Path):
        files.make_folder(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
