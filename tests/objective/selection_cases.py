"""Random micro-batches for the selection, by kind of difficulty, and the check of a selection against the slow method."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vocagno.objective.rule import Rule, Selection
from megatron_vocagno.objective.statistics import STATS
from tests.objective import plain

INF, NAN = math.inf, math.nan
KINDS = ["smooth", "ties", "special", "equal", "zeros", "denormal", "unmapped", "padding", "one mapped", "broken teacher", "wide"]
SETTINGS = {
    "aggregate": ["max", "mean", "sum", "min"],
    "keep": ["0.000001", "0.1", "0.4", "0.6", "0.999999", "1"],
    "scope": ["sequence", "microbatch", "global"],
    "unmapped": ["include", "exclude"],
    "require_positive": [False, True],
    "unit": ["token", "chunk"],
    "weighting": ["top_k", "top_k", "threshold", "control_variate"],
    "threshold": [0.0, 0.5, 2.0],
    "strength": [0.25, 0.125],
    "clip": [4.0, 1.0],
}


@dataclass(frozen=True)
class Case:
    kind: str
    student: list[list[float]]
    teacher: list[list[float]]
    first: list[list[int]]
    last: list[list[int]]
    valid: list[list[bool]]
    settings: dict[str, Any]

    def tensors(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """The first five arguments of select_tokens."""
        rows = len(self.student)
        losses = [torch.tensor(x, dtype=torch.float32, device=device).reshape(rows, -1) for x in (self.student, self.teacher)]
        spans = [torch.tensor(x, dtype=torch.int32, device=device) for x in (self.first, self.last)]
        return [*losses, *spans, torch.tensor(self.valid, device=device)]

    def rule(self, **changes: Any) -> Rule:
        fields = {name: self.settings[name] for name in SETTINGS} | {"keep": float(self.settings["keep"])}
        return Rule(**(fields | changes))

    @property
    def capacity(self) -> int | None:
        capacity: int | None = self.settings["capacity"]
        return capacity

    def expected(self) -> plain.Selected:
        return plain.select_tokens(self.student, self.teacher, self.first, self.last, self.valid, **self.settings)


def random_case(rng: random.Random, kind: str, rows: int, width: int) -> Case:
    teacher_width = rng.choice([1, width, 2 * width + 1]) if kind != "wide" else 64 + width
    losses = _losses(rng, kind)
    student = [[losses() for _ in range(width)] for _ in range(rows)]
    teacher = [[losses() for _ in range(teacher_width)] for _ in range(rows)]
    first = [[rng.randint(0, teacher_width) for _ in range(width)] for _ in range(rows)]
    last = [[min(a + rng.choice([0, 1, 1, 1, 2, 2, 3, 5]), teacher_width) for a in starts] for starts in first]
    padding = {"padding": 1.0}.get(kind, rng.choice([0.0, 0.1, 0.5]))
    valid = [[rng.random() >= padding for _ in range(width)] for _ in range(rows)]
    if kind in ("unmapped", "one mapped"):
        last = [list(starts) for starts in first]
    if kind == "one mapped":
        row, i = rng.randrange(rows), rng.randrange(width)
        first[row][i], last[row][i], valid[row][i] = 0, 1, True
    if kind == "broken teacher":
        teacher = [[NAN if rng.random() < 0.4 else loss for loss in losses_of_row] for losses_of_row in teacher]
    if kind == "wide":
        for row, i in ((rng.randrange(rows), rng.randrange(width)) for _ in range(3)):
            first[row][i] = rng.randrange(width)
            last[row][i] = first[row][i] + 64
    settings = {name: rng.choice(choices) for name, choices in SETTINGS.items()}
    settings["require_positive"] &= settings["weighting"] == "top_k"
    if settings["unit"] == "chunk":
        first, last = _ascending(first, last)
    tokens = width if settings["scope"] == "sequence" else rows * width
    settings["capacity"] = rng.choice([None, None, tokens, rng.randint(0, tokens), tokens + 3])
    return Case(kind, student, teacher, first, last, valid, settings)


def _ascending(first: list[list[int]], last: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """The ranges that are not empty, in the order of an alignment."""
    for row in range(len(first)):
        mapped = [i for i, (a, b) in enumerate(zip(first[row], last[row], strict=True)) if a < b]
        for ends in (first, last):
            for i, end in zip(mapped, sorted(ends[row][i] for i in mapped), strict=True):
                ends[row][i] = end
    return first, last


def _losses(rng: random.Random, kind: str):  # type: ignore[no-untyped-def]
    level = rng.choice([1, 2, 8, 1024])
    special = [NAN, INF, -INF, 0.0, -0.0, 3.4e38]  # nothing cancels in sums, so their order does not matter
    return {
        "ties": lambda: rng.randint(0, level) / 8,
        "special": lambda: plain.single(rng.choice(special) if rng.random() < 0.4 else rng.randint(0, level) / 8),
        "equal": lambda: 3.0,
        "zeros": lambda: rng.choice([0.0, -0.0]),
        "denormal": lambda: plain.single(rng.randint(-6, 6) * 1e-45),
    }.get(kind, lambda: plain.single(rng.random() * 12))


def assert_selected(got: Selection, case: Case, full: bool) -> None:
    """`got` is the selection of the slow method. full: the lists of tokens are filled up to the capacity."""
    want, settings = case.expected(), case.settings
    lists = len(case.student) if settings["scope"] == "sequence" else 1
    tokens = len(case.student) * len(case.student[0]) // lists
    capacity = tokens if settings["capacity"] is None else min(settings["capacity"], tokens)

    assert got.weight_BS.dtype == got.guide_BS.dtype == torch.float32
    if settings["weighting"] == "control_variate":
        want_BS = torch.tensor(want.weight, dtype=torch.float32).view_as(got.weight_BS)
        assert torch.allclose(got.weight_BS.cpu(), want_BS, rtol=0, atol=2e-7)
        assert torch.equal(got.weight_BS.cpu() == 0, want_BS == 0)
    else:
        assert got.weight_BS.tolist() == want.weight
    assert same(got.guide_BS, torch.tensor(want.guide)), (got.guide_BS, want.guide)

    assert got.tokens_C.dtype == torch.int64
    if full:
        listed = got.tokens_C.view(lists, capacity).tolist()
    else:
        ends = [sum(map(len, want.tokens[: k + 1])) for k in range(lists)]
        listed = [got.tokens_C.tolist()[end - len(places) : end] for end, places in zip(ends, want.tokens, strict=True)]
        assert len(got.tokens_C) == ends[-1]
    for k, (places, weighted) in enumerate(zip(listed, want.tokens, strict=True)):
        others = sorted(set(range(k * tokens, (k + 1) * tokens)) - set(weighted))
        assert places == (weighted + others)[: capacity if full else len(weighted)]

    assert got.stats_PK.dtype == torch.float64 and got.stats_PK.shape[1] == len(STATS)
    named = dict(zip(STATS, got.stats.tolist(), strict=True))
    largest = max(abs(loss) for row in (*case.student, *want.guide) for loss in (*row, 1.0) if math.isfinite(loss))
    for name, value in want.stats.items():
        rounded = name in ("ratio_sum", "weight_sum", "weighted_sum")  # of exponentials in float32
        scale = largest * named["valid"] * 4e-7 if rounded else 1e-12 * largest
        close = named[name] == value or math.isclose(named[name], value, rel_tol=1e-12, abs_tol=scale)
        assert close or (math.isnan(named[name]) and math.isnan(value)), (name, named[name], value)


def same(left: Tensor, right: Tensor) -> bool:
    """Equal. NaN equals NaN."""
    return torch.allclose(left.cpu(), right.cpu(), rtol=0, atol=0, equal_nan=True)


def traits(case: Case) -> dict[str, bool]:
    """Properties of a case that could go wrong. Tests count them."""
    want = case.expected()
    tokens = [t for rows in zip(case.student, want.guide, case.valid, want.weight, strict=True) for t in zip(*rows, strict=True)]
    mapped = [(plain.single(s - g), w) for s, g, v, w in tokens if v and not math.isnan(s - g)]
    kept, dropped = {d for d, w in mapped if w}, {d for d, w in mapped if not w}
    return {
        case.kind: True,
        "cut among ties": case.settings["scope"] != "sequence" and bool(kept & dropped),
        "nothing mapped": not mapped,
        "all kept": len(mapped) > 1 and all(w for _, w in mapped),
        "nothing kept": len(mapped) > 1 and not any(w for _, w in mapped),
        "one position": len(case.student[0]) == 1,
        "over capacity": want.stats["over_capacity"] > 0,
        "no capacity": case.settings["capacity"] == 0,
        "infinite excess": any(math.isinf(d) for d, _ in mapped),
        "infinity less infinity": any(
            v and math.isnan(s - g) and not math.isnan(s) and not math.isnan(g) for s, g, v, _ in tokens
        ),
        "student NaN": any(v and math.isnan(s) for s, _, v, _ in tokens),
    }
