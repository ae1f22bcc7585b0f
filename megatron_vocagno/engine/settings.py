"""The DeepSpeed configuration: one JSON file with the batch sizes, precision, optimizer, clipping and ZeRO stage of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeGuard

from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.engine.settings_file import BATCHES, read_file
from megatron_vocagno.errors import RunError

DeepSpeedConfig = dict[str, Any]


def read_settings(path: Path, pipeline_stages: int, device: str) -> DeepSpeedConfig:
    """Read the file and check it.

    Raises RunError: see read_file. Also raises RunError if there is no optimizer with a learning rate, or if the precision or the
    ZeRO stage is not supported, in general or in a pipeline.
    """
    settings = read_file(path)
    if "scheduler" in settings:
        raise RunError(f"{path}: 'scheduler' is not read here: set [training.schedule] in the run file")
    if "tensor_parallel" in settings:
        raise RunError(
            f"{path}: 'tensor_parallel' is not supported: the ranks that share a matrix would read different rows.\n"
            "  Use pipeline stages, or ZeRO-2/3, or train in Megatron-LM (docs/megatron.md)."
        )
    clipping = settings.get("gradient_clipping", 0)
    if not _is_number(clipping) or clipping < 0:
        raise RunError(f"{path}: gradient_clipping is {clipping!r}: expected the largest gradient norm, or 0 for no limit")
    for name in BATCHES:
        _number(settings, name)
    optimizer = _optimizer(path, settings)
    _check_precision(path, settings)
    _check_zero(path, settings, pipeline_stages)
    if device == "cpu" and optimizer["type"].lower() in ("adam", "adamw"):
        # DeepSpeed's fused Adam is compiled on first use. torch's Adam gives the same update without a compiler
        optimizer.setdefault("params", {}).setdefault("torch_adam", True)
    settings.setdefault("steps_per_print", 2**31)
    return settings


def _optimizer(path: Path, settings: DeepSpeedConfig) -> dict[str, Any]:
    optimizer = settings.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
        raise RunError(
            f"{path}: 'optimizer' with a 'type' is missing: the DeepSpeed configuration sets it, with its learning rate"
        )
    params = optimizer.get("params") or {}
    rate = params.get("lr") if isinstance(params, dict) else None
    if not _is_number(rate) or rate <= 0:
        given = "missing" if rate is None else repr(rate)
        raise RunError(
            f"{path}: optimizer.params.lr is {given}: expected the highest learning rate, a number above 0.\n"
            "  [training.schedule] in the run file sets its warm-up and decay."
        )
    return optimizer


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def zero_stage(settings: DeepSpeedConfig) -> int:
    return int((settings.get("zero_optimization") or {}).get("stage", 0))


def precision(settings: DeepSpeedConfig) -> Literal["bf16", "fp16", "fp32"]:
    """The precision in which the student computes."""

    def enabled(key: str) -> bool:
        return bool((settings.get(key) or {}).get("enabled"))

    if enabled("bf16") or enabled("bfloat16"):  # the second is DeepSpeed's older name
        return "bf16"
    return "fp16" if enabled("fp16") else "fp32"


def _check_zero(path: Path, settings: DeepSpeedConfig, pipeline_stages: int) -> None:
    stage = (settings.get("zero_optimization") or {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise RunError(
            f"{path}: zero_optimization.stage is {stage!r}; use 1, 2 or 3.\n"
            "  Stage 0 makes steps with gradients that are not finite. In a pipeline, it only clips by the first stage's norm."
        )
    if pipeline_stages and stage != 1:
        raise RunError(
            f"{path}: zero_optimization.stage is {stage}, parallel.pipeline_stages is {pipeline_stages}: "
            f"ZeRO-{stage} cannot run in a pipeline.\n"
            "  Use stage 1, or pipeline_stages = 0, which is the engine without a pipeline."
        )


def _check_precision(path: Path, settings: DeepSpeedConfig) -> None:
    if precision(settings) == "bf16" and (settings.get("fp16") or {}).get("enabled"):
        raise RunError(f"{path}: bf16 and fp16 are both enabled: disable one of them")
    accumulate = (settings.get("data_types") or {}).get("grad_accum_dtype")
    if accumulate not in (None, "bf16", "fp16", "fp32"):
        raise RunError(f"{path}: data_types.grad_accum_dtype is {accumulate!r}; use 'fp32', or leave it out")


def _check_sums(settings: DeepSpeedConfig, micro_batches: int) -> None:
    """Raises RunError if gradients of several micro-batches would be summed in bf16. Applies to both engines.

    Sums in fp16 are allowed. fp16 has three more bits, so its error stays below the rounding error of bf16.
    """
    accumulate = (settings.get("data_types") or {}).get("grad_accum_dtype")
    if precision(settings) == "bf16" and micro_batches > 1 and accumulate != "fp32":
        raise RunError(
            f"bf16 with {micro_batches} micro-batches per step needs data_types.grad_accum_dtype = 'fp32' in the DeepSpeed "
            f"configuration, not {accumulate!r}: a sum of many gradients in bf16 loses the small ones"
        )


def batch_layout(settings: DeepSpeedConfig, world: int, pipeline_stages: int, option: str = "deepspeed --num_gpus") -> Layout:
    """How a global batch is distributed over `world` processes.

    With `train_batch_size`, the global batch is the same for every number of GPUs. With `gradient_accumulation_steps`, it grows
    with their number. For example, 512 rows with 4 rows per micro-batch on 16 data-parallel ranks are 8 micro-batches per rank.

    option: sets `world`, for messages

    Raises RunError if neither is given, if both contradict each other, if the number of processes is not a multiple of the
    stages, or if the batch cannot be divided.
    """
    stages = max(1, pipeline_stages)
    if world % stages:
        raise RunError(
            f"{_count(world, 'process', 'processes')} cannot form pipelines of {pipeline_stages} stages "
            f"(parallel.pipeline_stages): use a multiple of that number, for example {option} {-(-world // stages) * stages}"
        )
    data_parallel = world // stages
    rows = _number(settings, "train_micro_batch_size_per_gpu")
    total, accumulate = _number(settings, "train_batch_size"), _number(settings, "gradient_accumulation_steps")
    if rows is None or (total is None and accumulate is None):
        raise RunError(
            "the DeepSpeed configuration must give train_micro_batch_size_per_gpu, "
            "and train_batch_size or gradient_accumulation_steps"
        )
    given = accumulate
    if accumulate is None:
        accumulate = max(1, (total or 0) // (rows * data_parallel))
    layout = Layout(rows, accumulate, data_parallel)
    if total not in (None, layout.rows):
        raise RunError(
            f"train_batch_size is {total}, but {_count(rows, 'row')} per micro-batch (train_micro_batch_size_per_gpu) * "
            f"{_count(accumulate, 'micro-batch', 'micro-batches')} "
            f"(gradient_accumulation_steps{'' if given else ', not given'}) * {_count(data_parallel, 'data-parallel rank')} "
            f"({_count(world, 'process', 'processes')} / {_count(stages, 'stage')}) is {layout.rows}.\n"
            f"  {_remedy(total or 0, rows, given, data_parallel, stages)}"
        )
    _check_sums(settings, layout.micro_batches)
    return layout


def _remedy(total: int, rows: int, accumulate: int | None, data_parallel: int, stages: int) -> str:
    """The nearest numbers of processes that divide `total` rows, or the number that must divide `total`."""
    unit = rows * (accumulate or 1)
    if total % unit:
        names = "train_micro_batch_size_per_gpu" + " * gradient_accumulation_steps" * (accumulate is not None)
        return f"It must be a multiple of {unit}, {names}."
    # if the file gives the number of micro-batches, only one number of processes fits
    units = total // unit
    fitting = [n for n in range(1, units + 1) if units % n == 0] if accumulate is None else [units]
    below, above = [n for n in fitting if n < data_parallel][-1:], [n for n in fitting if n > data_parallel][:1]
    near = [n * stages for n in (*below, *above)]
    return f"It can be divided among {' or '.join(map(str, near))} process{'es' * (near != [1])}."


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _number(settings: DeepSpeedConfig, key: str) -> int | None:
    value = settings.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise RunError(f"the DeepSpeed configuration has {key} = {value!r}: expected a whole number above 0")
    return value
