"""Cross-entropy of each token from hidden states and the output head, without the [N, V] logits.

    z = hidden @ head^T                       with a softcap c: z = c * tanh(hidden @ head^T / c)
    loss = lse - z[target]                    lse = logsumexp(z)
    dz = softmax(z) * dloss - onehot(target) * dloss
    dhidden = dz @ head      dhead = dz^T @ hidden

The vocabulary is the outer loop. The forward computes one tile of logits at a time, with a running maximum and a running sum of
exponentials (online softmax). Only these two are kept, 8 bytes per token. Their log-sum-exp would need 4 bytes, but it is rounded
at the scale of the logits, and every probability would inherit the error. The backward computes the tiles again, **for the
selected tokens only**, so the tokens that the selection dropped cost nothing. Since the softmax is known then, each slice of the
head's gradient is one product over all selected tokens and is written once. The gradient of the hidden states adds up in float32.
If a share f of the tokens is selected, forward and backward take 1 + 3f products of the size of the forward. Dense logits take 3.

The tile of logits is float32 for 16-bit inputs too. Rounding logits to bfloat16 changes a loss by up to 0.04 nats, which is
enough to change which tokens are kept.

Products are those of the GEMM library. The work on a tile between two products is done in torch on a CPU, and by one pass of
linear_ce_triton on a GPU. docs/performance.md lists bytes and FLOPs.

N tokens (R of them selected), V vocabulary, H hidden size, T columns of a tile. Losses are in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_vocagno.compat import product_precision
from megatron_vocagno.objective import linear_ce_tiles

CPU_TILE_BYTES, GPU_TILE_BYTES = 10 * 2**20, 256 * 2**20
"""Scratch memory of a tile: [N, T] float32 logits and, on the CPU, the [T, H] slice of the head if it must be upcast.

