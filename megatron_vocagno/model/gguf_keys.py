"""Converts the keys of a GGUF file to a configuration of transformers. Every key is converted, or the file is rejected.

transformers reads the keys that it knows, and silently ignores other keys and unknown tensors. Here, a key that changes the
model's computation is set in the configuration, and a key without effect is listed in NO_EFFECT. A file with any other key is
rejected, and so is a file of an architecture that FIELDS does not list.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from megatron_vocagno.errors import ModelError

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
"""Key without the architecture's name -> field of the configuration."""
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
FIELDS = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "qwen3moe": {**SIZES, **EXPERTS},
    "gemma2": {**SIZES, **WINDOW, **CAPS},
    "gemma3": {**SIZES, **WINDOW, **CAPS},
    "phi3": {**SIZES, **WINDOW},
}
"""Architecture's name in GGUF files -> its keys and fields. Other architectures cannot be converted."""
ROPE = {
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
}
NO_EFFECT = {"rope.scaling.finetuned"}
"""Keys that files contain and models do not use."""
DIVISORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
"""Tensors that RoPE's frequencies are divided by: for any context, for a short one, and for a long one."""
LARGEST = {"gemma2": 46, "gemma3": 62}
"""Number of layers of the largest model of each family, whose attention is scaled by the model's width divided by the number of
heads instead of by the width of a head. llama.cpp recognizes these models in the same way.
"""


def complete_config(
    config: PretrainedConfig, keys: Mapping[str, Any], names: Sequence[str], divisors: Mapping[str, Sequence[float]]
) -> PretrainedConfig:
    """A copy of the configuration, with all keys of the GGUF file applied.

    config    as transformers reads it from the file
    keys      full name -> value, of the file
    names     names of the file's tensors
    divisors  name -> values, for each of DIVISORS, SHORT and LONG that the file has

    Raises ModelError: an architecture or a key that is not known here.
    """
    architecture = str(keys["general.architecture"])
    if architecture not in FIELDS:
        raise ModelError(
            f"GGUF files of architecture '{architecture}' are not supported; supported architectures: {', '.join(FIELDS)}. "
            "Use the model's folder with safetensors."
        )
    own = {name.removeprefix(f"{architecture}."): value for name, value in keys.items() if name.startswith(f"{architecture}.")}
    config = copy.deepcopy(config)
    for name, value in own.items():
        if name in FIELDS[architecture]:
            _set(config, FIELDS[architecture][name], _same_in_all_layers(value, name, architecture))
        elif name not in ROPE | NO_EFFECT and not (name == "attention.causal" and value):
            raise ModelError(
                f"the GGUF file has {architecture}.{name} = {value}, which cannot be converted: the value would be lost. "
                "Use the model's folder with safetensors."
            )
    if "attention.key_length" not in own:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if own.get("attention.value_length", 0) != own.get("attention.key_length", own.get("attention.value_length", 0)):
        raise ModelError(
            f"the GGUF file has attention.key_length = {own.get('attention.key_length')} and attention.value_length = "
            f"{own['attention.value_length']}: a {architecture} model of transformers has equal widths. Use the model's folder "
            "with safetensors."
        )
    for field, part in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_up.bias")):
        if hasattr(config, field) and any(name.endswith(part) for name in names):
            setattr(config, field, True)
    _set_rope(config, architecture, own, divisors)
    if architecture in LARGEST:
        largest = config.num_hidden_layers == LARGEST[architecture]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    return config


def _set(config: PretrainedConfig, field: str, value: Any) -> None:
    setattr(config, field, None if field == "sliding_window" and not value else value)


def _same_in_all_layers(value: Any, name: str, architecture: str) -> Any:
    """The value of a key that may be a list with one value per layer. Raises ModelError: the values differ."""
    values = value if isinstance(value, list) else [value]
    if any(each != values[0] for each in values):
        raise ModelError(
            f"the GGUF file has {architecture}.{name} = {value}: different values per layer cannot be converted. Use the model's "
            "folder with safetensors."
        )
    return values[0]


def _set_rope(
    config: PretrainedConfig, architecture: str, own: Mapping[str, Any], divisors: Mapping[str, Sequence[float]]
) -> None:
    width = config.head_dim
    rotated = own.get("rope.dimension_count", width)
    rope: dict[str, Any] = {"rope_theta": own.get("rope.freq_base", 10000.0), **_scaling(config, own, divisors)}
    if rotated != width and architecture != "phi3":
        raise ModelError(
            f"the GGUF file has rope.dimension_count = {rotated} and heads of width {width}: a {architecture} model of "
            "transformers rotates complete heads. Use the model's folder with safetensors."
        )
    if architecture == "phi3":
        rope["partial_rotary_factor"] = rotated / width
        config.original_max_position_embeddings = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    if architecture == "gemma3":
        # layers with a sliding window have other frequencies, which GGUF files do not contain
        config.rope_parameters = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    else:
        config.rope_parameters = rope


def _scaling(config: PretrainedConfig, own: Mapping[str, Any], divisors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """RoPE's type and its parameters. Raises ModelError: an unknown type, or several types at the same time."""
    kind = own.get("rope.scaling.type", "linear" if "rope.scale_linear" in own else "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    original = own.get("rope.scaling.original_context_length", config.max_position_embeddings)
    stretched = own.get("rope.scaling.attn_factor", 1.0)
    if kind == "linear" and factor in (0.0, 1.0):
        kind = "none"
    if kind in ("none", "longrope") and divisors:
        short = divisors.get(DIVISORS) or divisors[SHORT]
        return {
            "rope_type": "longrope",
            "factor": max(1.0, config.max_position_embeddings / original),
            "short_factor": list(short),
            "long_factor": list(divisors.get(DIVISORS) or divisors[LONG]),
            "original_max_position_embeddings": original,
            "attention_factor": stretched,
        }
    if not divisors and stretched == 1.0:
        if kind == "none":
            return {"rope_type": "default"}
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ModelError(
        f"the GGUF file scales RoPE in a way that cannot be converted: type {kind}, attn_factor {stretched}, "
        f"tensors {', '.join(divisors) or 'none'}. Use the model's folder with safetensors."
    )
