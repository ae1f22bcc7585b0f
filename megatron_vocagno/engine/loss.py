"""Losses and labels -> the loss of a micro-batch, and what was seen on the way. Both engines call it, each in its own place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.config import Guidance
from megatron_vocagno.objective.guidance import weighted_loss
from megatron_vocagno.objective.linear_ce import SelectedTokens, token_loss
from megatron_vocagno.objective.rule import Rule, Selection
from megatron_vocagno.objective.selection import select_tokens
from megatron_vocagno.objective.statistics import STATS, tally


class Labels(NamedTuple):
    """What a loss that selects needs besides the student. Tensors alone, as a pipeline hands on nothing else."""

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
    text_BS: Tensor
    """bool, as in Batch."""


class Chosen(NamedTuple):
    """What the loss needs where the weights are known before it."""

    target_BS: Tensor
    """int64"""
    weight_BS: Tensor
    """float32"""
    tokens_C: Tensor
    """int64, positions b * S + s of the tokens that will have a gradient."""
    divisor_1: Tensor
    """float32"""


_TYPES: tuple[type[Labels], type[Chosen]] = (Labels, Chosen)


def to_tensors(labels: Labels | Chosen) -> tuple[Tensor, ...]:
    """Labels as a pipeline transports them: a plain tuple of tensors. The shape of the first one, [type, 0], encodes their type.

    A shape can be read without waiting for the device.
    """
    return torch.empty(_TYPES.index(type(labels)), 0), *labels


def from_tensors(tensors: tuple[Tensor, ...]) -> Labels | Chosen:
    """The inverse of to_tensors."""
    type_T0, *labels = tensors
    return _TYPES[len(type_T0)](*labels)


def selection_rule(guidance: Guidance, group: dist.ProcessGroup | None = None) -> Rule:
    """How a run selects tokens. group: the data-parallel ranks."""
    g = guidance
    rule = Rule(g.keep, g.aggregate, g.scope, g.unmapped, g.require_positive, group)
    # if nothing is selected, all tokens are unmapped, and included
    return rule if g.selects else replace(rule, scope="microbatch", unmapped="include")


class Objective:
    """Per-token losses and labels -> the loss of a micro-batch. Adds up what it saw until it is asked."""

    def __init__(
        self,
        guidance: Guidance,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        softcap: float | None = None,
    ) -> None:
        """group: the data-parallel ranks, over which scope `global` selects. None means this process only.

        softcap: c, if the student's logits are c * tanh(logits / c).
        """
        self.guidance, self.device, self.softcap = guidance, device, softcap
        self.rule = selection_rule(guidance, group)
        self._looked: list[Tensor] | None = None
        self._seen = torch.zeros(len(STATS), dtype=torch.float64, device=device)
        self._text_nats = torch.zeros((), dtype=torch.float64, device=device)
        """Sum of the student's losses of text."""

    def __call__(self, loss_BS: Tensor, labels: Labels | Chosen, selected: SelectedTokens) -> Tensor:
        """The loss, [] float32. Sets `selected` to the tokens that are learned."""
        if self._looked is not None:
            self._looked.append(loss_BS)
            return loss_BS.sum()
        if isinstance(labels, Labels):
            selection = self._select(loss_BS.detach(), labels, len(labels.capacity_C0))
            weight_BS, tokens_C = selection.weight_BS, selection.tokens_C
        else:
            weight_BS, tokens_C = labels.weight_BS, labels.tokens_C
        selected.set(tokens_C)
        return weighted_loss(loss_BS, weight_BS, labels.divisor_1.squeeze())

    def of_hidden_states(self, outputs: tuple[Tensor, Tensor], labels: tuple[Tensor, ...]) -> Tensor:
        """The same from what a pipeline's last stage gives: hidden states and head, so that no logits are kept."""
        hidden_BSH, head_VH = outputs
        of_batch, selected = from_tensors(labels), SelectedTokens()
        target_N = of_batch.target_BS.flatten()
        loss_N = token_loss(
            hidden_BSH.flatten(0, 1), head_VH, target_N, ignore_index=IGNORE, softcap=self.softcap, selected=selected
        )
        return self(loss_N.view_as(of_batch.target_BS), of_batch, selected)

    def looks_first(self, micro_batches: int) -> bool:
        """Whether the losses of a whole step are needed before the first of them is learned."""
        return self.guidance.selects and self.guidance.scope == "global" and micro_batches > 1

    @contextmanager
    def looking(self) -> Iterator[list[Tensor]]:
        """Within it nothing is selected: the losses [B, S] go onto the list, in the order of the calls."""
        self._looked = []
        try:
            yield self._looked
        finally:
            self._looked = None

    def choose(self, losses: Sequence[Tensor], labels: Sequence[Labels]) -> list[Chosen]:
        """One selection over all micro-batches of a step, from their losses [B, S]. Collective over the group.

        The weights come back to the host at once, so that no micro-batch waits for a device to know how many it has.
        """
        step = Labels(
            torch.cat([of_batch.target_BS for of_batch in labels]).to(self.device),
            pad_sequence([row_U for of_batch in labels for row_U in of_batch.teacher_loss_BU], batch_first=True),
            torch.cat([of_batch.first_BS for of_batch in labels]).to(self.device),
            torch.cat([of_batch.last_BS for of_batch in labels]).to(self.device),
            labels[0].divisor_1,
            labels[0].capacity_C0,
            torch.cat([of_batch.text_BS for of_batch in labels]).to(self.device),
        )
        weights = self._select(torch.cat(tuple(losses)), step, None).weight_BS.cpu().split(len(losses[0]))
        return [
            Chosen(of_batch.target_BS, weight_BS, weight_BS.flatten().nonzero().squeeze(1), of_batch.divisor_1)
            for of_batch, weight_BS in zip(labels, weights, strict=True)
        ]

    def judge(self, loss_BS: Tensor, labels: Labels) -> Selection:
        """What would be kept of rows that are a micro-batch by themselves: nothing is counted, and no other rank is asked."""
        return self._selection(loss_BS, labels, None, replace(self.rule, group=None))

    def _select(self, loss_BS: Tensor, labels: Labels, capacity: int | None) -> Selection:
        selection = self._selection(loss_BS, labels, capacity, self.rule)
        self._seen += selection.stats
        self._text_nats += loss_BS.where(labels.text_BS, 0.0).sum(dtype=torch.float64)
        return selection

    def _selection(self, loss_BS: Tensor, labels: Labels, capacity: int | None, rule: Rule) -> Selection:
        valid_BS, chance = labels.target_BS != IGNORE, self.guidance.objective == "random"
        selection = select_tokens(
            # chance asks of a loss only whether it is a number
            loss_BS.where(loss_BS.isnan(), 0.0) if chance else loss_BS,
            labels.teacher_loss_BU,
            labels.first_BS,
            labels.last_BS,
            valid_BS,
            rule,
            capacity=capacity,
        )
        return _with_sums_of(loss_BS, selection, valid_BS) if chance else selection

    def take_stats(self, besides_N: Tensor) -> tuple[Tensor, float, Tensor]:
        """Sums since the last call, over all ranks, on the host. Collective over the world.

        besides_N  [N] float64, what a caller adds up in the same round
        returns    those of STATS, in their order; the student's losses of text, nats; and [N]
        """
        mine = torch.cat([self._seen, self._text_nats[None], besides_N.to(self._seen.device)])
        self._seen, self._text_nats = torch.zeros_like(self._seen), torch.zeros_like(self._text_nats)
        dist.all_reduce(mine)
        sums = mine.cpu()
        return sums[: len(STATS)], float(sums[len(STATS)]), sums[len(STATS) + 1 :]


def _with_sums_of(loss_BS: Tensor, selection: Selection, valid_BS: Tensor) -> Selection:
    """The same choice, counted with the losses that are learned. A GPU is waited for.

    None is over capacity: a guide that is drawn is a number wherever it was planned to be one.
    """
    no_threshold = loss_BS.new_empty(0)
    sums = tally(loss_BS.float(), selection.guide_BS, valid_BS, selection.weight_BS != 0, no_threshold, over_capacity=0)
    return replace(selection, stats_PK=sums)
