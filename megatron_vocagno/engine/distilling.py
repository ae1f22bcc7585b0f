"""The baselines `uld` and `kld`, which compare the distributions of teacher and student.

    loss = mean of l_S over all targets + distance_weight * mean of the distance over the compared targets

Both are means over the step: sums over all ranks and micro-batches, divided once. The teacher reads a micro-batch just before the
student does. Its hidden states at the compared targets are kept until the student's backward pass. Every rank has a complete
teacher, so no rank waits for the teacher of another rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_vocagno.batch.loader import Batch, Layout
from megatron_vocagno.batch.pack import Int32
from megatron_vocagno.config import Guidance
from megatron_vocagno.config import Teacher as TeacherConfig
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.engines import DataParallelEngine
from megatron_vocagno.engine.loss import GuidedObjective, LossInputs, PreselectedInputs
from megatron_vocagno.engine.scoring import plan_scoring
from megatron_vocagno.engine.step_counts import StepCounts
from megatron_vocagno.errors import RunError
from megatron_vocagno.model.teacher import Teacher
from megatron_vocagno.objective.distance import Kind, Reference, compared
from megatron_vocagno.objective.linear_ce import SelectedTokens


def check_vocabularies(guidance: Guidance, data: AlignedDataset) -> None:
    """Raises RunError if the objective is `kld` and the tokenizers differ, because an id would mean two tokens."""
    student, teacher = data.student_tokenizer, data.teacher_tokenizer
    if guidance.distance == "kld" and student.fingerprint != teacher.fingerprint:
        raise RunError(
            f"guidance.objective = 'kld' compares distributions over one vocabulary, but {data.path} was aligned for two: "
            f"the student's tokenizer is {student.fingerprint} ({student.vocab_size:,} ids), "
            f"the teacher's {teacher.fingerprint} ({teacher.vocab_size:,} ids).\n"
            "  Use a teacher of the student's family and build the dataset with its tokenizer on both sides, "
            "or use guidance.objective = 'uld', which needs no common vocabulary."
        )


def make_distiller(
    teacher: object,
    config: TeacherConfig | None,
    guidance: Guidance,
    data: AlignedDataset,
    student_vocab_size: int,
    by_document: bool,
    device: torch.device,
) -> Distiller | None:
    """The source of the teacher's distributions. None if the objective compares no distributions.

    teacher, config     the loaded teacher and its section of the run; None if no teacher is loaded
    student_vocab_size  rows of the student's head
    by_document         whether attention stops at document borders
    """
    kind = guidance.distance
    if kind is None:
        return None
    assert isinstance(teacher, Teacher) and config is not None, "the configuration allows no other teacher"
    # a control token may have an id beyond the rows of a head: then it is not compared
    ids = min(data.student_tokenizer.vocab_size, student_vocab_size), min(data.teacher_tokenizer.vocab_size, teacher.vocab_size)
    ids = (min(ids), min(ids)) if kind == "kld" else ids
    return Distiller(teacher, kind, ids, config.tokens_per_batch, device, by_document)


class Distiller:
    """Computes the teacher's distributions at the compared targets."""

    def __init__(
        self,
        teacher: Teacher,
        kind: Kind,
        ids: tuple[int, int],
        tokens_per_batch: int,
        device: torch.device,
        by_document: bool = False,
    ) -> None:
        """
        ids               how many ids of the student's and of the teacher's vocabulary are compared
        tokens_per_batch  padded teacher tokens of one forward
        by_document       whether attention stops at document borders
        """
        self.teacher, self.kind, self.tokens_per_batch, self.device = teacher, kind, tokens_per_batch, device
        self.by_document = by_document
        self.vocabulary, teacher_vocabulary = ids
        self.head_WH = teacher.head.weight.detach()[:teacher_vocabulary]

    def reference(self, batch: Batch) -> Reference:
        """The teacher's side of the distance at the compared targets of a micro-batch."""
        compared_BS = compared(batch.first_BS, batch.last_BS)
        row_N, position_N = compared_BS.nonzero(as_tuple=True)
        first_N = batch.first_BS[compared_BS].long()
        hidden_NH = self.head_WH.new_empty(len(row_N), self.head_WH.shape[1])
        # all rows for one rank: the plan only splits them into forwards
        lengths = [
            len(ids) if len(targets) else 0 for ids, targets in zip(batch.teacher_inputs, batch.teacher_targets, strict=True)
        ]
        plan = plan_scoring(lengths, 1, self.tokens_per_batch)
        for rows in plan.forwards[0]:
            hidden_BUH = self.teacher.hidden_states(
                self._padded(batch.teacher_inputs, rows), self._padded(batch.teacher_segments, rows) if self.by_document else None
            )
            for b, row in enumerate(rows):
                of_row_M = (row_N == row).nonzero().squeeze(1)
                hidden_NH[of_row_M.to(self.device)] = hidden_BUH[
                    b, (batch.teacher_leads[row] + first_N[of_row_M]).to(self.device)
                ]
        tokens_N = (row_N * compared_BS.shape[1] + position_N).to(self.device)
        return Reference(self.kind, tokens_N, hidden_NH, self.head_WH, self.teacher.head.softcap, self.vocabulary)

    def _padded(self, rows_of_batch: Sequence[Int32], rows: Sequence[int]) -> Tensor:
        """[B, U] int64"""
        return pad_sequence([torch.from_numpy(rows_of_batch[row]).long() for row in rows], batch_first=True).to(self.device)


class DistillingEngine(DataParallelEngine):
    """The data-parallel engine, with the distance from the teacher's distributions in its loss."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        objective: GuidedObjective,
        layout: Layout,
        by_document: bool,
        data_group: dist.ProcessGroup,
        distiller: Distiller,
    ) -> None:
        super().__init__(engine, objective, layout, by_document, data_group)
        self.distiller = distiller
        self._compared = 1
        self._distance_sum = torch.zeros((), dtype=torch.float64, device=engine.device)

    def train(self, batches: Sequence[Batch], teacher_losses: Sequence[Tensor], counts: StepCounts) -> float:
        self._compared = max(1, counts.compared)
        return super().train(batches, teacher_losses, counts)

    def _training_loss(self, batch: Batch, inputs: LossInputs | PreselectedInputs) -> Tensor:
        device, selected, reference = self.engine.device, SelectedTokens(), self.distiller.reference(batch)
        inputs = type(inputs)(*(tensor.to(device) for tensor in inputs))
        loss_BS, distance_BS = self.engine(self._on_device(batch), inputs.target_BS, selected, reference)
        distance = distance_BS.sum()
        self._distance_sum += distance.detach()
        mean = distance / self._divisor(self._compared).to(device).squeeze()
        return self.objective(loss_BS, inputs, selected) + self.objective.guidance.distance_weight * mean

    def reduce_metrics(self, counts: StepCounts) -> dict[str, float]:
        total, self._distance_sum = self._distance_sum, torch.zeros_like(self._distance_sum)
        dist.all_reduce(total)
        metrics = {"distance/share_compared": counts.compared / counts.targets}
        return metrics | ({"distance/mean": float(total) / counts.compared} if counts.compared else {})
