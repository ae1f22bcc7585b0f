"""Which tokens are kept, and how many."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from megatron_vocagno.objective import ranking
from megatron_vocagno.objective.ranking import kept_count
from megatron_vocagno.objective.selection import planned_kept, select
from tests.objective import plain

KEEPS = ["0.1", "0.3", "0.4", "0.6", "0.7", "0.999999", "1"]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38]


def random_excess(rng: random.Random) -> tuple[list[list[float]], list[list[bool]]]:
    rows, width = rng.randint(1, 5), rng.choice([1, 2, 3, 17, 40])
    level = rng.choice([1, 2, 8, 1024])  # few values: many ties
    excess = [
        [rng.choice(SPECIAL) if rng.random() < 0.15 else rng.randint(-level, level) / 8 for _ in range(width)]
        for _ in range(rows)
    ]
    share = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    return excess, [[rng.random() < share for _ in range(width)] for _ in range(rows)]


@pytest.mark.parametrize("scope", ["sequence", "microbatch", "global"])
def test_selection_is_the_sorted_ranking(scope: str) -> None:
    rng = random.Random(3)
    met = dict.fromkeys(["cut among ties", "NaN", "infinite", "nothing eligible", "one token", "not positive"], 0)
    for keep, positive, _ in itertools.product(KEEPS, [False, True], range(30)):
        excess, eligible = random_excess(rng)
        got = select(torch.tensor(excess), torch.tensor(eligible), float(keep), scope, require_positive=positive)  # type: ignore[arg-type]
        want = plain.select(excess, eligible, keep, scope, positive)
        assert got.tolist() == want
        flat = [
            (d, w) for ds, es, ws in zip(excess, eligible, want, strict=True) for d, e, w in zip(ds, es, ws, strict=True) if e
        ]
        kept, dropped = {d for d, w in flat if w}, {d for d, w in flat if not w}
        met["cut among ties"] += scope != "sequence" and bool(kept & dropped)
        met["NaN"] += any(math.isnan(d) for d, _ in flat)
        met["infinite"] += any(math.isinf(d) for d, _ in flat)
        met["nothing eligible"] += not flat
        met["one token"] += len(flat) == 1
        met["not positive"] += positive and want != plain.select(excess, eligible, keep, scope, False)
    if scope == "sequence":
        del met["cut among ties"]
    assert min(met.values()) > 10, met


def test_ties_go_to_the_lower_index_and_minus_zero_is_zero() -> None:
    excess = torch.tensor([[-0.0, 0.0, -0.0, 0.0, 0.0]])
    assert select(excess, torch.ones(1, 5), 0.4, "microbatch").tolist() == [[1, 1, 0, 0, 0]]  # type: ignore[arg-type]


def test_every_float_is_ranked_in_its_order() -> None:
    """Neighbouring floats of all magnitudes and both signs: each must be told from the next."""
    bits = torch.cat([torch.arange(0, 0x7F800001, 9_973_391, dtype=torch.int32), torch.tensor([1, 2, 0x7F7FFFFF, 0x7F800000])])
    bits = torch.cat([bits, bits[bits < 0x7F800000] + 1]).to(torch.int32).unique()
    values = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)]).unique()
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    met = 0
    for k in range(1, len(values), 7):
        keep = math.floor(k / len(values) * 1e6) / 1e6
        if keep == 0:
            continue
        want = torch.zeros(len(values))
        want[values.argsort(descending=True)[: kept_count(len(values), keep)]] = 1
        assert torch.equal(select(values[None], torch.ones(1, len(values)).bool(), keep, "microbatch")[0], want)
        met += 1
    assert met > 50 and len(values) > 500


def test_counts_of_digits_find_what_ranking_finds() -> None:
    """The road over ranks, walked by one: every float, infinities, ties and groups without an eligible token."""
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
        assert select(ones, ones.bool(), keep, "microbatch").sum().item() == kept_count(tokens, keep)


def test_the_plan_is_what_selection_keeps() -> None:
    rng = random.Random(5)
    met = 0
    for _ in range(200):
        keep, scope, unmapped = rng.choice(KEEPS), rng.choice(["sequence", "microbatch"]), rng.choice(["include", "exclude"])
        mapped, other = torch.rand(4, 12) < rng.random(), torch.rand(4, 12) < 0.2
        other &= ~mapped
        plan = planned_kept(mapped.sum(1).tolist(), other.sum(1).tolist(), keep=float(keep), scope=scope, unmapped=unmapped)  # type: ignore[arg-type]
        kept = select(torch.randn(4, 12), mapped, float(keep), scope).sum().item()  # type: ignore[arg-type]
        assert plan == kept + (other.sum().item() if unmapped == "include" else 0)
        met += 0 < plan < 48
    assert met > 100
    assert planned_kept([], [], keep=0.4, scope="sequence", unmapped="include") == 0


@pytest.mark.parametrize("keep", [0, -0.1, 1.000001, math.nan, math.inf, 1 / 3])
def test_a_share_that_is_none_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match="keep = "):
        kept_count(10, keep)
    with pytest.raises(ValueError, match="keep = "):
        select(torch.zeros(1, 2), torch.ones(1, 2).bool(), keep, "microbatch")


def test_unknown_scope_and_unfit_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="batch"):
        select(torch.zeros(1, 2), torch.ones(1, 2).bool(), 0.4, "batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        select(torch.zeros(1, 2), torch.ones(2, 2).bool(), 0.4, "microbatch")
    with pytest.raises(ValueError, match="drop"):
        planned_kept([1], [1], keep=0.4, scope="sequence", unmapped="drop")  # type: ignore[arg-type]


def test_no_gradient_flows_through_the_weights() -> None:
    excess = torch.rand(2, 5, requires_grad=True)
    weight = select(excess, torch.ones(2, 5).bool(), 0.4, "microbatch")
    assert not weight.requires_grad and weight.sum() == 4
