"""Attention over rows that are divided among ranks: DeepSpeed-Ulysses (arXiv 2309.14509).

A rank has P = S / N positions of each row and computes everything but attention for them. Before attention, an all-to-all gives
each rank all S positions of 1 / N of the heads. After attention, another one returns the results to the ranks of the positions.

    [B, heads, P, D]  --all-to-all-->  [B, heads / N, S, D]  attention  [B, S, heads / N, D]  --all-to-all-->  [B, P, heads, D]

The attention function has its own name in transformers. Only a model whose configuration has this name is divided: a teacher in
the same process is not. Each row is attended as a whole (causal, without a mask).

B rows, S positions of a row, N ranks, D values of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.attention import ULYSSES, has_sdpa, sliding_window

Exchange = Callable[[Tensor], Tensor]
"""[N, ...] -> [N, ...]: part n goes to rank n, and the result has the part of rank n at index n. Differentiable."""


def register_ulysses(exchange: Exchange, ranks: int, name: str = ULYSSES) -> None:
    """Register the attention function for models with `_attn_implementation = name`. It replaces an earlier one of this name.

    exchange  between the ranks that share rows
    ranks     N, their number

    The attention function raises ValueError if it gets a mask.
    """

    def attend(
        module: nn.Module, query_BHPD: Tensor, key_BKPD: Tensor, value_BKPD: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        if mask is not None:
            raise ValueError("ulysses: got a mask, but rows that are divided among ranks are attended as a whole")
        # a key head that several ranks need is sent to each of them
        copies = max(1, ranks // key_BKPD.shape[1])
        query = _whole_rows(query_BHPD, ranks, exchange)
        key, value = (_whole_rows(x.repeat_interleave(copies, 1), ranks, exchange) for x in (key_BKPD, value_BKPD))
        # the ratio of the heads of this rank, which is another one than the module's if key heads were copied
        of_rank = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
        out_BSHD, _ = sdpa_attention_forward(of_rank, query, key, value, None, **options)
        return _own_positions(out_BSHD, ranks, exchange), None

    AttentionInterface.register(name, attend)


def _whole_rows(x_BHPD: Tensor, ranks: int, exchange: Exchange) -> Tensor:
    """[B, heads, P, D] -> [B, heads / N, S, D]"""
    received = exchange(x_BHPD.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous())
    return received.movedim(0, 2).flatten(2, 3)


def _own_positions(x_BSHD: Tensor, ranks: int, exchange: Exchange) -> Tensor:
    """[B, S, heads / N, D] -> [B, P, heads, D]"""
    received = exchange(x_BSHD.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous())
    return received.movedim(0, 2).flatten(2, 3)


def exchange_over(group: dist.ProcessGroup) -> Exchange:
    """The exchange between the ranks of a group. Collective over the group, in the backward pass too."""

    def exchange(x_NX: Tensor) -> Tensor:
        out_NX: Tensor = _AllToAll.apply(x_NX, group)
        return out_NX

    return exchange


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NX: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out_NX = torch.empty_like(x_NX)
        dist.all_to_all_single(out_NX, x_NX, group=group)
        return out_NX

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # the exchange is its own inverse
        return _AllToAll.apply(gradients[0].contiguous(), ctx.group), None


def check_ulysses(config: PretrainedConfig, ranks: int, row_length: int) -> None:
    """Check that a student can be trained on rows of `row_length` tokens that are divided among `ranks` ranks.

    Raises ModelError: heads that cannot be divided, attention that needs a mask or has capped logits, or a RoPE that depends on
    the length of its input, because each rank would compute it from its own part.
    """
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % ranks or (shared % ranks and ranks % shared):
        raise ModelError(
            f"parallel.sequence is {ranks}, but the student has {heads} attention heads and {shared} key heads: the heads are "
            "divided among the ranks. Use a number that divides the attention heads, and that divides the key heads or is a "
            "multiple of them."
        )
    if not has_sdpa(config):
        raise ModelError(
            f"parallel.sequence is {ranks}, but sdpa cannot compute the attention of a {config.model_type} model. Rows can only "
            "be divided among ranks with sdpa: set parallel.sequence to 1."
        )
    windows = {window for layer in range(config.num_hidden_layers) if (window := sliding_window(config, layer)) is not None}
    if windows and min(windows) < row_length:
        raise ModelError(
            f"parallel.sequence is {ranks}, but the student attends to windows of {min(windows):,} tokens, and data.row_length "
            f"is {row_length:,}. Rows that are divided among ranks are attended as a whole: use rows that are not longer than "
            "the window, or set parallel.sequence to 1."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(part["rope_type"]) for part in (rope, *rope.values()) if isinstance(part, dict) and "rope_type" in part}
    if changing := sorted(kind for kind in kinds if "dynamic" in kind or kind == "longrope"):
        raise ModelError(
            f"parallel.sequence is {ranks}, but the student's RoPE has the type {changing[0]!r}, which depends on the length of "
            "a row: each rank would compute it from its part of the row. Set parallel.sequence to 1."
        )
