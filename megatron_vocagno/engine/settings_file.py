"""Read the file of the DeepSpeed configuration, and reject values that DeepSpeed would misread or ignore.

Names that would make another run than the one in the run file are rejected too, each with its field there or the reason.
DeepSpeed replaces "auto" by its own default (float32, for `bf16.enabled`), ignores names that it does not know, and reports wrong
values in the terms of its libraries. The errors of this module name the field, its value and a correct value in one sentence.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_vocagno.errors import RunError, missing_path_hint

SECTIONS = ("zero_optimization", "bf16", "bfloat16", "fp16", "data_types", "pipeline", "activation_checkpointing")
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
NAMES = (
    *SECTIONS,
    *BATCHES,
    *("gradient_clipping", "optimizer", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("communication_data_type", "seq_parallel_communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("disable_allgather", "steps_per_print", "dump_state", "wall_clock_breakdown", "memory_breakdown", "flops_profiler"),
    *("tensorboard", "wandb", "comet", "csv_monitor", "aio", "timers", "log_level", "disable_python_gc"),
    *("dataloader_drop_last", "vocabulary_size"),
)
"""The names of the top level that are accepted: they do not change the training, or are the purpose of the file."""
_OTHER_DATA = "the rows of a step follow from [data] of the run file"
_NO_EXPERTS = "the student has no experts"
_OWN_CHECKPOINTS = "[checkpoint] in the run file sets when checkpoints are written, with their own format"
_OWN_PIPELINE = "DeepSpeed would ignore it"
_MASTERS = "the master weights and the optimizer states of a checkpoint are float32"
_LOSSY = "it rounds what the ranks exchange to 8 bits or less, which was never compared with exact training here"
REFUSED = {
    "scheduler": "set [training.schedule] in the run file",
    "sequence_parallel_size": "set parallel.sequence in the run file",
    "data_parallel_size": "it follows from the number of processes, parallel.pipeline_stages and parallel.sequence",
    "tensor_parallel": "the ranks that share a matrix would read different rows.\n"
    "  Use pipeline stages or ZeRO-2/3. For tensor parallelism, train in Megatron-LM: docs/megatron.md",
    "expert_parallel": _NO_EXPERTS,
    "use_data_before_expert_parallelism": _NO_EXPERTS,
    "data_efficiency": f"{_OTHER_DATA}, and its random layerwise dropping of tokens would leave tokens out of layers",
    "managed_gradient_accumulation": "the loss is divided for a step of train_batch_size rows",
    "gradient_allreduce_op": "the loss is divided for the mean over the ranks. A sum would multiply gradients by their number",
    "torch_autocast": "set the precision with bf16 or fp16, which the checks of this file and the checkpoints know",
    "hybrid_engine": "it generates text between steps, which no run does",
    "weight_quantization": "it is for inference",
    "compile": "the student is not compiled",
    "autotuning": "it is for `deepspeed --autotuning`, which starts other runs. Plan memory with megatron_vocagno.plan",
    "checkpoint": _OWN_CHECKPOINTS,
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "comms_logger": "it does not know all collectives of a run, and would end the process with exit code 0",
    "pipeline.stages": f"{_OWN_PIPELINE}. Set parallel.pipeline_stages in the run file",
    "pipeline.partition": f"{_OWN_PIPELINE}. Set parallel.partition in the run file",
    "pipeline.seed_layers": f"{_OWN_PIPELINE}. Set training.seed in the run file",
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_optimizer_states": _MASTERS,
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "data_types.buffer_dtype": "the frequencies of the student's RoPE would be rounded",
    "zero_optimization.legacy_stage1": "DeepSpeed no longer has it",
    "zero_optimization.zenflow": "it updates most weights only every few steps, and its states are not in a checkpoint",
    "zero_optimization.zero_quantized_weights": _LOSSY,
    "zero_optimization.zero_quantized_nontrainable_weights": _LOSSY,
    "zero_optimization.zero_quantized_gradients": _LOSSY,
    "zero_optimization.offload_optimizer.super_offload": "another process updates the weights, and a checkpoint does not read it",
}
"""Names that would make another run, end it, or have no effect, with the reason. `false` and `"enabled": false` are accepted."""
REMOVED = (
    *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula"),
    *("progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
)
"""Names that earlier releases of DeepSpeed had. DeepSpeed rejects them with a traceback."""
FIELDS = {
    "zero_optimization": (
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
        *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights"),
        *("elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload"),
        *("cpu_offload_param", "cpu_offload_use_pin_memory", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
        *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
        *("stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold", "leaf_module"),
        *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "stage3_gather_fp16_weights_on_model_save"),
        *("ignore_unused_parameters", "legacy_stage1", "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size"),
        *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear"),
        *("pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
        *("save_muon_momentum_buffer_in_memory",),
    ),
    "bf16": ("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"),
    "fp16": (
        *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"),
        *("consecutive_hysteresis", "fp16_master_weights_and_grads"),
    ),
    "pipeline": (
        *("stages", "partition", "seed_layers", "activation_checkpoint_interval", "pipe_partitioned", "grad_partitioned"),
        "use_reentrant",
    ),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "optimizer.params": (
        *("lr", "betas", "eps", "weight_decay", "momentum", "torch_adam", "adam_w_mode", "fused", "amsgrad", "bias_correction"),
        *("beta", "nesterov", "dampening", "foreach", "maximize", "capturable", "differentiable", "momentum_decay", "max_coeff"),
        *("min_coeff", "freeze_step", "cuda_aware", "comm_backend_name", "max_grad_norm", "ns_method", "adam_lr", "muon_lr"),
    ),
}
"""The names of each section."""
OPEN = ("optimizer.params",)
"""Sections that may contain other names: each optimizer has its own parameters, and rejects unknown ones."""
ADVICE = {
    "train_batch_size": "the rows of a step over all GPUs",
    "train_micro_batch_size_per_gpu": "the rows of a micro-batch on one GPU",
    "gradient_accumulation_steps": "leave it out: it follows from the other two",
    "gradient_clipping": "the largest gradient norm, for example 1.0, or 0 for no limit",
    "optimizer.type": "the optimizer, for example AdamW",
    "optimizer.params.lr": "the highest learning rate, for example 3e-4",
    "optimizer.params.betas": "two numbers, for example [0.9, 0.95]",
    "optimizer.params.eps": "a number, for example 1e-8",
    "optimizer.params.weight_decay": "a number, for example 0.1",
    "bf16": '{"enabled": true}, or leave it out for float32',
    "fp16": '{"enabled": true}, or leave it out for float32',
    "zero_optimization.stage": "1, 2 or 3",
}
"""Values to use instead of "auto"."""
SWITCHES = ("bf16.enabled", "bfloat16.enabled", "fp16.enabled")
OFF = "_off"
"""A key for the names of SWITCHES that were "auto". DeepSpeed reads them as false. A run does so too, and prints a note."""
AUTO_ALLOWED = {"keep_in_fp32_modules", "stages"}
"""Names for which DeepSpeed itself defines the value "auto"."""


def read_file(path: Path) -> dict[str, Any]:
    """The configuration.

    Raises RunError if the file is missing, is not JSON, or contains an "auto" value or a name that DeepSpeed would ignore.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RunError(f"no DeepSpeed configuration at {path}: {error.strerror}{missing_path_hint(path)}") from None
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not JSON: {error}") from None
    try:
        settings = json.loads(text, object_pairs_hook=_unique_names, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON: {error}{_syntax_hint(text)}") from None
    if not isinstance(settings, dict):
        raise RunError(f"{path}: expected a JSON object")
    _check_values(path, settings)
    _check_names(path, settings)
    return settings


def notes(settings: Mapping[str, Any]) -> Iterator[str]:
    """Notes about values that the user may not have intended."""
    for place in settings.get(OFF, ()):
        yield f"note: {place} of the DeepSpeed file is 'auto', which DeepSpeed reads as false. Write true or false."


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"it has two values for '{name}', {fields[name]!r} and {value!r}")
        fields[name] = value
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _syntax_hint(text: str) -> str:
    """A hint about a common syntax error, or nothing: comments, a trailing comma, YAML, single quotes."""
    if re.search(r"^\s*(#|//|/\*)|,\s*(#|//|/\*)", text, re.MULTILINE):
        return ".\n  JSON has no comments."
    if re.search(r",\s*[}\]]", text):
        return ".\n  JSON has no comma before a closing bracket."
    if re.search(r"^\w+:(\s|$)", text, re.MULTILINE):
        return ".\n  It looks like YAML. If it is a file of accelerate, use the JSON file that its 'deepspeed_config_file' names."
    if "'" in text and '"' not in text:
        return ".\n  JSON has double quotes."
    return ""