A tile on a CPU stays in the caches. A tile on a GPU is as large as memory allows, because each tile reads all hidden states again
and, in the backward, their gradient. For example, 16,384 tokens get tiles of 4,096 columns.
"""


class SelectedTokens:
    """The tokens that a backward pass computes. Set them between the forward and the backward, when the selection is known.

    If they are not set, the backward reads from the device which incoming gradients are not zero, and waits for the result.

    >>> hidden_NH, head_VH = torch.ones(3, 2, requires_grad=True), torch.zeros(4, 2)
    >>> selected = SelectedTokens()
    >>> loss_N = token_loss(hidden_NH, head_VH, torch.tensor([0, 1, 2]), selected=selected)
    >>> selected.set(torch.tensor([1]))
    >>> loss_N[1].backward()
    """

    def __init__(self) -> None:
        self.tokens_R: Tensor | None = None

    def set(self, tokens_R: Tensor) -> None:
        """tokens_R [R] int64: positions, each at most once. Must contain every token whose loss gets a gradient, and may contain
        more.

        Raises ValueError: not a list of int64.
        """
        if tokens_R.dim() != 1 or tokens_R.dtype != torch.int64:
            raise ValueError(f"SelectedTokens: expected positions [R] int64, got {tokens_R.dtype} {list(tokens_R.shape)}")
        self.tokens_R = tokens_R


@dataclass(frozen=True)
class _Options:
    ignore_index: int
    softcap: float | None
    selected: SelectedTokens | None


def token_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    target_N: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    selected: SelectedTokens | None = None,
) -> Tensor:
    """-log softmax(hidden @ head^T)[target] of each token (l_S and l_T in docs/method.md, 2).

    hidden_NH, head_VH  [N, H], [V, H], of one dtype: float32, bfloat16, float16 or float64. The gradient of a frozen tensor is
                        not computed
    target_N            [N] int, in [0, V) or ignore_index
    softcap             c above 0: logits become c * tanh(logits / c)
    selected            set between forward and backward: see SelectedTokens. If a token that it does not contain has a gradient,
                        the backward raises ValueError on a CPU. On other devices this check would wait, and all gradients become
                        NaN
    returns             [N] float32 (float64 if the inputs are float64), nats. 0 without a gradient if target == ignore_index. N
                        may be 0

    Raises ValueError: shapes or dtypes that do not fit. On the CPU also a target out of range. On other devices this check would
    wait, and the loss of such a token is NaN.

    Two tokens and a vocabulary of three. The first token is predicted correctly with confidence, the second is padding:

    >>> hidden_NH = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> head_VH = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> loss_N = token_loss(hidden_NH, head_VH, torch.tensor([0, -100]))
    >>> loss_N.detach()
    tensor([0.0134, 0.0000])

    For a model of transformers, the two tensors are `model.get_decoder()(ids).last_hidden_state.flatten(0, 1)` and
    `model.get_output_embeddings().weight`.
    """
    _check(hidden_NH, head_VH, target_N, softcap)
    if target_N.device.type == "cpu":
        _check_targets(target_N, head_VH.shape[0], ignore_index)
    options = _Options(ignore_index, softcap, selected)
    loss_N: Tensor = _TokenLoss.apply(hidden_NH, head_VH, target_N.long(), options)  # type: ignore[no-untyped-call]
    return loss_N


def _check(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, softcap: float | None) -> None:
    if hidden_NH.dim() != 2 or head_VH.dim() != 2:
        raise ValueError(
            f"token_loss: expected hidden states [N, H] and head [V, H], got {list(hidden_NH.shape)} and {list(head_VH.shape)}: "
            "rows and positions must be one axis: hidden.flatten(0, 1)"
        )
    if hidden_NH.shape[1] != head_VH.shape[1]:
        raise ValueError(
            f"token_loss: expected hidden states [N, H] and head [V, H], got {list(hidden_NH.shape)} and "
            f"{list(head_VH.shape)}: does the head belong to this model?"
        )
    if target_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"token_loss: {hidden_NH.shape[0]} hidden states, but targets of shape {list(target_N.shape)}")
    if hidden_NH.dtype != head_VH.dtype:
        raise ValueError(
            f"token_loss: hidden states are {hidden_NH.dtype}, the head is {head_VH.dtype}: pass head.to(hidden.dtype)"
        )
    if hidden_NH.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(
            f"token_loss: hidden states and head are {hidden_NH.dtype}: expected float32, bfloat16, float16 or float64"
        )
    if target_N.is_floating_point() or target_N.dtype == torch.bool:
        raise ValueError(f"token_loss: targets are {target_N.dtype}: expected the integers of token ids")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"token_loss: softcap = {softcap}: expected a number above 0, or None for no cap")


def _check_targets(target_N: Tensor, vocabulary: int, ignore_index: int) -> None:
    outside_N = (target_N != ignore_index) & ((target_N < 0) | (target_N >= vocabulary))
    if outside_N.any():
        raise ValueError(
            f"token_loss: target {int(target_N[outside_N][0])} is outside of the head's vocabulary of {vocabulary}: "
            "do the data and the model use the same tokenizer?"
        )


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, options: _Options) -> Tensor:
        with torch.autocast(hidden_NH.device.type, enabled=False):  # it would convert the tile to 16 bits
            softmax = _softmax(hidden_NH, head_VH, target_N, options.softcap)
        ctx.save_for_backward(hidden_NH, head_VH, target_N, softmax.max_N, softmax.sum_N)
        ctx.options = options
        loss_N = softmax.max_N - softmax.target_logit_N + softmax.sum_N.log()
        return loss_N.masked_fill(target_N == options.ignore_index, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NH, head_VH, target_N, max_N, sum_N = ctx.saved_tensors
        options: _Options = ctx.options
        gradient_N = gradients[0].masked_fill(target_N == options.ignore_index, 0.0)
        tokens_R, gradient_R = _selected(gradient_N, options.selected)
        # a token without a gradient may have any values: 0 * NaN would be NaN
        idle_R = gradient_R == 0
        selected = _Selected(
            hidden_NH[tokens_R].masked_fill_(idle_R[:, None], 0.0),
            target_N[tokens_R],
            max_N[tokens_R].masked_fill_(idle_R, 0.0),
            sum_N[tokens_R].masked_fill_(idle_R, 1.0),
            gradient_R,
        )
        with torch.autocast(hidden_NH.device.type, enabled=False):
            dhidden_RH, dhead_VH = _gradients(selected, head_VH, options.softcap, ctx.needs_input_grad)
        dhidden_NH = None
        if dhidden_RH is not None:
            dhidden_NH = torch.zeros_like(hidden_NH).index_copy_(0, tokens_R, dhidden_RH.to(hidden_NH.dtype))
        return dhidden_NH, dhead_VH, None, None


# ---------------------------------------------------------------- forward


@dataclass(frozen=True)
class _Softmax:
    """The softmax of logits z, up to the logits themselves, and z at the target."""

    max_N: Tensor
    """max(z)"""
    sum_N: Tensor
    """sum(exp(z - max(z)))"""
    target_logit_N: Tensor
    """z[target]. NaN if the target is in no tile."""


def _softmax(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, softcap: float | None) -> _Softmax:
    max_N = torch.full_like(target_N, -torch.inf, dtype=_exact(hidden_NH.dtype))
    softmax = _Softmax(max_N, torch.zeros_like(max_N), torch.full_like(max_N, torch.nan))
    update = _tile_backend(hidden_NH).update_online_softmax
    for begin, _, logits_NT in _tiles(hidden_NH, head_VH):
        update(logits_NT, begin, target_N, softmax.max_N, softmax.sum_N, softmax.target_logit_N, softcap)
    return softmax


# ---------------------------------------------------------------- backward


@dataclass(frozen=True)
class _Selected:
    """Values of the selected tokens. R is 0 in a step without weight."""

    hidden_RH: Tensor
    target_R: Tensor
    max_R: Tensor
    sum_R: Tensor
    gradient_R: Tensor


def _selected(gradient_N: Tensor, selected: SelectedTokens | None) -> tuple[Tensor, Tensor]:
    """The selected tokens and their gradients."""
    if selected is None or selected.tokens_R is None:
        tokens_R = gradient_N.nonzero().squeeze(1)
        return tokens_R, gradient_N[tokens_R]
    tokens_R = selected.tokens_R
    selected_N = torch.zeros_like(gradient_N, dtype=torch.bool).index_fill_(0, tokens_R, True)
    missed, repeated = (gradient_N.masked_fill(selected_N, 0.0) != 0).sum(), len(tokens_R) - selected_N.sum()
    if gradient_N.device.type != "cpu":
        return tokens_R, torch.where(missed + repeated > 0, torch.nan, gradient_N[tokens_R])
    if missed or repeated:
        raise ValueError(
            f"token_loss: {int(missed)} tokens have a gradient and are not selected, {int(repeated)} selected ones are repeated: "
            "does the loss weigh the tokens of the selection, and no others?"
        )
    return tokens_R, gradient_N[tokens_R]


def _gradients(
    selected: _Selected, head_VH: Tensor, softcap: float | None, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """dhidden [R, H] with the precision of the logits, and dhead [V, H] in the head's dtype. None if not needed."""
    hidden_RH, gradient_R = selected.hidden_RH, selected.gradient_R
    dhidden_RH = torch.zeros_like(hidden_RH, dtype=_exact(hidden_RH.dtype)) if needed[0] else None
    if not len(gradient_R):
        return dhidden_RH, torch.zeros_like(head_VH) if needed[1] else None
    dhead_VH = torch.empty_like(head_VH) if needed[1] else None
    scale_R = gradient_R / selected.sum_R
    dlogits_tile = _tile_backend(hidden_RH).dlogits_tile
    for begin, head_TH, logits_RT in _tiles(hidden_RH, head_VH):
        # on a CPU the products themselves round the tile
        dz_RT = torch.empty_like(logits_RT, dtype=head_VH.dtype) if head_TH.dtype != logits_RT.dtype else logits_RT
        dlogits_tile(logits_RT, begin, selected.target_R, selected.max_R, scale_R, gradient_R, softcap, dz_RT)
        if dhidden_RH is not None:
            _add_product(dhidden_RH, dz_RT, head_TH, head_VH.dtype)
        if dhead_VH is not None:
            torch.mm(dz_RT.to(head_VH.dtype).T, hidden_RH, out=dhead_VH[begin : begin + len(head_TH)])
    return dhidden_RH, dhead_VH


