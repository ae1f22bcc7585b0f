"""The work on one tile of logits between two products of linear_ce, in torch. linear_ce_triton is the GPU backend.

A tile contains the columns [begin, begin + T) of the [N, V] logits z: N tokens in the forward, R in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_online_softmax(
    logits_NT: Tensor,
    begin: int,
    target_N: Tensor,
    max_N: Tensor,
    sum_N: Tensor,
    target_logit_N: Tensor,
    softcap: float | None,
) -> None:
    """Add a tile to max(z) and sum(exp(z - max(z))), and store z[target] if the target is in the tile. Overwrites the tile."""
    if softcap is not None:
        logits_NT.div_(softcap).tanh_().mul_(softcap)
    here_N, column_N = _columns(target_N, begin, logits_NT.shape[1])
    torch.where(here_N, logits_NT.gather(1, column_N[:, None]).squeeze(1), target_logit_N, out=target_logit_N)
    higher_N = torch.maximum(max_N, logits_NT.amax(1))
    base_N = higher_N.masked_fill(higher_N == -torch.inf, 0.0)  # -inf - -inf is NaN
    sum_N.mul_((max_N - base_N).exp_()).add_(logits_NT.sub_(base_N[:, None]).exp_().sum(1))
    max_N.copy_(higher_N)


def dlogits_tile(
    logits_RT: Tensor,
    begin: int,
    target_R: Tensor,
    max_R: Tensor,
    scale_R: Tensor,
    gradient_R: Tensor,
    softcap: float | None,
    out_RT: Tensor,
) -> None:
    """out = exp(z - max) * scale - onehot(target) * gradient, times the slope of the softcap. `out` may be the tile itself."""
    slope_RT = None
    if softcap is not None:
        slope_RT = logits_RT.div_(softcap).cosh().square_().reciprocal_()  # 1 - tanh^2 cancels if tanh is near 1
        logits_RT.tanh_().mul_(softcap)
    dz_RT = logits_RT.sub_(max_R[:, None]).exp_().mul_(scale_R[:, None])
    here_R, column_R = _columns(target_R, begin, dz_RT.shape[1])
    dz_RT[torch.arange(len(target_R), device=target_R.device), column_R] -= gradient_R * here_R
    if slope_RT is not None:
        dz_RT.mul_(slope_RT)
    if out_RT is not logits_RT:
        out_RT.copy_(dz_RT)


def _columns(target_N: Tensor, begin: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether the target is in the tile, and its column. The column is arbitrary if it is not."""
    column_N = target_N - begin
    return (column_N >= 0) & (column_N < width), column_N.clamp(0, width - 1)
