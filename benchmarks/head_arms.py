"""Implementations of a loss per token from hidden states and a head, which `benchmarks.head` compares.

hidden [N, H], head [V, H], target [N] -> loss [N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vocagno.objective.linear_ce import token_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor) -> Tensor:
    """Dense logits as a Hugging Face model computes them, upcast to float32 for the loss."""
    return F.cross_entropy((hidden_NH @ head_VH.T).float(), target_N, reduction="none")


def dense_as_is(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor) -> Tensor:
    """Dense logits without the upcast: in bfloat16, the loss has 8 significant bits, like the logits."""
    return F.cross_entropy(hidden_NH @ head_VH.T, target_N, reduction="none")


def ours(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor) -> Tensor:
    return token_loss(hidden_NH, head_VH, target_N)


def torch_chunked(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor) -> Tensor:
    """torch.nn.functional.linear_cross_entropy with its default chunks. It gives losses per token, but cannot skip tokens."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden_NH, head_VH, target_N, reduction="none", options=options)


def row_chunks(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor) -> Tensor:
    """The loop order of Liger's fused linear cross-entropy, in torch: the outer loop runs over chunks of tokens.

    Liger's own code is Triton and does not run on CPUs. A chunk is about the number of tokens whose logits
    are no larger than the hidden states.
    """
    loss_N: Tensor = _RowChunks.apply(hidden_NH, head_VH, target_N)
    return loss_N


class _RowChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor) -> Tensor:
        # N / (V / H), both divisions rounded up, then rounded up to a power of two
        rows = -(-len(hidden_NH) // -(-len(head_VH) // hidden_NH.shape[1]))
        ctx.rows = 1 << (rows - 1).bit_length()
        ctx.save_for_backward(hidden_NH, head_VH, target_N)
        chunks = zip(hidden_NH.split(ctx.rows), target_N.split(ctx.rows), strict=True)
        return torch.cat([dense(hidden, head_VH, target) for hidden, target in chunks])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_NH, head_VH, target_N = ctx.saved_tensors
        dhidden_NH, dhead_VH = torch.empty_like(hidden_NH), torch.zeros_like(head_VH)
        parts = (x.split(ctx.rows) for x in (hidden_NH, target_N, gradients[0], dhidden_NH))
        for hidden, target, gradient, dhidden in zip(*parts, strict=True):
            dz = torch.softmax((hidden @ head_VH.T).float(), 1).mul_(gradient[:, None])
            dz[torch.arange(len(target)), target] -= gradient
            dz = dz.to(head_VH.dtype)
            torch.mm(dz, head_VH, out=dhidden)
            dhead_VH.addmm_(dz.T, hidden)
        return dhidden_NH, dhead_VH, None
