"""Linear cross-entropy on a GPU: what happens to a tile of logits, and a forward that never writes one. The maths: linear_ce.

    fold_tile      (peak, sum) <- (peak, sum) + tile: the online softmax           reads the tile once
    dlogits_tile   tile -> (p * scale - onehot(target) * gradient) * dz/dlogit     reads and writes the tile once
    fused_softmax  products, softcap and fold in registers: no logit in memory     reads the factors

Without softcap z is the logit x itself, else z = softcap * tanh(x / softcap). Nothing is locked and nothing added atomically:
equal inputs give bitwise equal results. Offsets of rows are 64 bits wide. All scalars are float32.

N tokens (R of them with a gradient), V vocabulary, H hidden size, T columns of a tile; M rows and K of H's columns are what a
program holds at a time, S are the parts into which the vocabulary is split. Shapes stand beside the pointers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 4, 512  # of a program in the row kernels: 16 logits a thread, 2 KiB of a row at a time


def fold_tile(
    logits_NT: Tensor, begin: int, target_N: Tensor, peak_N: Tensor, sum_N: Tensor, picked_N: Tensor, softcap: float | None
) -> None:
    """Adds the columns [begin, begin + T) to the softmax of each row, in place.

    logits_NT  [N, T] float32; rows may lie further apart than T, columns are neighbours
    target_N   [N] int64; any value: one outside of the tile is not met
    peak_N     [N] float32, contiguous as the next two: the highest z so far; -inf before the first tile
    sum_N      [N] float32, the sum of exp(z - peak); 0 before the first tile
    picked_N   [N] float32, z[target] once its tile came; NaN before

    A NaN logit makes the row's sum NaN. N and T may be 0.
    """
    rows, columns = logits_NT.shape
    if rows:
        grid = (triton.cdiv(rows, _ROWS),)
        stride, target_N = logits_NT.stride(0), target_N.contiguous()
        _fold_tile[grid](logits_NT, stride, begin, target_N, peak_N, sum_N, picked_N, softcap, rows, columns, _ROWS, _COLUMNS)


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
    """out = (exp(z - peak) * scale - [column == target] * gradient) * (1 - (z / softcap)^2), for columns [begin, begin + T).

    logits_RT   [R, T] float32, as for fold_tile
    scale_R     [R] float32, contiguous as all of [R]: gradient * (1 + 2 * z_loss * lse) / sum; the others as for fold_tile
    gradient_R  [R] float32, dloss
    out_RT      [R, T] float32, float16 or bfloat16, rounded once; logits_RT itself, or no part of it

    A row whose scale and gradient are 0 becomes exact zeros, whatever its logits and its peak are; they are not read.
    """
    rows, columns = logits_RT.shape
    if rows:
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
        _dlogits_tile[grid](
            logits_RT,
            logits_RT.stride(0),
            begin,
            target_R,
            peak_R,
            scale_R,
            gradient_R,
            softcap,
            out_RT,
            out_RT.stride(0),
            rows,
            columns,
            _ROWS,
            _COLUMNS,
        )


def fused_softmax(
    hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, softcap: float | None, first_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """max(z), sum(exp(z - max(z))) and z[target], float32 [N], of all V columns; no logit is written.

    hidden_NH, head_VH  [N, H], [V, H], float32 (IEEE products), float16 or bfloat16; copied where columns are not neighbours.
                        H and the distance of rows are multiples of 16
    target_N            [N] int64
    first_id            the token of the head's first row: of a shard of the vocabulary. A target outside of the shard gets NaN

    The parts of the vocabulary are merged in one fixed order. N may be 0.

    Raises ValueError: factors that the kernel would read slowly or not at all, see _check; V = 0.
    """
    hidden_NH, head_VH = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden_NH, head_VH))
    _check(hidden_NH, head_VH)
    (rows, size), columns = hidden_NH.shape, head_VH.shape[0]
    block = _block(hidden_NH.dtype)
    row_blocks, tiles = triton.cdiv(rows, block.rows), triton.cdiv(columns, block.columns)
    # neighbours in the grid are the parts of one block of rows: some blocks of rows and some of the head stay in the L2 cache.
    # More parts where few rows would leave a GPU idle; the count depends on shapes alone, so results repeat
    parts = min(tiles, max(8, triton.cdiv(256, max(row_blocks, 1))))
    peak_SN = hidden_NH.new_empty(parts, rows, dtype=torch.float32)
    sum_SN, picked_N = torch.empty_like(peak_SN), torch.full_like(target_N, torch.nan, dtype=torch.float32)
    if rows:
        _fused_softmax[(parts, row_blocks)](
            hidden_NH,
            hidden_NH.stride(0),
            head_VH,
            head_VH.stride(0),
            target_N.contiguous(),
            first_id,
            peak_SN,
            sum_SN,
            picked_N,
            softcap,
            rows,
            columns,
            size,
            triton.cdiv(tiles, parts),
            block.rows,
            block.columns,
            block.depth,
            num_warps=block.warps,
            num_stages=block.stages,
        )
    peak_N = peak_SN.amax(0)
    return peak_N, (sum_SN * (peak_SN - peak_N).exp()).sum(0), picked_N


def _check(hidden_NH: Tensor, head_VH: Tensor) -> None:
    """Any N and V do, by one and the same kernel. Factors that cannot be read 16 bytes at a time would need another one, without
    pipelining and with registers spilled."""
    for name, x in (("hidden states", hidden_NH), ("head", head_VH)):
        if not (x.is_cuda or triton.knobs.runtime.interpret):
            raise ValueError(f'forward="fused": {name} on {x.device}, where its kernel needs a GPU: use forward="tiles"')
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f'forward="fused": no kernel for {name} of {x.dtype}: use forward="tiles"')
        if x.shape[1] % 16 or x.stride(0) % 16:
            raise ValueError(
                f'forward="fused": {name} of {x.shape[1]} columns in rows {x.stride(0)} elements apart, where both must be '
                'multiples of 16: use forward="tiles"'
            )
        if x.storage_offset() * x.element_size() % 16:
            raise ValueError(f'forward="fused": {name} that begin between multiples of 16 bytes: use forward="tiles"')
    if not len(head_VH):
        raise ValueError('forward="fused": the head has no row')


@dataclass(frozen=True)
class _Block:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_BLOCKS = {
    "sm_90": _Block(128, 256, 64, 8, 3),
    "cuda": _Block(128, 128, 64, 8, 3),  # 128 x 256 does not fit into the registers of sm_80, nor of sm_100
    "hip": _Block(128, 128, 64, 8, 2),
    "float32": _Block(64, 64, 32, 8, 2),  # products of float32 without rounding: no tensor core makes them
    "interpreter": _Block(16, 64, 32, 4, 1),
}
"""What a program of fused_softmax holds: chosen by compiling, for no spilled register; nothing was timed."""


def _block(dtype: torch.dtype) -> _Block:
    if triton.knobs.runtime.interpret:
        return _BLOCKS["interpreter"]
    if dtype == torch.float32:
        return _BLOCKS["float32"]
    target = triton.runtime.driver.active.get_current_target()
    return _BLOCKS["sm_90" if target.backend == "cuda" and target.arch // 10 == 9 else target.backend]


# ---- kernels


@triton.jit
def _tanh(x):
    """(tanh(x), 1 - tanh(x)^2), the second without the cancellation near 1."""
    decay = tl.exp(-2.0 * tl.abs(x))
    tanh = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -tanh, tanh), 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def _cap(x, softcap):
    if softcap is not None:
        tanh, _ = _tanh(x / softcap)
        x = softcap * tanh
    return x


@triton.jit
def _fold(peak_M, sum_M, z_MT):
    """One step of the online softmax. tl.max passes over NaN, the sum does not."""
    higher_M = tl.maximum(peak_M, tl.max(z_MT, 1))
    base_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)  # -inf - -inf is NaN
    sum_M = sum_M * tl.exp(peak_M - base_M) + tl.sum(tl.exp(z_MT - base_M[:, None]), 1)
    return higher_M, sum_M


@triton.jit(do_not_specialize=("begin", "N"), do_not_specialize_on_alignment=("target",))
def _fold_tile(
    logits,  # [N, T] float32
    stride,  # of its rows
    begin,
    target,  # [N] int64
    peak,  # [N] float32, updated
    sum_,  # [N] float32, updated
    picked,  # [N] float32, updated
    softcap,
    N,
    T,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: ROWS rows, all T columns, COLUMNS of them at a time."""
    n_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_M = n_M < N
    row_M = logits + n_M.to(tl.int64) * stride
    peak_M = tl.load(peak + n_M, mask=inside_M, other=0.0)
    sum_M = tl.load(sum_ + n_M, mask=inside_M, other=0.0)
    for start in range(0, T, COLUMNS):
        t_T = start + tl.arange(0, COLUMNS)
        mask_MT = inside_M[:, None] & (t_T < T)[None, :]
        x_MT = tl.load(row_M[:, None] + t_T[None, :], mask=mask_MT, other=float("-inf"))
        z_MT = tl.where(mask_MT, _cap(x_MT, softcap), float("-inf"))
        peak_M, sum_M = _fold(peak_M, sum_M, z_MT)
    tl.store(peak + n_M, peak_M, mask=inside_M)
    tl.store(sum_ + n_M, sum_M, mask=inside_M)
    column_M = tl.load(target + n_M, mask=inside_M, other=-1) - begin
    here_M = inside_M & (column_M >= 0) & (column_M < T)
    tl.store(picked + n_M, _cap(tl.load(row_M + column_M, mask=here_M, other=0.0), softcap), mask=here_M)


