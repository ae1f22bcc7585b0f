"""Losses and labels -> the loss of a micro-batch, and what was seen on the way. Both engines call it, each in its own place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor

from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.config import Guidance
from megatron_vocagno.objective.guidance import weighted_loss
from megatron_vocagno.objective.linear_ce import LearnedRows, token_loss
from megatron_vocagno.objective.rule import Selection
from megatron_vocagno.objective.selection import select_tokens
from megatron_vocagno.objective.statistics import STATS


class Labels(NamedTuple):
    """What the loss of a micro-batch needs besides the student. Tensors alone, as a pipeline hands on nothing else."""

    target_BS: Tensor
    """int64"""
    teacher_loss_BU: Tensor
    """float32, nats. U is 0 without a teacher, and all ranges are empty."""
    first_BS: Tensor
    last_BS: Tensor
    """int32, teacher positions, half-open."""
    divisor_1: Tensor
    """float32"""
    capacity_C0: Tensor
    """[C, 0]. Its length says how many tokens can have weight at most: a number that a device need not be asked for."""


class Objective:
    """Per-token losses and labels -> the loss of a micro-batch. Adds up what it saw until it is asked."""

    def __init__(self, guidance: Guidance, device: torch.device) -> None:
        self.guidance, self.device = guidance, device
        self.group: dist.ProcessGroup | None = None
        """The data-parallel ranks, over which `global` scope selects; known once the engine is built."""
        self.learning = True
        """False while evaluating: every target counts, whatever the guidance."""
        self._seen = torch.zeros(len(STATS), dtype=torch.float64, device=device)

    def __call__(self, loss_BS: Tensor, labels: Labels, rows: LearnedRows) -> Tensor:
        """Tells `rows` which tokens are learned."""
        valid_BS = labels.target_BS != IGNORE
        if not self.learning:
            return weighted_loss(loss_BS, valid_BS.float(), labels.divisor_1.squeeze())
        selection = self._select(loss_BS.detach(), labels, valid_BS)
        rows.tell(selection.rows_C)
        self._seen += selection.stats_PK.sum(0)
        return weighted_loss(loss_BS, selection.weight_BS, labels.divisor_1.squeeze())

    def of_hidden_states(self, outputs: tuple[Tensor, Tensor], labels: tuple[Tensor, ...]) -> Tensor:
        """The same from what a pipeline's last stage gives: hidden states and head, so that no logits are kept."""
        hidden_BSH, head_VH = outputs
        named, rows = Labels(*labels), LearnedRows()
        target_N = named.target_BS.flatten()
        loss_N = token_loss(hidden_BSH.flatten(0, 1), head_VH, target_N, ignore_index=IGNORE, rows=rows)
        return self(loss_N.view_as(named.target_BS), named, rows)

    def _select(self, loss_BS: Tensor, labels: Labels, valid_BS: Tensor) -> Selection:
        g = self.guidance
        guided = g.objective != "clm"
        return select_tokens(
            loss_BS,
            labels.teacher_loss_BU,
            labels.first_BS,
            labels.last_BS,
            valid_BS,
            aggregate=g.aggregate,
            keep=g.keep,
            # plain language modeling: all tokens are unmapped, and included
            scope=g.scope if guided else "microbatch",
            unmapped=g.unmapped if guided else "include",
            require_positive=g.require_positive,
            group=self.group,
            capacity=len(labels.capacity_C0),
        )

    def take_stats(self) -> Tensor:
        """Sums since the last call, over all ranks, in the order of STATS. Collective over the world."""
        seen, self._seen = self._seen, torch.zeros_like(self._seen)
        dist.all_reduce(seen)
        return seen
