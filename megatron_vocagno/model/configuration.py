"""The configuration of a student, from a Hugging Face folder or from keys, and its checks."""

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
# older spellings of rope_parameters, which transformers accepts although no configuration class lists them
LEGACY_KEYS = {"rope_theta", "rope_scaling"}
COUNTS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings"),
}


def student_config(
    spec: Mapping[str, Any] | str | os.PathLike[str], vocab_size: int | None = None, rows: int | None = None
) -> PretrainedConfig:
    """The configuration of a student, from a pretrained folder or from keys.

    spec         a Hugging Face folder, or keys such as {"model_type": "llama", "hidden_size": 2048, ...}
    vocab_size   size of the tokenizer's vocabulary, used if the keys have no vocab_size
    rows         smallest number of embedding rows that the ids of the data need; by default `vocab_size`. The model may have more

    Raises ModelError: an unsupported architecture, a key that the architecture does not have, dropout, too few embedding rows,
    weights that do not match their configuration (weights.py), or a configuration for which this project's student differs from
    the model of transformers (proof.py).
    """
    config = _config_from_keys(spec, vocab_size) if isinstance(spec, Mapping) else _config_from_folder(spec)
    rows = vocab_size if rows is None else rows
    if rows is not None and config.vocab_size < rows:
        raise ModelError(
            f"the tokenizer has {rows:,} tokens, the student model has {config.vocab_size:,}: some ids would have no embedding. "
            "Is this the tokenizer that the model was trained with?"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise ModelError(
            f"attention_dropout is {config.attention_dropout}; set it to 0. With dropout, a resumed run would differ from an "
            "uninterrupted one, and losses would depend on the parallel layout."
        )
    # the default; a caller that knows dtype and device may replace it
    config._attn_implementation = resolve_attention(config, "auto", torch.float32, "cpu")
    prove_student(config)
    return config


def _config_from_folder(path: str | os.PathLike[str]) -> PretrainedConfig:
    weights = PretrainedWeights(path)
    config = read_config(weights.folder)
    _check_supported(config.model_type)
    return check_weights(weights, config)


def _config_from_keys(spec: Mapping[str, Any], vocab_size: int | None) -> PretrainedConfig:
    """spec: the keys of `student.config`, which the messages name."""
    keys = dict(spec)
    model_type = keys.pop("model_type", None)
    if model_type is None:
        near = difflib.get_close_matches("model_type", keys, n=1)
        meant = f" (is '{near[0]}' a misspelling of it?)" if near else ""
        raise ModelError(f"student.config has no 'model_type'{meant}; supported types: {', '.join(SUPPORTED)}")
    _check_supported(model_type)
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map) | LEGACY_KEYS
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"; did you mean '{near[0]}'?" if near else ""
            raise ModelError(f"student.config: no field '{key}' in a {model_type} model{meant}")
    if "vocab_size" not in keys:
        if vocab_size is None:
            raise ModelError("the student model has no vocab_size, and there is no tokenizer to take it from")
        keys["vocab_size"] = vocab_size
    for key in COUNTS & keys.keys():
        if isinstance(keys[key], int) and keys[key] < 1:
            raise ModelError(f"student.config: a {model_type} model with {key} = {keys[key]!r}: expected a whole number above 0")
    try:
        return _checked(config_class(**keys))
    # transformers raises various error classes for wrong types and values; all have a readable message
    except Exception as error:
        raise ModelError(f"student.config: not a valid {model_type} model: {error}") from error


def _checked(config: PretrainedConfig) -> PretrainedConfig:
    """Check values that transformers would only reject in the first forward pass, if at all."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % shared:
        raise ValueError(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {shared}")
    return config


def _check_supported(model_type: str) -> None:
    if model_type not in SUPPORTED:
        raise ModelError(f"student models of type {model_type!r} are not supported; supported types: {', '.join(SUPPORTED)}")


def check_row_length(config: PretrainedConfig, row_length: int) -> None:
    """Check that the student can read rows of `row_length` tokens. Raises ModelError."""
    if row_length > config.max_position_embeddings:
        raise ModelError(
            f"rows have {row_length:,} tokens (data.row_length), but the student reads at most "
            f"{config.max_position_embeddings:,} (max_position_embeddings). Use shorter rows or a model with a longer context."
        )
