"""An aligned dataset: one text as two token streams and the spans between them.

    DIR/dataset.json                         name, size and sha256 of all files below (`manifest`); written last
    DIR/tokenizers/{student,teacher}/        tokenizer.json, tokenizer_config.json, byte_lengths.npy (int32 [V])
    DIR/shards/NNNN/shard.json               the shard's record, and hashes of its input and settings
    DIR/shards/NNNN/{student,teacher}.{bin,idx}   token ids, EOS last; uint16 for vocabularies below 65,500, else int32
    DIR/shards/NNNN/spans.{bin,idx}          uint8, one code per student token (`spans`)
    DIR/shards/NNNN/anchors.{bin,idx}        int32, ceil(N / 4096) anchors, then (position, code) of each escape
    DIR/shards/NNNN/ids.{bin,idx}            uint8, UTF-8 of each document's id, if the dataset was built with --id-key
    DIR/shards/NNNN/teacher_loss.{bin,idx,json}   float16, one loss per teacher token, if a teacher has scored it (`losses`)
    DIR/shards/NNNN/quarantine.jsonl         the refused records, if there are any

Every pair is a Megatron pair (`indexed`) with the same documents in the same order. A shard without documents has no pairs.

Opening reads only the lengths of documents. It raises an error for an unknown format version, and for a file that is missing or
does not have the recorded size. `verify` reads everything.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.decoding import TokenDecoder
from megatron_vocagno.corpus.identity import require_same, require_tokenizer
from megatron_vocagno.corpus.indexed import THREADS, PairReader
from megatron_vocagno.corpus.losses import LOSS
from megatron_vocagno.corpus.manifest import (
    DATASET,
    IDS,
    PAIRS,
    FileRecord,
    LossTotals,
    Manifest,
    Scoring,
    ShardRecord,
    TeacherLosses,
    Totals,
    check_size,
    make_folder,
    read_manifest,
    recorded_files,
    write_durably,
)
from megatron_vocagno.corpus.places import Place, place
from megatron_vocagno.corpus.spans import ANCHOR_EVERY, ESCAPE, EncodedSpans, Spans, decode
from megatron_vocagno.corpus.verify import verify
from megatron_vocagno.errors import DatasetError


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer of a dataset.

    vocab_size  highest id + 1, including control tokens that no text produces
    rows        minimum number of rows of an embedding: 1 + the highest id that a text produces, or EOS
    path        the folder with its tokenizer.json
    """

    fingerprint: str
    vocab_size: int
    rows: int
    eos_id: int
    eos_token: str
    path: Path


@dataclass(frozen=True)
class Document:
    """One document of a dataset.

    student_ids  int32 [N], EOS last
    teacher_ids  int32 [M], EOS last
    spans        the teacher spans of the N student tokens
    id           "" if the dataset has no ids
    """

    student_ids: NDArray[np.int32]
    teacher_ids: NDArray[np.int32]
    spans: Spans
    id: str = ""


