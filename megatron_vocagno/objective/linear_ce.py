"""Cross-entropy of each token from hidden states and the output head, without the [N, V] logits.

    z = hidden @ head^T                       with a softcap c: z = c * tanh(hidden @ head^T / c)
    loss = lse - z[target] + z_loss * lse^2   lse = logsumexp(z)
    dz = softmax(z) * (1 + 2 * z_loss * lse) * dloss - onehot(target) * dloss
    dhidden = dz @ head      dhead = dz^T @ hidden

The vocabulary is the outer loop. Forward: a tile of logits at a time, with a running maximum and sum of exponentials (online
softmax); those two are all that is kept, 8 bytes a token. Their log-sum-exp would do with 4, but rounds at the scale of the
logits, and every probability would inherit the error. Backward: the tile is computed again, **for the rows that are learned
alone**, so the tokens that the selection dropped cost nothing; the softmax being known, each slice of the head's gradient is
one product over all those rows and is written once, and the gradient of the hidden states adds up in float32. With a share f of
the tokens learned that is 1 + 3f products of the size of the forward, where dense logits take 3.

The tile of logits is float32 for 16-bit inputs too. Logits rounded to bfloat16 change a loss by up to 0.04 nats, which is
enough to change which tokens are kept.

Products are the GEMM library's. What happens to a tile between two of them is torch on a CPU, and on a GPU one pass of
linear_ce_triton over it; docs/performance.md has the bytes and the FLOPs.

N tokens (R of them learned), V vocabulary (of this rank's shard, where it is sharded), H hidden size, T columns of a tile.
Losses in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vocagno.objective import linear_ce_tiles

CPU_TILE_BYTES, GPU_TILE_BYTES = 10 * 2**20, 256 * 2**20
"""Scratch of a tile: [N, T] float32 logits and, on the CPU, the [T, H] slice of the head where it has to be upcast.

