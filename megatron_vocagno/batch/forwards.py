"""Rows of different lengths -> forwards: which rows are padded to one length and read together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FORWARD_COST = 1 / 64
"""Of a forward, beside its positions, as a share of the budget. Less makes more, smaller forwards with less padding."""

Int64 = NDArray[np.int64]


def plan_forwards(lengths: Int64, tokens_per_batch: int) -> list[Int64]:
    """Rows of similar length together, longest first, in the cheapest way to cut them: padded positions, and FORWARD_COST each.

    lengths           [R], 1 and more
    tokens_per_batch  most positions of a forward, with padding; a longer row is a forward of its own
    returns           positions in `lengths`, a forward each; no row gives none

    >>> [rows.tolist() for rows in plan_forwards(np.array([10, 500, 12, 492]), tokens_per_batch=1000)]
    [[1, 3], [2, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    longest, count = lengths[order].tolist(), len(order)
    cost = np.full(count + 1, np.inf)  # of the first so many rows
    cost[0] = 0
    begin_of = np.zeros(count + 1, np.int64)  # where the forward begins that ends there
    for begin, length in enumerate(longest):
        rows = min(max(1, tokens_per_batch // length), count - begin)
        ends = slice(begin + 1, begin + rows + 1)
        costs = cost[begin] + tokens_per_batch * FORWARD_COST + length * np.arange(1, rows + 1)
        cheaper = costs < cost[ends]
        cost[ends][cheaper] = costs[cheaper]
        begin_of[ends][cheaper] = begin
    forwards = []
    while count:
        forwards.append(order[begin_of[count] : count])
        count = int(begin_of[count])
    return forwards[::-1]
