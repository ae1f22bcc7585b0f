"""Rows: documents in one order, laid end to end, and cut where both token streams have a boundary.

    documents   d3 ......E d0 ....................E d7 ...E      E: end of document, one token on either side
    row k       starts at the last common byte boundary at or before student position k * stride

A row holds n input tokens and n targets, shifted by one: target i is the student token after input i, so the last target
is the first token of the next row, and no target is learned twice in an epoch. The teacher's part is the contiguous slice
of its own stream from the token that holds the row's first byte to the last token that a target needs, shifted by one in
the same way; where the row starts with a document, it reads what it reads before every other document, EOS. `first` and `last`
say which of the teacher's *targets* cover the text of each student *target*. What a model's tokenizer puts in front of a text
(`front.py`) is read before all that; it takes positions of the row, and no target.

Everything here is a pure function of (dataset, order, k): nothing is read ahead, nothing is remembered.
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
"""Student positions that a row keeps free, so that backing up its start to a common boundary never overfills it.

Common boundaries lie close together: for Llama-2 tokens against five teachers the start backs up by 0.2 to 0.3 tokens on
average, by 3 at most on English, mathematics and code and by 7 on right-to-left text. Where none lies within the slack
the row is cut inside a teacher token, and the tokens that need it are unmapped and counted, so that nothing breaks.
"""


class MappingStatus(IntEnum):
    """Why a student target has a guide, or has none."""

    MAPPED = 0
    END_OF_DOCUMENT = 1
    """The token that ends a document: text for neither model."""
    NO_TEXT = 2
    """A token without bytes of its own, such as a lone dummy prefix."""
    NO_CONTEXT = 3
    """Needs the teacher's first token in a row that starts inside of a document: the teacher predicts it from nothing."""
    BEYOND_TEACHER = 4
    """Needs teacher tokens past the teacher's longest row."""


class Spans(Protocol):
    """Teacher positions of student tokens, half-open, in document coordinates."""

    @property
    def first(self) -> Int32: ...
    @property
    def last(self) -> Int32: ...


class AlignedDocuments(Protocol):
    """What rows need of a dataset. Lengths count the token that ends a document."""

    @property
    def student_lengths(self) -> Int32: ...
    @property
    def teacher_lengths(self) -> Int32: ...
    def student(self, document: int, start: int, stop: int) -> Int32: ...
    def teacher(self, document: int, start: int, stop: int) -> Int32: ...
    def spans(self, document: int, start: int, stop: int) -> Spans: ...
    def common_boundary(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_]: ...


class DocumentSpan(NamedTuple):
    """Tokens [start, stop) of one document."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class TokenStream:
    """The student's tokens of the documents in one order; positions count from its beginning."""

    order: Int32
    """[D] documents."""
    starts: Int64
    """[D + 1] the position where each document of the order starts, and the stream's length."""

    @classmethod
    def of(cls, order: Int32, lengths: Int32) -> TokenStream:
        """lengths: tokens of every document of the dataset.

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
        """The slot in the order, and the token within its document, at a position."""
        slot = int(np.searchsorted(self.starts, position, side="right")) - 1
        return slot, position - int(self.starts[slot])


@dataclass(frozen=True)
class Row:
    """n student positions and u teacher positions of the same text. Arrays are not padded."""

    input_ids: Int32
    """[n]"""
    target_ids: Int32
    """[n] the token after each input."""
    starts_document: npt.NDArray[np.bool_]
    """[n] whether the target is the first token of a document."""
    first: Int32
    last: Int32
    """[n] which of the teacher's targets cover each student target, half-open; first == last where it is unmapped."""
    mapping: UInt8
    """[n] a `MappingStatus` for each target."""
    teacher_input_ids: Int32
    teacher_target_ids: Int32
    """[u] the teacher's loss of target j comes from the logits at input j."""
    teacher_starts_document: npt.NDArray[np.bool_]
    """[u] whether the teacher's target is the first token of a document."""
    teacher_losses: Float32 | None = None
    """[u] nats, where they are cached; then there are no teacher ids in the row."""
    lead_ids: tuple[int, ...] = ()
    teacher_lead_ids: tuple[int, ...] = ()
    """What is read before the inputs, in front of text; most often a BOS, or nothing."""
    said: tuple[TextLoss, ...] = ()
    """What each teacher whose losses are cached said of the row's text."""

    @property
    def is_text(self) -> npt.NDArray[np.bool_]:
        """[n] targets inside a document's text: neither its first token nor its end."""
        text: npt.NDArray[np.bool_] = (self.mapping != MappingStatus.END_OF_DOCUMENT) & ~self.starts_document
        return text


