"""Distances between distributions, against plain loops: in tiles of any size, with gradients that end at the teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import MappingStatus
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.objective.distance import Kind, Reference, compared, distance

KINDS: tuple[Kind, ...] = ("uld", "kld")


def softmax(logits: list[float]) -> list[float]:
    exps = [math.exp(z - max(logits)) for z in logits]
    return [e / sum(exps) for e in exps]


def slow_distance(kind: Kind, student: list[float], teacher: list[float]) -> float:
    """The distance of one token, from its logits, as the papers define it."""
    p_S, p_T = softmax(student), softmax(teacher)
    if kind == "kld":
        return sum(t * math.log(t / s) for s, t in zip(p_S, p_T, strict=True))
    ranked_S, ranked_T = sorted(p_S)[::-1], sorted(p_T)[::-1]
    total = 0.0
    for rank in range(max(len(p_S), len(p_T))):
        s = ranked_S[rank] if rank < len(p_S) else 0.0
        t = ranked_T[rank] if rank < len(p_T) else 0.0
        total += abs(s - t)
    return total


def models(kind: Kind, N: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Reference]:
    """hidden [N, 12], head [41, 12] of 37 ids, and a teacher of another hidden size and, for uld, another vocabulary."""
    random = torch.Generator().manual_seed(seed)
    V, W = 37, 37 if kind == "kld" else 53

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    reference = Reference(kind, torch.arange(N), normal(N, 7), normal(W, 7), softcap=5.0, vocabulary=V)
    return normal(N, 12), normal(V + 4, 12), reference


def slow_distances(hidden_NH: Tensor, head_VH: Tensor, softcap: float | None, reference: Reference) -> list[float]:
    cap = softcap or math.inf
    student = (hidden_NH.double() @ head_VH[: reference.vocabulary].double().T).tolist()
    teacher = (reference.hidden_NH.double() @ reference.head_WH.double().T).tolist()
    c = reference.softcap or math.inf
    return [
        slow_distance(
            reference.kind,
            [cap * math.tanh(z / cap) if softcap else z for z in mine],
            [c * math.tanh(z / c) if reference.softcap else z for z in theirs],
        )
        for mine, theirs in zip(student, teacher, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_distance_is_that_of_plain_loops_whatever_the_tile(kind: Kind, softcap: float | None) -> None:
    hidden_NH, head_VH, reference = models(kind, 23)
    expected = slow_distances(hidden_NH, head_VH, softcap, reference)
    assert min(expected) > 0.05
    for tile in (1, 5, 23, 1000, None):
        found_N = distance(hidden_NH, head_VH, softcap, reference, tile)
        assert found_N.dtype == torch.float32 and found_N.tolist() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_16_bit_factors_are_not_rounded_to_16_bits(kind: Kind) -> None:
    hidden_NH, head_VH, reference = models(kind, 23, torch.bfloat16)
    expected = slow_distances(hidden_NH, head_VH, None, reference)
    found_N = distance(hidden_NH, head_VH, None, reference)
    assert found_N.dtype == torch.float32 and found_N.tolist() == pytest.approx(expected, rel=2e-6)


def dense(kind: Kind, hidden_NH: Tensor, head_VH: Tensor, softcap: float, reference: Reference) -> Tensor:
    """[N], from dense matrices. The ranks are counted, not sorted."""
    z_NV, y_NW = hidden_NH @ head_VH[: reference.vocabulary].T, reference.hidden_NH @ reference.head_WH.T
    cap = reference.softcap
    assert cap is not None
    p_NV, t_NW = (softcap * (z_NV / softcap).tanh()).softmax(1), (cap * (y_NW / cap).tanh()).softmax(1)
    if kind == "kld":
        return (t_NW * (t_NW.log() - p_NV.log())).sum(1)
    rank_NV = (p_NV[:, None, :] > p_NV[:, :, None]).sum(2)
    ranked_NW = torch.zeros_like(t_NW).scatter(1, (t_NW[:, None, :] > t_NW[:, :, None]).sum(2), t_NW)
    beyond_N = ranked_NW[:, p_NV.shape[1] :].sum(1)
    return (p_NV - ranked_NW.gather(1, rank_NV)).abs().sum(1) + beyond_N


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_whole_matrices_and_end_at_the_teacher(kind: Kind) -> None:
    hidden_NH, head_VH, reference = models(kind, 23, torch.float64)
    reference.hidden_NH.requires_grad_()
    reference.head_WH.requires_grad_()
    inputs = hidden_NH.requires_grad_(), head_VH.requires_grad_()
    weight_N = torch.linspace(-1, 2, 23, dtype=torch.float64)
    expected = torch.autograd.grad((dense(kind, *inputs, 3.0, reference) * weight_N).sum(), inputs)
    for tile in (4, 100):
        (distance(*inputs, 3.0, reference, tile) * weight_N).sum().backward()  # type: ignore[no-untyped-call]
        for tensor, gradient in zip(inputs, expected, strict=True):
            assert tensor.grad is not None and gradient.abs().max() > 0.01
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-10, atol=1e-12)
            tensor.grad = None
    assert reference.hidden_NH.grad is None and reference.head_WH.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_small_differences(kind: Kind) -> None:
    hidden_NH, head_VH, reference = models(kind, 3, torch.float64, seed=1)
    assert torch.autograd.gradcheck(
        lambda hidden, head: distance(hidden, head, 2.0, reference, 2), (hidden_NH.requires_grad_(), head_VH.requires_grad_())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_16_bit_gradient_of_the_head_is_added_up_before_it_is_rounded(kind: Kind) -> None:
    hidden_NH, head_VH, reference = models(kind, 400, torch.bfloat16)

    def gradient(dtype: torch.dtype, tile: int) -> Tensor:
        head = head_VH.detach().to(dtype, copy=True).requires_grad_()
        told = replace(reference, hidden_NH=reference.hidden_NH.to(dtype), head_WH=reference.head_WH.to(dtype))
        distance(hidden_NH.to(dtype), head, None, told, tile).sum().backward()  # type: ignore[no-untyped-call]
        assert head.grad is not None and head.grad.dtype == dtype
        return head.grad.double()

    exact = gradient(torch.float64, 400)
    in_one, in_200 = ((gradient(torch.bfloat16, tile) - exact).norm() / exact.norm() for tile in (400, 2))
    assert 0 < in_200 < 1.02 * in_one < 2**-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_equals_its_teacher_is_no_distance_away(kind: Kind) -> None:
    hidden_NH, head_VH, _ = models(kind, 23)
    hidden_NH.requires_grad_()
    twin = Reference(kind, torch.arange(23), hidden_NH.detach().clone(), head_VH[:37].detach().clone(), None, 37)
    found_N = distance(hidden_NH, head_VH, None, twin)
    assert found_N.abs().max() < 1e-6
    [gradient_NH] = torch.autograd.grad(found_N.sum(), hidden_NH)
    assert gradient_NH.abs().max() < 1e-5


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the largest number of elements of any tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_as_large_as_the_distributions_of_all_tokens(kind: Kind) -> None:
    hidden_NH, head_VH, reference = models(kind, 600)
    hidden_NH.requires_grad_()
    sizes = []
    for tile in (8, 600):
        with Largest() as largest:  # type: ignore[no-untyped-call]
            distance(hidden_NH, head_VH.detach().requires_grad_(), None, reference, tile).sum().backward()  # type: ignore[no-untyped-call]
        sizes.append(largest.elements)
    assert sizes == [600 * 12, 600 * len(reference.head_WH)]


def test_nothing_to_compare_is_no_error() -> None:
    hidden_NH, head_VH, reference = models("uld", 0)
    found_N = distance(hidden_NH.requires_grad_(), head_VH.requires_grad_(), None, reference)
    found_N.sum().backward()  # type: ignore[no-untyped-call]
    assert found_N.shape == (0,) and head_VH.grad is not None and not head_VH.grad.any()


def test_vocabularies_that_do_not_fit_are_refused() -> None:
    hidden_NH, head_VH, reference = models("uld", 3)
    with pytest.raises(ValueError, match="needs one vocabulary, the student has 37 ids, the teacher 53"):
        distance(hidden_NH, head_VH, None, replace(reference, kind="kld"))
    with pytest.raises(ValueError, match="the tokenizer has 37 ids, the student's head 30"):
        distance(hidden_NH, head_VH[:30], None, reference)


def test_what_is_compared_begins_at_one_byte_in_both_models(dataset: AlignedDataset) -> None:
    rows = TrainRows(dataset, 64, seed=3)
    met = left_out = 0
    for k, batch in enumerate(Batches(rows, Layout(1, 300, 1), 0).step(0)):
        [found] = compared(batch.first_BS, batch.last_BS).tolist()
        row = rows[k]
        # of the inputs and the last target
        together = [bool(is_one) for piece in rows.pieces(k) for is_one in dataset.common_boundary(*piece)][1:]
        mapped = [mapping == MappingStatus.MAPPED for mapping in row.mapping]
        expected = [one and two for one, two in zip(mapped, together, strict=True)]
        assert not any(found[len(expected) :]) and (batch.target_BS[0, len(expected) :] == IGNORE).all()
        if True in mapped and not together[start := mapped.index(True)] and found[start]:
            expected[start] = True  # what it shares its first teacher token with is no target of the row
        assert found[: len(expected)] == expected
        met += sum(found)
        left_out += sum(mapped) - sum(found)
    assert met > 5000 and left_out > 300
