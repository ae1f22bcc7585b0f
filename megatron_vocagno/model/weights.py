"""Whether a folder's weights are those of its configuration: all of it, and nothing besides. Reads names, shapes and types alone.

transformers itself reads the folder, onto no device, and says what it would miss and what it would leave. So names of its older
versions, experts that it puts together, tied heads and what a model declares to be of no use to it (RoPE's frequencies of old
folders, layers that predict further tokens) are its affair. For what it misses it would make up numbers.
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
"""Types that weights may be of, as safetensors and as torch call them."""
DEQUANTISED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config", "compressed-tensors": "CompressedTensorsConfig"}
"""Kinds of quantised folders that transformers can write in full, and its class for that."""
PACKED = re.compile(r"\.(qweight|qzeros|scales|g_idx|absmax|quant_state\..*|weight_scale\w*|weight_packed|SCB)$")
"""Names of tensors by which quantised matrices are known."""
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
ROWS_AT_ONCE = 4096


def model_class(config: PretrainedConfig) -> Any:
    """transformers' causal language model of a configuration. Raises ModelError: it has none."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None:
        raise ModelError(f"transformers has no causal language model of type {config.model_type}: is it one of another kind?")
    return found[0] if isinstance(found, (list, tuple)) else found


def check_weights(weights: PretrainedWeights, config: PretrainedConfig) -> PretrainedConfig:
    """The configuration that the weights really have: with a head of its own where theirs differs from the embedding.

    config  of the folder. transformers, too, takes a head that differs for what it is, whatever the configuration says

    Raises ModelError: quantised weights, or tensors that are missing, not used, or of another shape.
    """
    _refuse_quantised(weights, config)
    _refuse_no_floats(weights, config)
    model, found = _read_onto_nothing(weights, config, list(weights))
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    shapes = sorted((name, tuple(there), tuple(made)) for name, there, made in found["mismatched_keys"])
    if missing or unused or shapes:
        faults = [
            *([f"{len(missing)} tensors are missing ({_some(missing)})"] if missing else []),
            *([f"{len(unused)} are not used ({_some(unused)})"] if unused else []),
            *(f"{name} is {there}, the configuration says {made}" for name, there, made in shapes[:1]),
        ]
        raise ModelError(
            f"the weights in {weights.folder} are not those of its config.json, of a {config.model_type} model: "
            f"{', '.join(faults)}. {_cause(missing, unused, config)}"
        )
    if any(_differ(weights, *pair) for pair in (model.all_tied_weights_keys or {}).items()):
        config = _untied(config)
    return config


