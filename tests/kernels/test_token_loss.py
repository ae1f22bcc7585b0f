"""`token_loss` from end to end over random cases, against dense logits in float64 and autograd."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_vocagno.objective import linear_ce
from megatron_vocagno.objective.linear_ce import SelectedTokens, token_loss
from tests.kernels import HALVES, INTERPRETED, Backend
from tests.kernels.reference import IGNORED, dense_losses

CASES = 20 if INTERPRETED else 30  # for each combination of a softcap and a dtype


@dataclass(frozen=True)
class Case:
    hidden_NH: Tensor
    """NaN for some of the tokens that are not learned."""
    head_VH: Tensor
    target_N: Tensor
    gradient_N: Tensor
    """dloss, 0 for the tokens that are not learned."""
    selected_R: Tensor | None
    """The learned tokens and some others, in any order. None: nothing is set."""
    frozen: bool
    """The head needs no gradient."""

    @property
    def learned_N(self) -> Tensor:
        return (self.gradient_N != 0) & (self.target_N != IGNORED)

    @property
    def broken_N(self) -> Tensor:
        return self.hidden_NH.isnan().any(1)

    def traits(self) -> dict[str, bool]:
        (rows, size), columns = self.hidden_NH.shape, len(self.head_VH)
        told, broken_N = self.selected_R is not None, self.broken_N
        return {
            "tokens of weight 0 are selected": told and len(self.selected_R) > int(self.learned_N.sum()),
            "NaN in a token of weight 0": told and bool(broken_N[self.selected_R].any()),
            "NaN in a token not selected": told and int(broken_N.sum()) > int(broken_N[self.selected_R].sum()),
            "nothing set": not told,
            "nothing learned": rows > 0 and not self.learned_N.any(),
            "ignored target with a gradient": bool(((self.gradient_N != 0) & (self.target_N == IGNORED)).any()),
            "no token": rows == 0,
            "several tiles": columns > 128,
            "ragged tile": columns % 128 != 0,
            "ragged tokens": rows % 4 != 0,
            "odd hidden size": size % 2 == 1,
            "frozen head": self.frozen,
        }


def random_case(rng: random.Random, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    rows, columns = rng.choice([0, 1, 2, 5, 8, 13, 19]), rng.choice([1, 2, 31, 127, 128, 129, 200, 333])
    size = rng.choice([1, 3, 8, 17, 40])
    hidden_NH = torch.randn(rows, size, generator=generator)
    head_VH = torch.randn(columns, size, generator=generator) * rng.choice([0.1, 1.0, 3.0]) * size**-0.5
    target_N = torch.randint(0, columns, (rows,), generator=generator)
    target_N[torch.rand(rows, generator=generator) < rng.choice([0.0, 0.2])] = IGNORED
    learned_N = torch.rand(rows, generator=generator) < rng.choice([0.0, 0.4, 0.4, 1.0])
    gradient_N = torch.where(learned_N, torch.rand(rows, generator=generator) + 0.25, 0.0)
    gradient_N *= torch.where(torch.rand(rows, generator=generator) < 0.2, -1.0, 1.0)
    others = (~learned_N).nonzero().squeeze(1)
    hidden_NH[others[torch.rand(len(others), generator=generator) < rng.choice([0.0, 0.5])]] = torch.nan
    selected_R = torch.cat([learned_N.nonzero().squeeze(1), others[torch.rand(len(others), generator=generator) < 0.5]])
    selected_R = selected_R[torch.randperm(len(selected_R), generator=generator)]
    return Case(
        hidden_NH=hidden_NH.to(device, dtype),
        head_VH=head_VH.to(device, dtype),
        target_N=target_N.to(device),
        gradient_N=gradient_N.to(device),
        selected_R=selected_R.to(device) if rng.random() < 0.8 else None,
        frozen=rng.random() < 0.2,
    )


def ours(case: Case, softcap: float | None) -> tuple[Tensor, list[Tensor]]:
    """The losses, and the gradients of the hidden states and, unless frozen, of the head."""
    factors = [case.hidden_NH.clone().requires_grad_(), case.head_VH.clone().requires_grad_(not case.frozen)]
    selected = SelectedTokens()
    loss_N = token_loss(*factors, case.target_N, softcap=softcap, selected=selected)
    if case.selected_R is not None:
        selected.set(case.selected_R)
    return loss_N, list(torch.autograd.grad(loss_N, [x for x in factors if x.requires_grad], case.gradient_N))


def dense(case: Case, softcap: float | None) -> tuple[Tensor, list[Tensor]]:
    """The same in float64, with zeros in place of NaN."""
    factors = [case.hidden_NH.double().nan_to_num().requires_grad_(), case.head_VH.double().requires_grad_(not case.frozen)]
    loss_N = dense_losses(*factors, case.target_N, softcap)
    gradient_N = case.gradient_N.double()
    return loss_N, list(torch.autograd.grad(loss_N, [x for x in factors if x.requires_grad], gradient_N))


def assert_close_to_dense(case: Case, softcap: float | None) -> None:
    (loss_N, gradients), (true_N, true_gradients) = ours(case, softcap), dense(case, softcap)
    assert torch.equal(loss_N.isnan(), case.broken_N & (case.target_N != IGNORED))
    whole_N = ~case.broken_N
    torch.testing.assert_close(loss_N[whole_N].double(), true_N[whole_N], rtol=2e-6, atol=1e-5)
    assert len(gradients) == 2 - case.frozen
    canceled = 2e-6 * float(case.gradient_N.norm()) * case.hidden_NH.shape[1] ** 0.5  # probability less 1 at the target
    for gradient, true in zip(gradients, true_gradients, strict=True):
        assert gradient.dtype == case.hidden_NH.dtype and gradient.isfinite().all()
        error, eps = (gradient.double() - true).norm(), max(torch.finfo(gradient.dtype).eps, 2e-6)
        assert error <= eps * true.norm() + canceled, (error, true.norm())
    assert not gradients[0][~case.learned_N].any(), "a token of weight 0 has exact zeros"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_losses_and_gradients_of_random_cases_are_those_of_dense_float64(
    softcap: float | None, dtype: torch.dtype, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_ce, "_tile_backend", lambda _: backend.tiles)
    monkeypatch.setattr(linear_ce, "CPU_TILE_BYTES", 1)  # the narrowest tiles: 128 columns
    monkeypatch.setattr(linear_ce, "GPU_TILE_BYTES", 1)
    rng = random.Random(f"{dtype} {softcap} 0")
    met: Counter[str] = Counter()
    for _ in range(CASES):
        case = random_case(rng, dtype, backend.device)
        assert_close_to_dense(case, softcap)
        met.update({name: there for name, there in case.traits().items() if there})
    assert set(met) == set(case.traits()), set(case.traits()) - set(met)
    assert met["tokens of weight 0 are selected"] > CASES // 4 and met["several tiles"] > CASES // 6, met
