"""The whole selection: weights, guide, tokens and sums, against the method in plain Python."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from megatron_vocagno.objective.ranking import kept_count
from megatron_vocagno.objective.rule import Rule, Selection
from tests.kernels import Backend
from tests.objective.selection_cases import KINDS, SETTINGS, Case, assert_selected, random_case, traits

HARD = {"ties": "cut among ties", "special": "infinity less infinity", "broken teacher": "over capacity", "smooth": "all kept"}
"""The trait that a kind of cases must have, apart from its own."""


def select(case: Case, backend: Backend) -> Selection:
    return backend.select_tokens(*case.tensors(backend.device), case.rule(), capacity=case.capacity)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_selection_is_that_of_the_slow_method(
    kind: str, each_ranking: Backend, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every scope with every aggregate, in the interpreter over the kinds. On Triton with one program, and with many small."""
    backend, rng = each_ranking, random.Random(kind)
    histograms = "histograms" in request.node.callspec.params["each_ranking"]
    cases = (12 if kind in HARD else 6) // (1 + histograms) if backend.interpreted else 120
    start = 3 * KINDS.index(kind) if cases < 12 else 0
    met: Counter[str] = Counter()
    for number in range(start, start + cases):
        if backend.triton:
            block = 32 if histograms else 16 if number % 2 else 512
            monkeypatch.setattr("megatron_vocagno.objective.selection_triton.BLOCK", block)
        width = [1, 5, 16, 21, 33][number % 5]
        case = random_case(rng, kind, rows=rng.randint(1, 4), width=width)
        tokens = width if case.settings["scope"] == "sequence" else len(case.student) * width
        case.settings["aggregate"] = SETTINGS["aggregate"][number // 3 % 4]
        case.settings["scope"] = SETTINGS["scope"][number % 3]
        if number % 6 == 1:
            case.settings["capacity"] = min(rng.randint(0, tokens), tokens)
        assert_selected(select(case, backend), case, full=backend.triton)
        met.update({name: there for name, there in traits(case).items() if there})
    assert met[kind] == cases and met["one position"] >= cases // 5, met
    if not backend.interpreted:
        assert met[HARD.get(kind, kind)] > 3 and met["no capacity"] > 0, met


def test_every_float_is_ranked_in_its_order(each_ranking: Backend) -> None:
    """Neighboring floats of all magnitudes and both signs: each must be distinguished from the next."""
    backend = each_ranking
    bits_N = torch.arange(0, 0x7F800001, 8_973_391, dtype=torch.int32)
    bits_N = torch.cat([bits_N, bits_N + 1, torch.tensor([1, 2, 0x7F7FFFFF, 0x7F800000])]).to(torch.int32)
    values = torch.cat([bits_N.view(torch.float32), -bits_N.view(torch.float32)])
    values = values[~values.isnan()].unique()
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))].to(backend.device)
    zero = torch.zeros(1, len(values), device=backend.device)
    first = torch.arange(len(values), device=backend.device)[None]
    some = (0.001, 0.3, 0.499, 0.5, 0.501, 0.77, 0.999)
    met = 0
    for keep in some if backend.interpreted else (*some, *(k / 64 for k in range(1, 64))):
        got = backend.select_tokens(values[None], zero, first, first + 1, zero == 0, Rule(keep, unmapped="exclude"))
        want = torch.zeros(len(values), device=backend.device)
        want[values.argsort(descending=True)[: kept_count(len(values), keep)]] = 1
        assert torch.equal(got.weight_BS[0], want)
        met += 1
    assert met >= 7 and len(values) > 900


def test_a_mean_does_not_depend_on_where_its_range_begins(backend: Backend) -> None:
    """Sums in float64, rounded once: the same losses give the same guide at every offset, in any order of addition."""
    torch.manual_seed(0)
    losses, met, device = torch.rand(13) * 12, 0, backend.device
    for offset in range(0, 20, 7 if backend.interpreted else 1):
        row = torch.full((1, 40), math.nan)
        row[0, offset : offset + 13] = losses
        first = torch.tensor([[offset]], device=device)
        for how, want in (("sum", losses.double().sum()), ("mean", losses.double().mean())):
            inputs = torch.ones(1, 1, device=device), row.to(device), first, first + 13, first >= 0
            got = backend.select_tokens(*inputs, Rule(1, how, unmapped="exclude"))  # type: ignore[arg-type]
            assert got.guide_BS.item() == want.float().item()
            met += 1
    assert met >= 6


def test_equal_inputs_give_bitwise_equal_selections(each_ranking: Backend) -> None:
    """On a GPU, where programs run at the same time, many times."""
    backend, rng, met = each_ranking, random.Random(6), 0
    again = 50 if backend.triton and not backend.interpreted else 1
    for kind in ("ties", "smooth") if backend.interpreted else KINDS:
        case = random_case(rng, kind, rows=3, width=400)
        first = select(case, backend)
        for _ in range(again):
            for left, right in zip(vars(first).values(), vars(select(case, backend)).values(), strict=True):
                assert torch.equal(bits(left), bits(right))
                met += left.numel() > 0
    assert met > 5


@pytest.mark.parametrize("scope", ["sequence", "microbatch", "global"])
def test_nothing_to_select_from_is_an_empty_selection(scope: str, each_ranking: Backend) -> None:
    backend, device = each_ranking, each_ranking.device
    for rows, width, teacher in ((0, 4, 4), (2, 0, 4), (2, 4, 0)):
        nowhere = torch.zeros(rows, width, dtype=torch.int32, device=device)
        student, losses = torch.ones(rows, width, device=device), torch.ones(rows, teacher, device=device)
        rule = Rule(scope=scope, unmapped="exclude")  # type: ignore[arg-type]
        got = backend.select_tokens(student, losses, nowhere, nowhere, nowhere == 0, rule)
        assert got.weight_BS.shape == got.guide_BS.shape == (rows, width) and not got.weight_BS.any()
        assert sorted(got.tokens_C.tolist()) == list(range(rows * width if backend.triton else 0))
        assert got.stats.sum().item() == 3 * rows * width  # valid, unmapped, and their losses
