"""Rows: documents in one order, laid end to end, and cut where both token streams have a boundary.

    documents   d3 ......E d0 ....................E d7 ...E      E: end of document, one token on either side
    row k       starts at the last common byte boundary at or before student position k * stride

A row holds n input tokens and n targets, shifted by one: target i is the student token after input i, so the last target
is the first token of the next row, and no target is learned twice in an epoch. The teacher's part is the contiguous slice
of its own stream from the token that holds the row's first byte to the last token that a target needs, shifted by one in
the same way. `first` and `last` say which of the teacher's *targets* cover the text of each student *target*.

Everything here is a pure function of (dataset, order, k): nothing is read ahead, nothing is remembered.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

SLACK = 8
"""Student positions that a row keeps free, so that backing up its start to a common boundary never overfills it.

Common boundaries lie close together: for Llama-2 tokens against five teachers the start backs up by 0.2 to 0.3 tokens on
average, by 3 at most on English, mathematics and code and by 7 on right-to-left text. Where none lies within the slack
the row is cut inside a teacher token, and the tokens that need it are unmapped and counted, so that nothing breaks.
"""


class Mapping(IntEnum):
    """Why a student target has a guide, or has none."""

    MAPPED = 0
    END_OF_DOCUMENT = 1
    """The token that ends a document: text for neither model."""
    NO_TEXT = 2
    """A token without bytes of its own, such as a lone dummy prefix."""
    NO_CONTEXT = 3
    """Needs the teacher's first token in the row, which the teacher predicts from nothing."""
    BEYOND_TEACHER = 4
    """Needs teacher tokens past the teacher's longest row."""


class Spans(Protocol):
    """Teacher positions of student tokens, half-open, in document coordinates."""

    @property
    def first(self) -> Int32: ...
    @property
    def last(self) -> Int32: ...
    @property
    def common_boundary(self) -> npt.NDArray[np.bool_]: ...


class AlignedDocuments(Protocol):
    """What rows need of a dataset. Lengths count the token that ends a document."""

    @property
    def student_lengths(self) -> Int64: ...
    @property
    def teacher_lengths(self) -> Int64: ...
    def student(self, document: int, start: int, stop: int) -> Int32: ...
    def teacher(self, document: int, start: int, stop: int) -> Int32: ...
    def spans(self, document: int, start: int, stop: int) -> Spans: ...


class Piece(NamedTuple):
    """Tokens [start, stop) of one document."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stream:
    """One token stream of the documents in one order; positions count from its beginning."""

    order: Int64
    """[D] documents."""
    starts: Int64
    """[D + 1] the position where each document of the order starts, and the stream's length."""

    @classmethod
    def of(cls, order: Int64, lengths: Int64) -> Stream:
        starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(lengths[order], out=starts[1:])
        return cls(order, starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, position: int) -> tuple[int, int]:
        """The slot in the order, and the token within its document, at a position."""
        slot = int(np.searchsorted(self.starts, position, side="right")) - 1
        return slot, position - int(self.starts[slot])

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Positions [start, stop) as pieces of documents."""
        pieces = []
        while start < stop:
            slot, token = self.place(start)
            end = min(stop, int(self.starts[slot + 1]))
            pieces.append(Piece(int(self.order[slot]), token, token + end - start))
            start = end
        return pieces


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
    """[n] a `Mapping` for each target."""
    teacher_input_ids: Int32
    teacher_target_ids: Int32
    """[u] the teacher's loss of target j comes from the logits at input j."""

    @property
    def is_text(self) -> npt.NDArray[np.bool_]:
        """[n] targets inside a document's text: neither its first token nor its end."""
        text: npt.NDArray[np.bool_] = (self.mapping != Mapping.END_OF_DOCUMENT) & ~self.starts_document
        return text


class Rows:
    """All rows of the documents in one order. `len(rows)`, `rows[k]`."""

    def __init__(self, dataset: AlignedDocuments, order: Int64, row_length: int, teacher_limit: int | None = None) -> None:
        """row_length S > 2 * SLACK, so that each row ends after it starts; teacher_limit: most teacher positions of a row."""
        if row_length <= 2 * SLACK:
            raise ValueError(f"rows of {row_length} student positions are too short: {2 * SLACK + 1} at least")
        self.dataset = dataset
        self.row_length = row_length
        self.stride = row_length - SLACK
        self.teacher_limit = teacher_limit
        self.student = Stream.of(order, dataset.student_lengths)
        self.teacher = Stream.of(order, dataset.teacher_lengths)

    def __len__(self) -> int:
        """The last row may be short; its last target is the last token of the last document."""
        return max(0, -(-(len(self.student) - 1) // self.stride))

    def start(self, k: int) -> int:
        """Student position where row k starts."""
        if k >= len(self):
            return len(self.student) - 1
        slot, token = self.student.place(k * self.stride)
        lowest = max(0, token - SLACK)
        common = self.dataset.spans(int(self.student.order[slot]), lowest, token + 1).common_boundary
        back = np.flatnonzero(common[::-1])
        return k * self.stride - (int(back[0]) if len(back) else 0)

    def __getitem__(self, k: int) -> Row:
        if not 0 <= k < len(self):
            raise IndexError(f"row {k} of {len(self)}")
        start, stop = self.start(k), self.start(k + 1)
        pieces = self.student.pieces(start, stop + 1)
        ids = np.concatenate([self.dataset.student(*piece) for piece in pieces])
        tokens = np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])
        ends = np.concatenate([np.arange(p.start, p.stop) == self.dataset.student_lengths[p.document] - 1 for p in pieces])
        first, last = self._teacher_spans(start, pieces)

        # the teacher reads from the token that holds the row's first byte, and predicts from its second one on
        origin = int(first[0])
        needed = max(int(last[-1]), origin + 1)
        if self.teacher_limit is not None:
            needed = min(needed, origin + 1 + self.teacher_limit)
        teacher = np.concatenate([self.dataset.teacher(*piece) for piece in self.teacher.pieces(origin, needed)])

        first, last = first[1:] - (origin + 1), last[1:] - (origin + 1)
        mapping = np.select(
            [ends[1:], first == last, first < 0, last > len(teacher) - 1],
            [Mapping.END_OF_DOCUMENT, Mapping.NO_TEXT, Mapping.NO_CONTEXT, Mapping.BEYOND_TEACHER],
            Mapping.MAPPED,
        ).astype(np.uint8)
        mapped = mapping == Mapping.MAPPED
        return Row(
            input_ids=ids[:-1],
            target_ids=ids[1:],
            starts_document=tokens[1:] == 0,
            first=np.where(mapped, first, 0).astype(np.int32),
            last=np.where(mapped, last, 0).astype(np.int32),
            mapping=mapping,
            teacher_input_ids=teacher[:-1],
            teacher_target_ids=teacher[1:],
        )

    def _teacher_spans(self, start: int, pieces: list[Piece]) -> tuple[Int64, Int64]:
        """Teacher stream positions [first, last) of the student tokens of pieces that start at a student position."""
        slot, _ = self.student.place(start)
        firsts, lasts = [], []
        for offset, piece in enumerate(pieces):
            spans = self.dataset.spans(*piece)
            base = int(self.teacher.starts[slot + offset])
            firsts.append(spans.first.astype(np.int64) + base)
            lasts.append(spans.last.astype(np.int64) + base)
        return np.concatenate(firsts), np.concatenate(lasts)
