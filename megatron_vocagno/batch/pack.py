"""Rows: documents concatenated in one order, and cut at positions where both token streams have a boundary.

    documents   d3 ......E d0 ....................E d7 ...E      E: end of document, one token on either side
    row k       starts at the last common byte boundary at or before student position k * stride

A row holds n input tokens and n targets, shifted by one: target i is the student token after input i. The last target of a row
is the first token of the next row, so no target is learned twice in an epoch. The teacher's side is the contiguous slice of the
teacher's own stream from the token that holds the row's first byte to the last token that a target needs, shifted by one in the
same way. If the row starts with a document, the teacher reads EOS before it, as before every other document. `first` and `last`
are the range of the teacher's *targets* that covers the text of each student *target*. A prefix (`front.py`) is read before the
inputs. Its ids use positions of the row, and have no target.

All functions here are pure functions of (dataset, order, k): nothing is prefetched or cached.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_vocagno.batch.front import NO_FRONT, Front
from megatron_vocagno.batch.text_losses import TextLoss

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

SLACK = 8
"""Student positions that a row keeps free, so that it still fits after its start moves back to a common boundary.

Common boundaries are close together: for Llama-2 tokens against five teachers, the start moves back by 0.2 to 0.3 tokens on
average, by at most 3 on English, mathematics and code, and by at most 7 on right-to-left text. If no boundary is within the
slack, the row is cut inside a teacher token, and the targets that need this token are unmapped and counted.
"""


class MappingStatus(IntEnum):
    """Whether a student target is mapped to teacher tokens, and the reason if it is not."""

    MAPPED = 0
    END_OF_DOCUMENT = 1
    """The target is the token that ends a document, which is not text for either model."""
    NO_TEXT = 2
    """The target has no bytes, for example a separate dummy-prefix token."""
    NO_CONTEXT = 3
    """The target needs the first teacher token of a row that starts inside a document. The teacher has no context for that token,
    so it has no loss."""
    BEYOND_TEACHER = 4
    """The target needs teacher tokens beyond the longest row that the teacher reads."""
    CUT_CHUNK = 5
    """The row, or one of the reasons above, lacks a part of the target's chunk. Only for unit `chunk`."""


class SpanView(Protocol):
    """Teacher positions of student tokens, half-open, in document coordinates."""

    @property
    def first(self) -> Int32: ...
    @property
    def last(self) -> Int32: ...


class AlignedDocuments(Protocol):
    """The part of a dataset's interface that rows use. Lengths include the token that ends a document."""

    @property
    def student_lengths(self) -> Int32: ...
    @property
    def teacher_lengths(self) -> Int32: ...
    def student(self, document: int, start: int, stop: int) -> Int32: ...
    def teacher(self, document: int, start: int, stop: int) -> Int32: ...
    def spans(self, document: int, start: int, stop: int) -> SpanView: ...
    def common_boundary(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_]: ...


class DocumentSpan(NamedTuple):
    """Tokens [start, stop) of one document."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class TokenStream:
    """The student's tokens of the documents in one order. Positions count from the start of the stream."""

    order: Int32
    """[D] documents."""
    starts: Int64
    """[D + 1] the position at which each document of the order starts, then the stream's length."""

    @classmethod
    def of(cls, order: Int32, lengths: Int32) -> TokenStream:
        """order: documents. lengths: tokens of every document of the dataset.

        >>> stream = TokenStream.of(np.array([2, 0]), np.array([4, 9, 3]))
        >>> len(stream), stream.place(2), stream.place(3)
        (7, (0, 2), (1, 0))
        """
        starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(lengths[order], out=starts[1:])
        return cls(order, starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, position: int) -> tuple[int, int]:
        """The index in the order of the document at a position, and the index of the token within that document."""
        slot = int(np.searchsorted(self.starts, position, side="right")) - 1
        return slot, position - int(self.starts[slot])


@dataclass(frozen=True)
class Row:
    """n student positions and u teacher positions of the same text, without padding."""

    input_ids: Int32
    """[n]"""
    target_ids: Int32
    """[n] the token after each input."""
    starts_document: npt.NDArray[np.bool_]
    """[n] whether the target is the first token of a document."""
    first: Int32
    last: Int32
    """[n] the range of the teacher's targets that covers each student target, half-open; first == last if it is unmapped."""
    mapping: UInt8
    """[n] a `MappingStatus` for each target."""
    teacher_input_ids: Int32
    teacher_target_ids: Int32
    """[u] the logits at input j give the teacher's loss of target j."""
    teacher_starts_document: npt.NDArray[np.bool_]
    """[u] whether the teacher's target is the first token of a document."""
    teacher_losses: Float32 | None = None
    """[u] nats, if they are cached; then the row has no teacher ids. Else None."""
    lead_ids: tuple[int, ...] = ()
    teacher_lead_ids: tuple[int, ...] = ()
    """The prefix that is read before the inputs; usually a BOS, or empty."""
    teacher_text_losses: tuple[TextLoss, ...] = ()
    """The losses of each teacher over the text of the row. Empty if the losses are not cached."""

    @property
    def is_text(self) -> npt.NDArray[np.bool_]:
        """[n] whether a target is text: neither the first token nor the end of a document."""
        text: npt.NDArray[np.bool_] = (self.mapping != MappingStatus.END_OF_DOCUMENT) & ~self.starts_document
        return text


