"""Run the teacher on the rows of a step, before the student trains on them.

The ranks that read the same rows (those of one pipeline, or those that have parts of each row) divide the rows of a step between
them. Each rank scores its share with the teacher, which is its own copy or sharded over all ranks. A forward contains rows of
similar length, up to a budget of padded tokens. Then the ranks exchange one float per teacher token. These losses are inputs of
the student's loss. Nothing else of the teacher enters the pipeline, and no stage waits for the teacher of another.
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
    """The interface that scoring needs of a teacher."""

    def loss(self, input_BU: Tensor, target_BU: Tensor, segment_BU: Tensor | None = None) -> Tensor: ...


class Scorer(Protocol):
    """Teacher losses for the micro-batches of a step."""

    padding: float
    """Share of the positions in the forwards of the last step that had no token."""

    def score(self, batches: Sequence[Batch]) -> list[Tensor]:
        """One [B, U] float32 per batch, nats; 0 at positions without a token.

        Collective over the ranks that read the same rows.
        """
        ...


@dataclass(frozen=True)
class ScoringPlan:
    """Which rank scores which rows, and in which forward. The same on every rank."""

    forwards: tuple[tuple[tuple[int, ...], ...], ...]
    """The rows of each forward of each rank."""

    def padding(self, lengths: Sequence[int]) -> float:
        """Share of the positions on all ranks that have no token."""
        positions = sum(len(rows) * max(lengths[row] for row in rows) for rank in self.forwards for rows in rank)
        return 1 - sum(lengths) / positions if positions else 0.0


def plan_scoring(lengths: Sequence[int], ranks: int, tokens_per_batch: int) -> ScoringPlan:
    """Assign rows to ranks, the longest row first, each to the rank with the fewest tokens. Then divide them into forwards.

    lengths           tokens of each row
    tokens_per_batch  padded tokens of one forward

    A row that is longer than the budget gets a separate forward. A row without tokens is not scored.
    """
    load = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: (-lengths[row], row)):
        rank = load.index(min(load))
        load[rank] += lengths[row]
        shares[rank].append(row)
    return ScoringPlan(tuple(_forwards(share, lengths, tokens_per_batch) for share in shares))


def _forwards(rows: Sequence[int], lengths: Sequence[int], tokens_per_batch: int) -> tuple[tuple[int, ...], ...]:
    planned = plan_forwards(np.array([lengths[row] for row in rows], np.int64), tokens_per_batch)
    return tuple(tuple(rows[i] for i in forward.tolist()) for forward in planned)


class ReplicatedScorer:
    """Scores with a complete teacher on every rank. The ranks that read the same rows divide them between them."""

    def __init__(
        self,
        teacher: TeacherLoss,
        group: dist.ProcessGroup | None,
        tokens_per_batch: int,
        device: torch.device,
        by_document: bool = False,
    ) -> None:
        """
        group             the ranks that read the same rows, see TrainEngine; None if no other rank does
        tokens_per_batch  padded tokens of one forward
        by_document       whether attention stops at document borders
        """
        self.teacher, self.group, self.tokens_per_batch, self.device = teacher, group, tokens_per_batch, device
        self.by_document = by_document
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
        # a row without a target is not scored, even if it has a prefix
        positions = [lead + length if length else 0 for lead, length in zip(leads, lengths, strict=True)]
        plan = plan_scoring(positions, self.ranks, self.tokens_per_batch)
        self.padding = plan.padding(positions)

        flat = torch.zeros(int(starts[-1]), dtype=torch.float32, device=self.device)
        forwards = plan.forwards[self.rank]
        extra = self._extra_forwards(len(forwards))
        for rows in forwards:
            loss_BU = self.teacher.loss(
                _pad([inputs[row] for row in rows], 0).to(self.device),
                _pad([np.pad(targets[row], (leads[row], 0), constant_values=IGNORE) for row in rows], IGNORE).to(self.device),
                _pad([segments[row] for row in rows], 0).to(self.device) if self.by_document else None,
            )
            for b, row in enumerate(rows):
                flat[starts[row] : starts[row + 1]] = loss_BU[b, leads[row] : positions[row]]
        for _ in range(extra):
            zero_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self.teacher.loss(zero_11, torch.full_like(zero_11, IGNORE), zero_11 if self.by_document else None)
        if self.ranks > 1:
            # every position is written by one rank and is 0 on the others, so the sum is exact
            dist.all_reduce(flat, group=self.group)
        rows_flat = list(flat.split(lengths))
        result = []
        for batch in batches:
            own, rows_flat = rows_flat[: len(batch.teacher_targets)], rows_flat[len(batch.teacher_targets) :]
            result.append(torch.nn.utils.rnn.pad_sequence(own, batch_first=True))
        return result

    def _extra_forwards(self, forwards: int) -> int:
        """Number of empty forwards that this rank must run in addition to `forwards`."""
        return 0


class ShardedScorer(ReplicatedScorer):
    """Scores with a teacher that is sharded over the world (placement.ShardedTeacher).

    A forward gathers weights, so all ranks must run the same number of forwards.
    """

    def _extra_forwards(self, forwards: int) -> int:
        """The difference to the rank with the most forwards. Without the extra forwards, that rank would wait forever."""
        most = torch.tensor(forwards, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most) - forwards


def _pad(rows: Sequence[Int32], value: int) -> Tensor:
    """[B, U] int64"""
    padded = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return torch.from_numpy(padded)
