"""GPU backend of linear_ce: the work on one tile of logits between two products. linear_ce explains the math.

    update_online_softmax   (max, sum) <- (max, sum) + tile                           reads the tile once
    dlogits_tile            tile -> (p * scale - onehot(target) * gradient) * dz/dx   reads and writes the tile once

Without a softcap, z is the logit x itself. With a softcap, z = softcap * tanh(x / softcap). No lock and no atomic addition is
used: equal inputs give bitwise equal results. Offsets of tokens are 64 bits wide. All scalars are float32.

N tokens (R of them with a gradient), T columns of a tile. A program holds M tokens. Shapes are given next to the pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _COLUMNS = 4, 512  # of one program: 16 logits per thread, 2 KiB of a token's logits at a time


def update_online_softmax(
    logits_NT: Tensor,
    begin: int,
    target_N: Tensor,
    max_N: Tensor,
    sum_N: Tensor,
    target_logit_N: Tensor,
    softcap: float | None,
) -> None:
    """Add the columns [begin, begin + T) to the softmax of each token, in place.

    logits_NT       [N, T] float32. Columns are adjacent; tokens may be more than T elements apart
    target_N        [N] int64, any value: a target outside of the tile is ignored
    max_N           [N] float32, contiguous, as are the next two: the highest z so far, -inf before the first tile
    sum_N           [N] float32, the sum of exp(z - max), 0 before the first tile
    target_logit_N  [N] float32, z[target], NaN before the tile that contains the target

    A NaN logit makes the token's sum NaN. N and T may be 0.
    """
    tokens, columns = logits_NT.shape
    if tokens:
        _update_online_softmax[(triton.cdiv(tokens, _TOKENS),)](
            logits_NT,
            logits_NT.stride(0),
            begin,
            target_N.contiguous(),
            max_N,
            sum_N,
            target_logit_N,
            softcap,
            tokens,
            columns,
            _TOKENS,
            _COLUMNS,
        )


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
    """out = (exp(z - max) * scale - [column == target] * gradient) * (1 - (z / softcap)^2), for the columns [begin, begin + T).

    logits_RT   [R, T] float32, as for update_online_softmax
    scale_R     [R] float32, contiguous, as are all [R]: gradient / sum. The others as for update_online_softmax
    gradient_R  [R] float32, dloss
    out_RT      [R, T] float32, float16 or bfloat16, rounded once. May be logits_RT itself, but must not overlap it otherwise

    A token whose scale and gradient are 0 gets exact zeros for any logits and maximum. They are not read.
    """
    tokens, columns = logits_RT.shape
    if tokens:
        _dlogits_tile[(triton.cdiv(tokens, _TOKENS), triton.cdiv(columns, _COLUMNS))](
            logits_RT,
            logits_RT.stride(0),
            begin,
            target_R,
            max_R,
            scale_R,
            gradient_R,
            softcap,
            out_RT,
            out_RT.stride(0),
            tokens,
            columns,
            _TOKENS,
            _COLUMNS,
        )


# ---------------------------------------------------------------- kernels


@triton.jit
def _tanh(x):
    """(tanh(x), 1 - tanh(x)^2). The second is computed without the cancellation near 1."""
    decay = tl.exp(-2.0 * tl.abs(x))
    tanh = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -tanh, tanh), 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def _cap(x, softcap):
    if softcap is not None:
        tanh, _ = _tanh(x / softcap)
        x = softcap * tanh
    return x


@triton.jit(do_not_specialize=("begin", "N"), do_not_specialize_on_alignment=("target",))
def _update_online_softmax(
    logits,  # [N, T] float32
    stride,  # between tokens
    begin,
    target,  # [N] int64
    max_,  # [N] float32, updated
    sum_,  # [N] float32, updated
    target_logit,  # [N] float32, updated
    softcap,
    N,
    T,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: TOKENS tokens and all T columns, COLUMNS at a time."""
    n_M = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside_M = n_M < N
    logits_M = logits + n_M.to(tl.int64) * stride
    max_M = tl.load(max_ + n_M, mask=inside_M, other=0.0)
    sum_M = tl.load(sum_ + n_M, mask=inside_M, other=0.0)
    for start in range(0, T, COLUMNS):
        t_T = start + tl.arange(0, COLUMNS)
        mask_MT = inside_M[:, None] & (t_T < T)[None, :]
        x_MT = tl.load(logits_M[:, None] + t_T[None, :], mask=mask_MT, other=float("-inf"))
        z_MT = tl.where(mask_MT, _cap(x_MT, softcap), float("-inf"))
        higher_M = tl.maximum(max_M, tl.max(z_MT, 1))
        base_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)  # -inf - -inf is NaN
        # tl.max ignores NaN, the sum does not
        sum_M = sum_M * tl.exp(max_M - base_M) + tl.sum(tl.exp(z_MT - base_M[:, None]), 1)
        max_M = higher_M
    tl.store(max_ + n_M, max_M, mask=inside_M)
    tl.store(sum_ + n_M, sum_M, mask=inside_M)
    column_M = tl.load(target + n_M, mask=inside_M, other=-1) - begin
    here_M = inside_M & (column_M >= 0) & (column_M < T)
    tl.store(target_logit + n_M, _cap(tl.load(logits_M + column_M, mask=here_M, other=0.0), softcap), mask=here_M)


@triton.jit(do_not_specialize=("begin", "R"), do_not_specialize_on_alignment=("target",))
def _dlogits_tile(
    logits,  # [R, T] float32
    stride,
    begin,
    target,  # [R] int64
    max_,  # [R] float32
    scale,  # [R] float32
    gradient,  # [R] float32
    softcap,
    out,  # [R, T], written; may be logits
    out_stride,
    R,
    T,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: TOKENS tokens and COLUMNS columns."""
    r_M = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    t_T = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_M = r_M < R
    scale_M = tl.load(scale + r_M, mask=inside_M, other=0.0)
    gradient_M = tl.load(gradient + r_M, mask=inside_M, other=0.0)
    live_M = (scale_M != 0) | (gradient_M != 0)  # nothing is loaded for other tokens: their result is exp(0) * 0 - 0
    max_M = tl.load(max_ + r_M, mask=inside_M & live_M, other=0.0)
    column_M = tl.load(target + r_M, mask=inside_M, other=-1) - begin
    mask_MT = inside_M[:, None] & (t_T < T)[None, :]
    offset_M = r_M.to(tl.int64) * stride
    z_MT = tl.load(logits + offset_M[:, None] + t_T[None, :], mask=mask_MT & live_M[:, None], other=0.0)
    slope_MT = 1.0
    if softcap is not None:
        tanh_MT, slope_MT = _tanh(z_MT / softcap)
        z_MT = softcap * tanh_MT
    onehot_MT = tl.where(t_T[None, :] == column_M[:, None], gradient_M[:, None], 0.0)
    d_MT = (tl.exp(z_MT - max_M[:, None]) * scale_M[:, None] - onehot_MT) * slope_MT
    out_M = r_M.to(tl.int64) * out_stride
    tl.store(out + out_M[:, None] + t_T[None, :], d_MT.to(out.dtype.element_ty), mask=mask_MT)