class AlignedDataset:
    """Documents as two token streams and their spans. Use `open` to get one. Reading touches only the requested bytes.

    student_lengths, teacher_lengths            int32 [D], tokens of each document, including EOS
    student_byte_lengths, teacher_byte_lengths  int32 [V], bytes of text of each token

    >>> dataset = AlignedDataset.open("data/mine")
    >>> dataset
    <AlignedDataset data/mine: 2 documents, 15 student tokens, 16 teacher tokens>
    >>> dataset.text(0), [len(document.student_ids) for document in dataset]
    ('les êtres humains', [7, 8])
    >>> dataset[0].spans.last.tolist()
    [1, 2, 3, 5, 6, 7, 7]
    >>> dataset.student(0, 5).tolist() == [*dataset[0].student_ids[5:6], dataset.student_tokenizer.eos_id]
    True
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Used by `open` and `of`.

        Raises DatasetError if the pairs of a shard do not have the same documents, or if a tokenizer's table is damaged.
        """
        self.path, self.manifest, self.totals = path, manifest, manifest.totals
        folders = [path / shard.path for shard in manifest.shards if shard.totals.documents]
        student, teacher, codes, anchors, ids = ([folder / name for folder in folders] for name in (*PAIRS, IDS))
        self._student, self._teacher, self._anchors = PairReader(*student), PairReader(*teacher), PairReader(*anchors)
        self._codes = self._student.with_same_lengths(np.uint8, *codes)
        self._ids = PairReader(*ids) if manifest.id_key is not None else None
        self._losses = self._teacher.with_same_lengths(np.uint16, *(folder / LOSS for folder in folders))
        for pair in (self._teacher, self._anchors, *([self._ids] if self._ids is not None else [])):
            for k, (count, expected) in enumerate(zip(pair.first_documents[1:], self._student.first_documents[1:], strict=True)):
                if count != expected:
                    raise DatasetError(f"{pair.prefixes[k]}.idx and {student[k]}.idx differ in their number of documents")
        self.student_lengths, self.teacher_lengths = self._student.lengths, self._teacher.lengths
        self.student_byte_lengths, self.teacher_byte_lengths = self._byte_lengths("student"), self._byte_lengths("teacher")
        self.student_tokenizer = self._tokenizer("student", self.student_byte_lengths)
        self.teacher_tokenizer = self._tokenizer("teacher", self.teacher_byte_lengths)

    @classmethod
    def open(cls, path: str | Place) -> AlignedDataset:
        """Open a dataset.

        Raises DatasetError if there is no dataset, its format version is unknown, or a file is missing or does not have the
        recorded size.
        """
        root = local_folder(path)
        return cls.of(root, read_manifest(root))

    @classmethod
    def of(cls, root: Path, manifest: Manifest) -> AlignedDataset:
        """Open a dataset with a manifest that was read before, or with a part of a manifest."""
        by_folder = itertools.groupby(recorded_files(root, manifest), key=lambda recorded: recorded[0].parent)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(_check_sizes, [list(files) for _, files in by_folder]))
        return cls(root, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of the dataset without the teacher's losses."""
        return self.manifest.fingerprint

    @property
    def scoring(self) -> Scoring | None:
        """The settings of the teacher's losses; None if not all shards have losses."""
        return self.manifest.teacher_losses.scoring if self.manifest.teacher_losses is not None else None

    def __len__(self) -> int:
        return len(self._student)

    def __getitem__(self, i: int) -> Document:
        """Document i; -1 is the last one. Raises IndexError."""
        i = i + len(self) if i < 0 else i
        return Document(self.student(i), self.teacher(i), self.spans(i), self.id(i))

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        t = self.totals
        return (
            f"<AlignedDataset {self.path}: {t.documents:,} documents, {t.student_tokens:,} student tokens, "
            f"{t.teacher_tokens:,} teacher tokens>"
        )

    def text(self, i: int) -> str:
        """The text of document i as it was tokenized: in NFC, unless the dataset was built with --no-nfc.

        The text is exact if one of the tokenizers is byte-level (GPT-2's, Llama 3's, Qwen's). If both are SentencePiece models
        (Llama 2's, Mistral's), U+2581 is read as a space, and a space at the start of the text may be missing.
        """
        certain = ("never", "always", "unless_space")  # from "a first space is certainly the text's" to "it is not known whose"
        side = min(("student", "teacher"), key=lambda side: certain.index(self._decoders[side].prefix))
        return self._decoders[side].text(self.student(i) if side == "student" else self.teacher(i))

    def student(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
        """int32 [stop - start], student ids of document i, EOS last. Raises IndexError."""
        return self._student.read(i, start, stop).astype(np.int32)

    def teacher(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
        """int32 [stop - start], teacher ids of document i, EOS last. Raises IndexError."""
        return self._teacher.read(i, start, stop).astype(np.int32)

    def teacher_losses(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """float32 [stop - start], losses in nats of the teacher's tokens of document i. Requires that `scoring` is not None."""
        return self._losses.read(i, start, stop).view(np.float16).astype(np.float32)

    def spans(self, i: int, start: int = 0, stop: int | None = None) -> Spans:
        """Spans of the student tokens [start, stop) of document i; teacher positions count from the document's start.

        The last token of a document, EOS, is unmapped. Raises IndexError.
        """
        length = int(self.student_lengths[i])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"{self.path}: document {i} has {length:,} student tokens; [{start}, {stop}) is not within")
        return decode(self._encoded(i), start, stop)

    def common_boundary(self, i: int, start: int, stop: int) -> NDArray[np.bool_]:
        """bool [stop - start]: whether both streams have a boundary at the start of the student token.

        Reads only the codes of these tokens.
        """
        codes = self._codes.read(i, start, stop)
        shared = codes & 1
        if ESCAPE in codes:
            position, code = self._encoded(i).escapes.T
            here = (position >= start) & (position < stop)
            shared[position[here] - start] = code[here] & 1
        boundary: NDArray[np.bool_] = shared == 0
        return boundary

    def id(self, i: int) -> str:
        """The document's id in the input; "" if the dataset has no ids."""
        return self._ids.read(i).tobytes().decode() if self._ids is not None else ""

    def _encoded(self, i: int) -> EncodedSpans:
        side = self._anchors.read(i)
        n = -(-int(self.student_lengths[i]) // ANCHOR_EVERY)
        return EncodedSpans(self._codes.read(i), side[:n], side[n:].reshape(-1, 2))

    def require_tokenizer(self, side: Literal["student", "teacher"], folder: Path) -> str | None:
        """Check that the tokenizer of a model made the ids of a side.

        folder: the model's folder

        Returns None, or a note if the folder has no tokenizer to compare with.

        Raises DatasetError with both paths and the differences.
        """
        return require_tokenizer(self.path, self.manifest.tokenizer(side), side, folder)

    def require_tokenizers_of(self, other: AlignedDataset) -> None:
        """Check that both datasets have the same tokenizers. Raises DatasetError with both paths and the differences."""
        for side in ("student", "teacher"):
            record, other_record = (ds.manifest.tokenizer(side) for ds in (self, other))
            if record.fingerprint != other_record.fingerprint:
                require_same(self.path, record, other.path, other_record, side)

    def verify(self, on_shard: Callable[[ShardRecord], object] = lambda shard: None) -> None:
        """Read everything and check hashes, ids, EOS, spans against lengths, and that there are no other files.

        on_shard: called after each shard

        Raises DatasetError that names every changed file.
        """
        verify(self.path, on_shard)

    @cached_property
    def _decoders(self) -> dict[str, TokenDecoder]:
        """The decoder of each side. It is cached, because reading the tokenizers takes a tenth of a second."""
        tables = {"student": self.student_byte_lengths, "teacher": self.teacher_byte_lengths}
        return {
            side: TokenDecoder.of(self.path / "tokenizers" / side / "tokenizer.json", table) for side, table in tables.items()
        }

    def _tokenizer(self, side: str, byte_lengths: NDArray[np.int32]) -> TokenizerInfo:
        r = self.manifest.tokenizer(side)
        rows = 1 + max(int(np.flatnonzero(byte_lengths).max(initial=0)), r.eos_id)
        return TokenizerInfo(r.fingerprint, r.vocab_size, rows, r.eos_id, r.eos_token, self.path / "tokenizers" / side)

    def _byte_lengths(self, side: str) -> NDArray[np.int32]:
        file = self.path / "tokenizers" / side / "byte_lengths.npy"
        expected = (self.manifest.tokenizer(side).vocab_size,)
        try:
            # mapped, so that a damaged header cannot make numpy allocate memory
            table = np.array(np.load(file, mmap_mode="r", allow_pickle=False))
        except (ValueError, OSError):
            # numpy's own message advises to trust the file
            raise DatasetError(f"{file} is damaged: it is not a numpy array; copy the dataset again") from None
        if table.dtype != np.int32 or table.shape != expected:
            raise DatasetError(f"{file} is damaged: it contains {table.dtype} {table.shape}, expected int32 {expected}")
        return table


def _check_sizes(files: list[tuple[Path, FileRecord]]) -> None:
    for file, record in files:
        check_size(file, record)


def merge(datasets: Sequence[str | Path], out: str | Path) -> AlignedDataset:
    """Merge datasets into one with the documents of all, in their order. The shards stay in place; only dataset.json is new.

    The new dataset has the teacher's losses if all datasets have losses with the same settings.

    Raises DatasetError if tokenizers or settings differ, or if `out` contains a dataset.
    """
    target = local_folder(out)
    if (target / DATASET).exists():
        raise DatasetError(f"{target} already contains a dataset; merge into a new folder")
    opened = [AlignedDataset.open(path) for path in datasets]
    if not opened:
        raise DatasetError("nothing to merge: no dataset was named")
    first = opened[0]
    if len({ds.path.resolve() for ds in opened}) < len(opened):
        raise DatasetError(
            "one dataset is named twice: its documents would count twice. To read it more often, give it a weight in the run's "
            "data.train instead"
        )
    shards: list[ShardRecord] = []
    for ds in opened:
        ds.require_tokenizers_of(first)
        if ds.manifest.nfc != first.manifest.nfc:
            raise DatasetError(
                f"{ds.path}: nfc is {ds.manifest.nfc}, in {first.path} it is {first.manifest.nfc}: build one of them again"
            )
        if (ds.manifest.id_key is None) != (first.manifest.id_key is None):
            one, other = (ds, first) if ds.manifest.id_key is None else (first, ds)
            raise DatasetError(
                f"{one.path} has no ids, {other.path} has ({other.manifest.id_key!r}): build both with --id-key, or both without"
            )
        for shard in ds.manifest.shards:
            where = os.path.relpath((ds.path / shard.path).resolve(), target.resolve())
            shards.append(shard.model_copy(update={"path": where}))
    make_folder(target)
    shutil.copytree(first.path / "tokenizers", target / "tokenizers", dirs_exist_ok=True)
    totals = sum((ds.totals for ds in opened), Totals())
    # ids are text, even if their keys differ
    id_key = " or ".join(dict.fromkeys(ds.manifest.id_key for ds in opened if ds.manifest.id_key)) or None
    changes = {"totals": totals, "shards": tuple(shards), "id_key": id_key, "teacher_losses": _merge_losses(opened)}
    merged = first.manifest.model_copy(update=changes)
    write_durably(target / DATASET, merged.sealed())
    return AlignedDataset.open(target)


def _merge_losses(datasets: Sequence[AlignedDataset]) -> TeacherLosses | None:
    losses = [ds.manifest.teacher_losses for ds in datasets if ds.manifest.teacher_losses is not None]
    if len(losses) < len(datasets) or any(other.scoring != losses[0].scoring for other in losses):
        return None
    shards = tuple(files for one in losses for files in one.shards)
    return TeacherLosses(scoring=losses[0].scoring, totals=sum((one.totals for one in losses), LossTotals()), shards=shards)


def local_folder(path: str | Place) -> Path:
    """The path of a folder on this machine. Raises DatasetError for a URL of an object store."""
    where = place(path)
    # a URL that was converted to a Path has lost a slash
    if not isinstance(where, Path) or re.match(r"\w[\w+.-]+:/", str(where)):
        raise DatasetError(
            f"{path} is not on this machine, and a dataset is read through memory maps: copy the folder first "
            "(`aws s3 sync URL DIR`, or fsspec.filesystem(PROTOCOL).get(URL, DIR, recursive=True)) and name the copy"
        )
    return where
