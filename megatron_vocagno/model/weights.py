"""Checks that a folder's weights are exactly those of its configuration. Reads only names, shapes and types of tensors.

transformers loads the folder onto the meta device, and reports missing and unused tensors. transformers therefore handles names
of its older versions, experts that it merges, tied heads, and tensors that a model ignores by declaration (RoPE's frequencies in
old folders, layers that predict further tokens). This check is needed because transformers gives missing tensors random values.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.folder import PretrainedWeights, quiet

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Allowed types of weights, as safetensors and as torch name them."""
DEQUANTISED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config", "compressed-tensors": "CompressedTensorsConfig"}
"""Quantization methods that transformers can convert to unquantized weights, and its class for the conversion."""
PACKED = re.compile(r"\.(qweight|qzeros|scales|g_idx|absmax|quant_state\..*|weight_scale\w*|weight_packed|SCB)$")
"""Names of tensors that only folders with quantized matrices have."""
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
ROWS_AT_ONCE = 4096


def model_class(config: PretrainedConfig) -> Any:
    """The class of the causal language model of a configuration. Raises ModelError: transformers has none."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None:
        raise ModelError(f"transformers has no causal language model of type {config.model_type}: is it another kind of model?")
    return found[0] if isinstance(found, (list, tuple)) else found


def check_weights(weights: PretrainedWeights, config: PretrainedConfig) -> PretrainedConfig:
    """The configuration that matches the weights. It unties the head if the folder has a head that differs from the embedding.

    config  the folder's configuration. transformers also loads a head that differs, even if the configuration ties it

    Raises ModelError: quantized weights, or tensors that are missing, not used, or of another shape.
    """
    _check_not_quantized(weights, config)
    _check_floating_point(weights, config)
    model, found = _load_on_meta(weights, config, list(weights))
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    shapes = sorted((name, tuple(actual), tuple(expected)) for name, actual, expected in found["mismatched_keys"])
    if missing or unused or shapes:
        faults = [
            *([f"{len(missing)} tensors are missing ({_first_names(missing)})"] if missing else []),
            *([f"{len(unused)} are not used ({_first_names(unused)})"] if unused else []),
            *(f"the shape of {name} is {actual}, the configuration requires {expected}" for name, actual, expected in shapes[:1]),
        ]
        raise ModelError(
            f"the weights in {weights.folder} do not match its config.json of a {config.model_type} model: "
            f"{', '.join(faults)}. {_cause(missing, unused, config)}"
        )
    if any(_tied_tensors_differ(weights, *pair) for pair in (model.all_tied_weights_keys or {}).items()):
        config = _untied(config)
    return config


def _untied(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def _check_not_quantized(weights: PretrainedWeights, config: PretrainedConfig) -> None:
    stored = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if stored:
        keys = stored if isinstance(stored, dict) else stored.to_dict()
        method = str(keys.get("quant_method") or "bitsandbytes").split(".")[-1].lower()
        instead = "Use the unquantized weights that it was made from; teacher.quantization = 'int8' holds those in 8 bits."
        if method in DEQUANTISED:
            instead = (
                "Use the unquantized weights, or write them: AutoModelForCausalLM.from_pretrained(folder, "
                f"quantization_config={DEQUANTISED[method]}(dequantize=True)).save_pretrained(new_folder)."
            )
        raise ModelError(f"the weights in {weights.folder} are quantized ({method}), which is not supported. {instead}")
    if packed := [name for name in weights if PACKED.search(name)]:
        raise ModelError(
            f"the weights in {weights.folder} are quantized, but config.json has no quantization_config: {packed[0]} has "
            f"type {weights.dtype(packed[0])}. Use the unquantized weights that they were made from."
        )


def _check_floating_point(weights: PretrainedWeights, config: PretrainedConfig) -> None:
    """Raises ModelError: a weight of a type other than FLOATS. A cast would silently change its values.

    Tensors that the model does not use, such as the masks of old folders, and integer buffers of the model may have any type.
    The folder is therefore loaded with and without the tensors of other types, and only those that are missing in the second
    load count. For this the configuration is untied, because a tied head could replace a missing embedding.
    """
    others = [name for name in weights if weights.dtype(name) not in FLOATS]
    if not others:
        return
    config = _untied(config)
    model, found = _load_on_meta(weights, config, list(weights))
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    floats = [name for name in weights if name not in set(others)]
    lost = _missing(weights, config, floats) - set(found["missing_keys"])
    if wrong := sorted(name for name in lost if name not in kinds or kinds[name].is_floating_point):
        tails = {_tail(name): name for name in others}
        name = next((tails[_tail(missing)] for missing in wrong if _tail(missing) in tails), others[0])
        raise ModelError(
            f"the weights in {weights.folder} cannot be used: the type of {name} is {weights.dtype(name)}, but a "
            f"{config.model_type} model needs floating-point numbers ({', '.join(FLOATS)}). Are the weights quantized, or cast "
            "by the program that saved them? Use the weights that they were made from."
        )


def _missing(weights: PretrainedWeights, config: PretrainedConfig, names: Sequence[str]) -> set[str]:
    """The tensors that are missing if transformers loads only `names`; all tensors if a part of an expert is not in `names`."""
    try:
        return set(_load_on_meta(weights, config, names)[1]["missing_keys"])
    except ModelError:
        return set(weights)


def _load_on_meta(weights: PretrainedWeights, config: PretrainedConfig, names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The model on the meta device, and transformers' report about loading these tensors."""
    state = {name: _meta_tensor(name, weights) for name in names}
    kind = model_class(config)
    # AutoModelForCausalLM does the same if a model has more than text
    if getattr(kind, "config_class", None) == config.sub_configs.get("text_config", False):
        config = config.get_text_config()
    try:
        with quiet(errors_only=True):
            model, found = kind.from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=state,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    # transformers raises this error if it cannot merge experts
    except RuntimeError as error:
        raise ModelError(
            f"the weights in {weights.folder} cannot be merged into a {config.model_type} model: {error}\n"
            "  Is a part of an expert missing?"
        ) from error
    return model, found


