"""A worse alignment, for comparison: both sides of a row cut into n equal chunks, each target covered by its whole chunk.

Of the N targets from the first that is mapped to the last, target i belongs to chunk floor(i * n / N); of the U teacher tokens
that cover them, token j to chunk floor(j * n / U). A target is covered by the teacher tokens [ceil(c * U / n),
ceil((c + 1) * U / n)) of its chunk c. Where a chunk holds none, as some do for n > U, it is the one at its place,
floor(c * U / n): so the same targets are mapped for every n, and arms differ in nothing but what covers them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from megatron_vocagno.batch.pack import DocumentSpan, Int32, Int64, TeacherSide, TeacherSource


class Chunked:
    """Another source's rows, with that alignment."""

    def __init__(self, source: TeacherSource, chunks: int) -> None:
        self.source, self.chunks = source, chunks

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        side = self.source.read(pieces)
        first, last = chunk_ranges(side.first, side.last, len(side.starts_document), self.chunks)
        return replace(side, first=first, last=last)


def chunk_ranges(first: Int32, last: Int32, teacher_tokens: int, chunks: int) -> tuple[Int32, Int32]:
    """first, last [n] of targets -> those of their chunks. What is unmapped, or reaches outside of [0, teacher_tokens), stays.

    >>> first, last = chunk_ranges(np.array([0, 1, 2, 3]), np.array([1, 2, 3, 4]), teacher_tokens=4, chunks=2)
    >>> first.tolist(), last.tolist()
    ([0, 0, 2, 2], [2, 2, 4, 4])
    """
    mapped = np.flatnonzero((first < last) & (first >= 0) & (last <= teacher_tokens))
    first, last = first.copy(), last.copy()
    if not len(mapped):
        return first, last
    begin, end = int(first[mapped[0]]), int(last[mapped[-1]])
    targets, covering = int(mapped[-1] - mapped[0]) + 1, end - begin
    chunk = (mapped - mapped[0]) * chunks // targets
    low, high = (-(-edge * covering // chunks) for edge in (chunk, chunk + 1))
    first[mapped], last[mapped] = begin + np.minimum(low, high - 1), begin + high
    return first, last


def overlap(student_ends: Int64, teacher_ends: Int64, first: Int32, last: Int32) -> tuple[float, float]:
    """How well ranges cover tokens: IoS and IoU, each a mean over the mapped tokens; NaN where none is mapped.

    student_ends, teacher_ends  [N], [M] byte ends in one text, ascending; a token begins where the one before it ends, the first
                                at byte 0
    first, last                 [N] teacher positions, half-open; first == last where unmapped
    returns                     of the bytes of a token and those of its range, the intersection over the token's bytes, and over
                                the union

    A mapped token must have bytes.
    """
    mapped = first < last
    student_starts, teacher_starts = (np.concatenate([[0], ends[:-1]]) for ends in (student_ends, teacher_ends))
    start, end = student_starts[mapped], student_ends[mapped]
    range_start, range_end = teacher_starts[first[mapped]], teacher_ends[last[mapped] - 1]
    both = np.maximum(np.minimum(end, range_end) - np.maximum(start, range_start), 0)
    either = (end - start) + (range_end - range_start) - both
    if not len(both):
        return math.nan, math.nan
    return float(np.mean(both / (end - start))), float(np.mean(both / either))