A CPU's stays in its caches. A GPU's is as large as memory allows, since every tile reads all hidden states again and, in the
backward, their gradient: 16,384 tokens get tiles of 4,096 columns.
"""


class LearnedRows:
    """Which rows a backward pass computes, told between the forward and the backward, when the selection knows.

    Without it the backward asks the device which incoming gradients are not zero, and waits for the answer.
    """

    def __init__(self) -> None:
        self.rows_R: Tensor | None = None

    def tell(self, rows_R: Tensor) -> None:
        """rows_R [R] int64: each row at most once, and all whose loss will get a gradient. More may be named.

        Raises ValueError: no list of int64.
        """
        if rows_R.dim() != 1 or rows_R.dtype != torch.int64:
            raise ValueError(f"rows to learn: positions [R] int64 expected, got {rows_R.dtype} {list(rows_R.shape)}")
        self.rows_R = rows_R


@dataclass(frozen=True)
class _Options:
    ignore_index: int
    softcap: float | None
    z_loss: float
    rows: LearnedRows | None
    group: dist.ProcessGroup | None
    first_id: int
    forward: Literal["tiles", "fused"]


def token_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    target_N: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    rows: LearnedRows | None = None,
    group: dist.ProcessGroup | None = None,
    first_id: int = 0,
    forward: Literal["tiles", "fused"] = "tiles",
) -> Tensor:
    """-log softmax(hidden @ head^T)[target] of each token (l_S and l_T in docs/method.md, 2).

    hidden_NH, head_VH  [N, H], [V, H], one dtype: float32, bfloat16, float16 or float64; a frozen one costs nothing in the
                        backward
    target_N            [N] int, in [0, V) or ignore_index
    softcap             c above 0: logits become c * tanh(logits / c)
    z_loss              adds z_loss * lse^2 to the loss of each token, and so to what a selection compares
    rows                filled between forward and backward: see LearnedRows. A gradient of a row that it does not name is
                        refused on a CPU, and makes all gradients NaN elsewhere, where asking would wait for the device
    group               ranks that hold a shard of the head each, and the same hidden states and targets; all must call, forward
                        and backward. hidden's gradient is the whole one on every rank, the head's is the shard's
    first_id            the id of the shard's first row
    forward             'fused': no tile is written to memory (a kernel of our own instead of the GEMM library's). On a GPU
                        alone, for float32 and 16 bits, where H and the strides of rows are multiples of 16 elements
    returns             [N] float32 (float64 for float64), nats; 0 without a gradient where target == ignore_index. N may be 0

    Raises ValueError: shapes or dtypes that do not fit, or that 'fused' does not take; on the CPU also a target out of range
    (elsewhere the check would wait for the device, and the loss of such a token is NaN, as it is where no shard holds the
    target).

    Two tokens, a vocabulary of three: the first is sure of token 0 and right, the second is padding.

    >>> hidden_NH = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> head_VH = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> loss_N = token_loss(hidden_NH, head_VH, torch.tensor([0, -100]))
    >>> loss_N.detach()
    tensor([0.0134, 0.0000])

    A model of transformers has both tensors: `model.get_decoder()(ids).last_hidden_state.flatten(0, 1)` and
    `model.get_output_embeddings().weight`.
    """
    _check(hidden_NH, head_VH, target_N, softcap)
    if forward not in ("tiles", "fused"):
        raise ValueError(f"token_loss: unknown forward {forward!r}: expected tiles or fused")
    if target_N.device.type == "cpu" and group is None and not first_id:
        _check_targets(target_N, head_VH.shape[0], ignore_index)
    options = _Options(ignore_index, softcap, z_loss, rows, group, first_id, forward)
    loss_N: Tensor = _TokenLoss.apply(hidden_NH, head_VH, target_N.long(), options)  # type: ignore[no-untyped-call]
    return loss_N


def _check(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, softcap: float | None) -> None:
    if hidden_NH.dim() != 2 or head_VH.dim() != 2:
        raise ValueError(
            f"token_loss: hidden states [N, H] and head [V, H] expected, got {list(hidden_NH.shape)} and {list(head_VH.shape)}: "
            "rows and positions are one axis here, hidden.flatten(0, 1)"
        )
    if hidden_NH.shape[1] != head_VH.shape[1]:
        raise ValueError(
            f"token_loss: hidden states [N, H] and head [V, H] expected, got {list(hidden_NH.shape)} and "
            f"{list(head_VH.shape)}: does the head belong to this model?"
        )
    if target_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"token_loss: {hidden_NH.shape[0]} hidden states, but targets of shape {list(target_N.shape)}")
    if hidden_NH.dtype != head_VH.dtype:
        raise ValueError(
            f"token_loss: hidden states are {hidden_NH.dtype}, the head is {head_VH.dtype}: give it head.to(hidden.dtype)"
        )
    if hidden_NH.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"token_loss: hidden states and head are {hidden_NH.dtype}: expected float32, 16 bits or float64")
    if target_N.is_floating_point() or target_N.dtype == torch.bool:
        raise ValueError(f"token_loss: targets are {target_N.dtype}: expected the integers of token ids")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"token_loss: softcap = {softcap}: expected a number above 0, or None for no cap")


def _check_targets(target_N: Tensor, vocabulary: int, ignore_index: int) -> None:
    outside_N = (target_N != ignore_index) & ((target_N < 0) | (target_N >= vocabulary))
    if outside_N.any():
        raise ValueError(
            f"token_loss: target {int(target_N[outside_N][0])} is outside of the head's {vocabulary} rows: "
            "do the data and the model share a tokenizer?"
        )


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, options: _Options) -> Tensor:
        with torch.autocast(hidden_NH.device.type, enabled=False):  # it would turn the tile into 16 bits
            softmax = _over_shards(_softmax(hidden_NH, head_VH, target_N, options), options.group)
        ctx.save_for_backward(hidden_NH, head_VH, target_N, softmax.peak_N, softmax.sum_N)
        ctx.options = options
        loss_N = softmax.peak_N - softmax.picked_N + softmax.sum_N.log()
        if options.z_loss:
            loss_N = loss_N + options.z_loss * (softmax.peak_N + softmax.sum_N.log()) ** 2
        return loss_N.masked_fill(target_N == options.ignore_index, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NH, head_VH, target_N, peak_N, sum_N = ctx.saved_tensors
        options: _Options = ctx.options
        gradient_N = gradients[0].masked_fill(target_N == options.ignore_index, 0.0)
        rows_R, gradient_R = _learned(gradient_N, options.rows)
        # a row without a gradient is harmless whatever it holds: 0 * NaN would be NaN
        idle_R = gradient_R == 0
        learned = _Learned(
            hidden_NH[rows_R].masked_fill_(idle_R[:, None], 0.0),
            target_N[rows_R],
            peak_N[rows_R].masked_fill_(idle_R, 0.0),
            sum_N[rows_R].masked_fill_(idle_R, 1.0),
            gradient_R,
        )
        with torch.autocast(hidden_NH.device.type, enabled=False):
            dhidden_RH, dhead_VH = _gradients(learned, head_VH, options, ctx.needs_input_grad)
        dhidden_NH = None
        if dhidden_RH is not None:
            if options.group is not None:
                dist.all_reduce(dhidden_RH, group=options.group)
            dhidden_NH = torch.zeros_like(hidden_NH).index_copy_(0, rows_R, dhidden_RH.to(hidden_NH.dtype))
        return dhidden_NH, dhead_VH, None, None


# ---------------------------------------------------------------- forward


@dataclass(frozen=True)
class _Softmax:
    """What the softmax of logits z needs besides them, and z at the target."""

    peak_N: Tensor
    """max(z)"""
    sum_N: Tensor
    """sum(exp(z - peak))"""
    picked_N: Tensor
    """z[target]; NaN where no tile holds the target."""


def _softmax(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, options: _Options) -> _Softmax:
    if options.forward == "fused":
        from megatron_vocagno.objective import linear_ce_triton

        return _Softmax(*linear_ce_triton.fused_softmax(hidden_NH, head_VH, target_N, options.softcap, options.first_id))
    peak_N = torch.full_like(target_N, -torch.inf, dtype=_exact(hidden_NH.dtype))
    softmax = _Softmax(peak_N, torch.zeros_like(peak_N), torch.full_like(peak_N, torch.nan))
    fold_tile = _tile_passes(hidden_NH).fold_tile
    for begin, _, logits_NT in _tiles(hidden_NH, head_VH):
        fold_tile(
            logits_NT,
            options.first_id + begin,
            target_N,
            softmax.peak_N,
            softmax.sum_N,
            softmax.picked_N,
            softcap=options.softcap,
        )
    return softmax


def _over_shards(mine: _Softmax, group: dist.ProcessGroup | None) -> _Softmax:
    """The softmax over the vocabularies of all ranks: 16 bytes a token travel."""
    if group is None:
        return mine
    peak_N = mine.peak_N.clone()
    dist.all_reduce(peak_N, op=dist.ReduceOp.MAX, group=group)
    absent_N = mine.picked_N.isnan()
    rescaled_N = mine.sum_N * (mine.peak_N - peak_N).exp()
    sums_3N = torch.stack([rescaled_N, mine.picked_N.masked_fill(absent_N, 0.0), (~absent_N).to(peak_N.dtype)])
    dist.all_reduce(sums_3N, group=group)
    sum_N, picked_N, holders_N = sums_3N
    return _Softmax(peak_N, sum_N, picked_N.masked_fill(holders_N != 1, torch.nan))


# ---------------------------------------------------------------- backward


@dataclass(frozen=True)
class _Learned:
    """The rows that are learned. R may be 0: a step without weight."""

    hidden_RH: Tensor
    target_R: Tensor
    peak_R: Tensor
    sum_R: Tensor
    gradient_R: Tensor


def _learned(gradient_N: Tensor, told: LearnedRows | None) -> tuple[Tensor, Tensor]:
    """The rows and their gradients."""
    if told is None or told.rows_R is None:
        rows_R = gradient_N.nonzero().squeeze(1)
        return rows_R, gradient_N[rows_R]
    rows_R = told.rows_R
    told_N = torch.zeros_like(gradient_N, dtype=torch.bool).index_fill_(0, rows_R, True)
    missed, repeated = (gradient_N.masked_fill(told_N, 0.0) != 0).sum(), len(rows_R) - told_N.sum()
    if gradient_N.device.type != "cpu":
        return rows_R, torch.where(missed + repeated > 0, torch.nan, gradient_N[rows_R])
    if missed or repeated:
        raise ValueError(
            f"token_loss: of the rows that were told, {int(repeated)} are repeated; {int(missed)} rows have a gradient and were "
            "not told. Does the loss weigh the tokens that the selection chose, and no others?"
        )
    return rows_R, gradient_N[rows_R]


def _gradients(
    learned: _Learned, head_VH: Tensor, options: _Options, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """dhidden [R, H] as exact as the logits, and dhead [V, H] in the head's dtype; None where not needed."""
    hidden_RH, gradient_R = learned.hidden_RH, learned.gradient_R
    dhidden_RH = torch.zeros_like(hidden_RH, dtype=_exact(hidden_RH.dtype)) if needed[0] else None
    if not len(gradient_R):
        return dhidden_RH, torch.zeros_like(head_VH) if needed[1] else None
    dhead_VH = torch.empty_like(head_VH) if needed[1] else None
    scale_R = gradient_R / learned.sum_R
    if options.z_loss:
        scale_R = scale_R * (1 + 2 * options.z_loss * (learned.peak_R + learned.sum_R.log()))
    dlogits_tile = _tile_passes(hidden_RH).dlogits_tile
    for begin, head_TH, logits_RT in _tiles(hidden_RH, head_VH):
        # on a CPU the tile is rounded by the products themselves
        dz_RT = torch.empty_like(logits_RT, dtype=head_VH.dtype) if head_TH.dtype != logits_RT.dtype else logits_RT
        dlogits_tile(
            logits_RT,
            options.first_id + begin,
            learned.target_R,
            learned.peak_R,
            scale_R,
            gradient_R,
            options.softcap,
            dz_RT,
        )
        if dhidden_RH is not None:
            _add_product(dhidden_RH, dz_RT, head_TH, head_VH.dtype)
        if dhead_VH is not None:
            torch.mm(dz_RT.to(head_VH.dtype).T, hidden_RH, out=dhead_VH[begin : begin + len(head_TH)])
    return dhidden_RH, dhead_VH


# ---------------------------------------------------------------- tiles


def _tiles(hidden_NH: Tensor, head_VH: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, the slice of the head [T, H], exact logits [N, T], to be overwritten); the last tile may be narrower."""
    rows, size = hidden_NH.shape
    upcast = hidden_NH.device.type == "cpu" and hidden_NH.dtype != _exact(hidden_NH.dtype)
    budget = CPU_TILE_BYTES if hidden_NH.device.type == "cpu" else GPU_TILE_BYTES
    # whole multiples of 128: aligned for every tensor core
    width = max(budget // _exact(hidden_NH.dtype).itemsize // max(rows + upcast * size, 1) // 128 * 128, 128)
    # one buffer: what is freed and asked for again is handed out as untouched pages by a CPU's allocator
    buffer = hidden_NH.new_empty(rows * min(width, len(head_VH)), dtype=_exact(hidden_NH.dtype))
    if upcast:
        hidden_NH = hidden_NH.float()
    for begin in range(0, head_VH.shape[0], width):
        head_TH = head_VH[begin : begin + width]
        logits_NT = buffer[: rows * len(head_TH)].view(rows, len(head_TH))
        if upcast:
            with _products_of(head_TH.dtype):
                head_TH = head_TH.float()
                torch.mm(hidden_NH, head_TH.T, out=logits_NT)
        elif head_TH.dtype == logits_NT.dtype:
            torch.mm(hidden_NH, head_TH.T, out=logits_NT)
        else:
            torch.mm(hidden_NH, head_TH.T, out_dtype=logits_NT.dtype, out=logits_NT)
        yield begin, head_TH, logits_NT


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Of logits and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Products of float32 copies of `dtype`, on a CPU. bfloat16 copies may be multiplied as bfloat16: that loses nothing, as
    products add up in float32, and takes three quarters of the time where the processor has such instructions.

    A process-wide switch of torch, set for the length of a product.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _add_product(sum_RH: Tensor, dz_RT: Tensor, head_TH: Tensor, dtype: torch.dtype) -> None:
    """sum += dz @ head, where both are of `dtype` or, on a CPU, copies of it."""
    if head_TH.dtype != sum_RH.dtype:
        # not addmm, which takes out_dtype in newer versions of torch alone
        sum_RH += torch.mm(dz_RT, head_TH, out_dtype=sum_RH.dtype)
        return
    with _products_of(dtype):
        # not addmm_: on a CPU it makes one chain of additions as long as the vocabulary, which is twice as inexact
        sum_RH += dz_RT @ head_TH


def _tile_passes(tensor: Tensor) -> ModuleType:
    """Where fold_tile and dlogits_tile for tensors such as this one are."""
    if tensor.is_cuda:
        from megatron_vocagno.objective import linear_ce_triton

        return linear_ce_triton
    return linear_ce_tiles
