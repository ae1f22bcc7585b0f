"""The two DeepSpeed engines as the loop sees them: the pipeline, and the plain one with ZeRO-1/2/3.

Both take the micro-batches of a step with the teacher's losses, learn from them, and count what they did; the loop that
drives them cannot tell them apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor, nn
from transformers import PretrainedConfig

from megatron_vocagno.batch.loader import Batch, Layout
from megatron_vocagno.engine.counts import StepCounts
from megatron_vocagno.engine.learning import Labels, Objective
from megatron_vocagno.model.folder import write_tensors
from megatron_vocagno.model.student import hf_name
from megatron_vocagno.objective.linear_ce import LearnedRows


class Engine(ABC):
    """A DeepSpeed engine as the loop sees it."""

    data_rank: int
    """Which of the data-parallel shares this rank reads."""
    data_group: dist.ProcessGroup
    """The ranks that read different rows."""
    pipe_group: dist.ProcessGroup | None
    """The ranks that read the same rows; None where each reads its own."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: Objective, layout: Layout) -> None:
        self.engine, self.objective, self.layout = engine, objective, layout

    @abstractmethod
    def train(self, batches: Sequence[Batch], teacher_losses: Sequence[Tensor], counts: StepCounts) -> float:
        """One optimizer step on the micro-batches of this rank; the loss that was learned, over all ranks.

        teacher_losses  one [B, U] a batch, float32, nats; [B, 0] without a teacher
        """

    @abstractmethod
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Sum of the losses of all targets of all ranks, nats."""

    @abstractmethod
    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """This rank's layers with their place in the whole student; a tied head is not told again."""

    @property
    def learning_rate(self) -> float:
        return float(self.engine.get_lr()[0])

    @property
    def grad_norm(self) -> float | None:
        """Of the last step, before clipping; None where DeepSpeed did not take it."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients were not finite, so that DeepSpeed left the weights alone."""
        return int(self.engine.skipped_steps)

    def write_weights(self, folder: Path, config: PretrainedConfig) -> None:
        """One safetensors file a layer, under Hugging Face names. Collective; the first data-parallel rank writes."""
        for index, layer in self.layers():
            named = dict(layer.named_parameters())
            with deepspeed.zero.GatheredParameters([p for p in named.values() if hasattr(p, "ds_id")]):
                if self.data_rank == 0 and named:
                    tensors = {hf_name(config, index, name): p.detach().cpu().contiguous() for name, p in named.items()}
                    write_tensors(tensors, folder / f"layer_{index:04d}.safetensors")

    def _labels(self, batch: Batch, teacher_loss_BU: Tensor, divisor: float, capacity: int) -> Labels:
        # DeepSpeed takes the mean over micro-batches and data-parallel ranks
        divisor_1 = torch.tensor([divisor / (self.layout.micro_batches * self.layout.data_parallel)], dtype=torch.float32)
        first_BS, last_BS = batch.first_BS, batch.last_BS
        if not teacher_loss_BU.shape[1]:
            first_BS = last_BS = torch.zeros_like(first_BS)
        return Labels(batch.target_BS, teacher_loss_BU, first_BS, last_BS, divisor_1, torch.empty(capacity, 0))

    def _unguided(self, batch: Batch) -> Labels:
        """For evaluation: the loss is a sum."""
        return self._labels(batch, torch.empty(len(batch.target_BS), 0), 1.0, 0)


class PipelineTrainer(Engine):
    """The student over several stages, ZeRO-1."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: Objective, layout: Layout) -> None:
        super().__init__(engine, objective, layout)
        self.data_rank = engine.grid.get_data_parallel_rank()
        self.data_group = engine.grid.get_data_parallel_group()
        self.pipe_group = engine.grid.get_pipe_parallel_group()
        objective.group = self.data_group

    def train(self, batches: Sequence[Batch], teacher_losses: Sequence[Tensor], counts: StepCounts) -> float:
        items = (
            (batch.input_BS, self._labels(batch, loss_BU, counts.kept, capacity))
            for batch, loss_BU, capacity in zip(batches, teacher_losses, counts.capacities, strict=True)
        )
        return float(self.engine.train_batch(items))

    def evaluate(self, batches: Sequence[Batch]) -> float:
        self.objective.learning = False
        total = self.engine.eval_batch((batch.input_BS, self._unguided(batch)) for batch in batches)
        self.objective.learning = True
        return float(total)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        start = self.engine.module._local_start
        for place, layer in enumerate(self.engine.module.forward_funcs):
            if isinstance(layer, nn.Module):
                yield start + place, layer


class PlainTrainer(Engine):
    """The whole student on every rank, or sharded: ZeRO-1 to 3."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: Objective, layout: Layout) -> None:
        super().__init__(engine, objective, layout)
        self.data_rank = dist.get_rank()
        self.data_group = dist.get_world_group()
        self.pipe_group = None
        objective.group = self.data_group

    def train(self, batches: Sequence[Batch], teacher_losses: Sequence[Tensor], counts: StepCounts) -> float:
        self.engine.train()
        total = torch.zeros((), device=self.engine.device)
        for batch, loss_BU, capacity in zip(batches, teacher_losses, counts.capacities, strict=True):
            loss = self._loss(batch, self._labels(batch, loss_BU, counts.kept, capacity))
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        return self._mean(total)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        self.engine.eval()
        self.objective.learning = False
        total = torch.zeros((), device=self.engine.device)
        for batch in batches:
            total += self._loss(batch, self._unguided(batch))
        self.objective.learning = True
        return self._mean(total)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        student = self.engine.module
        told: set[int] = set()
        for place, layer in enumerate(student.layers):
            if not all(id(parameter) in told for parameter in layer.parameters()):
                yield place, layer
            told.update(id(parameter) for parameter in layer.parameters())

    def _mean(self, total: Tensor) -> float:
        """Over micro-batches and ranks, as the pipeline engine reports it."""
        dist.all_reduce(total)
        return float(total) / (self.layout.micro_batches * self.layout.data_parallel)

    def _loss(self, batch: Batch, labels: Labels) -> Tensor:
        device, rows = self.engine.device, LearnedRows()
        labels = Labels(*(label.to(device) for label in labels))
        loss_BS = self.engine(batch.input_BS.to(device), labels.target_BS, rows)
        return self.objective(loss_BS, labels, rows)
