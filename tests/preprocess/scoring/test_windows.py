"""Windows score every token once, with all the context that they owe; forwards read every row once, with little padding."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from megatron_vocagno.batch.forwards import FORWARD_COST, plan_forwards
from megatron_vocagno.preprocess.windows import plan_windows


def by_hand(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Each target in the first window that holds it with at least N - M tokens before it: (target, its window's start, stop)."""
    found = []
    for target in range(length):
        start = 0
        while not (start <= target < start + context and (start == 0 or target - start >= context - stride)):
            start += stride
        found.append((target, start, min(start + context, length)))
    return found


def test_every_target_is_scored_once_in_the_first_window_that_owes_it() -> None:
    several = scored = 0
    for context, stride in product(range(1, 12), range(1, 12)):
        if stride > context:
            continue
        lengths = np.arange(1, 45)
        windows = plan_windows(lengths, context, stride)
        assert np.all(windows.widths <= context) and np.all(windows.first < windows.stop), "no window is in vain"
        for document, length in enumerate(lengths.tolist()):
            mine = np.flatnonzero(windows.document == document)
            got = sorted(
                (target, int(windows.start[w]), int(windows.stop[w]))
                for w in mine
                for target in range(int(windows.first[w]), int(windows.stop[w]))
            )
            assert got == by_hand(length, context, stride)
            several += len(mine) > 2
            scored += len(got)
    assert several > 1000 and scored > 50_000


@pytest.mark.parametrize("budget", [100, 1000, 16_384])
def test_every_row_is_read_once_within_the_budget_and_hardly_padded(budget: int) -> None:
    random = np.random.default_rng(budget)
    shared = 0
    for rows in (1, 7, 400):
        lengths = np.maximum(1, random.lognormal(5, 1, rows)).astype(np.int64)
        forwards = plan_forwards(lengths, budget)
        assert sorted(np.concatenate(forwards).tolist()) == list(range(rows))
        for forward in forwards:
            assert len(forward) == 1 or len(forward) * lengths[forward].max() <= budget
            shared += len(forward) > 1
        longest = [int(lengths[forward].max()) for forward in forwards]
        assert longest == sorted(longest, reverse=True), "memory that does not suffice is known at once"
        if rows == 400:
            padded = sum(len(forward) * int(lengths[forward].max()) for forward in forwards)
            assert 1 - lengths.sum() / padded < (0.03 if budget < 10_000 else 0.06)
    assert shared > 3
    assert plan_forwards(np.zeros(0, np.int64), budget) == []


def test_no_other_cut_of_few_rows_is_cheaper() -> None:
    """Against all cuts of the sorted rows."""
    random = np.random.default_rng(0)
    met = 0
    for _ in range(40):
        lengths = np.sort(random.integers(1, 60, 9))[::-1].copy()
        budget = 120

        def cost(cuts: list[list[int]], budget: int = budget) -> float:
            return sum(max(cut) * len(cut) + budget * FORWARD_COST for cut in cuts)

        best = np.inf
        for borders in product([False, True], repeat=8):
            cuts = [[int(lengths[0])]]
            for border, length in zip(borders, lengths[1:].tolist(), strict=True):
                if border:
                    cuts.append([])
                cuts[-1].append(length)
            if all(len(cut) == 1 or max(cut) * len(cut) <= budget for cut in cuts):
                best = min(best, cost(cuts))
                met += 1
        planned = [lengths[forward].tolist() for forward in plan_forwards(lengths, budget)]
        assert cost(planned) == pytest.approx(best)
    assert met > 400
