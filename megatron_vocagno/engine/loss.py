"""Per-token losses and their inputs -> the loss of a micro-batch, and the statistics of its selection. Both engines use it."""

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
from megatron_vocagno.engine.sequence import WHOLE_ROWS, RowParts
from megatron_vocagno.objective.guidance import weighted_loss
from megatron_vocagno.objective.linear_ce import SelectedTokens, token_loss
from megatron_vocagno.objective.rule import Rule, Selection
from megatron_vocagno.objective.selection import select_tokens
from megatron_vocagno.objective.statistics import STATS, tally


class LossInputs(NamedTuple):
    """The inputs of a loss that selects tokens, without the student's losses. All are tensors: a pipeline sends nothing else."""

    target_BS: Tensor
    """int64"""
    teacher_loss_BU: Tensor
    """float32, nats. U is 0 without a teacher, and then all ranges are empty."""
    first_BS: Tensor
    last_BS: Tensor
    """int32, teacher positions, half-open."""
    divisor_1: Tensor
    """float32"""
    capacity_C0: Tensor
    """[C, 0]. C is the largest number of tokens that can have weight. A shape can be read without waiting for the device."""
    text_BS: Tensor
    """bool, as in Batch."""


class PreselectedInputs(NamedTuple):
    """The inputs of a loss whose weights are known before the student's losses."""

    target_BS: Tensor
    """int64"""
    weight_BS: Tensor
    """float32"""
    tokens_C: Tensor
    """int64, positions b * S + s of the tokens that will have a gradient."""
    divisor_1: Tensor
    """float32"""


_TYPES: tuple[type[LossInputs], type[PreselectedInputs]] = (LossInputs, PreselectedInputs)


def to_tensors(inputs: LossInputs | PreselectedInputs) -> tuple[Tensor, ...]:
    """Loss inputs as a pipeline transports them: a plain tuple of tensors.

    The shape of the first one, [type, 0], encodes their type. A shape can be read without waiting for the device.
    """
    return torch.empty(_TYPES.index(type(inputs)), 0), *inputs


def from_tensors(tensors: tuple[Tensor, ...]) -> LossInputs | PreselectedInputs:
    """The inverse of to_tensors."""
    type_T0, *fields = tensors
    return _TYPES[len(type_T0)](*fields)


def selection_rule(guidance: Guidance, group: dist.ProcessGroup | None = None) -> Rule:
    """The rule by which a run selects tokens. group: the data-parallel ranks."""
    g = guidance
    rule = Rule(
        g.keep, g.aggregate, g.scope, g.unmapped, g.require_positive, group, g.unit, g.weighting, g.threshold, g.strength, g.clip
    )
    # if nothing is selected, all tokens are unmapped, and included
    return rule if g.selects else replace(rule, scope="microbatch", unmapped="include")


