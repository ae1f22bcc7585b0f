"""Where the teacher runs: score, then train.

Before a step, the ranks of one pipeline share the step's rows among them. Each scores its part with the teacher (its own copy, or
one that is sharded over all ranks) in batches of rows of similar length under a budget of padded tokens, and one float per
teacher token goes round. They then travel with the labels: nothing else of the teacher ever enters the pipeline, and no stage
waits for another's teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from deepspeed import comm as dist
from torch import Tensor

from megatron_vocagno.batch.forwards import plan_forwards
from megatron_vocagno.batch.loader import IGNORE, Batch
from megatron_vocagno.batch.pack import Int32


class TeacherLoss(Protocol):
    """What scoring needs of a teacher."""

    def loss(self, input_BU: Tensor, target_BU: Tensor, segment_BU: Tensor | None = None) -> Tensor: ...


class Scorer(Protocol):
    """Teacher losses for the micro-batches of a step."""

    padding: float
    """Share of the positions of the last step's forwards that held no token."""

    def score(self, batches: Sequence[Batch]) -> list[Tensor]:
        """One [B, U] float32 a batch, nats; 0 where a row has no token. Collective over the pipeline's ranks."""
        ...


@dataclass(frozen=True)
class Plan:
    """Who scores which rows, together in which forward. The same on every rank."""

    forwards: tuple[tuple[tuple[int, ...], ...], ...]
    """For each rank its forwards, for each forward its rows."""

    def padding(self, lengths: Sequence[int]) -> float:
        """Share of all ranks' positions that hold no token."""
        positions = sum(len(rows) * max(lengths[row] for row in rows) for rank in self.forwards for rows in rank)
        return 1 - sum(lengths) / positions if positions else 0.0


def plan_scoring(lengths: Sequence[int], ranks: int, tokens_per_batch: int) -> Plan:
    """Share rows of so many tokens among ranks. Longest first to the rank with the least to do, then cut into forwards.

    A row longer than the budget is a forward of its own; a row without tokens is in none.
    """
    load = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: (-lengths[row], row)):
        rank = load.index(min(load))
        load[rank] += lengths[row]
        shares[rank].append(row)
    return Plan(tuple(_forwards(share, lengths, tokens_per_batch) for share in shares))


def _forwards(rows: Sequence[int], lengths: Sequence[int], tokens_per_batch: int) -> tuple[tuple[int, ...], ...]:
    planned = plan_forwards(np.array([lengths[row] for row in rows], np.int64), tokens_per_batch)
    return tuple(tuple(rows[i] for i in forward.tolist()) for forward in planned)


class ReplicatedScorer:
    """Every rank holds the teacher; the ranks of one pipeline share the rows of its step."""

    def __init__(
        self,
        teacher: TeacherLoss,
        group: dist.ProcessGroup | None,
        tokens_per_batch: int,
        device: torch.device,
        documents: bool = False,
    ) -> None:
        """group: the ranks that read the same rows; None where each reads its own.
        documents: attention ends at the borders of documents.
        """
        self.teacher, self.group, self.tokens_per_batch, self.device = teacher, group, tokens_per_batch, device
        self.documents = documents
        self.rank: int = 0 if group is None else dist.get_rank(group)
        self.ranks: int = 1 if group is None else dist.get_world_size(group)
        self.padding = 0.0

    def score(self, batches: Sequence[Batch]) -> list[Tensor]:
        inputs = [row for batch in batches for row in batch.teacher_inputs]
        targets = [row for batch in batches for row in batch.teacher_targets]
        leads = [lead for batch in batches for lead in batch.teacher_leads]
        segments = [row for batch in batches for row in batch.teacher_segments]
        lengths = [len(row) for row in targets]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        # a row without a target is not read, whatever stands in front of it
        positions = [lead + length if length else 0 for lead, length in zip(leads, lengths, strict=True)]
        plan = plan_scoring(positions, self.ranks, self.tokens_per_batch)
        self.padding = plan.padding(positions)

        flat = torch.zeros(int(starts[-1]), dtype=torch.float32, device=self.device)
        forwards = plan.forwards[self.rank]
        besides = self._forwards_besides(len(forwards))
        for rows in forwards:
            loss_BU = self.teacher.loss(
                _pad([inputs[row] for row in rows], 0).to(self.device),
                _pad([np.pad(targets[row], (leads[row], 0), constant_values=IGNORE) for row in rows], IGNORE).to(self.device),
                _pad([segments[row] for row in rows], 0).to(self.device) if self.documents else None,
            )
            for b, row in enumerate(rows):
                flat[starts[row] : starts[row + 1]] = loss_BU[b, leads[row] : positions[row]]
        for _ in range(besides):
            nothing_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self.teacher.loss(nothing_11, torch.full_like(nothing_11, IGNORE), nothing_11 if self.documents else None)
        if self.ranks > 1:
            # every position is written by one rank and zero on the others, so the sum is exact
            dist.all_reduce(flat, group=self.group)
        rows_flat = list(flat.split(lengths))
        result = []
        for batch in batches:
            mine, rows_flat = rows_flat[: len(batch.teacher_targets)], rows_flat[len(batch.teacher_targets) :]
            result.append(torch.nn.utils.rnn.pad_sequence(mine, batch_first=True))
        return result

    def _forwards_besides(self, forwards: int) -> int:
        """How many more forwards than `forwards` this rank must go through."""
        return 0


class ShardedScorer(ReplicatedScorer):
    """The scorer of a placement.ShardedTeacher. A forward gathers weights, so every rank must call it equally often."""

    def _forwards_besides(self, forwards: int) -> int:
        """As many as the rank that has most is ahead. Agreed upon first: a forward that others do not join never ends."""
        most = torch.tensor(forwards, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most) - forwards


def _pad(rows: Sequence[Int32], value: int) -> Tensor:
    """[B, U] int64"""
    padded = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return torch.from_numpy(padded)
