"""What a layer takes of memory, asked of PyTorch itself: it is run on the meta device, where tensors have sizes and no numbers.

So there is no formula to go wrong for the next model, and none to keep in step with transformers. Two things are added up: the
storages that autograd keeps for the backward pass, each once and parameters left out, and the most that lives at any moment.
Attention is counted as a fused kernel, which keeps its factors, its result and a number for each row of the square.
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

from megatron_vocagno.model.student import DecoderLayer


@dataclass(frozen=True)
class Held:
    """Bytes of one decoder layer on one micro-batch."""

    saved: int
    """From its forward to its backward."""
    peak: int
    """At most at once in forward and backward, what is saved and the gradients of its parameters included."""


def student_layer(config: PretrainedConfig, rows: int, length: int, dtype: torch.dtype) -> Held:
    """A decoder layer of the student on `rows` rows of `length` tokens."""
    layer = _layer(config, dtype)
    hidden_BSH = torch.empty(rows, length, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    saved = Storages(layer.parameters())
    with _Fused(), torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        layer(hidden_BSH)
    # a second time, as the first one's tensors live on in `saved`
    gradient_BSH = torch.empty_like(hidden_BSH)
    live = Live([*layer.parameters(), hidden_BSH, gradient_BSH])
    with _Fused(), live:
        layer(hidden_BSH).backward(gradient_BSH)
    return Held(saved.bytes, live.peak)


def teacher_layer(config: PretrainedConfig, rows: int, length: int, dtype: torch.dtype) -> int:
    """The most that lives while one decoder layer of the teacher reads `rows` rows of `length` tokens, bytes."""
    layer = _layer(config, dtype)
    live = Live(layer.parameters())
    with torch.no_grad(), _Fused(), live:
        layer(torch.empty(rows, length, config.hidden_size, dtype=dtype, device="meta"))
    return live.peak


def _layer(config: PretrainedConfig, dtype: torch.dtype) -> DecoderLayer:
    with torch.device("meta"):
        return DecoderLayer(with_sdpa(config), 0).to(dtype)


def with_sdpa(config: PretrainedConfig) -> PretrainedConfig:
    """The same model with the attention that runs on the meta device."""
    config = copy.copy(config)
    config._attn_implementation = "sdpa"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config.attn_logit_softcapping = None  # sdpa has no cap; flash-attn's keeps nothing more
    return config


class Storages:
    """Bytes behind tensors, each storage once, those of `known` tensors not at all."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {_key(tensor) for tensor in known}
        self._kept: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        if (key := _key(tensor)) not in self._known:
            self._kept[key] = tensor  # alive, so that no other storage gets its place
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, for as long as they live."""

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


class _Fused(TorchFunctionMode):
    """Fused attention on the meta device, where PyTorch would take its unfused code and keep the whole square."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **_: Any
) -> Tensor:
    # the one fused kernel that torch gives a shape without a GPU; what it keeps is what all of them keep
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask)[0]
    return out


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
