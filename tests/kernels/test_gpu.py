"""The functions that training calls, on a real GPU: results, gradients, and that they do not wait. Not for the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vocagno.objective.guidance import weighted_loss
from megatron_vocagno.objective.linear_ce import SelectedTokens, token_loss
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import select_tokens

N, H, V = 1024, 256, 5003


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


def factors(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_NH = torch.randn(N, H, generator=generator).to(device, dtype).requires_grad_()
    head_VH = (torch.randn(V, H, generator=generator) * 3 * H**-0.5).to(device, dtype).requires_grad_()
    return hidden_NH, head_VH, torch.randint(0, V, (N,), generator=generator).to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_losses_and_gradients_are_those_of_dense_float64(softcap: float | None, dtype: torch.dtype, device: torch.device) -> None:
    hidden_NH, head_VH, target_N = factors(dtype, device)
    learned_R = torch.arange(0, N, 3, device=device)
    weight_N = torch.zeros(N, device=device).index_fill_(0, learned_R, 0.01)
    selected = SelectedTokens()
    loss_N = token_loss(hidden_NH, head_VH, target_N, softcap=softcap, selected=selected)
    selected.set(learned_R)
    dhidden_NH, dhead_VH = torch.autograd.grad(loss_N, (hidden_NH, head_VH), weight_N)

    wide = [x.detach().double().requires_grad_() for x in (hidden_NH, head_VH)]
    z_NV = wide[0] @ wide[1].T
    z_NV = z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap)
    true_N = F.cross_entropy(z_NV, target_N, reduction="none")
    torch.testing.assert_close(loss_N.double(), true_N, rtol=1e-6, atol=1e-5)
    for ours, true in zip((dhidden_NH, dhead_VH), torch.autograd.grad(true_N, wide, weight_N.double()), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - true).norm() < true.norm() * max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
def test_nothing_waits_between_the_forward_and_the_gradients(scope: Any, device: torch.device) -> None:
    """torch raises if the host would wait for the device. The first pass compiles, which may wait."""
    hidden_NH, head_VH, target_N = factors(torch.bfloat16, device)
    last_BS = torch.arange(1, N + 1, device=device, dtype=torch.int32).view(4, -1) % (N // 4)
    inputs = [torch.rand(4, N // 4, device=device) * 10, (last_BS - 1).clamp(min=0), last_BS, torch.ones_like(last_BS).bool()]
    divisor = torch.tensor(400.0, device=device)
    results = []
    try:
        for mode in ("default", "error", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            selected = SelectedTokens()
            loss_BS = token_loss(hidden_NH, head_VH, target_N, selected=selected).view(4, -1)
            selection = select_tokens(loss_BS.detach(), *inputs, Rule(scope=scope), capacity=N // 2)  # type: ignore[arg-type]
            selected.set(selection.tokens_C)
            loss = weighted_loss(loss_BS, selection.weight_BS, divisor)
            results.append(torch.autograd.grad(loss, (hidden_NH, head_VH)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(gradient.isfinite().all() and gradient.any() for gradient in results[0])
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
