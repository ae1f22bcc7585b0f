"""Guides for baselines that select tokens without a teacher.

    student   g = 0, so the excess is the student's own loss
    random    g = -u with u uniform on (0, 1]; the excess is u, and the student's loss is not used

Position i holds the guide of target i and covers only target i. A target has a guide if a teacher with cached losses would have
one for it. The baselines therefore select from the same tokens as a guided run.
"""

from __future__ import annotations

import numpy as np

from megatron_vocagno.batch.front import NO_FRONT, Front
from megatron_vocagno.batch.loader import TrainRows
from megatron_vocagno.batch.pack import NO_IDS, AlignedDocuments, DocumentSpan, Float32, TeacherSide


class ZeroGuide:
    """A guide of zero for every student token that has text."""

    def __init__(self, dataset: AlignedDocuments) -> None:
        self.dataset = dataset

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        spans = [self.dataset.spans(*piece) for piece in pieces]
        mapped = np.concatenate([part.first < part.last for part in spans])[1:]
        first = np.arange(len(mapped), dtype=np.int32)
        starts = np.zeros(len(mapped), np.bool_)
        return TeacherSide(first, first + mapped, starts, NO_IDS, NO_IDS, self._guide(pieces[0], len(mapped)))

    def _guide(self, start: DocumentSpan, targets: int) -> Float32:
        return np.zeros(targets, np.float32)


class RandomGuide(ZeroGuide):
    """A random guide. It depends only on the seed, the epoch and the place in the dataset where a row starts. It is therefore the
    same in every parallel layout and in a resumed run.
    """

    def __init__(self, dataset: AlignedDocuments, seed: int, part: int, epoch: int = 0) -> None:
        """part: number of the dataset in its blend."""
        super().__init__(dataset)
        self.seed, self.part, self.epoch = seed, part, epoch

    def _guide(self, start: DocumentSpan, targets: int) -> Float32:
        place = (self.part, self.epoch, start.document, start.start)
        random = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=place))
        return random.random(targets, np.float32) - np.float32(1)


class RandomRows(TrainRows):
    """Rows with random guides that differ between epochs."""

    def __init__(self, dataset: AlignedDocuments, row_length: int, seed: int, part: int, front: Front = NO_FRONT) -> None:
        self.part = part
        super().__init__(dataset, row_length, seed, front=front)

    def _source(self, epoch: int) -> RandomGuide:
        return RandomGuide(self.dataset, self.seed, self.part, epoch)
