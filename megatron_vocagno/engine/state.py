"""Weights, optimizer states and counters of an engine, in files that do not depend on the layout. One layer is handled at a time.

    student/layer_0003.safetensors     the weights under Hugging Face names, in the precision that the student computes in
    optimizer/layer_0003.safetensors   float32: NAME.exp_avg, NAME.exp_avg_sq, …; also NAME.master if the student computes in
                                       16 bits, and the weights are rounded from it
    engine.json                        steps, learning-rate schedule, loss scale

DeepSpeed determines the layers of a rank and the part of each parameter that its optimizer updates, once when a layer is written
and again when it is read. Therefore a checkpoint can be read with any number of ranks and stages, and with any ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
import orjson
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from megatron_vocagno.engine.collectives import ErrorCollector, run_on_rank0
from megatron_vocagno.engine.engines import TrainEngine
from megatron_vocagno.engine.manifest import COUNTERS, MASTER, OPTIMIZER, STUDENT
from megatron_vocagno.errors import SharedError
from megatron_vocagno.model.folder import write_tensors
from megatron_vocagno.model.student import hf_name

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The fields of DeepSpeed's loss scaler. They change only with fp16."""


class Scalar(BaseModel):
    """A state of the optimizer that is one number per parameter and the same for all parameters, for example its step count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    dtype: str | None
    """dtype of the tensor that stores the number. None for a Python integer."""


class Counters(BaseModel):
    """The part of the state that does not consist of tensors in the shape of a parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer_states: tuple[str, ...]
    optimizer_scalars: dict[str, Scalar]
    schedule_step: int
    """Steps of the learning-rate schedule. Skipped steps do not count."""
    global_steps: int
    global_samples: int
    skipped_steps: int
    """Steps that DeepSpeed has skipped: outliers, and steps whose gradients were not finite."""
    loss_scaler: dict[str, int | float]
    learning_rate: float | None = None
    """Learning rate of the next step. Earlier releases did not record it."""
    outlier_steps: int = 0
    """Steps that were skipped because they were outliers."""
    recent_steps: tuple[tuple[float, float], ...] = ()
    """Losses and gradient norms of the steps that the next step is compared with. Empty unless outliers are skipped."""