def _meta_tensor(name: str, weights: PretrainedWeights) -> Tensor:
    return torch.empty(weights.shape(name), dtype=FLOATS.get(weights.dtype(name), torch.float32), device="meta")


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _cause(missing: Sequence[str], unused: Sequence[str], config: PretrainedConfig) -> str:
    """The likely cause of the mismatch, as the end of a message."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if missing and unused:
        return "Were the weights saved under other names, for example by a wrapper, or are they of another model?"
    if unused and min(map(_layer, unused)) >= layers:
        return f"num_hidden_layers is {layers:,}, but the weights have more layers."
    if missing and min(map(_layer, missing)) >= 0:
        return f"num_hidden_layers is {layers:,}: do the weights have fewer layers, or is the download incomplete?"
    if unused and all(name.endswith("bias") for name in unused):
        return "Does the configuration lack a bias?"
    if missing and all("head" in name or "embed_out" in name for name in missing):
        return "Does the model tie head and embedding (tie_word_embeddings)?"
    return "Is this the configuration that the weights were trained with?"


def _layer(name: str) -> int:
    """Number of the decoder layer that a tensor belongs to; -1 if it does not belong to one."""
    found = LAYER.search(name)
    return int(found[1]) if found else -1


def _tied_tensors_differ(weights: PretrainedWeights, target: str, source: str) -> bool:
    """Whether the folder holds both of two tensors that the configuration ties, and their values differ."""
    first, second = _stored_name(weights, target), _stored_name(weights, source)
    if first is None or second is None or first == second:
        return False
    if weights.shape(first) != weights.shape(second):
        return True
    rows = range(0, weights.shape(first)[0], ROWS_AT_ONCE)
    return not all(
        torch.equal(weights.rows(first, row, row + ROWS_AT_ONCE), weights.rows(second, row, row + ROWS_AT_ONCE)) for row in rows
    )


def _stored_name(weights: PretrainedWeights, name: str) -> str | None:
    """The name of a model's tensor in the folder. Only the last two parts of the name must match; None if no single one does."""
    if name in weights:
        return name
    found = [stored for stored in weights if _tail(stored) == _tail(name)]
    return found[0] if len(found) == 1 else None


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])
