"""The teacher's side of rows where its losses are cached: of one teacher as they are, of several as one guide.

A cached loss was computed with the whole document before it, so every teacher token has one, wherever a row starts: no target is
unmapped for lack of context or of room.
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
    """Aligned documents with a loss for each teacher token."""

    @property
    def teacher_byte_lengths(self) -> Int32:
        """[W] UTF-8 bytes of each teacher token."""
        ...

    def teacher_losses(self, document: int, start: int, stop: int) -> Float32: ...


class CachedLosses:
    """The losses of one teacher."""

    def __init__(self, dataset: ScoredDocuments) -> None:
        self.dataset = dataset

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        document, start, _ = pieces[0]
        skipped = int(self.dataset.spans(document, start, start + 1).first[0]) if start else 0
        targets = TeacherTargets.of(self.dataset, pieces, skipped)
        losses = [self.dataset.teacher_losses(*piece) for piece in targets.pieces]
        flat = np.concatenate(losses) if losses else np.zeros(0, np.float32)
        said = self._said(targets, flat)
        return TeacherSide(targets.first, targets.last, targets.starts_document, NO_IDS, NO_IDS, flat, said=(said,))

    def _said(self, targets: TeacherTargets, losses: Float32) -> TextLoss:
        ids = np.concatenate([NO_IDS, *(self.dataset.teacher(*piece) for piece in targets.pieces)])
        lengths = text_bytes(ids, targets.starts_document, self.dataset.teacher_byte_lengths)
        text = lengths > 0
        return TextLoss(float(losses[text].sum(dtype=np.float64)), int(text.sum()), int(lengths.sum()))


class CombinedGuides:
    """The guides of several teachers as one: target i is covered by position i alone, which holds its guide.

    Teachers whose losses of it are not all numbers have no say; where none has one, the guide is NaN.
    """

    def __init__(self, teachers: Sequence[TeacherSource], aggregate: Aggregate, combine: Combine) -> None:
        """teachers: with losses, of the same documents and student ids."""
        self.teachers, self.aggregate, self.combine = teachers, aggregate, combine

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        sides = [teacher.read(pieces) for teacher in self.teachers]
        guide_TN = np.stack([guides(side, self.aggregate) for side in sides])
        mapped = sides[0].first < sides[0].last  # for all alike: where the student's token has text
        first = np.arange(len(mapped), dtype=np.int32)
        starts = np.zeros(len(mapped), np.bool_)
        said = tuple(of_teacher for side in sides for of_teacher in side.said)
        return TeacherSide(first, first + mapped, starts, NO_IDS, NO_IDS, combined(guide_TN, self.combine), said=said)


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
    # reduceat takes [first, last) from every other pair; a range may end with the losses, and an index may not
    bounds = np.stack([first, last], axis=1).ravel()
    losses = np.append(side.losses, np.float32(0)).astype(np.float64)
    reduce = {"max": np.maximum, "min": np.minimum, "sum": np.add, "mean": np.add}[aggregate]
    with np.errstate(invalid="ignore"):
        value: npt.NDArray[np.float64] = reduce.reduceat(losses, bounds)[::2]
    guide[mapped] = value / (last - first) if aggregate == "mean" else value
    return guide


def combined(guide_TN: Float32, how: Combine) -> Float32:
    """[T, n] -> [n], over the teachers whose guide is a number; NaN where there is none. A mean is taken in float64."""
    if how == "min":
        lowest: Float32 = np.fmin.reduce(guide_TN, axis=0)
        return lowest
    known = ~np.isnan(guide_TN)
    total = np.where(known, guide_TN, 0).sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        mean: Float32 = np.divide(total, known.sum(axis=0)).astype(np.float32)
    return mean
