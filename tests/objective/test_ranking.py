"""How many tokens are kept, and the threshold that is found from counts."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from megatron_vocagno.objective import ranking
from megatron_vocagno.objective.ranking import kept_count
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import planned_kept, select_tokens
from tests.objective import plain

KEEPS = ["0.1", "0.3", "0.4", "0.6", "0.7", "0.999999", "1"]


def select(excess_BS: Tensor, mapped_BS: Tensor, rule: Rule) -> Tensor:
    """Weights, under a teacher whose loss is 0."""
    first_BS = torch.arange(excess_BS.shape[1]).expand(excess_BS.shape)
    inputs = excess_BS, torch.zeros(excess_BS.shape), first_BS, first_BS + mapped_BS, torch.ones(excess_BS.shape).bool()
    return select_tokens(*inputs, rule).weight_BS


def test_counts_of_digits_find_what_ranking_finds() -> None:
    """The code path for several ranks, with one: every float, infinities, ties and groups without an eligible token."""
    generator = torch.Generator().manual_seed(0)
    met = dict.fromkeys(["ties", "infinite", "nothing eligible"], 0)
    for number in range(200):
        shape = (3, int(torch.randint(1, 60, (), generator=generator)))
        value_GT = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)
        if number % 2:  # few values
            value_GT = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 1e-45, math.inf])[
                torch.randint(0, 6, shape, generator=generator)
            ]
        eligible_GT = (torch.rand(shape, generator=generator) < [0.0, 0.5, 1.0][number % 3]) & ~value_GT.isnan()
        keep = [0.1, 0.4, 1.0][number // 2 % 3]
        want_GT, lowest_G = ranking.highest(value_GT, eligible_GT, keep, None)
        assert torch.equal(ranking._highest_over_ranks(ranking._sortable(value_GT, eligible_GT), keep, None), want_GT)
        assert torch.equal(lowest_G, ranking.lowest(value_GT, want_GT, None))
        dropped_GT = eligible_GT & ~want_GT
        met["ties"] += bool((dropped_GT & (value_GT == lowest_G[:, None])).any())
        met["infinite"] += bool((eligible_GT & value_GT.isinf()).any())
        met["nothing eligible"] += not eligible_GT.any()
    assert min(met.values()) > 20, met


def test_the_count_is_the_exact_ceiling_of_the_written_share() -> None:
    assert 0.4 * 5 == 2.0 and math.ceil(0.1 * 30) == 3 and math.ceil(0.7 * 10) == 7
    traps = 0
    for keep in [f"0.{digits:02d}" for digits in range(1, 100)] + ["1", "0.000001", "0.333333"]:
        for tokens in [*range(120), 10**6, 10**9]:
            want = plain.kept_count(tokens, keep)
            assert kept_count(tokens, float(keep)) == want
            traps += math.ceil(float(keep) * tokens) != want
    assert traps > 10, "the float product is right everywhere: nothing was tested"
    for tokens, keep in ((30, 0.1), (10, 0.7), (5, 0.4), (10, 0.3), (100, 0.07), (100, 0.55)):
        ones = torch.ones(1, tokens)
        assert select(ones, ones.bool(), Rule(keep)).sum().item() == kept_count(tokens, keep)


def test_the_plan_is_the_number_of_tokens_that_are_kept() -> None:
    rng = random.Random(5)
    met = 0
    for _ in range(200):
        rule = Rule(
            keep=float(rng.choice(KEEPS)),
            scope=rng.choice(["sequence", "microbatch"]),  # type: ignore[arg-type]
            unmapped=rng.choice(["include", "exclude"]),  # type: ignore[arg-type]
        )
        mapped = torch.rand(4, 12) < rng.random()
        plan = planned_kept(mapped.sum(1).tolist(), (~mapped).sum(1).tolist(), rule)
        assert plan == select(torch.randn(4, 12), mapped, rule).sum().item()
        met += 0 < plan < 48
    assert met > 100
    assert planned_kept([], [], Rule(scope="sequence")) == 0


@pytest.mark.parametrize("keep", [0, -0.1, 1.000001, math.nan, math.inf, 1 / 3])
def test_an_invalid_share_is_refused(keep: float) -> None:
    for refusing in (lambda: kept_count(10, keep), lambda: Rule(keep)):
        with pytest.raises(ValueError, match="keep = "):
            refusing()
