"""Cross-entropy of each token from hidden states and the output head, without the [N, V] logits.

    z = hidden @ head^T      loss = logsumexp(z) - z[target]      dz = (softmax(z) - onehot(target)) * dloss
    dhidden = dz @ head      dhead = dz^T @ hidden

The vocabulary is the outer loop. Forward: a tile of logits at a time, with a running maximum and sum of exponentials (online
softmax); those two are all that is kept, 8 bytes a token. Their log-sum-exp would do with 4, but rounds at the scale of the
logits, and every probability would inherit the error. Backward: the tile is computed again, **for the rows whose incoming
gradient is not 0 alone**, so the tokens that the selection dropped cost nothing (their count is asked of the device: the one
wait); the softmax being known, each slice of the head's gradient is one product over all those rows and is written once, and
the gradient of the hidden states adds up in float32.

The tile of logits is float32 for 16-bit inputs too. Logits rounded to bfloat16 change a loss by up to 0.04 nats, which is
enough to change which tokens are kept.

N tokens (R of them with a gradient), V vocabulary, H hidden size, T columns of a tile. Losses in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TILE_BYTES = 64 * 2**20
"""Float32 scratch of a tile: [N, T] logits and, on the CPU, the [T, H] slice of the head.

Small beside the activations of one layer, and wide enough: 16,384 tokens get tiles of about 1,000 columns, four waves of
128 x 256 blocks on an H100. On the CPU the time does not depend on it (512 to 8,192 columns within 15 %).
"""


def token_loss(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, *, ignore_index: int = -100) -> Tensor:
    """-log softmax(hidden @ head^T)[target] of each token.

    hidden_NH, head_VH  [N, H], [V, H], one floating dtype; a frozen one costs nothing in the backward
    target_N            [N] int, in [0, V) or ignore_index
    returns             [N] float32, nats; 0 without a gradient where target == ignore_index. N may be 0

    Raises ValueError: shapes or dtypes that do not fit; on the CPU also a target out of range (elsewhere the check would wait
    for the device, and the loss of such a token is NaN).
    """
    if hidden_NH.dim() != 2 or head_VH.dim() != 2 or hidden_NH.shape[1] != head_VH.shape[1]:
        raise ValueError(
            f"token_loss: hidden states [N, H] and head [V, H] expected, got {list(hidden_NH.shape)} and "
            f"{list(head_VH.shape)}: does the head belong to this model?"
        )
    if target_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"token_loss: {hidden_NH.shape[0]} hidden states, but targets of shape {list(target_N.shape)}")
    if hidden_NH.dtype != head_VH.dtype:
        raise ValueError(f"token_loss: hidden states are {hidden_NH.dtype}, the head is {head_VH.dtype}")
    if target_N.device.type == "cpu":
        outside_N = (target_N != ignore_index) & ((target_N < 0) | (target_N >= head_VH.shape[0]))
        if outside_N.any():
            raise ValueError(
                f"token_loss: target {int(target_N[outside_N][0])} is outside of the head's {head_VH.shape[0]} rows: "
                "do the data and the model share a tokenizer?"
            )
    loss_N: Tensor = _TokenLoss.apply(hidden_NH, head_VH, target_N.long(), ignore_index)  # type: ignore[no-untyped-call]
    return loss_N


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, ignore_index: int) -> Tensor:
        with torch.autocast(hidden_NH.device.type, enabled=False):  # it would turn the tile into 16 bits
            peak_N, sum_N, picked_N = _softmax_and_pick(hidden_NH, head_VH, target_N)
        ctx.save_for_backward(hidden_NH, head_VH, target_N, peak_N, sum_N)
        ctx.ignore_index = ignore_index
        return (peak_N - picked_N + sum_N.log()).masked_fill(target_N == ignore_index, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient_N,) = gradients
        hidden_NH, head_VH, target_N, peak_N, sum_N = ctx.saved_tensors
        rows_R = ((gradient_N != 0) & (target_N != ctx.ignore_index)).nonzero().squeeze(1)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            dhidden_RH, dhead_VH = _gradients(
                hidden_NH[rows_R],
                head_VH,
                target_N[rows_R],
                peak_N[rows_R],
                sum_N[rows_R],
                gradient_N[rows_R],
                ctx.needs_input_grad,
            )
            dhidden_NH = None
            if dhidden_RH is not None:
                dhidden_NH = torch.zeros_like(hidden_NH).index_copy_(0, rows_R, dhidden_RH.to(hidden_NH.dtype))
        return dhidden_NH, dhead_VH, None, None


def _softmax_and_pick(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max(z), sum(exp(z - max(z))) and z[target], float32 [N]; the last is NaN where no tile holds the target."""
    peak_N = torch.full_like(target_N, -torch.inf, dtype=torch.float32)
    sum_N = torch.zeros_like(peak_N)
    picked_N = torch.full_like(peak_N, torch.nan)
    for begin, _, logits_NT in _tiles(hidden_NH, head_VH):
        column_N = target_N - begin
        here_N = (column_N >= 0) & (column_N < logits_NT.shape[1])
        at_target_N = logits_NT.gather(1, column_N.clamp(0, logits_NT.shape[1] - 1)[:, None]).squeeze(1)
        picked_N = torch.where(here_N, at_target_N, picked_N)
        higher_N = torch.maximum(peak_N, logits_NT.amax(1))
        sum_N = sum_N * (peak_N - higher_N).exp() + logits_NT.sub_(higher_N[:, None]).exp_().sum(1)
        peak_N = higher_N
    return peak_N, sum_N, picked_N


