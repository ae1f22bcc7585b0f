"""Documents -> the windows that a teacher reads. A window contains tokens of one document, at most the context's length.

    document     E t0 t1 t2 ................................ t[n-1]       E: the teacher's BOS or EOS, n tokens with EOS
    window 0     [ E ............... )  N inputs, scores all its targets
    window 1             [ ................. )                           M inputs later, scores the targets from N on
    window 2                     [ .............. )

The ids that the teacher's tokenizer puts in front of a text are read before each window and have no target. In window 0, E is
the last of these ids.

Input p is the token before target p. Each target is scored once, in the first window that contains it. It therefore has at least
N - M tokens of context; in window 0 it has all tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """W windows, each field [W] int64: the inputs [start, stop) of a document; the targets [first, stop) are scored."""

    document: Int64
    start: Int64
    first: Int64
    stop: Int64

    @property
    def widths(self) -> Int64:
        return self.stop - self.start


def plan_windows(lengths: Int64, context: int, stride: int) -> Windows:
    """The windows of documents, in their order.

    lengths  [D], tokens of each document
    context  N, inputs of a window at most
    stride   M, inputs between the starts of two windows, 1 <= M <= N
    """
    more = np.maximum(0, -(-(lengths - context) // stride))
    document = np.repeat(np.arange(len(lengths)), more + 1)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(more + 1) - (more + 1), more + 1)
    start = nth * stride
    first = np.where(nth == 0, 0, start + context - stride)
    return Windows(document, start, first, np.minimum(start + context, lengths[document]))
