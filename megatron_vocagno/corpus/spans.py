"""For each student token, the teacher tokens that contain its bytes.

Student token i covers the bytes [s, e) of the text. Its span [first, last) contains every teacher token that overlaps them:
`first` is the first teacher token that ends after s, and `last` is the first teacher token that starts at e or later. A token
without bytes (EOS, or a token that is only a dummy prefix) is **unmapped**: first == last, its position among the teacher tokens.

Both sequences tile one text, so neighbors share at most one teacher token:

    first[i + 1] ∈ {last[i], last[i] - 1}          last[-1] := before

`before` is the teacher position at which the sequence starts. It is 0 for a document, or 1 if the teacher's first token is only a
dummy prefix, to which no student token maps. Both sides have a boundary before token i if and only if first[i] == last[i - 1].
One byte per token is therefore enough on disk:

    code = width << 1 | shares its first teacher token with the previous token
    255: the width is 127 or more; the code is in a separate list of (position, code)
    anchor k: last[4096 k - 1], so that decoding may start in the middle of a document
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.tokens import Tokens
from megatron_vocagno.errors import CorpusError

ANCHOR_EVERY = 4096  # tokens
ESCAPE = 255
WIDEST = 126  # the widest span without an escape


@dataclass(frozen=True)
class Spans:
    """The spans of N student tokens.

    first, last  int32 [N], the teacher tokens [first, last) of each token; a token is unmapped if both are equal
    before       `last` of the token before the first one
    """

    first: NDArray[np.int32]
    last: NDArray[np.int32]
    before: int = 0

    def __len__(self) -> int:
        return len(self.first)

    @property
    def mapped(self) -> NDArray[np.bool_]:
        """bool [N]: whether a token has at least one teacher token."""
        return self.first < self.last

    @property
    def common_boundary(self) -> NDArray[np.bool_]:
        """bool [N]: whether both sequences have a boundary at the start of token i. True at the start of a document."""
        boundary: NDArray[np.bool_] = self.first == self._last_before()
        return boundary

    def with_eos(self) -> Spans:
        """N + 1 spans: these, and the span of the student's EOS, unmapped, at the position of the teacher's EOS."""
        end = self.last[-1:] if len(self) else np.array([self.before], np.int32)
        return Spans(np.append(self.first, end), np.append(self.last, end), self.before)

    def _last_before(self) -> NDArray[np.int32]:
        return np.concatenate([np.array([self.before], np.int32), self.last])[: len(self)]


def align(student: Tokens, teacher: Tokens) -> Spans:
    """Spans of one document's student tokens, by binary search, O(N log M) (docs/method.md, section 1).

    Both sides must tile the same bytes. Only a token at byte 0 may have no text. If neither side has tokens, there are no spans.

    Raises CorpusError if the ends of a side are unknown, the sides have different numbers of bytes, or the ends do not increase.

    For example, the student tokens [sel][ection] and the teacher tokens [select][ion], by the bytes at which they end:

    >>> student, teacher = (Tokens(np.zeros(2, np.int32), np.array(ends)) for ends in ([3, 9], [6, 9]))
    >>> spans = align(student, teacher)
    >>> spans.first.tolist(), spans.last.tolist()
    ([0, 0], [1, 2])
    >>> intersection_over_student(student, teacher, spans).tolist()
    [1.0, 1.0]
    """
    if student.ends_from == "unknown" or teacher.ends_from == "unknown":
        side = "student" if student.ends_from == "unknown" else "teacher"
        raise CorpusError(f"the byte ends of the {side}'s tokens are unknown: does its tokenizer change the text?")
    if student.n_bytes != teacher.n_bytes:
        raise CorpusError(
            f"student reads {student.n_bytes:,} bytes, teacher {teacher.n_bytes:,}: both must read the same text; "
            "is one of the tokenizers normalizing (NFKC, lower-casing)?"
        )
    starts, teacher_starts = student.starts, teacher.starts
    for side, tokens, begin in (("student", student, starts), ("teacher", teacher, teacher_starts)):
        if np.any((tokens.ends <= begin) & (tokens.ends > 0)):
            where = int(np.argmax((tokens.ends <= begin) & (tokens.ends > 0)))
            raise CorpusError(f"{side} token {where} has no text and is not at the document's start: ends must rise")
    first = np.searchsorted(teacher.ends, starts, side="right").astype(np.int32)
    last = np.searchsorted(teacher_starts, student.ends, side="left").astype(np.int32)
    before = int(np.searchsorted(teacher.ends, 0, side="right"))
    empty = student.ends == starts
    return Spans(np.where(empty, np.int32(before), first), np.where(empty, np.int32(before), last), before)


def intersection_over_student(student: Tokens, teacher: Tokens, spans: Spans) -> NDArray[np.float64]:
    """float64 [N]: the fraction of each token's bytes that its span covers, computed from the byte ends; NaN if unmapped."""
    ios = np.full(len(spans), np.nan)
    m = spans.mapped
    left = np.maximum(student.starts[m], teacher.starts[spans.first[m]])
    right = np.minimum(student.ends[m], teacher.ends[spans.last[m] - 1])
    ios[m] = np.maximum(right - left, 0) / np.maximum(student.ends[m] - student.starts[m], 1)
    return ios