class GuidedObjective:
    """Per-token losses and loss inputs -> the loss of a micro-batch. Sums statistics until reduce_stats is called."""

    def __init__(
        self,
        guidance: Guidance,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        softcap: float | None = None,
        parts: RowParts = WHOLE_ROWS,
    ) -> None:
        """group: the data-parallel ranks, over which scope `global` selects. None means this process only.

        softcap: c, if the student's logits are c * tanh(logits / c).
        parts: the ranks that share rows. Each of them gets the loss inputs of complete rows.
        """
        self.guidance, self.device, self.softcap, self.parts = guidance, device, softcap, parts
        self.rule = selection_rule(guidance, group)
        self._recorded: list[Tensor] | None = None
        self._stats = torch.zeros(len(STATS), dtype=torch.float64, device=device)
        self._text_nats = torch.zeros((), dtype=torch.float64, device=device)
        """Sum of the student's losses over text."""

    def __call__(self, loss_BS: Tensor, inputs: LossInputs | PreselectedInputs, selected: SelectedTokens) -> Tensor:
        """The loss, [] float32, of this rank's part of the rows. Sets `selected` to its tokens that have a gradient.

        loss_BS: of this rank's part. Collective over the ranks that share rows.
        """
        if self._recorded is not None:
            self._recorded.append(self.parts.whole(loss_BS))
            return loss_BS.sum()
        if isinstance(inputs, LossInputs):
            selection = self._select(self.parts.whole(loss_BS.detach()), inputs, len(inputs.capacity_C0))
            weight_BS, tokens_C = selection.weight_BS, selection.tokens_C
        else:
            weight_BS, tokens_C = inputs.weight_BS, inputs.tokens_C
        if self.parts.group is not None:
            weight_BS = self.parts.part(weight_BS)
            # their number in this part is read from the device
            tokens_C = weight_BS.flatten().nonzero().squeeze(1)
        selected.set(tokens_C)
        return weighted_loss(loss_BS, weight_BS, inputs.divisor_1.squeeze())

    def from_hidden_states(self, outputs: tuple[Tensor, Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
        """The loss from the outputs of a pipeline's last stage, without storing logits.

        outputs  hidden states [B, S, H] and head [V, H]
        tensors  loss inputs, see to_tensors
        """
        hidden_BSH, head_VH = outputs
        inputs, selected = from_tensors(tensors), SelectedTokens()
        target_N = inputs.target_BS.flatten()
        loss_N = token_loss(
            hidden_BSH.flatten(0, 1), head_VH, target_N, ignore_index=IGNORE, softcap=self.softcap, selected=selected
        )
        return self(loss_N.view_as(inputs.target_BS), inputs, selected)

    def needs_two_passes(self, micro_batches: int) -> bool:
        """Whether the losses of the complete step are needed before its first backward pass.

        Only if one selection covers several micro-batches: scope `global`, with more than one micro-batch per step.
        """
        return self.guidance.ranks and self.guidance.scope == "global" and micro_batches > 1

    @contextmanager
    def recording_losses(self) -> Iterator[list[Tensor]]:
        """Within the context, calls select nothing. They append the losses [B, S] of whole rows to the list, in the order of the
        calls.
        """
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def preselect(self, losses: Sequence[Tensor], inputs: Sequence[LossInputs]) -> list[PreselectedInputs]:
        """One selection over all micro-batches of a step, from their losses [B, S]. Collective over the group.

        The weights are copied to the host at once. Later, no micro-batch waits for the device to know how many tokens it keeps.
        """
        step = LossInputs(
            torch.cat([each.target_BS for each in inputs]).to(self.device),
            pad_sequence([row_U for each in inputs for row_U in each.teacher_loss_BU], batch_first=True),
            torch.cat([each.first_BS for each in inputs]).to(self.device),
            torch.cat([each.last_BS for each in inputs]).to(self.device),
            inputs[0].divisor_1,
            inputs[0].capacity_C0,
            torch.cat([each.text_BS for each in inputs]).to(self.device),
        )
        weights = self._select(torch.cat(tuple(losses)), step, None).weight_BS.cpu().split(len(losses[0]))
        return [
            PreselectedInputs(each.target_BS, weight_BS, weight_BS.flatten().nonzero().squeeze(1), each.divisor_1)
            for each, weight_BS in zip(inputs, weights, strict=True)
        ]

    def select_only(self, loss_BS: Tensor, inputs: LossInputs) -> Selection:
        """The selection within these rows, as if they were a micro-batch. Adds no statistics and is not collective."""
        return self._selection(loss_BS, inputs, None, replace(self.rule, group=None))

    def _select(self, loss_BS: Tensor, inputs: LossInputs, capacity: int | None) -> Selection:
        selection = self._selection(loss_BS, inputs, capacity, self.rule)
        if self.parts.rank == 0:  # the other ranks that share the rows have the same sums
            self._stats += selection.stats
            self._text_nats += loss_BS.where(inputs.text_BS, 0.0).sum(dtype=torch.float64)
        return selection

    def _selection(self, loss_BS: Tensor, inputs: LossInputs, capacity: int | None, rule: Rule) -> Selection:
        valid_BS, random = inputs.target_BS != IGNORE, self.guidance.objective == "random"
        selection = select_tokens(
            # random selection ignores the loss, but not whether it is NaN
            loss_BS.where(loss_BS.isnan(), 0.0) if random else loss_BS,
            inputs.teacher_loss_BU,
            inputs.first_BS,
            inputs.last_BS,
            valid_BS,
            rule,
            capacity=capacity,
        )
        return _with_stats_of(loss_BS, selection, valid_BS, rule) if random else selection

    def reduce_stats(self, extra_N: Tensor) -> tuple[Tensor, float, Tensor]:
        """Sums since the last call, over all ranks, on the host. Collective over the world.

        extra_N  [N] float64, further sums of the caller for the same all-reduce
        returns  the sums of STATS, in their order, the sum of the student's losses over text (nats), and the sums of extra_N
        """
        sums = torch.cat([self._stats, self._text_nats[None], extra_N.to(self._stats.device)])
        self._stats, self._text_nats = torch.zeros_like(self._stats), torch.zeros_like(self._text_nats)
        dist.all_reduce(sums)
        sums = sums.cpu()
        return sums[: len(STATS)], float(sums[len(STATS)]), sums[len(STATS) + 1 :]


def _with_stats_of(loss_BS: Tensor, selection: Selection, valid_BS: Tensor, rule: Rule) -> Selection:
    """The same selection with statistics of the student's real losses. Waits for the device.

    The number of tokens over capacity is 0: every token that was planned to have a random guide has one.
    """
    sums = tally(loss_BS.float(), selection.guide_BS, valid_BS, selection.weight_BS, None, rule, over_capacity=0)
    return replace(selection, stats_PK=sums)
