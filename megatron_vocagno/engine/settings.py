"""The DeepSpeed configuration: one JSON file that owns batch sizes, precision, optimizer, clipping and ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.config import RunError

Settings = dict[str, Any]


def read_settings(path: Path, pipeline_stages: int, device: str) -> Settings:
    """Read the file and refuse what cannot work, with the reason.

    Raises RunError: no such file, no JSON, no optimizer, a ZeRO stage that the number of pipeline stages forbids.
    """
    try:
        settings: Settings = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"no DeepSpeed configuration at {path}") from None
    except orjson.JSONDecodeError as error:
        raise RunError(f"{path} is not JSON: {error}") from None
    if "optimizer" not in settings:
        raise RunError(f"{path}: no 'optimizer'; the DeepSpeed configuration owns it, with its learning rate")
    if "scheduler" in settings:
        raise RunError(f"{path}: 'scheduler' belongs into the run file, as [training.schedule]")
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if pipeline_stages:
        _check_pipeline(path, settings, stage, pipeline_stages)
    optimizer = settings["optimizer"]
    if device == "cpu" and optimizer["type"].lower() in ("adam", "adamw"):
        # the fused Adam is compiled on first use; torch's gives the same update and needs no compiler
        optimizer.setdefault("params", {}).setdefault("torch_adam", True)
    settings.setdefault("steps_per_print", 2**31)
    return settings


def _check_pipeline(path: Path, settings: Settings, stage: int, pipeline_stages: int) -> None:
    if stage != 1:
        reason = (
            "leaves the other stages out of the gradient norm, so that clipping is wrong"
            if stage == 0
            else "cannot run in a pipeline"
        )
        raise RunError(
            f"{path}: zero_optimization.stage is {stage}, parallel.pipeline_stages is {pipeline_stages}: ZeRO-{stage} {reason}.\n"
            "  Use stage 1, or pipeline_stages = 0, the engine without a pipeline."
        )
    accumulate = settings.get("data_types", {}).get("grad_accum_dtype")
    if settings.get("bf16", {}).get("enabled") and accumulate != "fp32":
        raise RunError(
            f"{path}: bf16 in a pipeline needs data_types.grad_accum_dtype = 'fp32', not {accumulate!r}: "
            "summed in bf16, the gradients of many micro-batches lose their small parts"
        )


def batch_layout(settings: Settings, world: int, pipeline_stages: int) -> Layout:
    """How a global batch is dealt to so many processes.

    `train_batch_size` is the global batch on any number of GPUs; `gradient_accumulation_steps` lets it grow with them.
    Raises RunError: neither or both in conflict, processes that form no whole pipeline, a batch that does not divide.
    """
    stages = max(1, pipeline_stages)
    if world % stages:
        raise RunError(
            f"{world} processes cannot form pipelines of {pipeline_stages} stages (parallel.pipeline_stages): "
            "start a multiple of it, as with deepspeed --num_gpus"
        )
    data_parallel = world // stages
    rows = settings.get("train_micro_batch_size_per_gpu")
    total, accumulate = settings.get("train_batch_size"), settings.get("gradient_accumulation_steps")
    if (
        not isinstance(rows, int)
        or not isinstance(total, int | None)
        or not isinstance(accumulate, int | None)
        or total is accumulate
    ):
        raise RunError(
            "the DeepSpeed configuration must give train_micro_batch_size_per_gpu, and train_batch_size or "
            f"gradient_accumulation_steps, as numbers; it has {rows!r}, {total!r} and {accumulate!r}"
        )
    if accumulate is None:
        accumulate = max(1, (total or 0) // (rows * data_parallel))
    layout = Layout(rows, accumulate, data_parallel)
    if total not in (None, layout.rows):
        raise RunError(
            f"train_batch_size is {total}, but {rows} rows a micro-batch (train_micro_batch_size_per_gpu) * {accumulate} "
            f"micro-batches * {data_parallel} data-parallel ranks ({world} processes / {stages} stages) is {layout.rows}"
        )
    return layout
