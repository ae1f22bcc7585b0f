"""The two DeepSpeed engines as the loop sees them: the pipeline, and the plain one with ZeRO-1/2/3.

Both take the micro-batches of a step with the teacher's losses, learn from them, and count what they did; the loop that
drives them cannot tell them apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from megatron_vocagno.batch.loader import IGNORE, Batch, Layout
from megatron_vocagno.engine.loss import Chosen, Labels, Objective, to_tensors
from megatron_vocagno.engine.step_counts import StepCounts
from megatron_vocagno.model.attention import document_positions
from megatron_vocagno.model.student import LayerInput
from megatron_vocagno.objective.linear_ce import SelectedTokens
from megatron_vocagno.objective.rule import Selection


class TrainEngine(ABC):
    """A DeepSpeed engine as the loop sees it."""

    data_rank: int
    """Which of the data-parallel shares this rank reads."""
    data_group: dist.ProcessGroup
    """The ranks that read different rows."""
    pipe_group: dist.ProcessGroup | None
    """The ranks that read the same rows; None where each reads its own."""
    speaks: bool
    """Whether this rank counts what the ranks that read the same rows all know."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: Objective, layout: Layout, documents: bool) -> None:
        """documents: attention ends at the borders of documents."""
        self.engine, self.objective, self.layout, self.documents = engine, objective, layout, documents

    def train(self, batches: Sequence[Batch], teacher_losses: Sequence[Tensor], counts: StepCounts) -> float:
        """One optimizer step on the micro-batches of this rank; the loss that was learned, over all ranks.

        teacher_losses  one [B, U] a batch, float32, nats; [B, 0] without a teacher

        Where one selection goes over several micro-batches, a forward of all of them comes first.
        """
        labels = [
            self._labels(batch, loss_BU, counts.kept, capacity)
            for batch, loss_BU, capacity in zip(batches, teacher_losses, counts.capacities, strict=True)
        ]
        if self.objective.looks_first(len(batches)) and (losses := self._look(batches, labels)):
            return self._learn(batches, self.objective.choose(losses, labels))
        return self._learn(batches, labels)

    def look(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The student's losses of a step's micro-batches, one [B, S] a batch; none on a rank where no loss is taken."""
        return self._look(batches, [self._unguided(batch) for batch in batches])

    def judge(self, batch: Batch, loss_BS: Tensor, teacher_loss_BU: Tensor) -> Selection:
        """What would be kept of a batch that is a micro-batch by itself, from its losses; on the host, and on this rank alone."""
        return self.objective.judge(loss_BS, self._labels(batch, teacher_loss_BU, 1.0, 0))

    @abstractmethod
    def _look(self, batches: Sequence[Batch], labels: Sequence[Labels | Chosen]) -> list[Tensor]:
        """The student's losses, one [B, S] a batch, by a forward alone; none on a rank where no loss is taken."""

    @abstractmethod
    def _learn(self, batches: Sequence[Batch], labels: Sequence[Labels | Chosen]) -> float:
        """Forward, backward and optimizer step."""

    @abstractmethod
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Sum of the losses of all targets of all ranks, nats."""

    def take_numbers(self, counts: StepCounts) -> dict[str, float]:
        """What is remembered of the last step besides its losses. Collective over the world."""
        return {}

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

    def has_finite_weights(self) -> bool:
        """Whether all weights of all ranks are numbers. Collective over the world."""
        # of a weight that is sharded (ZeRO-3), this rank's part
        held = [getattr(parameter, "ds_tensor", parameter) for parameter in self.engine.module.parameters()]
        finite = torch.tensor(int(all(bool(part.isfinite().all()) for part in held)), device=self.engine.device)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients were not finite, so that DeepSpeed left the weights alone."""
        return int(self.engine.skipped_steps)

    def _labels(self, batch: Batch, teacher_loss_BU: Tensor, divisor: float, capacity: int) -> Labels:
        first_BS, last_BS = batch.first_BS, batch.last_BS
        if not teacher_loss_BU.shape[1]:
            first_BS = last_BS = torch.zeros_like(first_BS)
        room = torch.empty(capacity, 0)
        return Labels(batch.target_BS, teacher_loss_BU, first_BS, last_BS, self._divisor(divisor), room, batch.text_BS)

    def _inputs(self, batch: Batch) -> LayerInput:
        """What the student's first layer takes."""
        return (batch.input_BS, document_positions(batch.segment_BS)) if self.documents else batch.input_BS

    def _divisor(self, of_sum: float) -> Tensor:
        """[1]. DeepSpeed takes the mean over micro-batches and data-parallel ranks."""
        return torch.tensor([of_sum / (self.layout.micro_batches * self.layout.data_parallel)], dtype=torch.float32)

    def _unguided(self, batch: Batch) -> Chosen:
        """For evaluation: every target counts, and the loss is a sum."""
        nothing_learned = torch.empty(0, dtype=torch.int64)
        return Chosen(batch.target_BS, (batch.target_BS != IGNORE).float(), nothing_learned, self._divisor(1.0))


class PipelineEngine(TrainEngine):
    """The student over several stages, ZeRO-1."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: Objective, layout: Layout, documents: bool) -> None:
        super().__init__(engine, objective, layout, documents)
        self.data_rank = engine.grid.get_data_parallel_rank()
        self.data_group = engine.grid.get_data_parallel_group()
        self.pipe_group = engine.grid.get_pipe_parallel_group()
        self.speaks = engine.grid.get_stage_id() == 0

    def _look(self, batches: Sequence[Batch], labels: Sequence[Labels | Chosen]) -> list[Tensor]:
        with self.objective.looking() as losses:
            self.engine.eval_batch(self._items(batches, labels), reduce_output=None, bcast_loss=False)
        return losses

    def _learn(self, batches: Sequence[Batch], labels: Sequence[Labels | Chosen]) -> float:
        return float(self.engine.train_batch(self._items(batches, labels)))

    def evaluate(self, batches: Sequence[Batch]) -> float:
        return float(self.engine.eval_batch(self._items(batches, [self._unguided(batch) for batch in batches])))

    def _items(
        self, batches: Sequence[Batch], labels: Sequence[Labels | Chosen]
    ) -> Iterator[tuple[LayerInput, tuple[Tensor, ...]]]:
        """What the first stage reads, and what the last one does."""
        for batch, of_batch in zip(batches, labels, strict=True):
            yield self._inputs(batch), to_tensors(of_batch)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        start = self.engine.module._local_start
        for place, layer in enumerate(self.engine.module.forward_funcs):
            if isinstance(layer, nn.Module):
                yield start + place, layer


class DataParallelEngine(TrainEngine):
    """The whole student on every rank, or sharded: ZeRO-1 to 3."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: Objective, layout: Layout, documents: bool) -> None:
        super().__init__(engine, objective, layout, documents)
        self.data_rank = dist.get_rank()
        self.data_group = dist.get_world_group()
        self.pipe_group, self.speaks = None, True

    @torch.no_grad()
    def _look(self, batches: Sequence[Batch], labels: Sequence[Labels | Chosen]) -> list[Tensor]:
        self.engine.eval()
        with self.objective.looking() as losses:
            for batch, of_batch in zip(batches, labels, strict=True):
                self._loss(batch, of_batch)
        return losses

    def _learn(self, batches: Sequence[Batch], labels: Sequence[Labels | Chosen]) -> float:
        self.engine.train()
        total = torch.zeros((), device=self.engine.device)
        for batch, of_batch in zip(batches, labels, strict=True):
            loss = self._training_loss(batch, of_batch)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        return self._mean(total)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        self.engine.eval()
        total = torch.zeros((), device=self.engine.device)
        for batch in batches:
            total += self._loss(batch, self._unguided(batch))
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

    def _training_loss(self, batch: Batch, labels: Labels | Chosen) -> Tensor:
        return self._loss(batch, labels)

    def _loss(self, batch: Batch, labels: Labels | Chosen) -> Tensor:
        device, selected = self.engine.device, SelectedTokens()
        labels = type(labels)(*(label.to(device) for label in labels))
        loss_BS = self.engine(self._on_device(batch), labels.target_BS, selected)
        return self.objective(loss_BS, labels, selected)

    def _on_device(self, batch: Batch) -> LayerInput:
        """What the student's first layer takes."""
        inputs, device = self._inputs(batch), self.engine.device
        return tuple(part.to(device) for part in inputs) if isinstance(inputs, tuple) else inputs.to(device)
