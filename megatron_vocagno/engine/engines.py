"""The two DeepSpeed engines behind one interface: the pipeline engine, and the data-parallel engine with ZeRO-1/2/3.

Both train on the micro-batches of a step, given the teacher's losses, and sum statistics of the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from megatron_vocagno.batch.loader import IGNORE, Batch, Layout
from megatron_vocagno.engine.loss import GuidedObjective, LossInputs, PreselectedInputs, to_tensors
from megatron_vocagno.engine.outliers import Outlier, OutlierFilter
from megatron_vocagno.engine.step_counts import StepCounts
from megatron_vocagno.model.attention import document_positions
from megatron_vocagno.model.student import LayerInput
from megatron_vocagno.objective.linear_ce import SelectedTokens
from megatron_vocagno.objective.rule import Selection


class TrainEngine(ABC):
    """A DeepSpeed engine with the interface that the training loop needs."""

    data_rank: int
    """The data-parallel rank: which share of the rows this rank reads."""
    data_group: dist.ProcessGroup
    """The ranks that read different rows."""
    row_group: dist.ProcessGroup | None
    """The ranks that read the same rows: those of one pipeline, or those that share rows. None if no other rank does."""
    counts_rows: bool
    """Whether this rank adds its rows to sums over all ranks. Exactly one of the ranks that read them does."""
    replicas: dist.ProcessGroup
    """The ranks that have the same layers. ZeRO divides their state between them."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: GuidedObjective, layout: Layout, by_document: bool) -> None:
        """by_document: whether attention stops at document borders."""
        self.engine, self.objective, self.layout, self.by_document = engine, objective, layout, by_document
        self.outliers: OutlierFilter | None = None
        self.outlier_steps = 0
        """Number of steps that were skipped because they were outliers."""

    def skip_outliers(self, window: int, sigma: float) -> None:
        """From now on, skip steps that are outliers: see outliers.py."""
        self.outliers = OutlierFilter(window, sigma, self.engine.optimizer, self._step_loss, self.engine.device)

    @property
    def outlier(self) -> Outlier | None:
        """The outlier that the last step was. None if the step was made, or if outliers are not skipped."""
        return self.outliers.last if self.outliers is not None else None

    def train(self, batches: Sequence[Batch], teacher_losses: Sequence[Tensor], counts: StepCounts) -> float:
        """One optimizer step on the micro-batches of this rank. Returns the training loss over all ranks.

        teacher_losses  one [B, U] per batch, float32, nats; [B, 0] without a teacher

        If one selection covers several micro-batches, all of them are run forward first, to get the losses to select from.
        """
        if self.outliers is None:
            return self._train_on(batches, teacher_losses, counts)
        self.outliers.begin_step()
        loss = self._train_on(batches, teacher_losses, counts)
        self.outlier_steps += self.outliers.last is not None
        return loss

    def _train_on(self, batches: Sequence[Batch], teacher_losses: Sequence[Tensor], counts: StepCounts) -> float:
        inputs = [
            self._loss_inputs(batch, loss_BU, counts.kept, capacity)
            for batch, loss_BU, capacity in zip(batches, teacher_losses, counts.capacities, strict=True)
        ]
        if self.objective.needs_two_passes(len(batches)) and (losses := self._student_losses(batches, inputs)):
            return self._train(batches, self.objective.preselect(losses, inputs))
        return self._train(batches, inputs)

    def student_losses(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The student's losses for the micro-batches of a step, one [B, S] per batch, without a backward pass.

        The list is empty on a rank if another one has the same losses: on all stages of a pipeline but the last one, and on all
        ranks that share rows but the first one.
        """
        losses = self._student_losses(batches, [self._unguided(batch) for batch in batches])
        return losses if self.objective.parts.rank == 0 else []

    def select_only(self, batch: Batch, loss_BS: Tensor, teacher_loss_BU: Tensor) -> Selection:
        """The selection within a batch, given its losses on the host. Adds no statistics and is not collective."""
        return self.objective.select_only(loss_BS, self._loss_inputs(batch, teacher_loss_BU, 1.0, 0))

    @abstractmethod
    def _student_losses(self, batches: Sequence[Batch], inputs: Sequence[LossInputs | PreselectedInputs]) -> list[Tensor]:
        """See student_losses."""

    @abstractmethod
    def _train(self, batches: Sequence[Batch], inputs: Sequence[LossInputs | PreselectedInputs]) -> float:
        """Forward, backward and optimizer step."""

    @abstractmethod
    def _step_loss(self) -> float:
        """The training loss over all ranks, between the last backward pass of a step and its update. Collective."""

    @abstractmethod
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Sum of the losses of all targets of all ranks, nats."""

    def reduce_metrics(self, counts: StepCounts) -> dict[str, float]:
        """Further metrics of the last step, over all ranks. Collective over the world."""
        return {}

    @abstractmethod
    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """This rank's layers with their index in the complete student. A tied head is left out: its weight is the embedding's."""

    @property
    def learning_rate(self) -> float:
        return float(self.engine.get_lr()[0])

    @property
    def grad_norm(self) -> float | None:
        """Gradient norm of the last step, before clipping. None if DeepSpeed did not compute it."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def has_finite_weights(self) -> bool:
        """Whether all weights of all ranks are finite. Collective over the world."""
        # under ZeRO-3, each rank checks its share of a weight
        shares = [getattr(parameter, "ds_tensor", parameter) for parameter in self.engine.module.parameters()]
        finite = torch.tensor(int(all(bool(share.isfinite().all()) for share in shares)), device=self.engine.device)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    @property
    def skipped_steps(self) -> int:
        """Number of steps that DeepSpeed has skipped because their gradients were not finite."""
        return int(self.engine.skipped_steps) - self.outlier_steps

    def _loss_inputs(self, batch: Batch, teacher_loss_BU: Tensor, divisor: float, capacity: int) -> LossInputs:
        first_BS, last_BS = batch.first_BS, batch.last_BS
        if not teacher_loss_BU.shape[1]:
            first_BS = last_BS = torch.zeros_like(first_BS)
        capacity_C0 = torch.empty(capacity, 0)
        return LossInputs(batch.target_BS, teacher_loss_BU, first_BS, last_BS, self._divisor(divisor), capacity_C0, batch.text_BS)

    def _layer_input(self, batch: Batch) -> LayerInput:
        """The input of the student's first layer."""
        return (batch.input_BS, document_positions(batch.segment_BS)) if self.by_document else batch.input_BS

    def _divisor(self, of_sum: float) -> Tensor:
        """[1]. DeepSpeed averages over micro-batches and ranks: divide the divisor of the sum by their number."""
        return torch.tensor([of_sum / self.layout.averaged], dtype=torch.float32)

    def _unguided(self, batch: Batch) -> PreselectedInputs:
        """For evaluation: every target has weight 1, the loss is a sum, and no token has a gradient."""
        no_tokens = torch.empty(0, dtype=torch.int64)
        return PreselectedInputs(batch.target_BS, (batch.target_BS != IGNORE).float(), no_tokens, self._divisor(1.0))


class PipelineEngine(TrainEngine):
    """The student in pipeline stages, with ZeRO-1."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: GuidedObjective, layout: Layout, by_document: bool) -> None:
        super().__init__(engine, objective, layout, by_document)
        self.data_rank = engine.grid.get_data_parallel_rank()
        self.data_group = engine.grid.get_data_parallel_group()
        self.row_group = engine.grid.get_pipe_parallel_group()
        self.counts_rows = engine.grid.get_stage_id() == 0
        self.replicas = self.data_group

    def _student_losses(self, batches: Sequence[Batch], inputs: Sequence[LossInputs | PreselectedInputs]) -> list[Tensor]:
        with self.objective.recording_losses() as losses:
            self.engine.eval_batch(self._items(batches, inputs), reduce_output=None, bcast_loss=False)
        return losses

    def _train(self, batches: Sequence[Batch], inputs: Sequence[LossInputs | PreselectedInputs]) -> float:
        return float(self.engine.train_batch(self._items(batches, inputs)))

    def _step_loss(self) -> float:
        return float(self.engine._aggregate_total_loss())

    def evaluate(self, batches: Sequence[Batch]) -> float:
        return float(self.engine.eval_batch(self._items(batches, [self._unguided(batch) for batch in batches])))

    def _items(
        self, batches: Sequence[Batch], inputs: Sequence[LossInputs | PreselectedInputs]
    ) -> Iterator[tuple[LayerInput, tuple[Tensor, ...]]]:
        """Inputs of the first stage and of the loss in the last stage, per micro-batch."""
        for batch, of_batch in zip(batches, inputs, strict=True):
            yield self._layer_input(batch), to_tensors(of_batch)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        start = self.engine.module._local_start
        for index, layer in enumerate(self.engine.module.forward_funcs):
            if isinstance(layer, nn.Module):
                yield start + index, layer


class DataParallelEngine(TrainEngine):
    """The complete student on every rank, or sharded: ZeRO-1 to 3. Several ranks can share each row: see sequence.py."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        objective: GuidedObjective,
        layout: Layout,
        by_document: bool,
        data_group: dist.ProcessGroup,
    ) -> None:
        """data_group: see TrainEngine."""
        super().__init__(engine, objective, layout, by_document)
        self.parts, self.data_group = objective.parts, data_group
        self.data_rank = dist.get_rank(data_group)
        self.row_group, self.counts_rows = self.parts.group, self.parts.rank == 0
        self.replicas = dist.get_world_group()
        self._total = torch.zeros((), device=engine.device)
        """Sum of the losses of this rank's micro-batches in the current step."""

    @torch.no_grad()
    def _student_losses(self, batches: Sequence[Batch], inputs: Sequence[LossInputs | PreselectedInputs]) -> list[Tensor]:
        self.engine.eval()
        with self.objective.recording_losses() as losses:
            for batch, of_batch in zip(batches, inputs, strict=True):
                self._loss(batch, of_batch)
        return losses

    def _train(self, batches: Sequence[Batch], inputs: Sequence[LossInputs | PreselectedInputs]) -> float:
        self.engine.train()
        self._total = torch.zeros((), device=self.engine.device)
        for batch, of_batch in zip(batches, inputs, strict=True):
            loss = self._training_loss(batch, of_batch)
            self._total += loss.detach()
            self.engine.backward(loss)
            self.engine.step()
        return self._mean(self._total)

    def _step_loss(self) -> float:
        return self._mean(self._total.clone())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        self.engine.eval()
        total = torch.zeros((), device=self.engine.device)
        for batch in batches:
            total += self._loss(batch, self._unguided(batch))
        return self._mean(total)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        student = self.engine.module
        seen: set[int] = set()
        for index, layer in enumerate(student.layers):
            if not all(id(parameter) in seen for parameter in layer.parameters()):
                yield index, layer
            seen.update(id(parameter) for parameter in layer.parameters())

    def _mean(self, total: Tensor) -> float:
        """The mean over micro-batches and ranks, which the pipeline engine reports too."""
        dist.all_reduce(total)
        return float(total) / self.layout.averaged

    def _training_loss(self, batch: Batch, inputs: LossInputs | PreselectedInputs) -> Tensor:
        return self._loss(batch, inputs)

    def _loss(self, batch: Batch, inputs: LossInputs | PreselectedInputs) -> Tensor:
        device, selected = self.engine.device, SelectedTokens()
        inputs = type(inputs)(*(tensor.to(device) for tensor in inputs))
        loss_BP = self.engine(self._on_device(batch), self.parts.part(inputs.target_BS), selected)
        return self.objective(loss_BP, inputs, selected)

    def _layer_input(self, batch: Batch) -> LayerInput:
        if self.parts.group is None:
            return super()._layer_input(batch)
        position_1S = torch.arange(batch.input_BS.shape[1], dtype=torch.int32)[None]
        return self.parts.part(batch.input_BS), self.parts.part(position_1S)

    def _on_device(self, batch: Batch) -> LayerInput:
        """The input of the student's first layer, on the device."""
        inputs, device = self._layer_input(batch), self.engine.device
        return tuple(part.to(device) for part in inputs) if isinstance(inputs, tuple) else inputs.to(device)
