"""The loss, its gradient, and the sums it reports."""

from __future__ import annotations

import inspect
import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vocagno.objective.guidance import GuidedLoss, guided_loss, weighted_loss
from megatron_vocagno.objective.rule import PAPER
from megatron_vocagno.objective.statistics import STATS, summarize
from tests.objective import plain

NAN, INF = math.nan, math.inf
SCOPES, POLICIES = ["sequence", "microbatch", "global"], ["include", "exclude"]


def stat(result: GuidedLoss, name: str) -> float:
    return result.stats[STATS.index(name)].item()


def guided(student: Tensor, guide: Tensor, valid: Tensor, **settings: Any) -> GuidedLoss:
    """The teacher has the student's tokens: its losses are the guide."""
    first = torch.arange(guide.shape[1]).expand(guide.shape)
    return guided_loss(student, guide, first, first + 1, valid, **settings)


def without_guide(student: Tensor, valid: Tensor, normalizer: float | Tensor | None = None) -> GuidedLoss:
    """Plain language modeling: every token is unmapped, and included."""
    return guided(student, torch.full_like(student, NAN, requires_grad=False), valid, keep=1, normalizer=normalizer)


def random_losses(rng: random.Random) -> tuple[list[list[float]], list[list[float]], list[list[bool]]]:
    """Quantized, so that ties are common and float32 sums are exact."""
    rows, width = rng.randint(1, 4), rng.choice([1, 2, 5, 16, 33])
    gaps, holes, padding = rng.choice([0.0, 0.1, 1.0]), rng.choice([0.0, 0.0, 0.1]), rng.choice([0.0, 0.3, 1.0])

    def table(share: float) -> list[list[float]]:
        return [[NAN if rng.random() < share else rng.randint(0, 24) / 8 for _ in range(width)] for _ in range(rows)]

    return table(holes), table(gaps), [[rng.random() >= padding for _ in range(width)] for _ in range(rows)]


@pytest.mark.parametrize(("scope", "unmapped", "positive"), list(itertools.product(SCOPES, POLICIES, [False, True])))
def test_loss_gradient_and_stats_are_those_of_the_slow_method(scope: str, unmapped: str, positive: bool) -> None:
    rng = random.Random(11)
    met = dict.fromkeys(["plain", "zero weight", "all unmapped", "NaN student", "padding"], 0)
    for keep, _ in itertools.product(["0.1", "0.4", "0.6", "1"], range(40)):
        student, guide, valid = random_losses(rng)
        weight, thresholds = plain.weights(student, guide, valid, keep, scope, unmapped, positive)
        leaf = torch.tensor(student, requires_grad=True)
        choices = {"scope": scope, "unmapped": unmapped, "require_positive": positive}
        got = guided(leaf, torch.tensor(guide), torch.tensor(valid), keep=float(keep), **choices)
        got.loss.backward()
        count = sum(map(sum, weight))
        total = sum(s for ss, ws in zip(student, weight, strict=True) for s, w in zip(ss, ws, strict=True) if w)
        assert got.weight_BS.tolist() == weight
        assert got.loss.dtype == torch.float32 and got.loss.item() == pytest.approx(total / count if count else 0.0, rel=1e-6)
        assert leaf.grad is not None and torch.allclose(leaf.grad, torch.tensor(weight) / max(count, 1), rtol=1e-6, atol=0)
        assert got.stats.dtype == torch.float64
        want = plain.stats(student, guide, valid, weight, thresholds, 0)
        assert {name: value for name, value in zip(STATS, got.stats.tolist(), strict=True) if name in want} == want
        met["zero weight"] += count == 0
        met["plain"] += count > 3
        met["all unmapped"] += all(math.isnan(g) for row in guide for g in row)
        met["NaN student"] += any(math.isnan(s) for row in student for s in row)
        met["padding"] += not all(map(all, valid))
    assert min(met.values()) > 10, met


