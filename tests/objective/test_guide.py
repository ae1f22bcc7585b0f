"""Teacher losses on student positions."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_vocagno.objective.selection import gather_guide
from tests.objective import plain

HOWS = ["max", "mean", "sum", "min"]


def random_case(rng: random.Random) -> tuple[list[list[float]], list[list[int]], list[list[int]]]:
    rows, positions, losses = rng.randint(1, 4), rng.randint(1, 40), rng.choice([0, 1, 2, 7, 8, 9, 300])
    special = [math.nan, math.inf, -math.inf]
    table = [[rng.choice(special) if rng.random() < 0.03 else rng.randint(0, 40) / 8 for _ in range(losses)] for _ in range(rows)]
    first, last = [], []
    for _ in range(rows):
        starts = [rng.randint(0, losses) for _ in range(positions)]
        first.append(starts)
        last.append([rng.choice([a, min(losses, a + rng.randint(0, 4)), rng.randint(a, losses)]) for a in starts])
    return table, first, last


@pytest.mark.parametrize("how", HOWS)
def test_guide_is_the_aggregate_of_the_range(how: str) -> None:
    rng = random.Random(7)
    met = dict.fromkeys(["unmapped", "nan in range", "infinite", "one", "two", "wide", "no teacher token"], 0)
    for _ in range(150):
        losses, first, last = random_case(rng)
        table = torch.tensor(losses).reshape(len(losses), -1)
        got = gather_guide(table, torch.tensor(first, dtype=torch.int32), torch.tensor(last, dtype=torch.int32), how)
        assert got.dtype == torch.float32
        for row, (starts, ends) in enumerate(zip(first, last, strict=True)):
            for i, (a, b) in enumerate(zip(starts, ends, strict=True)):
                want, have = plain.guide(losses[row], a, b, how), got[row, i].item()
                exact = how in ("max", "min") or not math.isfinite(want)
                assert (
                    have == want
                    or (math.isnan(have) and math.isnan(want))
                    or (not exact and have == pytest.approx(want, rel=1e-6))
                )
                met["unmapped"] += a == b
                met["nan in range"] += any(math.isnan(loss) for loss in losses[row][a:b])
                met["infinite"] += math.isinf(want)
                met["one"] += b - a == 1
                met["two"] += b - a == 2
                met["wide"] += b - a > 64
                met["no teacher token"] += not losses[row]
    assert min(met.values()) > 30, met


@pytest.mark.parametrize("how", HOWS)
def test_a_sum_hears_nothing_of_its_neighbors(how: str) -> None:
    """1e30 beside the range, or an infinity, or NaN: a difference of prefix sums would lose or spoil the small losses."""
    for poison in (1e30, math.inf, math.nan):
        losses = torch.tensor([[poison, 0.5, 0.25, poison]])
        got = gather_guide(losses, torch.tensor([[1]]), torch.tensor([[3]]), how)
        assert got.item() == {"max": 0.5, "min": 0.25, "sum": 0.75, "mean": 0.375}[how]


def test_ranges_outside_of_the_teacher_are_refused() -> None:
    losses = torch.zeros(1, 4)
    for first, last in ((0, 5), (-1, 1), (3, 2)):
        with pytest.raises(ValueError, match=r"\[0, 4\]"):
            gather_guide(losses, torch.tensor([[first]]), torch.tensor([[last]]), "max")
    with pytest.raises(ValueError, match="ranges"):
        gather_guide(losses, torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), "max")
    with pytest.raises(ValueError, match="median"):
        gather_guide(losses, torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), "median")  # type: ignore[arg-type]


def test_no_gradient_reaches_the_teacher() -> None:
    losses = torch.zeros(1, 4, requires_grad=True)
    assert not gather_guide(losses, torch.tensor([[0]]), torch.tensor([[2]]), "mean").requires_grad
