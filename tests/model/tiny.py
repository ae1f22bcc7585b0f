"""Tiny random models in Hugging Face's own classes, for comparison."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 211
POSITIONS = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
# what sets each of them apart: a window shorter than rows, in all layers (mistral) or in some; biases on q, k, v (qwen2); norms
# on q, k and heads wider than hidden / heads (qwen3); scaled embeddings, norms of 1 + weight (gemma); capped logits in attention
# and head (gemma2); two RoPEs (gemma3)
GEMMA: dict[str, Any] = {"head_dim": 12, "pad_token_id": None}
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gemma": GEMMA,
    "gemma2": {
        **GEMMA,
        "query_pre_attn_scalar": 20,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**GEMMA, "query_pre_attn_scalar": 20, "sliding_window": 6, "layer_types": GEMMA3_LAYERS},
}

each_family = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(
            {"model_type": family, **SIZES, **extra, "tie_word_embeddings": tied}, id=f"{family}-{'tied' if tied else 'untied'}"
        )
        for family, extra in FAMILIES.items()
        for tied in (False, True)
    ],
)


def write_model(folder: Path, spec: dict[str, Any], seed: int = 0, **save_options: Any) -> Path:
    """A random model of `spec` in `folder`; no bias is 0 and no norm's weight 1."""
    keys = dict(spec)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            center = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(center + torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder, **save_options)
    return folder


def reference(folder: Path) -> Any:
    """The same model as transformers runs it, with an attention that has an explicit mask."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def reference_loss(model: Any, ids_BS: Tensor, target_BS: Tensor) -> Tensor:
    logits_BSV = model(input_ids=ids_BS).logits
    return F.cross_entropy(logits_BSV.flatten(0, 1), target_BS.flatten(), reduction="none").view(target_BS.shape)


def batch(rows: int, length: int, vocab: int = VOCAB, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random (inputs, targets), every fifth target ignored."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    target = stream[:, 1:].clone()
    target.view(-1)[::5] = -100
    return stream[:, :-1], target