# ---------------------------------------------------------------- tiles


def _tiles(hidden_NH: Tensor, head_VH: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first column, slice of the head [T, H], exact logits [N, T] to be overwritten). The last tile may be narrower."""
    tokens, size = hidden_NH.shape
    upcast = hidden_NH.device.type == "cpu" and hidden_NH.dtype != _exact(hidden_NH.dtype)
    budget = CPU_TILE_BYTES if hidden_NH.device.type == "cpu" else GPU_TILE_BYTES
    # whole multiples of 128: aligned for every tensor core
    width = max(budget // _exact(hidden_NH.dtype).itemsize // max(tokens + upcast * size, 1) // 128 * 128, 128)
    # one buffer for all tiles: memory that is freed and allocated again comes as untouched pages from a CPU's allocator
    buffer = hidden_NH.new_empty(tokens * min(width, len(head_VH)), dtype=_exact(hidden_NH.dtype))
    if upcast:
        hidden_NH = hidden_NH.float()
    for begin in range(0, head_VH.shape[0], width):
        head_TH = head_VH[begin : begin + width]
        logits_NT = buffer[: tokens * len(head_TH)].view(tokens, len(head_TH))
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
    """The dtype of logits and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Context for products of float32 copies of `dtype` on a CPU. bfloat16 copies may be multiplied as bfloat16. This loses
    nothing, because products add up in float32, and takes three quarters of the time if the processor has such instructions.

    Sets a process-wide switch of torch for the duration of a product.
    """
    matmul = product_precision()
    if dtype != torch.bfloat16 or matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _add_product(sum_RH: Tensor, dz_RT: Tensor, head_TH: Tensor, dtype: torch.dtype) -> None:
    """sum += dz @ head. Both factors have the dtype `dtype` or, on a CPU, are copies of such factors."""
    if head_TH.dtype != sum_RH.dtype:
        # not addmm, which accepts out_dtype only in newer versions of torch
        sum_RH += torch.mm(dz_RT, head_TH, out_dtype=sum_RH.dtype)
        return
    with _products_of(dtype):
        # not addmm_: on a CPU it makes one chain of additions as long as the vocabulary, with twice the error
        sum_RH += dz_RT @ head_TH


def _tile_backend(tensor: Tensor) -> ModuleType:
    """The module with update_online_softmax and dlogits_tile for the tensor's device."""
    if tensor.is_cuda:
        from megatron_vocagno.objective import linear_ce_triton

        return linear_ce_triton
    return linear_ce_tiles
