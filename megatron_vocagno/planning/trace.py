"""Count the memory of a decoder layer by running it on the meta device, where tensors have shapes but no data.

No formula has to follow the architecture or the release of transformers. Two quantities are counted: the storages that autograd
saves for the backward pass (each once, without parameters), and the most bytes that are alive at any moment. Attention is counted
as a fused kernel, which saves its inputs, its output and one number per query, but not the square of scores.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from megatron_vocagno.model.attention import ULYSSES
from megatron_vocagno.model.student import DecoderLayer
from megatron_vocagno.model.ulysses import register_ulysses


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one decoder layer on one micro-batch."""

    saved: int
    """Bytes that are saved from the forward pass for the backward pass."""
    peak: int
    """The most bytes alive at once during forward and backward, including `saved` and the gradients of the parameters."""


def student_layer_memory(config: PretrainedConfig, rows: int, length: int, dtype: torch.dtype, sequence: int = 1) -> LayerMemory:
    """Memory of the student's decoder layer on `rows` rows of `length` tokens. sequence: number of ranks that share each row."""
    layer = _layer(config, dtype)
    if sequence > 1:
        layer.config._attn_implementation = f"{ULYSSES}_planned"
        register_ulysses(_planned_exchange, sequence, layer.config._attn_implementation)
    hidden_BSH = torch.empty(rows, length // sequence, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    saved = Storages(layer.parameters())
    with _Fused(), torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        layer(hidden_BSH)
    # run it again, because `saved` keeps the tensors of the first run alive
    gradient_BSH = torch.empty_like(hidden_BSH)
    live = Live([*layer.parameters(), hidden_BSH, gradient_BSH])
    with _Fused(), live:
        layer(hidden_BSH).backward(gradient_BSH)
    return LayerMemory(saved.bytes, live.peak)


def teacher_layer_peak(config: PretrainedConfig, rows: int, length: int, dtype: torch.dtype) -> int:
    """The most bytes alive at once while a decoder layer of the teacher runs on `rows` rows of `length` tokens."""
    layer = _layer(config, dtype)
    live = Live(layer.parameters())
    with torch.no_grad(), _Fused(), live:
        layer(torch.empty(rows, length, config.hidden_size, dtype=dtype, device="meta"))
    return live.peak


def _layer(config: PretrainedConfig, dtype: torch.dtype) -> DecoderLayer:
    with torch.device("meta"):
        return DecoderLayer(with_sdpa(config), 0).to(dtype)


def with_sdpa(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the configuration with attention that runs on the meta device."""
    config = copy.copy(config)
    config._attn_implementation = "sdpa"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config.attn_logit_softcapping = None  # sdpa does not support the cap; in flash-attn the cap saves nothing more
    return config


class Storages:
    """Adds up the bytes of tensors. Each storage counts once, and storages of `known` tensors do not count."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {_key(tensor) for tensor in known}
        self._kept: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        if (key := _key(tensor)) not in self._known:
            self._kept[key] = tensor  # keeps it alive, so that no other storage gets the same address
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of the storages that operations allocate until they are freed. Those of `known` tensors do not count."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {_key(tensor) for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta" and (key := _key(tensor)) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, partial(self._free, key, storage.nbytes()))
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _planned_exchange(x_NX: Tensor) -> Tensor:
    out_NX: Tensor = _PlannedExchange.apply(x_NX)  # type: ignore[no-untyped-call]
    return out_NX


class _PlannedExchange(torch.autograd.Function):
    """The tensors that an exchange between ranks allocates. It saves none."""

    @staticmethod
    def forward(ctx: Any, x_NX: Tensor) -> Tensor:
        return torch.empty_like(x_NX)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty_like(gradients[0])


class _Fused(TorchFunctionMode):
    """Uses fused attention. On the meta device PyTorch would choose its unfused code, which saves the square of scores."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    out: Tensor = _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
    return out


class _FusedAttention(torch.autograd.Function):
    """The tensors that a fused kernel allocates and saves. B rows, N and K heads, S tokens, D values per head."""

    @staticmethod
    def forward(ctx: Any, query_BNSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, length, _ = query_BNSD.shape
        out_BNSD = query_BNSD.new_empty(rows, length, heads, value_BKSD.shape[-1]).transpose(1, 2)
        normalizer_BNS = query_BNSD.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query_BNSD, key_BKSD, value_BKSD, mask, out_BNSD, normalizer_BNS)
        return out_BNSD

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        query_BNSD, key_BKSD, value_BKSD, *_rest = ctx.saved_tensors
        return torch.empty_like(query_BNSD), torch.empty_like(key_BKSD), torch.empty_like(value_BKSD), None


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