class EngineState:
    """Writes and reads the state of an engine."""

    def __init__(self, engine: TrainEngine, config: PretrainedConfig) -> None:
        """config: the student's configuration."""
        self.train_engine, self.engine, self.config = engine, engine.engine, config
        self.optimizer = engine.engine.optimizer

    def write(self, folder: Path, io_errors: ErrorCollector) -> list[str]:
        """Write the state. Returns the names of the layers' files that this rank wrote. Collective over the world.

        All ranks gather each layer, and one of them keeps and writes it. The ranks take turns, so that they write in parallel. A
        rank has one layer in memory at a time.

        `io_errors` collects I/O errors. A rank that cannot write still takes part in the gathers, because the others wait for it.
        """
        counters = self._counters()
        self._link_states()
        if dist.get_rank() == 0:
            with io_errors.on(folder / COUNTERS):
                (folder / COUNTERS).write_bytes(orjson.dumps(counters.model_dump(), option=orjson.OPT_INDENT_2))
        # in another thread, so that the collectives of the next layer do not wait for the disk
        with ThreadPoolExecutor(max_workers=1) as writer:
            names: list[str] = []
            written: Future[None] | None = None
            for index, named in self._layers():
                writes = self._writer(index) == dist.get_rank(self.train_engine.replicas)
                if writes and written is not None:
                    written.result()
                weights, states = self._collect(named, counters.optimizer_states, keep=writes)
                if writes:
                    written = writer.submit(_write_layer, folder, index, weights, states, io_errors)
                    names += [f"{part}/{_file(index)}" for part in (STUDENT, OPTIMIZER)]
                del weights, states
            if written is not None:
                written.result()
        return names

    def _collect(
        self, named: dict[str, nn.Parameter], optimizer_states: tuple[str, ...], keep: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and optimizer states of a layer, on the host. Empty unless `keep`. Collective over the ranks that have it."""
        weights: dict[str, Tensor] = {}
        states: dict[str, Tensor] = {}
        with deepspeed.zero.GatheredParameters(_sharded(named)):
            if keep:
                weights = {name: parameter.detach().cpu().contiguous() for name, parameter in named.items()}
        for name, parameter in named.items():
            for key in (*self._masters(parameter), *optimizer_states):
                tensor = _gather(parameter, key)
                if keep:
                    states[f"{name}.{key}"] = tensor.cpu().contiguous()
        return weights, states

    def read(self, folder: Path, io_errors: ErrorCollector) -> None:
        """Read the state into the engine. Collective over the world.

        The ranks that have the same layers take turns: each layer is read by one of them, which broadcasts its tensors. A rank
        has one layer in memory at a time.

        `io_errors` collects I/O errors. A rank that cannot read still broadcasts, because the others wait for it. Its values are
        then arbitrary, so the engine must not be used.

        Raises SharedError if the states belong to another implementation of the optimizer.
        """
        counters = read_counters(folder)
        check_implementation(folder, self.optimizer.optimizer, counters)
        self._make_states(counters)
        for index, named in (*self._layers(), *self._copies()):
            tensors: dict[str, Tensor] = {}
            if self._writer(index) == dist.get_rank(self.train_engine.replicas):
                with io_errors.on(_file(index)):
                    tensors = load_file(folder / STUDENT / _file(index)) | load_file(folder / OPTIMIZER / _file(index))
            with torch.no_grad(), deepspeed.zero.GatheredParameters(_sharded(named), modifier_rank=0):
                for name, parameter in named.items():
                    weight = self._broadcast(tensors, name, parameter.shape, parameter.dtype, index)
                    parameter.copy_(weight)
                    if not self._masters(parameter):
                        _scatter(parameter, MASTER, weight)
                    for key in (*self._masters(parameter), *counters.optimizer_states):
                        state = self._broadcast(tensors, f"{name}.{key}", parameter.shape, torch.float32, index)
                        _scatter(parameter, key, state)
        self._count_from(counters)

    def _writer(self, index: int) -> int:
        """The rank, among those that have layer `index`, that writes and reads it."""
        return index % int(dist.get_world_size(self.train_engine.replicas))

    def _broadcast(self, tensors: dict[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype, index: int) -> Tensor:
        """A tensor of layer `index` on the device, from the rank that read it. Collective over the ranks that have the layer."""
        value = torch.empty(shape, dtype=dtype, device=self.engine.device)
        # empty on the other ranks, and after a read error
        if tensors:
            value.copy_(tensors[name])
        group = self.train_engine.replicas
        dist.broadcast(value, src=dist.get_global_rank(group, self._writer(index)), group=group)
        return value

    def _layers(self) -> Iterator[tuple[int, dict[str, nn.Parameter]]]:
        """This rank's layers with weights: index in the complete student, and parameters by their Hugging Face names."""
        for index, layer in self.train_engine.layers():
            if named := {hf_name(self.config, index, name): parameter for name, parameter in layer.named_parameters()}:
                yield index, named

    def _copies(self) -> Iterator[tuple[int, dict[str, nn.Parameter]]]:
        """The tied head on the last stage of a pipeline: a copy of the embedding with separate optimizer states."""
        for module in getattr(self.engine.module, "tied_modules", {}).values():
            yield 0, {hf_name(self.config, 0, name): parameter for name, parameter in module.named_parameters()}

    @staticmethod
    def _masters(parameter: nn.Parameter) -> tuple[str, ...]:
        """The key of the float32 master weight. Empty for float32 parameters, which have none."""
        return () if parameter.dtype == torch.float32 else (MASTER,)

    def _partitions(self) -> list[Tensor]:
        """The flat float32 tensors that this rank's optimizer updates."""
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3):
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self.optimizer.optimizer.param_groups for flat in group["params"]]

    def _counters(self) -> Counters:
        flat = self._partitions()[0]
        state = self.optimizer.optimizer.state[flat]
        tensors = {key for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape}
        scaler = getattr(self.optimizer, "loss_scaler", None)
        return Counters(
            optimizer_states=tuple(sorted(tensors)),
            optimizer_scalars={key: _scalar(value) for key, value in state.items() if key not in tensors},
            schedule_step=self.engine.lr_scheduler.last_epoch,
            global_steps=self.engine.global_steps,
            # DeepSpeed counts a row once per rank that has a part of it
            global_samples=self.engine.global_samples // self.train_engine.layout.sequence,
            skipped_steps=self.engine.skipped_steps,
            loss_scaler={name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)},
            learning_rate=self.train_engine.learning_rate,
            outlier_steps=self.train_engine.outlier_steps,
            recent_steps=tuple(self.train_engine.outliers.recent) if self.train_engine.outliers is not None else (),
        )

    def _make_states(self, counters: Counters) -> None:
        """Allocate the optimizer's states. It would do so in its first step, but a resumed run needs them before."""
        optimizer = self.optimizer.optimizer
        # torch's fused optimizers require their step count on the device too
        fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for flat in self._partitions():
            device = flat.device if fused else torch.device("cpu")
            optimizer.state[flat] |= {key: torch.zeros_like(flat) for key in counters.optimizer_states}
            optimizer.state[flat] |= {key: _number(scalar, device) for key, scalar in counters.optimizer_scalars.items()}
        self._link_states()

    def _link_states(self) -> None:
        """Link each parameter to its part of the optimizer's states.

        DeepSpeed 0.19.8 does this during its first step, when only the first of several parameter groups has states.
        """
        if not isinstance(self.optimizer, DeepSpeedZeroOptimizer_Stage3):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _count_from(self, counters: Counters) -> None:
        self.engine.global_steps = counters.global_steps
        self.engine.global_samples = counters.global_samples * self.train_engine.layout.sequence
        self.engine.skipped_steps = counters.skipped_steps
        scaler = getattr(self.optimizer, "loss_scaler", None)
        for name, value in counters.loss_scaler.items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)
        self.train_engine.outlier_steps = counters.outlier_steps
        if self.train_engine.outliers is not None:
            self.train_engine.outliers.recent.extend(counters.recent_steps)
        self.schedule_from(counters.schedule_step)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that the schedule multiplies."""
        return float(self.engine.lr_scheduler.base_lrs[0])

    def schedule_from(self, step: int) -> None:
        """Set the step of the learning-rate schedule."""
        schedule = self.engine.lr_scheduler
        schedule.last_epoch = step
        rates = [base * share(schedule.last_epoch) for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates


def read_counters(folder: Path) -> Counters:
    """The counters of a checkpoint, on all ranks. Collective over the world. Raises SharedError."""
    return run_on_rank0(lambda: Counters.model_validate(orjson.loads((folder / COUNTERS).read_bytes())), OSError)


def check_implementation(folder: Path, optimizer: object, counters: Counters) -> None:
    """Raises SharedError if torch's optimizer would get states of DeepSpeed's optimizer, or the reverse.

    torch stores the step count as a tensor and DeepSpeed as an integer, and neither can read the other.
    """
    if not counters.optimizer_scalars:
        return
    of_torch = any(scalar.dtype is not None for scalar in counters.optimizer_scalars.values())
    is_torch = type(optimizer).__module__.startswith("torch.")
    if of_torch != is_torch:
        then, now = ("torch", "DeepSpeed") if of_torch else ("DeepSpeed", "torch")
        raise SharedError(
            f"{folder} was written with an optimizer of {then}, this run has {now}'s {type(optimizer).__name__}: "
            "the optimizer states cannot be used.\n"
            f"  Resume with optimizer.params.torch_adam = {str(of_torch).lower()} in the DeepSpeed configuration."
        )


def _file(index: int) -> str:
    return f"layer_{index:04d}.safetensors"


def _write_layer(
    folder: Path, index: int, weights: dict[str, Tensor], states: dict[str, Tensor], io_errors: ErrorCollector
) -> None:
    for path, tensors in ((folder / STUDENT, weights), (folder / OPTIMIZER, states)):
        with io_errors.on(path / _file(index)):
            write_tensors(tensors, path / _file(index))


def _sharded(named: dict[str, nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that are sharded by ZeRO-3."""
    return [parameter for parameter in named.values() if hasattr(parameter, "ds_id")]