def test_with_one_tokenizer_it_is_rho_1() -> None:
    generator = torch.Generator().manual_seed(0)
    met = 0
    for _ in range(50):
        student, reference = torch.randn(4, 32, generator=generator).abs(), torch.randn(4, 32, generator=generator).abs()
        # Rho-1: keep the top k % of the tokens of a batch by excess loss, average over those
        excess = (student - reference).flatten()
        chosen = excess.topk(math.ceil(0.6 * 128 - 1e-9)).indices
        rho_loss = student.flatten()[chosen].mean()

        itself = torch.arange(32).expand(4, 32)
        for how in ("max", "mean", "sum", "min"):
            choices: dict[str, Any] = {"keep": 0.6, "aggregate": how, "unmapped": "exclude"}
            got = guided_loss(student, reference, itself, itself + 1, torch.ones(4, 32).bool(), **choices)
            assert got.weight_BS.flatten().nonzero().flatten().tolist() == sorted(chosen.tolist())
            assert torch.allclose(got.loss, rho_loss)
            met += 1
    assert met == 200


@pytest.mark.parametrize("scope", SCOPES)
def test_keep_all_and_include_is_plain_language_modeling(scope: str) -> None:
    torch.manual_seed(0)
    student, guide = torch.rand(3, 20), torch.rand(3, 20).masked_fill(torch.rand(3, 20) < 0.3, NAN)
    valid = torch.rand(3, 20) < 0.8
    student[0, :4], valid[0, :4] = torch.tensor([NAN, INF, NAN, 1.0]), torch.tensor([True, False, False, True])
    got = guided(student, guide, valid, keep=1, scope=scope)
    whole = without_guide(student, valid)
    assert torch.equal(got.loss, whole.loss) and torch.equal(got.weight_BS, whole.weight_BS)
    assert whole.loss.item() == pytest.approx(student[valid & student.isfinite()].mean().item())
    assert stat(whole, "mapped") == stat(whole, "thresholds") == 0 and stat(whole, "nonfinite") == 1
    assert stat(whole, "weight_sum") == stat(whole, "unmapped_kept") == stat(got, "weight_sum") > 20