# ---- values


def _check_values(path: Path, settings: dict[str, Any]) -> None:
    """Raises RunError for "auto" values, numbers or booleans in quotes, and numbers that are not finite."""
    autos = []
    for place, value in list(_leaves(settings)):
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"{path}: {place} is too large for a float: use a smaller number")
        name = place.rpartition(".")[2]
        if name == "enabled" and value not in ("auto", True, False):
            raise RunError(f"{path}: {place} is {value!r}: expected true or false")
        if not isinstance(value, str) or name in AUTO_ALLOWED:
            continue
        if place in SWITCHES and value == "auto":
            section = settings[place.partition(".")[0]]
            section["enabled"] = False
            settings.setdefault(OFF, []).append(place)
        elif value.strip().lower() == "auto":
            autos.append(place)
        elif (unquoted := _unquoted(value)) is not None:
            raise RunError(f"{path}: {place} is {value!r}, a string: write {unquoted} without quotes")
    if autos:
        lines = [f"\n  {place}: {ADVICE.get(place, 'leave it out for the default of DeepSpeed')}" for place in autos]
        raise RunError(
            f"{path}: {', '.join(autos)} {'is' if len(autos) == 1 else 'are'} 'auto', which only Hugging Face's Trainer replaces "
            f"by a value. Write{''.join(lines)}"
        )


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, place)
    else:
        yield place, value


