"""Counts of a step that all ranks know before its losses, because they follow from the spans.

The number of mapped tokens determines how many tokens are kept, and that number is the divisor of the loss. In every layout, the
loss is the sum over *all* kept tokens of the step divided by their number, never a mean of means. Each row is read by one
pipeline, or by one group of ranks that share rows, so the counts are summed over the data-parallel ranks, once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed import comm as dist

from megatron_vocagno.batch.loader import Batch
from megatron_vocagno.batch.pack import MappingStatus
from megatron_vocagno.config import Guidance
from megatron_vocagno.engine.loss import selection_rule
from megatron_vocagno.objective.distance import compared
from megatron_vocagno.objective.selection import planned_kept


@dataclass(frozen=True)
class StepCounts:
    """Counts over all ranks, except `capacities`."""

    kept: int
    """The planned sum of the weights, see planned_kept: the divisor of the loss. At least 1."""
    targets: int
    teacher_tokens: int
    """Targets of the teacher."""
    mapping: tuple[int, ...]
    """Number of targets per `MappingStatus`."""
    compared: int
    """Targets at which the teacher's distribution is compared (`uld`, `kld`). 0 for other objectives."""
    capacities: tuple[int, ...]
    """For each micro-batch of this rank, the largest number of tokens that can have weight; with scope `sequence`, per row."""


def count_step(batches: Sequence[Batch], guidance: Guidance, group: dist.ProcessGroup, device: torch.device) -> StepCounts:
    """Counts of a step from the micro-batches of this data-parallel rank. Collective over `group`, the data-parallel ranks."""
    rule = selection_rule(guidance)
    capacities = [_capacity(batch, guidance) for batch in batches]
    kept_here = sum(planned_kept(batch.row_mapped, batch.row_unmapped, rule) for batch in batches)
    teacher_tokens = sum(len(ids) for batch in batches for ids in batch.teacher_targets)
    mapping = [sum(batch.mapping_counts[reason] for batch in batches) for reason in MappingStatus]
    distances = 0
    if guidance.distance:
        distances = sum(int(compared(batch.first_BS, batch.last_BS).sum()) for batch in batches)
    kept, teacher_tokens, distances, *mapping = sum_over_ranks([kept_here, teacher_tokens, distances, *mapping], group, device)
    if guidance.scope == "global":
        # one selection covers the complete step
        mapped = mapping[MappingStatus.MAPPED]
        kept = planned_kept([mapped], [sum(mapping) - mapped], rule)
    if not guidance.selects:
        kept = sum(mapping)
    return StepCounts(max(1, kept), sum(mapping), teacher_tokens, tuple(mapping), distances, tuple(capacities))


def _capacity(batch: Batch, guidance: Guidance) -> int:
    rows = list(zip(batch.row_mapped, batch.row_unmapped, strict=True))
    # with scope `global`, the best tokens of all ranks may all be on this rank
    if not guidance.selects or guidance.scope == "global":
        return sum(mapped + unmapped for mapped, unmapped in rows)
    rule = selection_rule(guidance)
    if guidance.scope == "sequence":
        return max(planned_kept([mapped], [unmapped], rule) for mapped, unmapped in rows)
    return planned_kept(batch.row_mapped, batch.row_unmapped, rule)


def sum_over_ranks(counts: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """Each count, summed over the ranks of a group. Collective over the group."""
    sums = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(sums, group=group)
    result: list[int] = sums.tolist()
    return result
