"""Records -> the files of one shard.

Documents are tokenized and aligned in batches of some megabytes. If the token bytes of a document do not add up to its text, the
document is aligned separately by the tokenizer's own offsets, or quarantined. A document of many megabytes is processed in parts,
so that memory does not grow with it.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from megatron_vocagno.corpus.encoders import Ragged, trim_memory
from megatron_vocagno.corpus.indexed import PairWriter, token_dtype
from megatron_vocagno.corpus.manifest import PAIRS, Totals
from megatron_vocagno.corpus.spans import ANCHOR_EVERY, align, encode, intersection_over_student
from megatron_vocagno.corpus.tokens import Tokenizer
from megatron_vocagno.errors import CorpusError
from megatron_vocagno.files import sync
from megatron_vocagno.preprocess.aligner import AlignedTexts, Side, align_texts, append_to_each
from megatron_vocagno.preprocess.documents import InputRecord, LongText, pieces_of
from megatron_vocagno.preprocess.inputs import InputSplit
from megatron_vocagno.preprocess.long_texts import PART_CHARACTERS, aligned_parts

BATCH_BYTES = 2 << 20  # text that is tokenized and aligned at once: each call of gigatoken has an overhead of some 3 ms
QUARANTINE = "quarantine.jsonl"
OnBadLine = Literal["error", "skip", "quarantine"]
CSV = re.compile(rb"[^{}\[\],;\t]+([,;\t](?! )[^{}\[\],;\t]*)+\Z")  # a first line that may be the header of a table
CHECK_EVERY = 1000  # one document per this number is compared with Hugging Face's tokenizers


@dataclass(frozen=True)
class Text:
    """A document to tokenize.

    text     NFC-normalized; "" if the document is long
    number   the document's number in the shard
    n_bytes  UTF-8 bytes; more than a batch has if the document is long
    pieces   the text of a document of more than `PART_CHARACTERS` characters, as in the input
    """

    document: InputRecord
    text: str
    number: int
    n_bytes: int
    pieces: Iterable[str] = ()


class ShardWriter:
    """Writes the files of a shard into a folder: `write` reads the records of the shard in order."""

    def __init__(
        self,
        folder: Path,
        student: Tokenizer,
        teacher: Tokenizer,
        nfc: bool,
        with_ids: bool,
        name_of: Callable[[InputSplit], str],
        on_bad_line: OnBadLine = "error",
    ) -> None:
        """Open a writer.

        name_of      gives the name of a split's file in the quarantine
        on_bad_line  what to do with a record without a text: raise an error, skip it, or quarantine it
        """
        self.folder, self.student, self.teacher, self.nfc, self.name_of = folder, student, teacher, nfc, name_of
        self.on_bad_line = on_bad_line
        self.dtypes: dict[str, np.dtype[Any]] = {
            "student": token_dtype(student.vocab_size),
            "teacher": token_dtype(teacher.vocab_size),
            "spans": np.dtype(np.uint8),
            "anchors": np.dtype(np.int32),
        }
        self.dtypes |= {"ids": np.dtype(np.uint8)} if with_ids else {}
        self.pairs: dict[str, PairWriter] = {}
        self.counts: Counter[str] = Counter()
        self.widths = np.zeros(9, np.int64)
        self.quarantined: BinaryIO | None = None
        self.stack = ExitStack()

    def write(self, records: Iterable[InputRecord], on_batch: Callable[[Counter[str]], object]) -> Totals:
        """Write all files of the shard and return its totals.

        on_batch: called with the counts after each batch

        Raises CorpusError for a bad record if `on_bad_line` is "error".
        """
        with self.stack as stack:
            self.pairs = {name: stack.enter_context(PairWriter(self.folder / name, d)) for name, d in self.dtypes.items()}
            for batch in batches(self._texts(records)):
                if batch[0].pieces:
                    self._add_long(batch[0])
                else:
                    self._add(batch)
                on_batch(self.counts)
        if not self.counts["documents"]:
            # An empty .bin cannot be mapped into memory: a shard without documents has only a shard.json.
            for name in self.pairs:
                for ending in ("bin", "idx"):
                    (self.folder / f"{name}.{ending}").unlink()
        if self.quarantined is not None:
            sync(self.folder / QUARANTINE)
        return Totals(**self.counts, span_widths=tuple(self.widths.tolist()))

    def quarantine(self, document: InputRecord, reason: str) -> None:
        """Append a document to quarantine.jsonl, with its bytes as in the input."""
        split = document.split
        row: dict[str, Any] = {"file": self.name_of(split)}
        if split.kind == "parquet":
            row |= {"row": document.offset + 1}
        else:
            row |= {"line": split.first_line + document.number, "byte": document.offset}
        row |= {"id": document.id} if document.id else {}
        row |= {"reason": reason, "raw_base64": base64.b64encode(document.raw).decode()}
        if self.quarantined is None:
            self.quarantined = self.stack.enter_context((self.folder / QUARANTINE).open("wb"))
        self.quarantined.write(orjson.dumps(row) + b"\n")

    def _texts(self, records: Iterable[InputRecord]) -> Iterator[Text]:
        """The records with a text, numbered. Other records are counted, and then refused, skipped or quarantined."""
        number = 0
        for document in records:
            text = document.text
            if not text:
                self._handle_without_text(document)
                continue
            if isinstance(text, LongText) or len(text) > PART_CHARACTERS:
                yield Text(document, "", number, BATCH_BYTES + 1, pieces_of(text))
            elif text.isascii():
                yield Text(document, text, number, len(text))
            else:
                text = unicodedata.normalize("NFC", text) if self.nfc else text
                yield Text(document, text, number, len(text.encode()))
            number += 1

    def _handle_without_text(self, document: InputRecord) -> None:
        if document.text is not None:
            self.counts["empty_documents"] += 1
            return
        if self.on_bad_line == "error":
            shown = f": {document.raw[:80]!r}" if document.raw else ""
            raise CorpusError(f"{document}: {document.reason}{shown}\n  {_advice(document)}")
        self.counts["broken_inputs" if document.reason.startswith("broken input") else "bad_lines"] += 1
        if self.on_bad_line == "quarantine":
            self.quarantine(document, document.reason)

    # ---- a batch

    def _add(self, batch: list[Text]) -> None:
        texts = [t.text for t in batch]
        n_bytes = np.array([t.n_bytes for t in batch], np.int64)
        check = [i for i, t in enumerate(batch) if t.number % CHECK_EVERY == 0]
        student, teacher = (self._side(side, side.encoder.encode(texts, check), texts) for side in (self.student, self.teacher))
        aligned = align_texts(student, teacher, n_bytes)
        if aligned.good.all():
            self._put(batch, student.tokens, teacher.tokens, aligned)
            return
        for start, stop in runs(aligned.good):  # keeps the documents in their order
            if aligned.good[start]:
                one, other = student.part(start, stop), teacher.part(start, stop)
                self._put(batch[start:stop], one.tokens, other.tokens, align_texts(one, other, n_bytes[start:stop]))
            else:
                for text in batch[start:stop]:
                    self._add_by_offsets(text)

    def _side(self, tokenizer: Tokenizer, tokens: Ragged, texts: list[str]) -> Side:
        return Side(tokens, tokenizer.prefixes(texts, self.nfc), tokenizer.short_byte_lengths)

    def _put(self, batch: list[Text], student: Ragged, teacher: Ragged, aligned: AlignedTexts) -> None:
        s_lengths, t_lengths = student.lengths + 1, teacher.lengths + 1
        self.pairs["student"].extend(append_to_each(student, self.student.eos_id, self.dtypes["student"]), s_lengths)
        self.pairs["teacher"].extend(append_to_each(teacher, self.teacher.eos_id, self.dtypes["teacher"]), t_lengths)
        self.pairs["spans"].extend(aligned.codes, s_lengths)
        self.pairs["anchors"].extend(*aligned.side_lists)
        self._count(aligned.widths, aligned.covered, int(s_lengths.sum()), int(t_lengths.sum()))
        self._count_documents(batch, sum(t.n_bytes for t in batch))

    # ---- a document whose token bytes do not add up to its text

    def _add_by_offsets(self, text: Text) -> None:
        """Align a document by the tokenizer's own offsets, or quarantine it."""
        sides = (self.student.encode_batch([text.text])[0], self.teacher.encode_batch([text.text])[0])
        for side, tokens in zip(("student", "teacher"), sides, strict=True):
            if tokens.ends_from == "unknown":
                self._mismatch(text, f"the {side}'s tokens hold {tokens.n_bytes:,} of its {text.n_bytes:,} bytes")
                return
        student, teacher = sides
        spans = align(student, teacher)
        held = int((intersection_over_student(student, teacher, spans) == 1).sum())
        stored = encode(spans.with_eos())
        self.pairs["student"].add(np.append(student.ids, self.student.eos_id))
        self.pairs["teacher"].add(np.append(teacher.ids, self.teacher.eos_id))
        self.pairs["spans"].add(stored.codes)
        self.pairs["anchors"].add(np.concatenate([stored.anchors, stored.escapes.ravel()]))
        widths = np.bincount(np.minimum(spans.last - spans.first, 8), minlength=9)
        self._count(widths, held, len(stored.codes), len(teacher.ids) + 1)
        self._count_documents([text], text.n_bytes)
        self.counts["offset_documents"] += 1

    # ---- a long document

    def _add_long(self, text: Text) -> None:
        """Add a document part by part. If the bytes of a part do not add up, the parts that are written are removed again."""
        counts, widths = self.counts.copy(), self.widths.copy()
        for name in PAIRS:
            self.pairs[name].add(np.zeros(0, self.dtypes[name]))
        escapes = []
        n_student = n_teacher = n_bytes = 0
        by_offsets = False
        for part in aligned_parts(text.pieces, self.student, self.teacher, self.nfc):
            if part.by_offsets or not n_student:
                trim_memory()  # a long line and a tokenizer's offsets leave freed blocks of tens of megabytes
            student, teacher, aligned = part.student, part.teacher, part.aligned
            if not aligned.good[0]:
                for name in PAIRS:
                    self.pairs[name].pop()
                self.counts, self.widths = counts, widths
                self._mismatch(text, f"after {n_student:,} student tokens, the tokens of one side do not cover the text")
                return
            self._grow(student.ids, teacher.ids, aligned.codes, aligned.anchors)
            escapes.append(aligned.escapes.ravel())
            self._count(aligned.widths, aligned.covered, len(student.ids), len(teacher.ids))
            n_student, n_teacher = n_student + len(student.ids), n_teacher + len(teacher.ids)
            n_bytes += part.n_bytes
            by_offsets = by_offsets or part.by_offsets
        anchor = [n_teacher] if n_student % ANCHOR_EVERY == 0 else []
        self._grow([self.student.eos_id], [self.teacher.eos_id], [0], anchor)
        self._count(np.zeros(9, np.int64), 0, 1, 1)
        self.pairs["anchors"].grow(np.concatenate(escapes))
        self._count_documents([text], n_bytes)
        self.counts["offset_documents"] += by_offsets

    def _grow(self, student: ArrayLike, teacher: ArrayLike, codes: ArrayLike, anchors: ArrayLike) -> None:
        """Append to the last document."""
        for name, numbers in (("student", student), ("teacher", teacher), ("spans", codes), ("anchors", anchors)):
            self.pairs[name].grow(np.asarray(numbers, self.dtypes[name]))

    # ---- counts

    def _count(self, widths: NDArray[np.int64], covered: int, n_student: int, n_teacher: int) -> None:
        self.widths += widths
        self.counts["covered_tokens"] += covered
        self.counts["zero_width_tokens"] += int(widths[0])
        self.counts["student_tokens"] += n_student
        self.counts["teacher_tokens"] += n_teacher

    def _count_documents(self, batch: list[Text], n_bytes: int) -> None:
        self.counts["documents"] += len(batch)
        self.counts["eos_tokens"] += len(batch)
        self.widths[0] += len(batch)
        self.counts["text_bytes"] += n_bytes
        if "ids" in self.pairs:
            ids = [t.document.id.encode() for t in batch]
            self.pairs["ids"].extend(np.frombuffer(b"".join(ids), np.uint8), np.array([len(i) for i in ids]))

    def _mismatch(self, text: Text, reason: str) -> None:
        self.counts["mismatched_documents"] += 1
        self.quarantine(text.document, reason)


def _advice(record: InputRecord) -> str:
    """What to do about a bad record. The first line of a file shows whether all of its lines are like that."""
    if record.number == 0 and record.reason.startswith("no key "):
        return f"Use {'--id-key' if '--id-key' in record.reason else '--text-key'} KEY to read another key"
    if record.number == 0 and record.reason.startswith("invalid JSON") and CSV.match(record.raw):
        return "If this is CSV, convert it to JSON lines or parquet"
    return "Use --on-bad-line skip to drop such records, or quarantine to keep them"


def batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Batches of at most `BATCH_BYTES`. A longer text is a batch by itself."""
    batch: list[Text] = []
    size = 0
    for text in texts:
        if batch and size + text.n_bytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += text.n_bytes
        if size > BATCH_BYTES:  # before the next text is read, which may be long too
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def runs(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of equal flags."""
    changes = np.flatnonzero(np.diff(flags)) + 1
    return pairwise([0, *changes.tolist(), len(flags)])
