"""Chunks of rows: which of them the row holds as a whole, and their losses if there are several teachers.

A chunk is the shortest stretch of text that both tokenizers cut alike (`objective.chunks`). A row can begin or end inside of one.
The losses over the rest of the chunk are then in another row, and its targets in this row have nothing to be compared with. The
same is true if the teacher of this row has no loss of one of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_vocagno.batch.cached import combined
from megatron_vocagno.batch.pack import NO_IDS, SLACK, AlignedDocuments, DocumentSpan, Int32, TeacherSide, TeacherSource

Bools = npt.NDArray[np.bool_]


class WholeChunks:
    """The teacher's side of another source. `cut` marks the targets whose chunk is not whole in the row."""

    def __init__(self, source: TeacherSource, dataset: AlignedDocuments) -> None:
        self.source, self.dataset = source, dataset

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        side = self.source.read(pieces)
        mapped = side.first < side.last
        lacking = (side.first < 0) | (side.last > len(side.starts_document))
        lacking |= self._cut_by_start(pieces[0], len(mapped)) | self._cut_by_end(pieces[-1], len(mapped))
        lacking &= mapped
        return replace(side, cut=_spread(lacking, opens_chunk(side.first, side.last)) & mapped)

    def _cut_by_start(self, piece: DocumentSpan, targets: int) -> Bools:
        """[targets] whether a target shares a teacher token with the row's first input, or with text before the row."""
        cut = np.zeros(targets, np.bool_)
        document, start, stop = piece
        low, target = max(0, start - SLACK), start + 1
        spans = self.dataset.spans(document, low, min(stop, target + SLACK))
        reach = spans.last[: target - low].max()
        shared = (spans.first < reach)[target - low :]
        cut[: len(shared)] = shared
        return cut

    def _cut_by_end(self, piece: DocumentSpan, targets: int) -> Bools:
        """[targets] whether a target shares a teacher token with text after the row."""
        cut = np.zeros(targets, np.bool_)
        document, start, stop = piece
        low, length = max(start, stop - SLACK), int(self.dataset.student_lengths[document])
        spans = self.dataset.spans(document, low, min(stop + SLACK, length))
        text = (spans.first < spans.last)[stop - low :]
        if text.any():
            after = spans.first[stop - low :][text.argmax()]
        elif stop + SLACK >= length:
            return cut
        else:  # tokens without text, as far as they were read: a chunk may continue behind them
            after = -1
        shared = (spans.last > after)[: stop - low]
        count = min(len(shared), targets)
        cut[targets - count :] = shared[len(shared) - count :]
        return cut


def opens_chunk(first: Int32, last: Int32) -> Bools:
    """[n] whether a target is the first of its chunk. False if it has no text.

    >>> opens_chunk(np.array([0, 1, 1, 3]), np.array([1, 2, 3, 4])).tolist()
    [True, True, False, True]
    """
    mapped = first < last
    lowest = np.iinfo(np.int32).min
    reach = np.maximum.accumulate(np.where(mapped, last, lowest))
    opens: Bools = mapped & (first >= np.concatenate([[lowest], reach[:-1]]))
    return opens


def _spread(marked: Bools, opens: Bools) -> Bools:
    """[n] whether a target of the same chunk is marked."""
    chunk = opens.cumsum()
    of_chunk = np.zeros(int(chunk[-1]) + 1 if len(chunk) else 1, np.bool_)
    of_chunk[chunk[marked]] = True
    spread: Bools = of_chunk[chunk]
    return spread


class CombinedChunks:
    """Combines the losses of several teachers over each chunk into one. A chunk is the shortest stretch that all tokenizers cut
    alike. Position c holds the loss of chunk c, and covers its targets.

    For each chunk, a teacher is left out if one of its losses there is NaN. If that leaves no teacher, the loss is NaN.
    """

    def __init__(self, teachers: Sequence[TeacherSource], combine: Literal["min", "mean"]) -> None:
        """teachers: WholeChunks of cached losses, for the same documents and student ids."""
        self.teachers, self.combine = teachers, combine

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        sides = [teacher.read(pieces) for teacher in self.teachers]
        mapped = sides[0].first < sides[0].last  # the same for all teachers: whether the student's token has text
        # a boundary is common to all if each teacher has it
        opens = np.logical_and.reduce([opens_chunk(side.first, side.last) for side in sides])
        cut = _spread(np.logical_or.reduce([side.cut for side in sides if side.cut is not None]), opens) & mapped
        chunk = (opens.cumsum() - 1).astype(np.int32)
        loss_TC = np.stack([self._losses(side, chunk, mapped & ~cut, int(opens.sum())) for side in sides])
        first = np.where(mapped, chunk, 0).astype(np.int32)
        return TeacherSide(
            first,
            first + mapped,
            np.zeros(loss_TC.shape[1], np.bool_),
            NO_IDS,
            NO_IDS,
            combined(loss_TC, self.combine),
            text_losses=tuple(text_loss for side in sides for text_loss in side.text_losses),
            cut=cut,
        )

    @staticmethod
    def _losses(side: TeacherSide, chunk: Int32, known: Bools, count: int) -> npt.NDArray[np.float32]:
        """[count] the teacher's loss over each chunk, nats, summed in float64. NaN for a chunk that is not known."""
        assert side.losses is not None
        losses = np.full(count, np.nan, np.float32)
        begin, end = np.full(count, np.iinfo(np.int32).max), np.zeros(count, np.int64)
        np.minimum.at(begin, chunk[known], side.first[known])
        np.maximum.at(end, chunk[known], side.last[known])
        whole = begin < end
        if whole.any():
            # reduceat reduces [begin, end) at every other index, and an index must be inside the losses: hence one more loss
            bounds = np.stack([begin[whole], end[whole]], axis=1).ravel()
            losses[whole] = np.add.reduceat(np.append(side.losses, np.float32(0)).astype(np.float64), bounds)[::2]
        return losses
