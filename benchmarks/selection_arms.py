"""Implementations of the selection of tokens, which `benchmarks.selection` and `benchmarks.gpu` compare.

The input is 16,384 tokens: 8 rows of 2,048, with 2.15 teacher tokens per student token and ranges of 0 to 14. All arms compute
weights, the list of the tokens that have weight, and the sums that a run logs.

- `ours`: objective/selection.py
- `padded`: pads ranges to the widest, [B, S, W]; then reduction, `topk`, masks
- `segments`: concatenates the losses of the ranges; then `segment_reduce`, `topk`, masks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vocagno.objective.ranking import kept_count
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import select_tokens

ROWS, WIDTH, RATIO = 8, 2048, 2.15
KEEP = 0.4


@dataclass(frozen=True)
class Inputs:
    student_BS: Tensor
    teacher_BU: Tensor
    first_BS: Tensor
    last_BS: Tensor
    valid_BS: Tensor


Arm = Callable[[Inputs, str, str], tuple[Tensor, Tensor]]
"""(inputs, aggregate, scope) -> (weights, rows)"""


def inputs() -> Inputs:
    """Losses like those of two models: small for most tokens, and similar in both. 5 % are unmapped, and 5 % are padding."""
    generator = torch.Generator().manual_seed(0)
    width = int(WIDTH * RATIO)
    shares = torch.tensor([5, 34, 27, 18, 9, 4, 2, 1, 1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    length_BS = torch.multinomial(shares, ROWS * WIDTH, replacement=True, generator=generator).view(ROWS, WIDTH)
    first_BS = (torch.arange(WIDTH) * RATIO).long().clamp(max=width - len(shares)).expand(ROWS, WIDTH)
    teacher_BU = torch.empty(ROWS, width).exponential_(0.4, generator=generator)
    student_BS = teacher_BU.gather(1, first_BS) * torch.rand(ROWS, WIDTH, generator=generator) * 2
    valid_BS = torch.rand(ROWS, WIDTH, generator=generator) < 0.95
    return Inputs(student_BS, teacher_BU, first_BS.int(), (first_BS + length_BS).int(), valid_BS)


def ours(x: Inputs, aggregate: str, scope: str) -> tuple[Tensor, Tensor]:
    rule = Rule(KEEP, aggregate, scope)  # type: ignore[arg-type]
    selection = select_tokens(x.student_BS, x.teacher_BU, x.first_BS, x.last_BS, x.valid_BS, rule)
    return selection.weight_BS, selection.tokens_C


def padded(x: Inputs, aggregate: str, scope: str) -> tuple[Tensor, Tensor]:
    length_BS = x.last_BS - x.first_BS
    step_W = torch.arange(int(length_BS.max()))
    at_BSW = (x.first_BS[:, :, None] + step_W).clamp(max=x.teacher_BU.shape[1] - 1)
    inside_BSW = step_W < length_BS[:, :, None]
    loss_BSW = x.teacher_BU[:, None].expand(-1, WIDTH, -1).gather(2, at_BSW)
    if aggregate == "max":
        guide_BS = loss_BSW.masked_fill(~inside_BSW, -torch.inf).amax(2)
    elif aggregate == "min":
        guide_BS = loss_BSW.masked_fill(~inside_BSW, torch.inf).amin(2)
    else:
        guide_BS = loss_BSW.masked_fill(~inside_BSW, 0.0).sum(2)
    if aggregate == "mean":
        guide_BS = guide_BS / length_BS
    return choose(x, guide_BS, scope)


def segments(x: Inputs, aggregate: str, scope: str) -> tuple[Tensor, Tensor]:
    length_N = (x.last_BS - x.first_BS).flatten().long()
    row_N = torch.arange(ROWS).repeat_interleave(WIDTH) * x.teacher_BU.shape[1]
    begin_N = x.first_BS.flatten() + row_N - (length_N.cumsum(0) - length_N)
    at = begin_N.repeat_interleave(length_N) + torch.arange(int(length_N.sum()))
    guide_N = torch.segment_reduce(x.teacher_BU.flatten()[at], aggregate, lengths=length_N)
    return choose(x, guide_N.view_as(x.student_BS), scope)


def choose(x: Inputs, guide_BS: Tensor, scope: str) -> tuple[Tensor, Tensor]:
    mapped_BS = x.valid_BS & (x.last_BS > x.first_BS)
    unmapped_BS = x.valid_BS & ~mapped_BS
    excess_BS = (x.student_BS - guide_BS).masked_fill(~mapped_BS, -torch.inf)
    kept_BS = torch.zeros_like(mapped_BS)
    groups = zip(excess_BS, mapped_BS, kept_BS, strict=True) if scope == "sequence" else [(excess_BS, mapped_BS, kept_BS)]
    thresholds = []
    for excess, mapped, kept in groups:
        values, chosen = excess.flatten().topk(kept_count(int(mapped.sum()), KEEP))
        kept.view(-1)[chosen] = True
        thresholds.append(values[-1])
    weight_BS = (kept_BS | unmapped_BS).float()
    log(x, guide_BS, mapped_BS, unmapped_BS, kept_BS, torch.stack(thresholds))
    return weight_BS, weight_BS.flatten().nonzero().squeeze(1)


def log(x: Inputs, guide_BS: Tensor, mapped_BS: Tensor, unmapped_BS: Tensor, kept_BS: Tensor, thresholds: Tensor) -> Tensor:
    """Compute the same sums as statistics.STATS."""
    dropped_BS, finite_BS = mapped_BS & ~kept_BS, x.student_BS.isfinite()
    sums = [mask.sum() for mask in (x.valid_BS, x.valid_BS & ~finite_BS, mapped_BS, kept_BS, unmapped_BS)]
    for loss_BS, mask in (
        (x.student_BS, kept_BS),
        (x.student_BS, dropped_BS),
        (x.student_BS, unmapped_BS),
        (guide_BS, kept_BS),
        (guide_BS, dropped_BS),
    ):
        sums.append(loss_BS[mask].sum(dtype=torch.float64))
    return torch.stack([x.double() for x in (*sums, thresholds.sum())])
