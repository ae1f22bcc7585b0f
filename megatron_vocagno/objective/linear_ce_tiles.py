"""What happens to a tile of logits between two products of linear_ce, in torch. linear_ce_triton does the same on a GPU.

A tile holds the columns [begin, begin + T) of [N, V] logits z; N rows in the forward, R in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_tile(
    logits_NT: Tensor, begin: int, target_N: Tensor, peak_N: Tensor, sum_N: Tensor, picked_N: Tensor, softcap: float | None
) -> None:
    """Add a tile to max(z), to sum(exp(z - max(z))), and to z[target] where it holds the target. Overwrites the tile."""
    if softcap is not None:
        logits_NT.div_(softcap).tanh_().mul_(softcap)
    here_N, column_N = _columns(target_N, begin, logits_NT.shape[1])
    torch.where(here_N, logits_NT.gather(1, column_N[:, None]).squeeze(1), picked_N, out=picked_N)
    higher_N = torch.maximum(peak_N, logits_NT.amax(1))
    base_N = higher_N.masked_fill(higher_N == -torch.inf, 0.0)  # -inf - -inf is NaN
    sum_N.mul_((peak_N - base_N).exp_()).add_(logits_NT.sub_(base_N[:, None]).exp_().sum(1))
    peak_N.copy_(higher_N)


def dlogits_tile(
    logits_RT: Tensor,
    begin: int,
    target_R: Tensor,
    peak_R: Tensor,
    scale_R: Tensor,
    gradient_R: Tensor,
    softcap: float | None,
    out_RT: Tensor,
) -> None:
    """out = exp(z - peak) * scale - onehot(target) * gradient, times the slope of the softcap. `out` may be the tile itself."""
    slope_RT = None
    if softcap is not None:
        slope_RT = logits_RT.div_(softcap).cosh().square_().reciprocal_()  # 1 - tanh^2 cancels where tanh is near 1
        logits_RT.tanh_().mul_(softcap)
    dz_RT = logits_RT.sub_(peak_R[:, None]).exp_().mul_(scale_R[:, None])
    here_R, column_R = _columns(target_R, begin, dz_RT.shape[1])
    dz_RT[torch.arange(len(target_R), device=target_R.device), column_R] -= gradient_R * here_R
    if slope_RT is not None:
        dz_RT.mul_(slope_RT)
    if out_RT is not logits_RT:
        out_RT.copy_(dz_RT)


def _columns(target_N: Tensor, begin: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether the tile holds the target, and in which column; any column where it does not."""
    column_N = target_N - begin
    return (column_N >= 0) & (column_N < width), column_N.clamp(0, width - 1)
