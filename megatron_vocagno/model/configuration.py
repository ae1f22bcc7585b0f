"""The configuration of a student, from a Hugging Face folder or from its keys, and what it refuses."""

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.attention import resolve_attention
from megatron_vocagno.model.folder import PretrainedWeights, read_config
from megatron_vocagno.model.proof import prove_student
from megatron_vocagno.model.weights import check_weights

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
# accepted by transformers though no configuration class lists them: older spellings of rope_parameters
LEGACY_KEYS = {"rope_theta", "rope_scaling"}
COUNTS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings"),
}


def student_config(
    spec: Mapping[str, Any] | str | os.PathLike[str], vocab_size: int | None = None, rows: int | None = None
) -> PretrainedConfig:
    """The configuration of a student, from a pretrained folder or from its keys.

    spec         a Hugging Face folder, or {"model_type": "llama", "hidden_size": 2048, ...}
    vocab_size   of the student's tokenizer, for keys that leave it out
    rows         that the ids of its data need; `vocab_size` where it is not given. The model may have more, never fewer.

    Raises ModelError: an architecture that is not supported, a key that it does not have, dropout, too few rows, weights that are
    not those of their configuration (weights.py), and a configuration of which this project makes another model (proof.py).
    """
    config = _config_from_keys(spec, vocab_size) if isinstance(spec, Mapping) else _config_from_folder(spec)
    rows = vocab_size if rows is None else rows
    if rows is not None and config.vocab_size < rows:
        raise ModelError(
            f"the tokenizer has {rows:,} tokens, the student model has {config.vocab_size:,}: ids would have no embedding. "
            "Is it the tokenizer that the model was made for?"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise ModelError(
            f"attention_dropout is {config.attention_dropout}; set it to 0. Random numbers would make a resumed run another one, "
            "and a loss depend on the layout."
        )
    # until the caller, who knows dtype and device, asks for another
    config._attn_implementation = resolve_attention(config, "auto", torch.float32, "cpu")
    prove_student(config)
    return config


def _config_from_folder(path: str | os.PathLike[str]) -> PretrainedConfig:
    weights = PretrainedWeights(path)
    config = read_config(weights.folder)
    _check_supported(config.model_type)
    return check_weights(weights, config)


def _config_from_keys(spec: Mapping[str, Any], vocab_size: int | None) -> PretrainedConfig:
    keys = dict(spec)
    model_type = keys.pop("model_type", None)
    _check_supported(model_type)
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map) | LEGACY_KEYS
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ModelError(f"no field '{key}' in a {model_type} model" + (f"; did you mean '{near[0]}'?" if near else ""))
    if "vocab_size" not in keys:
        if vocab_size is None:
            raise ModelError("the student model has no vocab_size, and no tokenizer gives one")
        keys["vocab_size"] = vocab_size
    for key in COUNTS & keys.keys():
        if isinstance(keys[key], int) and keys[key] < 1:
            raise ModelError(f"a {model_type} model with {key} = {keys[key]!r}: a whole number above 0 expected")
    try:
        return _checked(config_class(**keys))
    # transformers raises classes of its own for wrong types and values; all carry a readable message
    except Exception as error:
        raise ModelError(f"not a valid {model_type} model: {error}") from error


def _checked(config: PretrainedConfig) -> PretrainedConfig:
    """What transformers would find in the first forward, if at all."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % shared:
        raise ValueError(f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {shared}")
    return config


def _check_supported(model_type: str | None) -> None:
    if model_type is None:
        raise ModelError(f"the student's configuration names no 'model_type'; these are supported: {', '.join(SUPPORTED)}")
    if model_type not in SUPPORTED:
        raise ModelError(f"student models of type {model_type!r} are not supported; these are: {', '.join(SUPPORTED)}")


def check_row_length(config: PretrainedConfig, row_length: int) -> None:
    """Refuse rows that are longer than the model reads. row_length: tokens. Raises ModelError."""
    if row_length > config.max_position_embeddings:
        raise ModelError(
            f"rows have {row_length:,} tokens (data.row_length), the student reads {config.max_position_embeddings:,} "
            "(max_position_embeddings). Use shorter rows, or a model made for longer ones."
        )
