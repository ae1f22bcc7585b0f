"""What a GGUF file says of its model, carried over to a configuration of transformers: each key is, or the file is refused by it.

transformers reads the keys that it has a name for and is silent about others, and it makes the best of a tensor that it does not
know. Here a key that changes what the model computes is set, one without effect is listed, and what is neither is refused; so is
an architecture of which not every key is known here.
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
"""Key, after the architecture's name -> field of the configuration."""
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
"""Architectures that can be converted, by their names in GGUF files."""
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
"""Told by a file, and by no model obeyed."""
DIVISORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
"""Tensors by which RoPE's frequencies are divided: of any context, of a short one, and of a long one."""
LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the one of each family whose attention is scaled by the model's width, not by a head's; so llama.cpp knows them."""


def settle(
    config: PretrainedConfig, keys: Mapping[str, Any], names: Sequence[str], divisors: Mapping[str, Sequence[float]]
) -> PretrainedConfig:
    """The configuration of transformers with all that the file says of its model.

    keys      of the file, whole names
    names     of its tensors
    divisors  those of DIVISORS, SHORT and LONG that it has

    Raises ModelError: an architecture or a key that is not known here.
    """
    architecture = str(keys["general.architecture"])
    if architecture not in FIELDS:
        raise ModelError(
            f"GGUF files of architecture '{architecture}' are not supported; these are: {', '.join(FIELDS)}. "
            "Use the model's folder with safetensors."
        )
    own = {name.removeprefix(f"{architecture}."): value for name, value in keys.items() if name.startswith(f"{architecture}.")}
    config = copy.deepcopy(config)
    for name, value in own.items():
        if name in FIELDS[architecture]:
            _set(config, FIELDS[architecture][name], _one(value, name, architecture))
        elif name not in ROPE | NO_EFFECT and not (name == "attention.causal" and value):
            raise ModelError(
                f"the GGUF file has {architecture}.{name} = {value}, and no conversion of that is known: it would be lost. "
                "Use the model's folder with safetensors."
            )
    if "attention.key_length" not in own:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if own.get("attention.value_length", 0) != own.get("attention.key_length", own.get("attention.value_length", 0)):
        raise ModelError(f"the GGUF file has keys of another width than its values, which a {architecture} model here has not")
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


def _one(value: Any, name: str, architecture: str) -> Any:
    """A value that may be told once for each layer. Raises ModelError: they differ."""
    values = value if isinstance(value, list) else [value]
    if any(each != values[0] for each in values):
        raise ModelError(f"the GGUF file has another {architecture}.{name} in each layer, which its conversion does not know")
    return values[0]


def _set_rope(
    config: PretrainedConfig, architecture: str, own: Mapping[str, Any], divisors: Mapping[str, Sequence[float]]
) -> None:
    width = config.head_dim
    rotated = own.get("rope.dimension_count", width)
    rope: dict[str, Any] = {"rope_theta": own.get("rope.freq_base", 10000.0), **_scaling(config, own, divisors)}
    if rotated != width and architecture != "phi3":
        raise ModelError(
            f"the GGUF file rotates {rotated} of the {width} numbers of a head, which a {architecture} model here has not"
        )
    if architecture == "phi3":
        rope["partial_rotary_factor"] = rotated / width
        config.original_max_position_embeddings = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    if architecture == "gemma3":
        # layers with a window have frequencies of their own, which no file tells
        config.rope_parameters = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    else:
        config.rope_parameters = rope


def _scaling(config: PretrainedConfig, own: Mapping[str, Any], divisors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """RoPE's type, and what belongs to it. Raises ModelError: several at a time, or one that is not known."""
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
        f"the GGUF file scales RoPE in a way that is not known here: type {kind}, attn_factor {stretched}, "
        f"tensors {', '.join(divisors) or 'none'}. Use the model's folder with safetensors."
    )