class Rows:
    """All rows of the documents in one order. `len(rows)`, `rows[k]`; documents of one token in all give none.

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
        """order [D]: documents of the dataset, each once; teacher: by default ids to be scored, no limit, nothing in front.
        front: of the student.

        Raises ValueError: a row_length S of 2 * SLACK or less beside what is in front, as each row must end after it starts.
        """
        self.stride = row_length - SLACK - len(front)
        if self.stride <= SLACK:
            raise ValueError(f"rows of {row_length} student positions are too short: {2 * SLACK + len(front) + 1} at least")
        self.dataset = dataset
        self.row_length = row_length
        self.front = front
        self.teacher = teacher or TeacherIds(dataset)
        self.student_lengths = dataset.student_lengths
        self.student = TokenStream.of(order, self.student_lengths)

    def __len__(self) -> int:
        """The last row may be short; its last target is the last token of the last document."""
        return max(0, -(-(len(self.student) - 1) // self.stride))

    def start(self, k: int) -> int:
        """Student position where row k starts."""
        slot, token = self._place(k)
        return int(self.student.starts[slot]) + token

    def pieces(self, k: int) -> list[DocumentSpan]:
        """Row k's inputs and its last target, as pieces of documents."""
        (slot, token), (last_slot, last_token) = self._place(k), self._place(k + 1)
        documents = self.student.order[slot : last_slot + 1].tolist()
        starts = [token] + [0] * (len(documents) - 1)
        stops = [*self.student_lengths[documents[:-1]].tolist(), last_token + 1]
        return [DocumentSpan(*piece) for piece in zip(documents, starts, stops, strict=True)]

    def __getitem__(self, k: int) -> Row:
        """Reads row k of the files. Raises IndexError."""
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
        # where several reasons hold, the last one is told
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
            said=teacher.said,
        )

    def _place(self, k: int) -> tuple[int, int]:
        """Slot and token where row k starts; that of the last token for the row after the last."""
        if k >= len(self):
            return self.student.place(len(self.student) - 1)
        slot, token = self.student.place(k * self.stride)
        lowest = max(0, token - SLACK)
        common = self.dataset.common_boundary(int(self.student.order[slot]), lowest, token + 1).tolist()
        back = common[::-1].index(True) if True in common else 0
        return slot, token - back


# ---- the teacher's side of a row

NO_IDS = np.zeros(0, np.int32)
"""Of a teacher whose losses are known."""


@dataclass(frozen=True)
class TeacherSide:
    """u teacher positions, and where the n targets of a row lie among them."""

    first: Int32
    last: Int32
    """[n] half-open; first is below 0, and last above u, where the row lacks what covers a target."""
    starts_document: npt.NDArray[np.bool_]
    """[u]"""
    input_ids: Int32
    target_ids: Int32
    """[u], or [0] where the losses are known."""
    losses: Float32 | None = None
    """[u]"""
    lead_ids: tuple[int, ...] = ()
    """What is read before the inputs."""
    said: tuple[TextLoss, ...] = ()
    """What each teacher whose losses are known said of the text."""


class TeacherSource(Protocol):
    """What reads the teacher's side of rows."""

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        """pieces: the row's inputs and its last target."""
        ...


class TeacherIds:
    """Ids that a teacher has still to score."""

    def __init__(self, dataset: AlignedDocuments, limit: int | None = None, front: Front = NO_FRONT) -> None:
        """limit: most positions that the teacher reads, those in front among them."""
        self.dataset, self.front = dataset, front
        self.limit = None if limit is None else limit - len(front)

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        document, start, _ = pieces[0]
        # inside of a document, its first token in the row has nothing before it, and is only read
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
    """The teacher's stream from its first target in a row to the last one that the row needs."""

    first: Int32
    last: Int32
    starts_document: npt.NDArray[np.bool_]
    """As in TeacherSide."""
    pieces: list[DocumentSpan]
    """Its tokens."""

    @classmethod
    def of(cls, dataset: AlignedDocuments, pieces: list[DocumentSpan], skipped: int, limit: int | None = None) -> TeacherTargets:
        """skipped: teacher tokens of the first document that come before; limit: most targets."""
        spans = [dataset.spans(*piece) for piece in pieces]
        lengths = [int(dataset.teacher_lengths[piece.document]) for piece in pieces]
        # where each document starts among the targets
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
