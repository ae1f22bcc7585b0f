"""What a token sees: all of its row before it, or its own document's part of that. And which code computes it.

Document attention is told by positions that begin at 0 in every document. They make each document what it is when it stands
alone, RoPE that is scaled by length and learned positions included, and a gap in them is where transformers cuts its causal
masks. flash-attn takes the bounds of the documents instead of a mask, and never looks across one.

The teacher's mask is transformers' own affair. The student's layers are called one by one, so theirs is made here.
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


def resolve_attention(config: PretrainedConfig, attention: Attention, dtype: torch.dtype, device: torch.device | str) -> str:
    """The `_attn_implementation` that transformers should use: flash-attn where it can run, else torch's own sdpa.

    What sdpa cannot, as it has neither caps of logits (Gemma 2) nor sinks, is left to transformers' eager code.

    Raises ModelError: tokens would see those after them, or sdpa was asked for where it cannot.
    """
    _check_causal(config)
    sdpa = _has_sdpa(config)
    if attention == "sdpa" and not sdpa:
        raise ModelError(f"sdpa cannot compute the attention of a {config.model_type} model. Use attention = 'auto'.")
    if attention != "auto":
        return attention
    if importlib.util.find_spec("flash_attn") is not None and torch.device(device).type == "cuda" and dtype in HALF:
        return "flash_attention_2"
    return "sdpa" if sdpa else "eager"


def _has_sdpa(config: PretrainedConfig) -> bool:
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return getattr(config, "attn_logit_softcapping", None) is None and (model is None or model._supports_sdpa)


def _check_causal(config: PretrainedConfig) -> None:
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(
            f"this {config.model_type} model lets tokens see the tokens after them (use_bidirectional_attention), "
            "so it predicts none of them"
        )


def document_positions(segment_BS: Tensor) -> Tensor:
    """Where in its document a token stands.

    segment_BS  [B, S] int; neighbours with one number are of one document
    returns     [B, S] int32: 0, 1, 2, … from every document's first token

    >>> document_positions(torch.tensor([[0, 0, 0, 1, 1]]))
    tensor([[0, 1, 2, 0, 1]], dtype=torch.int32)
    """
    index_S = torch.arange(segment_BS.shape[1], dtype=torch.int32, device=segment_BS.device)
    begins_BS = torch.ones_like(segment_BS, dtype=torch.bool)
    begins_BS[:, 1:] = segment_BS[:, 1:] != segment_BS[:, :-1]
    return index_S - torch.where(begins_BS, index_S, 0).cummax(1).values


def document_bounds(position_BS: Tensor) -> dict[str, Any]:
    """What transformers hands on to flash-attn: where in the rows, laid end to end, the documents begin and end.

    The longest document is told to be as long as a row: its true length would have to be waited for, and bounds buffers alone.
    """
    rows, length = position_BS.shape
    begins_N = (position_BS.flatten() == 0).nonzero().flatten()
    bounds_N1 = torch.cat([begins_N, begins_N.new_full((1,), rows * length)]).int()
    return {"cu_seq_lens_q": bounds_N1, "cu_seq_lens_k": bounds_N1, "max_length_q": length, "max_length_k": length}


def layer_arguments(config: PretrainedConfig, layer: int, hidden_BSH: Tensor, position_BS: Tensor | None) -> dict[str, Any]:
    """What decoder layer `layer` of a model must be called with to attend as it should.

    position_BS  [B, S] int32, see document_positions; None where attention is over the whole row
    """
    if config._attn_implementation == "flash_attention_2":
        shared = {} if position_BS is None else _once(position_BS, "bounds", lambda: document_bounds(position_BS))
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
    return {"attention_mask": _once(position_BS, (config._attn_implementation, window, hidden_BSH.dtype), mask)}


def sliding_window(config: PretrainedConfig, layer: int) -> int | None:
    """How many positions decoder layer `layer` sees, its own included; None for all before it."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


_shared = WeakTensorKeyDictionary()


def _once(position_BS: Tensor, key: object, make: Callable[[], Any]) -> Any:
    """What the layers of a stage share for one micro-batch, for as long as its positions live.

    Bounds need the device to be waited for, and sdpa keeps each mask that it is given for the backward pass.
    """
    made = _shared.setdefault(position_BS, {})
    if key not in made:
        made[key] = make()
    return made[key]


def teacher_arguments(config: PretrainedConfig, segment_BU: Tensor) -> dict[str, Any]:
    """What a whole decoder must be called with for document attention."""
    position_BU = document_positions(segment_BU)
    bounds = document_bounds(position_BU) if config._attn_implementation == "flash_attention_2" else {}
    return {"position_ids": position_BU, **bounds}


@torch.no_grad()
def check_documents(decoder: nn.Module, config: PretrainedConfig, device: torch.device) -> None:
    """Prove that a decoder of transformers cuts its attention by positions: a first document must not reach a second one.

    Not all do: some take no positions, and a recurrent state goes on through any. Raises ModelError.
    """
    refused = ModelError(
        f"a {config.model_type} teacher cannot cut its attention at document borders: use data.attention = 'row', for both models"
    )
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise refused
    input_BU = torch.tensor([[0, 1, 2, 3], [4, 5, 2, 3]], device=device)

    def reach(arguments: dict[str, Any]) -> float:
        """By how much the first two tokens change what comes of the last two."""
        hidden_BUH = decoder(input_ids=input_BU, use_cache=False, **arguments).last_hidden_state.float()
        return float((hidden_BUH[0, 2:] - hidden_BUH[1, 2:]).abs().max())

    segment_BU = torch.tensor([[0, 0, 1, 1]] * 2, dtype=torch.int32, device=device)
    if reach(teacher_arguments(config, segment_BU)) > 0.01 * reach({}):
        raise refused
