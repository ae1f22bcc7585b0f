"""GPU backend of `select_tokens`: three launches per micro-batch, or one if rows are ranked separately. It never waits for the
device.

    keys       guide g, excess d = l_S - g (of the chunk for unit 'chunk'), and the 32 bits of d as an integer in the order of the
               floats
    threshold  k = ceil(keep * n), and the k-th highest key, bit by bit from the top: 32 counts of keys in registers
    weights    w = 1 above the threshold and for the first ties at it; the list of tokens; the sums of STATS

Without a ranking, the threshold is known, and the second launch only counts the tokens above it. `weights` then computes w from
the excess.

If the ranking has more tokens than the registers of one program hold, or spans several ranks, the threshold is found from three
histograms of 11, 11 and 10 bits. Only their counts are added atomically. They are integers, so the result is exact in any order.
No float is added atomically, so equal inputs give bitwise equal results. Scratch memory: 4 bytes per token.

B rows, S student positions, U teacher positions, N = B * S tokens in P blocks, C the capacity of the lists of tokens, K =
len(STATS).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from megatron_vocagno.objective import selection_kernels_triton as kernels
from megatron_vocagno.objective import weighting
from megatron_vocagno.objective.ranking import on_lower_ranks, over_ranks, share, spans_ranks, threshold_from_digits
from megatron_vocagno.objective.rule import Rule, Selection
from megatron_vocagno.objective.statistics import STATS

IN_REGISTERS = 32_768
"""Tokens that one program can rank: 32 keys in each of 1,024 threads."""
BLOCK = 512
"""Tokens that a program reads and writes at a time, apart from the ranking."""
LANES = 64 if torch.version.hip else 32
"""Threads of a warp."""


def select_tokens(
    student_loss_BS: Tensor,
    teacher_loss_BU: Tensor,
    first_BS: Tensor,
    last_BS: Tensor,
    valid_BS: Tensor,
    rule: Rule,
    *,
    capacity: int | None = None,
) -> Selection:
    """See selection.select_tokens. The lists are full: C = capacity, or B * capacity for scope 'sequence'. B, S and U may be
    0."""
    rows, width = student_loss_BS.shape
    inputs = student_loss_BS, teacher_loss_BU, first_BS, last_BS, valid_BS
    if rule.scope == "sequence":
        if rows and width > IN_REGISTERS:
            return _row_by_row(inputs, rule, capacity)
        return _rows_at_once(_Batch.of(*inputs, rule, capacity, rows * _blocks(width, BLOCK)), rule)
    batch = _Batch.of(*inputs, rule, capacity, _blocks(rows * width, BLOCK))
    if rule.weighting != "top_k":
        return _all_tokens(batch, rule, _cut_of_weighting)
    if rows * width > IN_REGISTERS or spans_ranks(rule.ranks):
        return _all_tokens(batch, rule, _cut_from_histograms)
    return _all_tokens(batch, rule, _cut_in_registers)


@dataclass(frozen=True)
class _Batch:
    """Inputs of the kernels, contiguous, and their outputs."""

    student_BS: Tensor
    teacher_BU: Tensor
    first_BS: Tensor
    last_BS: Tensor
    valid_BS: Tensor
    """uint8."""
    capacity: int
    """Capacity of each list of tokens, at most the number of its tokens."""
    key_BS: Tensor
    """uint32: the rank of the excess among all floats."""
    opens_BS: Tensor
    """uint8: whether a token opens a unit, see statistics.Excess."""
    selection: Selection

    @staticmethod
    def of(
        student_BS: Tensor,
        teacher_BU: Tensor,
        first_BS: Tensor,
        last_BS: Tensor,
        valid_BS: Tensor,
        rule: Rule,
        capacity: int | None,
        blocks: int,
    ) -> _Batch:
        rows, width = student_BS.shape
        lists, tokens = (rows, width) if rule.scope == "sequence" else (1, rows * width)
        capacity = tokens if capacity is None else min(capacity, tokens)

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=student_BS.device)

        return _Batch(
            student_BS=student_BS.contiguous(),
            teacher_BU=teacher_BU.contiguous(),
            first_BS=first_BS.contiguous(),
            last_BS=last_BS.contiguous(),
            valid_BS=valid_BS.bool().contiguous().view(torch.uint8),
            capacity=capacity,
            key_BS=empty(torch.uint32, rows, width),
            opens_BS=empty(torch.uint8, rows, width),
            selection=Selection(
                weight_BS=empty(torch.float32, rows, width),
                guide_BS=empty(torch.float32, rows, width),
                tokens_C=empty(torch.int64, lists * capacity),
                stats_PK=empty(torch.float64, blocks, len(STATS)),
            ),
        )


def _blocks(tokens: int, size: int) -> int:
    """Number of blocks, at least one. If there is no token, the one block is empty, so the empty case needs no special code."""
    return max(1, triton.cdiv(tokens, size))


def _warps(tokens: int, most_threads: int) -> int:
    """8 tokens per thread, up to the largest number of threads."""
    return min(max(tokens // 8, 128), most_threads) // LANES


def _weighting(rule: Rule) -> dict[str, float]:
    """Numbers of a weighting, as arguments of the kernels."""
    return {
        "minus_threshold": -rule.threshold,
        "strength": rule.strength,
        "clip": rule.clip,
        "lowest_excess": -math.log(rule.clip),
        "lowest_weight": weighting.lowest_weight(rule),
    }


def _cut_key(rule: Rule) -> int:
    """The key above which an excess has weight without a ranking. If all have weight, the key of -inf is above it too."""
    excess = weighting.cut(rule) if rule.weighting != "top_k" else math.inf
    if excess == -math.inf:
        return kernels.UNMAPPED.value
    (bits,) = struct.unpack("<I", struct.pack("<f", excess + 0.0))  # -0 becomes +0
    return bits ^ kernels.NONE.value if bits >> 31 else bits | kernels.ZERO.value


def _rows_at_once(batch: _Batch, rule: Rule) -> Selection:
    (rows, width), part, out = batch.student_BS.shape, share(rule.keep), batch.selection
    tokens = max(BLOCK, triton.next_power_of_2(width))
    kernels.select_row[(rows,)](
        batch.student_BS,
        batch.teacher_BU,
        batch.first_BS,
        batch.last_BS,
        batch.valid_BS,
        batch.key_BS,
        batch.opens_BS,
        out.guide_BS,
        out.weight_BS,
        out.tokens_C,
        out.stats_PK,
        width,
        batch.teacher_BU.shape[1],
        batch.capacity,
        part.numerator,
        part.denominator,
        _cut_key(rule),
        **_weighting(rule),
        AGGREGATE=rule.aggregate,
        CHUNK=rule.unit == "chunk",
        WEIGHTING=rule.weighting,
        POSITIVE=rule.require_positive,
        INCLUDE=rule.unmapped == "include",
        BLOCK=BLOCK,
        TOKENS=tokens,
        num_warps=_warps(tokens, 512),
    )
    return out


def _row_by_row(inputs: tuple[Tensor, ...], rule: Rule, capacity: int | None) -> Selection:
    """Rows that are too long to be ranked by one program, each selected as a micro-batch."""
    rows, width = inputs[0].shape
    rule = replace(rule, scope="microbatch")
    parts = []
    for b in range(rows):
        student_1S, teacher_1U, first_1S, last_1S, valid_1S = (x[b : b + 1] for x in inputs)
        parts.append(select_tokens(student_1S, teacher_1U, first_1S, last_1S, valid_1S, rule, capacity=capacity))
    return Selection(
        weight_BS=torch.cat([part.weight_BS for part in parts]),
        guide_BS=torch.cat([part.guide_BS for part in parts]),
        tokens_C=torch.cat([part.tokens_C + b * width for b, part in enumerate(parts)]),
        stats_PK=torch.cat([part.stats_PK for part in parts]),
    )


@dataclass(frozen=True)
class _Cut:
    """Cut of a ranking, on the device."""

    at_3: Tensor
    """int64: the threshold's key, the number of keys equal to it that are kept, and the number of tokens with weight, on this
    rank."""
    before_2P: Tensor
    """int64: the numbers of ties and of tokens with weight before each block."""
    lowest_1: Tensor
    """float32: the smallest kept excess. Infinite or NaN if none is kept."""


def _all_tokens(batch: _Batch, rule: Rule, cut: Callable[[Tensor, Rule], _Cut]) -> Selection:
    (rows, width), out = batch.student_BS.shape, batch.selection
    kernels.keys[(rows * _blocks(width, BLOCK),)](
        batch.student_BS,
        batch.teacher_BU,
        batch.first_BS,
        batch.last_BS,
        batch.valid_BS,
        batch.key_BS,
        batch.opens_BS,
        out.guide_BS,
        width,
        batch.teacher_BU.shape[1],
        AGGREGATE=rule.aggregate,
        CHUNK=rule.unit == "chunk",
        BLOCK=BLOCK,
    )
    found = cut(batch.key_BS.flatten(), rule)
    kernels.weights[(len(out.stats_PK),)](
        batch.student_BS,
        out.guide_BS,
        batch.valid_BS,
        batch.key_BS,
        batch.opens_BS,
        found.at_3,
        found.before_2P,
        found.lowest_1,
        out.weight_BS,
        out.tokens_C,
        out.stats_PK,
        rows * width,
        len(out.stats_PK),
        batch.capacity,
        **_weighting(rule),
        WEIGHTING=rule.weighting,
        INCLUDE=rule.unmapped == "include",
        BLOCK=BLOCK,
        num_warps=8 * 32 // LANES,
    )
    return out


def _cut_of_weighting(key_N: Tensor, rule: Rule) -> _Cut:
    """The cut of a weighting that does not rank, for any number of tokens."""
    blocks = _blocks(len(key_N), BLOCK)
    cut = _Cut(
        at_3=torch.empty(3, dtype=torch.int64, device=key_N.device),
        before_2P=torch.empty(2, blocks, dtype=torch.int64, device=key_N.device),
        lowest_1=torch.empty(1, dtype=torch.float32, device=key_N.device),
    )
    kernels.count_above[(1,)](
        key_N,
        cut.at_3,
        cut.before_2P,
        cut.lowest_1,
        len(key_N),
        blocks,
        _cut_key(rule),
        INCLUDE=rule.unmapped == "include",
        BLOCKS=min(16, triton.next_power_of_2(blocks)),
        BLOCK=BLOCK,
        num_warps=8 * 32 // LANES,
    )
    return cut


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
    """For any number of tokens, and over ranks. Ties go to the lower rank, then to the lower index."""
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
