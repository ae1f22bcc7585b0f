"""The kernels of `selection_triton`, which says how they work together.

Keys: the 32 bits of an excess as an unsigned integer in the order of the floats, -0 being +0. Below those of all floats are
two more: of a token that can have no weight (padding, a loss of NaN), and of an unmapped one.

In a kernel, T tokens are what a program holds at a time. Offsets are 64 bits wide; shapes stand beside the pointers, which are
to contiguous memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(0)
UNMAPPED = tl.constexpr(1)
ZERO = tl.constexpr(0x80000000)  # of 0.0; that of -inf is 0x007FFFFF, that of +inf 0xFF800000
NONE = tl.constexpr(0xFFFFFFFF)  # above all keys
SUMS = tl.constexpr(16)  # len(STATS)


@triton.jit
def _many(mask_T):
    return tl.sum(mask_T.to(tl.int32))


@triton.jit
def _total(x_T, where_T):
    return tl.sum(tl.where(where_T, x_T.to(tl.float64), 0.0))


@triton.jit
def _aggregate(loss, first_T, last_T, AGGREGATE: tl.constexpr):
    """Of the losses in [first, last) of one teacher row; NaN where there is none, as where last <= first, or one is NaN."""
    width_T = last_T - first_T
    if AGGREGATE == "max":
        guide_T = tl.full(first_T.shape, float("-inf"), tl.float32)
    elif AGGREGATE == "min":
        guide_T = tl.full(first_T.shape, float("inf"), tl.float32)
    else:
        guide_T = tl.zeros(first_T.shape, tl.float64)  # exact enough to round once, whatever the order
    nan_T = width_T <= 0
    for j in range(tl.max(width_T, 0)):
        inside_T = j < width_T
        loss_T = tl.load(loss + first_T + j, mask=inside_T, other=0.0).to(tl.float32)
        nan_T = nan_T | (loss_T != loss_T)  # max and min of the hardware pass over NaN
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
def _write_keys(
    student,  # [B, S] float
    loss,  # [B, U] float, or the guide [B, S]
    first,  # [B, S] int, or None
    last,  # [B, S] int, or None
    valid,  # [B, S] uint8
    key,  # [B, S] uint32, written
    guide,  # [B, S] float32, written
    b,
    s_T,
    S,
    U,
    AGGREGATE: tl.constexpr,
):
    """Of the tokens s of row b."""
    row, inside_T = b * S, s_T < S
    if first is None:
        guide_T = tl.load(loss + row + s_T, mask=inside_T, other=0.0).to(tl.float32)
    else:
        first_T = tl.load(first + row + s_T, mask=inside_T, other=0)
        last_T = tl.load(last + row + s_T, mask=inside_T, other=0)
        guide_T = _aggregate(loss + b * U, first_T, last_T, AGGREGATE)
    tl.store(guide + row + s_T, guide_T, mask=inside_T)
    student_T = tl.load(student + row + s_T, mask=inside_T, other=0.0).to(tl.float32)
    known_T = (tl.load(valid + row + s_T, mask=inside_T, other=0) != 0) & (student_T == student_T)
    excess_T = student_T - guide_T + 0.0  # -0 becomes +0
    bits_T = excess_T.to(tl.uint32, bitcast=True)
    ordered_T = tl.where((bits_T >> 31) != 0, bits_T ^ NONE, bits_T | ZERO)
    other_T = tl.where(known_T & (guide_T != guide_T), UNMAPPED, NOTHING).to(tl.uint32)
    tl.store(key + row + s_T, tl.where(known_T & (excess_T == excess_T), ordered_T, other_T), mask=inside_T)


@triton.jit(do_not_specialize=("U",))
def keys(
    student,  # [B, S] float
    loss,  # [B, U] float, or the guide [B, S]
    first,  # [B, S] int, or None
    last,  # [B, S] int, or None
    valid,  # [B, S] uint8
    key,  # [B, S] uint32, written
    guide,  # [B, S] float32, written
    S,
    U,
    AGGREGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens of one row."""
    blocks = tl.maximum(tl.cdiv(S, BLOCK), 1)
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    _write_keys(student, loss, first, last, valid, key, guide, b, block * BLOCK + tl.arange(0, BLOCK), S, U, AGGREGATE)


# ---- threshold


@triton.jit
def _excess(key):
    """The float that has this key; NaN for NONE."""
    bits = tl.where((key >> 31) != 0, key ^ ZERO, key ^ NONE)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _kth_highest(key, numerator, denominator):
    """The k-th highest key, and k.

    It is the largest integer that at least k keys reach, built from its highest bit down. Tokens that are not eligible have
    keys below it; where k = 0 it is NONE, which no key reaches.
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
    """Where the cut is if of the k highest those above 0 are kept; how many ties at it are; the smallest kept key, or NONE."""
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
    """One program: all tokens, a block in each line of the tile."""
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
def histogram(
    key,  # [N] uint32
    found,  # [1] int64, the bits above SHIFT + WIDTH that are known
    count,  # [2^WIDTH] int32, added to
    N,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens. The next WIDTH bits of the eligible keys that begin as `found` does."""
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
    missing,  # [1] int64, on all ranks
    counts,  # [2, P] int64, written: ties, and tokens that have weight however ties are broken
    lowest,  # [P] float32, written: the smallest kept excess, inf where there is none
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


# ---- weights


