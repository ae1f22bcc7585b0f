"""Where a teacher's distributions are compared with the student's: the baselines `uld` and `kld`.

    loss = mean of l_S over all targets + distance_weight * mean of the distance over the compared targets

Both are means over the step: sums over all ranks and micro-batches, divided once. The teacher reads a micro-batch just before the
student does, and of its hidden states those of the compared targets stay until the student has learned from them. Every rank
holds the whole teacher, and none waits for another's.
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
from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.engines import DataParallelEngine
from megatron_vocagno.engine.loss import Chosen, Labels, Objective
from megatron_vocagno.engine.scoring import plan_scoring
from megatron_vocagno.engine.step_counts import StepCounts
from megatron_vocagno.errors import RunError
from megatron_vocagno.model.teacher import Teacher
from megatron_vocagno.objective.distance import Kind, Reference, compared
from megatron_vocagno.objective.linear_ce import SelectedTokens


def check_vocabularies(run: Run, data: AlignedDataset) -> None:
    """Raises RunError for `kld` of models whose tokenizers differ: an id would stand for two tokens."""
    student, teacher = data.student_tokenizer, data.teacher_tokenizer
    if run.guidance.distance == "kld" and student.fingerprint != teacher.fingerprint:
        raise RunError(
            f"guidance.objective = 'kld' compares two distributions over one vocabulary, and {data.path} was aligned for two: "
            f"the student's tokenizer is {student.fingerprint} ({student.vocab_size:,} ids), "
            f"the teacher's {teacher.fingerprint} ({teacher.vocab_size:,} ids).\n"
            "  Take a teacher of the student's own family and build the dataset with its tokenizer on both sides, "
            "or compare by guidance.objective = 'uld', which needs no common vocabulary."
        )


def open_distiller(teacher: object, run: Run, data: AlignedDataset, student_rows: int, device: torch.device) -> Distiller | None:
    """What a run's teacher is asked for while the student learns; None where the objective compares no distributions.

    student_rows: of the student's head.
    """
    kind = run.guidance.distance
    if kind is None:
        return None
    assert isinstance(teacher, Teacher), "the configuration lets no other through"
    # a control token may lie beyond a head's rows: then it is not compared
    ids = min(data.student_tokenizer.vocab_size, student_rows), min(data.teacher_tokenizer.vocab_size, teacher.vocab_size)
    ids = (min(ids), min(ids)) if kind == "kld" else ids
    documents = run.data.by_document
    return Distiller(teacher, kind, ids, run.teacher[0].tokens_per_batch, device, documents)


class Distiller:
    """A teacher that is asked what it predicts, instead of how surprised it is."""

    def __init__(
        self,
        teacher: Teacher,
        kind: Kind,
        ids: tuple[int, int],
        tokens_per_batch: int,
        device: torch.device,
        documents: bool = False,
    ) -> None:
        """ids: of the student's and of the teacher's tokenizer. tokens_per_batch: padded teacher tokens of one forward.
        documents: attention ends at the borders of documents.
        """
        self.teacher, self.kind, self.tokens_per_batch, self.device = teacher, kind, tokens_per_batch, device
        self.documents = documents
        self.vocabulary, teacher_vocabulary = ids
        self.head_WH = teacher.head.weight.detach()[:teacher_vocabulary]

    def reference(self, batch: Batch) -> Reference:
        """What the teacher predicts at the compared targets of a micro-batch."""
        compared_BS = compared(batch.first_BS, batch.last_BS)
        row_N, position_N = compared_BS.nonzero(as_tuple=True)
        first_N = batch.first_BS[compared_BS].long()
        hidden_NH = self.head_WH.new_empty(len(row_N), self.head_WH.shape[1])
        # one rank, all rows: the plan is only how to cut them
        lengths = [
            len(ids) if len(targets) else 0 for ids, targets in zip(batch.teacher_inputs, batch.teacher_targets, strict=True)
        ]
        plan = plan_scoring(lengths, 1, self.tokens_per_batch)
        for rows in plan.forwards[0]:
            hidden_BUH = self.teacher.hidden_states(
                self._padded(batch.teacher_inputs, rows), self._padded(batch.teacher_segments, rows) if self.documents else None
            )
            for b, row in enumerate(rows):
                here_M = (row_N == row).nonzero().squeeze(1)
                hidden_NH[here_M.to(self.device)] = hidden_BUH[b, (batch.teacher_leads[row] + first_N[here_M]).to(self.device)]
        tokens_N = (row_N * compared_BS.shape[1] + position_N).to(self.device)
        return Reference(self.kind, tokens_N, hidden_NH, self.head_WH, self.teacher.head.softcap, self.vocabulary)

    def _padded(self, rows_of_batch: Sequence[Int32], rows: Sequence[int]) -> Tensor:
        """[B, U] int64"""
        return pad_sequence([torch.from_numpy(rows_of_batch[row]).long() for row in rows], batch_first=True).to(self.device)


class DistillingEngine(DataParallelEngine):
    """The plain engine, with a teacher beside the student."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, objective: Objective, layout: Layout, documents: bool, distiller: Distiller
    ) -> None:
        super().__init__(engine, objective, layout, documents)
        self.distiller = distiller
        self._compared = 1
        self._seen = torch.zeros((), dtype=torch.float64, device=engine.device)

    def train(self, batches: Sequence[Batch], teacher_losses: Sequence[Tensor], counts: StepCounts) -> float:
        self._compared = max(1, counts.compared)
        return super().train(batches, teacher_losses, counts)

    def _training_loss(self, batch: Batch, labels: Labels | Chosen) -> Tensor:
        device, selected, reference = self.engine.device, SelectedTokens(), self.distiller.reference(batch)
        labels = type(labels)(*(label.to(device) for label in labels))
        loss_BS, distance_BS = self.engine(self._on_device(batch), labels.target_BS, selected, reference)
        apart = distance_BS.sum()
        self._seen += apart.detach()
        mean = apart / self._divisor(self._compared).to(device).squeeze()
        return self.objective(loss_BS, labels, selected) + self.objective.guidance.distance_weight * mean

    def take_numbers(self, counts: StepCounts) -> dict[str, float]:
        seen, self._seen = self._seen, torch.zeros_like(self._seen)
        dist.all_reduce(seen)
        numbers = {"distance/share_compared": counts.compared / counts.targets}
        return numbers | ({"distance/mean": float(seen) / counts.compared} if counts.compared else {})
