"""`select_tokens` on a GPU: three launches for a micro-batch, one for rows by themselves, and no wait for the device.

    keys       guide g, excess d = l_S - g, and its 32 bits as an integer in the order of the floats
    threshold  k = ceil(keep * n), and the k-th highest key, bit by bit from the top: 32 counts of keys in registers
    weights    w = 1 above the threshold and for the first ties at it; the list of rows; the sums of STATS

A ranking of more tokens than the registers of one program hold, or of several ranks, finds the threshold from three histograms
of 11, 11 and 10 bits. Only their counts are added atomically: integers, exact in any order. No float is, so equal inputs give
bitwise equal results. Scratch: 4 bytes a token.

B rows, S student positions, U teacher positions, N = B * S tokens in P blocks, L lists of rows, C room in all of them, K =
len(STATS).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from megatron_vocagno.objective import selection_kernels_triton as kernels
from megatron_vocagno.objective.ranking import on_lower_ranks, over_ranks, share, spans_ranks, threshold_from_digits
from megatron_vocagno.objective.rule import Aggregate, Rule, Selection
from megatron_vocagno.objective.statistics import STATS

IN_REGISTERS = 32_768
"""Tokens that one program can rank: 32 keys in each of 1,024 threads."""
BLOCK = 512
"""Tokens that a program which ranks nothing reads and writes; and at a time, one that does all for a row."""
LANES = 64 if torch.version.hip else 32
"""Threads of a warp."""


@dataclass(frozen=True)
class Spans:
    """What a guide is made from: see select_tokens."""

    teacher_loss_BU: Tensor
    first_BS: Tensor
    last_BS: Tensor
    aggregate: Aggregate


def select_tokens(
    student_loss_BS: Tensor,
    teacher_loss_BU: Tensor,
    first_BS: Tensor,
    last_BS: Tensor,
    valid_BS: Tensor,
    *,
    aggregate: Aggregate,
    **rule: Any,
) -> Selection:
    """As selection.select_tokens, which see, with full lists of rows: C = capacity, for 'sequence' B * capacity."""
    return select(student_loss_BS, Spans(teacher_loss_BU, first_BS, last_BS, aggregate), valid_BS, Rule(**rule))


def select(student_loss_BS: Tensor, guide: Spans | Tensor, valid_BS: Tensor, rule: Rule) -> Selection:
    """The same from what the guide is made from, or from the guide [B, S] itself. B, S and U may be 0."""
    rows, width = student_loss_BS.shape
    if rule.scope == "sequence":
        if rows and width > IN_REGISTERS:
            return _row_by_row(student_loss_BS, guide, valid_BS, rule)
        return _rows_at_once(_Batch.of(student_loss_BS, guide, valid_BS, rule, rows * _blocks(width, BLOCK)), rule)
    batch = _Batch.of(student_loss_BS, guide, valid_BS, rule, _blocks(rows * width, BLOCK))
    if rows * width > IN_REGISTERS or spans_ranks(rule.ranks):
        return _all_tokens(batch, rule, _cut_from_histograms)
    return _all_tokens(batch, rule, _cut_in_registers)


# ---------------------------------------------------------------- launches


@dataclass(frozen=True)
class _Batch:
    """What the kernels read, contiguous, and what they write."""

    student_BS: Tensor
    loss: Tensor
    """The teacher's losses [B, U], or the guide [B, S] where there are no spans."""
    first_BS: Tensor | None
    last_BS: Tensor | None
    valid_BS: Tensor
    """uint8."""
    aggregate: str
    capacity: int
    """Of each list of rows, at most its tokens."""
    key_BS: Tensor
    """uint32: where the excess stands among all floats."""
    selection: Selection

    @staticmethod
    def of(student_BS: Tensor, guide: Spans | Tensor, valid_BS: Tensor, rule: Rule, blocks: int) -> _Batch:
        rows, width = student_BS.shape
        lists, tokens = (rows, width) if rule.scope == "sequence" else (1, rows * width)
        capacity = tokens if rule.capacity is None else min(rule.capacity, tokens)
        spans = guide if isinstance(guide, Spans) else None

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=student_BS.device)

        return _Batch(
            student_BS=student_BS.contiguous(),
            loss=(guide.teacher_loss_BU if isinstance(guide, Spans) else guide).contiguous(),
            first_BS=spans.first_BS.contiguous() if spans else None,
            last_BS=spans.last_BS.contiguous() if spans else None,
            valid_BS=valid_BS.bool().contiguous().view(torch.uint8),
            aggregate=spans.aggregate if spans else "max",
            capacity=capacity,
            key_BS=empty(torch.uint32, rows, width),
            selection=Selection(
                weight_BS=empty(torch.float32, rows, width),
                guide_BS=empty(torch.float32, rows, width),
                rows_C=empty(torch.int64, lists * capacity),
                stats_PK=empty(torch.float64, blocks, len(STATS)),
            ),
        )