@triton.jit(do_not_specialize=("begin", "R"), do_not_specialize_on_alignment=("target",))
def _dlogits_tile(
    logits,  # [R, T] float32
    stride,
    begin,
    target,  # [R] int64
    peak,  # [R] float32
    scale,  # [R] float32
    gradient,  # [R] float32
    softcap,
    out,  # [R, T], written; may be logits
    out_stride,
    R,
    T,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: ROWS rows, COLUMNS columns."""
    r_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t_T = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_M = r_M < R
    scale_M = tl.load(scale + r_M, mask=inside_M, other=0.0)
    gradient_M = tl.load(gradient + r_M, mask=inside_M, other=0.0)
    live_M = (scale_M != 0) | (gradient_M != 0)  # of the others nothing is loaded: they come out as exp(0) * 0 - 0
    peak_M = tl.load(peak + r_M, mask=inside_M & live_M, other=0.0)
    column_M = tl.load(target + r_M, mask=inside_M, other=-1) - begin
    mask_MT = inside_M[:, None] & (t_T < T)[None, :]
    offset_M = r_M.to(tl.int64) * stride
    z_MT = tl.load(logits + offset_M[:, None] + t_T[None, :], mask=mask_MT & live_M[:, None], other=0.0)
    slope_MT = 1.0
    if softcap is not None:
        tanh_MT, slope_MT = _tanh(z_MT / softcap)
        z_MT = softcap * tanh_MT
    onehot_MT = tl.where(t_T[None, :] == column_M[:, None], gradient_M[:, None], 0.0)
    d_MT = (tl.exp(z_MT - peak_M[:, None]) * scale_M[:, None] - onehot_MT) * slope_MT
    out_M = r_M.to(tl.int64) * out_stride
    tl.store(out + out_M[:, None] + t_T[None, :], d_MT.to(out.dtype.element_ty), mask=mask_MT)


@triton.jit(do_not_specialize=("first_id", "N", "V", "tiles"), do_not_specialize_on_alignment=("target",))
def _fused_softmax(
    hidden,  # [N, H] float32, float16 or bfloat16
    hidden_stride,
    head,  # [V, H] likewise
    head_stride,
    target,  # [N] int64
    first_id,
    peak,  # [S, N] float32, written
    sum_,  # [S, N] float32, written
    picked,  # [N] float32, written where this part holds the target
    softcap,
    N,
    V,
    H,
    tiles,  # of a part
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program: ROWS rows and one part of the vocabulary, COLUMNS at a time, their products summed over DEPTH at a time.

    Rows beyond N and V are read as the last one and then left out: a mask in the inner loop takes the registers that are short.
    """
    part = tl.program_id(0)
    n_M = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k_K = tl.arange(0, DEPTH)
    inside_M = n_M < N
    column_M = tl.load(target + n_M, mask=inside_M, other=-1) - first_id
    hidden_M = hidden + tl.minimum(n_M, N - 1).to(tl.int64) * hidden_stride
    peak_M = tl.full((ROWS,), float("-inf"), tl.float32)
    sum_M = tl.zeros((ROWS,), tl.float32)
    picked_M = tl.zeros((ROWS,), tl.float32)
    first = part * tiles * COLUMNS
    last = tl.minimum(first + tiles * COLUMNS, V)
    for start in range(first, last, COLUMNS):
        v_T = start + tl.arange(0, COLUMNS)
        head_T = head + tl.minimum(v_T, V - 1).to(tl.int64) * head_stride
        x_MT = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, H, DEPTH):
            h_K = k + k_K
            hidden_MK = tl.load(hidden_M[:, None] + h_K[None, :], mask=(h_K < H)[None, :], other=0.0)
            head_KT = tl.load(head_T[None, :] + h_K[:, None], mask=(h_K < H)[:, None], other=0.0)
            x_MT = tl.dot(hidden_MK, head_KT, x_MT, input_precision="ieee")
        z_MT = tl.where((v_T < V)[None, :], _cap(x_MT, softcap), float("-inf"))
        picked_M += tl.sum(tl.where(v_T[None, :] == column_M[:, None], z_MT, 0.0), 1)
        peak_M, sum_M = _fold(peak_M, sum_M, z_MT)
    out_M = part.to(tl.int64) * N + n_M
    tl.store(peak + out_M, peak_M, mask=inside_M)
    tl.store(sum_ + out_M, sum_M, mask=inside_M)
    tl.store(picked + n_M, picked_M, mask=inside_M & (column_M >= first) & (column_M < last))