@triton.jit
def _write_sums(
    stats,  # [K] float64, written
    student_T,
    guide_T,
    valid_T,
    weighted_T,  # has weight if there is room
    w_T,  # has weight
    lowest,
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
        _many(w_T),
        _total(student_T, w_T),
        tl.where(has_lowest, lowest, 0.0),
        has_lowest,
    )
    for k in tl.static_range(SUMS):
        tl.store(stats + k, sums[k].to(tl.float64))


@triton.jit
def _write_weights(
    student,  # [L, size] float
    guide,  # [L, size] float32
    valid,  # [L, size] uint8
    key,  # [L, size] uint32
    weight,  # [L, size] float32, written
    rows,  # [L, capacity] int64, written
    stats,  # [K] float64, of this block, written
    list_,
    i_T,
    size,
    capacity,
    cut,  # the threshold; so many of the keys equal to it are kept in this list; so many tokens of this list have weight
    ties,  # so many of the keys equal to the threshold stand before these tokens
    weighted,  # so many tokens that have weight
    lowest,  # to be counted here; NaN: it is not
    INCLUDE: tl.constexpr,
):
    """Of the tokens i of a list: weights, their place among the rows, and sums. Returns ties, and tokens that have weight."""
    cut_key, missing, total = cut
    first, inside_T = list_ * size, i_T < size
    key_T = tl.load(key + first + i_T, mask=inside_T, other=0)
    tie_T = key_T == cut_key
    weighted_T = (key_T > cut_key) | (tie_T & (ties + tl.cumsum(tie_T.to(tl.int32)) <= missing))
    if INCLUDE:
        weighted_T = weighted_T | (key_T == UNMAPPED)
    place_T = weighted + tl.cumsum(weighted_T.to(tl.int32)) - weighted_T.to(tl.int32)
    w_T = weighted_T & (place_T < capacity)
    tl.store(weight + first + i_T, w_T.to(tl.float32), mask=inside_T)
    at_T = tl.where(weighted_T, place_T, total + i_T - place_T)  # those of weight 0 come after all that have weight
    tl.store(rows + list_ * capacity + at_T, first + i_T, mask=inside_T & (at_T < capacity))

    student_T = tl.load(student + first + i_T, mask=inside_T, other=0.0).to(tl.float32)
    guide_T = tl.load(guide + first + i_T, mask=inside_T, other=0.0)
    valid_T = tl.load(valid + first + i_T, mask=inside_T, other=0) != 0
    _write_sums(stats, student_T, guide_T, valid_T, weighted_T, w_T, lowest)
    return _many(tie_T), _many(weighted_T)


@triton.jit(do_not_specialize=("capacity",))
def weights(
    student,  # [N] float
    guide,  # [N] float32
    valid,  # [N] uint8
    key,  # [N] uint32
    at,  # [3] int64
    before,  # [2, P] int64
    lowest,  # [1] float32
    weight,  # [N] float32, written
    rows,  # [C] int64, written
    stats,  # [P, K] float64, written
    N,
    P,
    capacity,
    INCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens."""
    p = tl.program_id(0).to(tl.int64)
    i_T = p * BLOCK + tl.arange(0, BLOCK)
    cut = (tl.load(at).to(tl.uint32), tl.load(at + 1), tl.load(at + 2))
    ties, weighted = tl.load(before + p), tl.load(before + P + p)
    lowest = tl.where(p == 0, tl.load(lowest), float("nan"))
    stats += p * SUMS
    _write_weights(student, guide, valid, key, weight, rows, stats, 0, i_T, N, capacity, cut, ties, weighted, lowest, INCLUDE)


# ---- all of it


@triton.jit(do_not_specialize=("U", "capacity"))
def select_row(
    student,  # [B, S] float
    loss,  # [B, U] float, or the guide [B, S]
    first,  # [B, S] int, or None
    last,  # [B, S] int, or None
    valid,  # [B, S] uint8
    key,  # [B, S] uint32, written
    guide,  # [B, S] float32, written
    weight,  # [B, S] float32, written
    rows,  # [B, capacity] int64, written
    stats,  # [B, ceil(S / BLOCK), K] float64, written
    S,
    U,
    capacity,
    numerator,
    denominator,
    AGGREGATE: tl.constexpr,
    POSITIVE: tl.constexpr,
    INCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: one row, keys and weights BLOCK tokens at a time, the ranking in registers."""
    b = tl.program_id(0).to(tl.int64)
    steps = tl.maximum(tl.cdiv(S, BLOCK), 1)
    for step in range(steps):
        _write_keys(student, loss, first, last, valid, key, guide, b, step * BLOCK + tl.arange(0, BLOCK), S, U, AGGREGATE)
    tl.debug_barrier()  # other threads wrote the keys that this one reads
    s_S = tl.arange(0, TOKENS)
    key_S = tl.load(key + b * S + s_S, mask=s_S < S, other=0)
    cut_key, k = _kth_highest(key_S, numerator, denominator)
    above = _many(key_S > cut_key)
    missing = k - above
    smallest = cut_key
    if POSITIVE:
        cut_key, missing, smallest = _above_zero(key_S, cut_key, missing)
        above = _many(key_S > cut_key)
    total = above + missing
    if INCLUDE:
        total += _many(key_S == UNMAPPED)
    cut = (cut_key, missing, total)
    stats += b * steps * SUMS
    ties = 0
    weighted = 0
    for step in range(steps):
        s_T = step * BLOCK + tl.arange(0, BLOCK)
        lowest = tl.where(step == 0, _excess(smallest), float("nan"))
        more_ties, more = _write_weights(
            student, guide, valid, key, weight, rows, stats, b, s_T, S, capacity, cut, ties, weighted, lowest, INCLUDE
        )
        ties += more_ties
        weighted += more
        stats += SUMS
