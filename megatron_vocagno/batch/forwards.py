"""Groups rows of different lengths into forward passes. The rows of one forward are padded to one length."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FORWARD_COST = 1 / 64
"""Fixed cost of a forward, as a share of `tokens_per_batch`. A smaller value gives more, smaller forwards with less padding."""

Int64 = NDArray[np.int64]


def plan_forwards(lengths: Int64, tokens_per_batch: int) -> list[Int64]:
    """Groups rows of similar length, longest first, so that the total cost is lowest. A forward costs its positions, padding
    included, and FORWARD_COST.

    lengths           [R] at least 1 each
    tokens_per_batch  most positions of a forward, padding included. A row that is longer gets its own forward
    returns           for each forward, the indices of its rows in `lengths`; an empty list if there are no rows

    >>> [rows.tolist() for rows in plan_forwards(np.array([10, 500, 12, 492]), tokens_per_batch=1000)]
    [[1, 3], [2, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    longest, count = lengths[order].tolist(), len(order)
    cost = np.full(count + 1, np.inf)  # cost[n]: the lowest cost of the first n rows
    cost[0] = 0
    begin_of = np.zeros(count + 1, np.int64)  # begin_of[n]: first row of the forward that ends before row n
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
