"""Losses and labels -> the loss of a micro-batch, and what was seen on the way. Both engines call it, each in its own place."""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from torch import Tensor

from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.config import Guidance
from megatron_vocagno.objective.guidance import STATS, GuidedLoss, clm_loss, guided_loss
from megatron_vocagno.objective.linear_ce import token_loss

Labels = tuple[Tensor, Tensor, Tensor]
"""target_BS int64, guide_BS float32 (NaN where unmapped), divisor [1] float32."""


class Objective:
    """Per-token losses and labels -> the loss of a micro-batch. Adds up what it saw until it is asked."""

    def __init__(self, guidance: Guidance, device: torch.device) -> None:
        self.guidance, self.device = guidance, device
        self.group: dist.ProcessGroup | None = None
        """The data-parallel ranks, over which `global` scope selects; known once the engine is built."""
        self.learning = True
        """False while evaluating: every target counts, whatever the guidance."""
        self._seen = torch.zeros(len(STATS), dtype=torch.float64, device=device)

    def __call__(self, loss_BS: Tensor, labels: Labels) -> Tensor:
        target_BS, guide_BS, divisor = labels
        valid_BS = target_BS != IGNORE
        if not self.learning:
            return clm_loss(loss_BS, valid_BS, normalizer=divisor.squeeze()).loss
        result = self._learn(loss_BS, guide_BS, valid_BS, divisor.squeeze())
        self._seen += result.stats
        return result.loss

    def of_hidden_states(self, outputs: tuple[Tensor, Tensor], labels: Labels) -> Tensor:
        """The same from what a pipeline's last stage gives: hidden states and head, so that no logits are kept."""
        hidden_BSH, head_VH = outputs
        target_BS = labels[0]
        loss_N = token_loss(hidden_BSH.flatten(0, 1), head_VH, target_BS.flatten(), ignore_index=IGNORE)
        return self(loss_N.view_as(target_BS), labels)

    def _learn(self, loss_BS: Tensor, guide_BS: Tensor, valid_BS: Tensor, divisor: Tensor) -> GuidedLoss:
        g = self.guidance
        if g.objective == "clm":
            return clm_loss(loss_BS, valid_BS, normalizer=divisor)
        return guided_loss(
            loss_BS,
            guide_BS,
            valid_BS,
            keep=g.keep,
            scope=g.scope,
            unmapped=g.unmapped,
            require_positive=g.require_positive,
            group=self.group,
            normalizer=divisor,
        )

    def take_stats(self) -> Tensor:
        """Sums since the last call, over all ranks, in the order of STATS. Collective over the world."""
        seen, self._seen = self._seen, torch.zeros_like(self._seen)
        dist.all_reduce(seen)
        return seen
