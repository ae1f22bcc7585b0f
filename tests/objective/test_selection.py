"""The whole selection in torch: weights, guide, rows and sums, against the method in plain Python."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from megatron_vocagno.objective.rule import Selection
from megatron_vocagno.objective.selection import planned_kept, select_tokens
from megatron_vocagno.objective.statistics import STATS
from tests.objective.selection_cases import KINDS, Case, assert_selected, random_case, traits


def select(case: Case) -> Selection:
    return select_tokens(*case.tensors(), **case.arguments())


@pytest.mark.parametrize("kind", KINDS)
def test_the_selection_is_that_of_the_slow_method(kind: str) -> None:
    rng = random.Random(kind)
    met: Counter[str] = Counter()
    for _ in range(120):
        case = random_case(rng, kind, rows=rng.randint(1, 4), width=rng.choice([1, 2, 7, 16, 33]))
        assert_selected(select(case), case, room=False)
        met.update({name: there for name, there in traits(case).items() if there})
    assert met[kind] == 120 and met["one position"] > 3 and met["no capacity"] > 0
    hard = {
        "ties": "cut among ties",
        "special": "infinity less infinity",
        "broken teacher": "over capacity",
        "smooth": "all kept",
    }
    assert met[hard.get(kind, kind)] > 3, met


def test_the_planned_count_is_room_enough_unless_losses_are_nan() -> None:
    rng = random.Random(0)
    met = Counter(dict.fromkeys(["enough", "broken"], 0))
    for number in range(200):
        case = random_case(rng, "broken teacher" if number % 2 else "ties", rows=3, width=12)
        settings = case.arguments()
        mapped, unmapped = (
            [
                sum(v and (a < b) == is_mapped for v, a, b in zip(*row, strict=True))
                for row in zip(case.valid, case.first, case.last, strict=True)
            ]
            for is_mapped in (True, False)
        )
        plan = {"keep": settings["keep"], "scope": settings["scope"], "unmapped": settings["unmapped"]}
        counts = list(zip(mapped, unmapped, strict=True))
        if settings["scope"] == "sequence":
            settings["capacity"] = max(planned_kept([m], [u], **plan) for m, u in counts)
        else:
            settings["capacity"] = planned_kept(mapped, unmapped, **plan)
        got = select_tokens(*case.tensors(), **settings)
        over = got.stats_PK[:, STATS.index("over_capacity")].sum().item()
        assert over == 0 or (number % 2 and settings["unmapped"] == "include")
        met["enough"] += over == 0 and got.weight_BS.sum() > 3
        met["broken"] += over > 0
    assert min(met.values()) > 10, met


def test_a_mean_does_not_depend_on_where_its_range_begins() -> None:
    """Sums in float64, rounded once: the same losses give the same guide at every offset, whatever the order of adding."""
    torch.manual_seed(0)
    losses, met = torch.rand(13) * 12, 0
    for offset in range(20):
        row = torch.full((1, 40), torch.nan)
        row[0, offset : offset + 13] = losses
        spans = torch.tensor([[offset]]), torch.tensor([[offset + 13]])
        for how, want in (("sum", losses.double().sum()), ("mean", losses.double().mean())):
            settings = {"aggregate": how, "keep": 1, "scope": "microbatch", "unmapped": "exclude"}
            got = select_tokens(torch.ones(1, 1), row, *spans, torch.ones(1, 1).bool(), **settings)  # type: ignore[arg-type]
            assert got.guide_BS.item() == want.float().item()
            met += 1
    assert met == 40


def test_equal_inputs_give_bitwise_equal_selections() -> None:
    rng, met = random.Random(2), 0
    for kind in KINDS:
        case = random_case(rng, kind, rows=4, width=200)
        for left, right in zip(vars(select(case)).values(), vars(select(case)).values(), strict=True):
            assert torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
            met += left.numel() > 0
    assert met > 3 * len(KINDS)


def test_no_gradient_flows_and_nothing_is_changed() -> None:
    case = random_case(random.Random(1), "smooth", rows=2, width=9)
    inputs = case.tensors()
    before = [x.clone() for x in inputs]
    inputs[0].requires_grad_()
    got = select_tokens(*inputs, **case.arguments())
    assert not any(x.requires_grad for x in vars(got).values())
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize(("rows", "width", "teacher"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("scope", ["sequence", "microbatch", "global"])
def test_nothing_to_select_from_is_an_empty_selection(rows: int, width: int, teacher: int, scope: str) -> None:
    nowhere = torch.zeros(rows, width, dtype=torch.int32)
    valid = torch.ones(rows, width).bool()
    settings = {"aggregate": "max", "keep": 0.4, "scope": scope, "unmapped": "exclude"}
    got = select_tokens(torch.ones(rows, width), torch.ones(rows, teacher), nowhere, nowhere, valid, **settings)  # type: ignore[arg-type]
    assert got.weight_BS.shape == got.guide_BS.shape == (rows, width) and not got.weight_BS.any() and not len(got.rows_C)
    assert got.stats_PK.sum().item() == 3 * rows * width  # valid, unmapped, and their losses


def test_unknown_choices_and_unfit_shapes_are_refused() -> None:
    x, spans, valid = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3).bool()
    good = {"aggregate": "max", "keep": 0.4, "scope": "microbatch", "unmapped": "include"}
    for name, wrong in (("aggregate", "median"), ("keep", 0), ("scope", "batch"), ("unmapped", "drop")):
        with pytest.raises(ValueError, match=str(wrong)):
            select_tokens(x, x, spans, spans, valid, **(good | {name: wrong}))  # type: ignore[arg-type]
    for arguments in ((x[:1], x, spans, spans, valid), (x, x, spans, spans, valid[:, :2]), (x, x[:1], spans, spans, valid)):
        with pytest.raises(ValueError, match="expected"):
            select_tokens(*arguments, **good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        select_tokens(x, x, spans, spans + 4, valid, **good)  # type: ignore[arg-type]