def _blocks(tokens: int, size: int) -> int:
    """At least one, which then finds no token: so that nothing need be said of the empty case."""
    return max(1, triton.cdiv(tokens, size))


def _warps(tokens: int, most_threads: int) -> int:
    """8 tokens a thread as long as a program may grow."""
    return min(max(tokens // 8, 128), most_threads) // LANES


def _rows_at_once(batch: _Batch, rule: Rule) -> Selection:
    (rows, width), part, out = batch.student_BS.shape, share(rule.keep), batch.selection
    tokens = max(BLOCK, triton.next_power_of_2(width))
    kernels.select_row[(rows,)](
        batch.student_BS,
        batch.loss,
        batch.first_BS,
        batch.last_BS,
        batch.valid_BS,
        batch.key_BS,
        out.guide_BS,
        out.weight_BS,
        out.rows_C,
        out.stats_PK,
        width,
        batch.loss.shape[1],
        batch.capacity,
        part.numerator,
        part.denominator,
        AGGREGATE=batch.aggregate,
        POSITIVE=rule.require_positive,
        INCLUDE=rule.unmapped == "include",
        BLOCK=BLOCK,
        TOKENS=tokens,
        num_warps=_warps(tokens, 512),
    )
    return out


def _row_by_row(student_BS: Tensor, guide: Spans | Tensor, valid_BS: Tensor, rule: Rule) -> Selection:
    """Rows that no program can rank alone, each as a micro-batch."""
    parts = []
    for b in range(len(student_BS)):
        row = slice(b, b + 1)
        if isinstance(guide, Tensor):
            guide_of_row: Spans | Tensor = guide[row]
        else:
            guide_of_row = Spans(guide.teacher_loss_BU[row], guide.first_BS[row], guide.last_BS[row], guide.aggregate)
        parts.append(select(student_BS[row], guide_of_row, valid_BS[row], replace(rule, scope="microbatch")))
    return Selection(
        weight_BS=torch.cat([part.weight_BS for part in parts]),
        guide_BS=torch.cat([part.guide_BS for part in parts]),
        rows_C=torch.cat([part.rows_C + b * student_BS.shape[1] for b, part in enumerate(parts)]),
        stats_PK=torch.cat([part.stats_PK for part in parts]),
    )


@dataclass(frozen=True)
class _Cut:
    """Where a ranking cuts, on the device."""

    at_3: Tensor
    """int64: the threshold's key; how many of the keys equal to it are kept here; how many tokens have weight here."""
    before_2P: Tensor
    """int64: ties, and tokens with weight, in the blocks before each."""
    lowest_1: Tensor
    """float32: the smallest kept excess; infinite or NaN where there is none."""


def _all_tokens(batch: _Batch, rule: Rule, cut: Callable[[Tensor, Rule], _Cut]) -> Selection:
    (rows, width), out = batch.student_BS.shape, batch.selection
    kernels.keys[(rows * _blocks(width, BLOCK),)](
        batch.student_BS,
        batch.loss,
        batch.first_BS,
        batch.last_BS,
        batch.valid_BS,
        batch.key_BS,
        out.guide_BS,
        width,
        batch.loss.shape[1],
        AGGREGATE=batch.aggregate,
        BLOCK=BLOCK,
    )
    found = cut(batch.key_BS.flatten(), rule)
    kernels.weights[(len(out.stats_PK),)](
        batch.student_BS,
        out.guide_BS,
        batch.valid_BS,
        batch.key_BS,
        found.at_3,
        found.before_2P,
        found.lowest_1,
        out.weight_BS,
        out.rows_C,
        out.stats_PK,
        rows * width,
        len(out.stats_PK),
        batch.capacity,
        INCLUDE=rule.unmapped == "include",
        BLOCK=BLOCK,
    )
    return out


def _cut_in_registers(key_N: Tensor, rule: Rule) -> _Cut:
    part, blocks = share(rule.keep), _blocks(len(key_N), BLOCK)
    cut = _Cut(
        at_3=torch.empty(3, dtype=torch.int64, device=key_N.device),
        before_2P=torch.empty(2, blocks, dtype=torch.int64, device=key_N.device),
        lowest_1=torch.empty(1, dtype=torch.float32, device=key_N.device),
    )
    tile = triton.next_power_of_2(blocks)
    kernels.threshold[(1,)](
        key_N,
        cut.at_3,
        cut.before_2P,
        cut.lowest_1,
        len(key_N),
        blocks,
        part.numerator,
        part.denominator,
        POSITIVE=rule.require_positive,
        INCLUDE=rule.unmapped == "include",
        BLOCKS=tile,
        BLOCK=BLOCK,
        num_warps=_warps(tile * BLOCK, 1024),
    )
    return cut


def _cut_from_histograms(key_N: Tensor, rule: Rule) -> _Cut:
    """Of any number of tokens, and over ranks: ties go to the lower rank, then to the lower index."""
    ranks, tokens = rule.ranks, len(key_N)

    def count_digits(found_11: Tensor, shift: int, width: int) -> Tensor:
        count_D = torch.zeros(1 << width, dtype=torch.int32, device=key_N.device)
        kernels.histogram[(_blocks(tokens, 4 * BLOCK),)](
            key_N, found_11, count_D, tokens, SHIFT=shift, WIDTH=width, BLOCK=4 * BLOCK
        )
        return count_D.long()[None]

    zero_11 = torch.zeros(1, 1, dtype=torch.int64, device=key_N.device)
    key_11, missing_11 = threshold_from_digits(count_digits, zero_11, rule.keep, ranks)
    if rule.require_positive:
        missing_11 = missing_11.where(key_11 > kernels.ZERO.value, 0)
        key_11 = key_11.clamp(min=kernels.ZERO.value)
    count_2P = torch.empty(2, _blocks(tokens, BLOCK), dtype=torch.int64, device=key_N.device)
    lowest_P = torch.empty_like(count_2P[0], dtype=torch.float32)
    kernels.count[(len(lowest_P),)](
        key_N, key_11, missing_11, count_2P, lowest_P, tokens, len(lowest_P), INCLUDE=rule.unmapped == "include", BLOCK=BLOCK
    )
    ties_P, certain_P = count_2P
    missing = (missing_11.squeeze() - on_lower_ranks(ties_P.sum(), ranks)).clamp(min=0)
    ties_before_P = ties_P.cumsum(0) - ties_P
    before_P = certain_P.cumsum(0) - certain_P + ties_before_P.minimum(missing)
    total = certain_P.sum() + ties_P.sum().minimum(missing)
    return _Cut(
        at_3=torch.stack([key_11.squeeze(), missing, total]),
        before_2P=torch.stack([ties_before_P, before_P]),
        lowest_1=over_ranks(lowest_P.amin(0, keepdim=True), ranks, dist.ReduceOp.MIN),
    )
