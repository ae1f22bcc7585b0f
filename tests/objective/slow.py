"""The method in plain Python, one token after the other: what the tests hold the tensors against. No torch, no vector."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal
from itertools import chain

NAN = math.nan
Row = list[float]


def guide(losses: Row, first: int, last: int, how: str) -> float:
    span = losses[first:last]
    if not span or any(math.isnan(loss) for loss in span):
        return NAN
    return {"max": max, "min": min, "sum": sum, "mean": lambda xs: sum(xs) / len(xs)}[how](span)


def kept_count(tokens: int, keep: str) -> int:
    return int((Decimal(tokens) * Decimal(keep)).to_integral_value(ROUND_CEILING))


def select_one(excess: Row, eligible: list[bool], keep: str, positive: bool) -> list[int]:
    """Weights of one selection group."""
    candidates = [i for i, (d, e) in enumerate(zip(excess, eligible, strict=True)) if e and not math.isnan(d)]
    ranking = sorted(candidates, key=lambda i: (-excess[i], i))
    kept = ranking[: kept_count(len(ranking), keep)]
    return [int(i in kept and (not positive or excess[i] > 0)) for i in range(len(excess))]


def select(excess: list[Row], eligible: list[list[bool]], keep: str, scope: str, positive: bool) -> list[list[int]]:
    if scope == "sequence":
        return [select_one(d, e, keep, positive) for d, e in zip(excess, eligible, strict=True)]
    flat = select_one(list(chain(*excess)), list(chain(*eligible)), keep, positive)
    width = len(excess[0])
    return [flat[row * width : (row + 1) * width] for row in range(len(excess))]


def weights(student: list[Row], guides: list[Row], valid: list[list[bool]], keep: str, scope: str, unmapped: str, positive: bool):
    """All weights, unmapped tokens included; and the smallest kept excess of each group that keeps something."""
    excess = [[s - g for s, g in zip(*rows, strict=True)] for rows in zip(student, guides, strict=True)]
    kept = select(excess, valid, keep, scope, positive)
    groups = zip(excess, kept, strict=True) if scope == "sequence" else [(list(chain(*excess)), list(chain(*kept)))]
    thresholds = [min(d for d, w in zip(*group, strict=True) if w) for group in groups if any(group[1])]
    for row, (losses, row_guides, row_valid) in enumerate(zip(student, guides, valid, strict=True)):
        for i, (loss, g, v) in enumerate(zip(losses, row_guides, row_valid, strict=True)):
            if v and math.isnan(g) and not math.isnan(loss) and unmapped == "include":
                kept[row][i] = 1
    return kept, thresholds