def _unquoted(text: str) -> str | None:
    """The number or boolean in a string. None if it contains something else."""
    word = text.strip()
    if word.lower() in ("true", "false"):
        return word.lower()
    try:
        float(word)
    except ValueError:
        return None
    return word


# ---- names


def _check_names(path: Path, settings: dict[str, Any]) -> None:
    """Raises RunError for unknown names, which DeepSpeed ignores silently, and for sections that are not objects."""
    for name in settings:
        if name in REMOVED:
            raise RunError(f"{path}: this release of DeepSpeed no longer has '{name}': remove it")
        if name in REFUSED or name in NAMES or name.startswith("_"):
            continue
        raise RunError(f"{path}: DeepSpeed does not know '{name}', and would ignore it{_nearest(name)}")
    for name in SECTIONS:
        if not isinstance(settings.get(name) or {}, dict):
            raise RunError(
                f'{path}: {name} is {settings[name]!r}: expected a section {{"...": ...}}, as in ds_configs/ of the repository'
            )
    for place, reason in REFUSED.items():
        if _is_on(_value_at(settings, place)):
            raise RunError(f"{path}: '{place}' is not supported: {reason}")
    if (settings.get("bf16") or {}).get("check_grad_overflow") is False:
        raise RunError(f"{path}: bf16.check_grad_overflow is false: steps with gradients that are not finite would be made")
    for section, names in FIELDS.items():
        given = _value_at(settings, section)
        for name in given if isinstance(given, dict) else ():
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            if name not in names and (near or section not in OPEN):
                hint = f". Did you mean '{section}.{near[0]}'?" if near else ": remove it"
                raise RunError(f"{path}: DeepSpeed does not know '{section}.{name}'{hint}")


def _value_at(settings: Mapping[str, Any], place: str) -> Any:
    """The value of a dotted name. None if it is missing."""
    value: Any = settings
    for part in place.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_on(value: Any) -> bool:
    """Whether a value has an effect: it is not missing, false, 0, "auto", or a section that is not enabled."""
    return value.get("enabled", True) is not False if isinstance(value, dict) else value not in (None, False, "auto")


def _nearest(name: str) -> str:
    for section, names in FIELDS.items():
        if name in names:
            return f": it belongs in '{section}'"
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.6)
    return f". Did you mean '{near[0]}'?" if near else ": remove it"


# ---- DeepSpeed's own checks


def check_sections(path: Path, settings: dict[str, Any]) -> None:
    """Check sections with DeepSpeed's own models, which know every name and type. Raises RunError."""
    # imported here because importing DeepSpeed takes seconds, and a plan does not need it
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"bf16": DeepSpeedBF16Config, "bfloat16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for section, model in (models | {"zero_optimization": DeepSpeedZeroConfig}).items():
        try:
            model(**settings.get(section) or {})
        except AssertionError as error:
            raise RunError(f"{path}: {section}: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            reason = str(first["msg"]).removeprefix("Value error, ")
            if not first["loc"]:  # of several fields, with the complete section as its input
                raise RunError(f"{path}: {section}: {reason}") from None
            place = ".".join((section, *map(str, first["loc"])))
            if first["type"] == "extra_forbidden":
                raise RunError(f"{path}: DeepSpeed does not know '{place}': remove it") from None
            raise RunError(f"{path}: {place} is {first['input']!r}: {reason[:1].lower()}{reason[1:]}") from None