class Rows:
    """All rows of the documents in one order: `len(rows)`, `rows[k]`. There are no rows if the documents have one token in total.

    >>> from megatron_vocagno.corpus import AlignedDataset
    >>> rows = Rows(AlignedDataset.open("data/mine"), np.array([1, 0]), row_length=32)
    >>> len(rows), rows.pieces(0)
    (1, [DocumentSpan(document=1, start=0, stop=8), DocumentSpan(document=0, start=0, stop=7)])
    >>> row = rows[0]
    >>> row.input_ids.tolist()[1:] == row.target_ids.tolist()[:-1], len(row.target_ids), len(row.teacher_target_ids)
    (True, 14, 15)
    >>> [MappingStatus(code).name for code in row.mapping if code]
    ['END_OF_DOCUMENT', 'END_OF_DOCUMENT']
    """

    def __init__(
        self,
        dataset: AlignedDocuments,
        order: Int32,
        row_length: int,
        teacher: TeacherSource | None = None,
        front: Front = NO_FRONT,
    ) -> None:
        """
        order       [D] documents of the dataset, each once
        row_length  student positions per row, S, prefix included
        teacher     source of the teacher's side; by default all teacher ids, without a limit and without a prefix
        front       prefix of the student

        Raises ValueError: row_length is at most 2 * SLACK + len(front), so that a row could end before it starts.
        """
        self.stride = row_length - SLACK - len(front)
        if self.stride <= SLACK:
            raise ValueError(f"rows of {row_length} student positions are too short: at least {2 * SLACK + len(front) + 1}")
        self.dataset = dataset
        self.row_length = row_length
        self.front = front
        self.teacher = teacher or TeacherIds(dataset)
        self.student_lengths = dataset.student_lengths
        self.student = TokenStream.of(order, self.student_lengths)

    def __len__(self) -> int:
        """Number of rows. The last row may be short: its last target is the last token of the last document."""
        return max(0, -(-(len(self.student) - 1) // self.stride))

    def start(self, k: int) -> int:
        """Student position at which row k starts."""
        slot, token = self._place(k)
        return int(self.student.starts[slot]) + token

    def pieces(self, k: int) -> list[DocumentSpan]:
        """The spans of documents that hold row k's inputs and its last target."""
        (slot, token), (last_slot, last_token) = self._place(k), self._place(k + 1)
        documents = self.student.order[slot : last_slot + 1].tolist()
        starts = [token] + [0] * (len(documents) - 1)
        stops = [*self.student_lengths[documents[:-1]].tolist(), last_token + 1]
        return [DocumentSpan(*piece) for piece in zip(documents, starts, stops, strict=True)]

    def __getitem__(self, k: int) -> Row:
        """Read row k from the dataset. Raises IndexError: there is no row k."""
        if not 0 <= k < len(self):
            raise IndexError(f"row {k} of {len(self)}")
        pieces = self.pieces(k)
        ids = np.concatenate([self.dataset.student(*piece) for piece in pieces])
        begins = np.zeros(len(ids), np.bool_)
        ends = np.zeros(len(ids), np.bool_)
        borders = list(itertools.accumulate(piece.stop - piece.start for piece in pieces[:-1]))
        begins[borders] = True
        ends[[border - 1 for border in borders]] = True
        ends[-1] = pieces[-1].stop == self.student_lengths[pieces[-1].document]
        teacher = self.teacher.read(pieces)

        first, last, mapping = teacher.first, teacher.last, np.zeros(len(teacher.first), np.uint8)
        # if several reasons apply, the last one here is recorded
        if teacher.cut is not None:
            mapping[teacher.cut] = MappingStatus.CUT_CHUNK
        mapping[last > len(teacher.starts_document)] = MappingStatus.BEYOND_TEACHER
        mapping[first < 0] = MappingStatus.NO_CONTEXT
        mapping[first == last] = MappingStatus.NO_TEXT
        mapping[ends[1:]] = MappingStatus.END_OF_DOCUMENT
        unmapped = mapping != MappingStatus.MAPPED
        first[unmapped] = last[unmapped] = 0
        lead, inputs = self.front.before(ids[:-1], begins[1:])
        return Row(
            input_ids=inputs,
            target_ids=ids[1:],
            starts_document=begins[1:],
            first=first,
            last=last,
            mapping=mapping,
            teacher_input_ids=teacher.input_ids,
            teacher_target_ids=teacher.target_ids,
            teacher_starts_document=teacher.starts_document,
            teacher_losses=teacher.losses,
            lead_ids=lead,
            teacher_lead_ids=teacher.lead_ids,
            teacher_text_losses=teacher.text_losses,
        )

    def _place(self, k: int) -> tuple[int, int]:
        """The document's index in the order, and the token in it, at which row k starts. For the row after the last one: the
        last token of the stream.
        """
        if k >= len(self):
            return self.student.place(len(self.student) - 1)
        slot, token = self.student.place(k * self.stride)
        lowest = max(0, token - SLACK)
        common = self.dataset.common_boundary(int(self.student.order[slot]), lowest, token + 1).tolist()
        back = common[::-1].index(True) if True in common else 0
        return slot, token - back


# ---- the teacher's side of a row

NO_IDS = np.zeros(0, np.int32)
"""The ids of a teacher with cached losses, which is not run."""


@dataclass(frozen=True)
class TeacherSide:
    """u teacher positions, and the range of them that covers each of the n targets of a row."""

    first: Int32
    last: Int32
    """[n] half-open. first is below 0, or last above u, if the row lacks a teacher token that covers a target."""
    starts_document: npt.NDArray[np.bool_]
    """[u] whether the teacher's target is the first token of a document."""
    input_ids: Int32
    target_ids: Int32
    """[u], or [0] if the losses are cached."""
    losses: Float32 | None = None
    """[u] nats, if they are cached."""
    lead_ids: tuple[int, ...] = ()
    """The prefix that is read before the inputs."""
    text_losses: tuple[TextLoss, ...] = ()
    """The losses of each teacher over the text. Empty if the losses are not cached."""
    cut: npt.NDArray[np.bool_] | None = None
    """[n] whether the row lacks a part of the target's chunk. None if no chunks are compared."""


class TeacherSource(Protocol):
    """A source of the teacher's side of rows."""

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        """pieces: the spans of documents that hold the row's inputs and its last target."""
        ...


class TeacherIds:
    """The teacher's token ids, for a teacher that is run on each row."""

    def __init__(self, dataset: AlignedDocuments, limit: int | None = None, front: Front = NO_FRONT) -> None:
        """limit: most positions that the teacher reads, prefix included. front: the teacher's prefix."""
        self.dataset, self.front = dataset, front
        self.limit = None if limit is None else limit - len(front)

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        document, start, _ = pieces[0]
        # if the row starts inside a document, its first teacher token has no context here: it is an input, not a target
        skipped = int(self.dataset.spans(document, start, start + 1).first[0]) + 1 if start else 0
        targets = TeacherTargets.of(self.dataset, pieces, skipped, self.limit)
        before = (skipped or int(self.dataset.teacher_lengths[document])) - 1
        ids = np.concatenate(
            [self.dataset.teacher(document, before, before + 1), *(self.dataset.teacher(*piece) for piece in targets.pieces)]
        )
        lead, inputs = self.front.before(ids[:-1], targets.starts_document, opens=not start)
        return TeacherSide(targets.first, targets.last, targets.starts_document, inputs, ids[1:], lead_ids=lead)


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's targets of a row: its stream from the first target to the last one that the row needs."""

    first: Int32
    last: Int32
    starts_document: npt.NDArray[np.bool_]
    """As in TeacherSide."""
    pieces: list[DocumentSpan]
    """The spans of the targets, in teacher tokens."""

    @classmethod
    def of(cls, dataset: AlignedDocuments, pieces: list[DocumentSpan], skipped: int, limit: int | None = None) -> TeacherTargets:
        """
        pieces   spans of the row, in student tokens
        skipped  teacher tokens of the first document that come before the first target
        limit    most targets
        """
        spans = [dataset.spans(*piece) for piece in pieces]
        lengths = [int(dataset.teacher_lengths[piece.document]) for piece in pieces]
        # the position of each document's first token among the targets
        bases = list(itertools.accumulate(lengths[:-1], initial=-skipped))
        first = np.concatenate([part.first + base for part, base in zip(spans, bases, strict=True)])[1:]
        last = np.concatenate([part.last + base for part, base in zip(spans, bases, strict=True)])[1:]
        count = max(int(last[-1]), 0) if limit is None else min(max(int(last[-1]), 0), limit)
        bounds = [
            DocumentSpan(piece.document, max(0, -base), min(length, count - base))
            for piece, base, length in zip(pieces, bases, lengths, strict=True)
        ]
        begins = np.zeros(count, np.bool_)
        begins[[base for base in bases if 0 <= base < count]] = True
        return cls(first, last, begins, [piece for piece in bounds if piece.start < piece.stop])
