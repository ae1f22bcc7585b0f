"""Cross-entropy from hidden states and a head in float64 with dense logits, and how far `token_loss` is from it.

The tests of the kernels and `benchmarks.gpu` use it, so it imports no pytest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vocagno.objective.guidance import weighted_loss
from megatron_vocagno.objective.linear_ce import SelectedTokens, token_loss
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import select_tokens

IGNORED = -100
LOSS_RTOL, LOSS_ATOL = 1e-6, 1e-5
"""Largest error of a loss: nats, in addition to a share of the loss."""


def capped(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def dense_losses(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, softcap: float | None) -> Tensor:
    """[N] nats, in the dtype of the factors. 0 for an ignored target."""
    z_NV = capped(hidden_NH @ head_VH.T, softcap)
    return F.cross_entropy(z_NV, target_N, reduction="none", ignore_index=IGNORED)


@dataclass(frozen=True)
class Factors:
    """Inputs of `token_loss`."""

    hidden_NH: Tensor
    head_VH: Tensor
    target_N: Tensor


def factors(tokens: int, size: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Factors:
    """Random factors with logits of standard deviation 3."""
    generator = torch.Generator().manual_seed(3)
    hidden_NH = torch.randn(tokens, size, generator=generator).to(device, dtype).requires_grad_()
    head_VH = (torch.randn(vocabulary, size, generator=generator) * 3 * size**-0.5).to(device, dtype).requires_grad_()
    return Factors(hidden_NH, head_VH, torch.randint(0, vocabulary, (tokens,), generator=generator).to(device))


def losses_and_gradients(x: Factors, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """`token_loss`, and its gradients of the hidden states and of the head, if every third token has a weight of 0.01."""
    learned_R = torch.arange(0, len(x.target_N), 3, device=x.target_N.device)
    selected = SelectedTokens()
    loss_N = token_loss(x.hidden_NH, x.head_VH, x.target_N, softcap=softcap, selected=selected)
    selected.set(learned_R)
    weight_N = torch.zeros_like(loss_N).index_fill_(0, learned_R, 0.01)
    return loss_N.detach(), *torch.autograd.grad(loss_N, (x.hidden_NH, x.head_VH), weight_N)


@dataclass(frozen=True)
class Errors:
    """Errors of `losses_and_gradients`, each as a multiple of its tolerance: at most 1 if the results are right."""

    loss: float
    gradients: float


def gradient_tolerance(dtype: torch.dtype) -> float:
    """Largest norm of a gradient's error, as a share of the gradient's norm."""
    return max(torch.finfo(dtype).eps, 1e-6)


def errors(x: Factors, softcap: float | None) -> Errors:
    """Compare `losses_and_gradients` with dense float64, which is computed on the CPU from the same rounded factors."""
    loss_N, *gradients = (y.cpu() for y in losses_and_gradients(x, softcap))
    wide = [y.detach().cpu().double().requires_grad_() for y in (x.hidden_NH, x.head_VH)]
    true_N = dense_losses(*wide, x.target_N.cpu(), softcap)
    weight_N = torch.zeros_like(true_N)
    weight_N[::3] = 0.01
    true_gradients = torch.autograd.grad(true_N, wide, weight_N)
    true_N = true_N.detach()
    dtype = x.hidden_NH.dtype
    assert all(gradient.dtype == dtype for gradient in gradients), "a gradient has the dtype of its factor"
    shares = [(ours.double() - true).norm() / true.norm() for ours, true in zip(gradients, true_gradients, strict=True)]
    return Errors(
        loss=float(((loss_N.double() - true_N).abs() / (LOSS_ATOL + LOSS_RTOL * true_N.abs())).max()),
        gradients=float(torch.stack(shares).max()) / gradient_tolerance(dtype),
    )


def gradients_without_waiting(x: Factors, scope: Any) -> list[tuple[Tensor, ...]]:
    """The gradients of three guided passes over four rows on a GPU.

    The first pass compiles, which may wait. In the others, torch raises RuntimeError if the host would wait for the device.
    """
    tokens, device = len(x.target_N), x.target_N.device
    last_BS = torch.arange(1, tokens + 1, device=device, dtype=torch.int32).view(4, -1) % (tokens // 4)
    spans = (last_BS - 1).clamp(min=0), last_BS
    inputs = [torch.rand(4, tokens // 4, device=device) * 10, *spans, torch.ones_like(last_BS).bool()]
    divisor = torch.tensor(400.0, device=device)
    results = []
    try:
        for mode in ("default", "error", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            selected = SelectedTokens()
            loss_BS = token_loss(x.hidden_NH, x.head_VH, x.target_N, selected=selected).view(4, -1)
            selection = select_tokens(loss_BS.detach(), *inputs, Rule(scope=scope), capacity=tokens // 2)  # type: ignore[arg-type]
            selected.set(selection.tokens_C)
            loss = weighted_loss(loss_BS, selection.weight_BS, divisor)
            results.append(torch.autograd.grad(loss, (x.hidden_NH, x.head_VH)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return results
