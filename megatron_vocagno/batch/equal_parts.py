"""A worse alignment, for comparison: both sides of a row are cut into n equal parts, and a target is covered by its whole part.

Let N be the number of targets from the first mapped one to the last, and U the number of teacher tokens that cover them. Target
i belongs to part c = floor(i * n / N), and teacher token j to part floor(j * n / U). A target of part c is covered by the
teacher tokens [ceil(c * U / n), ceil((c + 1) * U / n)). If that range is empty, which happens for n > U, the target is covered
by the single token floor(c * U / n). The same targets are therefore mapped for every n, and runs with different n differ only in
the teacher tokens that cover each target.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from megatron_vocagno.batch.pack import DocumentSpan, Int32, Int64, TeacherSide, TeacherSource


class EqualParts:
    """The teacher's side of another source, with the alignment by equal parts."""

    def __init__(self, source: TeacherSource, parts: int) -> None:
        self.source, self.parts = source, parts

    def read(self, pieces: list[DocumentSpan]) -> TeacherSide:
        side = self.source.read(pieces)
        first, last = part_ranges(side.first, side.last, len(side.starts_document), self.parts)
        return replace(side, first=first, last=last)


def part_ranges(first: Int32, last: Int32, teacher_tokens: int, parts: int) -> tuple[Int32, Int32]:
    """Ranges of targets, first and last [n] -> the ranges of their parts. A target that is unmapped, or whose range reaches
    outside [0, teacher_tokens), keeps its range.

    >>> first, last = part_ranges(np.array([0, 1, 2, 3]), np.array([1, 2, 3, 4]), teacher_tokens=4, parts=2)
    >>> first.tolist(), last.tolist()
    ([0, 0, 2, 2], [2, 2, 4, 4])
    """
    mapped = np.flatnonzero((first < last) & (first >= 0) & (last <= teacher_tokens))
    first, last = first.copy(), last.copy()
    if not len(mapped):
        return first, last
    begin, end = int(first[mapped[0]]), int(last[mapped[-1]])
    targets, covering = int(mapped[-1] - mapped[0]) + 1, end - begin
    part = (mapped - mapped[0]) * parts // targets
    low, high = (-(-edge * covering // parts) for edge in (part, part + 1))
    first[mapped], last[mapped] = begin + np.minimum(low, high - 1), begin + high
    return first, last


def overlap(student_ends: Int64, teacher_ends: Int64, first: Int32, last: Int32) -> tuple[float, float]:
    """Measures how well ranges cover tokens: IoS and IoU, each a mean over the mapped tokens, or NaN if no token is mapped.

    student_ends, teacher_ends  [N], [M] ends of the tokens of one text, in bytes, ascending. The first token begins at byte 0,
                                each other token at the end of the token before it
    first, last                 [N] teacher positions, half-open; first == last if the token is unmapped
    returns                     the bytes that a token shares with its range, divided by the token's bytes (IoS), and by the bytes
                                of token and range together (IoU)

    A mapped token must have at least one byte.
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
