"""Both tokenizations of a batch of texts -> the stored spans of all texts in one pass.

`spans.align` is the reference implementation for one document. Here the tokens of a batch are concatenated, and no Python code
runs per document or token. The backend is a compiled two-pointer walk if numba is installed, and array arithmetic over the bytes
otherwise. Both give the same bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.encoders import Ragged
from megatron_vocagno.corpus.spans import ANCHOR_EVERY, ESCAPE, WIDEST
from megatron_vocagno.corpus.tokens import UNSURE


@dataclass(frozen=True)
class Side:
    """One tokenization of a batch of D texts.

    prefix        uint8 [D], number of spaces that were put before each text; UNSURE for a text that is not good
    byte_lengths  uint16 [V], bytes of each id; a text with a token of 0 bytes is not good
    """

    tokens: Ragged
    prefix: NDArray[np.uint8]
    byte_lengths: NDArray[np.uint16]

    def part(self, start: int, stop: int) -> Side:
        """The tokenization of the texts [start, stop)."""
        bounds = self.tokens.bounds[start : stop + 1]
        return Side(
            Ragged(self.tokens.ids[bounds[0] : bounds[-1]], bounds - bounds[0]), self.prefix[start:stop], self.byte_lengths
        )


@dataclass(frozen=True)
class Part:
    """The position of a batch's texts in their documents.

    student, teacher  number of student and teacher tokens of the document before the text
    ends              whether the text ends its document
    """

    student: int = 0
    teacher: int = 0
    ends: bool = True


WHOLE = Part()


@dataclass(frozen=True)
class AlignedTexts:
    """Spans of the good texts, concatenated, in the codec of `spans`.

    good      bool [D]: both sides' tokens cover the text. All fields below are only about good texts.
    codes     uint8 [N'], one per student token, and one for EOS if texts end documents
    anchors   int32 [A], with n_anchors int64 [D] per text
    escapes   int32 [E, 2], with n_escapes int64 [D] per text
    widths    int64 [9]: number of student tokens by width of their span, 0 … 7, 8 or more; EOS is not counted
    covered   number of mapped student tokens whose span contains all their bytes
    """

    good: NDArray[np.bool_]
    codes: NDArray[np.uint8]
    anchors: NDArray[np.int32]
    n_anchors: NDArray[np.int64]
    escapes: NDArray[np.int32]
    n_escapes: NDArray[np.int64]
    widths: NDArray[np.int64]
    covered: int

    @property
    def side_lists(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Each text's anchors and then its escapes, flat, as in the stored pair; and the number of values per text."""
        if not len(self.escapes):
            return self.anchors, self.n_anchors[self.good]
        anchors = np.split(self.anchors, np.cumsum(self.n_anchors)[:-1])
        escapes = np.split(self.escapes.ravel(), np.cumsum(2 * self.n_escapes)[:-1])
        lists = np.concatenate([part for both in zip(anchors, escapes, strict=True) for part in both])
        return lists, (self.n_anchors + 2 * self.n_escapes)[self.good]


def align_texts(student: Side, teacher: Side, n_bytes: NDArray[np.int64], part: Part = WHOLE) -> AlignedTexts:
    """Align a batch. A text is not good if the tokens of one side do not tile it.

    n_bytes: int64 [D], UTF-8 bytes of each text

    Raises ValueError for a token id outside its vocabulary.
    """
    for side in (student, teacher):
        if len(side.tokens.ids) and int(side.tokens.ids.max()) >= len(side.byte_lengths):
            raise ValueError(f"token id {side.tokens.ids.max()} in a vocabulary of {len(side.byte_lengths)}")
    return _backend()(student, teacher, n_bytes, part)


def append_to_each(tokens: Ragged, eos: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """[N + D]: the ids of each text, followed by EOS."""
    texts = len(tokens.lengths)
    ended = np.empty(len(tokens.ids) + texts, dtype)
    ended[tokens.bounds[1:] + np.arange(texts)] = eos
    # slices of some thousand tokens are faster than an index array
    for d, (start, stop) in enumerate(pairwise(tokens.bounds.tolist())):
        ended[start + d : stop + d] = tokens.ids[start:stop]
    return ended


def _backend() -> Callable[[Side, Side, NDArray[np.int64], Part], AlignedTexts]:
    return by_walk if importlib.util.find_spec("numba") else by_bytes


def by_walk(student: Side, teacher: Side, n_bytes: NDArray[np.int64], part: Part = WHOLE) -> AlignedTexts:
    """The compiled backend: O(N + M), each token is visited once."""
    from megatron_vocagno.preprocess.aligner_numba import walk  # imported here: numba takes most of a second

    texts, tokens = len(n_bytes), len(student.tokens.ids)
    codes = np.empty(tokens + texts, np.uint8)
    anchors = np.empty(tokens // ANCHOR_EVERY + 2 * texts + 1, np.int32)
    # a span that needs an escape contains 126 teacher tokens that no earlier span contains
    escapes = np.empty((len(teacher.tokens.ids) // WIDEST + 1, 2), np.int32)
    n_anchors, n_escapes, good = np.zeros(texts, np.int64), np.zeros(texts, np.int64), np.zeros(texts, np.bool_)
    widths = np.zeros(9, np.int64)
    sides = [x for s in (student, teacher) for x in (s.tokens.ids, s.tokens.bounds, s.prefix, s.byte_lengths)]
    outputs = codes, anchors, n_anchors, escapes, n_escapes, good, widths
    done = walk(*sides, n_bytes, part.student, part.teacher, int(part.ends), *outputs)
    n_codes, anchored, escaped, covered = done.tolist()
    return AlignedTexts(good, codes[:n_codes], anchors[:anchored], n_anchors, escapes[:escaped], n_escapes, widths, covered)


def by_bytes(student: Side, teacher: Side, n_bytes: NDArray[np.int64], part: Part = WHOLE) -> AlignedTexts:
    """The numpy backend: counts the teacher tokens that end at each byte, and reads the counts at the ends of student tokens."""
    good = _tiles(student, n_bytes) & _tiles(teacher, n_bytes)
    s, t = student.tokens.select(good), teacher.tokens.select(good)
    s_starts, s_ends = _bytes(s, student.prefix[good], student.byte_lengths)
    t_starts, t_ends = _bytes(t, teacher.prefix[good], teacher.byte_lengths)
    # a token that is only the dummy prefix ends at no byte: it is not counted there, but shifts the positions of its text
    only_prefix = t_ends == t_starts
    before = only_prefix[t.bounds[:-1]].astype(np.int64)
    ended = np.zeros(int(n_bytes[good].sum()) + 1, np.uint8)
    ended[t_ends[~only_prefix]] = 1
    ended_until = np.cumsum(ended, dtype=np.int32)  # at byte b: number of teacher tokens of the batch that end at b or earlier
    ended_in_texts_before = t.bounds[:-1] - (np.cumsum(before) - before)
    shift = np.repeat(before + part.teacher - ended_in_texts_before, s.lengths)
    first = ended_until[s_starts] + shift
    last = np.where(s_ends > s_starts, ended_until[s_ends - 1] + 1 + shift, first)

    mapped = first < last
    in_batch = np.repeat(t.bounds[:-1] - part.teacher, s.lengths)[mapped]
    held = t_starts[first[mapped] + in_batch] <= s_starts[mapped]
    held &= t_ends[last[mapped] - 1 + in_batch] >= s_ends[mapped]
    last_before = np.concatenate([np.zeros(1, np.int64), last])[:-1]
    last_before[s.bounds[:-1]] = before + part.teacher
    width = last - first
    return AlignedTexts(
        good,
        _codes(s, width << 1 | (last_before - first), part),
        *_anchors(s, last, before + part.teacher, good, part),
        *_escapes(s, width, last_before - first, good, part),
        widths=np.bincount(np.minimum(width, 8), minlength=9),
        covered=int(held.sum()),
    )


def _tiles(side: Side, n_bytes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [D]: whether the tokens contain exactly the text's bytes and only a dummy prefix is a token without text."""
    lengths, starts = side.byte_lengths[side.tokens.ids].astype(np.int64), side.tokens.bounds[:-1]
    some = side.tokens.lengths > 0
    lengths[starts[some]] -= side.prefix[some]
    some = some & (side.prefix != UNSURE)
    held = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])[side.tokens.bounds]
    empty = lengths <= 0
    empty[starts[some]] &= ~((lengths[starts[some]] == 0) & (side.prefix[some] > 0))
    empties = np.concatenate([np.zeros(1, np.int64), np.cumsum(empty)])[side.tokens.bounds]
    tiles: NDArray[np.bool_] = some & (np.diff(held) == n_bytes) & (np.diff(empties) == 0)
    return tiles


def _bytes(tokens: Ragged, prefix: NDArray[np.uint8], byte_lengths: NDArray[np.uint16]) -> tuple[NDArray[np.int64], ...]:
    """Two arrays, int64 [N]: the start and the end of each token in the concatenated bytes of all texts."""
    lengths = byte_lengths[tokens.ids].astype(np.int64)
    lengths[tokens.bounds[:-1]] -= prefix
    ends = np.cumsum(lengths)
    return ends - lengths, ends


def _codes(s: Ragged, code: NDArray[np.int64], part: Part) -> NDArray[np.uint8]:
    stored = np.where(code >> 1 > WIDEST, ESCAPE, code).astype(np.uint8)
    if not part.ends:
        return stored
    with_eos = np.zeros(len(stored) + len(s.lengths), np.uint8)
    with_eos[np.arange(len(stored)) + np.repeat(np.arange(len(s.lengths)), s.lengths)] = stored
    return with_eos


def _anchors(
    s: Ragged, last: NDArray[np.int64], before: NDArray[np.int64], good: NDArray[np.bool_], part: Part
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The anchors of all texts, and the number of anchors per text [D]."""
    skipped = -part.student % ANCHOR_EVERY  # tokens before the first anchor
    counts = np.maximum(-(-(s.lengths + part.ends - skipped) // ANCHOR_EVERY), 0)
    nth = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    token = skipped + ANCHOR_EVERY * nth
    of_text = np.repeat(np.arange(len(counts)), counts)
    previous = np.concatenate([np.zeros(1, np.int64), last])[s.bounds[of_text] + token]
    n_anchors = np.zeros(len(good), np.int64)
    n_anchors[good] = counts
    return np.where(token == 0, before[of_text], previous).astype(np.int32), n_anchors


def _escapes(
    s: Ragged, width: NDArray[np.int64], shared: NDArray[np.int64], good: NDArray[np.bool_], part: Part
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(position, code) of the spans that are too wide for a byte, and the number of these spans per text [D]."""
    wide = np.flatnonzero(width > WIDEST)
    of_text = np.searchsorted(s.bounds, wide, side="right") - 1
    n_escapes = np.zeros(len(good), np.int64)
    n_escapes[good] = np.bincount(of_text, minlength=len(s.lengths))
    position = wide - s.bounds[of_text] + part.student
    return np.stack([position, width[wide] << 1 | shared[wide]], axis=1).astype(np.int32), n_escapes