def _gather(parameter: nn.Parameter, key: str) -> Tensor:
    """The complete master weight or optimizer state. Collective over the ranks that have the parameter."""
    tensor: Tensor = safe_get_full_fp32_param(parameter) if key == MASTER else safe_get_full_optimizer_state(parameter, key)
    return tensor


def _scatter(parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """Set this rank's part of a complete master weight or optimizer state."""
    if hasattr(parameter, "ds_id"):
        part = _share(parameter, value)
        if key == MASTER:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
    elif key == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _share(parameter: Any, value: Tensor) -> Tensor:
    """This rank's share of a ZeRO-3 parameter, padded to equal sizes.

    DeepSpeed 0.19.8 has a setter for the complete parameter, which fails if its size is not divisible by the number of ranks.
    """
    size, rank = parameter.ds_tensor.numel(), dist.get_rank(group=parameter.ds_process_group)
    part = value.flatten()[rank * size : (rank + 1) * size]
    return F.pad(part, (0, size - len(part)))


def _scalar(value: Tensor | float) -> Scalar:
    if isinstance(value, Tensor):
        return Scalar(value=value.item(), dtype=str(value.dtype).removeprefix("torch."))
    return Scalar(value=value, dtype=None)


def _number(scalar: Scalar, device: torch.device) -> Tensor | int:
    if scalar.dtype is None:
        return int(scalar.value)
    return torch.tensor(scalar.value, dtype=getattr(torch, scalar.dtype), device=device)