def _untied(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def _refuse_quantised(weights: PretrainedWeights, config: PretrainedConfig) -> None:
    asked = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if asked:
        keys = asked if isinstance(asked, dict) else asked.to_dict()
        method = str(keys.get("quant_method") or "bitsandbytes").split(".")[-1].lower()
        instead = "Use the unquantised weights that it was made from; teacher.quantization = 'int8' holds those in 8 bits."
        if method in DEQUANTISED:
            instead = (
                "Use the unquantised weights, or write them: AutoModelForCausalLM.from_pretrained(folder, "
                f"quantization_config={DEQUANTISED[method]}(dequantize=True)).save_pretrained(new_folder)."
            )
        raise ModelError(f"the weights in {weights.folder} are quantised ({method}), which is not supported. {instead}")
    if packed := [name for name in weights if PACKED.search(name)]:
        raise ModelError(
            f"the weights in {weights.folder} are quantised, though config.json has no quantization_config: it holds {packed[0]} "
            f"of type {weights.dtype(packed[0])}. Use the unquantised weights that they were made from."
        )


def _refuse_no_floats(weights: PretrainedWeights, config: PretrainedConfig) -> None:
    """A weight that is no number of at least 16 bits with a point: a cast would make it another number, and nothing would say so.

    What a model does not use, such as the masks of old folders, and what it counts with itself may be of any type. So the folder
    is read with and without all that is of another type, and what only the second one misses is told. Untied, as a head would
    stand in for an embedding.
    """
    others = [name for name in weights if weights.dtype(name) not in FLOATS]
    if not others:
        return
    config = _untied(config)
    model, found = _read_onto_nothing(weights, config, list(weights))
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    floats = [name for name in weights if name not in set(others)]
    lost = _missing(weights, config, floats) - set(found["missing_keys"])
    if wrong := sorted(name for name in lost if name not in kinds or kinds[name].is_floating_point):
        tails = {_tail(name): name for name in others}
        name = next((tails[_tail(made)] for made in wrong if _tail(made) in tails), others[0])
        raise ModelError(
            f"the weights in {weights.folder} cannot be used: {name} is of type {weights.dtype(name)}, where a "
            f"{config.model_type} model has floating-point numbers ({', '.join(FLOATS)}). Are they quantised, or saved by a "
            "program that casts? Use the weights that they were made from."
        )


def _missing(weights: PretrainedWeights, config: PretrainedConfig, names: Sequence[str]) -> set[str]:
    """What transformers misses where it reads only these; all of them where a part of an expert is not among them."""
    try:
        return set(_read_onto_nothing(weights, config, names)[1]["missing_keys"])
    except ModelError:
        return set(weights)


def _read_onto_nothing(weights: PretrainedWeights, config: PretrainedConfig, names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The model on the meta device, and what transformers says of reading these tensors."""
    state = {name: _shell(name, weights) for name in names}
    kind = model_class(config)
    # as AutoModelForCausalLM does where a model has more than text
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
    # by which transformers says that experts cannot be put together
    except RuntimeError as error:
        raise ModelError(
            f"the weights in {weights.folder} cannot be put together to a {config.model_type} model: {error}\n"
            "  Is a part of an expert missing?"
        ) from error
    return model, found


def _shell(name: str, weights: PretrainedWeights) -> Tensor:
    return torch.empty(weights.shape(name), dtype=FLOATS.get(weights.dtype(name), torch.float32), device="meta")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _cause(missing: Sequence[str], unused: Sequence[str], config: PretrainedConfig) -> str:
    """What is likely to be wrong."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if missing and unused:
        return "Were they saved under other names, as by a wrapper, or is it another model?"
    if unused and min(map(_layer, unused)) >= layers:
        return f"num_hidden_layers is {layers:,}, and the weights have more layers."
    if missing and min(map(_layer, missing)) >= 0:
        return f"num_hidden_layers is {layers:,}: do the weights have fewer, or was the download not complete?"
    if unused and all(name.endswith("bias") for name in unused):
        return "Does the configuration lack a bias?"
    if missing and all("head" in name or "embed_out" in name for name in missing):
        return "Does the model tie head and embedding (tie_word_embeddings)?"
    return "Is the configuration the one that they were trained with?"


def _layer(name: str) -> int:
    """Of the decoder layer that a tensor is of; -1 where it is of none."""
    found = LAYER.search(name)
    return int(found[1]) if found else -1


def _differ(weights: PretrainedWeights, target: str, source: str) -> bool:
    """Whether the folder holds two tensors that the configuration ties, and they are not the same."""
    first, second = _stored(weights, target), _stored(weights, source)
    if first is None or second is None or first == second:
        return False
    if weights.shape(first) != weights.shape(second):
        return True
    rows = range(0, weights.shape(first)[0], ROWS_AT_ONCE)
    return not all(
        torch.equal(weights.rows(first, row, row + ROWS_AT_ONCE), weights.rows(second, row, row + ROWS_AT_ONCE)) for row in rows
    )


def _stored(weights: PretrainedWeights, name: str) -> str | None:
    """The name that a tensor of the model has in the folder, whatever stands before its last two parts."""
    if name in weights:
        return name
    found = [stored for stored in weights if _tail(stored) == _tail(name)]
    return found[0] if len(found) == 1 else None


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])
