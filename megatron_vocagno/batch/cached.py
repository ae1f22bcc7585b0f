"""The teacher's side of rows, from cached losses: the losses of one teacher, or one guide combined from several teachers.

Each cached loss was computed with the document's earlier text as context. Every teacher token therefore has a loss, no matter
where a row starts: no target is unmapped because the teacher lacks context or room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_vocagno.batch.pack import (
    NO_IDS,
    AlignedDocuments,
    DocumentSpan,
    Float32,
    Int32,
    TeacherSide,
    TeacherSource,
    TeacherTargets,
)
from megatron_vocagno.batch.text_losses import TextLoss, text_bytes
from megatron_vocagno.config import Aggregate

Combine = Literal["min", "mean"]


class ScoredDocuments(AlignedDocuments, Protocol):
    """Aligned documents with a loss per teacher token."""

    @property
    def teacher_byte_lengths(self) -> Int32:
        """[W] UTF-8 bytes of each token of the teacher's vocabulary."""
        ...

    def teacher_losses(self, document: int, start: int, stop: int) -> Float32:
        """[stop - start] nats, of teacher tokens [start, stop) of a document."""
        ...


class CachedLosses:
    """Reads the cached losses of one teacher."""

    def __init__(self, dataset: ScoredDocuments) -> None:
        self.dataset = dataset

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        document, start, _ = pieces[0]
        skipped = int(self.dataset.spans(document, start, start + 1).first[0]) if start else 0
        targets = TeacherTargets.of(self.dataset, pieces, skipped)
        losses = [self.dataset.teacher_losses(*piece) for piece in targets.pieces]
        flat = np.concatenate(losses) if losses else np.zeros(0, np.float32)
        text_losses = (self._text_loss(targets, flat),)
        return TeacherSide(targets.first, targets.last, targets.starts_document, NO_IDS, NO_IDS, flat, text_losses=text_losses)

    def _text_loss(self, targets: TeacherTargets, losses: Float32) -> TextLoss:
        ids = np.concatenate([NO_IDS, *(self.dataset.teacher(*piece) for piece in targets.pieces)])
        lengths = text_bytes(ids, targets.starts_document, self.dataset.teacher_byte_lengths)
        text = lengths > 0
        return TextLoss(float(losses[text].sum(dtype=np.float64)), int(text.sum()), int(lengths.sum()))


class CombinedGuides:
    """Combines the guides of several teachers into one. Position i holds the guide of target i and covers only target i.

    For each target, a teacher is left out if one of its losses there is NaN. If that leaves no teacher, the guide is NaN.
    """

    def __init__(self, teachers: Sequence[TeacherSource], aggregate: Aggregate, combine: Combine) -> None:
        """teachers: sources with losses, for the same documents and student ids."""
        self.teachers, self.aggregate, self.combine = teachers, aggregate, combine

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        sides = [teacher.read(pieces) for teacher in self.teachers]
        guide_TN = np.stack([guides(side, self.aggregate) for side in sides])
        mapped = sides[0].first < sides[0].last  # the same for all teachers: whether the student's token has text
        first = np.arange(len(mapped), dtype=np.int32)
        starts = np.zeros(len(mapped), np.bool_)
        text_losses = tuple(text_loss for side in sides for text_loss in side.text_losses)
        guide = combined(guide_TN, self.combine)
        return TeacherSide(first, first + mapped, starts, NO_IDS, NO_IDS, guide, text_losses=text_losses)


def guides(side: TeacherSide, aggregate: Aggregate) -> Float32:
    """g [n] of each target, as objective.selection.gather_guide computes it: sums and means in float64, rounded once. NaN if a
    target is unmapped or a loss in its range is NaN.
    """
    assert side.losses is not None
    mapped = side.first < side.last
    guide = np.full(len(mapped), np.nan, np.float32)
    if not mapped.any():
        return guide
    first, last = side.first[mapped], side.last[mapped]
    # reduceat reduces [first, last) at every other index. A range may end at the end of the losses, but an index must be inside
    # them: hence one more loss.
    bounds = np.stack([first, last], axis=1).ravel()
    losses = np.append(side.losses, np.float32(0)).astype(np.float64)
    reduce = {"max": np.maximum, "min": np.minimum, "sum": np.add, "mean": np.add}[aggregate]
    with np.errstate(invalid="ignore"):
        value: npt.NDArray[np.float64] = reduce.reduceat(losses, bounds)[::2]
    guide[mapped] = value / (last - first) if aggregate == "mean" else value
    return guide


def combined(guide_TN: Float32, how: Combine) -> Float32:
    """[T, n] -> [n]: the minimum or mean over the teachers whose guide is not NaN; NaN if there is none. Means use float64."""
    if how == "min":
        lowest: Float32 = np.fmin.reduce(guide_TN, axis=0)
        return lowest
    known = ~np.isnan(guide_TN)
    total = np.where(known, guide_TN, 0).sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        mean: Float32 = np.divide(total, known.sum(axis=0)).astype(np.float32)
    return mean
