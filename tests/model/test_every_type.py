"""Every causal language model that transformers can make small is scored rightly, or refused with a sentence."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.teacher import open_teacher
from megatron_vocagno.model.weights import model_class
from tests.model.tiny import VOCAB, batch, reference_loss

WIDE = ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "word_embed_size", "lru_width")
INNER = (
    "intermediate_size",
    "ffn_dim",
    "d_ff",
    "decoder_ffn_dim",
    "encoder_ffn_dim",
    "dim_ff",
    "n_inner",
    "attention_hidden_size",
)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
RANKS = ("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "linear_key_head_dim")
SMALL: dict[str, Any] = {
    **dict.fromkeys((*WIDE, *INNER, "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"), 64),
    **dict.fromkeys((*LAYERS, "num_experts_per_tok", "num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys((*HEADS, *EXPERTS, "linear_num_value_heads"), 4),
    **dict.fromkeys((*RANKS, "linear_value_head_dim", "dim_head", "attention_head_size", "mamba_d_head"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_n_heads", "attention_window_size", "rotary_dim"), 8),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    "vocab_size": VOCAB,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_start_token_id": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LARGEST = 30_000_000


def small(kind: type[PretrainedConfig]) -> dict[str, Any]:
    fields = set(inspect.signature(kind.__init__).parameters) | {field.name for field in dataclasses.fields(kind)}
    keys = {name: value for name, value in SMALL.items() if name in fields}
    if "qk_rope_head_dim" in keys:
        # attention through a latent vector: as many keys as queries, of a width of their own
        keys.pop("head_dim", None)
        keys["num_key_value_heads"] = 4
    return keys


def make(model_type: str) -> Any:
    """A random model; whatever hinders that is the test's own affair."""
    config = AutoConfig.for_model(model_type, **small(type(AutoConfig.for_model(model_type))))
    if (text := config.get_text_config()) is not config:
        config = AutoConfig.for_model(model_type, text_config=small(type(text)))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config)(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = model_class(config)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.long
@pytest.mark.slow
def test_every_type_is_right_or_refused(tmp_path: Path) -> None:
    assert len(MODEL_FOR_CAUSAL_LM_MAPPING) > 100
    right, refused, unmade, wrong = set(), {}, {}, {}
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        folder = tmp_path / model_type
        try:
            model = make(model_type)
            model.save_pretrained(folder)
        # hundreds of classes have reasons of their own not to be made of such sizes
        except Exception as error:
            unmade[model_type] = error
            continue
        try:
            teacher = open_teacher(folder, torch.float32, "cpu")
        except ModelError as error:
            refused[model_type] = str(error)
            continue
        input_BU, target_BU = batch(2, 32)
        with torch.no_grad():
            logits_BUW = type(model).from_pretrained(folder).eval()(input_ids=input_BU, use_cache=False).logits
        expected_BU = reference_loss(
            lambda input_ids, logits=logits_BUW: type("Out", (), {"logits": logits}), input_BU, target_BU
        )
        apart = float((teacher.loss(input_BU, target_BU) - expected_BU).abs().max())
        if apart < 1e-3:
            right.add(model_type)
        else:
            wrong[model_type] = apart
    assert not wrong
    assert len(right) > 100 and len(refused) > 20, (len(right), refused, unmade)
    assert {"gpt2", "llama", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "mamba", "jamba", "olmo2"} <= right
    assert {"cohere", "recurrent_gemma", "inkling_text", "cpmant", "xlstm", "bert"} <= refused.keys()
