"""Build the training engine from model and objective: the pipeline engine, or the data-parallel engine with ZeRO-1/2/3.

The student is the same list of layers in both.
"""

from __future__ import annotations

import importlib
import math
from functools import partial

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import nn
from transformers import PretrainedConfig

from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.config import Run, Schedule
from megatron_vocagno.engine.distilling import Distiller, DistillingEngine
from megatron_vocagno.engine.engines import DataParallelEngine, PipelineEngine, TrainEngine
from megatron_vocagno.engine.loss import GuidedObjective
from megatron_vocagno.engine.pipeline import StudentPipeline, pipeline_layers
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.sequence import divide_ranks, use_ulysses
from megatron_vocagno.engine.settings import DeepSpeedConfig, precision
from megatron_vocagno.errors import RunError
from megatron_vocagno.model.folder import PretrainedWeights
from megatron_vocagno.model.student import DecoderLayer, Student, logit_softcap


def build_engine(
    run: Run,
    settings: DeepSpeedConfig,
    config: PretrainedConfig,
    weights: PretrainedWeights | None,
    layout: Layout,
    steps: int,
    processes: Processes,
    distiller: Distiller | None = None,
) -> TrainEngine:
    """The student in the engine that `run.parallel` selects. Collective over the world.

    weights    a pretrained student's weights; None initializes from the seed
    steps      number of the run's steps, for the learning-rate schedule
    distiller  source of the teacher's distributions, for objectives that compare them

    Raises RunError if DeepSpeed rejects the configuration.
    """
    stages, recompute = run.parallel.pipeline_stages, run.parallel.activation_checkpointing
    pipeline = {"use_reentrant": False, **settings.get("pipeline", {})}
    if stages:
        # DeepSpeed copies tied weights between stages here: autograd would record the copies and warn
        with torch.no_grad():
            staged = StudentPipeline(
                config,
                # layers do not recompute twice if the DeepSpeed configuration enables it too
                pipeline_layers(
                    config, run.training.seed, weights, recompute and not pipeline.get("activation_checkpoint_interval")
                ),
                num_stages=stages,
                partition_method=run.parallel.partition,
                checkpointable_layers=[DecoderLayer.__name__],
            )
        # the data-parallel groups are created with the module
        group = staged.mpu().get_data_parallel_group()
        objective = GuidedObjective(run.guidance, processes.device, group, logit_softcap(config))
        staged.loss_fn = objective.from_hidden_states
        module: nn.Module = staged
    else:
        parts, group = divide_ranks(layout.sequence)
        use_ulysses(parts, config, processes.device)
        module = Student(config, run.training.seed, recompute)
        if weights is not None:
            module.load(weights)
        objective = GuidedObjective(run.guidance, processes.device, group, logit_softcap(config), parts)
    batches = {
        # DeepSpeed counts a part of a row as a row
        "train_batch_size": layout.rows * layout.sequence,
        "train_micro_batch_size_per_gpu": layout.micro_batch_rows,
        "gradient_accumulation_steps": layout.micro_batches,
    }
    if settings["optimizer"].get("type", "").lower() != "muon":
        _import_muon_uncompiled()
    try:
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=_parameter_groups(module, settings["optimizer"].get("params", {}).get("weight_decay", 0.0)),
            lr_scheduler=partial(_scheduler, run.training.schedule, steps),
            config=settings | {"pipeline": pipeline} | batches,
            dist_init_required=False,
        )
    # the errors that DeepSpeed and the optimizers raise for a wrong name or value
    except (AssertionError, TypeError, ValueError, NotImplementedError, DeepSpeedConfigError) as error:
        raise RunError(f"DeepSpeed rejects this configuration: {type(error).__name__}: {error}") from error
    by_document = run.data.by_document
    built: TrainEngine
    if stages:
        built = PipelineEngine(engine, objective, layout, by_document)
    elif distiller is not None:
        built = DistillingEngine(engine, objective, layout, by_document, group, distiller)
    else:
        built = DataParallelEngine(engine, objective, layout, by_document, group)
    if run.training.outlier_sigma is not None:
        built.skip_outliers(run.training.outlier_window, run.training.outlier_sigma)
    return built


def _import_muon_uncompiled() -> None:
    """ZeRO imports Muon for any optimizer, and Muon's functions are compiled when they are imported. Without this function, that
    would load torch's Inductor, which takes a second and 40 MB.
    """
    compile_function, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_function


def check_precision(settings: DeepSpeedConfig, device: torch.device) -> None:
    """Raises RunError if the device cannot compute in the configured precision."""
    if precision(settings) == "fp16" and not get_accelerator().is_fp16_supported():
        raise RunError(
            f"fp16 is enabled in the DeepSpeed configuration, but this {device.type} cannot multiply matrices in fp16. Use bf16"
        )


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: weight decay applies to matrices, and not to norms and biases."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _scheduler(schedule: Schedule, steps: int, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_peak, schedule, steps))


def share_of_peak(schedule: Schedule, steps: int, step: int) -> float:
    """Learning rate of step `step` (counted from 0) of `steps`, divided by the peak.

    The decay falls from the peak, at step `steps - 1 - D`, to `min_lr_ratio`, at step `steps - 1`. D is the number of decaying
    steps: all after the warm-up, or those of `wsd`. A run with `decay_from` has no warm-up.
    """
    if step < schedule.warmup_steps and schedule.decay_from is None:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    shape: str = schedule.kind
    decay = steps - 1 - schedule.warmup_steps
    if schedule.kind == "wsd":
        shape, decay = schedule.decay_shape, schedule.decay(steps)
    progress = min(1.0, max(0.0, (step - (steps - 1 - decay)) / max(1, decay)))
    if shape == "1-sqrt":
        fall = math.sqrt(progress)
    else:
        fall = progress if shape == "linear" else (1 - torch.cos(torch.tensor(torch.pi * progress)).item()) / 2
    return 1 - (1 - schedule.min_lr_ratio) * fall