def _gradients(
    hidden_RH: Tensor,
    head_VH: Tensor,
    target_R: Tensor,
    peak_R: Tensor,
    sum_R: Tensor,
    gradient_R: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """dhidden float32 [R, H] and dhead [V, H] in the head's dtype; None where not needed. R may be 0: a step without weight."""
    dhidden_RH = torch.zeros_like(hidden_RH, dtype=torch.float32) if needed[0] else None
    if not len(target_R):
        return dhidden_RH, torch.zeros_like(head_VH) if needed[1] else None
    dhead_VH = torch.empty_like(head_VH) if needed[1] else None
    row_R = torch.arange(len(target_R), device=target_R.device)
    for begin, head_TH, logits_RT in _tiles(hidden_RH, head_VH):
        dz_RT = logits_RT.sub_(peak_R[:, None]).exp_().mul_((gradient_R / sum_R)[:, None])
        width = dz_RT.shape[1]
        column_R = target_R - begin
        here_R = (column_R >= 0) & (column_R < width)
        dz_RT[row_R, column_R.clamp(0, width - 1)] -= gradient_R * here_R
        if dhidden_RH is not None:
            dhidden_RH += _product(dz_RT, head_TH)
        if dhead_VH is not None:
            torch.mm(dz_RT.to(head_VH.dtype).T, hidden_RH, out=dhead_VH[begin : begin + width])
    return dhidden_RH, dhead_VH


def _tiles(hidden_NH: Tensor, head_VH: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first column, the slice of the head [T, H], logits [N, T] float32, to be overwritten); the last tile may be narrower."""
    rows, size = hidden_NH.shape
    width = max(TILE_BYTES // 4 // max(rows + size, 1) // 128 * 128, 128)  # 128: aligned for every tensor core
    if not hidden_NH.is_cuda:
        hidden_NH = hidden_NH.float()
    for begin in range(0, head_VH.shape[0], width):
        head_TH = head_VH[begin : begin + width]
        if not head_TH.is_cuda:
            head_TH = head_TH.float()
        yield begin, head_TH, _product(hidden_NH, head_TH.T)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32. A GPU multiplies 16-bit factors as they are and adds them up in float32."""
    if right.dtype == torch.float32:
        return left @ right
    return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
