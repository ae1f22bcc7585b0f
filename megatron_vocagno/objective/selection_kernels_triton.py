"""Triton kernels of the selection. `selection_triton` launches them and has their order.

A key is the 32 bits of an excess as an unsigned integer in the order of the floats, with -0 as +0. Two keys are below those of
all floats: one for tokens that cannot have weight (padding, a loss of NaN), and one for unmapped tokens.

B rows, S student positions, U teacher positions, N = B * S tokens in P blocks, L lists of tokens, C their total capacity, K =
len(STATS). A program holds T tokens at a time. Offsets are 64 bits wide. Shapes are given next to the pointers, which are to
contiguous memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_vocagno.objective import weighting
from megatron_vocagno.objective.statistics import STATS

NOTHING = tl.constexpr(0)
UNMAPPED = tl.constexpr(1)
ZERO = tl.constexpr(0x80000000)  # the key of 0.0. The key of -inf is 0x007FFFFF, that of +inf is 0xFF800000
NONE = tl.constexpr(0xFFFFFFFF)  # above all keys
_SUMS = tl.constexpr(len(STATS))
_SMALLEST = tl.constexpr(weighting.SMALLEST)


@triton.jit
def _many(mask_T):
    return tl.sum(mask_T.to(tl.int32))


@triton.jit
def _total(x_T, where_T):
    return tl.sum(tl.where(where_T, x_T.to(tl.float64), 0.0))


@triton.jit
def _aggregate(loss, first_T, last_T, AGGREGATE: tl.constexpr):
    """Aggregate of the losses in [first, last) of one teacher row. NaN if last <= first, or if one of them is NaN."""
    width_T = last_T - first_T
    if AGGREGATE == "max":
        guide_T = tl.full(first_T.shape, float("-inf"), tl.float32)
    elif AGGREGATE == "min":
        guide_T = tl.full(first_T.shape, float("inf"), tl.float32)
    else:
        guide_T = tl.zeros(first_T.shape, tl.float64)  # wide enough to round once, in any order
    nan_T = width_T <= 0
    for j in range(tl.max(width_T, 0)):
        inside_T = j < width_T
        loss_T = tl.load(loss + first_T + j, mask=inside_T, other=0.0).to(tl.float32)
        nan_T = nan_T | (loss_T != loss_T)  # max and min of the hardware ignore NaN
        if AGGREGATE == "max":
            guide_T = tl.where(inside_T, tl.maximum(guide_T, loss_T), guide_T)
        elif AGGREGATE == "min":
            guide_T = tl.where(inside_T, tl.minimum(guide_T, loss_T), guide_T)
        else:
            guide_T += loss_T
    if AGGREGATE == "mean":
        guide_T = guide_T / tl.maximum(width_T, 1)
    return tl.where(nan_T, float("nan"), guide_T.to(tl.float32))


@triton.jit
def _chunk_start(first, last, s_T, open_T):
    """The position of the first token of the chunk that holds token s, and that token's first teacher position.

    A token belongs to the chunk if its range reaches beyond the first teacher position found so far. Tokens without text are
    passed over. The pointers are to the row. open: whether token s is mapped.
    """
    begin_T = s_T
    first_T = tl.load(first + s_T, mask=open_T, other=0)
    p_T = s_T
    while tl.max(open_T.to(tl.int32), 0) > 0:
        p_T -= 1
        open_T = open_T & (p_T >= 0)
        a_T = tl.load(first + p_T, mask=open_T, other=0)
        b_T = tl.load(last + p_T, mask=open_T, other=0)
        joins_T = open_T & (a_T < b_T) & (b_T > first_T)
        begin_T = tl.where(joins_T, p_T, begin_T)
        first_T = tl.where(joins_T, a_T, first_T)
        open_T = joins_T | (open_T & (a_T >= b_T))
    return begin_T, first_T


@triton.jit
def _chunk(student, first, last, valid, s_T, mapped_T, S):
    """The chunk that holds token s: the student's loss, the number of tokens, the teacher range, whether all are valid, and
    whether token s is the first.

    Every token of a chunk adds the same losses in the same order, so that all have the same excess.
    """
    begin_T, first_T = _chunk_start(first, last, s_T, mapped_T)
    last_T = tl.load(last + begin_T, mask=mapped_T, other=0)
    sum_T = tl.load(student + begin_T, mask=mapped_T, other=0.0).to(tl.float64)
    whole_T = tl.load(valid + begin_T, mask=mapped_T, other=0) != 0
    tokens_T = mapped_T.to(tl.int32)
    open_T = mapped_T
    p_T = begin_T
    while tl.max(open_T.to(tl.int32), 0) > 0:
        p_T += 1
        open_T = open_T & (p_T < S)
        a_T = tl.load(first + p_T, mask=open_T, other=0)
        b_T = tl.load(last + p_T, mask=open_T, other=0)
        valid_T = tl.load(valid + p_T, mask=open_T, other=0) != 0
        joins_T = open_T & (a_T < b_T) & (a_T < last_T)
        last_T = tl.where(joins_T, b_T, last_T)
        tokens_T += joins_T.to(tl.int32)
        sum_T += tl.load(student + p_T, mask=joins_T, other=0.0).to(tl.float64)
        whole_T = whole_T & (valid_T | ~joins_T)
        open_T = joins_T | (open_T & (a_T >= b_T))
    return sum_T.to(tl.float32), tokens_T, first_T, last_T, whole_T, mapped_T & (begin_T == s_T)


@triton.jit
def _write_keys(
    student,  # [B, S] float
    loss,  # [B, U] float
    first,  # [B, S] int
    last,  # [B, S] int
    valid,  # [B, S] uint8
    key,  # [B, S] uint32, written
    opens,  # [B, S] uint8, written
    guide,  # [B, S] float32, written
    b,
    s_T,
    S,
    U,
    AGGREGATE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write guide, key and opens of the tokens s of row b."""
    row, inside_T = b * S, s_T < S
    first_T = tl.load(first + row + s_T, mask=inside_T, other=0)
    last_T = tl.load(last + row + s_T, mask=inside_T, other=0)
    student_T = tl.load(student + row + s_T, mask=inside_T, other=0.0).to(tl.float32)
    known_T = (tl.load(valid + row + s_T, mask=inside_T, other=0) != 0) & (student_T == student_T)
    if CHUNK:
        total_T, tokens_T, begin_T, end_T, whole_T, opens_T = _chunk(
            student + row, first + row, last + row, valid + row, s_T, inside_T & (first_T < last_T), S
        )
        teacher_T = _aggregate(loss + b * U, begin_T, end_T, "sum")
        teacher_T = tl.where(whole_T & (first_T < last_T), teacher_T, float("nan"))
        guide_T = teacher_T / tl.maximum(tokens_T, 1).to(tl.float32)
        excess_T = total_T - teacher_T + 0.0  # -0 becomes +0
    else:
        opens_T = inside_T
        guide_T = _aggregate(loss + b * U, first_T, last_T, AGGREGATE)
        excess_T = student_T - guide_T + 0.0
    tl.store(guide + row + s_T, guide_T, mask=inside_T)
    tl.store(opens + row + s_T, opens_T.to(tl.uint8), mask=inside_T)
    bits_T = excess_T.to(tl.uint32, bitcast=True)
    ordered_T = tl.where((bits_T >> 31) != 0, bits_T ^ NONE, bits_T | ZERO)
    other_T = tl.where(known_T & (guide_T != guide_T), UNMAPPED, NOTHING).to(tl.uint32)
    tl.store(key + row + s_T, tl.where(known_T & (excess_T == excess_T), ordered_T, other_T), mask=inside_T)