@dataclass(frozen=True)
class EncodedSpans:
    """The stored spans of one document.

    codes    uint8 [N]
    anchors  int32 [ceil(N / 4096)]
    escapes  int32 [E, 2], (position, code), by increasing position
    """

    codes: NDArray[np.uint8]
    anchors: NDArray[np.int32]
    escapes: NDArray[np.int32]


def encode(spans: Spans) -> EncodedSpans:
    """A document's spans -> codes. Raises CorpusError if neighbors share more than one teacher token or skip one.

    >>> spans = Spans(np.array([0, 0, 2], np.int32), np.array([1, 2, 3], np.int32))
    >>> encode(spans).codes.tolist()
    [2, 5, 2]
    >>> decode(encode(spans), 1, 3).last.tolist()
    [2, 3]
    """
    before = spans._last_before()
    shared = before - spans.first
    if np.any((shared != 0) & (shared != 1)):
        i = int(np.argmax((shared != 0) & (shared != 1)))
        raise CorpusError(
            f"token {i} starts at teacher token {spans.first[i]}, the one before it ends at {before[i]}: "
            "neighbors must touch or share one teacher token"
        )
    width = spans.last - spans.first
    code = width << 1 | shared
    escaped = np.flatnonzero(width > WIDEST)
    return EncodedSpans(
        codes=np.where(width > WIDEST, ESCAPE, code).astype(np.uint8),
        anchors=before[::ANCHOR_EVERY].astype(np.int32),
        escapes=np.stack([escaped, code[escaped]], axis=1).astype(np.int32),
    )


def decode(stored: EncodedSpans, start: int = 0, stop: int | None = None) -> Spans:
    """Spans of the tokens [start, stop) of a document. Teacher positions count from the start of the document.

    Reads O(stop - start + 4096) codes.
    """
    stop = len(stored.codes) if stop is None else stop
    anchor = start // ANCHOR_EVERY
    begin, skip = anchor * ANCHOR_EVERY, start % ANCHOR_EVERY
    codes = stored.codes[begin:stop].astype(np.int32)
    if not len(codes):  # the anchor of an empty range at the very end may not exist
        return Spans(codes, codes)
    if len(stored.escapes):
        position, code = stored.escapes.T
        in_range = (position >= begin) & (position < stop)
        codes[position[in_range] - begin] = code[in_range]
    width = codes >> 1
    # int32 throughout: numpy's cumulative sum is ten times slower if it has to convert
    last = np.cumsum(width - (codes & 1), dtype=np.int32)
    last += stored.anchors[anchor]
    before = last[skip - 1] if skip else stored.anchors[anchor]
    return Spans(last[skip:] - width[skip:], last[skip:], int(before))
