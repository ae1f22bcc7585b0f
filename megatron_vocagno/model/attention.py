"""Causal attention over the whole row or within each document, and the implementation that computes it.

Document attention is requested through positions that begin at 0 in every document. With these positions a document is computed
as if it were the only one, including RoPE that is scaled by length and learned positions. transformers cuts its causal masks
where the positions start again from 0. flash-attn gets the bounds of the documents instead of a mask, and does not attend across
them.

For the teacher, transformers makes the mask. The student's layers are called one by one, so their masks are made here.
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from megatron_vocagno.errors import ModelError

Attention = Literal["auto", "sdpa", "flash_attention_2"]
HALF = (torch.bfloat16, torch.float16)
ULYSSES = "ulysses_sdpa"
"""The `_attn_implementation` of a student whose rows are divided among ranks: see ulysses.py."""


def resolve_attention(config: PretrainedConfig, attention: Attention, dtype: torch.dtype, device: torch.device | str) -> str:
    """The `_attn_implementation` for transformers: flash-attn if it can run, else torch's sdpa.

    sdpa supports neither capped logits (Gemma 2) nor attention sinks. For models with these, transformers' eager code is used.

    Raises ModelError: the model is not causal, or `attention` is "sdpa" and sdpa does not support the model.
    """
    _check_causal(config)
    sdpa = has_sdpa(config)
    if attention == "sdpa" and not sdpa:
        raise ModelError(f"sdpa cannot compute the attention of a {config.model_type} model. Use attention = 'auto'.")
    if attention != "auto":
        return attention
    if importlib.util.find_spec("flash_attn") is not None and torch.device(device).type == "cuda" and dtype in HALF:
        return "flash_attention_2"
    return "sdpa" if sdpa else "eager"


def has_sdpa(config: PretrainedConfig) -> bool:
    """Whether torch's sdpa can compute the attention of a model."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return getattr(config, "attn_logit_softcapping", None) is None and (model is None or model._supports_sdpa)


def _check_causal(config: PretrainedConfig) -> None:
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(
            f"this {config.model_type} model lets tokens see the tokens after them (use_bidirectional_attention), "
            "so it predicts none of them"
        )


def document_positions(segment_BS: Tensor) -> Tensor:
    """Position of each token in its document.

    segment_BS  [B, S] int; adjacent tokens with equal numbers belong to one document
    returns     [B, S] int32: 0, 1, 2, … from the first token of each document

    >>> document_positions(torch.tensor([[0, 0, 0, 1, 1]]))
    tensor([[0, 1, 2, 0, 1]], dtype=torch.int32)
    """
    index_S = torch.arange(segment_BS.shape[1], dtype=torch.int32, device=segment_BS.device)
    begins_BS = torch.ones_like(segment_BS, dtype=torch.bool)
    begins_BS[:, 1:] = segment_BS[:, 1:] != segment_BS[:, :-1]
    return index_S - torch.where(begins_BS, index_S, 0).cummax(1).values


def document_bounds(position_BS: Tensor) -> dict[str, Any]:
    """Keyword arguments that transformers passes to flash-attn: the bounds of the documents in the concatenated rows.

    The length of the longest document is given as the length of a row. The true length would need a device synchronization, and
    flash-attn only uses it to size its buffers.
    """
    rows, length = position_BS.shape
    begins_N = (position_BS.flatten() == 0).nonzero().flatten()
    bounds_N1 = torch.cat([begins_N, begins_N.new_full((1,), rows * length)]).int()
    return {"cu_seq_lens_q": bounds_N1, "cu_seq_lens_k": bounds_N1, "max_length_q": length, "max_length_k": length}


def layer_arguments(config: PretrainedConfig, layer: int, hidden_BSH: Tensor, position_BS: Tensor | None) -> dict[str, Any]:
    """Keyword arguments that make decoder layer `layer` attend over the row or by document.

    position_BS  [B, S] int32, see document_positions; None for attention over the whole row. With Ulysses, the positions of this
                 rank's part of the rows, which are attended as a whole
    """
    if (config._attn_implementation or "").startswith(ULYSSES):
        return {"attention_mask": None}
    if config._attn_implementation == "flash_attention_2":
        shared = {} if position_BS is None else _computed_once(position_BS, "bounds", lambda: document_bounds(position_BS))
        return {"attention_mask": None, **shared}
    window = sliding_window(config, layer)
    if window is not None and window >= hidden_BSH.shape[1]:
        window = None
    # sdpa without a mask is causal; eager without one is not
    if config._attn_implementation == "sdpa" and position_BS is None and window is None:
        return {"attention_mask": None}

    def mask() -> Tensor:
        create = create_causal_mask if window is None else create_sliding_window_causal_mask
        mask_B1SS: Tensor = create(config, hidden_BSH, None, None, position_ids=position_BS)
        return mask_B1SS

    if position_BS is None:
        return {"attention_mask": mask()}
    return {"attention_mask": _computed_once(position_BS, (config._attn_implementation, window, hidden_BSH.dtype), mask)}


def sliding_window(config: PretrainedConfig, layer: int) -> int | None:
    """Number of positions that decoder layer `layer` attends to, its own included; None for all positions up to its own."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


_shared = WeakTensorKeyDictionary()


def _computed_once(position_BS: Tensor, key: object, compute: Callable[[], Any]) -> Any:
    """Compute a value once per micro-batch, for all layers of a stage. It is kept until the tensor of positions is freed.

    Bounds need a device synchronization, and sdpa keeps every mask that it gets until the backward pass.
    """
    values = _shared.setdefault(position_BS, {})
    if key not in values:
        values[key] = compute()
    return values[key]


def teacher_arguments(config: PretrainedConfig, segment_BU: Tensor) -> dict[str, Any]:
    """Keyword arguments that make the complete decoder of a teacher attend by document."""
    position_BU = document_positions(segment_BU)
    bounds = document_bounds(position_BU) if config._attn_implementation == "flash_attention_2" else {}
    return {"position_ids": position_BU, **bounds}


@torch.no_grad()
def check_documents(decoder: nn.Module, config: PretrainedConfig, device: torch.device) -> None:
    """Check that a decoder of transformers cuts its attention at document borders: tokens of a first document must not change
    the hidden states of a second one.

    Not all decoders do. Some do not accept positions, and a recurrent state ignores them. Raises ModelError.
    """
    error = ModelError(
        f"a {config.model_type} teacher cannot cut its attention at document borders: use data.attention = 'row', for both models"
    )
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise error
    input_BU = torch.tensor([[0, 1, 2, 3], [4, 5, 2, 3]], device=device)

    def reach(arguments: dict[str, Any]) -> float:
        """Largest change in the hidden states of the last two tokens when the first two tokens change."""
        hidden_BUH = decoder(input_ids=input_BU, use_cache=False, **arguments).last_hidden_state.float()
        return float((hidden_BUH[0, 2:] - hidden_BUH[1, 2:]).abs().max())

    segment_BU = torch.tensor([[0, 0, 1, 1]] * 2, dtype=torch.int32, device=device)
    if reach(teacher_arguments(config, segment_BU)) > 0.01 * reach({}):
        raise error