@triton.jit(do_not_specialize=("U",))
def keys(
    student,  # [B, S] float
    loss,  # [B, U] float
    first,  # [B, S] int
    last,  # [B, S] int
    valid,  # [B, S] uint8
    key,  # [B, S] uint32, written
    opens,  # [B, S] uint8, written
    guide,  # [B, S] float32, written
    S,
    U,
    AGGREGATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens of one row."""
    blocks = tl.maximum(tl.cdiv(S, BLOCK), 1)
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    s_T = block * BLOCK + tl.arange(0, BLOCK)
    _write_keys(student, loss, first, last, valid, key, opens, guide, b, s_T, S, U, AGGREGATE, CHUNK)


@triton.jit
def _excess(key):
    """The float with this key. NaN for NONE."""
    bits = tl.where((key >> 31) != 0, key ^ ZERO, key ^ NONE)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _kth_highest(key, numerator, denominator):
    """The k-th highest key, and k.

    It is the largest integer that at least k keys reach, built from the highest bit down. Tokens that are not eligible have lower
    keys. If k = 0, it is NONE, which no key reaches.
    """
    eligible = _many(key > UNMAPPED)
    k = ((eligible.to(tl.int64) * numerator + denominator - 1) // denominator).to(tl.int32)
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = found | bit
        found = tl.where(_many(key >= candidate) >= k, candidate, found)
        bit = bit >> 1
    return found, k


@triton.jit
def _above_zero(key, cut_key, missing):
    """The cut if only those of the k highest above 0 are kept, the number of ties that are kept at it, and the smallest kept key.

    The last is NONE if no key is kept.
    """
    missing = tl.where(cut_key > ZERO, missing, 0)
    cut_key = tl.where(cut_key > ZERO, cut_key, ZERO)
    above = tl.min(tl.where(key > cut_key, key, NONE).to(tl.uint32))
    return cut_key, missing, tl.where(missing > 0, cut_key, above)


@triton.jit
def threshold(
    key,  # [N] uint32
    at,  # [3] int64, written
    before,  # [2, P] int64, written
    lowest,  # [1] float32, written
    N,
    P,
    numerator,
    denominator,
    POSITIVE: tl.constexpr,
    INCLUDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: all tokens, one block per line of the tile."""
    p_P = tl.arange(0, BLOCKS)
    i_PT = p_P[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    key_PT = tl.load(key + i_PT, mask=i_PT < N, other=0)
    cut_key, k = _kth_highest(key_PT, numerator, denominator)
    certain_P = tl.sum((key_PT > cut_key).to(tl.int32), 1)
    missing = k - tl.sum(certain_P)
    smallest = cut_key
    if POSITIVE:
        cut_key, missing, smallest = _above_zero(key_PT, cut_key, missing)
        certain_P = tl.sum((key_PT > cut_key).to(tl.int32), 1)
    ties_P = tl.sum((key_PT == cut_key).to(tl.int32), 1)
    if INCLUDE:
        certain_P += tl.sum((key_PT == UNMAPPED).to(tl.int32), 1)
    ties_before_P = tl.cumsum(ties_P) - ties_P
    before_P = tl.cumsum(certain_P) - certain_P + tl.minimum(ties_before_P, missing)
    tl.store(before + p_P, ties_before_P, mask=p_P < P)
    tl.store(before + P + p_P, before_P, mask=p_P < P)
    tl.store(at, cut_key)
    tl.store(at + 1, missing)
    tl.store(at + 2, tl.sum(certain_P) + missing)
    tl.store(lowest, _excess(smallest))


@triton.jit
def count_above(
    key,  # [N] uint32
    at,  # [3] int64, written
    before,  # [2, P] int64, written
    lowest,  # [1] float32, written
    N,
    P,
    cut_key,
    INCLUDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the tokens with weight before each block, without a ranking. No key at the cut is kept."""
    weighted = tl.zeros((), tl.int64)
    for start in range(0, P, BLOCKS):
        p_P = start + tl.arange(0, BLOCKS)
        i_PT = p_P[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        key_PT = tl.load(key + i_PT, mask=i_PT < N, other=0)
        weighted_PT = key_PT > cut_key
        if INCLUDE:
            weighted_PT = weighted_PT | (key_PT == UNMAPPED)
        weighted_P = tl.sum(weighted_PT.to(tl.int64), 1)
        tl.store(before + p_P, tl.zeros_like(weighted_P), mask=p_P < P)
        tl.store(before + P + p_P, weighted + tl.cumsum(weighted_P) - weighted_P, mask=p_P < P)
        weighted += tl.sum(weighted_P)
    tl.store(at, tl.full((), 0, tl.int64) + cut_key)
    tl.store(at + 1, tl.zeros((), tl.int64))
    tl.store(at + 2, weighted)
    tl.store(lowest, float("nan"))


@triton.jit
def histogram(
    key,  # [N] uint32
    found,  # [1] int64, the bits above SHIFT + WIDTH that are known
    count,  # [2^WIDTH] int32, added to
    N,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens. Count the next WIDTH bits of the eligible keys that begin with `found`."""
    i_T = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key_T = tl.load(key + i_T, mask=i_T < N, other=0).to(tl.int64)
    alike_T = (key_T > UNMAPPED) & ((key_T >> (SHIFT + WIDTH)) == tl.load(found))
    digit_T = ((key_T >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
    count_D = tl.histogram(digit_T, 1 << WIDTH, mask=alike_T)
    tl.atomic_add(count + tl.arange(0, 1 << WIDTH), count_D, mask=count_D > 0, sem="relaxed")


@triton.jit
def count(
    key,  # [N] uint32
    found,  # [1] int64
    missing,  # [1] int64, over all ranks
    counts,  # [2, P] int64, written: ties, and tokens that have weight independently of ties
    lowest,  # [P] float32, written: the smallest kept excess, inf if none is kept
    N,
    P,
    INCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens."""
    p = tl.program_id(0).to(tl.int64)
    i_T = p * BLOCK + tl.arange(0, BLOCK)
    key_T = tl.load(key + i_T, mask=i_T < N, other=0)
    cut_key = tl.load(found).to(tl.uint32)
    above_T, tie_T = key_T > cut_key, key_T == cut_key
    certain_T = above_T
    if INCLUDE:
        certain_T = certain_T | (key_T == UNMAPPED)
    kept_T = above_T | (tie_T & (tl.load(missing) > 0))
    tl.store(counts + p, tl.sum(tie_T.to(tl.int32)))
    tl.store(counts + P + p, tl.sum(certain_T.to(tl.int32)))
    tl.store(lowest + p, tl.min(tl.where(kept_T, _excess(key_T), float("inf"))))


@triton.jit
def _write_sums(
    stats,  # [K] float64, written
    student_T,
    guide_T,
    valid_T,
    weighted_T,  # has weight, if within the capacity
    w_T,  # has weight
    weight_T,  # float32
    excess_T,  # float32, NaN if there is none
    unit_T,  # opens a unit that has an excess
    lowest,
    minus_threshold,
    clip,
):
    known_T = valid_T & (student_T == student_T)
    mapped_T, unmapped_T = known_T & (guide_T == guide_T), known_T & (guide_T != guide_T)
    kept_T, dropped_T = mapped_T & w_T, mapped_T & ~w_T
    has_lowest = tl.abs(lowest) < float("inf")
    sums = (  # in the order of STATS
        _many(valid_T),
        _many(valid_T & ~(tl.abs(student_T) < float("inf"))),
        _many(mapped_T),
        _many(kept_T),
        _many(unmapped_T),
        _many(unmapped_T & w_T),
        _many(weighted_T & ~w_T),
        _total(student_T, kept_T),
        _total(student_T, dropped_T),
        _total(student_T, unmapped_T),
        _total(guide_T, kept_T),
        _total(guide_T, dropped_T),
        _total(weight_T, w_T),
        _total(weight_T.to(tl.float64) * student_T, w_T),
        tl.where(has_lowest, lowest, 0.0),
        has_lowest,
        _many(unit_T),
        _total(tl.minimum(tl.exp(-excess_T.to(tl.float64)), clip), unit_T),
        _many(unit_T & (excess_T <= minus_threshold)),
    )
    for k in tl.static_range(_SUMS):
        tl.store(stats + k, sums[k].to(tl.float64))


@triton.jit
def _write_weights(
    student,  # [L, size] float
    guide,  # [L, size] float32
    valid,  # [L, size] uint8
    key,  # [L, size] uint32
    opens,  # [L, size] uint8
    weight,  # [L, size] float32, written
    tokens,  # [L, capacity] int64, written
    stats,  # [K] float64, of this block, written
    list_,
    i_T,
    size,
    capacity,
    cut,  # the threshold, the number of keys equal to it that are kept, and the number of tokens with weight, in this list
    ties,  # number of keys equal to the threshold before these tokens
    weighted,  # number of tokens with weight before these tokens
    lowest,  # the threshold to be counted here. NaN: it is counted elsewhere
    numbers,  # minus_threshold, strength, clip, lowest_excess, lowest_weight: see _weighting
    WEIGHTING: tl.constexpr,
    INCLUDE: tl.constexpr,
):
    """Write weights, positions and sums of the tokens i of a list. Returns the numbers of ties and of tokens with weight."""
    cut_key, missing, total = cut
    minus_threshold, strength, clip, lowest_excess, lowest_weight = numbers
    first, inside_T = list_ * size, i_T < size
    key_T = tl.load(key + first + i_T, mask=inside_T, other=0)
    tie_T = key_T == cut_key
    weighted_T = (key_T > cut_key) | (tie_T & (ties + tl.cumsum(tie_T.to(tl.int32)) <= missing))
    if INCLUDE:
        weighted_T = weighted_T | (key_T == UNMAPPED)
    place_T = weighted + tl.cumsum(weighted_T.to(tl.int32)) - weighted_T.to(tl.int32)
    w_T = weighted_T & (place_T < capacity)
    mapped_T = key_T > UNMAPPED
    excess_T = tl.where(mapped_T, _excess(key_T), float("nan"))
    weight_T = w_T.to(tl.float32)
    if WEIGHTING == "control_variate":
        variate_T = tl.maximum(1 - strength * tl.exp(-excess_T), _SMALLEST)
        variate_T = tl.where(excess_T > lowest_excess, variate_T, lowest_weight)
        weight_T = tl.where(w_T & mapped_T, variate_T, weight_T)
    tl.store(weight + first + i_T, weight_T, mask=inside_T)
    at_T = tl.where(weighted_T, place_T, total + i_T - place_T)  # tokens of weight 0 come after all with weight
    tl.store(tokens + list_ * capacity + at_T, first + i_T, mask=inside_T & (at_T < capacity))

    student_T = tl.load(student + first + i_T, mask=inside_T, other=0.0).to(tl.float32)
    guide_T = tl.load(guide + first + i_T, mask=inside_T, other=0.0)
    valid_T = tl.load(valid + first + i_T, mask=inside_T, other=0) != 0
    unit_T = mapped_T & (tl.load(opens + first + i_T, mask=inside_T, other=0) != 0)
    _write_sums(stats, student_T, guide_T, valid_T, weighted_T, w_T, weight_T, excess_T, unit_T, lowest, minus_threshold, clip)
    return _many(tie_T), _many(weighted_T)


@triton.jit(do_not_specialize=("capacity",))
def weights(
    student,  # [N] float
    guide,  # [N] float32
    valid,  # [N] uint8
    key,  # [N] uint32
    opens,  # [N] uint8
    at,  # [3] int64
    before,  # [2, P] int64
    lowest,  # [1] float32
    weight,  # [N] float32, written
    tokens,  # [C] int64, written
    stats,  # [P, K] float64, written
    N,
    P,
    capacity,
    minus_threshold,
    strength,
    clip,
    lowest_excess,
    lowest_weight,
    WEIGHTING: tl.constexpr,
    INCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens."""
    p = tl.program_id(0).to(tl.int64)
    i_T = p * BLOCK + tl.arange(0, BLOCK)
    cut = (tl.load(at).to(tl.uint32), tl.load(at + 1), tl.load(at + 2))
    ties, weighted = tl.load(before + p), tl.load(before + P + p)
    lowest = tl.where(p == 0, tl.load(lowest), float("nan"))
    numbers = (minus_threshold, strength, clip, lowest_excess, lowest_weight)
    stats += p * _SUMS
    _write_weights(
        student,
        guide,
        valid,
        key,
        opens,
        weight,
        tokens,
        stats,
        0,
        i_T,
        N,
        capacity,
        cut,
        ties,
        weighted,
        lowest,
        numbers,
        WEIGHTING,
        INCLUDE,
    )


@triton.jit(do_not_specialize=("U", "capacity"))
def select_row(
    student,  # [B, S] float
    loss,  # [B, U] float
    first,  # [B, S] int
    last,  # [B, S] int
    valid,  # [B, S] uint8
    key,  # [B, S] uint32, written
    opens,  # [B, S] uint8, written
    guide,  # [B, S] float32, written
    weight,  # [B, S] float32, written
    tokens,  # [B, capacity] int64, written
    stats,  # [B, ceil(S / BLOCK), K] float64, written
    S,
    U,
    capacity,
    numerator,
    denominator,
    cut_key,
    minus_threshold,
    strength,
    clip,
    lowest_excess,
    lowest_weight,
    AGGREGATE: tl.constexpr,
    CHUNK: tl.constexpr,
    WEIGHTING: tl.constexpr,
    POSITIVE: tl.constexpr,
    INCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: one row. Keys and weights BLOCK tokens at a time, the ranking in registers."""
    b = tl.program_id(0).to(tl.int64)
    steps = tl.maximum(tl.cdiv(S, BLOCK), 1)
    for step in range(steps):
        s_T = step * BLOCK + tl.arange(0, BLOCK)
        _write_keys(student, loss, first, last, valid, key, opens, guide, b, s_T, S, U, AGGREGATE, CHUNK)
    tl.debug_barrier()  # other threads wrote the keys that this one reads
    s_S = tl.arange(0, TOKENS)
    key_S = tl.load(key + b * S + s_S, mask=s_S < S, other=0)
    if WEIGHTING == "top_k":
        cut_key, k = _kth_highest(key_S, numerator, denominator)
        above = _many(key_S > cut_key)
        missing = k - above
        smallest = cut_key
        if POSITIVE:
            cut_key, missing, smallest = _above_zero(key_S, cut_key, missing)
            above = _many(key_S > cut_key)
    else:
        cut_key = tl.full((), cut_key, tl.uint32)
        above = _many(key_S > cut_key)
        missing = above * 0
        smallest = tl.full((), 0xFFFFFFFF, tl.uint32)
    total = above + missing
    if INCLUDE:
        total += _many(key_S == UNMAPPED)
    cut = (cut_key, missing, total)
    numbers = (minus_threshold, strength, clip, lowest_excess, lowest_weight)
    stats += b * steps * _SUMS
    ties = 0
    weighted = 0
    for step in range(steps):
        s_T = step * BLOCK + tl.arange(0, BLOCK)
        lowest = tl.where(step == 0, _excess(smallest), float("nan"))
        more_ties, more = _write_weights(
            student,
            guide,
            valid,
            key,
            opens,
            weight,
            tokens,
            stats,
            b,
            s_T,
            S,
            capacity,
            cut,
            ties,
            weighted,
            lowest,
            numbers,
            WEIGHTING,
            INCLUDE,
        )
        ties += more_ties
        weighted += more
        stats += _SUMS
