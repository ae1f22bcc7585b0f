"""The method in plain Python, one token after the other, as the reference of the tests. No torch, no vector."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from itertools import chain

NAN = math.nan
Row = list[float]


def single(x: float) -> float:
    """The float32 nearest to x."""
    try:
        (rounded,) = struct.unpack("f", struct.pack("f", x))
    except OverflowError:
        return math.copysign(math.inf, x)
    return rounded


def guide(losses: Row, first: int, last: int, how: str) -> float:
    span = losses[first:last]
    if not span or any(math.isnan(loss) for loss in span):
        return NAN
    return {"max": max, "min": min, "sum": sum, "mean": lambda xs: sum(xs) / len(xs)}[how](span)


@dataclass(frozen=True)
class Chunk:
    """The student tokens of a chunk, and its excess. NaN if there is none."""

    tokens: list[int]
    guide: float
    """Of each token."""
    excess: float


def chunks(student: Row, teacher: Row, first: list[int], last: list[int], valid: list[bool]) -> list[Chunk]:
    """The chunks of one row."""
    groups: list[list[int]] = []
    for i in range(len(first)):
        if first[i] < last[i]:
            if groups and first[i] < last[groups[-1][-1]]:
                groups[-1].append(i)
            else:
                groups.append([i])
    found = []
    for tokens in groups:
        of_teacher = single(guide(teacher, first[tokens[0]], last[tokens[-1]], "sum"))
        if not all(valid[i] for i in tokens):
            of_teacher = NAN
        excess = single(single(sum(student[i] for i in tokens)) - of_teacher)
        found.append(Chunk(tokens, single(of_teacher / len(tokens)), excess))
    return found


def weight_of(excess: float, weighting: str, threshold: float, strength: float, clip: float) -> float:
    if weighting == "threshold":
        return float(excess > -threshold)
    ratio = math.inf if excess < -700 else math.exp(-excess)
    return single(1 - strength * min(ratio, clip))


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


def weights(
    student: list[Row],
    guides: list[Row],
    valid: list[list[bool]],
    keep: str,
    scope: str,
    unmapped: str,
    positive: bool,
    excess: list[Row] | None = None,
):
    """All weights, including those of unmapped tokens; and the smallest kept excess of each group that keeps any token."""
    excess = excess or [[single(s - g) for s, g in zip(*rows, strict=True)] for rows in zip(student, guides, strict=True)]
    kept = select(excess, valid, keep, scope, positive)
    groups = zip(excess, kept, strict=True) if scope == "sequence" else [(list(chain(*excess)), list(chain(*kept)))]
    thresholds = [min(d for d, w in zip(*group, strict=True) if w) for group in groups if any(group[1])]
    for row, (losses, row_guides, row_valid) in enumerate(zip(student, guides, valid, strict=True)):
        for i, (loss, g, v) in enumerate(zip(losses, row_guides, row_valid, strict=True)):
            if v and math.isnan(g) and not math.isnan(loss) and unmapped == "include":
                kept[row][i] = 1
    return kept, thresholds


@dataclass(frozen=True)
class Selected:
    weight: list[list[int]]
    guide: list[Row]
    tokens: list[list[int]]
    """Positions of the tokens with weight, one list per row ('sequence') or one for all."""
    stats: dict[str, float]


def select_tokens(
    student: list[Row],
    teacher: list[Row],
    first: list[list[int]],
    last: list[list[int]],
    valid: list[list[bool]],
    *,
    aggregate: str,
    keep: str,
    scope: str,
    unmapped: str,
    require_positive: bool,
    capacity: int | None,
    unit: str = "token",
    weighting: str = "top_k",
    threshold: float = 2.0,
    strength: float = 0.25,
    clip: float = 4.0,
) -> Selected:
    if unit == "chunk":
        guides, excess = ([[NAN] * len(row) for row in student] for _ in range(2))
        units = []
        for row, inputs in enumerate(zip(student, teacher, first, last, valid, strict=True)):
            for chunk in chunks(*inputs):
                units.append(chunk.excess)
                for i in chunk.tokens:
                    guides[row][i], excess[row][i] = chunk.guide, chunk.excess
    else:
        guides = [
            [single(guide(losses, a, b, aggregate)) for a, b in zip(starts, ends, strict=True)]
            for losses, starts, ends in zip(teacher, first, last, strict=True)
        ]
        excess = [[single(s - g) for s, g in zip(*rows, strict=True)] for rows in zip(student, guides, strict=True)]
        units = [d for rows in zip(excess, valid, strict=True) for d, v in zip(*rows, strict=True) if v]
    units = [d for d in units if not math.isnan(d)]
    weight, thresholds = weights(student, guides, valid, keep, scope, unmapped, require_positive, excess)
    if weighting != "top_k":
        thresholds = []
        for row, (row_excess, row_valid) in enumerate(zip(excess, valid, strict=True)):
            for i, (d, v) in enumerate(zip(row_excess, row_valid, strict=True)):
                if not math.isnan(guides[row][i]):
                    known = v and not math.isnan(d)
                    weight[row][i] = weight_of(d, weighting, threshold, strength, clip) if known else 0
    width, over = len(student[0]), 0
    everywhere = [[(row, i) for i in range(width)] for row in range(len(student))]
    lists = everywhere if scope == "sequence" else [list(chain(*everywhere))]
    tokens = [[(row, i) for row, i in places if weight[row][i]] for places in lists]
    for places in tokens:
        for row, i in places[capacity if capacity is not None else len(places) :]:
            weight[row][i] = 0
            over += 1
    tokens = [[row * width + i for row, i in places[:capacity]] for places in tokens]
    of_units = {
        "units": len(units),
        "ratio_sum": sum(min(math.exp(min(-d, 700.0)), clip) for d in units),
        "below_sum": sum(d <= -threshold for d in units),
    }
    return Selected(weight, guides, tokens, stats(student, guides, valid, weight, thresholds, over) | of_units)


def stats(
    student: Iterable[Row],
    guides: Iterable[Row],
    valid: Iterable[list[bool]],
    weight: Iterable[list[int]],
    thresholds: Row,
    over: int,
) -> dict[str, float]:
    tokens = [t for rows in zip(student, guides, valid, weight, strict=True) for t in zip(*rows, strict=True) if t[2]]
    known = [(s, g, w) for s, g, _, w in tokens if not math.isnan(s)]
    mapped, unmapped = [t for t in known if not math.isnan(t[1])], [t for t in known if math.isnan(t[1])]
    kept, dropped = [t for t in mapped if t[2]], [t for t in mapped if not t[2]]
    finite = [t for t in thresholds if math.isfinite(t)]
    return {
        "valid": len(tokens),
        "nonfinite": sum(not math.isfinite(t[0]) for t in tokens),
        "mapped": len(mapped),
        "kept": len(kept),
        "unmapped": len(unmapped),
        "unmapped_kept": sum(t[2] != 0 for t in unmapped),
        "over_capacity": over,
        "student_kept_sum": sum(t[0] for t in kept),
        "student_dropped_sum": sum(t[0] for t in dropped),
        "student_unmapped_sum": sum(t[0] for t in unmapped),
        "guide_kept_sum": sum(t[1] for t in kept),
        "guide_dropped_sum": sum(t[1] for t in dropped),
        "weight_sum": sum(t[2] for t in known),
        "weighted_sum": sum(t[2] * t[0] for t in known if t[2]),
        "threshold_sum": sum(finite),
        "thresholds": len(finite),
    }
