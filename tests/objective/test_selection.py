"""Planned capacities, gradients and refusals of the selection. tests/kernels/test_selection.py holds its results."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import planned_kept, select_tokens
from megatron_vocagno.objective.statistics import STATS
from tests.objective.selection_cases import random_case


def test_the_planned_count_is_enough_capacity_unless_losses_are_nan() -> None:
    rng = random.Random(0)
    met = Counter(dict.fromkeys(["enough", "broken"], 0))
    for number in range(200):
        case = random_case(rng, "broken teacher" if number % 2 else "ties", rows=3, width=12)
        rule = case.rule(unit="token")
        mapped, unmapped = (
            [
                sum(v and (a < b) == is_mapped for v, a, b in zip(*row, strict=True))
                for row in zip(case.valid, case.first, case.last, strict=True)
            ]
            for is_mapped in (True, False)
        )
        if rule.scope == "sequence":
            capacity = max(planned_kept([m], [u], rule) for m, u in zip(mapped, unmapped, strict=True))
        else:
            capacity = planned_kept(mapped, unmapped, rule)
        got = select_tokens(*case.tensors(), rule, capacity=capacity)  # type: ignore[arg-type]
        over = got.stats[STATS.index("over_capacity")].item()
        assert over == 0 or (number % 2 and rule.unmapped == "include")
        met["enough"] += over == 0 and got.weight_BS.sum() > 3
        met["broken"] += over > 0
    assert min(met.values()) > 10, met


def test_no_gradient_flows_and_nothing_is_changed() -> None:
    case = random_case(random.Random(1), "smooth", rows=2, width=9)
    inputs = case.tensors()
    before = [x.clone() for x in inputs]
    inputs[0].requires_grad_()
    got = select_tokens(*inputs, case.rule(), capacity=case.capacity)  # type: ignore[arg-type]
    assert not any(x.requires_grad for x in vars(got).values())
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_unknown_choices_and_unfit_shapes_are_refused() -> None:
    x, spans, valid = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3).bool()
    for name, wrong in (("aggregate", "median"), ("keep", 0), ("scope", "batch"), ("unmapped", "drop")):
        changes: dict[str, Any] = {name: wrong}
        with pytest.raises(ValueError, match=f"{name} = .*{wrong}.*: expected"):
            Rule(**changes)
    for arguments in ((x[:1], x, spans, spans, valid), (x, x, spans, spans, valid[:, :2]), (x, x[:1], spans, spans, valid)):
        with pytest.raises(ValueError, match="expected"):
            select_tokens(*arguments)
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        select_tokens(x, x, spans, spans + 4, valid)
    for capacity in (-1, 2.0):
        with pytest.raises(ValueError, match=f"capacity = {capacity}: expected"):
            select_tokens(x, x, spans, spans, valid, capacity=capacity)  # type: ignore[arg-type]