def zero_weight_cases() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Everything padding; everything unmapped; nothing positive; every student loss NaN."""
    ones, valid = torch.ones(2, 3), torch.ones(2, 3).bool()
    return [(ones, ones, ~valid), (ones, ones * NAN, valid), (ones, ones * 2, valid), (ones * NAN, ones, valid)]


@pytest.mark.parametrize("normalizer", [None, 0, 0.0, 7.0, torch.tensor(0.0), torch.tensor(7.0)])
def test_no_weight_at_all_is_a_loss_of_zero_without_a_gradient(normalizer: float | Tensor | None) -> None:
    met = 0
    for student, guide, valid in zero_weight_cases():
        for poison in (1.0, NAN, INF):
            leaf = student.masked_fill(~valid, poison).requires_grad_()
            settings = {"keep": 0.4, "unmapped": "exclude", "require_positive": True}
            for got in (
                guided(leaf, guide, valid, normalizer=normalizer, **settings),
                without_guide(leaf, torch.zeros_like(valid), normalizer),
            ):
                leaf.grad = None
                got.loss.backward()
                assert got.loss.item() == 0.0 and leaf.grad is not None and not leaf.grad.any()
                assert "loss" not in summarize(got) and all(map(math.isfinite, summarize(got).values()))
                met += 1
    assert met == 24


def test_what_is_not_kept_leaks_neither_nan_nor_infinity() -> None:
    valid = torch.tensor([[True, True, True, True, True, False, False]])
    guide = torch.tensor([[0.0, 0.0, INF, 0.0, NAN, 0.0, 0.0]])
    leaf = torch.tensor([[2.0, NAN, INF, 1.0, NAN, NAN, INF]], requires_grad=True)
    got = guided(leaf, guide, valid, keep=0.5, unmapped="include")
    got.loss.backward()
    assert got.weight_BS.tolist() == [[1, 0, 0, 0, 0, 0, 0]] and got.loss.item() == 2.0
    assert leaf.grad is not None and leaf.grad.tolist() == got.weight_BS.tolist()
    assert stat(got, "nonfinite") == 3 and stat(got, "mapped") == 3 and stat(got, "valid") == 5


def test_infinite_excess_is_ranked_and_shown() -> None:
    student = torch.tensor([[INF, 1.0, 1.0, 1.0]])
    guide = torch.tensor([[0.0, -INF, INF, 0.5]])
    for keep, weight in ((0.5, [1, 1, 0, 0]), (0.75, [1, 1, 0, 1]), (1, [1, 1, 1, 1])):
        got = guided(student, guide, torch.ones(1, 4).bool(), keep=keep, scope="sequence", unmapped="exclude")
        assert got.weight_BS.tolist() == [weight] and got.loss.item() == INF
    assert stat(got, "thresholds") == 0, "a threshold of -inf must not spoil the mean"


def test_gradient_is_weight_over_denominator_and_flows_through_the_student_alone() -> None:
    torch.manual_seed(0)
    student, guide = torch.rand(2, 9).requires_grad_(), torch.rand(2, 9).requires_grad_()
    valid = torch.ones(2, 9).bool()
    for normalizer, below in ((None, 8.0), (5, 5.0), (torch.tensor(64.0), 64.0)):
        student.grad = None
        got = guided(student, guide, valid, keep=0.4, unmapped="exclude", normalizer=normalizer)
        got.loss.backward()
        assert student.grad is not None and torch.allclose(student.grad, got.weight_BS / below)
        assert guide.grad is None and not got.weight_BS.requires_grad and not got.stats.requires_grad
    for dtype in (torch.bfloat16, torch.float64):
        low = student.detach().to(dtype).requires_grad_()
        got = guided(low, guide, valid, keep=0.4, unmapped="exclude")
        got.loss.backward()
        assert got.loss.dtype == torch.float32 and low.grad is not None and low.grad.dtype == dtype


def test_stats_add_up_over_micro_batches() -> None:
    """Means divided once: of unequal parts, the summary of the sum is the mean over all tokens, not a mean of means."""
    torch.manual_seed(0)
    student, guide = torch.rand(6, 16) * 3, torch.rand(6, 16).masked_fill(torch.rand(6, 16) < 0.2, NAN)
    valid = torch.rand(6, 16) < torch.tensor([1.0, 0.1, 0.9, 0.3, 0.6, 0.8])[:, None]
    settings = {"keep": 0.4, "scope": "sequence", "unmapped": "include"}
    whole = guided(student, guide, valid, **settings)
    parts = [guided(*(x[i : i + 2] for x in (student, guide, valid)), **settings) for i in (0, 2, 4)]
    added = summarize(*parts)
    assert added == pytest.approx(summarize(whole), rel=1e-6)
    assert added["loss"] == pytest.approx(whole.loss.item())
    assert abs(added["loss"] - sum(part.loss.item() for part in parts) / 3) > 1e-4


def test_summary_names_are_the_means_they_say() -> None:
    student, guide = torch.tensor([[4.0, 1.0, 3.0, 2.0, 9.0]]), torch.tensor([[1.0, 2.0, 1.0, 2.0, NAN]])
    got = guided(student, guide, torch.ones(1, 5).bool(), keep=0.5, unmapped="exclude")
    assert summarize(got) == summarize(got.stats)
    assert summarize(got) == {
        "share_kept": 0.5,
        "share_unmapped": 0.2,
        "weight": 0.5,
        "likelihood_ratio": pytest.approx((math.exp(-3) + math.exp(1) + math.exp(-2) + 1) / 4),
        "share_below": 0.0,
        "loss": 3.5,
        "threshold": 2.0,
        "student_loss_kept": 3.5,
        "guide_kept": 1.0,
        "excess_kept": 2.5,
        "student_loss_dropped": 1.5,
        "guide_dropped": 2.0,
        "excess_dropped": -0.5,
        "student_loss_unmapped": 9.0,
        "student_loss_all": 3.8,
    }
    assert summarize() == {}
    with pytest.raises(ValueError, match=r"19 sums .* got shape \[3\]"):
        summarize(torch.zeros(3))


def test_a_weighted_loss_weighs() -> None:
    """Any weights: those of a selection are 0 and 1. What has none leaks nothing."""
    loss = torch.tensor([[1.0, 2.0, torch.nan, torch.inf]], requires_grad=True)
    total = weighted_loss(loss, torch.tensor([[0.25, -0.5, 0.0, 0.0]]), 3.0)
    total.backward()
    assert total.item() == (0.25 - 1.0) / 3
    assert loss.grad is not None and torch.equal(loss.grad, torch.tensor([[0.25, -0.5, 0.0, 0.0]]) / 3)


def test_the_defaults_are_those_of_the_rule() -> None:
    parameters = inspect.signature(guided_loss).parameters
    assert {name: parameters[name].default for name in vars(PAPER)} == vars(PAPER)
