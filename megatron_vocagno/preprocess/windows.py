"""What a teacher reads at a time: documents, each alone, as windows of a bounded context.

    document     E t0 t1 t2 ................................ t[n-1]       E: the teacher's BOS or EOS, n tokens with EOS
    window 0     [ E ............... )  N inputs, scores all its targets
    window 1             [ ................. )                           M inputs later, scores the targets from N on
    window 2                     [ .............. )

What the teacher's tokenizer puts in front of a text is read before each window and has no target; in window 0 its last id is E.

Input p is the token before target p. A target is scored once, in the first window that holds it, and so with at least N - M
tokens before it; in the first window with all that there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """W windows, each [W] int64: inputs [start, stop) of a document, of which the targets [first, stop) are scored."""

    document: Int64
    start: Int64
    first: Int64
    stop: Int64

    @property
    def widths(self) -> Int64:
        return self.stop - self.start


def plan_windows(lengths: Int64, context: int, stride: int) -> Windows:
    """Windows of documents of so many tokens [D], in their order. context: N, stride: M, 1 <= M <= N."""
    more = np.maximum(0, -(-(lengths - context) // stride))
    document = np.repeat(np.arange(len(lengths)), more + 1)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(more + 1) - (more + 1), more + 1)
    start = nth * stride
    first = np.where(nth == 0, 0, start + context - stride)
    return Windows(document, start, first, np.minimum(start + context, lengths[document]))
